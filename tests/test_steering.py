"""Runs under targets: what can be held and what is refused, exits that close, and times that are measured once."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from edge_runtime import sensing, steering
from edge_runtime.control import Targets
from edge_runtime.energy.model import PowerModel
from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.head import HeadContext
from edge_runtime.exits.thresholds import Rung as Certified
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.pilot import TokenTimes
from edge_runtime.profiles import load_profile
from edge_runtime.sensors.machine import Machine
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.sensors.sampler import Sampler
from edge_runtime.steering import SteeringRequest, plan_steering, targets_of
from edge_runtime.types import Mode, Step, Thresholds

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker
from .exit_fakes import random_pack
from .test_engine import make_engine

N = 40
FAST_EXITS = {1: TokenTimes(10.0, 2.0, 4, 10.0)}  # what exits leave behind costs little together
PI5 = SteeringRequest(device="pi5", latency_ms=0.001)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def certified(bound: float, threshold: float, **changes: Any) -> Certified:
    certificate = {"kind": "disagreement of exits", "n": 900, "risk": 0.01, "holds": True}
    fields: dict[str, Any] = {"risk": "exits", "coverage": 0.5, **changes}
    return Certified("entropy", fields.pop("risk"), bound, 0.05, (threshold, threshold), certificate, **fields)


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture(scope="module")
def pack_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of heads that know nothing, and thresholds that let every token leave where 20% may disagree."""
    path = tmp_path_factory.mktemp("packs") / "pack.gguf"
    random_pack(model_path, (2, 4), rungs=(certified(0.01, 0.001, coverage=0.1), certified(0.2, math.inf))).save(path)
    return path


@pytest.fixture
def options(model_path: Path, pack_path: Path) -> RunOptions:
    return RunOptions(str(model_path), Mode.EXIT, n_ctx=256, n_threads=1, pack=str(pack_path))


# ── what can be held ────────────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize(
    ("target", "asked", "budget"),
    [
        ("fast", 0.1, 0.1),
        ("fast", None, 0.02),
        ("balanced", None, 0.0),
        ("balanced", 0.1, 0.1),
        (None, None, 0.02),
        (None, 0.1, 0.1),
    ],
)
def test_the_disagreement_allowed(options: RunOptions, target: str | None, asked: float | None, budget: float) -> None:
    request = SteeringRequest(target, explain=True, device="pi5")
    plan = plan_steering(request, replace(options, max_disagreement=asked))
    assert plan is not None
    assert plan.targets.max_disagreement == budget


def test_in_lossless_modes_nothing_is_said_of_disagreement() -> None:
    for mode in (Mode.FULL, Mode.VERIFIED, Mode.AUTO):
        plan = plan_steering(SteeringRequest("fast", device="pi5"), RunOptions(mode=mode))
        assert plan is not None
        assert (plan.targets.max_disagreement, plan.pack) == (None, None)


def test_nothing_asked_is_nothing_to_refuse() -> None:
    assert plan_steering(SteeringRequest(device="no such device"), RunOptions(mode=Mode.MARGIN)) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mode": Mode.MARGIN}, "cannot be held in mode margin"),
        ({"pack": None}, "no exit pack was given"),
        ({"pack": None, "thresholds": (0.3,)}, "no exit pack was given"),
        ({"thresholds": (0.3,)}, "a --threshold of your own"),
        ({"mode": Mode.AUTO, "max_disagreement": 0.2}, "in mode exit only"),
        ({"head": "shared"}, "certifies nothing of the model's own output head"),
    ],
)
def test_what_cannot_be_held_is_refused_before_a_model_is_looked_for(
    options: RunOptions, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why) as error:
        plan_steering(PI5, replace(options, model="no such model", **changes))
    assert error.value.hint


def test_a_pack_that_is_none(options: RunOptions, tmp_path: Path) -> None:
    with pytest.raises(PackError):
        plan_steering(PI5, replace(options, pack=str(tmp_path / "none.gguf")))


def test_the_machine_is_the_one_that_is_given(tmp_path: Path) -> None:
    compatible = tmp_path / "proc" / "device-tree" / "compatible"
    compatible.parent.mkdir(parents=True)
    compatible.write_bytes(b"raspberrypi,4-model-b\0brcm,bcm2711\0")
    plan = plan_steering(SteeringRequest("quiet"), RunOptions(), Machine(tmp_path))
    assert plan is not None
    assert plan.profile.name == "pi4"


