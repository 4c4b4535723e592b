"""What a slice refuses, and that it can be used afterwards as if nothing had been asked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import BoundaryError, ContextFullError, DecodeError, EdgeError, LibraryError, UsageError
from edge_runtime.native import ContextOptions, KvType, Model
from edge_runtime.slices import Slice, close_slices, default_threads, open_slices

from .conftest import TinyMaker

OPTIONS = ContextOptions(n_ctx=256, n_batch=16, n_threads=1, n_seq_max=2)
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model(tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path("llama", n_layer=4))) as model:
        yield model


@pytest.fixture
def pair(model: Model) -> Iterator[tuple[Slice, Slice]]:
    """Slices [0, 2) and [2, 4) that hold PROMPT."""
    first, last = open_slices(model, (2,), OPTIONS, n_outputs_max=4)
    first.decode_tokens(PROMPT, 0, [3])
    last.decode_states(first.hidden(4), 0, [3])
    yield first, last
    close_slices([first, last])


def snapshot(pair: tuple[Slice, Slice]) -> list[object]:
    """All that a later token can depend on."""
    first, last = pair
    held = [p.last_position(s) for p in pair for s in (0, 1)]
    first.decode_tokens([9], 4, [0])
    last.decode_states(first.hidden(1), 4, [0])
    logits = [p.logits(0).tolist() for p in pair]
    for piece in pair:
        piece.remove(4)
    return [held, logits]


@pytest.fixture
def unchanged(pair: tuple[Slice, Slice]) -> Iterator[None]:
    """After the test, both slices must go on as they would have before it."""
    before = snapshot(pair)
    yield
    assert snapshot(pair) == before


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("boundaries", [(), (2,), (1, 2, 3)])
def test_slices_cover_the_model(model: Model, boundaries: tuple[int, ...]) -> None:
    slices = open_slices(model, boundaries, OPTIONS, n_outputs_max=5, want_last_hidden=True)
    edges = (0, *boundaries, 4)
    assert [(s.start, s.end) for s in slices] == list(zip(edges, edges[1:], strict=False))
    assert [s.is_last for s in slices] == [False] * len(boundaries) + [True]
    assert [s.n_outputs_max for s in slices] == [2] * len(boundaries) + [5]  # one for each sequence at least
    assert all(s.has_hidden for s in slices)
    assert len(model.contexts) == len(slices)
    close_slices(slices)
    assert not model.contexts


@pytest.mark.parametrize("boundaries", [(0,), (4,), (2, 2), (3, 1), (-1,)])
def test_boundaries_must_fit(model: Model, boundaries: tuple[int, ...]) -> None:
    with pytest.raises(BoundaryError):
        open_slices(model, boundaries, OPTIONS)
    assert not model.contexts


@pytest.mark.parametrize("layers", [(0, 0), (2, 1), (-1, 2), (0, 5), (4, 5)])
def test_layers_must_be_the_models(model: Model, layers: tuple[int, int]) -> None:
    with pytest.raises(LibraryError, match=r"are not within \[0, 4\)"):
        Slice(model, *layers, OPTIONS)


def test_if_one_cannot_be_opened_all_are_closed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Slice] = []
    real = Slice.__init__

    def failing(self: Slice, *arguments: Any, **named: Any) -> None:
        if len(opened) == 2:
            raise KeyboardInterrupt
        real(self, *arguments, **named)
        opened.append(self)

    monkeypatch.setattr(Slice, "__init__", failing)
    with pytest.raises(KeyboardInterrupt):
        open_slices(model, (1, 2), OPTIONS)
    assert len(opened) == 2
    assert not any(piece.handle for piece in opened)
    assert not model.contexts


@pytest.mark.parametrize(
    "values",
    [
        {"n_ctx": 0},
        {"n_batch": 0},
        {"n_seq_max": 0},
        {"n_threads": -1},
        {"n_ctx": 2**31},
        {"n_ctx": 2**32 + 1},
        {"n_seq_max": 257},
        {"n_threads": 513},
        {"kv_type": KvType.Q8_0, "flash_attention": False},
    ],
    ids=str,
)
def test_options_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ContextOptions(**values)


def test_a_batch_is_never_larger_than_the_context(model: Model) -> None:
    piece = Slice(model, 0, 4, ContextOptions(n_ctx=8, n_batch=10**9, n_threads=1))
    assert piece.n_batch == 8
    piece.close()


def test_no_threads_means_all_cores(model: Model) -> None:
    assert default_threads() >= 1
    piece = Slice(model, 0, 4, ContextOptions(n_ctx=256, n_batch=8))
    assert piece._c.llama_n_threads(piece.handle) == default_threads()
    piece.set_threads(3)
    assert piece._c.llama_n_threads(piece.handle) == piece._c.llama_n_threads_batch(piece.handle) == 3
    for n in (0, -1, 513, 10**6):
        with pytest.raises(UsageError, match="threads cannot be used"):
            piece.set_threads(n)
    piece.close()


def test_threads_change_time_not_results(model: Model) -> None:
    results = []
    for n_threads in (1, 2):
        piece = Slice(model, 0, 4, ContextOptions(n_ctx=256, n_batch=16, n_threads=n_threads))
        piece.decode_tokens(PROMPT, 0, [3])
        results.append(piece.logits(3).copy())
        piece.close()
    assert np.array_equal(results[0], results[1])


# ── requests that cannot be met ─────────────────────────────────────────────────────────────────────────────────────

STATES = np.ones((4, 64), np.float32)
REFUSED: dict[str, tuple[type[EdgeError], str, Callable[[Slice, Slice], object]]] = {
    "no tokens": (UsageError, "a batch of 0", lambda a, b: a.decode_tokens([], 4)),
    "no states": (UsageError, "a batch of 0", lambda a, b: b.decode_states(STATES[:0], 4)),
    "too many tokens": (UsageError, "takes 1 to 16 tokens", lambda a, b: a.decode_tokens([1] * 17, 4)),
    "too many states": (UsageError, "a batch of 20", lambda a, b: b.decode_states(np.ones((20, 64), np.float32), 4)),
    "too many outputs": (UsageError, "5 rows of logits", lambda a, b: b.decode_states(STATES, 4, [0, 1, 2, 3, 3])),
    "too many outputs early": (UsageError, "3 rows of logits", lambda a, b: a.decode_tokens([1] * 3, 4, [0, 1, 2])),
    "states too wide": (UsageError, r"shape \(n, 64\)", lambda a, b: b.decode_states(np.ones((1, 65), np.float32), 4)),
    "one state without rows": (UsageError, "contiguous float32", lambda a, b: b.decode_states(STATES[0], 4)),
    "states of float64": (UsageError, "contiguous float32", lambda a, b: b.decode_states(np.ones((1, 64)), 4)),  # type: ignore[arg-type]
    "states of float16": (UsageError, "float32", lambda a, b: b.decode_states(np.ones((1, 64), np.float16), 4)),  # type: ignore[arg-type]
    "states by column": (UsageError, "contiguous", lambda a, b: b.decode_states(np.asfortranarray(STATES), 4)),
    "every other state": (UsageError, "contiguous", lambda a, b: b.decode_states(STATES[:, ::-1], 4)),
    "token below": (DecodeError, r"invalid token\[1\] = -5", lambda a, b: a.decode_tokens([1, -5], 4)),
    "token above": (DecodeError, r"invalid token\[0\] = 512", lambda a, b: a.decode_tokens([512], 4)),
    "sequence below": (DecodeError, "invalid seq_id", lambda a, b: a.decode_tokens([1], 4, seq_ids=[-1])),
    "sequence above": (DecodeError, "invalid seq_id", lambda a, b: a.decode_tokens([1], 4, seq_ids=[2])),
    "states' sequence": (DecodeError, "invalid seq_id", lambda a, b: b.decode_states(STATES, 4, seq_ids=[0, 0, 0, 9])),
    "a gap": (DecodeError, "inconsistent sequence positions", lambda a, b: a.decode_tokens([1], 6)),
    "a gap in states": (DecodeError, "inconsistent sequence positions", lambda a, b: b.decode_states(STATES, 5)),
    "a position held": (DecodeError, "inconsistent sequence positions", lambda a, b: a.decode_tokens([1], 3)),
    "a gap within": (DecodeError, "not continuous", lambda a, b: a.decode_tokens([1, 1], 0, positions=[4, 6])),
    "logits not asked for": (DecodeError, "no logits were computed for row 1", lambda a, b: a.logits(1)),
    "logits of no row": (DecodeError, "no logits were computed for row 99", lambda a, b: a.logits(99)),
    "hidden states not kept": (DecodeError, "without hidden states", lambda a, b: b.hidden(1)),
    "forget of none": (UsageError, "sequence 2 is none of this slice's 2", lambda a, b: a.remove(0, 2)),
    "forget of all": (UsageError, "sequence -1 is none", lambda a, b: a.remove(0, -1)),
    "last of none": (UsageError, "sequence 300 is none", lambda a, b: a.last_position(300)),
    "save none": (UsageError, "sequence 2 is none", lambda a, b: a.save_state(2)),
    "load none": (UsageError, "sequence -2 is none", lambda a, b: a.load_state(a.save_state(), -2)),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_met_changes_nothing(pair: tuple[Slice, Slice], case: str) -> None:
    kind, words, request = REFUSED[case]
    with pytest.raises(kind, match=words) as failure:
        request(*pair)
    assert failure.type is kind


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_states_that_are_no_numbers_do_no_lasting_harm(pair: tuple[Slice, Slice], value: float) -> None:
    _, last = pair
    last.decode_states(np.full((2, 64), value, np.float32), 4, [1])
    assert last.logits(1).shape == (512,)
    last.remove(4)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("n", [1, 16])
def test_a_full_context_says_so_and_takes_what_fits(pair: tuple[Slice, Slice], n: int) -> None:
    first, _ = pair
    while first.last_position() + 1 + 16 <= first.n_ctx:
        first.decode_tokens([1] * 16, first.last_position() + 1)
    left = first.n_ctx - first.last_position() - 1
    if left:
        first.decode_tokens([1] * left, first.last_position() + 1)
    assert first.last_position() == first.n_ctx - 1
    for _ in range(2):
        with pytest.raises(ContextFullError, match=f"no room for {n} more tokens") as failure:
            first.decode_tokens([1] * n, first.n_ctx)
        assert "--ctx" in failure.value.hint
    assert first.last_position() == first.n_ctx - 1
    first.remove(4)


@pytest.mark.usefixtures("unchanged")
def test_another_sequence_leaves_the_first_alone(pair: tuple[Slice, Slice]) -> None:
    first, _ = pair
    first.decode_tokens([1, 2, 3], 0, seq_ids=[1, 1, 1])
    assert (first.last_position(0), first.last_position(1)) == (3, 2)
    first.remove(1, seq_id=1)
    assert (first.last_position(0), first.last_position(1)) == (3, 0)
    first.remove(0, seq_id=1)


def test_forgetting_everything(pair: tuple[Slice, Slice]) -> None:
    first, _ = pair
    first.remove(99)
    assert first.last_position() == 3
    first.remove(0)
    assert first.last_position() == -1
    first.decode_tokens(PROMPT, 0)
    first.clear()
    assert first.last_position() == -1


# ── rows and states ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_those_of_the_batch_in_any_order(model: Model) -> None:
    one = Slice(model, 0, 4, OPTIONS, n_outputs_max=16, want_hidden=True)
    one.decode_tokens(PROMPT, 0, [3, 0, 2])
    rows = {row: one.logits(row).copy() for row in (0, 2, 3)}
    states = one.hidden(3).copy()
    for row in (0, 2, 3):
        one.remove(0)
        one.decode_tokens(PROMPT, 0, [row])
        assert np.argmax(one.logits(row)) == np.argmax(rows[row])
    assert len({r.tobytes() for r in rows.values()}) == len({r.tobytes() for r in states}) == 3
    one.close()


def test_hidden_states_of_all_tokens_come_without_asking_for_rows(pair: tuple[Slice, Slice]) -> None:
    first, _ = pair
    first.remove(0)
    first.decode_tokens(PROMPT, 0)
    together = first.hidden(4).copy()
    first.remove(0)
    for i, token in enumerate(PROMPT):
        first.decode_tokens([token], i)
        assert first.hidden(1)[0] == pytest.approx(together[i], rel=1e-3, abs=1e-3)
    assert together.shape == (4, 64)
    with pytest.raises(DecodeError):
        first.logits(0)


# ── saved states ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kv_type", list(KvType))
def test_a_state_survives_the_way_through_bytes(tiny_path: TinyMaker, kv_type: KvType) -> None:
    options = ContextOptions(n_ctx=256, n_batch=16, n_threads=1, flash_attention=True, kv_type=kv_type)
    with Model(str(tiny_path("llama", n_embd=128, n_ff=256))) as model:
        one, other = (Slice(model, 0, 3, options) for _ in range(2))
        one.decode_tokens(PROMPT, 0)
        other.decode_tokens([1, 2, 3, 4, 5, 6], 0)
        other.load_state(one.save_state())
        assert other.last_position() == 3
        for piece in (one, other):
            piece.decode_tokens([9], 4, [0])
        assert np.array_equal(one.logits(0), other.logits(0))
        assert np.array_equal(one.hidden(1), other.hidden(1))
        assert one.save_state() == other.save_state()


def test_a_state_may_go_to_another_sequence(pair: tuple[Slice, Slice]) -> None:
    first, _ = pair
    first.load_state(first.save_state(0), 1)
    assert (first.last_position(0), first.last_position(1)) == (3, 3)
    first.decode_tokens([9, 9], 0, [0, 1], seq_ids=[0, 1], positions=[4, 4])
    assert np.array_equal(first.logits(0), first.logits(1))


def test_the_state_of_nothing(pair: tuple[Slice, Slice]) -> None:
    first, _ = pair
    first.load_state(first.save_state(1), 0)
    assert first.last_position() == -1
    first.decode_tokens(PROMPT, 0)


def resealed(data: bytes, change: Callable[[bytearray], object]) -> bytes:
    """A saved state with another payload, and a checksum that fits it."""
    magic, head, payload = data.split(b"\n", 2)
    body = bytearray(payload)
    change(body)
    fields = json.loads(head) | {"crc32": zlib.crc32(body), "bytes": len(body)}
    return b"\n".join([magic, json.dumps(fields).encode(), bytes(body)])


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "nothing": ("not a saved slice state", lambda d: b""),
    "something else": ("not a saved slice state", lambda d: b"GGUF" + d),
    "cut at the end": ("checksum does not match", lambda d: d[:-1]),
    "more at the end": ("checksum does not match", lambda d: d + b"\0"),
    "one bit at the end": ("checksum does not match", lambda d: flipped(d, len(d) - 1)),
    "one bit in the middle": ("checksum does not match", lambda d: flipped(d, len(d) // 2)),
    "no header": ("header cannot be read", lambda d: d[: d.index(b"\n") + 1]),
    "header of no object": ("header cannot be read", lambda d: d[: d.index(b"\n") + 1] + b"[1]\n"),
    "header without checksum": ("header cannot be read", lambda d: d.replace(b'"crc32"', b'"crc33"')),
    "header of no text": ("header cannot be read", lambda d: d[: d.index(b"\n") + 1] + b"\xff\xfe\n"),
    "resealed and cut": ("does not fit this slice", lambda d: resealed(d, lambda b: b.__delitem__(slice(40, None)))),
    "resealed and empty": ("does not fit this slice", lambda d: resealed(d, lambda b: b.clear())),
    "resealed and scrambled": ("does not fit this slice", lambda d: resealed(d, lambda b: b.__setitem__(0, b[0] ^ 1))),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_state_is_refused_and_nothing_lost(pair: tuple[Slice, Slice], damage: str) -> None:
    words, spoil = DAMAGED[damage]
    with pytest.raises(DecodeError, match=words):
        pair[0].load_state(spoil(pair[0].save_state()))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("layers", {"layers": (0, 3)}),
        ("layers", {"layers": (1, 2)}),
        ("kv_type", {"kv_type": KvType.F32}),
        ("architecture", {"architecture": "qwen3"}),
        ("model_bytes", {"n_ff": 96}),
    ],
    ids=str,
)
def test_the_state_of_another_slice_is_refused(
    pair: tuple[Slice, Slice], tiny_path: TinyMaker, key: str, change: dict[str, Any]
) -> None:
    settings = {"layers": (0, 2), "kv_type": KvType.F16, "architecture": "llama", "n_ff": 128, **change}
    layers = settings["layers"]
    with Model(str(tiny_path(settings["architecture"], n_layer=4, n_ff=settings["n_ff"]))) as other:
        options = ContextOptions(n_ctx=256, n_batch=16, n_threads=1, kv_type=settings["kv_type"])
        piece = Slice(other, layers[0], layers[1], options)
        if piece.start == 0:
            piece.decode_tokens(PROMPT, 0)
        with pytest.raises(DecodeError, match=f"of another slice: its {key} is"):
            pair[0].load_state(piece.save_state())


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("change", "words"),
    [({"n_ctx": 512}, "not enough cells"), ({"flash_attention": False}, "incompatible V transposition")],
    ids=str,
)
def test_a_state_that_does_not_fit_in_is_refused(
    model: Model, pair: tuple[Slice, Slice], change: dict[str, Any], words: str
) -> None:
    """llama.cpp empties the sequence first; the slice puts back what was there."""
    piece = Slice(model, 0, 2, ContextOptions(**{"n_ctx": 256, "n_batch": 512, "n_threads": 1, **change}))
    piece.decode_tokens([1] * (300 if "n_ctx" in change else 10), 0)
    with pytest.raises(DecodeError, match=words):
        pair[0].load_state(piece.save_state())
    piece.close()


# ── closing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slice_may_be_closed_twice_and_not_used_again(pair: tuple[Slice, Slice]) -> None:
    first, last = pair
    for piece in pair:
        piece.close()
        piece.close()
    uses: list[Callable[[], object]] = [
        lambda: first.decode_tokens([1], 4),
        lambda: last.decode_states(STATES, 4),
        lambda: first.logits(0),
        lambda: first.hidden(1),
        lambda: first.remove(0),
        first.clear,
        first.last_position,
        first.save_state,
        lambda: first.set_state(b""),
        lambda: first.set_threads(1),
        first.synchronize,
        lambda: first.n_ctx,
    ]
    for use in uses:
        with pytest.raises(UsageError, match="this slice is closed"):
            use()


def test_slices_close_in_any_order(tiny_path: TinyMaker) -> None:
    model = Model(str(tiny_path("llama", n_layer=4)))
    first, middle, last = open_slices(model, (1, 2), OPTIONS)
    first.decode_tokens(PROMPT, 0)
    states = first.hidden(4).copy()
    first.close()
    middle.decode_states(states, 0)
    last.decode_states(middle.hidden(4), 0, [3])
    close_slices([middle, first, last])
    model.close()


def test_a_model_closes_its_slices(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama", n_layer=4))) as model:
        pieces = open_slices(model, (1, 2), OPTIONS)
    assert not any(piece.handle for piece in pieces)
    close_slices(pieces)
