"""Results of the stages of a calibration, kept as files, so that an interrupted one goes on where it was.

A file's name holds a hash of all that its content depends on: what was made from something else is not found, and never
mixed with what is. Files appear when they are whole, and one that is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import replacing
from ..errors import EdgeError
from .corpus import Array
from .evaluate import Predictions
from .head import HeadShape, HeadWeights
from .strict_json import dumps, loads

_VERSION = 1  # of what stages compute
_TEXT = "described"


class Stages:
    """A folder of results. `depends` tells all that they depend on in common."""

    def __init__(self, folder: Path, depends: dict[str, Any]) -> None:
        self.folder, self.depends = folder, depends

    def path(self, name: str, depends: dict[str, Any], suffix: str = ".npz") -> Path:
        """Where the result `name` of what is described by `depends` lies."""
        described = json.dumps([_VERSION, self.depends, depends], sort_keys=True, default=str)
        return self.folder / f"{name}-{hashlib.sha256(described.encode()).hexdigest()[:16]}{suffix}"

    def arrays(
        self, name: str, depends: dict[str, Any], make: Callable[[], tuple[dict[str, Array], Any]]
    ) -> tuple[dict[str, Array], Any]:
        """Arrays and a record that goes with them, kept or made now. Raises EdgeError if they cannot be written."""
        path = self.path(name, depends)
        try:
            # numpy leaves a file open that is no archive
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                found = {key: kept[key] for key in kept.files if key != _TEXT}
                return found, loads(kept[_TEXT].tobytes().decode())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        arrays, record = make()
        text = np.frombuffer(dumps(record).encode(), np.uint8)
        try:
            with replacing(path) as out:
                np.savez(out, **{_TEXT: text}, **arrays)  # type: ignore[arg-type]  # numpy's types ask for a flag
        except OSError as error:
            raise EdgeError(
                f"results cannot be kept in {self.folder}: {error.strerror or error}",
                "make room, or choose another folder with --cache; what was done before is kept",
            ) from error
        return arrays, loads(dumps(record))

    def record(self, name: str, depends: dict[str, Any], make: Callable[[], Any]) -> Any:
        """A record (what JSON can say), kept or made now."""
        return self.arrays(name, depends, lambda: ({}, make()))[1]


def weights_to_arrays(weights: HeadWeights) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays = {f"tensor {name}": value for name, value in weights.tensors.items()}
    return arrays | {"projection": weights.projection}, {"layer": weights.layer, "shape": asdict(weights.shape)}


def weights_from_arrays(arrays: dict[str, Array], described: dict[str, Any]) -> HeadWeights:
    tensors = {key.removeprefix("tensor "): value for key, value in arrays.items() if key.startswith("tensor ")}
    return HeadWeights(described["layer"], HeadShape(**described["shape"]), tensors, arrays["projection"])


def predictions_to_arrays(found: Predictions) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays: dict[str, Array] = {f"value {name}": column for name, column in found.values.items()}
    described: dict[str, Any] = {}
    for item in fields(found):
        value = getattr(found, item.name)
        if isinstance(value, np.ndarray):
            arrays[item.name] = value
        elif item.name != "values":
            described[item.name] = value
    return arrays, described


def predictions_from_arrays(arrays: dict[str, Array], described: dict[str, Any]) -> Predictions:
    values = {key.removeprefix("value "): column for key, column in arrays.items() if key.startswith("value ")}
    columns: dict[str, Any] = {key: column for key, column in arrays.items() if not key.startswith("value ")}
    # JSON has lists alone
    others: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in described.items()
    }
    return Predictions(**columns, **others, values=values)
