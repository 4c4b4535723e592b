"""Raspberry Pi 4 and 5: what the firmware tells through `vcgencmd`, and what the kernel tells where that is missing.

Formats: `vcgencmd` in the Raspberry Pi documentation (get_throttled, measure_temp, pmic_read_adc) and the kernel's
drivers/hwmon/raspberrypi-hwmon.c. Every command is a process started, some milliseconds: each is asked once a reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..profiles import PowerFit
from .linux import plausible_c
from .machine import Machine, Sensor
from .reading import PowerSource, Rail, Reading

# Bits of get_throttled: these now, and 16 higher since the board was started.
_REASONS = {0: "under-voltage", 1: "frequency-capped", 2: "throttled", 3: "soft-temperature-limit"}
_SINCE_BOOT_SHIFT = 16
_UNDER_VOLTAGE = frozenset({_REASONS[0]})

_PMIC_LINE = re.compile(r"\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(\d+(?:\.\d+)?)\2\s*")
_UNSENSED = {"EXT5V", "BATT"}  # the supply and the clock's battery: a voltage without a current
_MOST_A, _MOST_V = 30.0, 30.0
_MOST_W = 100.0  # several times what the supply can give


# the regulators' losses and what has no sensor: a published fit of one Raspberry Pi 5 against a power meter
PMIC_FIT = PowerFit(slope=1.1451, offset_w=0.5879)


@dataclass(frozen=True, slots=True)
class RaspberryBoard:
    """Temperature and reasons to throttle."""

    machine: Machine
    name: str = "raspberry-pi"

    def read(self, time_s: float) -> Reading:
        """Without `vcgencmd`, of the reasons only an under-voltage can be known, and only while it lasts."""
        now, since_boot = _throttling(self.machine)
        temp_c = _temp_c(self.machine)
        answered = now is not None or temp_c is not None
        return Reading(
            time_s,
            temp_c=temp_c,
            throttled_now=now,
            throttled_since_boot=since_boot,
            sensors=(self.name,) if answered else (),
        )


@dataclass(frozen=True, slots=True)
class RaspberryPower:
    """The rails of a Raspberry Pi 5's power chip, and from them the power of the board."""

    machine: Machine
    fit: PowerFit = PMIC_FIT
    name: str = "raspberry-pi-pmic"

    def read(self, time_s: float) -> Reading:
        """The rails are measured; their total is not, it is fitted. It is told only if no rail's half is missing."""
        rails, complete = _pmic_rails(self.machine.run(["vcgencmd", "pmic_read_adc"]) or "")
        sum_w = sum(rail.power_w for rail in rails)
        power_w = self.fit.slope * sum_w + self.fit.offset_w
        known = complete and sum_w > 0 and 0 < power_w <= _MOST_W
        return Reading(
            time_s,
            power_w=power_w if known else None,
            power_source=PowerSource.CALIBRATED if known else None,
            rails=rails,
            sensors=(self.name,) if rails else (),
        )


def find_raspberry(machine: Machine, fit: PowerFit = PMIC_FIT) -> list[Sensor]:
    """The sensors of a Raspberry Pi; the power only where there is the chip that measures it (Pi 5, 500 and CM5)."""
    model = machine.text("proc/device-tree/model") or ""
    if not model.startswith("Raspberry Pi"):
        return []
    sensors: list[Sensor] = [RaspberryBoard(machine)]
    if "bcm2712" in (machine.text("proc/device-tree/compatible") or ""):
        sensors.append(RaspberryPower(machine, fit))
    return sensors


def _throttling(machine: Machine) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """Reasons now and since boot."""
    bits = _throttled_bits(machine.run(["vcgencmd", "get_throttled"]))
    if bits is not None:
        return _reasons(bits), _reasons(bits >> _SINCE_BOOT_SHIFT)
    if _kernel_alarm(machine):
        return _UNDER_VOLTAGE, _UNDER_VOLTAGE
    # a silent alarm says nothing of heat: not known, rather than not throttled
    return None, None


def _throttled_bits(output: str | None) -> int | None:
    """0x50005 of "throttled=0x50005"."""
    found = re.fullmatch(r"\s*throttled=(0x[0-9a-fA-F]{1,8})\s*", output or "")
    return int(found[1], 16) if found else None


def _reasons(bits: int) -> frozenset[str]:
    return frozenset(reason for bit, reason in _REASONS.items() if bits >> bit & 1)


def _kernel_alarm(machine: Machine) -> bool:
    """Whether the kernel, which asks the firmware every two seconds, last heard of an under-voltage."""
    folders = [path.rpartition("/")[0] for path in machine.find("sys/class/hwmon/hwmon*/name")]
    voltages = [folder for folder in folders if machine.text(f"{folder}/name") == "rpi_volt"]
    return any(machine.number(f"{folder}/in0_lcrit_alarm") == 1 for folder in voltages)


def _temp_c(machine: Machine) -> float | None:
    """Of the processor; `vcgencmd measure_temp` says "temp=42.8'C"."""
    temp_mc = machine.number("sys/class/thermal/thermal_zone0/temp")
    temp_c = plausible_c(None if temp_mc is None else temp_mc / 1000)
    if temp_c is not None:
        return temp_c
    found = re.fullmatch(r"\s*temp=(-?\d+(?:\.\d+)?)'C\s*", machine.run(["vcgencmd", "measure_temp"]) or "")
    return plausible_c(float(found[1])) if found else None


def _pmic_rails(output: str) -> tuple[tuple[Rail, ...], bool]:
    """The rails with a current and a voltage, in order, and whether those are all: a sum of some would be too low.

    Lines: "VDD_CORE_A current(7)=10.87674000A" and "VDD_CORE_V volt(15)=0.89745940V", paired by name.
    """
    found = [match.groups() for line in output.splitlines() if (match := _PMIC_LINE.fullmatch(line))]
    amperes = {name: float(value) for name, unit, value in found if unit == "A" and float(value) <= _MOST_A}
    volts = {name: float(value) for name, unit, value in found if unit == "V" and float(value) <= _MOST_V}
    rails = tuple(Rail(name, amperes[name] * volts[name]) for name in amperes if name in volts)
    # every rail that is mentioned, in readable lines or not
    mentioned = set(re.findall(r"^\s*(\w+)_[AV]\b", output, re.MULTILINE))
    return rails, mentioned - _UNSENSED == {rail.name for rail in rails} - _UNSENSED
