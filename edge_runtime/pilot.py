"""A controller at the wheel: between tokens, what it decides is applied to a runtime.

It changes what costs no quality: how many threads compute, and for which share of the time nobody does. With the edge
kernels, a text does not depend on either (see docs/kernels.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median_low

from .control import Controller, Ladder, Observation, Rung, ladder_of
from .energy.model import PowerModel
from .sensors.reading import Reading
from .slices import Slice
from .types import Mode

STEP_S = 0.5  # between decisions
RESTS = (0.0, 0.25, 0.5, 0.75)
_TIMED_TOKENS = 3


def token_times_ms(
    slices: Sequence[Slice], thread_counts: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Milliseconds of one token through all of `slices` with each number of threads, the median of three.

    The numbers take turns, so that a slow spell hits all. The caches must be empty, and are left so; the slices keep
    the last of the numbers. Raises DecodeError.
    """
    first, *rest = slices
    route = first.route_to(rest) if rest else None
    taken: dict[int, list[float]] = {n: [] for n in thread_counts}

    def run() -> float:
        start = clock()
        first.decode_tokens([0], 0, [0], route=route)
        slices[-1].synchronize()
        took = clock() - start
        for piece in slices:
            piece.remove(0)
        return took

    for n in [*thread_counts] * _TIMED_TOKENS:
        for piece in slices:
            piece.set_threads(n)
        run()  # other threads start, and the weights come from the disk
        taken[n].append(run())
    return {n: 1e3 * median_low(times) for n, times in taken.items()}


def lossless_ladder(token_ms: Mapping[int, float], power: PowerModel, gb_per_token: float, mode: Mode) -> Ladder:
    """Rungs for each number of threads in `token_ms` and each share of rest, with the power that the model predicts.

    `gb_per_token` is what of the weights a token reads. Rungs that another one beats in time and power are left out.
    """
    rungs = []
    for n, ms in token_ms.items():
        busy_w = power.power_w(1.0, n, gb_per_token / (ms / 1e3)) - power.static_w
        for rest in RESTS:
            name = f"{n} thread{'' if n == 1 else 's'}" + (f", resting {rest:.0%}" if rest else "")
            watts = power.static_w + busy_w * (1 - rest)
            rungs.append(Rung(name, mode, ms / (1 - rest), watts, n_threads=n, rest=rest))
    return ladder_of(rungs)


class Pilot:
    """Asks the controller every half second of generation and does what it says."""

    def __init__(
        self,
        controller: Controller,
        set_threads: Callable[[int], None],
        latest: Callable[[], Reading | None],
        now: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """`latest` gives the newest reading, of the clock `now`."""
        self._controller, self._set_threads, self._latest = controller, set_threads, latest
        self._now, self._sleep = now, sleep
        self._rung: Rung | None = None
        self._since_s = self._token_s = 0.0
        self._n_tokens = 0
        self._prompt = True  # its first token is still to come

    def begin(self) -> None:
        """Before an answer: take a rung by what the sensors say now."""
        self._decide(None)
        self._prompt = True

    def token(self) -> None:
        """After each token: rest, if that is the rung, and decide anew when it is time.

        The first one came with the prompt, whose time says nothing of a token's and is not rested for.
        """
        if self._prompt:
            self._prompt = False
            self._since_s = self._token_s = self._now()
            return
        self._n_tokens += 1
        if self._rung is not None and self._rung.rest:
            self._sleep((self._now() - self._token_s) * self._rung.rest / (1 - self._rung.rest))
        passed_s = self._now() - self._since_s
        if passed_s >= STEP_S:
            self._decide(1e3 * passed_s / self._n_tokens)
        self._token_s = self._now()

    def _decide(self, time_per_token_ms: float | None) -> None:
        now_s = self._now()
        reading = self._latest() or Reading(now_s)
        rung = self._controller.observe(Observation(now_s, reading, time_per_token_ms)).rung
        if rung != self._rung:
            self._set_threads(rung.n_threads)
        self._rung, self._since_s, self._n_tokens = rung, now_s, 0
