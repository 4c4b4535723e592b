"""Files that can be made again: where they are kept, and how they are written so that no half of one is ever read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import ModelUnreadableError

_ENV = "EDGE_RUNTIME_CACHE"
_PIECE = 2**20


def cache_dir() -> Path:
    """$EDGE_RUNTIME_CACHE, else edge-runtime in the user's cache directory; it need not exist."""
    own = os.environ.get(_ENV)
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "edge-runtime"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when all is written, and leaves no trace if anything fails.

    Raises OSError, for example when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # a temporary file is for its owner alone
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    return mask


def model_hash(path: Path) -> str:
    """SHA-256 of a model file, in hexadecimal; remembered for as long as the file's size and times stay the same.

    Raises ModelUnreadableError.
    """
    try:
        status = path.stat()
        identity = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ctime_ns}\n{status.st_ino}"
        remembered = cache_dir() / "hashes" / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
        with contextlib.suppress(OSError):
            known = remembered.read_text("ascii", "replace")
            if re.fullmatch("[0-9a-f]{64}", known):
                return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise ModelUnreadableError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    with contextlib.suppress(OSError), replacing(remembered) as out:  # a full or read-only disk costs only the time
        out.write(digest.hexdigest().encode())
    return digest.hexdigest()
