"""The simulated boards, the criteria, and the real controller under both."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edge_runtime.bench.control_plot import draw, draw_boards
from edge_runtime.bench.criteria import judge, run_scenario, summary
from edge_runtime.bench.scenarios import (
    BOARDS,
    KINDS,
    MIXES,
    Course,
    MachineModel,
    Scenario,
    machine_ladder,
    machine_of,
    machines,
    mix_of,
    scenario,
    scenarios_for,
)
from edge_runtime.bench.simulator import PERIOD_S, Physics, full_depth_alone, pass_time, physics_at_rest, simulate
from edge_runtime.control import (
    AuditCounts,
    Controller,
    ControlSettings,
    Decision,
    FastSettings,
    Observation,
    SlowSettings,
    Targets,
)
from edge_runtime.errors import UsageError
from edge_runtime.profiles import load_profile, profile_names, profiles_dir
from edge_runtime.sensors.reading import PowerSource

ROOT = Path(__file__).parents[1]
MACHINES = {name: machine_of(load_profile(name)) for name in BOARDS}
PI4 = MACHINES["pi4"]


# ── from profiles ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_shipped_profile_is_simulated_but_the_one_that_stands_for_any_machine() -> None:
    assert {machine.name for machine in machines()} == set(profile_names()) - {"native"} == set(BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_what_a_profile_says_is_what_is_simulated(name: str) -> None:
    profile, machine = load_profile(name), MACHINES[name]
    assert profile.power is not None
    assert profile.thermal is not None
    assert machine.static_w == profile.power.static_w
    assert machine.core_w == profile.power.active_w_per_core
    assert machine.power.joule_per_gb == profile.power.joule_per_gb
    assert (machine.throttle_c, machine.ceiling_c) == (profile.thermal.throttle_c, profile.thermal.ceiling_c)
    assert machine.cores == profile.n_threads or BOARDS[name].cores
    assert machine.measures_power == (name != "pi4")  # which has no sensor for it
    asked = {found.target for found in scenarios_for(machine)}
    assert asked == set(profile.targets)
    for found in scenarios_for(machine):
        wanted = profile.targets[found.target]
        assert found.targets.ceiling_c == wanted.temp_ceiling_c
        assert found.targets.budget == wanted.max_disagreement
        assert wanted.power_cap_w is None or found.targets.power_cap_w == wanted.power_cap_w


def edited(folder: Path, old: str, new: str, name: str = "pi4") -> Path:
    """A folder with one profile, changed."""
    text = (profiles_dir() / f"{name}.toml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / f"{name}.toml").write_text(text.replace(old, new), encoding="utf-8")
    return folder


def test_a_changed_profile_is_a_changed_machine(tmp_path: Path) -> None:
    (machine,) = machines(edited(tmp_path, "active_w_per_core = 0.8", "active_w_per_core = 0.9"))
    assert machine.core_w == 0.9
    assert machine.most_w == pytest.approx(PI4.most_w + 4 * 0.1)
    assert machine_ladder(machine).rungs[0].power_w == pytest.approx(machine_ladder(PI4).rungs[0].power_w + 4 * 0.1)


@pytest.mark.parametrize(
    ("old", "new", "kind", "value"),
    [
        ("throttle_c = 80 #", "throttle_c = 82 #", "heat wave", lambda s: s.machine.throttle_c == 82),
        ("n_threads = 4", "n_threads = 3", "shift", lambda s: s.machine.cores == 3),
        ("power_cap_w = 4.2", "power_cap_w = 4.4", "battery", lambda s: s.targets.power_cap_w == 4.4),
        ("temp_ceiling_c = 77", "temp_ceiling_c = 78", "shift", lambda s: s.targets.ceiling_c == 78),
        ("temp_ceiling_c = 77\n", "", "shift", lambda s: s.targets.ceiling_c == 76),
        ("joule_per_gb = 0.08", "joule_per_gb = 1", "shift", lambda s: s.machine.most_w > PI4.most_w + 2),
        ('["raspberry-pi",', '["raspberry-pi-pmic",', "shift", lambda s: s.machine.measures_power),
    ],
)
def test_scenarios_follow_the_profile(
    tmp_path: Path, old: str, new: str, kind: str, value: Callable[[Scenario], bool]
) -> None:
    (machine,) = machines(edited(tmp_path, old, new))
    assert value(scenario(machine, kind, 0))
    assert not value(scenario(PI4, kind, 0))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('name = "pi4"', 'name = "pi6"', "'pi6' cannot be simulated: BOARDS does not have its name"),
        ("power_cap_w = 4.2\n", "", "it lacks power_cap_w in [targets.battery]"),
        ("temp_ceiling_c = 77\nmax_disagreement = 0.02", "", "it lacks max_disagreement in [targets.fast]"),
        (
            "[thermal]\nthrottle_c = 80 # it slows down step by step from 80 to 85\nceiling_c = 76",
            "",
            "lacks [thermal]",
        ),
        ("n_threads = 4", "n_threads = 0", "BOARDS does not have its number of cores"),
    ],
)
def test_what_a_profile_lacks_is_said(tmp_path: Path, old: str, new: str, text: str) -> None:
    edited(tmp_path, old, new)
    if "pi6" in new:
        (tmp_path / "pi4.toml").rename(tmp_path / "pi6.toml")
    with pytest.raises(UsageError) as error:
        machines(tmp_path)
    assert text in str(error.value)


def test_a_profile_without_power_and_heat_stands_for_any_machine() -> None:
    with pytest.raises(UsageError, match=r"'native' cannot be simulated: it lacks \[power\], \[thermal\]"):
        machine_of(load_profile("native"))


@pytest.mark.parametrize(("name", "source"), [("pi4", PowerSource.ESTIMATED), ("pi5", PowerSource.MEASURED)])
def test_without_a_sensor_the_profiles_model_tells_the_power(
    name: str, source: PowerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Observation] = []

    class Curious(Controller):
        def observe(self, observation: Observation, counts: AuditCounts | None = None) -> Decision:
            looks.append(observation)
            return super().observe(observation, counts)

    monkeypatch.setattr("edge_runtime.bench.simulator.Controller", Curious)
    hungry = replace(scenario(MACHINES[name], "shift", 5), duration_s=60.0, power_error=1.5)
    trace = simulate(hungry)
    seen = [(look.reading, true_w) for look, true_w in zip(looks[1:], trace.column("power_w"), strict=False)]
    told = [(reading.power_w, true_w) for reading, true_w in seen if reading.power_w is not None]
    assert {reading.power_source for reading, _ in seen} == {source, None}
    shares = np.array([power_w / true_w for power_w, true_w in told])
    most_w = hungry.machine.most_w
    wrong = most_w / (most_w + 0.5 * hungry.machine.core_w * hungry.machine.cores)
    assert shares.mean() == pytest.approx(1.0 if source is PowerSource.MEASURED else wrong, abs=0.02)


# ── the board ───────────────────────────────────────────────────────────────────────────────────────────────────────


def work_hard(state: Physics, machine: MachineModel, ambient_c: float) -> tuple[Physics, float]:
    """A period of full depth on all cores."""
    return pass_time(state, machine, machine.cores, ambient_c, machine.core_w, machine.gb_per_s(machine.cores))


@pytest.mark.parametrize("name", MACHINES)
def test_a_board_settles_where_its_resistance_says(name: str) -> None:
    machine = replace(MACHINES[name], throttle_c=1000.0)
    state, power_w = physics_at_rest(machine, 20.0), 0.0
    assert state.chip_c == pytest.approx(20 + machine.static_w * machine.resistance_c_per_w)
    for _ in range(8000):
        state, power_w = work_hard(state, machine, 20.0)
    assert power_w == pytest.approx(machine.most_w)
    assert state.chip_c == pytest.approx(20 + machine.most_w * machine.resistance_c_per_w, abs=0.1)


def test_a_board_warms_up_by_its_time_constant() -> None:
    machine = replace(PI4, throttle_c=1000.0, chip_share=0.0)
    state = physics_at_rest(machine, 20.0)
    start, end = state.board_c, 20 + machine.most_w * machine.resistance_c_per_w
    for _ in range(round(machine.resistance_c_per_w * machine.capacity_j_per_c / PERIOD_S)):
        state, _ = work_hard(state, machine, 20.0)
    assert (state.board_c - start) / (end - start) == pytest.approx(1 - math.exp(-1), abs=0.01)


def test_a_hot_board_throttles_until_it_is_cooler_by_the_gap() -> None:
    state = physics_at_rest(PI4, 60.0)
    throttled, temps = [], []
    for _ in range(1200):
        state, _ = work_hard(state, PI4, 40.0)
        throttled.append(state.throttled)
        temps.append(state.chip_c)
    edges = np.flatnonzero(np.diff(throttled))
    assert len(edges) >= 2
    on, off = (temps[i] for i in (edges[edges > 200][:2]))
    assert abs(on - off) == pytest.approx(PI4.throttle_gap_c, abs=0.5)


def test_a_battery_loses_what_the_board_takes() -> None:
    state = physics_at_rest(PI4, 20.0, battery_j=1000.0)
    state, power_w = work_hard(state, PI4, 20.0)
    assert state.battery_j == pytest.approx(1000 - power_w * PERIOD_S)
    assert work_hard(replace(state, battery_j=0.1), PI4, 20.0)[0].battery_j == 0


def test_courses_are_steps_or_lines() -> None:
    points = ((10.0, 1.0), (20.0, 3.0))
    assert [Course(points).at(t) for t in (0, 10, 15, 20, 99)] == [1, 1, 1, 3, 3]
    assert [Course(points, linear=True).at(t) for t in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]


def test_ladders_of_boards_have_all_modes_and_most_threads_first() -> None:
    for machine in MACHINES.values():
        ladder = machine_ladder(machine)
        assert {mix_of(rung).name for rung in ladder.rungs} == set(MIXES)
        assert ladder.rungs[0].n_threads == machine.cores
        assert ladder.rungs[-1].rest > 0


# ── scenarios ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_twenty_scenarios_cover_every_kind_and_are_the_same_each_time() -> None:
    found = scenarios_for(PI4)
    assert len(found) == 20
    assert {s.kind for s in found} == set(KINDS)
    assert found == scenarios_for(PI4)
    assert len({s.name for machine in MACHINES.values() for s in scenarios_for(machine)}) == 140


@pytest.mark.parametrize("name", MACHINES)
def test_what_happens_can_be_borne_by_the_most_saving_rung(name: str) -> None:
    for found in scenarios_for(MACHINES[name]):
        machine, rung = found.machine, machine_ladder(found.machine).rungs[-1]
        others = max(cores for _, cores in found.background.points)
        watts = machine.static_w + machine.core_w * found.power_error * (rung.n_threads * (1 - rung.rest) + others)
        hottest = max(value for _, value in found.ambient_c.points) + watts * machine.resistance_c_per_w
        assert found.targets.ceiling_c is not None
        assert hottest < found.targets.ceiling_c


def test_a_run_is_the_same_each_time() -> None:
    shift = replace(scenario(PI4, "shift", 5), duration_s=60.0)
    assert simulate(shift) == simulate(shift)


# ── the controller under test ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_every_board_meets_the_criteria_in_every_kind_of_scenario(name: str, seed: int) -> None:
    outcome, trace, _ = run_scenario(scenarios_for(MACHINES[name])[seed])
    assert outcome.missed == ()
    assert trace.events[0].kind == "start"
    assert all(event.reason for event in trace.events)


@pytest.mark.parametrize("name", BOARDS)
def test_full_depth_alone_throttles_in_heat_waves(name: str) -> None:
    waves = [found for found in scenarios_for(MACHINES[name]) if found.kind == "heat wave"]
    assert [found.target for found in waves] == ["fast", "balanced", "quiet"]
    for found in waves:
        alone = full_depth_alone(found)
        assert found.targets.ceiling_c is not None
        assert alone.column("temp_c").max() > found.targets.ceiling_c + 2
        assert alone.column("throttled").any() or found.target == "quiet"


# holds its rung for ever without a reading, and trusts its predictions
_FOREVER = ControlSettings(fast=FastSettings(hold_s=1e9))


def missed(found: Scenario, settings: ControlSettings) -> str:
    return " ".join(run_scenario(found, settings)[0].missed)


def test_the_criteria_catch_a_controller_that_ignores_heat() -> None:
    wave = scenarios_for(PI4)[0]
    # throttling, well above this ceiling, is no help
    wave = replace(wave, targets=replace(wave.targets, ceiling_c=74.0), dead=(("temp", 0.0, 600.0),))
    assert "°C above the ceiling" in missed(wave, _FOREVER)


def test_the_criteria_catch_a_controller_that_ignores_power() -> None:
    busy = next(s for s in scenarios_for(MACHINES["pi5"]) if s.kind == "background load")
    assert "the power cap" in missed(replace(busy, dead=(("power", 0.0, 600.0),)), _FOREVER)


def test_the_criteria_catch_a_controller_that_flutters() -> None:
    hasty = FastSettings(dwell_s=0, patience_s=0, most_patience_s=0)
    wave = scenarios_for(PI4)[0]
    found = replace(wave, targets=replace(wave.targets, latency_ms=200.0, max_disagreement=None))
    assert "rung changes in 5 s" in missed(found, ControlSettings(fast=hasty))


def test_the_criteria_catch_a_controller_that_ignores_audits() -> None:
    deaf = ControlSettings(slow=SlowSettings(delta=1e-300, account_share=math.inf, advance=math.inf))
    shift = next(s for s in scenarios_for(PI4) if s.kind == "shift")
    assert "a disagreement of" in missed(replace(shift, wrong=Course(((0.0, 0.6), (200.0, 20.0)))), deaf)


def test_contradicting_targets_do_not_make_it_oscillate() -> None:
    found = replace(scenario(PI4, "heat wave", 0), targets=Targets(latency_ms=150, power_cap_w=4, ceiling_c=77))
    trace = simulate(found)
    assert judge(trace, full_depth_alone(found)).changes_per_5_s < 1
    assert any(event.kind == "target" and "not possible" in event.reason for event in trace.events)


def test_a_summary_of_nothing_in_particular_has_no_numbers_that_are_none() -> None:
    outcome, _, _ = run_scenario(replace(scenario(PI4, "shift", 5), duration_s=60.0))
    json.dumps(summary([outcome]), allow_nan=False)
    assert summary([outcome])["cap_share"] is None


# ── picture and script ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_is_drawn_and_an_unwritable_place_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, trace, alone = run_scenario(replace(scenario(PI4, "everything", 6), duration_s=120.0))
    path = tmp_path / "new" / "run.png"
    draw(trace, alone, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    draw(trace, alone, path)
    assert path.read_bytes() == first
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        draw(trace, alone, tmp_path / "file" / "run.png")


def test_a_picture_of_all_boards_is_drawn_and_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    runs = [run_scenario(replace(scenario(m, "everything", 6), duration_s=60.0))[1:] for m in MACHINES.values()]
    path = tmp_path / "new" / "all.png"
    draw_boards(runs, path)
    first = path.read_bytes()
    assert len(first) < 120_000
    with Image.open(path) as image:
        image.load()
        assert image.width > 1000
        assert image.height > 700
        assert image.text == {}  # and so no date
        assert len(image.convert("RGB").getcolors(1000)) > 8
    draw_boards(runs, path)
    assert path.read_bytes() == first
    draw_boards(runs[:1], path)
    assert path.read_bytes() != first
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written") as error:
        draw_boards(runs, tmp_path / "file" / "all.png")
    assert "--pictures" in error.value.hint


def test_there_is_a_picture_of_each_scenario(script: ModuleType) -> None:
    wanted = {script.picture_name(found.title) for found in scenarios_for(PI4)}
    wanted |= {script.picture_name(found.name) for found in (scenarios_for(PI4)[0], scenarios_for(PI4)[5])}
    assert {path.name for path in (ROOT / "docs" / "control").iterdir()} == wanted


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("simulate_control", str(ROOT / "scripts" / "simulate_control"))
    spec = importlib.util.spec_from_loader("simulate_control", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_script_prints_a_table_and_a_log(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    assert script.main(["--device", "pi4", "--scenarios", "2", "--each", "--log", str(log)]) == 0
    out = capsys.readouterr().out
    assert "| pi4 00 heat wave | 1 | 1 |" in out
    assert out.rstrip().endswith("| met |")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {line["run"] for line in lines} == {"pi4 00 heat wave", "pi4 01 battery"}


def test_the_script_prints_json(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--device", "generic", "--scenarios", "3", "--only", "heat wave", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["runs"] == 1
    assert found["runs"][0]["missed"] == []


def test_the_script_fails_where_a_criterion_is_missed(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.bench.criteria._OVER_C", -50.0)
    assert script.main(["--device", "pi4", "--scenarios", "1"]) == 1
    captured = capsys.readouterr()
    assert "MISSED 1" in captured.out
    assert "missed: pi4 00 heat wave:" in captured.err


def test_the_script_draws_each_scenario_and_takes_a_profile_of_ones_own(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    profile = edited(tmp_path, "throttle_c = 80 #", "throttle_c = 81 #") / "pi4.toml"
    pictures = tmp_path / "pictures"
    arguments = ["--device", str(profile), "pi5", "--scenarios", "2", "--pictures", str(pictures)]
    assert script.main(arguments) == 0
    assert "| pi5 | 2 |" in capsys.readouterr().out
    assert {path.name for path in pictures.iterdir()} == {"00-heat-wave.png", "01-battery.png"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--device", "pi9"], "unknown device 'pi9'"),
        (["--device", "native"], "'native' cannot be simulated: it lacks [power]"),
        (["--only", "rain"], "there are no scenarios of kind 'rain'"),
        (["--scenarios", "0"], "0 scenarios show nothing"),
        (["--scenarios", "2", "--only", "shift"], "no scenario of that kind is among so few"),
    ],
)
def test_the_script_says_what_it_cannot_do(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "hint: " in error


@pytest.mark.parametrize("option", ["--png", "--pictures"])
def test_pictures_without_matplotlib_are_an_error_with_a_hint(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert script.main(["--device", "pi4", "--scenarios", "1", option, str(tmp_path)]) == 1
    assert "hint: pip install 'edge-runtime[plot]'" in capsys.readouterr().err
