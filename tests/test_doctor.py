"""The doctor finds what is there and what is not, whatever else is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from edge_runtime import _library, doctor, models
from edge_runtime.doctor import Check, Status
from edge_runtime.errors import LibraryError
from edge_runtime.sensors.detect import recorded_machine
from edge_runtime.sensors.machine import Machine, Sensor
from edge_runtime.sensors.reading import Reading
from edge_runtime.sensors.recording import Recorder
from edge_runtime.sensors.sampler import SensorGroup

from .cli_helpers import RunCli, assert_clean, finish, program, runner, start
from .conftest import TinyMaker


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the counters of this machine's sensors."""
    monkeypatch.setattr(SensorGroup, "settle", lambda *_: None)


def by_part(checks: list[Check]) -> dict[str, Check]:
    return {check.part: check for check in checks}


def test_a_healthy_installation(run: RunCli, tiny_path: TinyMaker) -> None:
    result = run("doctor", "--model", tiny_path("llama", tokenizer=True))
    assert_clean(result, 0)
    assert "7 layers" in result.out
    assert "edge_* functions" in result.out


def test_json_says_the_same(run: RunCli) -> None:
    found = json.loads(run("doctor", "--json").out)
    assert found["healthy"] is True
    assert {"python", "bindings", "library", "structs", "threads", "memory"} <= {c["part"] for c in found["checks"]}


def test_a_missing_library_is_found_and_the_rest_still_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_library.ENV_OURS, str(tmp_path))
    process = start(program("doctor"))
    result = finish(process)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert f"no libllama in {tmp_path}, from $EDGE_RUNTIME_LIB" in result.out
    assert "memory" in result.out
    assert "hint: " in result.out


def test_a_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise LibraryError("wrong ABI", "build it")

    monkeypatch.setattr(doctor, "load", refuse)
    checks = by_part(doctor.examine(None))
    assert checks["library"] == Check("library", Status.PROBLEM, "wrong ABI", "build it")
    assert checks["library"].fails


def test_a_model_that_cannot_be_read(run: RunCli, tmp_path: Path) -> None:
    result = run("doctor", "--model", tmp_path / "none.gguf")
    assert result.code == 1
    assert "there is no file" in result.out


def test_what_is_optional_fails_nothing(run: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _program: None)
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find_spec(n))
    result = run("doctor")
    assert result.code == 0
    assert result.out.count("optional") >= 4
    assert f"hint: {models.DEMO_HINT}" in result.out


def test_the_device_profile_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "pi5")
    check = by_part(doctor.examine(None))["device profile"]
    assert check.status is Status.OK
    assert check.detail.startswith("pi5, because $EDGE_RUNTIME_DEVICE names it: 4 threads; ")
    assert "throttles at 80 °C" in check.detail


def test_threads_and_batch_and_who_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 3)
    monkeypatch.setattr(doctor, "default_threads", lambda: 2)
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "pi5")
    found = by_part(doctor.examine(None))
    assert found["threads"].detail.startswith("3, of the 4 that the device profile pi5 says: the machine has ")
    assert found["threads"].detail.endswith("this process may use 3")
    assert found["batch"].detail == "64 prompt tokens at once, as the device profile pi5 says"
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "none at all")
    found = by_part(doctor.examine(None))
    assert found["threads"].detail.startswith("2, one per physical core: ")
    assert found["batch"].detail == "128 prompt tokens at once, no device profile says more"


def test_a_device_profile_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "pi55")
    check = by_part(doctor.examine(None))["device profile"]
    assert check.status is Status.PROBLEM
    assert "unknown device 'pi55'" in check.detail
    assert check.hint == "did you mean 'pi5'?"


# ── sensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeSensor:
    """Knows what it is told to know, or breaks."""

    def __init__(self, name: str, answer: Reading | None) -> None:
        self.name = name
        self._answer = answer

    def read(self, time_s: float) -> Reading:
        if self._answer is None:
            raise RuntimeError("it fell off")
        return self._answer


