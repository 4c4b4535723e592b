"""What any Linux says of itself: heat, clock, throttling, load and battery, each from files of /sys and /proc.

Units and meanings are those of the kernel's documents: `sysfs-class-thermal`, `hwmon/sysfs-interface`,
`admin-guide/pm/cpufreq`, `sysfs-class-power`, and proc(5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .machine import Machine, Sensor
from .reading import Battery, PowerSource, Reading

THERMAL = "thermal"  # the reason that throttle counters give

_COLDEST_C, _HOTTEST_C = -40.0, 150.0
_FASTEST_HZ = 1e10
_MOST_BATTERY_W = 1000.0
_MOST_PERCENT = 110.0  # worn or badly calibrated batteries go a little over 100

# x86_pkg_temp, TCPU: Intel; cpu-thermal, cpu_thermal, CPU-therm, mtktscpu: ARM boards; soc-thermal, bigcore0: Rockchip
_PROCESSOR_ZONE = re.compile(r"x86_pkg_temp|.*cpu|soc|tj-|(big|little)core", re.IGNORECASE)
_FOREIGN_ZONE = re.compile(r".*(wifi|batt|charg|modem)", re.IGNORECASE)  # hot for reasons of their own
_PROCESSOR_CHIPS = frozenset({"coretemp", "k10temp", "zenpower", "k8temp", "via_cputemp"})

_ZONES = "sys/class/thermal/thermal_zone*"
_CHIPS = "sys/class/hwmon/hwmon*"
_SUPPLIES = "sys/class/power_supply/*"
_STAT = "proc/stat"
_CLOCKS = (
    "sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq",
    "sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq",
)
_THROTTLE_COUNTS = "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"


def find_linux(machine: Machine) -> list[Sensor]:
    """A sensor for each of heat, clock, throttling, load and battery that the machine has files for."""
    sensors: list[Sensor] = []
    if machine.find(_ZONES) or _chip_heat(machine):
        sensors.append(ThermalSensor(machine))
    if _clock_files(machine):
        sensors.append(ClockSensor(machine))
    if machine.find(_THROTTLE_COUNTS):
        sensors.append(ThrottleSensor(machine))
    if _processor_ticks(machine.text(_STAT)) is not None:
        sensors.append(LoadSensor(machine))
    if any(_is_battery(machine, supply) for supply in machine.find(_SUPPLIES)):
        sensors.append(BatterySensor(machine))
    return sensors


def find_psutil(machine: Machine) -> list[Sensor]:
    """The PsutilSensor where this very machine has no /proc/stat, as macOS; psutil cannot read a recording."""
    return [PsutilSensor()] if machine.root == Path("/") and machine.text(_STAT) is None else []


def plausible_c(temp_c: float | None) -> float | None:
    """The temperature, None if it is absurd; exactly 0 is what dead sensors say."""
    return temp_c if temp_c and _COLDEST_C <= temp_c <= _HOTTEST_C else None


# --- heat ---


@dataclass(frozen=True, slots=True)
class _Heat:
    """A file of millidegrees, and the file that tells whether it is still the same sensor's: numbers move."""

    path: str
    owner_path: str
    owner: str


class ThermalSensor:
    """The hottest of the processor's sensors, or of all thermal zones where none is known to be the processor's."""

    name = "thermal"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._processor = _processor_heat(machine)

    def read(self, time_s: float) -> Reading:
        machine = self._machine
        owners = {(heat.owner_path, heat.owner) for heat in self._processor}
        if not owners or any(machine.text(path) != owner for path, owner in owners):
            self._processor = _processor_heat(machine)
        temps = self._temps(self._processor) or self._temps(_chip_heat(machine)) or self._temps(_other_heat(machine))
        return Reading(time_s, temp_c=max(temps), sensors=(self.name,)) if temps else Reading(time_s)

    def _temps(self, sources: Iterable[_Heat]) -> list[float]:
        """Plausible temperatures in °C."""
        values = (_scaled(self._machine.number(source.path), 1e-3) for source in sources)
        return [temp_c for value in values if (temp_c := plausible_c(value)) is not None]


def _processor_heat(machine: Machine) -> list[_Heat]:
    """The processor's thermal zones, else its hwmon chips: where there are both, they show the same."""
    return [zone for zone in _zones(machine) if _PROCESSOR_ZONE.match(zone.owner)] or _chip_heat(machine)


def _other_heat(machine: Machine) -> list[_Heat]:
    return [zone for zone in _zones(machine) if not _FOREIGN_ZONE.match(zone.owner)]


def _zones(machine: Machine) -> list[_Heat]:
    types = ((zone, machine.text(f"{zone}/type")) for zone in machine.find(_ZONES))
    return [_Heat(f"{zone}/temp", f"{zone}/type", kind) for zone, kind in types if kind is not None]


