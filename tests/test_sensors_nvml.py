"""NVIDIA's GPUs through a fake of the module pynvml: no GPU, driver or package is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edge_runtime.sensors.machine import Machine
from edge_runtime.sensors.nvml import NvmlSensor, find_nvml
from edge_runtime.sensors.reading import Rail, Reading


class FakeNvmlError(Exception):
    """Like pynvml.NVMLError: no kind of OSError or ValueError."""


class FakeNvml(ModuleType):
    """pynvml with GPUs as (milliwatts, °C, bits of reasons); an exception in place of a value is raised."""

    def __init__(self, *gpus: tuple[Any, Any, Any]) -> None:
        super().__init__("pynvml")
        self.gpus = list(gpus)
        self.init_failure: Exception | None = None

    def nvmlInit(self) -> None:
        if self.init_failure is not None:
            raise self.init_failure

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetPowerUsage(self, handle: int) -> Any:
        return self._value(handle, 0)

    def nvmlDeviceGetTemperatureV(self, handle: int, sensor: int) -> Any:
        assert sensor == 0
        return self._value(handle, 1)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> Any:
        return self._value(handle, 2)

    def _value(self, handle: int, which: int) -> Any:
        value = self.gpus[handle][which]
        if isinstance(value, Exception):
            raise value
        return value


class OldNvml(FakeNvml):
    """The package of some years ago: other names, or a driver that lacks the new ones."""

    def nvmlDeviceGetTemperatureV(self, handle: int, sensor: int) -> Any:
        raise FakeNvmlError("Function Not Found")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> Any:
        raise FakeNvmlError("Function Not Found")

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> Any:
        return self._value(handle, 1)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> Any:
        return self._value(handle, 2)


NO = FakeNvmlError("Not Supported")


def read(*gpus: tuple[Any, Any, Any]) -> Reading:
    (sensor,) = find_nvml(Machine(), FakeNvml(*gpus))
    return sensor.read(7.0)


def test_a_gpu_says_its_power_temperature_and_that_nothing_holds_it_down() -> None:
    assert read((71_500, 48, 0)) == Reading(
        7.0,
        rails=(Rail("gpu0", 71.5),),
        temp_c=48.0,
        throttled_now=frozenset(),
        sensors=("nvml",),
    )


def test_several_gpus_have_a_rail_each_and_the_hottest_counts() -> None:
    reading = read((100_000, 60, 0x20), (50_000, 71, 0x04))
    assert reading.power_w is None  # of the machine
    assert reading.rails == (Rail("gpu0", 100.0), Rail("gpu1", 50.0))
    assert reading.temp_c == 71.0
    assert reading.throttled_now == {"gpu-thermal", "gpu-power-cap"}


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x001, set()),  # idle
        (0x002, set()),  # a user's clocks
        (0x004, {"gpu-power-cap"}),
        (0x008, {"gpu-hardware-slowdown"}),
        (0x010, set()),  # as slow as a neighbour
        (0x020, {"gpu-thermal"}),
        (0x048, {"gpu-hardware-slowdown", "gpu-hardware-thermal"}),
        (0x080, {"gpu-power-brake"}),
        (0x100, set()),  # clocks for a display
        (0x200, {"gpu-board-limit"}),
        (0x400, {"gpu-reliability"}),
        (0x8000_0000_0000_0000, set()),  # a reason of tomorrow
    ],
)
def test_bits_become_words(bits: int, words: set[str]) -> None:
    assert read((1000, 40, bits)).throttled_now == words


def test_older_drivers_and_packages_are_asked_by_the_old_names() -> None:
    (sensor,) = find_nvml(Machine(), OldNvml((30_000, 55, 0x20)))
    reading = sensor.read(1.0)
    assert (reading.temp_c, reading.throttled_now) == (55.0, {"gpu-thermal"})


def test_a_gpu_without_a_power_sensor_gives_the_rest() -> None:
    assert read((NO, 50, 0)) == Reading(7.0, temp_c=50.0, throttled_now=frozenset(), sensors=("nvml",))


def test_a_rail_keeps_the_number_of_its_gpu() -> None:
    reading = read((NO, 50, 0), (20_000, 40, NO))
    assert reading.rails == (Rail("gpu1", 20.0),)
    assert reading.throttled_now == frozenset()


def test_a_gpu_that_is_lost_says_nothing_until_it_is_back() -> None:
    nvml = FakeNvml((20_000, 40, 0))
    (sensor,) = find_nvml(Machine(), nvml)
    nvml.gpus[0] = (FakeNvmlError("GPU is lost"),) * 3
    assert sensor.read(1.0) == Reading(1.0)
    nvml.gpus[0] = (20_000, 40, 0)
    assert sensor.read(2.0).rails == (Rail("gpu0", 20.0),)


@pytest.mark.parametrize("value", [-1, None, "N/A", float("nan"), float("inf"), b"\xff", [], OSError("gone")])
def test_garbage_is_no_answer(value: Any) -> None:
    assert read((value, value if value != -1 else -1000, value)) == Reading(7.0)


@pytest.mark.parametrize("milliwatts", [0, 2**31])
def test_an_absurd_power_is_not_known(milliwatts: int) -> None:
    assert read((milliwatts, 40, 0)).rails == ()


@pytest.mark.parametrize("temp_c", [0, -60, 255])
def test_an_absurd_temperature_is_not_known(temp_c: int) -> None:
    assert read((1000, temp_c, 0)).temp_c is None


def test_a_module_that_lacks_functions_is_no_answer() -> None:
    assert NvmlSensor(ModuleType("pynvml"), [0]).read(1.0) == Reading(1.0)
    assert find_nvml(Machine(), ModuleType("pynvml")) == []


# --- finding ---


def test_the_module_is_imported_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml((5000, 30, 0)))
    (sensor,) = find_nvml(Machine())
    assert sensor.name == "nvml"
    assert sensor.read(1.0).rails == (Rail("gpu0", 5.0),)


def test_without_the_package_there_is_no_sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    assert find_nvml(Machine()) == []


def test_a_package_that_breaks_while_it_is_imported_is_no_sensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pynvml.py").write_text("raise RuntimeError('no driver')\n")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no driver"):
        importlib.import_module("pynvml")
    assert find_nvml(Machine()) == []


@pytest.mark.parametrize("failure", [FakeNvmlError("Driver Not Loaded"), OSError("libnvidia-ml.so.1"), ValueError()])
def test_without_a_driver_there_is_no_sensor(failure: Exception) -> None:
    nvml = FakeNvml((5000, 30, 0))
    nvml.init_failure = failure
    assert find_nvml(Machine(), nvml) == []


def test_without_a_gpu_there_is_no_sensor() -> None:
    assert find_nvml(Machine(), FakeNvml()) == []


def test_a_recording_has_no_gpu_as_nvml_reads_no_files(tmp_path: Path) -> None:
    assert find_nvml(Machine(tmp_path), FakeNvml((5000, 30, 0))) == []


def test_nothing_is_imported_before_sensors_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from edge_runtime.sensors import machine, nvml\n"
        "before = 'pynvml' in sys.modules\n"
        "nvml.find_nvml(machine.Machine())\n"
        "print(before, 'pynvml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True"]
