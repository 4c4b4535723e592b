"""The integral of power over time, with what is known of idling, and how much of the time was seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..sensors.reading import PowerSource, Reading

MAX_GAP_S = 4.0
IDLE_LOAD = 0.1  # a machine with less of its cores busy counts as idle
MIN_IDLE_READINGS = 3  # one alone may have caught something


@dataclass(frozen=True, slots=True)
class Energy:
    """What was used in `seconds`. `gross_j` extends the mean power of the time that was seen to what was not."""

    gross_j: float
    idle_j: float | None  # what idling would have used; None: the idle power is not known
    seconds: float
    source: PowerSource  # the least good of the readings it is from
    covered: float  # share of the time with readings near enough, above 0, at most 1

    @property
    def net_j(self) -> float | None:
        """Above idling; below 0 where the machine was idler than when that was measured."""
        return None if self.idle_j is None else self.gross_j - self.idle_j


def integrate(
    readings: Sequence[Reading],
    start_s: float,
    end_s: float,
    *,
    idle_w: float | None = None,
    max_gap_s: float = MAX_GAP_S,
) -> Energy | None:
    """Energy between two moments by the trapezoid rule, in any order of readings; None if nothing is known.

    Readings without a power count as missing. A power holds for half of `max_gap_s` to either side, and is interpolated
    where the next reading is within `max_gap_s`; the rest of a longer gap, or before and after all readings, is not
    covered.
    """
    gross_j = covered_s = 0.0
    sources: set[PowerSource] = set()
    for before, after in _pieces(readings, max_gap_s):
        left, right = max(before[0], start_s), min(after[0], end_s)
        if left < right:
            gross_j += (_interpolate(before, after, left) + _interpolate(before, after, right)) / 2 * (right - left)
            covered_s += right - left
            sources |= {before[2], after[2]}
    if not sources:
        return None
    seconds = end_s - start_s
    return Energy(
        gross_j=gross_j * seconds / covered_s,
        idle_j=None if idle_w is None else idle_w * seconds,
        seconds=seconds,
        source=worst(sources),
        covered=min(1.0, covered_s / seconds),
    )


_Sample = tuple[float, float, PowerSource]  # seconds, watts


def _pieces(readings: Sequence[Reading], max_gap_s: float) -> Iterator[tuple[_Sample, _Sample]]:
    """Neighbouring samples with known power between them, in order of time."""
    samples = [
        (r.time_s, r.power_w, r.power_source or PowerSource.ESTIMATED)
        for r in readings
        if r.power_w is not None and math.isfinite(r.power_w)
    ]
    samples.sort(key=lambda sample: sample[0])
    reach_s = max_gap_s / 2
    previous: _Sample | None = None
    for sample in samples:
        if previous is not None and sample[0] - previous[0] <= max_gap_s:
            yield previous, sample
        else:
            if previous is not None:
                yield previous, _moved(previous, reach_s)
            yield _moved(sample, -reach_s), sample
        previous = sample
    if previous is not None:
        yield previous, _moved(previous, reach_s)


def _moved(sample: _Sample, seconds: float) -> _Sample:
    time_s, power_w, source = sample
    return time_s + seconds, power_w, source


def _interpolate(before: _Sample, after: _Sample, time_s: float) -> float:
    share = (time_s - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])


def worst(sources: set[PowerSource]) -> PowerSource:
    """The least good of some sources: measured, then calibrated, then estimated."""
    return max(sources, key=list(PowerSource).index)


def idle_power(readings: Sequence[Reading], until_s: float = math.inf, max_load: float = IDLE_LOAD) -> float | None:
    """Median power of readings before `until_s` with a load below `max_load`; None of fewer than three."""
    powers = [
        r.power_w
        for r in readings
        if r.time_s < until_s
        and r.power_w is not None
        and math.isfinite(r.power_w)
        and r.load is not None
        and r.load < max_load
    ]
    return statistics.median(powers) if len(powers) >= MIN_IDLE_READINGS else None
