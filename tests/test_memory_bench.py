"""The benchmark of memory: what it reads and compares, what its script refuses, and that there is one KV cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.bench import memory_costs
from edge_runtime.bench.memory_costs import (
    N_ANSWER,
    Footprint,
    Memory,
    Side,
    growth,
    measure_memory,
    process_memory,
    sides_of,
)
from edge_runtime.errors import EdgeError, LibraryError
from edge_runtime.native import available_kernels

from .conftest import ROOT, TinyMaker

ROLLUP = """5643ffaa2000-7fff4d78f000 ---p 00000000 00:00 0                          [rollup]
Rss:                1756 kB
Pss:                 280 kB
Pss_Anon:            116 kB
"""


def quiet(_text: str) -> None:
    pass


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_comes_from_the_kernels_sum(tmp_path: Path) -> None:
    rollup = tmp_path / "smaps_rollup"
    rollup.write_text(ROLLUP)
    assert process_memory(rollup) == Memory(1756 * 1024, 280 * 1024)
    rollup.write_text(ROLLUP.replace("Pss:", "Other:"))
    assert process_memory(rollup) == Memory(1756 * 1024, None)


def test_a_system_without_that_file_tells_the_resident_size(tmp_path: Path) -> None:
    found = process_memory(tmp_path / "none")
    assert found.rss > 2**20
    assert found.pss is None


def test_what_is_allocated_is_seen() -> None:
    before = process_memory().rss
    block = bytearray(64 * 2**20)
    block[:: 4096 // 2] = b"x" * len(block[:: 4096 // 2])
    assert process_memory().rss - before > 32 * 2**20


# ── the sides ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_llama_comes_first_and_only_mode_exit_takes_the_pack() -> None:
    sides = sides_of(("full", "exit"), "a pack")
    assert [(side.edge, side.arguments) for side in sides] == [
        (False, {}),
        (False, {"flash_attn": True}),
        (True, {"mode": "full"}),
        (True, {"mode": "exit", "pack": "a pack"}),
    ]


def test_growth_is_between_the_smallest_and_the_largest_context() -> None:
    def footprint(side: str, n_ctx: int, filled: int) -> Footprint:
        return Footprint(side, n_ctx, Memory(1, None), Memory(2, None), Memory(filled, None))

    found = [footprint("a", 512, 60), footprint("b", 128, 20), footprint("a", 128, 10), footprint("a", 256, 90)]
    assert growth(found) == {"a": 50, "b": 0}


class FakeLlama:
    """Stands for `Llama`: any number of tokens, counted."""

    def __init__(self, model: str, **arguments: Any) -> None:
        if model == "bad":
            raise ValueError("Model path does not exist: bad")
        self.arguments = arguments
        self.prompt: list[int] = []
        self.n_tokens = 0

    def n_vocab(self) -> int:
        return 7

    def generate(self, prompt: list[int], temp: float) -> Iterator[int]:
        self.prompt, self.n_tokens = prompt, len(prompt)
        while self.n_tokens < self.arguments["n_ctx"]:
            self.n_tokens += 1
            yield 0
        raise RuntimeError("llama_decode returned 1")


def test_the_process_fills_the_context_and_no_more() -> None:
    worker = memory_costs._Worker()
    worker.kind = FakeLlama
    loaded = worker.load("good", 256, 3, {"mode": "full"})
    assert loaded["rss"] > 0
    assert worker.llama.arguments == {
        "n_ctx": 256,
        "n_threads": 3,
        "n_threads_batch": 3,
        "verbose": False,
        "mode": "full",
    }
    assert worker.fill(256)["rss"] > 0
    assert (len(worker.llama.prompt), worker.llama.n_tokens) == (256 - N_ANSWER, 256)
    assert max(worker.llama.prompt) == 6


def test_what_llama_refuses_is_told() -> None:
    worker = memory_costs._Worker()
    worker.kind = FakeLlama
    assert worker.load("bad", 256, 1, {}) == {"error": "Model path does not exist: bad"}
    worker.load("good", 256, 1, {})
    assert worker.fill(256 + N_ANSWER + 1) == {"error": "llama_decode returned 1"}


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_error_of_a_side_names_it(tiny_path: TinyMaker, tmp_path: Path) -> None:
    side = Side("ours", edge=True, arguments={"mode": "verify"})
    with pytest.raises(EdgeError, match=r"^ours with 256 tokens: there is no mode 'verify'"):
        measure_memory(tiny_path("llama"), [side], [256], tmp_path, 1, quiet)


def test_a_process_that_ends_is_named(tiny_path: TinyMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LibraryError, match="the process of Llama with 256 tokens ended"):
        measure_memory(tiny_path("llama"), [Side("Llama", edge=False)], [256], tmp_path / "none", 1, quiet)
    assert "llama" in capfd.readouterr().err


def test_our_side_on_a_model_of_random_weights(
    tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    said: list[str] = []
    model = tiny_path("llama", n_layer=2, weights="Q8_0", tokenizer=True)
    sides = [side for side in sides_of(("full", "auto"), "") if side.edge]
    found = measure_memory(model, sides, [128, 256], tmp_path, 1, said.append)
    assert [(f.side, f.n_ctx) for f in found] == [(side.name, n) for n in (128, 256) for side in sides]
    assert all(0 < f.imported.rss < f.loaded.rss for f in found)
    names = [side.name for side in sides]
    assert said[:2] == [f"{name}, 128 tokens: load" for name in names]  # once, for what is kept
    assert said[2:4] == [f"{names[0]}, 128 tokens: load", f"{names[0]}, 128 tokens: fill the context"]


# ── the script ──────────────────────────────────────────────────────────────────────────────────────────────────────


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--modes", "verify"], "mode 'verify' is not among those measured"),
        (["--contexts", "8", "1024"], "--contexts 8 is too small"),
        (["--threads", "-1"], "--threads -1 is out of range"),
        (["--model", "/no/such.gguf"], "/no/such.gguf"),
        (["--pack", "none-such"], "none-such"),
        (["--modes", "full", "--contexts", "100000000"], "the model needs"),
        (["--modes", "full", "--stock-library", "/no/such"], "there is no llama.cpp library in /no/such"),
    ],
)
def test_what_the_script_refuses(arguments: list[str], error: str, tiny_path: TinyMaker) -> None:
    done = script("--model", str(tiny_path("llama")), *arguments)
    assert done.returncode == 1
    assert error in done.stderr.partition("error: ")[2]
    assert "Traceback" not in done.stderr


@pytest.mark.stock
def test_the_script_prints_a_table_or_one_object(
    tiny_path: TinyMaker, stock_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    model = str(tiny_path("llama", n_layer=2, weights="Q8_0", tokenizer=True, n_ctx_train=192))
    arguments = ["--model", model, "--modes", "full", "--threads", "1", "--stock-library", str(stock_library)]
    done = script(*arguments, "--contexts", "256", "128", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [r["n_ctx"] for r in found["results"]] == [128] * 3 + [256] * 3
    assert set(found["growth_bytes"]) == {"Llama", "Llama, flash_attn", "EdgeLlama, full"}
    assert "more than the 192" in found["notes"][0]
    done = script(*arguments, "--contexts", "128")
    assert done.returncode == 0, done.stderr
    assert "| EdgeLlama, full | 128 | " in done.stdout
    assert "KV cache" not in done.stdout


@pytest.mark.model
@pytest.mark.skipif(not available_kernels(), reason="without edge kernels, buffers of attention grow as well")
def test_there_is_one_kv_cache(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of mode auto, which on a busy machine measures batches at some loads; heads have caches of one layer."""
    from edge_runtime.memory import estimate_need
    from edge_runtime.native import ContextOptions, read_header

    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    header = read_header(str(demo_path))
    small, large = (estimate_need(header, ContextOptions(n_ctx=n), 1, 0).kv_cache for n in (1024, 2048))
    sides = [side for side in sides_of(("full", "exit"), "smollm2-135m") if side.edge]
    found = measure_memory(demo_path, sides, [1024, 2048], tmp_path, 1, quiet)
    caches = {side: grown / (large - small) for side, grown in growth(found).items()}
    assert len(caches) == 2
    assert {side: n for side, n in caches.items() if not 0.7 < n < 1.5} == {}
