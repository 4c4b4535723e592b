"""Heads of a pack as files of their own, which llama.cpp needs; made on first use and kept in the cache.

A file's name ends with its checksum. It appears under that name when it is whole, so that processes that make the same
head at once cannot disturb each other, and one that does not match its name is damaged.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from ..cache import cache_dir
from ..errors import PackError
from ..identity import identify
from ..native import read_header
from ..types import Floats
from .head import output_rows
from .pack import ExitPack, why
from .packed_head import PackedHead

_FORMAT = 2
_PIECE = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # none: numpy's, of a tensor written in part


def split(pack: ExitPack, model_path: Path | str) -> tuple[Path, ...]:
    """Files of the pack's heads, in the order of its boundaries.

    They lie in the cache, or, where that cannot be written, in a temporary folder of this process. Raises PackError if
    the pack is for another model or build, or if there is no room for the files; a ModelError if the model's output
    matrix cannot be read.
    """
    pack.check_model(identify(Path(model_path)))
    key = hashlib.sha256(f"{_FORMAT}\n{pack.digest}\n{pack.model.sha256}".encode()).hexdigest()[:32]
    found = [_find(cache_dir() / "heads" / key, head) for head in pack.heads]
    if None not in found:
        return tuple(path for path in found if path)
    n_vocab = read_header(str(model_path)).n_vocab  # 0 without a tokenizer
    if n_vocab and int(pack.shortlist.max()) >= n_vocab:
        raise PackError(
            f"the exit pack '{pack.name}' names token {pack.shortlist.max()}, the model has {n_vocab}",
            "make it again with `edge-run calibrate`",
        )
    rows = output_rows(model_path, pack.shortlist)
    return tuple(path or _make(key, head, rows) for path, head in zip(found, pack.heads, strict=True))


def _find(folder: Path, head: PackedHead) -> Path | None:
    """The head's file, if there is a sound one; damaged ones are removed."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(f"layer-{head.layer}-*.gguf")):
            with contextlib.suppress(OSError):
                if path.name == _name(head, path):
                    return path
                path.unlink()
    return None


def _name(head: PackedHead, path: Path) -> str:
    """What the file `path` of a head is to be called. Raises OSError."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return f"layer-{head.layer}-{crc:08x}.gguf"


def _make(key: str, head: PackedHead, rows: Floats) -> Path:
    try:
        try:
            return _write(cache_dir() / "heads" / key, head, rows)
        except OSError as error:
            if error.errno in _FULL:
                raise
        folder = _temporary() / key
        return _find(folder, head) or _write(folder, head, rows)
    except OSError as error:
        where = cache_dir() if error.errno in _FULL else tempfile.gettempdir()
        raise PackError(
            f"the heads of an exit pack cannot be written to {where}: {why(error)}",
            "make room there, or name another folder in EDGE_RUNTIME_CACHE",
        ) from error


def _write(folder: Path, head: PackedHead, rows: Floats) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as private:
        made = Path(private, "head.gguf")
        head.write(made, rows)
        path = folder / _name(head, made)
        os.replace(made, path)
    return path


@functools.cache
def _temporary() -> Path:
    """A folder of this process, removed when it ends."""
    folder = tempfile.mkdtemp(prefix="edge-runtime-heads-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
