"""A message's states are the same alone, in company, and without a shared prefix; saved prefixes are those computed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from edge_runtime.labels import prefix as prefix_module
from edge_runtime.labels import trunk as trunk_module
from edge_runtime.labels.prefix import PrefixStore
from edge_runtime.labels.trunk import N_BATCH, Trunk, TrunkOptions, run_rows
from edge_runtime.native import ContextOptions, Model
from edge_runtime.slices import Slice
from edge_runtime.types import Floats

from .conftest import TinyMaker

N_LAYER = 5
EDGES = (1, 3, N_LAYER)
OPTIONS = TrunkOptions(n_tokens=128, n_messages=6, n_threads=1)
PREFIX = list(np.random.default_rng(0).integers(5, 500, 41))  # more than a batch
RANDOM = np.random.default_rng(1)
MESSAGES = [RANDOM.integers(5, 500, n).tolist() for n in (7, 3, 34, 12, 2, 40)]

MakeTrunk = Callable[..., Trunk]


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def model(request: pytest.FixtureRequest, tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path("llama", n_layer=N_LAYER, weights=request.param))) as model:
        yield model


@pytest.fixture(scope="module")
def plain_model(tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path("llama", n_layer=N_LAYER))) as model:
        yield model


@pytest.fixture
def make() -> Iterator[MakeTrunk]:
    trunks: list[Trunk] = []

    def make_trunk(
        model: Model,
        edges: tuple[int, ...] = EDGES,
        prefix: Sequence[int] = PREFIX,
        options: TrunkOptions = OPTIONS,
        store: PrefixStore | None = None,
    ) -> Trunk:
        trunks.append(Trunk(model, edges, prefix, options, store))
        return trunks[-1]

    yield make_trunk
    for trunk in trunks:
        trunk.close()


def climb(trunk: Trunk, messages: Sequence[Sequence[int]]) -> list[list[Floats]]:
    """States of each message (outer) at each edge (inner)."""
    group = trunk.start(messages)
    levels = []
    for _ in trunk.edges:
        group.advance()
        levels.append(group.states())
    return [list(states) for states in zip(*levels, strict=True)]


def from_scratch(model: Model, edges: Sequence[int], tokens: Sequence[int], n_prefix: int) -> list[Floats]:
    """States of tokens behind the prefix at each edge, all in one sequence."""
    options = ContextOptions(256, N_BATCH, n_threads=1, flash_attention=True)
    inputs: Sequence[int] | Floats = list(tokens)
    found = []
    for start, end in zip([0, *edges], edges, strict=False):
        last = end == model.n_layer
        piece = Slice(model, start, end, options, n_outputs_max=N_BATCH if last else 1, want_hidden=last)
        inputs = run_rows(piece, inputs, [0] * len(inputs), range(len(inputs)))
        found.append(inputs[n_prefix:])
        piece.close()
    return found


def equal(some: Sequence[Floats], others: Sequence[Floats]) -> bool:
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


# ── the same states, however they are computed ──────────────────────────────────────────────────────────────────────


def test_states_of_a_message_are_the_same_alone_and_in_company(model: Model, make: MakeTrunk) -> None:
    """Bit for bit, in any company and order."""
    trunk = make(model)
    alone = [climb(trunk, [message])[0] for message in MESSAGES]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5], [1, 4], [4, 1, 0]):
        together = climb(trunk, [MESSAGES[i] for i in order])
        for i, states in zip(order, together, strict=True):
            assert equal(states, alone[i]), (order, i)


@pytest.mark.parametrize("length", [1, N_BATCH + 1])
def test_a_row_that_is_left_over_is_the_same_in_a_batch_of_its_own(model: Model, make: MakeTrunk, length: int) -> None:
    """Bit for bit: a batch of one row must not be summed in another way than a wider one."""
    trunk = make(model)
    message = RANDOM.integers(5, 500, length).tolist()
    (alone,) = climb(trunk, [message])
    assert equal(climb(trunk, [[7, 8], message])[1], alone)


def test_states_behind_a_shared_prefix_are_those_of_one_sequence(model: Model, make: MakeTrunk) -> None:
    """Bit for bit, of the prefix and the message decoded from the start."""
    together = climb(make(model), MESSAGES)
    for message, states in zip(MESSAGES, together, strict=True):
        expected = from_scratch(model, EDGES, PREFIX + message, len(PREFIX))
        assert [s.shape for s in states] == [(len(message), model.n_embd)] * len(EDGES)
        assert equal(states, expected), len(message)


def test_the_prefix_matters(plain_model: Model, make: MakeTrunk) -> None:
    one, other = (climb(make(plain_model, prefix=p), MESSAGES[:1])[0] for p in (PREFIX, PREFIX[::-1]))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_how_the_layers_are_sliced_does_not_matter(plain_model: Model, make: MakeTrunk) -> None:
    by_edges = {edges: climb(make(plain_model, edges), MESSAGES) for edges in (EDGES, (3,), (1, 2, 3, 4), (N_LAYER,))}
    for i in range(len(MESSAGES)):
        three = by_edges[EDGES][i]
        assert equal([three[1]], by_edges[(3,)][i])
        assert equal(three[:2], [by_edges[(1, 2, 3, 4)][i][j] for j in (0, 2)])
        assert equal([three[2]], by_edges[(N_LAYER,)][i])


def test_groups_one_after_the_other_leave_nothing_behind(plain_model: Model, make: MakeTrunk) -> None:
    trunk = make(plain_model)
    first = climb(trunk, MESSAGES)
    half_way = trunk.start(MESSAGES[:2])
    half_way.advance()  # and never further
    assert all(equal(a, b) for a, b in zip(first, climb(trunk, MESSAGES), strict=True))
    for index in range(trunk.n_open):
        piece = trunk.slice_at(index)
        held = [piece.last_position(s) for s in range(OPTIONS.n_messages + 1)]
        assert held == [len(PREFIX) - 1] + [-1] * OPTIONS.n_messages


def test_a_failure_on_the_way_leaves_room_for_the_next_group(
    plain_model: Model, make: MakeTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = make(plain_model)
    expected = climb(trunk, MESSAGES)
    group = trunk.start(MESSAGES)
    with monkeypatch.context() as patch:
        plain, calls = Slice.decode_tokens, 0

        def fail_late(self: Slice, *args: Any, **more: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            plain(self, *args, **more)

        patch.setattr(Slice, "decode_tokens", fail_late)
        with pytest.raises(KeyboardInterrupt):
            group.advance()
    assert all(equal(a, b) for a, b in zip(expected, climb(trunk, MESSAGES), strict=True))


# ── groups ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slices_open_when_a_message_gets_there(plain_model: Model, make: MakeTrunk) -> None:
    trunk = make(plain_model)
    group = trunk.start(MESSAGES)
    assert (trunk.n_open, len(plain_model.contexts)) == (0, 0)
    for level in (1, 2, 3):
        group.advance()
        assert (group.level, trunk.n_open, len(plain_model.contexts)) == (level, level, level)
    trunk.start(MESSAGES).advance()
    assert trunk.n_open == 3
    trunk.close()
    assert (trunk.n_open, len(plain_model.contexts)) == (0, 0)


def test_those_that_are_kept_go_on_as_if_nothing_had_happened(model: Model, make: MakeTrunk) -> None:
    trunk = make(model)
    expected = climb(trunk, MESSAGES)
    group = trunk.start(MESSAGES)
    group.keep([5, 3, 2, 0])  # before any layer, and in whatever order they are named
    assert group.members == [0, 2, 3, 5]
    group.advance()
    assert equal(group.states(), [expected[i][0] for i in (0, 2, 3, 5)])
    group.keep([2, 5])
    assert group.members == [2, 5]
    assert equal(group.states(), [expected[i][0] for i in (2, 5)])
    group.advance()
    group.keep([5])
    assert equal(group.states(), [expected[5][1]])
    group.advance()
    assert equal(group.states(), [expected[5][2]])


def test_the_last_slice_gives_states_of_every_token_before_the_final_norm(model: Model, make: MakeTrunk) -> None:
    """One layer further up a longer model, which has no final norm there: tiny models share their first layers."""
    trunk = make(model, (N_LAYER - 1, N_LAYER))
    states = climb(trunk, MESSAGES)
    assert [s[1].shape for s in states] == [(len(m), model.n_embd) for m in MESSAGES]
    piece = trunk.slice_at(1)
    assert piece.is_last
    piece.copy_sequence(0, 1)
    n = len(MESSAGES[3])
    positions = range(len(PREFIX), len(PREFIX) + n)
    piece.decode_states(states[3][0], 0, range(n), [1] * n, positions)
    assert np.array_equal(piece.hidden(n), states[3][1])
    # the residual stream after a layer is what went in plus what the layer adds: no norm has rescaled it
    logits = piece.logits(n - 1).copy()
    assert np.isfinite(logits).all()
    assert np.corrcoef(states[3][0][-1], states[3][1][-1])[0, 1] > 0.3
    scale = np.sqrt(np.square(states[3][1]).mean(axis=1))
    assert scale.std() > 1e-3


def test_a_group_may_fill_the_trunk_and_not_more(plain_model: Model, make: MakeTrunk) -> None:
    trunk = make(plain_model)
    full = [[7] * 64, [8] * 64]
    assert [s[0].shape[0] for s in climb(trunk, full)] == [64, 64]
    most = [[9 + i, 3] for i in range(6)]
    assert len(climb(trunk, most)) == 6
    for messages, words in (
        ([*full, [1]], "3 messages of 129 tokens exceed 6 messages and 128 tokens"),
        ([*most, [1]], "7 messages of 13 tokens"),
        ([[1] * 129], "1 messages of 129 tokens"),
    ):
        with pytest.raises(UsageError, match=words):
            trunk.start(messages)
    assert all(equal(a, b) for a, b in zip(climb(trunk, most), [climb(trunk, [m])[0] for m in most], strict=True))


@pytest.mark.parametrize("messages", [[[]], [[1, 2], []], [[], [1]]])
def test_an_empty_message_is_refused(plain_model: Model, make: MakeTrunk, messages: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="without tokens"):
        make(plain_model).start(messages)


def test_batches_are_narrow_enough_for_rows_not_to_depend_on_each_other(
    plain_model: Model, make: MakeTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    plain = trunk_module.run_rows

    def watched(piece: Slice, inputs: Any, *rest: Any) -> Floats:
        widths.append(piece.n_batch)
        return plain(piece, inputs, *rest)

    monkeypatch.setattr(trunk_module, "run_rows", watched)
    climb(make(plain_model), MESSAGES)
    assert set(widths) == {32}


# ── saved prefixes ──────────────────────────────────────────────────────────────────────────────────────────────────


def store(folder: Path, model_hash: str = "m", build: str = "b") -> PrefixStore:
    return PrefixStore(folder, model_hash, build)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_saved_prefix_gives_the_states_that_a_computed_one_does(
    model: Model, make: MakeTrunk, tmp_path: Path
) -> None:
    expected = climb(make(model), MESSAGES)
    first, second = store(tmp_path / "p"), store(tmp_path / "p")
    assert all(equal(a, b) for a, b in zip(expected, climb(make(model, store=first), MESSAGES), strict=True))
    assert (first.loaded, len(files(tmp_path / "p"))) == (0, 3)
    assert all(equal(a, b) for a, b in zip(expected, climb(make(model, store=second), MESSAGES), strict=True))
    assert (second.loaded, len(files(tmp_path / "p"))) == (3, 3)


def test_a_saved_slice_does_for_one_and_a_missing_one_is_computed(
    plain_model: Model, make: MakeTrunk, tmp_path: Path
) -> None:
    expected = climb(make(plain_model), MESSAGES)
    climb(make(plain_model, store=store(tmp_path)), MESSAGES)
    for gone in range(3):
        files(tmp_path)[gone].unlink()
        again = store(tmp_path)
        assert all(equal(a, b) for a, b in zip(expected, climb(make(plain_model, store=again), MESSAGES), strict=True))
        assert again.loaded == 2
        assert len(files(tmp_path)) == 3


@pytest.mark.parametrize(
    ("model_hash", "build", "prefix", "edges"),
    [
        ("n", "b", PREFIX, EDGES),
        ("m", "c", PREFIX, EDGES),
        ("m", "b", PREFIX[:-1], EDGES),
        ("m", "b", [*PREFIX[:-1], PREFIX[-1] + 1], EDGES),
        ("m", "b", PREFIX, (2, 4)),
    ],
)
def test_prefixes_of_another_model_build_text_or_slice_are_not_used(
    plain_model: Model,
    make: MakeTrunk,
    tmp_path: Path,
    model_hash: str,
    build: str,
    prefix: list[int],
    edges: tuple[int, ...],
) -> None:
    climb(make(plain_model, store=store(tmp_path)), MESSAGES)
    other = store(tmp_path, model_hash, build)
    found = climb(make(plain_model, edges, prefix, store=other), MESSAGES)
    assert other.loaded == 0
    assert all(equal(a, b) for a, b in zip(found, climb(make(plain_model, edges, prefix), MESSAGES), strict=True))


def test_a_file_under_anothers_name_is_not_used(plain_model: Model, make: MakeTrunk, tmp_path: Path) -> None:
    """So that it is not the name alone that tells."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    climb(make(plain_model, prefix=PREFIX[::-1], store=store(theirs, "n")), MESSAGES)
    climb(make(plain_model, store=store(ours)), MESSAGES)
    for ours_file in files(ours):
        for foreign in [*files(theirs), *(f for f in files(ours) if f != ours_file)]:
            kept = ours_file.read_bytes()
            ours_file.write_bytes(foreign.read_bytes())
            again = store(ours)
            climb(make(plain_model, store=again), MESSAGES[:1])
            assert again.loaded == 2
            assert ours_file.read_bytes() == kept  # made again


