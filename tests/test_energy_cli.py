"""`edge-run energy calibrate` and `edge-run generate --energy`: tables that profiles read, and mistakes explained."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_runtime import sensing
from edge_runtime.energy import live
from edge_runtime.energy.model import PowerModel
from edge_runtime.energy.request import Meter
from edge_runtime.profile_schema import read_profile
from edge_runtime.profiles import Profile
from edge_runtime.sensors.detect import Missing
from edge_runtime.sensors.machine import Machine, Sensor
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.sensors.recording import Recorder
from edge_runtime.sensors.sampler import Sampler

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker

MODEL = PowerModel(static_w=2.0, active_w_per_core=0.75, joule_per_gb=0.25)
POINTS = ("--point", "0:0:2", "--point", "1:0:5", "--point", "0.5:4:4.5", "--point", " 1 : 4 : 6.0", "--cores", 4)
TABLE = """[power]
static_w = 2
active_w_per_core = 0.75
joule_per_gb = 0.25
source = "fitted to 4 points of a power meter, R² 1.000"
label = "calibrated"
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> tuple[object, ...]:
    """A minute: idle, busy, generating at 4 GB/s; by a meter with a clock of its own, and by sensors."""
    readings, rows = [Reading(50.0)], []
    for i, (load, gb) in enumerate([(0.0, 0.0), (1.0, 0.0), (0.75, 4.0)]):
        for t in range(1, 21):
            readings.append(Reading(50.0 + 20 * i + t, load=load))
            power = MODEL.power_w(load, 4, gb)
            rows += [f"{900 + 20 * i + t - share};{power}".replace(".", ",") for share in (1, 0.5, 0.01)]
    with Recorder(tmp_path / "pi.jsonl", "test") as recorder:
        for reading in readings:
            recorder.append(reading)
    (tmp_path / "meter.csv").write_text("time_s;power_w\n" + "\n".join(rows) + "\n960;6\n;\n1000;\n")
    meter, recording = ("--meter", tmp_path / "meter.csv"), ("--recording", tmp_path / "pi.jsonl")
    return (*meter, *recording, "--cores", 4)


