"""Small learnt state that outlives a restart: audit counts, costs of batches, whatever fits a JSON object.

Losing it costs time, not correctness. So nothing here raises: what cannot be loaded or saved is a reason to show.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import replacing

_FORMAT = "edge-runtime-state"
_MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class LoadedState:
    """What was saved last, or None, and then why, unless nothing was ever saved."""

    value: dict[str, Any] | None = None
    reason: str = ""


class StateFile:
    """A JSON object in a file of its own, of one kind and version. One process at a time may own it."""

    def __init__(self, path: Path, kind: str, version: int = 1) -> None:
        self.path, self.kind, self.version = path, kind, version
        self._on_disk: bytes | None = None  # what is known to be there

    def load(self) -> LoadedState:
        """What was saved last. Also removes what a killed process had begun to write."""
        self._remove_leftovers()
        self._on_disk = None
        try:
            data = _read(self.path)
        except FileNotFoundError:
            return LoadedState()
        except OSError as error:
            return LoadedState(None, f"{self.path} cannot be read: {error.strerror or error}")
        except ValueError as error:
            return LoadedState(None, f"{self.path} {error}")
        value, problem = _decode(data, self.kind, self.version)
        if problem:
            return LoadedState(None, f"{self.path} {problem}")
        self._on_disk = data
        return LoadedState(value)

    def save(self, value: Mapping[str, Any]) -> str:
        """Replace what was saved; "" if that succeeded, else why not, and then the old state is still there.

        Nothing is written if it is there already, which spares memory cards.
        """
        try:
            data = _encode(value, self.kind, self.version)
        except (TypeError, ValueError, RecursionError) as error:
            return f"state {self.kind} cannot be saved: {error}"
        if len(data) > _MAX_BYTES:
            return f"state {self.kind} cannot be saved: {len(data)} bytes are more than {_MAX_BYTES}"
        if data == self._on_disk and self.path.is_file():
            return ""
        try:
            with replacing(self.path) as file:
                file.write(data)
        except OSError as error:
            return f"{self.path} cannot be written: {error.strerror or error}"
        self._on_disk = data
        return ""

    def _remove_leftovers(self) -> None:
        with contextlib.suppress(OSError):
            for path in self.path.parent.glob(f".{glob.escape(self.path.name)}.*"):
                path.unlink()


def _read(path: Path) -> bytes:
    """Raises OSError, or ValueError in words that follow the file's name."""
    # a pipe at that place must not make the server wait
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("is not a file")
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"is larger than {_MAX_BYTES} bytes")
    return data


def _encode(value: Mapping[str, Any], kind: str, version: int) -> bytes:
    """A head that names format, kind, version and checksum, and the object: a line each."""
    payload = json.dumps(dict(value), allow_nan=False, sort_keys=True, separators=(",", ":"))
    if json.loads(payload) != dict(value):
        raise ValueError("JSON would change it")  # keys that are no texts, tuples
    head = {"format": _FORMAT, "kind": kind, "version": version, "sha256": _checksum(payload)}
    return f"{json.dumps(head)}\n{payload}\n".encode()


def _checksum(payload: str) -> str:
    return hashlib.sha256(payload.encode()).hexdigest()


def _decode(data: bytes, kind: str, version: int) -> tuple[dict[str, Any] | None, str]:
    """The object; or what is wrong, in words that follow the file's name."""
    try:
        first, payload, end = data.decode("utf-8").split("\n")
        head = json.loads(first)
    except (ValueError, RecursionError):
        return None, "is damaged"
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        return None, "is not a state of this program"
    if head.get("kind") != kind:
        return None, f"is of kind {reprlib.repr(head.get('kind'))}, not {kind!r}"
    if head.get("version") != version:
        return None, f"is of version {reprlib.repr(head.get('version'))}, this program knows {version}"
    if end or head.get("sha256") != _checksum(payload):
        return None, "is damaged"
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return None, "is damaged"
    return (value, "") if isinstance(value, dict) else (None, "is not an object")
