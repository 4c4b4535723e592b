"""Heads as GGUF files, and the trunk's layers they start from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ModelUnreadableError, UsageError
from edge_runtime.exits.head import (
    HeadContext,
    HeadShape,
    HeadWeights,
    final_norm,
    lens_shape,
    output_rows,
    usual_shape,
    write_head,
)
from edge_runtime.exits.ridge import lens_head, rms_norm
from edge_runtime.exits.trunk_block import fresh_block, start_head, trunk_block
from edge_runtime.native import ContextOptions, Model
from edge_runtime.slices import Slice

from .conftest import TinyMaker


def _random_head(shape: HeadShape, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {n: random.standard_normal(s).astype(np.float32) / 8 for n, s in shape.matrices.items()}
    return tensors | {n: random.uniform(0.5, 1.5, shape.n_embd).astype(np.float32) for n in shape.norms}


def test_lens_head_is_a_matrix_product(tmp_path: Path) -> None:
    """A block of zeros leaves the normed state, whatever the context."""
    random = np.random.default_rng(0)
    projection = random.standard_normal((64, 64)).astype(np.float32) / 8
    head = lens_head(3, projection, np.zeros(64, np.float32), 41)
    rows = random.standard_normal((40, 64)).astype(np.float32)
    write_head(tmp_path / "h.gguf", head.shape, head.tensors, head.table(rows), "F16")
    context = HeadContext(tmp_path / "h.gguf", n_ctx=32, n_threads=1)
    states = 5 * random.standard_normal((9, 64)).astype(np.float32)
    for i in range(9):
        context.decode(states[i : i + 1], i, (0,))
        expected = rms_norm(states[i : i + 1])[0] @ head.table(rows).T
        assert np.abs(context.logits(0) - expected).max() < 1e-2 * np.abs(expected).max()
    context.close()


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q8_0", "F16"])
def test_forgotten_positions_leave_no_trace(tmp_path: Path, quantisation: str) -> None:
    shape = usual_shape(64, 33)
    random = np.random.default_rng(1)
    table = random.standard_normal((33, 64)).astype(np.float32)
    write_head(tmp_path / "h.gguf", shape, _random_head(shape), table, quantisation)
    context = HeadContext(tmp_path / "h.gguf", n_ctx=256, n_threads=1)
    states = random.standard_normal((12, 64)).astype(np.float32)

    def said(order: list[tuple[int, int]]) -> np.ndarray:
        for row, position in order:
            context.forget(position)
            context.decode(states[row : row + 1], position, (0,))
        return context.logits(0).copy()

    straight = said([(i, i) for i in range(6)])
    context.forget(0)
    detour = said([(0, 0), (1, 1), (9, 2), (10, 3), (2, 2), (3, 3), (4, 4), (11, 5), (5, 5)])
    assert np.array_equal(straight, detour)
    assert not np.array_equal(straight, said([(11, 5)]))
    context.close()


def test_a_clone_of_the_next_layer_gives_its_states(tiny_path: TinyMaker, tmp_path: Path) -> None:
    """The block that starts a head computes, in llama.cpp, what the trunk's own layer does."""
    path = tiny_path("llama", weights="F16")
    found = trunk_block(path, 3, 65)
    assert found is not None
    shape, tensors = found
    # a table that hands out the normed state itself
    ones = np.ones(shape.n_embd, np.float32)
    table = np.concatenate([np.eye(shape.n_embd, dtype=np.float32), np.zeros((1, shape.n_embd), np.float32)])
    write_head(tmp_path / "h.gguf", shape, tensors | {"output_norm.weight": ones}, table, "F16")
    states = np.random.default_rng(2).standard_normal((10, shape.n_embd)).astype(np.float32)
    with Model(str(path)) as model:
        layer = Slice(model, 3, 4, ContextOptions(n_ctx=64, n_threads=1))
        head = HeadContext(tmp_path / "h.gguf", n_ctx=64, n_threads=1)
        for i in range(10):
            layer.decode_states(states[i : i + 1], i)
            head.decode(states[i : i + 1], i, (0,))
            expected = rms_norm(layer.hidden(1))[0]
            assert np.abs(head.logits(0)[:-1] - expected).max() < 5e-3
        head.close()
        layer.close()


