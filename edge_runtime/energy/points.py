"""Points to fit the power model to: typed, or from a power meter's log beside a recording of readings."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..sensors.reading import Reading
from .account import integrate
from .fit import Point

_MIN_COVERED = 0.99  # of a reading's interval, by the meter
_MAX_METER_GAP_S = 10.0
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Traffic:
    """A time in which weights were read, in seconds after the recording's first reading."""

    from_s: float
    to_s: float
    gb_per_s: float


def parse_point(text: str) -> Point:
    """`0.5:3.2:6.1` → load, GB/s, watts. Raises UsageError."""
    load, gb_per_s, power_w = _numbers(text, "--point", "LOAD:GB_PER_S:WATT, as in 0.5:3.2:6.1")
    if load > 1:
        raise UsageError(
            f"--point {text}: a load of {load:g} is none", "it is the share of all cores that is busy, 0 to 1"
        )
    return Point(load, gb_per_s, power_w)


def parse_traffic(text: str) -> Traffic:
    """`30:90:3.2` → from second 30 to second 90, 3.2 GB/s. Raises UsageError."""
    traffic = Traffic(*_numbers(text, "--traffic", "FROM:TO:GB_PER_S, as in 30:90:3.2"))
    if traffic.from_s >= traffic.to_s:
        raise UsageError(f"--traffic {text} ends before it begins", "give FROM:TO:GB_PER_S, as in 30:90:3.2")
    return traffic


def _numbers(text: str, option: str, form: str) -> tuple[float, float, float]:
    parts = [part.strip() for part in text.split(":")]
    values = [float(part) if _NUMBER.fullmatch(part) else math.nan for part in parts]
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise UsageError(f"{option} {text}: these are not three numbers", f"give {form}")
    if min(values) < 0:
        raise UsageError(f"{option} {text}: a number is below 0", f"give {form}")
    return values[0], values[1], values[2]


def recorded_points(
    samples: Sequence[tuple[float, float]],
    readings: Sequence[Reading],
    traffic: Sequence[Traffic] = (),
    shift_s: float = 0.0,
) -> list[Point]:
    """One point for each reading whose interval the meter saw, from the meter's `samples` (seconds, watts).

    A reading's load is that of the time since the one before it. The two clocks are put together by their first
    entries: the meter's came `shift_s` after the recording's. Intervals in which weights are read for a part of the
    time only are left out: their traffic is not known. Raises UsageError if no point is left.
    """
    if len(readings) < 2 or not samples:
        raise UsageError(
            f"too little to pair: {len(readings)} of the readings, {len(samples)} of the meter's rows",
            "record for longer",
        )
    begin_s, meter_begin_s = readings[0].time_s, min(time_s for time_s, _ in samples)
    meter = sorted((time_s - meter_begin_s + shift_s, power_w) for time_s, power_w in samples)
    points = []
    for before, reading in itertools.pairwise(readings):
        start_s, end_s = before.time_s - begin_s, reading.time_s - begin_s
        gb_per_s = _traffic_between(traffic, start_s, end_s)
        power_w = _mean_power(meter, start_s, end_s)
        if reading.load is not None and gb_per_s is not None and power_w is not None:
            points.append(Point(min(max(reading.load, 0.0), 1.0), gb_per_s, power_w))
    if not points:
        raise UsageError(
            f"none of the {len(readings)} readings has a load and the meter's power for the same time",
            "the meter's first row is taken to be from --shift seconds after the recording's first reading",
        )
    return points


def _mean_power(meter: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float | None:
    """Watts between two moments, by rows in order; None unless the meter saw all of it."""
    if start_s < meter[0][0] or end_s > meter[-1][0]:
        return None
    first = bisect.bisect_left(meter, (start_s - _MAX_METER_GAP_S, 0.0))
    last = bisect.bisect_right(meter, (end_s + _MAX_METER_GAP_S, math.inf))
    near = [Reading(time_s, power_w=power_w) for time_s, power_w in meter[first:last]]
    energy = integrate(near, start_s, end_s, max_gap_s=_MAX_METER_GAP_S)
    return energy.gross_j / energy.seconds if energy is not None and energy.covered >= _MIN_COVERED else None


def _traffic_between(traffic: Sequence[Traffic], start_s: float, end_s: float) -> float | None:
    """GB/s in an interval, 0 where none is given; None if it changes within."""
    touching = [t for t in traffic if t.from_s < end_s and t.to_s > start_s]
    if any(t.from_s > start_s or t.to_s < end_s for t in touching):
        return None
    return sum(t.gb_per_s for t in touching)
