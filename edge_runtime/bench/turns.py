"""Several figures of several sides, measured in turns: a slow spell of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quartiles:
    """Median of some repeats, and the quarters below and above it."""

    median: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def quartiles(values: Sequence[float]) -> Quartiles:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Quartiles(float(median), float(low), float(high), len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Quartiles:
    """Of the quotients, repeat by repeat."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def in_turns(
    figures: Mapping[str, Mapping[str, Callable[[], T]]],
    repeats: int,
    *,
    warm_up: bool = True,
    done: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, list[T]]]:
    """Figure → side → its `repeats` values. In each repeat all sides of a figure follow one another, then the next one.

    Another side begins each time. `done` is called after each call of a side, those of the warm-up among them.
    """
    found: dict[str, dict[str, list[T]]] = {figure: {side: [] for side in sides} for figure, sides in figures.items()}
    for repeat in range(-1 if warm_up else 0, repeats):
        for figure, sides in figures.items():
            names = list(sides)
            first = repeat % len(names)
            for side in names[first:] + names[:first]:
                value = sides[side]()
                done()
                if repeat >= 0:
                    found[figure][side].append(value)
    return found


class Countdown:
    """How much of a long run is done, and about how long the rest takes."""

    def __init__(
        self, total: int, say: Callable[[str], None], *, every: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._say, self._every, self._clock = total, say, max(1, every), clock
        self._done, self._started = 0, clock()

    def step(self) -> None:
        self._done += 1
        if self._done % self._every and self._done != self._total:
            return
        left_s = (self._clock() - self._started) / self._done * (self._total - self._done)
        self._say(f"{self._done} of {self._total}, {_duration(left_s)} left")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