# ── exits under a target ────────────────────────────────────────────────────────────────────────────────────────────


class Held:
    """An answer under targets on a clock that stands still: decisions are made at the start and when audits ask."""

    def __init__(
        self, options: RunOptions, request: SteeringRequest, times: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(steering, "measure_token_times", times)
        self.said: list[str] = []
        sampler = cast(Sampler, type("Sampler", (), {"latest": Reading(0.0, temp_c=40.0)})())
        plan = plan_steering(request, options)
        assert plan is not None
        with Runtime(options) as runtime:
            text = runtime.text_tokens("Once upon a time")
            steered = steering.SteeredPlayer(runtime.player, runtime.header.file_bytes)
            with steering.steering(plan, steered, sampler, self.said.append, lambda: 0.0) as pilot:
                self.steps: list[Step] = []
                self.rates: list[float] = []
                for chunk in runtime.stream(text, N):
                    self.steps.append(chunk.step)
                    pilot.token()
                    self.rates.append(runtime.engine.audit_rate)
            self.thresholds = runtime.thresholds

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]


def times_of(found: dict[int, TokenTimes]) -> Callable[..., Any]:
    return lambda *_: (found, False)


def full_depth(options: RunOptions) -> list[int]:
    full = replace(options, mode=Mode.FULL, pack=None, max_disagreement=None)
    with Runtime(full) as runtime:
        return [chunk.step.token for chunk in runtime.stream(runtime.text_tokens("Once upon a time"), N)]


