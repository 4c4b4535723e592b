"""Sensors read together, once or on a thread of its own that costs next to nothing."""

from __future__ import annotations

import dataclasses
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from .machine import Sensor
from .reading import Reading, combine

Listener = Callable[[Reading], None]
Warn = Callable[[str], None]

CPU_SHARE = 0.01  # of one core, at most
_LONGEST_S = 30.0  # between readings, however dear they are
_PATIENCE_S = 5.0  # for a sensor that hangs while the sampler closes
_HISTORY = 3600
_SETTLE_S = 0.25


def next_interval_s(
    wanted_s: float, round_cpu_s: float, cpu_share: float = CPU_SHARE, longest_s: float = _LONGEST_S
) -> float:
    """Seconds from one round's start to the next one's, so that rounds of this CPU time take `cpu_share` of a core.

    Never shorter than wanted; longer than `longest_s` only where that is wanted: one round that a busy machine made
    dear must not blind whoever looks at the readings.
    """
    return max(wanted_s, min(round_cpu_s / cpu_share, longest_s))


def thread_cpu_s() -> float:
    """CPU seconds of this thread and of commands that have ended, as a sensor's `vcgencmd` does.

    Commands of other threads count, too: the system does not tell them apart.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.thread_time() + children.ru_utime + children.ru_stime


@dataclass(frozen=True, slots=True)
class Timing:
    """What a sampler knows of time: seconds of a monotonic clock and of CPU time, and how to wait for an event."""

    now: Callable[[], float] = time.monotonic
    cpu: Callable[[], float] = thread_cpu_s
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait  # True: the event came


_REAL_TIME = Timing()


class SensorGroup:
    """Several sensors that are read as one; one that raises, against its promise, is left out from then on."""

    def __init__(self, sensors: Sequence[Sensor], warn: Warn = lambda _text: None) -> None:
        self._sensors = list(sensors)
        self._warn = warn
        self._n_read = 0
        self._powered: tuple[str, ...] | None = None  # the sensor whose power counts

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sensors that are still read."""
        return tuple(sensor.name for sensor in self._sensors)

    def parts(self, time_s: float) -> list[Reading]:
        """What each of them knows now."""
        parts = []
        for sensor in tuple(self._sensors):
            try:
                parts.append(sensor.read(time_s))
            except Exception as error:
                self._sensors.remove(sensor)
                self._warn(f"the sensor {sensor.name} is read no more: {error!r}")
        return parts

    def read(self, time_s: float) -> Reading:
        """What all of them know now; where several know a quantity, the first one's word.

        The power is always one sensor's: one measures a package, another the machine, and a sum over time of now this,
        now that would mean nothing. It is the first that knows it at the second reading: at the first, counters do not.
        """
        parts = self.parts(time_s)
        self._n_read += 1
        if len(self._sensors) == 1:
            return combine(time_s, parts)
        if self._powered is None and self._n_read > 1:
            self._powered = next((part.sensors for part in parts if part.power_w is not None), None)
        return combine(time_s, [part if part.sensors == self._powered else _powerless(part) for part in parts])

    def settle(self, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        """Wait a moment, so that sensors whose counters say something only between two reads answer the next time."""
        self.read(now())
        sleep(_SETTLE_S)


def _powerless(reading: Reading) -> Reading:
    return dataclasses.replace(reading, power_w=None, power_source=None)


class Sampler:
    """Reads sensors every `interval_s` on a daemon thread, from `with` to its end.

    A round that takes more than one percent of a core delays the next one. Listeners hear each reading on that thread,
    and their time counts as the sensors' does. All methods may be called from any thread.
    """

    def __init__(
        self,
        sensors: Sequence[Sensor],
        interval_s: float = 1.0,
        *,
        listeners: Sequence[Listener] = (),
        warn: Warn = lambda _text: None,
        n_history: int = _HISTORY,
        timing: Timing = _REAL_TIME,
    ) -> None:
        self._group = SensorGroup(sensors, warn)
        self._wanted_s = interval_s
        self._listeners = list(listeners)
        self._warn = warn
        self._timing = timing
        self._history: deque[Reading] = deque(maxlen=n_history)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edge-sensors", daemon=True)

    @property
    def latest(self) -> Reading | None:
        """The last reading; None before the first."""
        with self._lock:
            return self._history[-1] if self._history else None

    def since(self, time_s: float) -> list[Reading]:
        """Readings in order, beginning with the last one at or before `time_s`, which still held then.

        They cover the time from `time_s` on, unless it lies before what the history holds.
        """
        with self._lock:
            readings = list(self._history)
        later = next((i for i, reading in enumerate(readings) if reading.time_s > time_s), len(readings))
        return readings[max(later - 1, 0) :]

    def close(self) -> None:
        """Stop reading. A sensor that hangs is waited for some seconds, then left to itself; nobody hears of it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE_S)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        timing, stopped = self._timing, False
        while not stopped:
            start_s, start_cpu_s = timing.now(), timing.cpu()
            self._publish(self._group.read(start_s))
            interval_s = next_interval_s(self._wanted_s, timing.cpu() - start_cpu_s)
            stopped = timing.wait(self._stop, max(0.0, start_s + interval_s - timing.now()))

    def _publish(self, reading: Reading) -> None:
        if self._stop.is_set():
            return
        with self._lock:
            self._history.append(reading)
        for listener in tuple(self._listeners):
            try:
                listener(reading)
            except Exception as error:
                self._listeners.remove(listener)
                self._warn(f"readings are passed on to one listener less: {error}")
