"""The controller at the wheel: what it says is done, when it is time, and the text stays what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import pilot as module
from edge_runtime import steering
from edge_runtime.control import Observation, Rung, Targets
from edge_runtime.energy.model import PowerModel
from edge_runtime.errors import UsageError
from edge_runtime.native import ContextOptions, Model
from edge_runtime.pilot import Pilot, lossless_ladder, token_times_ms
from edge_runtime.profiles import load_profile
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.slices import open_slices
from edge_runtime.steering import SteeringRequest, targets_of
from edge_runtime.types import Mode

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker

POWER = PowerModel(static_w=2.0, active_w_per_core=1.0, joule_per_gb=0.1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


# ── what a setting takes ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tokens_time_is_the_median_of_three_turns(tiny_path: TinyMaker) -> None:
    """The clock says how long each token took; those that warm up come first and do not count."""
    with Model(str(tiny_path("llama"))) as model:
        slices = open_slices(model, (1,), ContextOptions(n_ctx=32, n_batch=8, n_threads=1))
        took = iter([9, 4, 9, 2, 9, 1, 9, 2, 9, 7, 9, 3])  # by turns with one thread and with two
        times = iter([t for seconds in took for t in (0.0, float(seconds))])
        assert token_times_ms(slices, (1, 2), lambda: next(times)) == {1: 4000.0, 2: 2000.0}
        assert next(times, None) is None
        for piece in slices:
            piece.decode_tokens([1], 0, [0]) if piece.start == 0 else None
            piece.close()


def test_the_ladder_has_threads_and_rests_that_pay() -> None:
    # three threads are no faster than two here, and take more power
    ladder = lossless_ladder({1: 10.0, 2: 5.0, 3: 5.0}, POWER, gb_per_token=0.1, mode=Mode.FULL)
    rungs = {rung.name: rung for rung in ladder.rungs}
    assert rungs["2 threads"].time_per_token_ms == 5.0
    assert rungs["2 threads"].power_w == pytest.approx(2 + 2 * 1 + 0.1 * 0.1 / 0.005)
    assert rungs["1 thread, resting 50%"].time_per_token_ms == 20.0
    assert rungs["1 thread, resting 50%"].power_w == pytest.approx(2 + (1 + 0.1 * 0.1 / 0.01) / 2)
    assert all(rung.n_threads < 3 for rung in ladder.rungs)
    assert all(rung.lossless for rung in ladder.rungs)


# ── between tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


class FakeController:
    """Says one rung after the other, and keeps what it was told."""

    def __init__(self, *rungs: Rung) -> None:
        self.told: list[Observation] = []
        self._rungs = list(rungs)

    def observe(self, observation: Observation) -> Any:
        self.told.append(observation)
        rung = self._rungs.pop(0) if len(self._rungs) > 1 else self._rungs[0]
        return type("Decision", (), {"rung": rung})()


class Wheel:
    """A pilot with a clock that only tokens and rests move."""

    def __init__(self, *rungs: Rung, reading: Reading | None = None) -> None:
        self.now_s = 100.0
        self.threads: list[int] = []
        self.rests: list[float] = []
        self.controller = FakeController(*rungs)
        self.pilot = Pilot(
            self.controller,  # type: ignore[arg-type]
            self.threads.append,
            lambda: reading,
            lambda: self.now_s,
            self._rest,
        )

    def _rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now_s += seconds

    def tokens(self, n: int, seconds: float) -> None:
        for _ in range(n):
            self.now_s += seconds
            self.pilot.token()


FULL = Rung("2 threads", Mode.FULL, 100.0, 9.0, n_threads=2)
RESTING = Rung("1 thread, resting 75%", Mode.FULL, 400.0, 4.0, n_threads=1, rest=0.75)


def test_decisions_are_made_each_half_second_with_the_time_per_token() -> None:
    reading = Reading(99.0, temp_c=50.0)
    wheel = Wheel(FULL, reading=reading)
    wheel.pilot.begin()
    wheel.tokens(1, 7.0)  # a long prompt, which is no token's time
    wheel.tokens(6, 0.125)
    told = [(o.time_s, o.reading, o.time_per_token_ms) for o in wheel.controller.told]
    assert told == [(100.0, reading, None), (107.5, reading, 125.0)]
    wheel.tokens(1, 0.75)  # with the two that came since
    assert wheel.controller.told[-1].time_per_token_ms == pytest.approx(1000 / 3)


def test_threads_are_set_when_the_rung_changes_and_not_otherwise() -> None:
    wheel = Wheel(FULL, FULL, RESTING, RESTING)
    wheel.pilot.begin()
    wheel.tokens(9, 0.5)
    assert wheel.threads == [2, 1]


def test_a_rest_is_its_share_of_the_time_and_counts_as_time_per_token() -> None:
    wheel = Wheel(RESTING)
    wheel.pilot.begin()
    wheel.tokens(1, 5.0)
    assert wheel.rests == []  # nobody rests for the prompt
    wheel.tokens(2, 0.0625)
    assert wheel.rests == [0.1875, 0.1875]
    assert wheel.controller.told[-1].time_per_token_ms == 250.0


def test_without_a_reading_nothing_is_known() -> None:
    wheel = Wheel(FULL)
    wheel.pilot.begin()
    assert wheel.controller.told == [Observation(100.0, Reading(100.0))]


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_targets_come_from_the_profile_and_the_command_line_beats_them() -> None:
    profile = load_profile("pi5")
    quiet = profile.targets["quiet"]
    assert targets_of(SteeringRequest(target="quiet"), profile).ceiling_c == quiet.temp_ceiling_c
    mixed = targets_of(SteeringRequest(target="battery", power_cap_w=4.5), profile)
    assert mixed.power_cap_w == 4.5
    assert mixed.battery is not None
    assert targets_of(SteeringRequest(latency_ms=20), profile) == Targets(latency_ms=20)
    balanced = targets_of(SteeringRequest(explain=True), profile)
    assert balanced.ceiling_c == profile.targets["balanced"].temp_ceiling_c
    with pytest.raises(UsageError, match="no target 'loud'") as error:
        targets_of(SteeringRequest(target="loud"), profile)
    assert "quiet" in error.value.hint


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


class Socket:
    """A sensor that always says the same power."""

    name = "socket"

    def read(self, time_s: float) -> Reading:
        return Reading(time_s, power_w=6.0, power_source=PowerSource.MEASURED, temp_c=45.0, sensors=("socket",))


@pytest.fixture
def generate(tiny_path: TinyMaker, monkeypatch: pytest.MonkeyPatch) -> Sequence[object]:
    monkeypatch.setattr(steering, "detect", lambda *_: [Socket()])
    monkeypatch.setattr(steering, "token_times_ms", lambda *_: {1: 10.0, 2: 6.0})
    monkeypatch.setattr(module, "STEP_S", 0.0)  # a decision after each token
    monkeypatch.setattr(steering.time, "sleep", lambda _seconds: None)
    return "generate", "-m", tiny_path("llama", tokenizer=True), "--threads", 2, "-n", 12, "--raw", "hello"


def test_the_text_stays_what_it_is_and_each_change_is_told(
    run: RunCli, generate: Sequence[object], tmp_path: Path
) -> None:
    plain = run(*generate, "--quiet")
    log = tmp_path / "control.jsonl"
    steered = run(*generate, "--device", "pi5", "--power-cap", 3.2, "--explain", "--control-log", log)
    assert_clean(steered, 0)
    assert steered.out == plain.out
    assert "control: " in steered.err
    assert "control: now '1 thread, resting 75%'" in steered.err
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[0]["kind"] == "start"
    assert events[0]["to"] == "1 thread, resting 75%"
    again = run(*generate, "--device", "pi5", "--latency", 0.001, "--control-log", log)
    assert_clean(again, 0)
    assert "control: " not in again.err
    assert len(log.read_text().splitlines()) > len(events)  # appended
    assert "not possible" in log.read_text()


def test_a_machine_without_a_thermometer_is_not_slowed_down_by_its_profile(
    run: RunCli, generate: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "detect", lambda *_: [])
    result = run(*generate, "--device", "pi5", "--target", "fast", "--explain")
    assert_clean(result, 0)
    assert "no sensor says the temperature, so the ceiling of 77 °C is not held" in result.err
    assert "resting" not in result.err
    asked = run(*generate, "--device", "pi5", "--temp-ceiling", 60, "--explain")
    assert "no sensor says the temperature: the most saving rung is used" in asked.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--target", "loud"), "no target 'loud'"),
        (("--power-cap", "-1"), "power cap"),
        (("--power-cap", "nan"), "power cap"),
        (("--temp-ceiling", "0"), "temperature ceiling"),
        (("--latency", "0"), "latency"),
        (("--target", "quiet", "--device", "native.toml"), "native.toml"),
        (("--explain", "--control-log", "/nowhere/at/all"), "cannot be written"),
        (("--explain", "--mode", "exit", "--boundaries", "1", "--threshold", "1"), "mode exit"),
    ],
)
def test_targets_that_are_none(run: RunCli, generate: Sequence[object], arguments: tuple[str, ...], why: str) -> None:
    result = run(*generate, *arguments)
    assert_clean(result, 2)
    assert why in result.err


def test_a_profile_without_a_power_model(run: RunCli, generate: Sequence[object], tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text("name = 'board'\ndescription = 'a board'\n")
    result = run(*generate, "--power-cap", 3, "--device", path)
    assert_clean(result, 2)
    assert "no power model" in result.err
    assert "energy calibrate" in result.err
