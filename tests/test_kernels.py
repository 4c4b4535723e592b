"""The edge kernels inside llama.cpp: same sums in every batch, near stock's, whatever the weights."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.doctor import examine
from edge_runtime.errors import UsageError
from edge_runtime.native import (
    ContextOptions,
    KvType,
    Model,
    available_kernels,
    kernel_weight_types,
    load,
    resolve_kernels,
    weight_bytes,
)
from edge_runtime.native.kernels import kernels_for_loading
from edge_runtime.slices import Slice, close_slices, open_slices
from edge_runtime.types import Floats

from .conftest import TinyMaker

pytestmark = pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor")

N_CTX = 640
# llama.cpp's file types, taken "pure": every matrix in this one type
FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 14, "q5_k": 16, "q6_k": 18}
ISAS = available_kernels()

Quantiser = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantised(tiny_path: TinyMaker, tmp_path_factory: pytest.TempPathFactory) -> Quantiser:
    """A random model whose matrices are all of one type; 509 rows of output fill no whole number of tiles."""
    folder = tmp_path_factory.mktemp("quantised")
    source = tiny_path("llama", n_layer=2, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=509)

    def make(kind: str) -> Path:
        return as_file_type(source, folder / f"{kind}.gguf", FILE_TYPES[kind])

    return make


def as_file_type(source: Path, target: Path, file_type: int) -> Path:
    if not target.exists():
        c = load().c
        params = c.llama_model_quantize_default_params()
        params.ftype, params.pure, params.allow_requantize, params.nthread = file_type, True, True, 1
        assert c.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0
    return target


def opened(model: Model, n_threads: int = 1, **options: object) -> Slice:
    settings = {"n_ctx": N_CTX, "n_batch": 256, "n_threads": n_threads, "flash_attention": True} | options
    return open_slices(model, (), ContextOptions(**settings), n_outputs_max=256)[0]  # type: ignore[arg-type]


def logits(piece: Slice, tokens: list[int], width: int) -> Floats:
    """Logits (n, n_vocab) after every token, computed `width` at a time."""
    piece.remove(0)
    rows = []
    for start in range(0, len(tokens), width):
        part = tokens[start : start + width]
        piece.decode_tokens(part, start, range(len(part)))
        rows += [piece.logits(i).copy() for i in range(len(part))]
    return np.array(rows)


def some_tokens(n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(n).integers(5, 500, n)]


@pytest.mark.parametrize("kind", FILE_TYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_width_and_thread_count_gives_the_same_bits(quantised: Quantiser, kind: str, isa: str) -> None:
    tokens = some_tokens(150)
    with Model(str(quantised(kind)), kernels=isa) as model:
        assert model.kernels == isa
        piece = opened(model)
        one = logits(piece, tokens, 1)
        for width in (2, 3, 5, 8, 9, 16, 17, 64, 150):
            assert np.array_equal(logits(piece, tokens, width), one), f"width {width}"
        for n_threads in (2, 3):
            several = opened(model, n_threads)
            for width in (1, 7, 150):
                assert np.array_equal(logits(several, tokens, width), one), f"width {width}, {n_threads} threads"


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_instruction_set_is_as_exact_as_stock(quantised: Quantiser, kind: str) -> None:
    """Against the same weights in float32: both quantise activations alike; only the order of roundings differs."""
    tokens = some_tokens(60)
    path = quantised(kind)
    with Model(str(as_file_type(path, path.with_suffix(".f32"), 0))) as exact, Model(str(path)) as stock:
        reference, theirs = logits(opened(exact), tokens, 1), logits(opened(stock), tokens, 1)
    error = np.abs(theirs - reference)
    for isa in ISAS:
        with Model(str(path), kernels=isa) as model:
            ours = logits(opened(model), tokens, 8)
        # nothing was passed on to this position, which would turn a last bit of an activation into a step of 255
        assert np.abs(ours[0] - theirs[0]).max() < 1e-5 * np.abs(theirs[0]).max()
        assert np.abs(ours - reference).mean() < 1.1 * error.mean()
        assert np.quantile(np.abs(ours - reference), 0.99) < 1.25 * np.quantile(error, 0.99)


def test_long_texts_are_invariant_too(quantised: Quantiser) -> None:
    """From 512 positions on, stock's attention splits keys among threads for single tokens, and for those alone."""
    tokens = some_tokens(600)
    with Model(str(quantised("q8_0")), kernels="edge") as model:
        one = logits(opened(model), tokens, 1)
        for n_threads, width in ((1, 200), (2, 1), (2, 16), (3, 256)):
            assert np.array_equal(logits(opened(model, n_threads), tokens, width), one)


