"""A server whose tokens leave early, and one that holds targets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import steering
from edge_runtime.batching import BatchEngine, ExitBatchEngine
from edge_runtime.config_load import LoadedConfig, Sources, load_config
from edge_runtime.errors import UsageError
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.thresholds import Rung
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.pilot import TokenTimes
from edge_runtime.profiles import load_profile
from edge_runtime.sensors.reading import Reading
from edge_runtime.serving.holding import plan_targets
from edge_runtime.steering import Plan, SteeringRequest, plan_steering
from edge_runtime.types import Mode, SamplingSettings

from .exit_fakes import random_pack
from .serving_helpers import CHAT, LIMITS, Rig, ask, chat, rig

COMPLETIONS = "/v1/completions"
N_LAYER = 7
EAGER = Rung(
    "entropy", "exits", 0.1, 0.05, (4.0, 4.0), {"kind": "x", "bound": 0.1, "n": 40, "risk": 0.01, "holds": True}, 0.5
)
BODY = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "logit_bias": {}, "temperature": 0, "seed": 1}


@pytest.fixture
def path(tiny_path: Callable[..., Path]) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture
def pack(path: Path, tmp_path: Path) -> ExitPack:
    made = random_pack(path, (2, 4), rungs=(EAGER,))
    made.save(tmp_path / "pack.gguf")
    return ExitPack.load(tmp_path / "pack.gguf")


@pytest.fixture
def exiting(path: Path, pack: ExitPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return RunOptions(
        str(path), Mode.EXIT, n_threads=1, pack=str(tmp_path / "pack.gguf"), max_disagreement=0.1, audit_rate=1.0, cap=4
    )


def metrics(made: Rig) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in made.metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("edge_runtime_"): float(value) for name, value in lines}


def serve(path: Path, test: Callable[[Rig], Any], **changes: Any) -> None:
    with rig(path, **changes) as made:
        asyncio.run(test(made))
        assert made.thread.failure is None
        made.check_free()


# ── exits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_are_those_of_one_conversation_alone(path: Path, pack: ExitPack, exiting: RunOptions) -> None:
    options = replace(exiting, n_ctx=512, n_batch=64, flash_attention=True, sampling=SamplingSettings(seed=1))
    prompts = ("Once upon a time", "the the the", "a b c a b c")
    alone = {}
    for prompt in prompts:
        with Runtime(options) as runtime:
            alone[prompt] = "".join(c.text for c in runtime.stream(runtime.text_tokens(prompt), 24))

    async def test(made: Rig) -> None:
        assert isinstance(made.engine, ExitBatchEngine)
        found = await asyncio.gather(*(ask(made.app, COMPLETIONS, {**BODY, "prompt": p}) for p in prompts))
        assert {p: f.json["choices"][0]["text"] for p, f in zip(prompts, found, strict=True)} == alone
        told = metrics(made)
        n = told["generated_tokens_total"]
        assert n == told['token_depth_layers_bucket{le="+Inf"}'] == told["token_depth_layers_count"]
        early = {depth: k for depth, k in made.engine.stats.by_depth.items() if depth < N_LAYER}
        exits = sum(early.values())
        assert 0 < exits < n
        assert told[f'token_depth_layers_bucket{{le="{float(max(early))}"}}'] == exits
        assert told["token_depth_layers_sum"] == sum(d * k for d, k in made.engine.stats.by_depth.items())
        assert 0 < told["audited_exits_total"] <= exits
        assert told["disagreed_exits_total"] <= told["audited_exits_total"]
        assert told['exit_threshold{layer="2"}'] == 4.0

    serve(path, test, run=exiting, pack=pack)


def test_what_a_grammar_wants_comes_from_full_depth(path: Path, pack: ExitPack, exiting: RunOptions) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    async def test(made: Rig) -> None:
        found = await ask(made.app, CHAT, chat(response_format=form, max_tokens=60, logit_bias={}))
        assert found.status == 200, found.body
        assert set(made.engine.stats.by_depth) == {N_LAYER}
        await ask(made.app, COMPLETIONS, BODY)
        assert set(made.engine.stats.by_depth) > {N_LAYER}

    serve(path, test, run=exiting, pack=pack)


def test_the_models_own_head_may_speak_too(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    run = RunOptions(str(path), Mode.EXIT, boundaries=(3,), thresholds=(math.inf,), cap=3)

    async def test(made: Rig) -> None:
        assert (await ask(made.app, COMPLETIONS, BODY)).status == 200
        assert made.engine.stats.by_depth.get(3, 0) > made.engine.stats.by_depth[N_LAYER]

    serve(path, test, run=run)


def test_margin_is_an_engine_with_theta(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))

    async def test(made: Rig) -> None:
        made.engine.stats.relaxed = 5
        assert metrics(made)["relaxed_tokens_total"] == 5
        assert isinstance(made.engine, BatchEngine)
        assert made.engine._theta == 0.01
        await answered(made)

    serve(path, test, run=RunOptions(str(path), Mode.MARGIN, theta=0.01))


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


TIMES = {1: TokenTimes(20.0), 2: TokenTimes(11.0)}


def planned(**asked: Any) -> Plan:
    plan = plan_steering(SteeringRequest(device="pi5", **asked), RunOptions(mode=Mode.VERIFIED))
    assert plan is not None
    return plan


async def answered(made: Rig) -> None:
    assert (await ask(made.app, COMPLETIONS, BODY)).status == 200


def test_targets_come_and_go_while_it_serves(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    measured = []

    def measure(slices: Any, *_: Any) -> Any:
        measured.append([piece.last_position(n) for piece in slices for n in range(2)])
        return TIMES, False

    monkeypatch.setattr(steering, "measure_token_times", measure)
    threads = []

    async def test(made: Rig) -> None:
        set_threads = made.engine.set_threads
        monkeypatch.setattr(made.engine, "set_threads", lambda n: (threads.append(n), set_threads(n)))
        await answered(made)
        assert "threads" not in metrics(made)
        made.thread.hold(planned(latency_ms=60_000.0))
        await answered(made)
        assert metrics(made)["threads"] == 1  # the most saving one that is fast enough
        made.thread.hold(planned(latency_ms=0.001))
        await answered(made)
        assert metrics(made)["threads"] == 2
        made.thread.hold(None)
        await answered(made)
        assert "threads" not in metrics(made)

    serve(path, test)
    assert [n for n, _ in groupby(threads)] == [1, 2, 1]  # the end brings back what the configuration says
    assert measured == [[-1, -1]]  # once, with caches that had been emptied


def test_a_hot_board_is_rested(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(steering, "measure_token_times", lambda *_: (TIMES, False))

    async def test(made: Rig) -> None:
        made.sampler.latest = Reading(0.0, temp_c=90.0)
        made.thread.hold(planned(ceiling_c=70.0))
        await answered(made)
        told = metrics(made)
        assert (told["threads"], told["rest_share"]) == (1, 0.75)

    serve(path, test)


def test_a_targets_budget_closes_exits(
    path: Path, pack: ExitPack, exiting: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "measure_token_times", lambda *_: ({1: TokenTimes(20.0, 5.0, 4, 16.0)}, False))
    lossless = replace(exiting, max_disagreement=None)

    async def test(made: Rig) -> None:
        plan = plan_steering(SteeringRequest("balanced", device="pi5"), lossless)
        assert plan is not None
        made.thread.hold(plan)
        await answered(made)
        assert set(made.engine.stats.by_depth) == {N_LAYER}
        assert metrics(made)['exit_threshold{layer="4"}'] == 0

    serve(path, test, run=exiting, pack=pack)


# ── what a configuration asks for ───────────────────────────────────────────────────────────────────────────────────


def configured(tmp_path: Path, **given: Any) -> LoadedConfig:
    return load_config(
        Sources(given={name.replace("__", "."): value for name, value in given.items()}, folder=tmp_path)
    )


def targets(loaded: LoadedConfig, run: RunOptions) -> Plan | None:
    return plan_targets(loaded, run, None, loaded.config.device.profile)


def test_a_profiles_own_targets_are_held(tmp_path: Path) -> None:
    plan = targets(configured(tmp_path, device__profile="pi5"), RunOptions(mode=Mode.VERIFIED))
    assert plan is not None
    assert plan.targets.ceiling_c == load_profile("pi5").targets["balanced"].temp_ceiling_c
    assert plan.request.ceiling_c is None  # nobody but the profile asked for it
    assert targets(configured(tmp_path, device__profile="pi5", device__target="none"), RunOptions()) is None


def test_what_is_asked_for_is_held_or_refused(tmp_path: Path) -> None:
    loaded = configured(tmp_path, device__profile="pi5", device__power_cap_w=4.0)
    plan = targets(loaded, RunOptions(mode=Mode.VERIFIED))
    assert plan is not None
    assert plan.request.power_cap_w == plan.targets.power_cap_w == 4.0
    with pytest.raises(UsageError, match="mode margin"):
        targets(loaded, RunOptions(mode=Mode.MARGIN))
    assert targets(configured(tmp_path, device__profile="pi5"), RunOptions(mode=Mode.MARGIN)) is None


def test_a_target_that_nobody_chose_closes_no_exits(tmp_path: Path, exiting: RunOptions) -> None:
    asked = replace(exiting, max_disagreement=None)
    assert targets(configured(tmp_path, device__profile="pi5"), asked) is None
    chosen = targets(configured(tmp_path, device__profile="pi5", device__target="balanced"), asked)
    assert chosen is not None
    assert chosen.targets.budget == 0


def test_a_ceiling_that_no_sensor_can_speak_of_changes_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "measure_token_times", lambda *_: pytest.fail("there is nothing to choose"))

    async def test(made: Rig) -> None:
        plan = targets(configured(tmp_path, device__profile="pi5"), RunOptions(mode=Mode.VERIFIED))
        assert plan is not None
        made.thread.hold(plan)
        await answered(made)
        assert "threads" not in metrics(made)

    serve(path, test)


@pytest.mark.parametrize("key", ["power_cap_w", "temp_ceiling_c"])
def test_nothing_is_nothing_of_the_profile_either(tmp_path: Path, key: str) -> None:
    given = {"device__profile": "pi5", "device__target": "battery"}
    held, without = (
        targets(configured(tmp_path, **given, **more), RunOptions()) for more in ({}, {f"device__{key}": 0.0})
    )
    assert held is not None
    assert without is not None
    name = {"power_cap_w": "power_cap_w", "temp_ceiling_c": "ceiling_c"}[key]
    assert getattr(held.targets, name) is not None
    assert getattr(without.targets, name) is None


def test_a_cap_alone_leaves_certified_exits(tmp_path: Path, exiting: RunOptions) -> None:
    asked = replace(exiting, max_disagreement=None)
    plan = targets(configured(tmp_path, device__profile="pi5", device__power_cap_w=4.0), asked)
    assert plan is not None
    assert plan.targets.budget > 0


def test_a_pack_is_not_read_again(tmp_path: Path, pack: ExitPack, exiting: RunOptions) -> None:
    loaded = configured(tmp_path, device__profile="pi5", device__target="quiet")
    (tmp_path / "pack.gguf").unlink()
    plan = plan_targets(loaded, exiting, pack, "pi5")
    assert plan is not None
    assert plan.pack is pack


def test_targets_come_to_a_server_that_is_never_idle(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(steering, "measure_token_times", lambda *_: (TIMES, False))

    async def test(made: Rig) -> None:
        ended = False

        async def client() -> None:
            while not ended:
                await answered(made)

        clients = [asyncio.create_task(client()) for _ in range(2)]
        await answered(made)
        made.thread.hold(planned(latency_ms=60_000.0))
        while "threads" not in metrics(made):
            await answered(made)
        ended = True
        await asyncio.gather(*clients)

    serve(path, test, limits=replace(LIMITS, queue_length=4))


def test_what_cannot_be_held_is_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(steering, "measure_token_times", lambda *_: (TIMES, False))

    async def test(made: Rig) -> None:
        made.thread.hold(planned(power_cap_w=0.1))
        await answered(made)

    with caplog.at_level("WARNING", "edge_runtime.serving"):
        serve(path, test)
    assert any("0.1 W" in record.message for record in caplog.records)
