"""Apple Silicon, without root: the program `macmon`, where it is installed, and the system's thermal pressure.

Formats: macmon's readme (versions 0.7 and 0.8), Apple's libkern/OSThermalNotification.h for the levels of pressure, and
pmset(1). macmon measures for the time it is told to and then answers: the reading takes that long, but not a core.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass, replace
from typing import Any

from .linux import plausible_c
from .machine import Machine, Sensor
from .reading import PowerSource, Rail, Reading

_SYSTEM = platform.system()
_INTERVAL_MS = 200  # macmon takes 100 at least
_MOST_W = 1000.0
_MOST_MHZ = 1e4

_RAILS = {"cpu_power": "CPU", "gpu_power": "GPU", "ane_power": "ANE", "ram_power": "RAM"}

# Below "heavy" the fans do the work; from there on the clocks go down.
_PRESSURES = {0: "nominal", 1: "moderate", 2: "heavy", 3: "trapping", 4: "sleeping"}
_HEAVY = 2


@dataclass(frozen=True, slots=True)
class AppleChip:
    """Power, temperature, frequency and load, as averages over macmon's interval.

    The power of the whole machine comes from a sensor. Those of the chip's parts are Apple's own model of them, and
    powermetrics(1) warns that they are estimates: that is their label, and the total's where the sensor is missing.
    """

    machine: Machine
    interval_ms: int = _INTERVAL_MS
    name: str = "macmon"

    def read(self, time_s: float) -> Reading:
        sample = _sample(self.machine.run(["macmon", "pipe", "-s", "1", "-i", str(self.interval_ms)]))
        if sample is None:
            return Reading(time_s)
        power_w, source = _total(sample)
        reading = Reading(
            time_s,
            power_w=power_w,
            power_source=source,
            rails=_rails(sample),
            temp_c=_temp_c(sample),
            freq_hz=_freq_hz(sample),
            load=_number(sample.get("cpu_active_ratio"), 1),
        )
        return reading if reading == Reading(time_s) else replace(reading, sensors=(self.name,))


@dataclass(frozen=True, slots=True)
class ApplePressure:
    """Whether the system slows the chip down for heat."""

    machine: Machine
    name: str = "apple-thermal-pressure"

    def read(self, time_s: float) -> Reading:
        """pmset is asked only where there is no level: on Apple's own chips it is silent even while they throttle."""
        level = _pressure(self.machine.run(["notifyutil", "-g", "com.apple.system.thermalpressurelevel"]))
        if level is not None:
            now = frozenset({f"thermal-pressure-{_PRESSURES[level]}"} if level >= _HEAVY else ())
            return Reading(time_s, throttled_now=now, sensors=(self.name,))
        limit = _speed_limit(self.machine.run(["pmset", "-g", "therm"]))
        if limit is not None:
            now = frozenset({"frequency-capped"} if limit < 100 else ())
            return Reading(time_s, throttled_now=now, sensors=(self.name,))
        return Reading(time_s)


def find_apple(machine: Machine, system: str = _SYSTEM) -> list[Sensor]:
    """The sensors of a Mac. macmon is not tried here: that would take as long as a reading."""
    return [AppleChip(machine), ApplePressure(machine)] if system == "Darwin" else []


def _sample(output: str | None) -> dict[str, Any] | None:
    """macmon's one line; None if it is not the JSON object that is expected."""
    try:
        sample = json.loads(output or "")
    except (ValueError, RecursionError):
        return None
    return sample if isinstance(sample, dict) and "all_power" in sample else None


def _number(value: object, most: float) -> float | None:
    """The number, if it is one from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= most else None


def _total(sample: dict[str, Any]) -> tuple[float | None, PowerSource | None]:
    """Of the machine, or of the chip alone; 0 is macmon's way to say that it does not know."""
    if whole_w := _number(sample.get("sys_power"), _MOST_W):
        return whole_w, PowerSource.MEASURED
    if chip_w := _number(sample.get("all_power"), _MOST_W):
        return chip_w, PowerSource.ESTIMATED
    return None, None


def _rails(sample: dict[str, Any]) -> tuple[Rail, ...]:
    powers_w = [(name, _number(sample.get(key), _MOST_W)) for key, name in _RAILS.items()]
    return tuple(Rail(name, power_w, PowerSource.ESTIMATED) for name, power_w in powers_w if power_w)


def _temp_c(sample: dict[str, Any]) -> float | None:
    """The hotter of the processor's and the graphics' averages: the model may run on either."""
    temps = sample.get("temp")
    if not isinstance(temps, dict):
        return None
    known = [plausible_c(_number(temps.get(key), 1000)) for key in ("cpu_temp_avg", "gpu_temp_avg")]
    return max((temp_c for temp_c in known if temp_c is not None), default=None)


def _freq_hz(sample: dict[str, Any]) -> float | None:
    """Of the faster cluster; until version 0.7 a pair, [MHz, share of the maximum]."""
    pairs = [sample.get(key) for key in ("pcpu_usage", "ecpu_usage")]
    clocks = [sample.get("pcpu_freq_mhz"), sample.get("ecpu_freq_mhz")]
    clocks += [pair[0] for pair in pairs if isinstance(pair, list) and pair]
    return max((mhz * 1e6 for clock in clocks if (mhz := _number(clock, _MOST_MHZ))), default=None)


def _pressure(output: str | None) -> int | None:
    """1 of "com.apple.system.thermalpressurelevel 1"."""
    found = re.fullmatch(r"\s*\S+\s+(\d{1,9})\s*", output or "")
    return int(found[1]) if found and int(found[1]) in _PRESSURES else None


def _speed_limit(output: str | None) -> int | None:
    """Percent, of "CPU_Speed_Limit = 100"."""
    found = re.search(r"\bCPU_Speed_Limit\s*=\s*(\d{1,3})\b", output or "")
    return int(found[1]) if found and 0 < int(found[1]) <= 100 else None
