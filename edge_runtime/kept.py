"""Measurements that are made once and kept: a JSON file each, by all that the measurement depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .cache import cache_dir, replacing

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kept:
    """Where one measurement is kept."""

    folder: str  # below the cache's, one for each kind of measurement
    format: int  # of the payload; what is kept in another one is measured anew
    key: Mapping[str, object]  # all that the measurement depends on, as JSON takes it

    @property
    def path(self) -> Path:
        """The file, which need not exist."""
        digest = hashlib.sha256(_text(self.key).encode()).hexdigest()
        return cache_dir() / self.folder / f"{digest[:32]}.json"

    @property
    def _heading(self) -> dict[str, object]:
        """What the file says of itself before the payload."""
        return {"kind": self.folder, "format": self.format, "key": dict(self.key)}

    def read(self, parse: Callable[[Any], T]) -> T | None:
        """What `parse` makes of the payload, any JSON; None of a file that is not there, damaged or of something else.

        `parse` raises ValueError, TypeError or LookupError for a payload that is none.
        """
        try:
            record = json.loads(self.path.read_bytes())
            payload = record.pop("payload")
            return parse(payload) if _text(record) == _text(self._heading) else None
        except (OSError, OverflowError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return None

    def write(self, payload: object) -> None:
        """Keep a payload. A disk that is full or read-only costs only the time to measure again."""
        record = {**self._heading, "payload": payload}
        with contextlib.suppress(OSError), replacing(self.path) as out:
            out.write(json.dumps(record, indent=1).encode())


def _text(key: object) -> str:
    return json.dumps(key, sort_keys=True)
