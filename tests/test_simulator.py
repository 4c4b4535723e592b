"""The simulated boards, the criteria, and the real controller under both."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edge_runtime.bench.control_plot import draw
from edge_runtime.bench.criteria import judge, run_scenario, summary
from edge_runtime.bench.scenarios import (
    KINDS,
    MACHINES,
    MIXES,
    Course,
    Scenario,
    machine_ladder,
    mix_of,
    scenario,
    scenarios_for,
)
from edge_runtime.bench.simulator import PERIOD_S, full_depth_alone, pass_time, physics_at_rest, simulate
from edge_runtime.control import ControlSettings, FastSettings, SlowSettings, Targets
from edge_runtime.errors import UsageError

ROOT = Path(__file__).parents[1]
PI4 = MACHINES["pi4"]


# ── the board ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MACHINES)
def test_a_board_settles_where_its_resistance_says(name: str) -> None:
    machine = replace(MACHINES[name], throttle_c=1000.0)
    state, power_w = physics_at_rest(machine, 20.0), 0.0
    assert state.chip_c == pytest.approx(20 + machine.static_w * machine.resistance_c_per_w)
    for _ in range(8000):
        state, power_w = pass_time(state, machine, machine.cores, 20.0, machine.core_w)
    assert power_w == pytest.approx(machine.most_w)
    assert state.chip_c == pytest.approx(20 + machine.most_w * machine.resistance_c_per_w, abs=0.1)


def test_a_board_warms_up_by_its_time_constant() -> None:
    machine = replace(PI4, throttle_c=1000.0, chip_share=0.0)
    state = physics_at_rest(machine, 20.0)
    start, end = state.board_c, 20 + machine.most_w * machine.resistance_c_per_w
    for _ in range(round(machine.resistance_c_per_w * machine.capacity_j_per_c / PERIOD_S)):
        state, _ = pass_time(state, machine, machine.cores, 20.0, machine.core_w)
    assert (state.board_c - start) / (end - start) == pytest.approx(1 - math.exp(-1), abs=0.01)


def test_a_hot_board_throttles_until_it_is_cooler_by_the_gap() -> None:
    state = physics_at_rest(PI4, 60.0)
    throttled, temps = [], []
    for _ in range(1200):
        state, _ = pass_time(state, PI4, PI4.cores, 40.0, PI4.core_w)
        throttled.append(state.throttled)
        temps.append(state.chip_c)
    edges = np.flatnonzero(np.diff(throttled))
    assert len(edges) >= 2
    on, off = (temps[i] for i in (edges[edges > 200][:2]))
    assert abs(on - off) == pytest.approx(PI4.throttle_gap_c, abs=0.5)


def test_a_battery_loses_what_the_board_takes() -> None:
    state = physics_at_rest(PI4, 20.0, battery_j=1000.0)
    state, power_w = pass_time(state, PI4, 4, 20.0, PI4.core_w)
    assert state.battery_j == pytest.approx(1000 - power_w * PERIOD_S)
    assert pass_time(replace(state, battery_j=0.1), PI4, 4, 20.0, PI4.core_w)[0].battery_j == 0


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


def test_full_depth_alone_throttles_in_heat_waves() -> None:
    for name in ("pi4", "jetson-orin-nano", "x86-64"):
        outcome, _, _ = run_scenario(scenarios_for(MACHINES[name])[0])
        assert outcome.alone_throttles
        assert outcome.alone_over_ceiling_c > 2


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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--device", "pi9"], "there is no simulated board 'pi9'"),
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


def test_pictures_without_matplotlib_are_an_error_with_a_hint(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert script.main(["--device", "pi4", "--scenarios", "1", "--png", str(tmp_path)]) == 1
    assert "hint: pip install 'edge-runtime[plot]'" in capsys.readouterr().err