def sensor_checks(tmp_path: Path, *sensors: Sensor) -> dict[str, Check]:
    machine = recorded_machine(tmp_path)

    def find(asked: Machine, _profile: object) -> list[Sensor]:
        assert asked is machine
        return list(sensors)

    checks = list(doctor._sensors(machine, None, find, now=lambda: 7.0))
    assert not any(check.fails for check in checks)
    return by_part(checks)


def test_sensors_and_what_they_know(tmp_path: Path) -> None:
    found = sensor_checks(
        tmp_path,
        FakeSensor("pmic", Reading(7, power_w=4.0, temp_c=51.0, throttled_now=frozenset(), sensors=("pmic",))),
        FakeSensor("thermal", Reading(7, temp_c=52.0, sensors=("thermal",))),
        FakeSensor("fan", Reading(7)),
    )
    assert found["sensors"].status is Status.OK
    assert found["sensors"].detail == "pmic: 51.0 °C, 4.00 W, throttled: no; thermal: 52.0 °C"
    assert found["silent sensors"] == Check("silent sensors", Status.OPTIONAL, "fan")
    assert not any(part.startswith("no ") for part in found)


def test_a_machine_without_sensors(tmp_path: Path) -> None:
    found = sensor_checks(tmp_path)
    assert found["sensors"] == Check("sensors", Status.OPTIONAL, "none answers")
    assert {"no power", "no temperature", "no throttling"} <= found.keys()
    assert all(check.detail for check in found.values())


def test_a_sensor_that_breaks(tmp_path: Path) -> None:
    found = sensor_checks(tmp_path, FakeSensor("loose", None))
    assert "it fell off" in found["broken sensor"].detail
    assert "silent sensors" not in found


def test_sensors_are_a_part_of_the_installation() -> None:
    assert "sensors" in by_part(doctor.examine(None))


def test_a_replay_instead_of_the_sensors(run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "detect", lambda *_: pytest.fail("it looked for sensors"))
    path = tmp_path / "day.jsonl"
    with Recorder(path, "A Board") as recorder:
        recorder.append(Reading(5.0, temp_c=40.0, sensors=("thermal",)))
        recorder.append(Reading(7.0, temp_c=45.0, power_w=3.0, sensors=("thermal", "pmic")))
    found = by_part(doctor.examine(None, path))
    said = "2 readings in 2 s by thermal, pmic, at first 40.0 °C, 3.00 W"
    assert found["sensors"] == Check("sensors", Status.OK, f"a replay of {path}, from A Board: {said}")
    assert "no power" not in found
    assert "in the recording" in found["no throttling"].detail
    result = run("doctor", "--json", "--replay", path)
    assert_clean(result, 0)
    assert "a replay of" in result.out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read: No such file"),
        ("", "line 1: this is no recording of sensors"),
        ('{"format": "edge-runtime sensors", "version": 1, "machine": "x"}\n', "a recording without readings"),
        ('{"format": "edge-runtime sensors", "version": 1, "machine": "x"}\n{"time_s": "a"}\n', "line 2"),
    ],
)
def test_a_replay_that_is_none(run: RunCli, tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "day.jsonl"
    if text is not None:
        path.write_text(text)
    result = run("doctor", "--replay", path)
    assert result.code == 1
    assert why in result.out
    assert "hint: " in result.out
    assert "memory" in result.out  # the rest is still checked


def test_bindings_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.1.0")
    assert doctor._bindings().status is Status.PROBLEM

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert doctor._bindings().status is Status.MISSING


def test_the_manifest_of_a_build(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "package": "llama-cpp-python",
                "version": "1.2.3",
                "llama_cpp_commit": "abc",
                "patches": {"series": "0", "layer-range.patch": "0"},
                "device": "pi5",
                "flags": ["-DA=1"],
                "compiler": "c++",
            }
        )
    )
    source, build = doctor._manifest(tmp_path)
    assert source.detail == "llama-cpp-python 1.2.3, llama.cpp abc, patches: layer-range"
    assert "for device pi5 by c++, flags: -DA=1" in build.detail


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    (check,) = doctor._manifest(tmp_path)
    assert check.status is Status.PROBLEM