def test_a_damaged_or_truncated_file_is_made_again(plain_model: Model, make: MakeTrunk, tmp_path: Path) -> None:
    (expected,) = climb(make(plain_model, (1,), store=store(tmp_path)), MESSAGES[:1])
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    head = whole.index(b"\n", whole.index(b"\n") + 1)
    random = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in (0, 5, 12, 40, head, head + 1, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0", whole[:12] + b"[]" + whole[head:], whole[:12] + b"7" + whole[head:]]
    for place in [*range(0, head + 2, 7), *random.integers(head, len(whole), 20).tolist()]:
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :])
    for data in damaged:
        file.write_bytes(data)
        again = store(tmp_path)
        (found,) = climb(make(plain_model, (1,), store=again), MESSAGES[:1])
        assert again.loaded == 0
        assert equal(found, expected)
        assert file.read_bytes() == whole


def test_a_full_disk_costs_the_file_and_nothing_else(
    plain_model: Model, make: MakeTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = climb(make(plain_model), MESSAGES)

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = climb(make(plain_model, store=store(tmp_path)), MESSAGES)
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_one_costs_the_file_and_nothing_else(
    plain_model: Model, make: MakeTrunk, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    found = climb(make(plain_model, store=store(tmp_path / "file")), MESSAGES)
    assert all(equal(a, b) for a, b in zip(climb(make(plain_model), MESSAGES), found, strict=True))


def test_the_oldest_files_go(
    plain_model: Model, make: MakeTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_module, "_MAX_FILES", 4)
    for i in range(6):
        (tmp_path / f"old{i}.prefix").write_bytes(b"x")
        os.utime(tmp_path / f"old{i}.prefix", (1000 + i, 1000 + i))
    (tmp_path / "other.txt").write_bytes(b"not ours")
    climb(make(plain_model, (1, 3), store=store(tmp_path)), MESSAGES[:1])
    names = {file.name for file in files(tmp_path)}
    assert {"old4.prefix", "old5.prefix", "other.txt"} < names
    assert len(names) == 5
