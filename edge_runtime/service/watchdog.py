"""Tells systemd that the server is alive, but only while that is true: idle, or making progress.

A timer alone would go on while a decode hangs. Here the timer only asks; what counts is what the engine's loop has
reported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_MICROSECONDS = 1_000_000


def watchdog_interval_s(environment: Mapping[str, str], pid: int | None = None) -> float | None:
    """Seconds within which systemd wants to hear of process `pid` (this one); None if it does not."""
    wanted_pid = environment.get("WATCHDOG_PID", "")
    if wanted_pid and wanted_pid != str(os.getpid() if pid is None else pid):
        return None
    text = environment.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdigit()):
        return None
    return int(text) / _MICROSECONDS or None


class Watchdog:
    """Between the engine's loop, which reports, and a timer, which calls `check` every `period_s`.

    Of the work in hand some must be done within the interval; else no `ping` is sent and systemd ends the service.
    Where the server's own event loop calls `check`, that loop is watched, too. Thread-safe.
    """

    def __init__(self, ping: Callable[[], object], interval_s: float) -> None:
        self.period_s = interval_s / 2
        self._ping = ping
        self._lock = threading.Lock()
        self._working = 0  # pieces of work in hand
        self._progressed = False  # … since the last check
        self._owed = False  # the last check found neither, so that the next progress must not wait for a check

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around what must make progress, entered by the one that does the work; such works may overlap.

        Not around waiting requests: their coming and going is no progress of an engine that hangs.
        """
        with self._lock:
            if self._working == 0:
                self._progressed = True
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                owed = self._owed and self._working == 0
                self._owed = self._owed and not owed
            if owed:
                self._ping()

    def tick(self) -> None:
        """A token, a batch of the prompt or a part of a load is done."""
        with self._lock:
            owed, self._owed = self._owed, False
            self._progressed = not owed  # a ping that is sent now stands for this progress
        if owed:
            self._ping()

    @property
    def idle(self) -> bool:
        """Whether there is no work in hand."""
        with self._lock:
            return self._working == 0

    def check(self) -> bool:
        """Ping if that is due; False if work is in hand and nothing of it was done since the last time."""
        with self._lock:
            alive = self._progressed or self._working == 0
            self._progressed, self._owed = False, not alive
        if alive:
            self._ping()
        return alive

    def run(self, wait: Callable[[float], Any]) -> None:
        """Check every `period_s` until `wait(seconds)`, as threading.Event has it, says that it is over."""
        while not wait(self.period_s):
            self.check()


@contextmanager
def watching(watchdog: Watchdog) -> Iterator[None]:
    """A thread that checks, for servers without an event loop of their own."""
    over = threading.Event()
    thread = threading.Thread(target=watchdog.run, args=(over.wait,), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
