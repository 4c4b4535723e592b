"""The sensors of a run: read once for energy and targets, live or from a recording, in `generate` and in `chat`."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import sensing as module
from edge_runtime.chat import ChatSession
from edge_runtime.energy.live import energy_meter, run_sampler
from edge_runtime.energy.request import Meter, Work
from edge_runtime.errors import UsageError
from edge_runtime.generate import Runtime
from edge_runtime.options import RunArguments, run_options
from edge_runtime.resolve import RunOptions
from edge_runtime.sensing import Sensing, Steered, plan_sensing, sensing
from edge_runtime.sensing_options import SensingArguments
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.sensors.recording import Recorder, Replay
from edge_runtime.sensors.sampler import Sampler, Timing
from edge_runtime.steering import SteeredPlayer, SteeringRequest
from edge_runtime.types import Mode

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker

STEADY = Reading(70.0, power_w=4.0, power_source=PowerSource.MEASURED, temp_c=50.0, load=0.9, sensors=("pmic",))
FOREVER_S = 1e5


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


def recorded(path: Path, *readings: Reading) -> Path:
    with Recorder(path, "A Board") as recorder:
        for reading in readings:
            recorder.append(reading)
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """4 W for longer than any test: a reading holds until the next."""
    later = Reading(STEADY.time_s + FOREVER_S, power_w=9.0, sensors=("pmic",))
    return recorded(tmp_path / "board.jsonl", STEADY, later)


@pytest.fixture
def no_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "detect", lambda *_: pytest.fail("it looked for sensors"))


# ── a recording instead of sensors ──────────────────────────────────────────────────────────────────────────────────


class SampledClock:
    """A clock that only the sampler's waiting moves, until `end_s`; then it stands still."""

    def __init__(self, start_s: float, end_s: float) -> None:
        self.now_s, self._end_s = start_s, end_s
        self.stands = threading.Event()

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        if self.now_s >= self._end_s:
            self.stands.set()
            return stop.wait(60)
        self.now_s += seconds
        return False

    @property
    def timing(self) -> Timing:
        return Timing(now=lambda: self.now_s, cpu=lambda: 0.0, wait=self.wait)


def test_a_recording_is_read_at_its_own_pace_by_the_runs_clock_and_then_nothing_is_known() -> None:
    """A heat wave: 2 W and cool for ten seconds, 6 W and hot for ten; recorded from 70 s on, played from 1000 s on."""
    cool = [Reading(70.0 + t, power_w=2.0, temp_c=50.0, load=0.0) for t in range(10)]
    hot = [Reading(80.0 + t, power_w=6.0, temp_c=80.0, load=1.0) for t in range(10)]
    clock = SampledClock(1000.0, 1030.0)
    with run_sampler([Replay([*cool, *hot])], clock.timing) as sampler:
        assert clock.stands.wait(60)
        readings = sampler.since(-math.inf)
        meter = energy_meter(sampler, 2.0)
        energy = meter.account(Work(start_s=1004.0, first_s=1008.0, end_s=1016.0, decoded=4))
        over = meter.account(Work(start_s=1026.0, first_s=1027.0, end_s=1028.0, decoded=1))
    by_time = {round(reading.time_s - 1000.0, 3): reading for reading in readings}
    assert (by_time[0.0].temp_c, by_time[9.8].temp_c, by_time[10.2].temp_c, by_time[19.8].temp_c) == (50, 50, 80, 80)
    assert all(r.temp_c is r.power_w is None for r in readings if r.time_s > 1020.001)
    assert energy is not None
    assert energy.prefill.gross_j == pytest.approx(2 * 4)
    assert energy.gross_j == pytest.approx(2 * 6 + 6 * 6, abs=1)
    assert over is None


def test_an_answers_energy_is_the_recordings(run: RunCli, model: Path, recording: Path, no_sensors: None) -> None:
    result = run(
        *("generate", "-m", model, "--mode", "full", "--threads", 1, "-n", 9, "--raw", "hello", "--json"),
        *("--energy", "--replay", recording, "--idle-power", 1),
    )
    assert_clean(result, 0)
    summary = json.loads(result.out.splitlines()[-1])["summary"]
    assert summary["energy_source"] == "measured"
    assert summary["energy_per_token_j"] == pytest.approx(4 / summary["decode_tokens_per_s"])
    assert summary["net_energy_per_token_j"] == pytest.approx(3 / summary["decode_tokens_per_s"])
    assert "warning" not in result.err