def _chip_heat(machine: Machine) -> list[_Heat]:
    """The temperatures of the processor's hwmon chips; without "Tctl" where a chip has "Tdie".

    AMD's Tctl is for the fan and lies up to 27 °C above the die's temperature (kernel: hwmon/k10temp).
    """
    found: list[_Heat] = []
    for chip in machine.find(_CHIPS):
        name = machine.text(f"{chip}/name")
        if name is None or name not in _PROCESSOR_CHIPS:
            continue
        inputs = machine.find(f"{chip}/temp*_input")
        labels = {path: machine.text(path.removesuffix("_input") + "_label") for path in inputs}
        unwanted = "Tctl" if "Tdie" in labels.values() else ""
        found += [_Heat(path, f"{chip}/name", name) for path in inputs if labels[path] != unwanted]
    return found


# --- clock ---


class ClockSensor:
    """The clock of the fastest core, from cpufreq.

    A `scaling_max_freq` below `cpuinfo_max_freq` is no sign of throttling: governors and users set it, too.
    """

    name = "cpufreq"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._files = _clock_files(machine)

    def read(self, time_s: float) -> Reading:
        values = [self._hz(path) for path in self._files]
        if not values or None in values:  # cores went off or came back
            self._files = _clock_files(self._machine)
            values = [self._hz(path) for path in self._files]
        known = [value for value in values if value is not None]
        return Reading(time_s, freq_hz=max(known), sensors=(self.name,)) if known else Reading(time_s)

    def _hz(self, path: str) -> float | None:
        freq_hz = _scaled(self._machine.number(path), 1e3)
        return freq_hz if freq_hz is not None and 0 < freq_hz <= _FASTEST_HZ else None


def _clock_files(machine: Machine) -> list[str]:
    """One file per group of cores with a common clock; one per core on kernels that do not show groups."""
    return next((files for pattern in _CLOCKS if (files := machine.find(pattern))), [])


# --- throttling ---


class ThrottleSensor:
    """Counters of how often heat has slowed a core or the package down, of Intel's processors.

    They count beginnings, so "now" is: since the last read. The first read knows nothing of now.
    """

    name = "thermal-throttle"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._files = machine.find(_THROTTLE_COUNTS)
        self._last: dict[str, float] = {}

    def read(self, time_s: float) -> Reading:
        counts = self._counts()
        if len(counts) < len(self._files) or not counts:  # cores went off or came back
            self._files = self._machine.find(_THROTTLE_COUNTS)
            counts = self._counts()
        last, self._last = self._last, counts
        if not counts:
            return Reading(time_s)
        rose = any(count > last[path] for path, count in counts.items() if path in last)
        now = _reasons(rose) if rose or last.keys() & counts.keys() else None
        since_boot = _reasons(any(count > 0 for count in counts.values()))
        return Reading(time_s, throttled_now=now, throttled_since_boot=since_boot, sensors=(self.name,))

    def _counts(self) -> dict[str, float]:
        values = {path: self._machine.number(path) for path in self._files}
        return {path: value for path, value in values.items() if value is not None and value >= 0}


def _reasons(throttled: bool) -> frozenset[str]:
    return frozenset({THERMAL}) if throttled else frozenset()


# --- load ---


@dataclass(frozen=True, slots=True)
class _Ticks:
    """Time of all cores since boot, in any unit."""

    busy: float
    total: float


class _BusyShare:
    """The busy share, 0 to 1, of the time between two readings of ever growing counters."""

    def __init__(self) -> None:
        self._last: tuple[float, _Ticks] | None = None

    def since_last(self, time_s: float, ticks: _Ticks | None) -> float | None:
        """None at first, when no time has passed, and when the counters began anew."""
        if self._last is not None and time_s <= self._last[0]:
            return None
        last, self._last = self._last, (time_s, ticks) if ticks is not None else None
        if last is None or ticks is None or ticks.total <= last[1].total:
            return None
        # the kernel's idle and iowait may step back a little (proc(5)), the share then leaves 0 to 1
        return min(1.0, max(0.0, (ticks.busy - last[1].busy) / (ticks.total - last[1].total)))


class LoadSensor:
    """The share of all cores that was busy between the last read and this one, from /proc/stat."""

    name = "load"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._share = _BusyShare()

    def read(self, time_s: float) -> Reading:
        load = self._share.since_last(time_s, _processor_ticks(self._machine.text(_STAT)))
        return Reading(time_s, load=load, sensors=(self.name,)) if load is not None else Reading(time_s)


def _processor_ticks(stat: str | None) -> _Ticks | None:
    """The line "cpu" of /proc/stat: user nice system idle iowait irq softirq steal; guests are in user already."""
    words = (stat or "").partition("\n")[0].split()
    if len(words) < 5 or words[0] != "cpu" or not all(word.isdecimal() and len(word) <= 20 for word in words[1:]):
        return None
    ticks = [int(word) for word in words[1:9]]
    return _Ticks(busy=sum(ticks) - sum(ticks[3:5]), total=sum(ticks))


# --- battery ---


@dataclass(frozen=True, slots=True)
class _Cell:
    """One battery of the machine."""

    status: str | None
    percent: float | None
    full: float | None  # what it holds when full, in µWh
    power_w: float | None  # what flows into or out of it


