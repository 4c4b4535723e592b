"""What sensors say of a machine at one moment. What no sensor says is None, never 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class PowerSource(str, Enum):
    """How a power came about; a sum is as good as the least good of its parts."""

    MEASURED = "measured"  # a sensor of the board
    CALIBRATED = "calibrated"  # a sensor, or a model, fitted to a power meter
    ESTIMATED = "estimated"  # a model with typical coefficients


@dataclass(frozen=True, slots=True)
class Rail:
    """A supply line that has a sensor of its own."""

    name: str
    power_w: float
    source: PowerSource = PowerSource.MEASURED


@dataclass(frozen=True, slots=True)
class Battery:
    """A battery; `charging` is None where it is not known."""

    percent: float
    charging: bool | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A snapshot. `throttled_now` and `throttled_since_boot` hold reasons, empty: none, None: not known."""

    time_s: float  # of a monotonic clock
    power_w: float | None = None  # of the whole board or package; `rails` has its parts
    power_source: PowerSource | None = None
    rails: tuple[Rail, ...] = ()
    temp_c: float | None = None  # the hottest of what matters to the processor
    freq_hz: float | None = None  # of the fastest core
    throttled_now: frozenset[str] | None = None
    throttled_since_boot: frozenset[str] | None = None
    battery: Battery | None = None
    load: float | None = None  # share of all cores that is busy, 0 to 1
    sensors: tuple[str, ...] = ()  # names of those that answered


def combine(time_s: float, parts: Sequence[Reading]) -> Reading:
    """One snapshot of several sensors' answers: for each quantity, the first part that has it; all reasons to throttle.

    A power goes with its source and rails.
    """
    values: dict[str, Any] = {
        field.name: next((getattr(p, field.name) for p in parts if getattr(p, field.name) is not None), None)
        for field in dataclasses.fields(Reading)
        if field.name in ("temp_c", "freq_hz", "battery", "load")
    }
    powered = next((p for p in parts if p.power_w is not None), None) or next((p for p in parts if p.rails), None)
    if powered is not None:
        values |= {"power_w": powered.power_w, "power_source": powered.power_source, "rails": powered.rails}
    for name in ("throttled_now", "throttled_since_boot"):
        known = [getattr(p, name) for p in parts if getattr(p, name) is not None]
        values[name] = frozenset().union(*known) if known else None
    names = tuple(dict.fromkeys(name for p in parts for name in p.sensors))
    return Reading(time_s, sensors=names, **values)
