"""Sliced = stock, bit for bit: every logit of the prefill and of 64 decoded tokens. No tolerance anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bench.stock import StockProcess
from edge_runtime.errors import LibraryError
from edge_runtime.native import ContextOptions, KvType, Model
from edge_runtime.slices import Slice, close_slices, open_slices

from ..conftest import TinyMaker
from .runs import greedy, spread, through

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
CACHES = [(True, KvType.F16), (False, KvType.F16), (True, KvType.Q8_0)]
N_DECODED = 64
N_PROMPT = 40

pytestmark = pytest.mark.stock


def assert_equal_to_stock(
    stock: StockProcess, path: Path, prompt: list[int], flash: bool, kv_type: KvType, n_threads: int = 1
) -> None:
    stock.open(path, n_ctx=512, n_batch=128, n_threads=n_threads, flash_attention=flash, kv_type=kv_type.ggml)
    prefill = stock.decode(prompt, range(len(prompt)))
    tokens, decoded = stock.greedy(prompt, N_DECODED)
    options = ContextOptions(n_ctx=512, n_batch=128, n_threads=n_threads, flash_attention=flash, kv_type=kv_type)
    with Model(str(path)) as model:
        for n_slices in (1, 2, 5):
            ours = greedy(model, spread(n_slices, model.n_layer), prompt, N_DECODED, options)
            assert np.array_equal(ours[0], prefill), f"{n_slices} slices: prefill"
            assert ours[1] == tokens, f"{n_slices} slices: tokens"
            assert np.array_equal(ours[2], decoded), f"{n_slices} slices: decoded"


@pytest.mark.parametrize(("flash", "kv_type"), CACHES)
@pytest.mark.parametrize("weights", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(
    stock: StockProcess, tiny_path: TinyMaker, architecture: str, weights: str, flash: bool, kv_type: KvType
) -> None:
    path = tiny_path(architecture, weights=weights, n_embd=128, n_ff=256)  # a q8_0 cache needs heads of 32
    prompt = [int(t) for t in np.random.default_rng(1).integers(3, 512, N_PROMPT)]
    assert_equal_to_stock(stock, path, prompt, flash, kv_type)


@pytest.mark.parametrize("flash", [True, False])
def test_stories(stock: StockProcess, stories_path: Path, flash: bool) -> None:
    with Model(str(stories_path)) as model:
        prompt = model.tokenize("Once upon a time, there was a little girl who", add_special=True, parse_special=False)
    assert_equal_to_stock(stock, stories_path, prompt, flash, KvType.F16)


def test_stories_cannot_have_a_q8_0_cache(stories_path: Path) -> None:
    """Its heads are 8 wide and a q8_0 block is 32: llama.cpp refuses, stock or patched."""
    with Model(str(stories_path)) as model, pytest.raises(LibraryError, match="does not divide"):
        open_slices(model, (2,), ContextOptions(n_ctx=256, flash_attention=True, kv_type=KvType.Q8_0))


@pytest.mark.model
@pytest.mark.parametrize(("flash", "kv_type"), CACHES)
def test_smollm2(stock: StockProcess, demo_path: Path, demo_model: Model, flash: bool, kv_type: KvType) -> None:
    text = "<|im_start|>user\nName three rivers of France.<|im_end|>\n<|im_start|>assistant\n"
    prompt = demo_model.tokenize(text, add_special=True, parse_special=True)
    assert_equal_to_stock(stock, demo_path, prompt, flash, kv_type, n_threads=2)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("n_slices", [1, 2, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_sequences_in_one_batch(
    stock: StockProcess, tiny_path: TinyMaker, architecture: str, n_slices: int, flash: bool
) -> None:
    path = tiny_path(architecture)
    random = np.random.default_rng(2)
    # sequences of different length, interleaved, then one more token of each
    seq_ids = [0, 1, 0, 1, 0, 0, 1, 0]
    positions = [0, 0, 1, 1, 2, 3, 2, 4]
    tokens = [int(t) for t in random.integers(3, 512, len(seq_ids))]
    batches = [(tokens, positions, seq_ids), (tokens[:2], [5, 3], [0, 1]), (tokens[2:3], [4], [1])]
    stock.open(path, n_ctx=512, n_seq_max=2, n_threads=1, flash_attention=flash)
    options = ContextOptions(n_ctx=512, n_seq_max=2, n_threads=1, flash_attention=flash)
    with Model(str(path)) as model:
        slices = open_slices(model, spread(n_slices, model.n_layer), options, n_outputs_max=8)
        for ids, at, sequences in batches:
            rows = range(len(ids))
            expected = stock.decode(ids, rows, positions=at, seq_ids=sequences)
            ours = through(slices, ids, 0, rows, positions=at, seq_ids=sequences)
            assert np.array_equal(ours, expected)
        close_slices(slices)


# ── what a slice offers besides ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path(request.param))) as model:
        yield model


OPTIONS = ContextOptions(n_ctx=256, n_batch=64, n_threads=1)
PROMPT = list(range(10, 40))


def test_hidden_states_do_not_depend_on_the_head(model: Model) -> None:
    """Asking for logits at a boundary changes neither the states nor what later slices make of them."""
    with_head, without = (Slice(model, 0, 3, OPTIONS) for _ in range(2))
    with_head.decode_tokens(PROMPT, 0, [len(PROMPT) - 1])
    without.decode_tokens(PROMPT, 0)
    assert np.array_equal(with_head.hidden(len(PROMPT)), without.hidden(len(PROMPT)))
    assert with_head.hidden(len(PROMPT)).shape == (len(PROMPT), model.n_embd)
    close_slices([with_head, without])


def test_the_head_at_the_last_boundary_is_the_models_own(model: Model) -> None:
    """The states of the last layer, asked of the last slice, are what its logits are made of."""
    plain, hidden = (Slice(model, 0, model.n_layer, OPTIONS, n_outputs_max=4, want_hidden=h) for h in (False, True))
    for piece in (plain, hidden):
        piece.decode_tokens(PROMPT, 0, [3, 9, 29])
    for row in (3, 9, 29):
        assert np.array_equal(plain.logits(row), hidden.logits(row))
    states = hidden.hidden(3)
    assert states.shape == (3, model.n_embd)
    assert len({row.tobytes() for row in states}) == 3
    close_slices([plain, hidden])


def test_rolled_back_positions_leave_no_trace(model: Model) -> None:
    touched, fresh = (open_slices(model, (2, 5), OPTIONS) for _ in range(2))
    through(touched, PROMPT, 0, [])
    through(touched, [7, 7, 7, 7], len(PROMPT), [0])
    for piece in touched:
        piece.remove(len(PROMPT))
        assert piece.last_position() == len(PROMPT) - 1
    through(fresh, PROMPT, 0, [])
    for _ in range(2):
        assert np.array_equal(through(touched, [5], len(PROMPT), [0]), through(fresh, [5], len(PROMPT), [0]))
        for piece in (*touched, *fresh):
            piece.remove(len(PROMPT))
    close_slices([*touched, *fresh])


def test_a_saved_state_goes_on_as_if_nothing_happened(model: Model) -> None:
    before, after = (open_slices(model, (2, 5), OPTIONS) for _ in range(2))
    through(before, PROMPT, 0, [])
    for a, b in zip(before, after, strict=True):
        b.load_state(a.save_state())
    assert np.array_equal(through(before, [5], len(PROMPT), [0]), through(after, [5], len(PROMPT), [0]))
    close_slices([*before, *after])