@pytest.mark.parametrize("kv_type", [KvType.F32, KvType.Q8_0])
def test_other_caches_are_invariant_by_stocks_plain_path(quantised: Quantiser, kv_type: KvType) -> None:
    tokens = some_tokens(150)
    with Model(str(quantised("q4_0")), kernels="edge") as model:
        one = logits(opened(model, kv_type=kv_type), tokens, 1)
        for n_threads, width in ((1, 150), (2, 1), (2, 16)):
            assert np.array_equal(logits(opened(model, n_threads, kv_type=kv_type), tokens, width), one)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_every_architecture_is_invariant(tiny_path: TinyMaker, architecture: str) -> None:
    """gemma2's attention has a soft cap, so it goes by stock's plain path."""
    tokens = some_tokens(150)
    with Model(str(tiny_path(architecture, weights="Q8_0")), kernels="edge") as model:
        one = logits(opened(model), tokens, 1)
        for n_threads, width in ((1, 150), (2, 9)):
            assert np.array_equal(logits(opened(model, n_threads), tokens, width), one)


def test_slices_are_as_invariant_as_the_whole(quantised: Quantiser) -> None:
    tokens = some_tokens(70)
    with Model(str(quantised("q4_1")), kernels="edge") as model:
        whole = logits(opened(model), tokens, 70)[-1]
        slices = open_slices(model, (1,), ContextOptions(n_ctx=N_CTX, n_batch=256, n_threads=1, flash_attention=True))
        for start in range(0, 70, 7):
            slices[0].decode_tokens(tokens[start : start + 7], start)
            slices[1].decode_states(slices[0].hidden(7).copy(), start, (6,))
        assert np.array_equal(slices[1].logits(6), whole)
        close_slices(slices)


def test_weights_of_other_types_stay_with_stock(tiny_path: TinyMaker) -> None:
    tokens = some_tokens(20)
    path = str(tiny_path("llama", weights="F16"))
    with Model(path) as stock, Model(path, kernels="edge") as edge:
        assert np.array_equal(logits(opened(edge), tokens, 4), logits(opened(stock), tokens, 4))


def test_stock_is_untouched_by_edge_models_beside_it(quantised: Quantiser) -> None:
    tokens, path = some_tokens(70), str(quantised("q4_0"))
    with Model(path) as stock:
        before = logits(opened(stock), tokens, 70)
        with Model(path, kernels="edge") as edge, Model(path) as second:
            logits(opened(edge), tokens, 8)
            assert np.array_equal(logits(opened(second), tokens, 70), before)
        assert np.array_equal(logits(opened(stock), tokens, 70), before)


def test_a_file_that_is_read_gives_what_a_mapped_one_does(quantised: Quantiser) -> None:
    tokens, path = some_tokens(20), str(quantised("q6_k"))
    with Model(path, kernels="edge") as mapped, Model(path, kernels="edge", use_mmap=False) as read:
        assert np.array_equal(logits(opened(mapped), tokens, 5), logits(opened(read), tokens, 5))


def test_names() -> None:
    assert resolve_kernels("stock") == "stock"
    assert resolve_kernels("edge") == ISAS[0]
    assert all(resolve_kernels(name) == name for name in ISAS)
    with pytest.raises(UsageError, match="no kernels 'sse'") as caught:
        resolve_kernels("sse")
    assert ISAS[0] in caught.value.hint
    assert not load().lib.edge_kernels_select(b"sse")
    assert set(FILE_TYPES) == set(kernel_weight_types())


def test_without_kernels_for_this_processor_edge_means_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.native.kernels.available_kernels", lambda: ())
    assert resolve_kernels("edge") == "stock"


def test_a_failed_load_leaves_stock_selected(quantised: Quantiser) -> None:
    tokens, path = some_tokens(20), str(quantised("q8_0"))
    with pytest.raises(ZeroDivisionError), kernels_for_loading(ISAS[0]):
        raise ZeroDivisionError
    with Model(path) as after, Model(path, kernels="edge") as edge:
        assert after.kernels == "stock"
        found = [logits(opened(model), tokens, 1) for model in (after, edge)]
        assert not np.array_equal(*found)


def test_doctor_names_kernels_and_their_share(quantised: Quantiser, tiny_path: TinyMaker) -> None:
    checks = {check.part: check for check in examine(str(quantised("q5_k")))}
    assert checks["kernels"].detail.startswith(f"edge: {ISAS[0]}")
    assert "q4_1" in checks["kernels"].detail
    share = checks["model kernels"].detail
    assert share.startswith((f"{ISAS[0]} for 9", f"{ISAS[0]} for 100%"))
    other = {check.part: check for check in examine(str(tiny_path("llama", weights="F16")))}
    assert other["model kernels"].detail == f"{ISAS[0]} for 0% of its weights; stock for f16"


def test_weight_bytes_add_up(quantised: Quantiser) -> None:
    by_type = weight_bytes(str(quantised("q8_0")))
    assert set(by_type) == {"f32", "q8_0"}
    # two layers' and both tables' matrices, 34 bytes for 32 weights
    n_weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) + 2 * 509 * 256
    assert by_type["q8_0"] == n_weights // 32 * 34
