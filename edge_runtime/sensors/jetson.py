"""Jetson Nano (L4T r32) and Jetson Orin Nano (L4T r35 and later), by files of /sys that anyone may read.

Formats: the power and thermal chapters of NVIDIA's Jetson Linux Developer Guide, the kernel's
Documentation/hwmon/ina3221.rst, and NVIDIA's drivers ina3221x (older kernel) and tegra23x-oc-event (the counters of
over-current events). The numbers in hwmon3, thermal_zone1 and in1_label change with the order in which drivers load,
so everything is found by its name, at every reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .linux import plausible_c
from .machine import Machine, Sensor
from .reading import PowerSource, Rail, Reading

_TOTALS = ("VDD_IN", "POM_5V_IN")  # what goes into the whole module: Orin Nano, Nano
_MOST_MW = 200_000.0

# Zones of the processor's die. Not PMIC-Die, which says 100 °C always, nor the fan's estimate.
_DIE_ZONE = re.compile(r"(cpu|gpu|soc\d*|tj|pll)-therm(al)?", re.IGNORECASE)

_EVENTS = {"oc1": "under-voltage", "oc2": "over-current-average", "oc3": "over-current"}


@dataclass(frozen=True, slots=True)
class JetsonPower:
    """The rails of the INA3221, and the one that feeds all others."""

    machine: Machine
    name: str = "jetson-ina3221"

    def read(self, time_s: float) -> Reading:
        """A rail whose files are missing or hold nonsense is left out; without the total's rail there is no total."""
        rails = _iio_rails(self.machine) + _hwmon_rails(self.machine)
        power_w = next((rail.power_w for rail in rails if rail.name in _TOTALS and rail.power_w > 0), None)
        return Reading(
            time_s,
            power_w=power_w,
            power_source=None if power_w is None else PowerSource.MEASURED,
            rails=rails,
            sensors=(self.name,) if rails else (),
        )


@dataclass(frozen=True, slots=True)
class JetsonTemperature:
    """The hottest zone of the processor's die."""

    machine: Machine
    name: str = "jetson-thermal"

    def read(self, time_s: float) -> Reading:
        zones = _named(self.machine, "sys/class/thermal/thermal_zone*/type")
        temps_mc = [self.machine.number(f"{folder}/temp") for folder, kind in zones if _DIE_ZONE.fullmatch(kind)]
        # a part of the chip that is switched off says -256 °C
        temps_c = [c for mc in temps_mc if mc is not None and (c := plausible_c(mc / 1000)) is not None]
        return Reading(time_s, temp_c=max(temps_c, default=None), sensors=(self.name,) if temps_c else ())


@dataclass(slots=True)
class JetsonThrottle:
    """Throttling of an Orin: by heat while it lasts, by current from counters of events since boot.

    An event takes milliseconds, so "now" is what was counted since the last reading; at the first, it is not known.
    """

    machine: Machine
    name: str = "jetson-throttle"
    _last_counts: dict[str, float] = field(default_factory=dict, init=False)

    def read(self, time_s: float) -> Reading:
        """A reason seen is always told; that there is none, only if heat and current could both be asked."""
        hot, counts, last = _hot(self.machine), _event_counts(self.machine), self._last_counts
        self._last_counts = counts
        recent = {_EVENTS[event] for event, count in counts.items() if count > last.get(event, count)}
        ever = {_EVENTS[event] for event, count in counts.items() if count > 0}
        now = recent | (hot or set())
        complete = hot is not None and bool(counts) and counts.keys() <= last.keys()
        return Reading(
            time_s,
            throttled_now=frozenset(now) if now or complete else None,
            # heat leaves no trace, so that nothing ever happened cannot be known
            throttled_since_boot=frozenset(now | ever) or None,
            sensors=(self.name,) if hot is not None or counts else (),
        )


def find_jetson(machine: Machine) -> list[Sensor]:
    """The sensors of a Jetson that are there: the Nano with 2 GB has no INA3221, and no Nano tells of throttling."""
    if "nvidia,tegra" not in (machine.text("proc/device-tree/compatible") or ""):
        return []
    sensors: list[Sensor] = []
    if machine.find("sys/bus/i2c/drivers/ina3221*/*-00*"):
        sensors.append(JetsonPower(machine))
    sensors.append(JetsonTemperature(machine))
    if _hot(machine) is not None or _event_counts(machine):
        sensors.append(JetsonThrottle(machine))
    return sensors


def _iio_rails(machine: Machine) -> tuple[Rail, ...]:
    """Of the older driver, in mW."""
    return _rails(
        (machine.text(f"{folder}/rail_name_{channel}"), machine.number(f"{folder}/in_power{channel}_input"))
        for folder in machine.find("sys/bus/i2c/drivers/ina3221x/*/iio:device*")
        for channel in (0, 1, 2)
    )


def _hwmon_rails(machine: Machine) -> tuple[Rail, ...]:
    """Of the kernel's driver, mV × mA. Its inputs 4 to 7 are voltages of the shunts and their sum, no rails."""
    return _rails(
        (machine.text(f"{folder}/in{channel}_label"), _product_mw(machine, folder, channel))
        for folder in machine.find("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*")
        for channel in (1, 2, 3)
    )


def _product_mw(machine: Machine, folder: str, channel: int) -> float | None:
    voltage_mv = machine.number(f"{folder}/in{channel}_input")
    current_ma = machine.number(f"{folder}/curr{channel}_input")
    if voltage_mv is None or current_ma is None or voltage_mv < 0:  # two wrong signs would make a right one
        return None
    return voltage_mv * current_ma / 1000


def _rails(powers_mw: Iterable[tuple[str | None, float | None]]) -> tuple[Rail, ...]:
    """Those with a name and a power that can be; a channel that is not connected is called NC."""
    return tuple(
        Rail(name, power_mw / 1000)
        for name, power_mw in powers_mw
        if name is not None and name != "NC" and power_mw is not None and 0 <= power_mw <= _MOST_MW
    )


def _named(machine: Machine, pattern: str) -> list[tuple[str, str]]:
    """(folder, what its file says) of every file that matches and can be read."""
    said = [(path.rpartition("/")[0], machine.text(path)) for path in machine.find(pattern)]
    return [(folder, text) for folder, text in said if text is not None]


def _hot(machine: Machine) -> set[str] | None:
    """Parts of the chip that are slowed down for heat: "thermal-cpu" of the cooling device cpu-throttle-alert."""
    alerts = [
        (kind.removesuffix("-throttle-alert"), machine.number(f"{folder}/cur_state"))
        for folder, kind in _named(machine, "sys/class/thermal/cooling_device*/type")
        if kind.endswith("-throttle-alert")
    ]
    states = [(part, state) for part, state in alerts if state is not None]
    return {f"thermal-{part}" for part, state in states if state > 0} if states else None


def _event_counts(machine: Machine) -> dict[str, float]:
    """How often since boot the supply made the chip slow down, by event; not those that are set to slow nothing."""
    folders = [folder for folder, name in _named(machine, "sys/class/hwmon/hwmon*/name") if name == "soctherm_oc"]
    counts = {
        event: machine.number(f"{folder}/{event}_event_cnt")
        for folder in folders
        for event in _EVENTS
        if machine.number(f"{folder}/{event}_throt_en") != 0
    }
    return {event: count for event, count in counts.items() if count is not None and count >= 0}
