"""RAPL: the energy counters of Intel's and AMD's processors, through the kernel's powercap files.

Files as in the kernel's `power/powercap`; domains as in Intel's Software Developer's Manual, volume 3B, "Platform
specific power management support". Since 2020 (CVE-2020-8694: power gives secrets away) only root may read energy_uj.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .machine import Machine, Sensor
from .reading import PowerSource, Rail, Reading

_ZONES = "sys/class/powercap/intel-rapl:*"  # not intel-rapl-mmio, which shows the same package once more
_LEAST_S = 0.02  # counters move each millisecond: over less than this, power would be noise
_MOST_W = 2000.0  # of a zone; more is a counter that began anew
# Sandy Bridge and Ivy Bridge compute their energy from events, Haswell and later measure it (Hackenberg et al. 2015,
# "An energy efficiency feature survey of the Intel Haswell processor"); AMD's processors compute it, too (Schöne et al.
# 2021, "Energy efficiency aspects of the AMD Zen 2 architecture").
_MODELLED_INTEL = frozenset({42, 45, 58, 62})
_MODELLED_VENDORS = frozenset({"AuthenticAMD", "HygonGenuine"})


def find_rapl(machine: Machine) -> list[Sensor]:
    """One sensor if at least one energy counter can be read; `explain` says why if none can."""
    return [RaplSensor(machine)] if read_counters(machine) else []


def explain(machine: Machine) -> str | None:
    """Why an x86 machine has no power from RAPL; None if it has, or is no x86 machine."""
    zones = machine.find(_ZONES)
    if not zones:
        is_x86 = _cpu_field(machine, "vendor_id") is not None
        return "the kernel shows no RAPL zones: a virtual machine, or intel_rapl_msr is not loaded" if is_x86 else None
    if read_counters(machine):
        return None
    if any(_is_forbidden(machine, f"{zone}/energy_uj") for zone in zones):
        return "energy_uj can only be read by root"
    return "the RAPL zones have no energy that could be read"


@dataclass(frozen=True, slots=True)
class Counter:
    """Energy of a zone since some moment, in µJ; it begins again at 0 after `range_uj`, None: not known when."""

    energy_uj: float
    range_uj: float | None = None


class RaplSensor:
    """Power of the platform where it is counted, else of all packages with their memory, between two reads.

    Rails are the zones: "package-0", and its parts as "package-0/core". The first read has no power.
    """

    name = "rapl"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._source = power_source(machine)
        self._seen: set[str] = set()
        self._last: tuple[float, dict[str, Counter]] | None = None

    def read(self, time_s: float) -> Reading:
        if self._last is not None and time_s - self._last[0] < _LEAST_S:
            return Reading(time_s)
        counters = read_counters(self._machine)
        last, self._last = self._last, (time_s, counters)
        self._seen |= counters.keys()
        if last is None:
            return Reading(time_s)
        powers_w = _powers_w(last[1], counters, time_s - last[0])
        # a part may rest at 0 W, a package or platform that takes nothing has a dead counter
        live = {name: power_w for name, power_w in powers_w.items() if power_w > 0 or "/" in name}
        if not live:
            return Reading(time_s)
        power_w = total_w(powers_w, self._seen)
        rails = tuple(Rail(name, value_w, self._source) for name, value_w in live.items())
        return Reading(time_s, power_w, self._source if power_w is not None else None, rails, sensors=(self.name,))


def read_counters(machine: Machine) -> dict[str, Counter]:
    """Counters by the names of their zones, which stay when numbers move; those that can be read."""
    paths = machine.find(_ZONES)
    names = {path: name for path in paths if (name := machine.text(f"{path}/name")) is not None}
    counters: dict[str, Counter] = {}
    for path, name in names.items():
        parent = path.rpartition(":")[0]  # intel-rapl:0 of intel-rapl:0:1, intel-rapl of intel-rapl:0
        is_part = ":" in parent
        energy_uj = machine.number(f"{path}/energy_uj")
        if energy_uj is None or energy_uj < 0 or (is_part and parent not in names):
            continue
        range_uj = machine.number(f"{path}/max_energy_range_uj")
        counter = Counter(energy_uj, range_uj if range_uj is not None and range_uj > 0 else None)
        counters.setdefault(f"{names[parent]}/{name}" if is_part else name, counter)
    return counters


def mean_power_w(before: Counter, now: Counter, elapsed_s: float) -> float | None:
    """Watts between two reads of a counter; None where it may have gone round unnoticed, or began anew."""
    if now.range_uj is not None and now.range_uj * 1e-6 < _MOST_W * elapsed_s:
        return None
    used_uj = now.energy_uj - before.energy_uj
    if used_uj < 0 and now.range_uj is not None:
        used_uj += now.range_uj
    power_w = used_uj * 1e-6 / elapsed_s
    return power_w if 0 <= power_w <= _MOST_W else None


def total_w(powers_w: dict[str, float], zones: set[str]) -> float | None:
    """Watts of the platform, else of all packages and memory among `zones`, every zone that ever answered.

    None if one of those is silent: what is left would be a power of something else. Memory is no part of a package,
    which is the processor's die; cores and graphics are.
    """
    platform = {name for name in zones if _is_platform(name)}
    packages = {name for name in zones if _is_package(name)}
    parts = packages | {name for name in zones if name.endswith("/dram")}
    if not platform <= powers_w.keys():
        return None
    platform_w, parts_w = (sum(w for name, w in powers_w.items() if name in names) for names in (platform, parts))
    if platform_w > parts_w:  # it is less on boards that do not wire it up
        return platform_w
    is_whole = parts <= powers_w.keys() and all(powers_w[name] > 0 for name in packages)
    return parts_w if packages and is_whole else None


def power_source(machine: Machine) -> PowerSource:
    """Estimated where the processor computes its energy from a model of its own, else measured."""
    vendor, model = _cpu_field(machine, "vendor_id"), _cpu_field(machine, "model")
    modelled_intel = vendor == "GenuineIntel" and model in {str(number) for number in _MODELLED_INTEL}
    return PowerSource.ESTIMATED if modelled_intel or vendor in _MODELLED_VENDORS else PowerSource.MEASURED


def _powers_w(before: dict[str, Counter], now: dict[str, Counter], elapsed_s: float) -> dict[str, float]:
    """Watts of the zones that were there at both times."""
    values = {name: mean_power_w(before[name], now[name], elapsed_s) for name in now if name in before}
    return {name: power_w for name, power_w in values.items() if power_w is not None}


def _is_package(name: str) -> bool:
    return name.startswith("package-") and "/" not in name


def _is_platform(name: str) -> bool:
    return name == "psys" or bool(re.fullmatch(r"platform-\d+", name))


def _cpu_field(machine: Machine, field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo."""
    found = re.search(rf"^{field}\s*:\s*(\S+)\s*$", machine.text("proc/cpuinfo") or "", re.MULTILINE)
    return found[1] if found else None


def _is_forbidden(machine: Machine, path: str) -> bool:
    try:
        (machine.root / path).read_bytes()
    except PermissionError:
        return True
    except OSError:
        return False
    return False
