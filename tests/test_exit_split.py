"""Heads of a pack are split once, checked each time, and are the pack's numbers bit for bit."""

from __future__ import annotations

import dataclasses
import os
import resource
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from edge_runtime.errors import ModelError, PackError
from edge_runtime.exits import split as split_module
from edge_runtime.exits.head import HeadContext, output_rows, write_head
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.packed_head import PackedHead
from edge_runtime.exits.quantised import Quantised
from edge_runtime.exits.split import split
from edge_runtime.types import Floats

from .conftest import TinyMaker
from .exit_fakes import random_pack


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    split_module._temporary.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", n_layer=5)


@pytest.fixture(scope="module")
def pack(model_path: Path) -> ExitPack:
    return random_pack(model_path)


def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedHead, "write", lambda *_: pytest.fail("a head was written"))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def logits_of(path: Path, n_embd: int = 64) -> Floats:
    states = np.random.default_rng(5).standard_normal((6, n_embd)).astype(np.float32)
    head = HeadContext(path, n_ctx=16, n_threads=1)
    try:
        rows = []
        for first, n in ((0, 4), (4, 1), (5, 1)):
            head.decode(states[first : first + n], first, [n - 1])
            rows.append(np.array(head.logits(n - 1)))
        return np.stack(rows)
    finally:
        head.close()


# ── what is in the files ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q8_0", "F16"])
def test_a_split_head_says_what_a_head_of_the_same_numbers_says(
    model_path: Path, tmp_path: Path, quantisation: str
) -> None:
    """Written once through the pack, file and split, once directly from what the quantised numbers stand for."""
    random_pack(model_path, quantisation=quantisation).save(tmp_path / "p.gguf")
    pack = ExitPack.load(tmp_path / "p.gguf")
    rows = output_rows(model_path, pack.shortlist)
    for path, head in zip(split(pack, model_path), pack.heads, strict=True):
        weights = head.weights
        direct = tmp_path / "direct.gguf"
        # rounding again finds the same blocks for 16 and 8 bits; at 4 bits the largest value of a block decides
        matrices = weights.tensors if quantisation != "Q4_0" else head.tensors
        write_head(direct, head.shape, matrices, weights.table(rows), "F16" if quantisation == "F16" else "Q8_0")
        expected, found = logits_of(direct), logits_of(path)
        assert found.shape == (3, 65)
        assert np.abs(found).max() > 1
        assert (found == expected).all()


def test_matrices_pass_through_unchanged(pack: ExitPack, model_path: Path) -> None:
    for path, head in zip(split(pack, model_path), pack.heads, strict=True):
        written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for name in head.shape.matrices:
            found = head.tensors[name]
            assert isinstance(found, Quantised)
            assert written[name].tensor_type.name == "Q8_0"
            assert np.asarray(written[name].data).tobytes() == found.data.tobytes()
        for name in head.shape.norms:
            assert (written[name].data == head.tensors[name]).all()