def test_a_recording_without_a_power_says_so(
    run: RunCli, model: Path, tmp_path: Path, no_sensors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "board.toml").write_text("name = 'board'\n")
    readings = [Reading(t, temp_c=50.0, sensors=("thermal",)) for t in (0.0, FOREVER_S)]
    path = recorded(tmp_path / "cold.jsonl", *readings)
    result = run(
        *(
            "generate",
            "-m",
            model,
            "--mode",
            "full",
            "--threads",
            1,
            "-n",
            3,
            "--raw",
            "hello",
            "--energy",
            "--idle-power",
            1,
        ),
        *("--replay", path, "--device", tmp_path / "board.toml"),
    )
    assert_clean(result, 0)
    assert "warning: the energy is not known: no sensor in the recording tells it\n" in result.err


@pytest.mark.parametrize("verb", [("generate", "--raw", "hello"), ("chat",)])
@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("--replay", "{folder}/x.jsonl"), 2, "--replay means nothing without --energy or a target"),
        (("--energy", "--replay", "{folder}/none.jsonl"), 2, "cannot be read: No such file"),
        (("--energy", "--replay", "{folder}"), 2, "cannot be read: Is a directory"),
        (("--target", "quiet", "--replay", "{folder}/x.jsonl"), 1, "x.jsonl, line 1: this is no recording of sensors"),
        (("--energy", "--replay", "{folder}/empty.jsonl"), 1, "without readings"),
        (("--energy", "--replay", "{folder}/late.jsonl"), 1, 'line 3: "time_s" is 4.0, earlier than 5.0'),
        (("--idle-power", "3"), 2, "--idle-power means nothing without --energy"),
        (("--energy", "--idle-power", "nan"), 2, "no power of an idle machine"),
        (("--energy", "--device", "pi55"), 2, "unknown device 'pi55'"),
    ],
)
def test_what_cannot_be_meant_is_said_before_the_model_is_loaded(
    run: RunCli, tmp_path: Path, verb: Sequence[str], arguments: Sequence[str], code: int, why: str
) -> None:
    header = '{"format": "edge-runtime sensors", "version": 1, "machine": "x"}\n'
    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text(header)
    (tmp_path / "late.jsonl").write_text(header + '{"time_s": 5.0}\n{"time_s": 4.0}\n')
    given = (argument.format(folder=tmp_path) for argument in arguments)
    result = run(*verb, "-m", tmp_path / "absent.gguf", *given)
    assert_clean(result, code)
    assert why in result.err


def test_the_end_of_a_recording_is_said_once_and_the_energys_gaps_are_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    path = recorded(tmp_path / "short.jsonl", STEADY, Reading(71.0))
    plan = plan_sensing(SensingArguments(energy=True, replay=path), None, RunOptions(), said.append)
    assert plan.recording is not None
    now_s = [5.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now_s[0])
    replay = Replay(plan.recording.readings)
    replay.read(5.0)
    sensors = Sensing(plan, said.append, None, Meter(lambda _: []), replay)
    summary: Any = type("Answer", (), {"generated_tokens": 3, "energy_j": None, "net_energy_per_token_j": None})()
    sensors.tell_gaps(summary)
    sensors.tell_gaps(summary)
    assert said == ["warning: the energy is not known: no sensor in the recording tells it"]
    now_s[0] = 7.0
    sensors.tell_gaps(summary)
    sensors.tell_gaps(summary)
    ended = f"warning: the recording {path} is over: no sensor says anything any more"
    assert said[1:] == [ended]