@dataclass(frozen=True, slots=True)
class BatterySensor:
    """The machine's batteries as one and, while they alone feed it, the power of the whole machine."""

    machine: Machine
    name: str = "battery"

    def read(self, time_s: float) -> Reading:
        supplies = self.machine.find(_SUPPLIES)
        cells = [self._cell(supply) for supply in supplies if _is_battery(self.machine, supply)]
        battery = _as_one(cells)
        # On a charger the flow into the battery says nothing of what the machine takes, and what a weak charger lets
        # the battery add is but a part of it. Only a machine that runs on its batteries alone draws all through them.
        power_w = _draw_w(cells) if not any(self._feeds(supply) for supply in supplies) else None
        if battery is None and power_w is None:
            return Reading(time_s)
        source = PowerSource.MEASURED if power_w is not None else None
        return Reading(time_s, power_w, source, battery=battery, sensors=(self.name,))

    def _cell(self, supply: str) -> _Cell:
        status, percent = self.machine.text(f"{supply}/status"), self.machine.number(f"{supply}/capacity")
        return _Cell(
            status, _plausible_percent(percent), self.machine.number(f"{supply}/energy_full"), self._power_w(supply)
        )

    def _power_w(self, supply: str) -> float | None:
        """Watts through a battery; the sign differs between drivers, `status` has the direction. A 0 is not known."""
        power_w = _scaled(self.machine.number(f"{supply}/power_now"), 1e-6)
        if not power_w:
            current_a = _scaled(self.machine.number(f"{supply}/current_now"), 1e-6)
            voltage_v = _scaled(self.machine.number(f"{supply}/voltage_now"), 1e-6)
            power_w = current_a * voltage_v if current_a is not None and voltage_v is not None else None
        return abs(power_w) if power_w and abs(power_w) <= _MOST_BATTERY_W else None

    def _feeds(self, supply: str) -> bool:
        """Is this a charger that is plugged in? `online` is 1, or 2 where the voltage was negotiated."""
        is_charger = self.machine.text(f"{supply}/type") not in (None, "Battery")
        return is_charger and (self.machine.number(f"{supply}/online") or 0) > 0


def _is_battery(machine: Machine, supply: str) -> bool:
    """A battery of the machine's own: those of mice and headphones have the scope "Device"."""
    return machine.text(f"{supply}/type") == "Battery" and machine.text(f"{supply}/scope") != "Device"


def _as_one(cells: list[_Cell]) -> Battery | None:
    """Percent weighted by size where all sizes are known; charging if one is, None if none says anything."""
    known = [(cell.percent, cell.full) for cell in cells if cell.percent is not None]
    if not known:
        return None
    sized = all(full is not None and full > 0 for _, full in known)
    weighted = [(percent, full if sized and full is not None else 1.0) for percent, full in known]
    percent = sum(percent * weight for percent, weight in weighted) / sum(weight for _, weight in weighted)
    states = {cell.status for cell in cells}
    charging = True if "Charging" in states else False if states & {"Discharging", "Not charging", "Full"} else None
    return Battery(percent, charging)


def _plausible_percent(percent: float | None) -> float | None:
    return min(percent, 100.0) if percent is not None and 0 <= percent <= _MOST_PERCENT else None


def _draw_w(cells: list[_Cell]) -> float | None:
    """Watts out of all discharging batteries; None if there is none, one is silent, or another is being charged."""
    powers = [cell.power_w for cell in cells if cell.status == "Discharging"]
    known = [power_w for power_w in powers if power_w is not None]
    is_whole = len(known) == len(powers) > 0 and all(cell.status != "Charging" for cell in cells)
    return sum(known) if is_whole else None


# --- where there are no such files ---


class PsutilSensor:
    """Load, clock and battery from psutil, for systems without /proc and /sys."""

    name = "psutil"

    def __init__(self, source: Any = psutil) -> None:
        """`source` has psutil's functions."""
        self._source = source
        self._share = _BusyShare()

    def read(self, time_s: float) -> Reading:
        load = self._share.since_last(time_s, _quiet(self._ticks))
        freq_hz, battery = _quiet(self._freq_hz), _quiet(self._battery)
        answered = any(value is not None for value in (load, freq_hz, battery))
        return Reading(time_s, freq_hz=freq_hz, battery=battery, load=load, sensors=(self.name,) if answered else ())

    def _ticks(self) -> _Ticks:
        times = self._source.cpu_times()
        return _Ticks(busy=sum(times) - times.idle, total=sum(times))

    def _freq_hz(self) -> float | None:
        freq_hz = float(self._source.cpu_freq().current) * 1e6
        return freq_hz if 0 < freq_hz <= _FASTEST_HZ else None

    def _battery(self) -> Battery | None:
        state = self._source.sensors_battery()
        percent = _plausible_percent(float(state.percent))
        # psutil knows of a plug, not of charging: without one it does not charge, with one it mostly does
        return Battery(percent, state.power_plugged) if percent is not None else None


def _quiet(ask: Callable[[], Any]) -> Any:
    """What `ask` gives; None whatever goes wrong: psutil's functions differ by system, and fail in many ways."""
    try:
        return ask()
    except Exception:
        return None


def _scaled(value: float | None, factor: float) -> float | None:
    return value * factor if value is not None else None
