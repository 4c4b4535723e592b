"""Pooled hidden states of many messages, computed once and kept on disk: the inputs of probes.

Of each message and layer: the mean and the maximum over its tokens, and the last token's state. They lie in shards of
256 messages, float16, named by what they hold. A shard is written whole or not at all and carries a checksum; one that
is damaged is forgotten and computed again.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import replacing
from ..errors import EdgeError
from ..types import Floats
from .trunk import Trunk

POOLS = ("mean", "max", "last")
_MAGIC = b"EDGESTATES1\n"
_SHARD = 256  # messages
_KEY_BYTES = 16
_FLOAT16_MAX = 65504.0

Halves = NDArray[np.float16]
Progress = Callable[[int, int], None]


def pool(states: Floats, kind: str) -> Floats:
    """(n_tokens, n_embd) → (n_embd,)."""
    if kind == "mean":
        return np.asarray(states.mean(axis=0))
    return np.asarray(states.max(axis=0) if kind == "max" else states[-1])


def message_key(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=_KEY_BYTES).digest()


def _checksum(head: dict[str, Any], body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(json.dumps({**head, "crc32": 0}, sort_keys=True).encode()))


class StateCache:
    """Pooled states on disk: those of one model, build, prefix and set of layers share a folder."""

    def __init__(self, folder: Path, layers: tuple[int, ...], n_embd: int, identity: dict[str, Any]) -> None:
        """Finds what earlier runs left there."""
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        self.folder, self.layers, self.n_embd = folder / name, layers, n_embd
        self._identity = identity
        self._places: dict[bytes, tuple[Path, int, int, int]] = {}  # key → file, offset, row, index of the layers
        self._layer_lists: list[tuple[int, ...]] = []
        for path in sorted(self.folder.glob("*.states")):
            self._index(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def _index(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            line, _, body = data[len(_MAGIC) :].partition(b"\n")
            head = json.loads(line)
            sound = data.startswith(_MAGIC) and head["crc32"] == _checksum(head, body) and head["n_embd"] == self.n_embd
            n, layers = int(head["n"]), tuple(head["layers"])
            if not sound or not set(self.layers) <= set(layers):
                return
        except (OSError, ValueError, KeyError, TypeError):
            return
        offset = len(data) - len(body) + n * _KEY_BYTES
        self._layer_lists.append(layers)
        for row in range(n):
            key = body[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]
            self._places[key] = (path, offset, row, len(self._layer_lists) - 1)

    def add(self, keys: Sequence[bytes], values: Halves) -> None:
        """Keep values (n, n_layers, n_pools, n_embd) of messages; n is at most a shard.

        Raises EdgeError if they cannot be written; then nothing is kept of them.
        """
        body = b"".join(keys) + values.tobytes()
        head = {"n": len(keys), "layers": self.layers, "n_embd": self.n_embd, "crc32": 0}
        head["crc32"] = _checksum(head, body)
        name = hashlib.sha256(b"".join(keys) + repr(self.layers).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.states"
        try:
            with replacing(path) as file:
                file.write(_MAGIC + json.dumps(head).encode() + b"\n" + body)
        except OSError as error:
            raise EdgeError(
                f"hidden states cannot be kept in {self.folder}: {error.strerror}",
                "make room, or choose another folder with --cache; what was computed before is kept",
            ) from error
        self._index(path)

    def read(self, keys: Sequence[bytes], layer: int, kind: str) -> Floats:
        """Pooled states (n, n_embd) at a layer. Raises KeyError for a message that is not kept."""
        out = np.empty((len(keys), self.n_embd), np.float32)
        by_file: dict[Path, list[int]] = {}
        for i, key in enumerate(keys):
            by_file.setdefault(self._places[key][0], []).append(i)
        for path, members in by_file.items():
            _, offset, _, which = self._places[keys[members[0]]]
            layers = self._layer_lists[which]
            rows = [self._places[keys[i]][2] for i in members]
            size = len(layers) * len(POOLS) * self.n_embd
            mapped = np.memmap(path, np.float16, "r", offset)
            values = mapped[: len(mapped) // size * size].reshape(-1, len(layers), len(POOLS), self.n_embd)
            out[members] = values[rows, layers.index(layer), POOLS.index(kind)]
        return out


def collect(trunk: Trunk, messages: Sequence[Sequence[int]], cache: StateCache, progress: Progress) -> None:
    """Compute and keep the pooled states of messages (tokens each) that are not kept yet; `progress(done, all)`.

    Interrupted, it loses one shard at most. Raises EdgeError if the disk is full.
    """
    keys = [message_key(message) for message in messages]
    missing = list({key: i for i, key in enumerate(keys) if key not in cache}.values())
    done = len(messages) - len(missing)
    for start in range(0, len(missing), _SHARD):
        members = missing[start : start + _SHARD]
        values = np.empty((len(members), len(cache.layers), len(POOLS), cache.n_embd), np.float16)
        row = 0
        for part in groups([messages[i] for i in members], trunk):
            _pool_group(trunk, part, values[row : row + len(part)])
            row += len(part)
            progress(done + start + row, len(messages))
        cache.add([keys[i] for i in members], values)


def groups(messages: Sequence[Sequence[int]], trunk: Trunk) -> Iterator[list[Sequence[int]]]:
    """Consecutive messages, as many at a time as the trunk takes in."""
    part: list[Sequence[int]] = []
    n_tokens = 0
    for message in messages:
        if part and (len(part) == trunk.options.n_messages or n_tokens + len(message) > trunk.options.n_tokens):
            yield part
            part, n_tokens = [], 0
        part.append(message)
        n_tokens += len(message)
    if part:
        yield part


def _pool_group(trunk: Trunk, messages: list[Sequence[int]], out: Halves) -> None:
    group = trunk.start(messages)
    for level in range(len(trunk.edges)):
        group.advance()
        for row, states in enumerate(group.states()):
            for place, kind in enumerate(POOLS):
                out[row, level, place] = np.clip(pool(states, kind), -_FLOAT16_MAX, _FLOAT16_MAX)
