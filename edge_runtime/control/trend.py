"""A noisy quantity's level and rate of change, from readings at irregular times."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY_S = 5.0  # short against the minutes in which a board warms up, long against the noise of a sensor


@dataclass(frozen=True, slots=True)
class Trend:
    """An α-β filter, critically damped (Benedict and Bordner 1962)."""

    level: float
    slope: float  # per second
    time_s: float

    def at(self, ahead_s: float) -> float:
        """The level `ahead_s` seconds after the last reading, if the rate stays."""
        return self.level + self.slope * ahead_s


def follow(trend: Trend | None, value: float, time_s: float, memory_s: float = _MEMORY_S) -> Trend:
    """The trend after one more reading; a gap much longer than the memory begins anew."""
    if trend is None or time_s - trend.time_s > 6 * memory_s:
        return Trend(value, 0.0, time_s)
    passed_s = time_s - trend.time_s
    if passed_s <= 0:
        return trend
    kept = math.exp(-passed_s / memory_s)
    expected = trend.at(passed_s)
    error = value - expected
    return Trend(expected + (1 - kept**2) * error, trend.slope + (1 - kept) ** 2 * error / passed_s, time_s)


def smooth(old: float, new: float, passed_s: float, memory_s: float) -> float:
    """`old` moved towards `new`, by 63% in `memory_s` seconds."""
    return old + (new - old) * -math.expm1(-passed_s / memory_s)
