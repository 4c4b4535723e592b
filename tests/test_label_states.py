"""Pooled states come back as they were kept, and what is damaged, foreign or half written is computed again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import cache as cache_module
from edge_runtime.errors import EdgeError
from edge_runtime.labels import states
from edge_runtime.labels.states import POOLS, StateCache, collect, groups, message_key, pool
from edge_runtime.labels.trunk import Trunk, TrunkOptions
from edge_runtime.native import Model
from edge_runtime.types import Floats

from .conftest import TinyMaker

N_EMBD = 4
IDENTITY: dict[str, Any] = {"model": "m", "build": "b", "prefix": [1, 2]}


class FakeTrunk:
    """States of a message's tokens that depend on the tokens and the layer, and nothing else."""

    def __init__(self, edges: tuple[int, ...], options: TrunkOptions | None = None) -> None:
        self.edges, self.options = edges, options or TrunkOptions(n_tokens=12, n_messages=3)
        self.computed: list[tuple[int, ...]] = []

    def start(self, messages: Sequence[Sequence[int]]) -> FakeGroup:
        assert 0 < len(messages) <= self.options.n_messages
        assert sum(map(len, messages)) <= self.options.n_tokens
        self.computed += [tuple(m) for m in messages]
        return FakeGroup(self.edges, messages)


class FakeGroup:
    def __init__(self, edges: tuple[int, ...], messages: Sequence[Sequence[int]]) -> None:
        self._edges, self._messages, self._level = edges, messages, 0

    def advance(self) -> None:
        self._level += 1

    def states(self) -> list[Floats]:
        return [states_of(message, self._edges[self._level - 1]) for message in self._messages]


def states_of(message: Sequence[int], layer: int) -> Floats:
    tokens = np.asarray(message, np.float32)[:, None]
    return np.asarray(np.sin(tokens * (layer + 1) + np.arange(N_EMBD)) * layer, np.float32)


def expected(message: Sequence[int], layer: int, kind: str) -> Floats:
    rows = states_of(message, layer)
    value = {"mean": rows.mean(axis=0), "max": rows.max(axis=0), "last": rows[-1]}[kind]
    return value.astype(np.float16).astype(np.float32)


def messages_of(n: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[*random.integers(0, 1000, random.integers(1, 9)).tolist(), 10_000 * seed + i] for i in range(n)]


def quiet(_done: int, _all: int) -> None:
    pass


def opened(folder: Path, layers: tuple[int, ...] = (2, 5), **changes: Any) -> StateCache:
    return StateCache(folder, layers, N_EMBD, {**IDENTITY, **changes})