# ── one sampler ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Held:
    """What stands for a pilot: counts what it is told."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.begun = self.tokens = 0
        self.ended = False

    def begin(self) -> None:
        self.begun += 1

    def token(self) -> None:
        self.tokens += 1


class FakeSteering:
    """Stands for `edge_runtime.steering`: modes with exits cannot be steered."""

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.samplers: list[Sampler] = []

    def plan(self, request: SteeringRequest, options: RunOptions) -> Mode | None:
        if request.wanted and options.mode is Mode.EXIT:
            raise UsageError("targets cannot be held in mode exit", "use --mode full")
        return options.mode if request.wanted else None

    @contextmanager
    def steering(
        self, plan: Mode, steered: SteeredPlayer, sampler: Sampler, _say: Callable[[str], None]
    ) -> Iterator[Held]:
        assert steered.options.mode is plan
        assert steered.engine.tokens == []  # its caches must be empty
        assert all(held.ended for held in self.held)
        self.samplers.append(sampler)
        self.held.append(Held(plan))
        yield self.held[-1]
        self.held[-1].ended = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSteering:
    found = FakeSteering()
    monkeypatch.setattr(module, "plan_steering", found.plan)
    monkeypatch.setattr(module, "steering", found.steering)
    return found


def test_energy_and_targets_share_one_sampler(
    run: RunCli, model: Path, recording: Path, fake: FakeSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers: list[Sampler] = []

    def counted(sensors: Sequence[Any]) -> Sampler:
        samplers.append(run_sampler(sensors))
        return samplers[-1]

    monkeypatch.setattr(module, "run_sampler", counted)
    options = ("-m", model, "--mode", "full", "--threads", 1, "-n", 6, "--replay", recording)
    both = run("generate", *options, "--raw", "hello", "--energy", "--idle-power", 1, "--power-cap", 5)
    assert_clean(both, 0)
    assert "energy " in both.err
    assert fake.samplers == samplers
    assert (len(samplers), fake.held[0].tokens, fake.held[0].ended) == (1, 6, True)
    assert_clean(run("generate", *options, "--raw", "hello", "--power-cap", 5), 0)
    assert len(samplers) == 2
    assert_clean(run("generate", *options[:-2], "--raw", "hello"), 0)
    assert len(samplers) == 2  # nothing is read where nothing is wanted


# ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_answer_of_a_conversation_says_its_energy_and_stats_their_sum(
    run: RunCli, model: Path, recording: Path, no_sensors: None
) -> None:
    options = (
        "-m",
        model,
        "--mode",
        "full",
        "--threads",
        1,
        "-n",
        5,
        "--energy",
        "--replay",
        recording,
        "--idle-power",
        1,
    )
    result = run("chat", *options, stdin=b"/stats\nHello\nAgain\n/stats\n")
    assert_clean(result, 0)
    assert result.err.count("[energy ") == 2
    assert result.err.count("\nenergy: ") == 1
    assert " J measured, of all answers\n" in result.err
    plain = run("chat", "-m", model, "--mode", "full", "--threads", 1, "-n", 5, stdin=b"Hello\nAgain\n/stats\n")
    assert "energy" not in plain.err
    assert plain.out == result.out


def test_what_is_not_known_of_an_energy_is_said_once(run: RunCli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text("name = 'board'\n")
    path = recorded(tmp_path / "cold.jsonl", Reading(0.0, temp_c=50.0), Reading(FOREVER_S, temp_c=50.0))
    options = ("-m", model, "--mode", "full", "--threads", 1, "-n", 3, "--energy", "--idle-power", 1, "--replay", path)
    result = run("chat", *options, "--device", tmp_path / "board.toml", stdin=b"Hello\nAgain\n/stats\n")
    assert_clean(result, 0)
    assert result.err.count("warning: the energy is not known") == 1
    assert "\nenergy: " not in result.err


@contextmanager
def conversation(model: Path, recording: Path) -> Iterator[ChatSession]:
    said: list[str] = []
    arguments = RunArguments(model=str(model), mode="full", ctx=256, threads=1, max_tokens=4)
    options = run_options(arguments)
    plan = plan_sensing(SensingArguments(power_cap=5.0, replay=recording), None, options, said.append)
    with (
        sensing(plan, said.append) as sensors,
        Runtime(options) as runtime,
        Steered(sensors, runtime) as steered,
    ):
        yield ChatSession(runtime, arguments, said.append, steered)


def test_a_conversation_is_steered_in_the_mode_it_changes_to(model: Path, recording: Path, fake: FakeSteering) -> None:
    with conversation(model, recording) as session:
        session.take("Hello")
        session.take("Again")
        assert (fake.held[0].begun, fake.held[0].tokens) == (2, 8)
        session.take("/mode verified")
        session.take("Hello")
        first, second = fake.held
        assert (first.mode, first.ended, first.tokens) == (Mode.FULL, True, 8)
        assert (second.mode, second.ended, second.tokens, second.begun) == (Mode.VERIFIED, False, 4, 1)
        with pytest.raises(UsageError, match="targets cannot be held in mode exit"):
            session.take("/mode exit")
        assert session.runtime.options.mode is Mode.VERIFIED
        session.take("Again")
        assert (second.ended, second.tokens) == (False, 8)
    assert second.ended


def test_a_mode_that_cannot_be_opened_leaves_the_targets_held(
    model: Path, recording: Path, fake: FakeSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_options: RunOptions) -> None:
        raise UsageError("no", "no")

    with conversation(model, recording) as session:
        with monkeypatch.context() as patched:
            patched.setattr(session.runtime, "reopen", refuse)
            with pytest.raises(UsageError):
                session.take("/mode margin")
        session.take("Hello")
        assert [(held.mode, held.tokens, held.ended) for held in fake.held] == [(Mode.FULL, 4, False)]
