"""Files that can be made again are there whole or not at all, and a model's hash is remembered while it is true."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import cache
from edge_runtime.cache import cache_dir, model_hash, replacing
from edge_runtime.errors import ModelUnreadableError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(folder))
    return folder


# ── where ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", "relative")
    assert cache_dir() == Path.cwd() / "relative"
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "edge-runtime"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "edge-runtime"
    assert not cache_dir().exists()


# ── replacing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
    with replacing(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: BaseException, old: bytes | None
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    if old is not None:
        path.write_bytes(old)

    def write_half() -> None:
        with replacing(path) as file:
            file.write(b"half of it")
            raise failure

    with pytest.raises(type(failure)):
        write_half()
    assert os.listdir(path.parent) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, step, full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "file") as file:
        file.write(b"all of it")
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"), replacing(tmp_path / "file") as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["file"]
    assert os.listdir(tmp_path / "file") == ["inside"]


def test_others_may_read_what_is_written_if_the_umask_lets_them(tmp_path: Path) -> None:
    """A pack that one user trains is for others, too."""
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


# ── model hash ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Reads:
    """Counts how often files are opened for reading their bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        plain = Path.open

        def counted(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            self.n += mode == "rb"
            return plain(path, mode, *rest, **more)

        monkeypatch.setattr(Path, "open", counted)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights" * 400_000)  # more than is read at once
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hash_is_computed_once(model: Path, reads: Reads) -> None:
    expected = digest(model)
    reads.n = 0
    assert [model_hash(model) for _ in range(3)] == [expected] * 3
    assert reads.n == 1


def test_the_hash_is_computed_again_when_the_file_changes(model: Path) -> None:
    before = model_hash(model)
    model.write_bytes(b"WEIGHTS" * 400_000)
    os.utime(model, ns=(0, model.stat().st_mtime_ns + 10**9))
    assert model_hash(model) == digest(model) != before


def test_setting_the_time_back_hides_no_change(model: Path) -> None:
    status = model.stat()
    before = model_hash(model)
    model.write_bytes(b"WEIGHTS" * 400_000)
    for _ in range(10**6):  # until the clock of the file system ticks
        os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
        if model.stat().st_ctime_ns != status.st_ctime_ns:
            break
    assert model.stat().st_mtime_ns == status.st_mtime_ns
    assert model_hash(model) == digest(model) != before


def test_a_file_that_takes_its_place_has_its_own_hash(model: Path, tmp_path: Path) -> None:
    before, status = model_hash(model), model.stat()
    other = tmp_path / "other"
    other.write_bytes(b"WEIGHTS" * 400_000)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, model)
    assert model_hash(model) == digest(model) != before


def test_two_names_of_one_file_share_a_hash_and_two_files_do_not(model: Path, tmp_path: Path, reads: Reads) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(b"other")
    reads.n = 0
    assert model_hash(link) == model_hash(model)
    assert reads.n == 1
    assert model_hash(copy) != model_hash(model)


@pytest.mark.parametrize(
    "content",
    [b"", b"0" * 63, b"\xff" * 64, b"no hash, though as long as one: " + b"." * 32],
    ids=["empty", "short", "not ASCII", "not hexadecimal"],
)
def test_a_damaged_memory_is_not_believed(model: Path, own_cache: Path, content: bytes) -> None:
    model_hash(model)
    (remembered,) = (own_cache / "hashes").iterdir()
    remembered.write_bytes(content)
    assert model_hash(model) == digest(model)
    assert remembered.read_text() == digest(model)


def test_a_full_disk_costs_only_the_memory(
    model: Path, own_cache: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    expected = digest(model)
    reads.n = 0
    assert [model_hash(model), model_hash(model)] == [expected] * 2
    assert reads.n == 2
    assert os.listdir(own_cache / "hashes") == []


def test_a_cache_that_cannot_be_a_folder_costs_only_the_memory(model: Path, own_cache: Path) -> None:
    own_cache.write_text("a file")
    assert model_hash(model) == digest(model)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadableError, match=r"none\.gguf cannot be read: No such file"):
        model_hash(tmp_path / "none.gguf")
    with pytest.raises(ModelUnreadableError, match="cannot be read: Is a directory"):
        model_hash(tmp_path)
