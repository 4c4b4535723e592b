"""Ratios that can be trusted on a shared machine: two sides in turn, many times, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some repeats."""

    median: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f}, n={self.n})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against theirs: the ratio pair by pair, and each side's own figure."""

    ratio: Spread
    ours: Spread
    theirs: Spread


def interleave(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> Comparison:
    """Call both in turn, `repeats` times after one warm-up, swapping who goes first, and compare pair by pair."""
    ours()
    theirs()
    pairs: list[tuple[float, float]] = []
    for i in range(repeats):
        if i % 2:
            second, first = theirs(), ours()
            pairs.append((first, second))
        else:
            pairs.append((ours(), theirs()))
    return Comparison(spread([a / b for a, b in pairs]), spread([a for a, _ in pairs]), spread([b for _, b in pairs]))