# ── calibrate ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [("energy", "calibrate"), ("energy",)])
def test_help_has_examples(run: RunCli, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--help")
    assert_clean(result, 0)
    assert "Examples:\n    edge-run energy calibrate" in result.out


def test_typed_readings_give_the_table_on_stdout_and_the_fit_on_stderr(run: RunCli) -> None:
    result = run("energy", "calibrate", *POINTS)
    assert_clean(result, 0)
    assert result.out == TABLE
    assert "load 0.50, 4.00 GB/s: 4.50 W, by the model 4.50 W" in result.err
    assert "4 points, 4 cores: R² 1.0000" in result.err
    assert "warning" not in result.err
    quiet = run("energy", "calibrate", *POINTS, "--quiet")
    assert (quiet.out, quiet.err) == (TABLE, "")


def test_the_table_is_one_that_profiles_have(run: RunCli, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    out.write_text('name = "mine"\n')
    refused = run("energy", "calibrate", *POINTS, "--out", out)
    assert_clean(refused, 2)
    assert "--force" in refused.err
    assert out.read_text() == 'name = "mine"\n'
    result = run("energy", "calibrate", *POINTS, "--out", out, "--force")
    assert_clean(result, 0)
    assert (result.out, out.read_text()) == ("", TABLE)
    profile = Path(__file__).parent.parent / "devices" / "generic.toml"
    own = [part for part in profile.read_text().split("\n\n") if not part.startswith("[power]")]
    out = tmp_path / "generic.toml"
    out.write_text("\n\n".join([*own, TABLE]))
    power = read_profile(out).power
    assert power is not None
    assert (power.static_w, power.active_w_per_core, power.joule_per_gb, power.label) == (2, 0.75, 0.25, "calibrated")


def test_json_has_the_residuals(run: RunCli) -> None:
    result = run("energy", "calibrate", *POINTS, "--point", "0.25:1:3.5", "--json")
    assert_clean(result, 0)
    found = json.loads(result.out)
    assert (found["n_points"], found["n_cores"], found["at_zero"]) == (5, 4, [])
    assert found["power"]["label"] == "calibrated"
    assert 0.9 < found["r2"] < 1
    assert sum(p["residual_w"] for p in found["points"]) == pytest.approx(0)
    assert found["worst_w"] == max(abs(p["residual_w"]) for p in found["points"])


def test_what_the_fit_cannot_say_is_a_warning(run: RunCli) -> None:
    result = run("energy", "calibrate", "--point", "0:0:2", "--point", "1:0:5", "--point", "1:4:4")
    assert_clean(result, 0)
    assert "warning: joule_per_gb would be below 0 by these points, and is held at 0" in result.err
    assert "warning: three points leave nothing to judge the fit by" in result.err
    constant = run("energy", "calibrate", "--point", "0:0:2", "--point", "1:0:2", "--point", "1:4:2")
    assert "the power does not vary" in constant.err
    assert "R²" not in constant.out


def test_a_meter_beside_a_recording(run: RunCli, files: tuple[object, ...]) -> None:
    result = run("energy", "calibrate", *files, "--traffic", "40:60:4", "--json")
    assert_clean(result, 0)
    power = json.loads(result.out)["power"]
    found = [power[name] for name in ("static_w", "active_w_per_core", "joule_per_gb")]
    assert found == pytest.approx([2, 0.75, 0.25], rel=0.02)
    assert "without a time or a power were left out: 1\n" in result.err
    assert "60 points" in result.err
    assert "load 0.00" not in result.err  # too many to show


def test_typed_points_add_to_recorded_ones(run: RunCli, files: tuple[object, ...]) -> None:
    missing = run("energy", "calibrate", *files, "--quiet", "--traffic", "0:19:1", "--traffic", "19:60:1")
    assert_clean(missing, 2)
    assert "1 GB/s of weights are read in all" in missing.err
    result = run("energy", "calibrate", *files, "--traffic", "40:60:4", "--point", "0.5:0:3.5")
    assert_clean(result, 0)
    assert "61 points" in result.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "there is nothing to fit to"),
        (("--point", "0:0:2"), "while a model generates"),
        (("--point", "0:0"), "--point 0:0: these are not three numbers"),
        (("--point", "0:0:two"), "these are not three numbers"),
        (("--point", "0:0:nan"), "these are not three numbers"),
        (("--point", "0:0:1e999"), "these are not three numbers"),
        (("--point", "0:0:-1"), "a number is below 0"),
        (("--point", "50:0:4"), "0 to 1"),
        (("--meter", "x.csv"), "--recording is missing"),
        (("--recording", "x.jsonl"), "--meter is missing"),
        (("--point", "0:0:2", "--traffic", "1:2:3"), "--traffic is about a --meter"),
        (("--point", "0:0:2", "--shift", "2"), "--shift is about a --meter"),
        (("--point", "0:0:2", "--power", "W"), "--power is about a --meter"),
        (("--meter", "x.csv", "--recording", "x.jsonl"), "x.jsonl cannot be read"),
        (("--meter", "x.csv", "--recording", "x.jsonl", "--traffic", "1:2"), "these are not three numbers"),
        (("--meter", "x.csv", "--recording", "x.jsonl", "--traffic", "3:2:1"), "ends before it begins"),
        (("--meter", "x.csv", "--recording", "x.jsonl", "--shift", "nan"), "no number of seconds"),
        (("--cores", "-1"), "--cores"),
    ],
)
def test_requests_that_cannot_be_met(
    run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("energy", "calibrate", *arguments)
    assert_clean(result, 2)
    assert why in result.err
    assert result.out == ""


def test_files_that_do_not_fit_together(run: RunCli, files: tuple[object, ...], tmp_path: Path) -> None:
    late = run("energy", "calibrate", *files, "--quiet", "--shift", 1000)
    assert_clean(late, 2)
    assert "--shift" in late.err
    column = run("energy", "calibrate", *files, "--power", "P")
    assert_clean(column, 2)
    assert "has no column P; its first row is: time_s, power_w" in column.err
    swapped = run("energy", "calibrate", "--meter", tmp_path / "pi.jsonl", "--recording", tmp_path / "meter.csv")
    assert_clean(swapped, 1)
    assert "no recording of sensors" in swapped.err
    folder = run("energy", "calibrate", *POINTS, "--out", tmp_path / "absent" / "power.toml")
    assert_clean(folder, 2)
    assert "cannot be written" in folder.err


# ── generate --energy ───────────────────────────────────────────────────────────────────────────────────────────────


class Steady:
    """A sensor that always says the same; `enough` is set by its fifth reading."""

    name = "steady"

    def __init__(self, power_w: float | None = 4.0, load: float = 0.0) -> None:
        self._power_w, self._load, self._n = power_w, load, 0
        self.enough = threading.Event()

    def read(self, time_s: float) -> Reading:
        self._n += 1
        if self._n >= 5:
            self.enough.set()
        source = None if self._power_w is None else PowerSource.MEASURED
        return Reading(time_s, power_w=self._power_w, power_source=source, load=self._load)


def plug(monkeypatch: pytest.MonkeyPatch, sensor: Steady) -> None:
    """Let `sensor` be the machine's only one, read quickly, and be waited for instead of slept."""

    def sensors(_machine: Machine, _profile: Profile) -> Sequence[Sensor]:
        return [sensor]

    monkeypatch.setattr(live, "INTERVAL_S", 0.001)
    monkeypatch.setattr(sensing, "detect", sensors)

    def waiting(sampler: Sampler, idle_w: float | None, model: PowerModel | None) -> Meter:
        return live.energy_meter(sampler, idle_w, model, sleep=lambda _: sensor.enough.wait(60))

    monkeypatch.setattr(sensing, "energy_meter", waiting)


@pytest.fixture
def generate(tiny_path: TinyMaker) -> tuple[object, ...]:
    return (
        "generate",
        "-m",
        tiny_path("llama", tokenizer=True),
        "--mode",
        "full",
        "--threads",
        1,
        "-n",
        9,
        "--raw",
        "hello",
    )


def test_the_footer_says_what_an_answer_used(
    run: RunCli, generate: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plug(monkeypatch, Steady())
    result = run(*generate, "--energy")
    assert_clean(result, 0)
    (line,) = [line for line in result.err.splitlines() if line.startswith("energy ")]
    assert " J measured (" in line
    assert ", 0 above idle; prefill " in line
    plain = run(*generate)
    assert plain.out == result.out
    assert "energy" not in plain.err


@pytest.mark.parametrize(("idle", "net_share"), [((), None), (("--idle-power", "3"), 0.25)])
def test_json_has_the_energy_in_the_summary(
    run: RunCli,
    generate: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    idle: tuple[str, ...],
    net_share: float | None,
) -> None:
    """A machine that was busy before has no idle power, unless that is given."""
    plug(monkeypatch, Steady(load=0.9))
    result = run(*generate, "--energy", "--json", *idle)
    assert_clean(result, 0)
    summary = json.loads(result.out.splitlines()[-1])["summary"]
    assert summary["energy_j"] == pytest.approx(summary["prefill_energy_j"] + summary["decode_energy_j"])
    assert summary["energy_per_token_j"] == pytest.approx(summary["decode_energy_j"] / 8)
    assert summary["energy_per_token_j"] == pytest.approx(4 / summary["decode_tokens_per_s"])
    assert summary["energy_source"] == "measured"
    assert summary["energy_covered"] == pytest.approx(1)
    net = summary["net_energy_per_token_j"]
    assert net == (None if net_share is None else pytest.approx(net_share * summary["energy_per_token_j"]))
    assert ("not seen idle before" in result.err) == (net_share is None)


def board(folder: Path, power: bool) -> Path:
    """A profile, with or without a model of its power."""
    path = folder / "board.toml"
    model = "[power]\nstatic_w = 2.5\nactive_w_per_core = 1\njoule_per_gb = 0\nsource = 'a guess'\n" if power else ""
    path.write_text(f"name = 'board'\ndescription = 'a board'\n{model}")
    return path


def test_where_no_sensor_knows_the_power_the_profile_estimates_it(
    run: RunCli, generate: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plug(monkeypatch, Steady(power_w=None, load=0.0))
    result = run(*generate, "--energy", "--json", "--device", board(tmp_path, power=True))
    assert_clean(result, 0)
    summary = json.loads(result.out.splitlines()[-1])["summary"]
    assert summary["energy_source"] == "estimated"
    assert summary["energy_per_token_j"] == pytest.approx(2.5 / summary["decode_tokens_per_s"])
    assert summary["net_energy_per_token_j"] == pytest.approx(0, abs=1e-9)
    assert "warning" not in result.err


def test_a_device_that_is_none_is_said_with_the_nearest(run: RunCli, generate: tuple[object, ...]) -> None:
    result = run(*generate, "--energy", "--device", "p5")
    assert_clean(result, 2)
    assert "pi5" in result.err


def test_without_a_power_it_is_said_why(
    run: RunCli, generate: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", str(board(tmp_path, power=False)))
    plug(monkeypatch, Steady(power_w=None))
    monkeypatch.setattr(sensing, "missing", lambda *_: iter([Missing("power", "only root may", "ask root")]))
    result = run(*generate, "--energy")
    assert_clean(result, 0)
    assert "warning: the energy is not known: only root may\nhint: ask root\n" in result.err
    summary = json.loads(run(*generate, "--energy", "--json", "--quiet").out.splitlines()[-1])["summary"]
    assert summary["energy_j"] is summary["energy_source"] is None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--idle-power", "3"), "means nothing without --energy"),
        (("--energy", "--idle-power", "-1"), "no power of an idle machine"),
        (("--energy", "--idle-power", "nan"), "no power of an idle machine"),
        (("--energy", "--idle-power", "low"), "--idle-power"),
    ],
)
def test_idle_powers_that_are_none(
    run: RunCli, generate: tuple[object, ...], arguments: tuple[str, ...], why: str
) -> None:
    result = run(*generate, *arguments)
    assert_clean(result, 2)
    assert why in result.err
