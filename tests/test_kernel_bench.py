"""The benchmark of kernels: taking turns, the arithmetic of its ratios, what it knows of a model's weights."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.bench.gguf_maker import tiny
from edge_runtime.bench.kernel_costs import (
    SIZES,
    KernelSettings,
    measure_kernels,
    random_model,
    requantised,
    summarise,
    weight_shares,
)
from edge_runtime.bench.stock import StockProcess, checked_library, library_variant
from edge_runtime.bench.turns import Countdown, in_turns, quartiles, ratios
from edge_runtime.errors import LibraryError

from .conftest import ROOT, TinyMaker


def quiet(_text: str) -> None:
    pass


# ── turns ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_quartiles_are_the_middle_and_the_quarters() -> None:
    found = quartiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high, found.n) == (2.0, 3.0, 4.0, 5)
    assert found.text(1) == "3.0 (2.0–4.0)"
    assert ratios([2.0, 9.0], [1.0, 3.0]).median == 2.5


def test_every_side_begins_in_its_turn_and_figures_alternate() -> None:
    calls: list[str] = []

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    sides = {name: (lambda name=name: side(name)) for name in ("a", "b")}
    figures: dict[str, Any] = {"first": sides, "second": {"c": lambda: side("c")}}
    done: list[int] = []
    found = in_turns(figures, 2, done=lambda: done.append(len(calls)))
    assert "".join(calls) == "bac" + "abc" + "bac"  # a warm-up, then two
    assert found == {"first": {"a": [4, 8], "b": [5, 7]}, "second": {"c": [6, 9]}}
    assert done == list(range(1, 10))


def test_without_a_warm_up_every_call_counts() -> None:
    assert in_turns({"x": {"a": lambda: 1}}, 3, warm_up=False) == {"x": {"a": [1, 1, 1]}}


def test_what_is_left_is_guessed_from_what_was_done() -> None:
    now, said = [0.0], []
    countdown = Countdown(5, said.append, every=2, clock=lambda: now[0])
    for _ in range(5):
        now[0] += 60.0
        countdown.step()
    assert said == ["2 of 5, 3 min left", "4 of 5, 60 s left", "5 of 5, 0 s left"]


# ── ratios ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_growth_is_by_side_and_speeds_are_the_inverse_of_times() -> None:
    found = {f"batch {k}": {"ours": [1.0 + 0.1 * k] * 3, "stock": [2.0 * k] * 3} for k in SIZES}
    found |= {name: {"ours": [2.0] * 3, "stock": [3.0] * 3} for name in ("single", "prefill", "load", "memory")}
    costs = summarise("avx2", {"q4_0": 1.0}, 1.0, found)
    assert costs.stock[8].median == 8.0
    assert costs.ours[8].median == pytest.approx(1.8 / 1.1)
    assert costs.batch[2].median == pytest.approx(1.2 / 4.0)
    assert costs.batch_ms["stock"][4] == 8000.0
    assert costs.single.median == costs.prefill.median == 1.5
    assert costs.load.median == costs.memory.median == pytest.approx(2 / 3)


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_are_what_is_multiplied(tiny_path: TinyMaker) -> None:
    assert weight_shares(tiny_path("llama", n_layer=1, weights="Q8_0")) == ({"q8_0": 1.0}, 1.0)
    shares, taken = weight_shares(tiny_path("llama", n_layer=1, weights="F32"))
    assert (list(shares), taken) == (["f32"], 0.0)


def test_a_random_model_is_made_once(tmp_path: Path) -> None:
    said: list[str] = []
    shape = tiny("llama", n_layer=1)
    paths = [random_model("Q8_0", tmp_path, said.append, shape) for _ in range(2)]
    assert paths[0] == paths[1] == tmp_path / "random-1b-q8_0.gguf"
    assert said == ["make random-1b-q8_0.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["random-1b-q8_0.gguf"]


def test_what_a_library_is_says_its_manifest(tmp_path: Path) -> None:
    assert library_variant(tmp_path) == "unknown"
    (tmp_path / "manifest.json").write_text('{"variant": "stock"}')
    assert library_variant(tmp_path) == "stock"


def test_a_library_is_looked_for_before_a_process_is_started(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(LibraryError, match=r"there is no llama\.cpp library in"):
        checked_library(tmp_path, said.append)
    (tmp_path / "libllama.so").touch()
    assert checked_library(tmp_path, said.append) == tmp_path
    assert len(said) == 1
    assert "variant 'unknown', not 'stock'" in said[0]
    (tmp_path / "manifest.json").write_text('{"variant": "stock"}')
    checked_library(tmp_path, said.append)
    assert len(said) == 1


@pytest.mark.stock
def test_all_figures_of_a_tiny_model(stock: StockProcess, stock_library: Path, tmp_path: Path) -> None:
    """From the random model to the last ratio: the loop that takes hours on large models works."""
    source = random_model("Q8_0", tmp_path, quiet, tiny("llama", n_layer=2))
    said: list[str] = []
    path = requantised(source, "Q4_0", tmp_path, stock, 1, said.append)
    assert requantised(source, "Q4_0", tmp_path, stock, 1, said.append) == path
    assert said == ["make random-1b-q8_0-as-q4_0.gguf"]
    costs = measure_kernels(path, stock, stock_library, KernelSettings(n_threads=1, repeats=1), quiet)
    assert "q4_0" in costs.weights
    assert set(costs.ours) == set(costs.stock) == set(SIZES)
    assert all(ratio.median > 0 for ratio in (costs.single, costs.prefill, costs.load, costs.memory))


# ── the script ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_targets_are_met_or_missed() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "bench_ck"))
    assert script["at_most"](1.1, 1.15) == "≤ 1.15: met"
    assert script["at_most"](1.2, 1.15) == "≤ 1.15: MISSED"
    assert script["at_least"](0.98, 0.98) == "≥ 0.98: met"
    assert script["at_least"](0.97, 0.98) == "≥ 0.98: MISSED"
    assert script["names"]("1b,smollm2") == ("1b", "smollm2")


LOOPS = """0000000000000000 <void (anonymous namespace)::multiply<(anonymous namespace)::Avx2, (anonymous namespace)::Q4_0, 2>(x)>:
   0:\tvpxor  %xmm0,%xmm0,%xmm0
   4:\tmov    $0x3f,%eax
   8:\tprefetcht0 (%rdi)
   b:\tjne    8 <multiply+0x8>
   d:\tvpdpbusd (%rsi),%ymm0,%ymm1
  11:\tvpdpbusd (%rsi),%ymm0,%ymm1
  15:\tcmp    %rax,%rdi
  18:\tjne    8 <multiply+0x8>
  1a:\tvmovups %ymm1,(%rdx)
  1c:\tjmp    0 <multiply+0x0>
