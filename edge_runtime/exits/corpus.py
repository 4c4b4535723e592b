"""What exit heads learn from, on disk: texts with hidden states at boundaries and the full model's distributions.

A corpus is a folder of shards; a shard holds the texts of some prompts in memory-mapped arrays, so that a corpus larger
than memory can be trained on. A shard is written whole or not at all and carries checksums; one that is damaged is
forgotten and collected again.

A shard has `n` rows, one per token of its texts, one text behind the other, and `m` targets: the rows whose next token
the full model was asked for.

    tokens      (n,)         int32     the token of a row
    offsets     (texts + 1,) int64     where each text begins
    prompts     (texts,)     int32     the number of the prompt that a text answers
    layer_E     (n, n_embd)  float16   hidden state behind E layers, before the final norm
    rows        (m,)         int64     the row that a target belongs to: the full model was asked for the token after it
    final       (m, n_embd)  float16   hidden state behind the last layer
    top_ids     (m, k)       int32     the k likeliest next tokens, likeliest first
    top_logp    (m, k)       float16   their log-probabilities at temperature 1; what is missing from 1 is the tail

The token that followed a target is that of the next row; the last target of an answer has none, because the answer
ended there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import replacing
from ..errors import EdgeError, PackError

_META = "shard.json"
_FORMAT = 1
_CHECKED_AT_ONCE = 2**22
_UNFINISHED = ".shard-"
_ABANDONED_SECONDS = 3600.0  # what was not finished by then never will be
_RESERVE_BYTES = 64 * 2**20  # of a disk, left to others

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """Memory-mapped arrays of one shard, by the names above."""

    path: Path
    arrays: dict[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    @property
    def n_rows(self) -> int:
        return len(self.arrays["tokens"])

    @property
    def n_targets(self) -> int:
        return len(self.arrays["rows"])

    def texts(self) -> Iterator[Text]:
        """The texts, in order."""
        offsets, rows = self.arrays["offsets"], self.arrays["rows"]
        edges = np.searchsorted(rows, offsets)
        for i, prompt in enumerate(self.arrays["prompts"]):
            yield Text(self, int(prompt), int(offsets[i]), int(offsets[i + 1]), int(edges[i]), int(edges[i + 1]))


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a shard: rows [start, end) and targets [first, last)."""

    shard: Shard
    prompt: int
    start: int
    end: int
    first: int
    last: int

    @property
    def target_rows(self) -> NDArray[np.int64]:
        """Positions within the text, (last - first,), whose next token is a target."""
        return np.asarray(self.shard["rows"][self.first : self.last] - self.start)

    def states(self, layer: int) -> NDArray[np.float16]:
        """(end - start, n_embd) behind `layer` layers; a memory map."""
        return self.shard[f"layer_{layer}"][self.start : self.end]

    def targets(self, name: str) -> Array:
        """Rows of `final`, `top_ids` or `top_logp` of this text; a memory map."""
        return self.shard[name][self.first : self.last]


class Corpus:
    """A folder of shards that belong to one model, one build and one way to collect."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """`identity` names all that decides what a shard holds; corpora of different identity lie in folders apart."""
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / name
        self.identity = identity

    def has(self, index: int) -> bool:
        return (self.folder / _name(index) / _META).is_file()

    def write(self, index: int, arrays: dict[str, Array]) -> None:
        """Keep a shard. Raises EdgeError if it cannot be written; then nothing is kept of it."""
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            identity = self.folder / "corpus.json"
            if not identity.exists():
                with replacing(identity) as out:
                    out.write(json.dumps(self.identity, indent=1, sort_keys=True).encode())
            temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=_UNFINISHED))
            sums = {}
            for key, array in arrays.items():
                with (temporary / f"{key}.npy").open("wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
                sums[key] = _checksum(temporary / f"{key}.npy")
            (temporary / _META).write_text(json.dumps({"format": _FORMAT, "crc32": sums}))
            target = self.folder / _name(index)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            raise EdgeError(
                f"hidden states cannot be kept in {self.folder}: {error.strerror or error}",
                "make room, or choose another folder with --cache; what was collected before is kept",
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def read(self, index: int) -> Shard:
        """A shard, its arrays memory-mapped. Raises PackError if it is missing or damaged."""
        folder = self.folder / _name(index)
        try:
            meta = json.loads((folder / _META).read_text())
            if meta["format"] != _FORMAT:
                raise ValueError(f"they have format {meta['format']}, not {_FORMAT}")
            sums = meta["crc32"]
            for key, expected in sums.items():
                if _checksum(folder / f"{key}.npy") != expected:
                    raise ValueError(f"{key}.npy is not what was written")
            arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in sums}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackError(
                f"the collected states in {folder} are damaged ({error})", "start again: they are collected anew"
            ) from error
        return Shard(folder, arrays)

    def check_room(self, n_bytes: int) -> None:
        """Raise EdgeError unless the disk has room for `n_bytes` more."""
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            raise EdgeError(f"{place} cannot be used: {error.strerror}", "choose another with --cache") from error
        if n_bytes + _RESERVE_BYTES > free:
            raise EdgeError(
                f"hidden states will take about {n_bytes / 2**20:,.0f} MiB, but {place} has only "
                f"{free / 2**20:,.0f} MiB free",
                "make room, choose another folder with --cache, or use fewer --prompts or --boundaries",
            )

    def _remove_abandoned(self) -> None:
        """Remove what a process that was killed left unfinished."""
        for folder in self.folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def drop(self, index: int) -> None:
        shutil.rmtree(self.folder / _name(index), ignore_errors=True)

    def sound(self, indices: Sequence[int]) -> list[Shard]:
        """Those of the shards that are there and undamaged; damaged ones are removed."""
        found = []
        for index in indices:
            if self.has(index):
                with contextlib.suppress(PackError):
                    found.append(self.read(index))
                    continue
                self.drop(index)
        return found


def _name(index: int) -> str:
    return f"{index:05d}"


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_CHECKED_AT_ONCE):
            crc = zlib.crc32(piece, crc)
    return crc
