"""The benchmark of batching: what it compares, that its sides give the same texts, what its script refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.bench.batch_exits import measure_exits
from edge_runtime.bench.batch_speed import BatchRig, measure_further_turn, measure_together
from edge_runtime.exits.thresholds import Rung
from edge_runtime.native import available_kernels

from .conftest import ROOT, TinyMaker
from .exit_fakes import random_pack

TEXTS = ["one two one two one", "abc abc abc abc", "x"]


def quiet(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def tiny_model(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", n_layer=2, weights="Q8_0", tokenizer=True)


@pytest.fixture(scope="module")
def rig(tiny_model: Path) -> Iterator[BatchRig]:
    with BatchRig(str(tiny_model), 3, n_ctx=256, n_threads=1) as made:
        yield made


@pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor")
@pytest.mark.parametrize("drafts", [False, True])
def test_both_sides_give_the_same_texts(rig: BatchRig, drafts: bool) -> None:
    found = measure_together(rig, TEXTS, max_tokens=12, repeats=2, drafts=drafts, say=quiet)
    assert (found.unlike, found.n_tokens, found.ratio.n) == (0, 36, 2)
    assert found.together.median > 0 < found.in_turn.median
    assert drafts or found.drafted == 0


@pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor")
def test_a_further_turn_with_the_cache_and_without(rig: BatchRig) -> None:
    prompt, further = rig.chat("a longer text to begin with"), rig.chat("go on")
    kept = rig.first_token(prompt, further, 5, True)
    anew = rig.first_token(prompt, further, 5, False)
    assert kept.tokens == anew.tokens
    assert (kept.reused_tokens, anew.reused_tokens) == (len(prompt) + 4, 0)
    assert kept.prompt_tokens == len(prompt) + 5 + len(further)
    found = measure_further_turn(rig, "a longer text to begin with", n_answer=5, repeats=1, say=quiet)
    assert found.unlike == 0
    assert 0 < found.reused_tokens < found.prompt_tokens
    assert found.ratio.median > 0


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench_batching"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_the_script_refuses() -> None:
    for name in ("--conversations", "--repeats", "--max-tokens"):
        done = script(name, "0")
        assert done.returncode == 1
        assert f"error: {name} 0 is out of range" in done.stderr
        assert "Traceback" not in done.stderr
    assert "error: " in script("--model", "/no/such.gguf").stderr


def test_the_script_prints_one_object(tiny_path: TinyMaker) -> None:
    model = tiny_path("llama", n_layer=1, n_embd=32, n_head=2, n_ff=32, weights="Q8_0", tokenizer=True)
    sizes = ["--conversations", "2", "--max-tokens", "4", "--repeats", "1", "--threads", "1", "--ctx", "4096"]
    done = script("--model", str(model), *sizes, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["conversations"] == 2
    assert [len(found["together"]), found["together"][0]["n_tokens"]] == [1, 8]
    assert found["further_turn"]["reused_tokens"] > 0


def test_exits_beside_full_depth(tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    model, pack = tiny_path("llama", tokenizer=True), str(tmp_path / "pack.gguf")
    held = {"kind": "x", "bound": 0.1, "n": 40, "risk": 0.01, "holds": True}
    random_pack(model, (2, 4), rungs=(Rung("entropy", "exits", 0.1, 0.05, (4.0, 4.0), held, 0.5),)).save(Path(pack))
    with BatchRig(str(model), 3, n_ctx=256, n_threads=1) as rig:
        found = measure_exits(rig, pack, 0.1, TEXTS, max_tokens=12, repeats=1, say=quiet)
    assert found.n_tokens == 2 * 36  # with the warm-up
    assert 0 < found.exits < found.n_tokens
    assert found.disagreed <= found.audited <= found.exits
    assert found.ratio.median > 0
    done = script("--model", str(model), "--pack", str(tmp_path / "none.gguf"))
    assert done.returncode == 1
    assert "error: " in done.stderr