"""  # noqa: E501


def test_the_loop_over_blocks_is_found_in_object_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts" / "bench_kernels"))
    # neither the prefetches alone nor the loop over rows
    assert script["block_loop"](LOOPS) == 6
    name = script["SYMBOL"].search(LOOPS.partition("\n")[0])
    assert name is not None
    assert name.groups() == ("Q4_0", "2")
    assert script["block_loop"]("0000 <none>:\n   0:\tret\n") == 0


def test_kernels_are_shown_against_what_memory_allows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts" / "bench_kernels"))

    def figure(what: str, kind: str, place: str, columns: int, seconds: float) -> dict[str, Any]:
        # 1e9 bytes of 4-bit weights with their scales, and 8 rows of 32 weights in a block
        return {"what": what, "type": kind, "place": place, "columns": columns, "bytes": 10**9,
                "products": 16 * 10**8 * columns, "seconds": [9.0, seconds, seconds]}  # fmt: skip

    found = [
        {"what": "clock", "gigahertz": 2.0},
        figure("read", "", "far", 0, 0.1),
        figure("read ahead", "", "far", 0, 0.05),
    ]
    found += [figure("avx2", "q4_0", place, k, 0.1 * k**0.5) for place in ("far", "near") for k in (1, 2, 3, 4)]
    script["show"]({"avx2": {"q4_0": {1: 50, 2: 75, 4: 128}}}, found)
    shown = capsys.readouterr().out
    assert "plain reading from memory: 20.0 GB/s" in shown
    assert "| q4_0 | 0.625 | 50, 75, 128 | 10.0 (0.50) | 1.41, 2.00 | 32 | 16 | 2.0 |" in shown