def test_the_table_is_of_the_model_s_own_rows(pack: ExitPack, model_path: Path) -> None:
    head = pack.heads[1]
    (_, path) = split(pack, model_path)
    (table,) = (t for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    found = Quantised("Q8_0", np.array(table.data)).floats
    expected = output_rows(model_path, pack.shortlist) @ head.projection.astype(np.float32)
    assert table.tensor_type.name == "Q8_0"
    assert found[:-1] == pytest.approx(expected, abs=float(np.abs(expected).max()) / 100)
    assert found[-1] == pytest.approx(head.tensors["other"], abs=0.01)


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_heads_are_split_once(pack: ExitPack, model_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = split(pack, model_path)
    assert [path.name[:8] for path in first] == ["layer-2-", "layer-4-"]
    assert all(path.is_relative_to(cache / "heads") for path in first)
    assert files_of(cache / "heads") == sorted(str(path.relative_to(cache / "heads")) for path in first)
    forbid_writing(monkeypatch)
    assert split(pack, model_path) == first
    assert split(random_pack(model_path), str(model_path)) == first


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_head_is_made_again(pack: ExitPack, model_path: Path, cache: Path, damage: str) -> None:
    first = split(pack, model_path)
    data = first[0].read_bytes()
    changed = {
        "flipped": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "cut": data[:-1000],
        "empty": b"",
    }
    if damage == "gone":
        first[0].unlink()
    else:
        first[0].write_bytes(changed[damage])
    untouched = first[1].stat().st_mtime_ns
    assert split(pack, model_path) == first
    assert first[0].read_bytes() == data
    assert first[1].stat().st_mtime_ns == untouched
    assert len(files_of(cache / "heads")) == 2


def test_a_file_of_another_name_is_removed_and_its_head_made_again(pack: ExitPack, model_path: Path) -> None:
    first = split(pack, model_path)
    wrong = first[0].with_name("layer-2-00000000.gguf")
    first[0].rename(wrong)
    assert split(pack, model_path) == first
    assert not wrong.exists()


def test_heads_of_two_packs_never_mix(pack: ExitPack, model_path: Path, tiny_path: TinyMaker) -> None:
    other_model = tiny_path("llama", n_layer=5, n_ff=64)
    packs = [
        (pack, model_path),
        (random_pack(model_path, seed=1), model_path),
        (random_pack(model_path, quantisation="Q4_0"), model_path),
        (dataclasses.replace(pack, shortlist=pack.shortlist[::-1].copy()), model_path),
        (random_pack(other_model), other_model),
    ]
    folders = [{path.parent for path in split(one, model)} for one, model in packs]
    assert all(len(folder) == 1 for folder in folders)
    assert len(set.union(*folders)) == len(packs)


def test_many_threads_split_at_once(pack: ExitPack, model_path: Path, cache: Path) -> None:
    barrier = threading.Barrier(4)
    found: list[tuple[Path, ...]] = []

    def work() -> None:
        barrier.wait()
        for _ in range(3):
            found.append(split(pack, model_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len(set(found)) == 1
    assert len(files_of(cache / "heads")) == 2
    assert os.listdir(found[0][0].parent) != []


def test_another_who_is_first_is_no_trouble(
    pack: ExitPack, model_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the same heads between this one's look and its writing."""
    write, others = PackedHead.write, iter([True])

    def raced(self: PackedHead, path: Path, rows: Floats) -> None:
        if next(others, False):
            split(pack, model_path)
        write(self, path, rows)

    monkeypatch.setattr(PackedHead, "write", raced)
    found = split(pack, model_path)
    assert len(files_of(cache / "heads")) == 2
    monkeypatch.setattr(PackedHead, "write", write)
    assert split(pack, model_path) == found


# ── places that cannot be written ───────────────────────────────────────────────────────────────────────────────────


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Making folders below `folder` fails with error `number`: read-only permissions do not hold back root."""
    mkdir = Path.mkdir

    def refused(self: Path, *arguments: Any, **options: Any) -> None:
        if self.is_relative_to(folder):
            raise OSError(number, os.strerror(number))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)


@pytest.mark.parametrize("number", [13, 30])
def test_without_a_cache_heads_go_to_a_temporary_folder(
    pack: ExitPack, model_path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    refuse(monkeypatch, cache, number)
    found = split(pack, model_path)
    assert all(path.is_relative_to(tmp_path / "temporary") for path in found)
    assert logits_of(found[0]).shape == (3, 65)
    forbid_writing(monkeypatch)
    assert split(pack, model_path) == found


def test_a_file_in_place_of_the_cache_is_no_obstacle(pack: ExitPack, model_path: Path, cache: Path) -> None:
    cache.touch()
    assert all(path.exists() for path in split(pack, model_path))


def test_without_a_temporary_folder_it_is_said(
    pack: ExitPack, model_path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    refuse(monkeypatch, cache, 30)
    with pytest.raises(PackError, match=r"heads of an exit pack cannot be written to .*none: No such file") as failure:
        split(pack, model_path)
    assert "EDGE_RUNTIME_CACHE" in failure.value.hint


@pytest.mark.parametrize("number", [28, 122])
def test_a_full_disk_is_said_and_leaves_nothing(
    pack: ExitPack, model_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(split_module, "_temporary", lambda: pytest.fail("a full disk is not to be hidden"))
    with pytest.raises(PackError, match=rf"cannot be written to {cache}: {os.strerror(number)}") as failure:
        split(pack, model_path)
    assert "make room" in failure.value.hint
    assert files_of(cache / "heads") == []


@pytest.mark.parametrize("missing", [1, 1000, 30_000, 62_000])
def test_a_disk_that_fills_on_the_way_is_said_and_leaves_no_part(
    pack: ExitPack, model_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """Of what is missing at a file's very end, numpy says nothing."""
    sizes = [path.stat().st_size for path in split(pack, model_path)]
    for path in sorted((cache / "heads").rglob("layer-*")):
        path.unlink()
    monkeypatch.setattr(split_module, "_temporary", lambda: pytest.fail("a full disk is not to be hidden"))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] - missing, old[1]))
    try:
        with pytest.raises(PackError, match=r"cannot be written to .*: (No space left|File too large)"):
            split(pack, model_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert files_of(cache / "heads") == []
    assert len(split(pack, model_path)) == 2


# ── what cannot be split ────────────────────────────────────────────────────────────────────────────────────────────


def test_another_model_or_build_is_refused(pack: ExitPack, model_path: Path, tiny_path: TinyMaker) -> None:
    with pytest.raises(PackError, match="n_layer is 3 instead of 5"):
        split(pack, tiny_path("llama", n_layer=3))
    with pytest.raises(PackError, match="made with another build: x"):
        split(random_pack(model_path, library="x"), model_path)


def test_a_token_that_the_model_lacks_is_refused(tiny_path: TinyMaker, model_path: Path, cache: Path) -> None:
    def with_token(path: Path, token: int) -> ExitPack:
        pack = random_pack(path)
        return dataclasses.replace(pack, shortlist=np.concatenate([np.int32([token]), pack.shortlist[1:]]))

    spoken = tiny_path("llama", n_layer=5, tokenizer=True)
    with pytest.raises(PackError, match="names token 512, the model has 512"):
        split(with_token(spoken, 512), spoken)
    with pytest.raises(ModelError, match="output matrix"):  # a model without a vocabulary does not say how many
        split(with_token(model_path, 512), model_path)
    assert not (cache / "heads").exists()


def test_every_size_of_a_pack_is_split(tiny_path: TinyMaker) -> None:
    cases: Sequence[tuple[dict[str, Any], tuple[int, ...], int]] = [
        ({"n_layer": 3, "n_embd": 48}, (1,), 2),
        ({"n_layer": 3, "weights": "Q8_0"}, (1, 2), 33),
        ({"n_layer": 3}, (2,), 513),
    ]
    for changes, boundaries, n_rows in cases:
        path = tiny_path("llama", **changes)
        found = split(random_pack(path, boundaries, n_rows), path)
        assert len(found) == len(boundaries)
        assert logits_of(found[0], changes.get("n_embd", 64)).shape == (3, n_rows)