def test_exits_end_with_the_audits_that_refute_them(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(options, max_disagreement=0.2)
    held = Held(asked, replace(PI5, explain=True), times_of(FAST_EXITS), monkeypatch)
    exits = [i for i, step in enumerate(held.steps) if step.boundary is not None]
    audits = next(i for i, step in enumerate(held.steps) if step.audits)
    assert exits == list(range(1, 9))  # behind the prompt, as many as may wait
    assert audits == 9
    assert sum(not audit.agreed for audit in held.steps[audits].audits) > 4
    assert held.thresholds == Thresholds((0.0, 0.0))
    said = "\n".join(held.said)
    assert "start → 1 thread, exits certified for 0.2" in said
    assert "control: exits certified for 0.01: disagreement of exits at most 0.01 with confidence 95%" in said
    assert "1 thread, exits certified for 0.2 → 1 thread: " in said
    assert "full depth" in said


def test_the_text_behind_closed_exits_is_what_full_depth_makes_of_it(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(replace(options, max_disagreement=0.2), PI5, times_of(FAST_EXITS), monkeypatch)
    with Runtime(replace(options, mode=Mode.FULL, pack=None)) as runtime:
        begun = runtime.text_tokens("Once upon a time") + held.tokens[:9]
        assert [c.step.token for c in runtime.stream(begun, N - 9)] == held.tokens[9:]


def test_a_budget_of_zero_is_full_depth(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(options, max_disagreement=None)
    # the pack must certify something for a run in mode exit to begin at all
    monkeypatch.setattr(steering, "DEFAULT_DISAGREEMENT", 0.2)
    held = Held(asked, replace(PI5, target="balanced", explain=True), times_of(FAST_EXITS), monkeypatch)
    assert held.tokens == full_depth(options)
    assert all(step.boundary is None for step in held.steps)
    assert any("'balanced' allows no disagreement, so no token exits" in line for line in held.said)


def test_exits_that_are_not_needed_are_not_used(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    request = SteeringRequest(device="pi5", latency_ms=60_000.0)
    held = Held(replace(options, max_disagreement=0.2), request, times_of(FAST_EXITS), monkeypatch)
    assert held.tokens == full_depth(options)


def test_exits_that_no_prediction_speaks_for_are_told(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {1: TokenTimes(10.0, 9.0, 4, 400.0)}
    held = Held(replace(options, max_disagreement=0.2), replace(PI5, explain=True), times_of(slow), monkeypatch)
    assert held.tokens == full_depth(options)
    assert any("'1 thread, exits certified for 0.2' is never used: " in line for line in held.said)
    assert not any("no exits are certified" in line for line in held.said)


def test_audits_are_as_many_as_the_run_asks_for_at_least(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(PI5, target="balanced")
    for asked, least in ((0.1, 0.25), (0.75, 0.75)):
        held = Held(replace(options, audit_rate=asked), request, times_of(FAST_EXITS), monkeypatch)
        assert set(held.rates) == {least}


# ── what a run lets others change between tokens ────────────────────────────────────────────────────────────────────


def test_thresholds_hold_from_the_next_token_on(options: RunOptions) -> None:
    with Runtime(options) as runtime:
        chunks = runtime.stream(runtime.text_tokens("Once upon a time"), N)
        runtime.thresholds = Thresholds((0.0, 0.0))
        assert next(chunks).step.boundary is None
        runtime.thresholds = Thresholds((math.inf, 0.0))
        assert next(chunks).step.boundary == 2
        runtime.thresholds = Thresholds((0.0, math.inf))
        assert next(chunks).step.boundary == 4
        with pytest.raises(UsageError, match="3 thresholds were given for 2 boundaries"):
            runtime.thresholds = Thresholds((0.0, 0.0, 0.0))
        assert runtime.thresholds == Thresholds((0.0, math.inf))
        chunks.close()


@pytest.mark.parametrize(("before", "after", "n_audits"), [(0.0, 1.0, 4), (1.0, 0.0, 0), (1.0, 1.0, 4)])
def test_the_rate_in_force_when_full_depth_runs_decides_about_exits_that_wait(
    before: float, after: float, n_audits: int
) -> None:
    engine, _ = make_engine(Mode.EXIT, cap=4, audit_rate=before)
    assert engine.audit_rate == before
    engine.extend([3])
    steps = engine.generate(9)
    waiting = [next(steps) for _ in range(4)]
    assert all(step.boundary is not None for step in waiting)
    engine.audit_rate = after
    assert len(next(steps).audits) == n_audits
    assert engine.settings.audit_rate == before


def test_a_share_of_exits_is_audited_and_which_is_drawn_before() -> None:
    """Of two engines that differ in the rate, one audits a part of what the other does."""
    found = []
    for rate in (0.25, 0.75):
        engine, _ = make_engine(Mode.EXIT, cap=4, audit_rate=rate)
        engine.extend([3])
        steps = list(engine.generate(80))
        found.append({audit.position for step in steps for audit in step.audits})
    assert found[0] < found[1]
    assert 0 < len(found[0]) < 32 < len(found[1]) < 64


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_no_share(rate: float) -> None:
    engine, _ = make_engine(Mode.EXIT)
    with pytest.raises(UsageError, match="is not a share"):
        engine.audit_rate = rate
    assert engine.audit_rate == 1.0


# ── times ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Measure:
    """Counts how often times are measured."""

    def __init__(self, steady: bool = True) -> None:
        self.calls, self.steady = 0, steady

    def __call__(self, _slices: object, counts: Sequence[int], batch: int = 0) -> tuple[dict[int, TokenTimes], bool]:
        self.calls += 1
        times = TokenTimes(10.0, 6.0, batch, 7.0) if batch else TokenTimes(10.0)
        return {n: replace(times, full_ms=10.0 / n) for n in counts}, self.steady


def test_times_are_measured_once_for_what_they_depend_on(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, asked = Measure(), replace(options, max_disagreement=0.2)
    for _ in range(3):
        Held(asked, PI5, measure, monkeypatch)
    assert measure.calls == 1
    changes: tuple[dict[str, Any], ...] = (
        {"n_threads": 2},
        {"kernels": "stock"},
        {"flash_attention": False},
        {"mode": Mode.FULL, "pack": None, "max_disagreement": None},
    )
    for n, change in enumerate(changes, start=2):
        for _ in range(2):
            Held(replace(asked, **change), PI5, measure, monkeypatch)
        assert measure.calls == n, change


def test_times_of_a_busy_machine_are_not_kept(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measure(steady=False)
    for _ in range(2):
        Held(replace(options, max_disagreement=0.2), PI5, measure, monkeypatch)
    assert measure.calls == 2


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_damaged_times_are_measured_anew(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch, own_cache: Path, damage: bytes | None
) -> None:
    measure, asked = Measure(), replace(options, max_disagreement=0.2)
    Held(asked, PI5, measure, monkeypatch)
    (path,) = (own_cache / "token-times").iterdir()
    if damage is None:
        record = json.loads(path.read_bytes())
        damage = json.dumps({**record, "payload": [[1, -1.0, 6.0, 4, 7.0]]}).encode()
    path.write_bytes(damage)
    for _ in range(2):
        Held(asked, PI5, measure, monkeypatch)
    assert measure.calls == 2


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


class Socket:
    """A sensor that always says the same power."""

    name = "socket"

    def read(self, time_s: float) -> Reading:
        return Reading(time_s, power_w=6.0, power_source=PowerSource.MEASURED, temp_c=45.0, sensors=("socket",))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def generate(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[object]:
    monkeypatch.setattr(sensing, "detect", lambda *_: [Socket()])
    monkeypatch.setattr(steering, "measure_token_times", times_of({1: TokenTimes(10.0), 2: TokenTimes(6.0)}))
    monkeypatch.setattr(steering.time, "sleep", lambda _seconds: None)
    return "generate", "-m", model_path, "--mode", "full", "--threads", 2, "-n", 12, "--raw", "hello"


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
    assert 0 <= events[0]["time_s"] < 600  # since the start, whatever the clock says
    again = run(*generate, "--device", "pi5", "--latency", 0.001, "--control-log", log)
    assert_clean(again, 0)
    assert "control: " not in again.err
    assert len(log.read_text().splitlines()) > len(events)  # appended
    assert "not possible" in log.read_text()


def test_a_machine_without_a_thermometer_is_not_slowed_down_by_its_profile(
    run: RunCli, generate: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensing, "detect", lambda *_: [])
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
        (("--explain", "--mode", "exit", "--boundaries", "1", "--threshold", "1"), "no exit pack was given"),
        (("--explain", "--mode", "margin"), "mode margin"),
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


# ── the demo model and its pack ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.model
def test_the_bundled_pack_under_a_target(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunOptions(str(demo_path), Mode.EXIT, n_ctx=256, n_threads=1, pack="smollm2-135m")
    for request, asked in (
        (SteeringRequest("battery", latency_ms=0.001, explain=True, device="x86-64"), 0.2),
        (SteeringRequest("balanced", latency_ms=0.001, explain=True, device="x86-64"), None),
    ):
        asked_for = dataclasses.replace(options, max_disagreement=asked)
        held = Held(asked_for, request, times_of(FAST_EXITS), monkeypatch)
        exits = sum(step.boundary is not None for step in held.steps)
        if asked is None:
            assert exits == 0
            assert held.tokens == full_depth(options)
        else:
            assert exits > 0
            assert any("start → 1 thread, exits certified for 0.2" in line for line in held.said)
            assert any(step.audits for step in held.steps)


# ── what no sensor says ─────────────────────────────────────────────────────────────────────────────────────────────


def test_where_no_sensor_knows_the_power_the_boards_model_does() -> None:
    model = PowerModel(2.0, 1.0, 0.1)
    estimate = steering._Estimate(model, n_cores=4, gb_per_token=0.5)
    found = estimate(Reading(1.0, load=0.5), 100.0)
    assert (found.power_w, found.power_source) == (2.0 + 1.0 * 4 * 0.5 + 0.1 * 5.0, PowerSource.ESTIMATED)
    assert estimate(Reading(1.0, load=0.5), None).power_w == 4.0
    assert estimate(Reading(1.0), 100.0).power_w is None
    measured = Reading(1.0, power_w=3.0, power_source=PowerSource.MEASURED, load=0.5)
    assert estimate(measured, 100.0) == measured


def test_threads_are_those_of_slices_and_heads(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(HeadContext, "set_threads", lambda _self, n: told.append(n))
    with Runtime(replace(options, max_disagreement=0.2)) as runtime:
        runtime.set_threads(2)
        assert told == [2, 2]
    with Runtime(replace(options, mode=Mode.FULL, pack=None)) as runtime:
        runtime.set_threads(2)
        assert told == [2, 2]
