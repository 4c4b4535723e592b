"""The models made to test and measure with, the other side of comparisons, and the arithmetic between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from edge_runtime.bench.gguf_maker import ModelShape, tiny, truncate_model, write_random_model
from edge_runtime.bench.measure import interleave, spread
from edge_runtime.bench.stock import StockProcess
from edge_runtime.errors import LibraryError
from edge_runtime.native import ContextOptions, Model, read_header
from edge_runtime.slices import Slice

from .conftest import TinyMaker

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
OPTIONS = ContextOptions(n_ctx=256, n_batch=16, n_threads=1)
PROMPT = [5, 6, 7, 8, 9]

# ── random models ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", ["F32", "F16", "Q8_0", "Q4_0"])
def test_equal_seeds_make_equal_files(tmp_path: Path, weights: str) -> None:
    shape = tiny("llama", n_layer=1, weights=weights, tokenizer=True)
    files = [write_random_model(tmp_path / f"{i}.gguf", shape, seed).read_bytes() for i, seed in enumerate((3, 3, 4))]
    assert files[0] == files[1] != files[2]
    assert len(files[0]) == len(files[2])


@pytest.mark.parametrize("weights", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_model_says_something_finite(tiny_path: TinyMaker, architecture: str, weights: str) -> None:
    with Model(str(tiny_path(architecture, n_layer=2, weights=weights))) as model:
        piece = Slice(model, 0, 2, OPTIONS, n_outputs_max=5)
        piece.decode_tokens(PROMPT, 0, range(5))
        rows = np.array([piece.logits(row) for row in range(5)])
    assert np.isfinite(rows).all()
    assert rows.std() > 0.1
    assert len({row.tobytes() for row in rows}) == 5


def test_a_vocabulary_of_bytes_needs_room() -> None:
    with pytest.raises(ValueError, match="needs 261 tokens, not 260"):
        write_random_model("unused.gguf", ModelShape(n_vocab=260, tokenizer=True))
    assert not Path("unused.gguf").exists()


# ── models cut short ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_layer", [1, 3, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_truncated_model_is_the_originals_first_layers(
    tiny_path: TinyMaker, tmp_path: Path, architecture: str, n_layer: int
) -> None:
    """Its last layer's states, and its output head on them, are those of a slice of the original; bit for bit."""
    original = tiny_path(architecture)
    cut = truncate_model(original, tmp_path / "cut.gguf", n_layer)
    found = []
    for path in (original, cut):
        with Model(str(path)) as model:
            piece = Slice(model, 0, n_layer, OPTIONS, n_outputs_max=5, want_hidden=True)
            # all rows, because the last slice gives the states of wanted ones only
            piece.decode_tokens(PROMPT, 0, range(5))
            found.append((piece.hidden(5).copy(), np.array([piece.logits(row) for row in range(5)])))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_a_truncated_model_keeps_everything_else(tiny_path: TinyMaker, tmp_path: Path) -> None:
    original = tiny_path("llama", tokenizer=True, weights="Q4_0")
    before, after = GGUFReader(original), GGUFReader(truncate_model(original, tmp_path / "cut.gguf", 2))
    kept = {
        t.name: t for t in before.tensors if not t.name.startswith("blk.") or t.name.startswith(("blk.0.", "blk.1."))
    }
    assert {t.name for t in after.tensors} == set(kept)
    for tensor in after.tensors:
        assert tensor.tensor_type == kept[tensor.name].tensor_type
        assert np.array_equal(tensor.data, kept[tensor.name].data)
    for name, item in before.fields.items():
        if not name.startswith("GGUF."):
            expected = 2 if name == "llama.block_count" else item.contents()
            assert after.fields[name].contents() == expected
            assert after.fields[name].types == item.types
    assert read_header(str(tmp_path / "cut.gguf")).n_layer == 2


# ── the stock side ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.stock
def test_what_stock_cannot_do_is_an_error_here(
    stock_library: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with StockProcess(stock_library) as process, pytest.raises(LibraryError, match="ended during 'open'"):
        process.open(tmp_path / "none.gguf")
    assert "stock llama.cpp cannot load" in capfd.readouterr().err


@pytest.mark.stock
def test_a_request_that_stock_does_not_know(stock_library: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with StockProcess(stock_library) as process, pytest.raises(LibraryError, match="ended during 'dance'"):
        process.call("dance")
    assert "dance" in capfd.readouterr().err


def test_without_a_stock_library_the_first_request_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with StockProcess(tmp_path) as process, pytest.raises(LibraryError, match=r"ended during 'memory' \(exit status 1"):
        process.call("memory")
    capfd.readouterr()


@pytest.mark.stock
def test_the_stock_side_has_none_of_our_patches(stock: StockProcess, tiny_path: TinyMaker) -> None:
    stock.open(tiny_path("llama", n_layer=2), n_ctx=256)
    logits = stock.decode(PROMPT, [0, 4])
    assert logits.shape == (2, 512)
    tokens, rows = stock.greedy(PROMPT, 4)
    assert tokens == rows.argmax(axis=1).tolist()
    assert tokens[0] == int(logits[1].argmax())
    assert stock.call("memory")["peak_bytes"] > 1_000_000


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_spread_is_the_middle_and_the_ends() -> None:
    found = spread([3.0, 1.0, 2.0, 10.0])
    assert (found.median, found.low, found.high, found.n) == (2.5, 1.0, 10.0, 4)
    assert found.text(1) == "2.5 (1.0–10.0, n=4)"


def test_sides_take_turns_and_are_compared_pair_by_pair() -> None:
    calls: list[str] = []

    def side(name: str, value: float) -> float:
        calls.append(name)
        return value * len(calls)

    found = interleave(lambda: side("ours", 2.0), lambda: side("theirs", 1.0), 3)
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]  # a warm-up, then three
    # 6/4, 12/5, 14/8
    assert (found.ratio.low, found.ratio.median, found.ratio.high) == (1.5, 1.75, 2.4)
    assert (found.ours.median, found.theirs.median, found.ratio.n) == (12.0, 5.0, 3)


def test_a_model_cut_in_its_vocabulary_too_is_layers_alone(tiny_path: TinyMaker, tmp_path: Path) -> None:
    """The states after its last layer are those of the whole model, for the tokens that it still has."""
    source = tiny_path("llama", tokenizer=True)
    cut = truncate_model(source, tmp_path / "cut.gguf", 3, n_vocab=64)
    options = ContextOptions(n_ctx=256, n_threads=1)
    with Model(str(source)) as whole, Model(str(cut)) as short:
        assert (short.n_layer, short.n_vocab, short.has_tokenizer) == (3, 64, False)
        ours, theirs = Slice(whole, 0, 3, options), Slice(short, 0, 3, options, n_outputs_max=4, want_hidden=True)
        ours.decode_tokens([5, 9, 63, 7], 0)
        theirs.decode_tokens([5, 9, 63, 7], 0, range(4))
        assert np.array_equal(ours.hidden(4), theirs.hidden(4))
