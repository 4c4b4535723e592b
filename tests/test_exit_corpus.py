"""Shards on disk: what is read is what was written, damage is found, a full disk is explained."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime.errors import EdgeError, PackError
from edge_runtime.exits.corpus import Array, Corpus


def arrays() -> dict[str, Array]:
    """Two texts of 3 and 2 rows; the first has targets at its rows 1 and 2, the second at its row 0."""
    return {
        "tokens": np.arange(5, dtype=np.int32),
        "offsets": np.array([0, 3, 5], np.int64),
        "prompts": np.array([7, 9], np.int32),
        "layer_2": np.arange(20, dtype=np.float16).reshape(5, 4),
        "rows": np.array([1, 2, 3], np.int64),
        "final": np.arange(12, dtype=np.float16).reshape(3, 4),
        "top_ids": np.arange(6, dtype=np.int32).reshape(3, 2),
        "top_logp": -np.arange(6, dtype=np.float16).reshape(3, 2),
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path, {"model": "m", "seed": 0})


def test_a_shard_comes_back_mapped(corpus: Corpus) -> None:
    assert not corpus.has(3)
    corpus.write(3, arrays())
    assert corpus.has(3)
    shard = corpus.read(3)
    for name, array in arrays().items():
        assert isinstance(shard[name], np.memmap)
        assert shard[name].dtype == array.dtype
        assert np.array_equal(shard[name], array)
    assert (shard.n_rows, shard.n_targets) == (5, 3)
    assert json.loads((corpus.folder / "corpus.json").read_text()) == {"model": "m", "seed": 0}


def test_texts_have_their_rows_and_targets(corpus: Corpus) -> None:
    corpus.write(0, arrays())
    first, second = corpus.read(0).texts()
    assert (first.prompt, second.prompt) == (7, 9)
    assert first.target_rows.tolist() == [1, 2]
    assert second.target_rows.tolist() == [0]
    assert second.states(2)[0].tolist() == [12, 13, 14, 15]
    assert second.targets("top_ids").tolist() == [[4, 5]]


def test_other_identities_lie_apart(tmp_path: Path, corpus: Corpus) -> None:
    corpus.write(0, arrays())
    assert not Corpus(tmp_path, {"model": "m", "seed": 1}).has(0)
    assert Corpus(tmp_path, {"seed": 0, "model": "m"}).has(0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: flip(f / "layer_2.npy"),
        lambda f: (f / "final.npy").unlink(),
        lambda f: (f / "shard.json").write_text("{"),
        lambda f: (f / "shard.json").write_text('{"format": 1, "crc32": []}'),
        lambda f: (f / "shard.json").write_text('{"format": 2, "crc32": {}}'),
        lambda f: os.truncate(f / "tokens.npy", 10),
    ],
)
def test_damage_is_found_and_removed(corpus: Corpus, damage: Callable[[Path], object]) -> None:
    corpus.write(0, arrays())
    corpus.write(1, arrays())
    damage(corpus.folder / "00001")
    with pytest.raises(PackError, match="damaged"):
        corpus.read(1)
    assert [shard.path.name for shard in corpus.sound([0, 1, 2])] == ["00000"]
    assert not corpus.has(1)


def test_a_full_disk_leaves_what_was_there(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write(0, arrays())
    calls = []

    def full(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(EdgeError, match="No space left on device"):
        corpus.write(1, arrays())
    assert {path.name for path in corpus.folder.iterdir()} == {"00000", "corpus.json"}


def test_an_interruption_leaves_nothing_behind(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        corpus.write(0, arrays())
    assert list(corpus.folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed(corpus: Corpus) -> None:
    old, new = corpus.folder / ".shard-old", corpus.folder / ".shard-new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (time.time() - 10_000,) * 2)
    corpus.write(0, arrays())
    assert not old.exists()
    assert new.exists()  # another process may be writing it


def test_room_is_checked(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.check_room(0)  # the folder need not exist
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=164 * 2**20))
    corpus.check_room(100 * 2**20)
    with pytest.raises(EdgeError, match=r"about 101 MiB, but .* has only 164 MiB free"):
        corpus.check_room(101 * 2**20)


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="cannot be kept"):
        Corpus(tmp_path / "file", {}).write(0, arrays())
