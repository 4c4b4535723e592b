"""A machine's sensors are found in an order in which the first one's word can be taken, and what is missing is said."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_runtime.profiles import PowerFit, load_profile
from edge_runtime.sensors import detect as module
from edge_runtime.sensors.detect import detect, machine_name, missing, recorded_machine
from edge_runtime.sensors.machine import Machine
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.sensors.sampler import SensorGroup


def files(root: Path, contents: dict[str, str]) -> Machine:
    """A machine with these files, on which no command can be run."""
    for path, content in contents.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return recorded_machine(root)


ZONE = {"sys/class/thermal/thermal_zone0/type": "cpu-thermal\n", "sys/class/thermal/thermal_zone0/temp": "51200\n"}
RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "1000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
}
X86 = {"proc/cpuinfo": "vendor_id\t: GenuineIntel\nmodel\t\t: 140\n"}
DISCHARGING = {
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/BAT0/capacity": "80\n",
    "sys/class/power_supply/BAT0/power_now": "9000000\n",
}
PI5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
}
PMIC = " VDD_CORE_A current(7)=2.00000000A\n VDD_CORE_V volt(15)=0.90000000V\n"


def names(machine: Machine) -> list[str]:
    return [sensor.name for sensor in detect(machine)]


def test_an_empty_machine_has_no_sensors_and_still_a_reading(tmp_path: Path) -> None:
    machine = recorded_machine(tmp_path)
    assert SensorGroup(detect(machine)).read(1.0) == Reading(1.0)
    assert machine_name(machine) == "unknown machine"


def test_any_linux(tmp_path: Path) -> None:
    assert names(files(tmp_path, ZONE | DISCHARGING)) == ["thermal", "battery"]


def test_a_board_is_believed_before_what_any_linux_says(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str | None:
        return {"get_throttled": "throttled=0x50000\n", "pmic_read_adc": PMIC}.get(command[-1])

    recorded = files(tmp_path, PI5 | ZONE | DISCHARGING)
    group = SensorGroup(detect(Machine(recorded.root, run)))
    assert group.read(1.0).power_w is None
    reading = group.read(2.0)
    assert reading.power_source is PowerSource.CALIBRATED
    assert [rail.name for rail in reading.rails] == ["VDD_CORE"]
    assert reading.temp_c == 51.2
    assert reading.battery is not None
    assert reading.throttled_since_boot == {"under-voltage", "throttled"}
    assert machine_name(recorded) == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_package_is_believed_before_the_battery(tmp_path: Path) -> None:
    machine = files(tmp_path, X86 | RAPL | DISCHARGING)
    group = SensorGroup(detect(machine))
    group.read(1.0)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("6000000\n")
    reading = group.read(2.0)
    assert reading.power_w == pytest.approx(5.0)
    assert reading.sensors == ("rapl", "battery")


def test_a_recorded_machine_runs_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("a command was run"))
    SensorGroup(detect(files(tmp_path, PI5))).read(1.0)


@pytest.mark.parametrize(
    ("contents", "name"),
    [
        ({"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"}, "NVIDIA Jetson Orin Nano"),
        ({"sys/class/dmi/id/sys_vendor": "LENOVO\n", "sys/class/dmi/id/product_name": "20XW\n"}, "LENOVO 20XW"),
        ({"sys/class/dmi/id/product_name": "20XW\n"}, "20XW"),
    ],
)
def test_machines_have_names(tmp_path: Path, contents: dict[str, str], name: str) -> None:
    assert machine_name(files(tmp_path, contents)) == name


# ── what is missing ─────────────────────────────────────────────────────────────────────────────────────────────────


def lacks(machine: Machine, reading: Reading) -> dict[str, tuple[str, str]]:
    return {lack.what: (lack.why, lack.hint) for lack in missing(machine, reading)}


def test_nothing_is_missing(tmp_path: Path) -> None:
    assert lacks(recorded_machine(tmp_path), Reading(0, power_w=1.0, temp_c=40.0, throttled_now=frozenset())) == {}


def test_what_no_sensor_tells(tmp_path: Path) -> None:
    assert list(lacks(recorded_machine(tmp_path), Reading(0))) == ["power", "temperature", "throttling"]


def test_counters_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = files(tmp_path, X86 | RAPL)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    why, hint = lacks(machine, Reading(0))["power"]
    assert "root" in why
    assert "sudo chmod" in hint


def test_a_driver_without_its_package(tmp_path: Path) -> None:
    machine = files(tmp_path, {"proc/driver/nvidia/version": "NVRM version: 550\n"})
    assert "nvidia-ml-py" in lacks(machine, Reading(0))["GPU"][1]
    assert "GPU" not in lacks(machine, Reading(0, sensors=("nvml",)))


def test_a_mac_without_macmon(monkeypatch: pytest.MonkeyPatch) -> None:
    find_apple = module.find_apple
    monkeypatch.setattr(module, "find_apple", lambda machine: find_apple(machine, "Darwin"))
    machine = Machine(run=lambda _command: None)
    assert "macmon" in names(machine)
    assert lacks(machine, Reading(0))["power"][1] == "brew install macmon"


def test_a_recording_on_a_mac_has_no_sensors_of_the_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_apple = module.find_apple
    monkeypatch.setattr(module, "find_apple", lambda machine: find_apple(machine, "Darwin"))
    assert names(recorded_machine(tmp_path)) == []


def test_a_profile_says_whom_to_believe_and_how_a_board_sums_up(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str | None:
        return {"get_throttled": "throttled=0x0\n", "pmic_read_adc": PMIC}.get(command[-1])

    machine = Machine(files(tmp_path, PI5 | ZONE | DISCHARGING).root, run)
    profile = dataclasses.replace(load_profile("pi5"), sensors=("battery", "thermal"), power_fit=PowerFit(2.0, 1.0))
    found = detect(machine, profile)
    assert [sensor.name for sensor in found] == ["battery", "thermal", "raspberry-pi", "raspberry-pi-pmic"]
    assert found[-1].read(1.0).power_w == pytest.approx(2.0 * 1.8 + 1.0)
