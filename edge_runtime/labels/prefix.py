"""The computed instruction, kept in a file over restarts: per slice, its KV cache and its states behind the slice.

A file is used only if model, library, slice and tokens are those it was made with and its checksum is right. It is
named by all of them, so that a stale file is simply another file; whatever is wrong with one, it is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..cache import replacing
from ..errors import DecodeError
from ..slices import Slice
from ..types import Floats

_MAGIC = b"EDGEPREFIX1\n"
_MAX_FILES = 64  # of all models and packs together; the oldest go


class PrefixStore:
    """Saved prefixes in `folder`, of the model with `model_hash` computed by the library `build`."""

    def __init__(self, folder: Path, model_hash: str, build: str) -> None:
        self._folder, self._model_hash, self._build = folder, model_hash, build
        self.loaded = 0  # slices whose prefix came from a file

    def load(self, piece: Slice, prefix: Sequence[int]) -> Floats | None:
        """Fill the slice's sequence 0; the states (n, n_embd) behind it, None if there is no sound file."""
        identity = self._identity(piece, prefix)
        try:
            data = self._path(identity).read_bytes()
            if not data.startswith(_MAGIC):
                return None
            line, _, body = data[len(_MAGIC) :].partition(b"\n")
            head = json.loads(line)
            states_bytes = 4 * len(prefix) * piece.n_embd
            if head != {**identity, "crc32": zlib.crc32(body), "bytes": len(body)} or len(body) < states_bytes:
                return None
            piece.load_state(body[states_bytes:])
        except (OSError, ValueError, DecodeError):
            return None
        self.loaded += 1
        return np.frombuffer(body[:states_bytes], np.float32).reshape(len(prefix), piece.n_embd)

    def save(self, piece: Slice, prefix: Sequence[int], states: Floats) -> None:
        """Write the slice's sequence 0; a disk that is full or read-only costs the file and nothing else."""
        identity = self._identity(piece, prefix)
        body = states.astype(np.float32).tobytes() + piece.save_state()
        head = json.dumps({**identity, "crc32": zlib.crc32(body), "bytes": len(body)})
        with contextlib.suppress(OSError):
            with replacing(self._path(identity)) as file:
                file.write(_MAGIC + head.encode() + b"\n" + body)
            self._drop_oldest()

    def _identity(self, piece: Slice, prefix: Sequence[int]) -> dict[str, object]:
        tokens = hashlib.sha256(np.asarray(prefix, np.int32).tobytes()).hexdigest()
        layers = [piece.start, piece.end]
        return {"model": self._model_hash, "build": self._build, "layers": layers, "tokens": tokens, "n": len(prefix)}

    def _path(self, identity: dict[str, object]) -> Path:
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        return self._folder / f"{name}.prefix"

    def _drop_oldest(self) -> None:
        files = sorted(self._folder.glob("*.prefix"), key=lambda path: path.stat().st_mtime)
        for path in files[:-_MAX_FILES]:
            path.unlink()