def assert_kept(cache: StateCache, messages: Sequence[Sequence[int]]) -> None:
    keys = [message_key(m) for m in messages]
    assert all(key in cache for key in keys)
    for layer in cache.layers:
        for kind in POOLS:
            rows = np.stack([expected(m, layer, kind) for m in messages])
            assert (cache.read(keys, layer, kind) == rows).all(), (layer, kind)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_SHARD", 8)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """A folder with the states of 20 messages in three shards."""
    messages = messages_of(20)
    collect(FakeTrunk((2, 5)), messages, opened(tmp_path), quiet)  # type: ignore[arg-type]
    return tmp_path, messages


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.states"))


# ── round trip ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pools_by_hand() -> None:
    rows = np.float32([[1, 5], [3, 1], [2, 3]])
    assert pool(rows, "mean").tolist() == [2, 3]
    assert pool(rows, "max").tolist() == [3, 5]
    assert pool(rows, "last").tolist() == [2, 3]


def test_keys_are_of_the_tokens_in_order() -> None:
    keys = [message_key(tokens) for tokens in ([1, 2], [2, 1], [1], [1, 2, 0], [258])]
    assert len(set(keys)) == 5
    assert message_key((1, 2)) == keys[0]


def test_states_come_back_as_they_were_kept(kept: tuple[Path, list[list[int]]]) -> None:
    folder, messages = kept
    assert len(shards(folder)) == 3
    cache = opened(folder)
    assert_kept(cache, messages)
    assert_kept(cache, [messages[i] for i in (19, 0, 7, 7, 12, 3)])  # any order, across shards, and twice
    assert message_key([9, 9, 9]) not in cache
    with pytest.raises(KeyError):
        cache.read([message_key([9, 9, 9])], 2, "mean")
    assert cache.read([], 2, "mean").shape == (0, N_EMBD)


def test_what_is_kept_is_not_computed_again(kept: tuple[Path, list[list[int]]]) -> None:
    folder, messages = kept
    trunk, more = FakeTrunk((2, 5)), messages_of(5, seed=1)
    cache = opened(folder)
    collect(trunk, [*more, *messages, *more], cache, quiet)  # type: ignore[arg-type]
    assert trunk.computed == [tuple(m) for m in more]
    assert_kept(cache, [*messages, *more])


def test_progress_counts_all_messages_up_to_the_last(kept: tuple[Path, list[list[int]]]) -> None:
    folder, messages = kept
    told: list[tuple[int, int]] = []
    more = messages_of(11, seed=1)
    collect(FakeTrunk((2, 5)), messages + more, opened(folder), lambda *p: told.append(p))  # type: ignore[arg-type]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[0][0] > 20
    assert told[-1] == (31, 31)
    assert {n for _, n in told} == {31}


def test_states_too_large_for_half_precision_end_at_its_limit(tmp_path: Path) -> None:
    class Huge(FakeTrunk):
        def start(self, messages: Sequence[Sequence[int]]) -> Any:
            group = super().start(messages)
            group.states = lambda: [np.float32([[1e6, -1e6, 1, 0]]) for _ in messages]  # type: ignore[method-assign]
            return group

    cache = opened(tmp_path)
    collect(Huge((2, 5)), [[1]], cache, quiet)  # type: ignore[arg-type]
    assert cache.read([message_key([1])], 5, "max")[0].tolist() == [65504, -65504, 1, 0]


# ── groups ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_groups_are_as_large_as_the_trunk_takes() -> None:
    trunk: Any = FakeTrunk((1,), TrunkOptions(n_tokens=10, n_messages=3))
    messages = [[0] * n for n in (4, 6, 1, 1, 1, 1, 10, 2)]
    assert [[len(m) for m in part] for part in groups(messages, trunk)] == [[4, 6], [1, 1, 1], [1], [10], [2]]
    assert list(groups([], trunk)) == []


# ── interrupted, damaged, foreign ───────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_run_goes_on_where_the_last_whole_shard_ends(tmp_path: Path) -> None:
    messages = messages_of(20)

    def stop(done: int, _all: int) -> None:
        if done >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(FakeTrunk((2, 5)), messages, opened(tmp_path), stop)  # type: ignore[arg-type]
    trunk, cache = FakeTrunk((2, 5)), opened(tmp_path)
    collect(trunk, messages, cache, quiet)  # type: ignore[arg-type]
    assert trunk.computed == [tuple(m) for m in messages[8:]]
    assert_kept(cache, messages)


@pytest.mark.parametrize("cut", [0, 1, 12, 40, 100, 0.3, 0.7, 0.99, -1])
def test_a_truncated_shard_is_computed_again(kept: tuple[Path, list[list[int]]], cut: float) -> None:
    folder, messages = kept
    victim = shards(folder)[1]
    data = victim.read_bytes()
    victim.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    trunk, cache = FakeTrunk((2, 5)), opened(folder)
    collect(trunk, messages, cache, quiet)  # type: ignore[arg-type]
    assert len(trunk.computed) in (4, 8)
    assert_kept(cache, messages)
    assert_kept(opened(folder), messages)


def test_whatever_byte_of_a_shard_is_damaged_nothing_wrong_is_read(kept: tuple[Path, list[list[int]]]) -> None:
    """Every byte of the head, and some of the rest, each changed in several ways."""
    folder, messages = kept
    victim = shards(folder)[0]
    data = victim.read_bytes()
    head = data.index(b"\n", data.index(b"\n") + 1) + 1
    places = [*range(head), *range(head, len(data), 97)]
    for place in places:
        for flip in (0x01, 0x02, 0x04, 0x08, 0x10, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= flip
            victim.write_bytes(damaged)
            cache = opened(folder)
            there = [m for m in messages if message_key(m) in cache]
            assert len(there) >= 12
            assert_kept(cache, there)


@pytest.mark.parametrize("content", [b"", b"EDGESTATES1\n", b"EDGESTATES1\n[1]\n", b"EDGESTATES1\n{}\n", b"\x00" * 500])
def test_files_that_are_no_shards_are_passed_over(kept: tuple[Path, list[list[int]]], content: bytes) -> None:
    folder, messages = kept
    (shards(folder)[0].parent / "zzz.states").write_bytes(content)
    (shards(folder)[0].parent / "folder.states").mkdir()
    assert_kept(opened(folder), messages)


@pytest.mark.parametrize("change", [{"model": "n"}, {"build": "c"}, {"prefix": [1, 2, 3]}])
def test_states_of_another_model_build_or_prefix_are_not_mixed_in(
    kept: tuple[Path, list[list[int]]], change: dict[str, Any]
) -> None:
    folder, messages = kept
    assert not any(message_key(m) in opened(folder, **change) for m in messages)


def test_states_of_another_width_are_not_read(kept: tuple[Path, list[list[int]]]) -> None:
    folder, messages = kept
    assert message_key(messages[0]) not in StateCache(folder, (2, 5), 2 * N_EMBD, IDENTITY)


def test_more_layers_than_asked_for_will_do_and_fewer_will_not(kept: tuple[Path, list[list[int]]]) -> None:
    folder, messages = kept
    assert_kept(opened(folder, (5,)), messages)
    assert_kept(opened(folder, (2,)), messages)
    wide = opened(folder, (2, 3, 5))
    assert not any(message_key(m) in wide for m in messages)
    collect(FakeTrunk((2, 3, 5)), messages, wide, quiet)  # type: ignore[arg-type]
    assert_kept(wide, messages)
    assert_kept(opened(folder, (2, 3, 5)), messages)
    assert_kept(opened(folder, (5, 3)), messages)  # now from both kinds of shards


# ── full disk ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk_full_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """disk_full_after(n): from the n-th file on, only half a file is written and then there is no room."""
    plain = os.fdopen
    count = 0

    def use(limit: int) -> None:
        def opened_file(handle: int, mode: str) -> Any:
            nonlocal count
            count += 1
            file = plain(handle, mode)
            return file if count <= limit else Full(file)

        monkeypatch.setattr(cache_module.os, "fdopen", opened_file)

    yield use
    monkeypatch.undo()


class Full:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        self._file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error_and_leaves_nothing_that_is_read_back(tmp_path: Path, disk_full_after: Any) -> None:
    messages = messages_of(20)
    disk_full_after(1)
    cache = opened(tmp_path)
    with pytest.raises(EdgeError, match=r"cannot be kept in .*: No space left on device") as failure:
        collect(FakeTrunk((2, 5)), messages, cache, quiet)  # type: ignore[arg-type]
    assert "--cache" in failure.value.hint
    for left in (cache, opened(tmp_path)):
        assert_kept(left, messages[:8])
        assert not any(message_key(m) in left for m in messages[8:])
    assert len(list(shards(tmp_path)[0].parent.iterdir())) == 1


# ── a real model ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_states_of_a_model_are_kept_as_its_trunk_gives_them(tiny_path: TinyMaker, tmp_path: Path) -> None:
    messages = [[10, 11, 12], [13], [14, 15, 16, 17], [10, 12, 11]]
    options = TrunkOptions(n_tokens=6, n_messages=2, n_threads=1)
    with Model(str(tiny_path("llama", n_layer=3))) as model:
        trunk = Trunk(model, (1, 3), [5, 6, 7], options)
        cache = StateCache(tmp_path, (1, 3), trunk.n_embd, IDENTITY)
        collect(trunk, messages, cache, quiet)
        for message in messages:
            group = trunk.start([message])
            for layer in (1, 3):
                group.advance()
                for kind in POOLS:
                    rows = cache.read([message_key(message)], layer, kind)
                    assert (rows[0] == pool(group.states()[0], kind).astype(np.float16)).all(), (layer, kind)
        trunk.close()