def test_heads_start_from_noise_where_the_trunk_is_no_llama(tiny_path: TinyMaker) -> None:
    assert trunk_block(tiny_path("gemma2"), 2, 10) is None
    assert trunk_block(tiny_path("llama"), 99, 10) is None
    ridge = lens_head(2, np.eye(64, dtype=np.float32), np.zeros(64, np.float32), 10)
    started = start_head(tiny_path("gemma2"), ridge, seed=0)
    assert started.shape == usual_shape(64, 10)
    assert not started.tensors["blk.0.ffn_down.weight"].any()
    assert started.tensors["blk.0.ffn_up.weight"].any()
    cloned = start_head(tiny_path("llama"), ridge, seed=0)
    assert cloned.tensors["blk.0.ffn_down.weight"].any()


def test_output_rows_are_the_models(tiny_path: TinyMaker) -> None:
    """Rows times the final normed state are the model's logits."""
    path = tiny_path("llama", weights="Q8_0")
    ids = np.asarray([3, 500, 17], np.int32)
    rows = output_rows(path, ids)
    with Model(str(path)) as model:
        whole = Slice(model, 0, model.n_layer, ContextOptions(n_ctx=32, n_threads=1), n_outputs_max=1, want_hidden=True)
        whole.decode_tokens([5], 0, (0,))
        expected = whole.logits(0)[ids]
        normed = rms_norm(whole.hidden(1))[0] * final_norm(path)
        whole.close()
    assert np.abs(rows @ normed - expected).max() < 0.02 * np.abs(expected).max()


def test_what_cannot_be_a_head_is_refused(tmp_path: Path, tiny_path: TinyMaker) -> None:
    with pytest.raises(UsageError):
        HeadShape(64, 5, 1, 32, 10)
    with pytest.raises(UsageError):
        HeadShape(64, 4, 3, 32, 10)
    with pytest.raises(UsageError):
        HeadShape(64, 4, 0, 32, 10)
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelUnreadableError):
        output_rows(tmp_path / "no.gguf", np.zeros(1, np.int32))
    with pytest.raises(ModelUnreadableError):
        final_norm(tmp_path / "missing.gguf")
    with pytest.raises(ModelUnreadableError):
        output_rows(tiny_path("llama"), np.asarray([10**6], np.int32))


@pytest.mark.parametrize("n_embd", [32, 64, 96, 576, 960, 1152, 2048])
def test_usual_shapes_fit_any_width(n_embd: int) -> None:
    for shape in (usual_shape(n_embd, 10), lens_shape(n_embd, 10)):
        assert shape.n_ff % 32 == 0
        assert shape.n_embd % shape.n_head == 0
    assert usual_shape(576, 10) == HeadShape(576, 9, 3, 1536, 10)


def test_fresh_block_adds_nothing() -> None:
    tensors = fresh_block(usual_shape(64, 10), 0)
    assert not tensors["blk.0.attn_output.weight"].any()
    assert json.dumps(sorted(tensors)) == json.dumps(
        sorted([*usual_shape(64, 10).matrices, *usual_shape(64, 10).norms[:2]])
    )


def test_table_has_a_last_row_for_other_tokens() -> None:
    other = np.arange(4, dtype=np.float32)
    weights = HeadWeights(1, HeadShape(4, 1, 1, 32, 3), {"other": other}, 2 * np.eye(4, dtype=np.float32))
    rows = np.ones((2, 4), np.float32)
    assert weights.table(rows).tolist() == [[2.0] * 4, [2.0] * 4, other.tolist()]
