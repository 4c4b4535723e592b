"""A run with a semantic entropy probe: it decides per prompt whether tokens may exit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import opening, playing
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.display import footer
from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.costs import Costs
from edge_runtime.exits.pack import this_library
from edge_runtime.exits.probe_file import ProbeFile
from edge_runtime.exits.thresholds import Rung
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.identity import identify
from edge_runtime.semantic.probe import Probe
from edge_runtime.types import Mode

from .cli_helpers import RunCli, runner
from .conftest import TinyMaker
from .exit_fakes import random_pack

HELD = {"kind": "x", "bound": 0.1, "n": 40, "risk": 0.01, "holds": True}
RUNG = Rung("entropy", "exits", 0.1, 0.05, (4.0, 4.0), HELD, 0.5)
PROMPTS = ("Once upon a time", "the the the", "a b c")
N = 24


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture
def options(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    random_pack(model_path, (2, 4), rungs=(RUNG,)).save(tmp_path / "pack.gguf")
    pack = str(tmp_path / "pack.gguf")
    return RunOptions(str(model_path), Mode.EXIT, n_ctx=256, n_threads=1, pack=pack, max_disagreement=0.1)


Maker = Callable[..., str]


@pytest.fixture
def probe(model_path: Path, tmp_path: Path) -> Maker:
    """Makes the file of a probe with these log-odds for every prompt."""

    def make(log_odds: float, layer: int = 4, **of_model: object) -> str:
        model = dataclasses.replace(identify(model_path), **of_model)  # type: ignore[arg-type]
        zeros, ones = np.zeros(model.n_embd, np.float32), np.ones(model.n_embd, np.float32)
        made = Probe(layer, zeros, log_odds, zeros, ones, 1.0, 1.0, n_prompts=30, n_high=9, loss=0.5, auroc=0.7)
        path = tmp_path / "some.probe.json"
        ProbeFile("some", model, this_library(), layer, (made,), {}).save(path)
        return str(path)

    return make


def steps(options: RunOptions) -> list[list[tuple[int, int]]]:
    with Runtime(options) as runtime:
        return [[(c.step.token, c.step.depth) for c in runtime.stream(runtime.text_tokens(p), N)] for p in PROMPTS]


def test_prompts_that_are_sure_exit_as_without_and_uncertain_ones_never(options: RunOptions, probe: Maker) -> None:
    sure = steps(dataclasses.replace(options, probe=probe(-5.0)))
    uncertain = steps(dataclasses.replace(options, probe=probe(5.0)))
    full = steps(dataclasses.replace(options, mode=Mode.FULL, pack=None, max_disagreement=None))
    assert uncertain == full
    assert sure != full
    assert sure == steps(options)
    assert steps(dataclasses.replace(options, probe=probe(5.0), probe_limit=1.0)) == sure


def test_what_the_probe_said_is_told(options: RunOptions, probe: Maker) -> None:
    with Runtime(dataclasses.replace(options, probe=probe(0.0))) as runtime:
        assert runtime.summary.prompt_uncertainty is None
        list(runtime.stream(runtime.text_tokens(PROMPTS[0]), 4))
        assert runtime.summary.prompt_uncertainty == 0.5
        assert any("probability of 0.50" in line for line in footer(runtime.summary, seeded=False))
    with Runtime(options) as runtime:
        list(runtime.stream(runtime.text_tokens(PROMPTS[0]), 4))
        assert runtime.summary.prompt_uncertainty is None


def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(
    options: RunOptions, probe: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = dataclasses.replace(options, probe=probe(0.0, layer=3))
    with pytest.raises(UsageError, match="reads states behind layer"):
        Runtime(elsewhere)
    monkeypatch.setattr("edge_runtime.generate.Model", None)
    foreign = dataclasses.replace(options, probe=probe(0.0, sha256="f" * 64))
    with pytest.raises(PackError, match="the probe 'some' is for"):
        Runtime(foreign)
    with pytest.raises(UsageError, match="there are none"):
        Runtime(dataclasses.replace(options, mode=Mode.VERIFIED, max_disagreement=None, probe=probe(0.0)))
    with pytest.raises(UsageError, match="no limit"):
        Runtime(dataclasses.replace(options, probe=probe(0.0), probe_limit=2.0))


def test_in_mode_auto_it_matters_to_exits_only(
    options: RunOptions, probe: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playing, "kept_part_costs", lambda *_: pytest.fail("not reached"))
    auto = dataclasses.replace(options, mode=Mode.AUTO, probe=probe(0.0, layer=3))
    with pytest.raises(UsageError, match="reads states behind layer"):
        Runtime(auto)


def test_what_the_probe_said_outlasts_a_change_of_policy(
    options: RunOptions, probe: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs((2, 4), ((1.0, 1.2),) * 3, (1.0, 1.2), ((0.1, 0.1),) * 2, (3.0, 3.3))
    monkeypatch.setattr(
        opening, "measure_batch_costs", lambda *_: BatchCosts((1, 16), (1.0, 1.3), 1e-3, invariant=True)
    )
    monkeypatch.setattr(playing, "kept_part_costs", lambda *_: costs)
    monkeypatch.setattr(playing, "predicted_time", lambda _pack, mode, *_, **__: 0.5 if mode is Mode.EXIT else 2.0)
    count = playing.Player._count
    slow = 1e-2  # ten times what a token should take
    monkeypatch.setattr(
        playing.Player, "_count", lambda self, done: count(self, dataclasses.replace(done, seconds=slow * done.tokens))
    )
    with Runtime(dataclasses.replace(options, mode=Mode.AUTO, probe=probe(-1.0))) as runtime:
        list(runtime.stream(runtime.text_tokens(PROMPTS[0]), 60))
        assert runtime.summary.left is not None
        assert runtime.summary.prompt_uncertainty == pytest.approx(0.269, abs=1e-3)
        list(runtime.stream(runtime.text_tokens(PROMPTS[1]), 4))
        assert runtime.summary.prompt_uncertainty is None or runtime.options.mode is Mode.EXIT


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


def test_the_command_line(run: RunCli, options: RunOptions, probe: Maker, tmp_path: Path) -> None:
    base = ("generate", "--model", options.model, "--pack", options.pack, "--mode", "exit", "--raw", "-n", 8)
    base += ("--max-disagreement", "0.1", "--threads", 1, "--json", "Once upon")
    found = run(*base, "--probe", probe(-5.0))
    assert found.code == 0, found.err
    assert json.loads(found.out.splitlines()[-1])["summary"]["prompt_uncertainty"] < 0.01
    for wrong, words in (
        (("--probe", tmp_path / "none.json"), "cannot be read"),
        (("--probe-limit", "0.5"), "--probe-limit means nothing without --probe"),
        (("--probe", probe(0.0), "--probe-limit", "7"), "no limit"),
    ):
        refused = run(*base, *wrong)
        assert refused.code in (1, 2)
        assert words in refused.err
        assert "hint: " in refused.err
        assert refused.out == ""
    (tmp_path / "broken.json").write_text("{")
    assert "probe" in run(*base, "--probe", tmp_path / "broken.json").err
