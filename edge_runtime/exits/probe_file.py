"""Semantic entropy probes of one model in a small JSON file: a probe per boundary that was tried.

The file names the model it was made for by hash, and the build of llama.cpp, as an exit pack does; a checksum tells
damage. Vectors are float32 in base64.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import replacing
from ..errors import EdgeError, PackError, UsageError
from ..identity import ModelIdentity, difference
from ..semantic.probe import Probe
from ..types import Floats, check_boundaries
from .pack import this_library, why
from .strict_json import dumps, loads

SUFFIX = ".probe.json"
MAX_BYTES = 2**26
_FORMAT, _VERSION = "edge-probe", 1
_VECTORS = ("weights", "mean", "scale")
_WHOLE = ("layer", "n_prompts", "n_high")
_NUMBERS = ("bias", "threshold", "penalty", "loss", "auroc")
_MAKE = "make one with `edge-run calibrate --probe`"
_AGAIN = "copy it again, or make it again with `edge-run calibrate --probe`"


@dataclass(frozen=True, slots=True, eq=False)
class ProbeFile:
    """Probes of one model, and what they are worth. Raises ValueError if its parts do not fit together."""

    name: str
    model: ModelIdentity
    library: str
    chosen: int  # the layer of the probe that did best in cross-validation
    probes: tuple[Probe, ...]  # by layer, increasing
    report: dict[str, Any]

    def __post_init__(self) -> None:
        layers = tuple(probe.layer for probe in self.probes)
        check_boundaries(layers, self.model.n_layer)
        if self.chosen not in layers:
            raise ValueError(f"there is no probe behind layer {self.chosen}")
        for probe in self.probes:
            if probe.n_embd != self.model.n_embd:
                raise ValueError(f"a probe is {probe.n_embd} wide, the model {self.model.n_embd}")

    def check_model(self, found: ModelIdentity) -> None:
        """Raise PackError, saying what differs, unless `found` is the probe's model and this its build."""
        what = difference(self.model, found)
        if what is not None:
            raise PackError(
                f"the probe '{self.name}' is for {self.model}, this is {what}: {found}",
                "name the right model with --model, or make a probe for this one with `edge-run calibrate --probe`",
            )
        if (library := this_library()) != self.library:
            raise PackError(
                f"the probe '{self.name}' was made with another build: {self.library}, this is {library}",
                "make it again with `edge-run calibrate --probe`",
            )

    def at(self, layers: Sequence[int]) -> Probe:
        """The probe to use where states are seen behind `layers`: the chosen one, else the best of those there are.

        Raises UsageError if there is none.
        """
        found = [probe for probe in self.probes if probe.layer in layers]
        if not found:
            raise UsageError(
                f"the probe '{self.name}' reads states behind layers {_listed(p.layer for p in self.probes)}, and the "
                f"model is cut behind {_listed(layers) or 'none'}",
                "give one of them as in --boundaries 24, or calibrate the probe with the same --boundaries",
            )
        return min(found, key=lambda probe: (probe.layer != self.chosen, probe.loss))

    def save(self, path: Path) -> int:
        """Write the file, whole or not at all; its size in bytes. Raises PackError if it cannot be written."""
        content = dumps(_content(self))
        head = json.dumps({"format": _FORMAT, "version": _VERSION, "crc32": zlib.crc32(content.encode())})
        data = f'{head[:-1]}, "content": {content}}}\n'.encode()
        try:
            with replacing(path) as out:
                out.write(data)
        except OSError as error:
            raise PackError(f"{path} cannot be written: {why(error)}", "choose another place with --out") from error
        return len(data)

    @classmethod
    def load(cls, path: Path | str) -> ProbeFile:
        """The probes at `path`. Raises PackError for what is no probe file, damaged, or of a later version."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PackError(f"{path} is no probe: it is larger than any", _MAKE)
            data = path.read_bytes()
        except OSError as error:
            raise PackError(
                f"the probe {path} cannot be read: {error.strerror}", f"check the path, or {_MAKE}"
            ) from error
        return _parsed(path, data)


def _listed(layers: Any) -> str:
    return ", ".join(map(str, layers))


def _content(file: ProbeFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "model": asdict(file.model),
        "library": file.library,
        "chosen": file.chosen,
        "probes": [_packed(probe) for probe in file.probes],
        "report": file.report,
    }


def _packed(probe: Probe) -> dict[str, Any]:
    found = {item.name: getattr(probe, item.name) for item in fields(probe)}
    for name in _VECTORS:
        found[name] = base64.b64encode(found[name].astype("<f4").tobytes()).decode()
    return found


def _parsed(path: Path, data: bytes) -> ProbeFile:
    try:
        found = loads(data.decode())
        is_one = found["format"] == _FORMAT
    except (ValueError, TypeError, KeyError):
        is_one = False
    if not is_one:
        if data.startswith(f'{{"format": "{_FORMAT}"'.encode()):
            raise PackError(f"the probe {path} is damaged: it is no JSON", _AGAIN)
        raise PackError(f"{path} is no probe", _MAKE)
    try:
        version = found["version"]
        if _whole(version) != _VERSION:
            hint = "update edge_runtime" if version > _VERSION else "make it again with `edge-run calibrate --probe`"
            raise _OtherVersion(f"the probe {path} is of format {version}, this reads {_VERSION}", hint)
        content = found["content"]
        if zlib.crc32(dumps(content).encode()) != found["crc32"]:
            raise ValueError("its checksum is wrong")
        return ProbeFile(
            name=_text(content["name"]),
            model=_model(content["model"]),
            library=_text(content["library"]),
            chosen=_whole(content["chosen"]),
            probes=tuple(_unpacked(probe) for probe in content["probes"]),
            report=dict(content["report"]),
        )
    except _OtherVersion:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, EdgeError) as error:
        what = error.message if isinstance(error, EdgeError) else error
        raise PackError(f"the probe {path} is damaged: {what}", _AGAIN) from error


class _OtherVersion(PackError):
    pass


def _model(found: dict[str, Any]) -> ModelIdentity:
    model = ModelIdentity(**found)
    for name in ("sha256", "file", "name", "architecture"):
        _text(getattr(model, name))
    for name in ("n_layer", "n_embd", "file_bytes"):
        _whole(getattr(model, name))
    return model


def _unpacked(found: dict[str, Any]) -> Probe:
    values: dict[str, Any] = {name: _vector(found[name]) for name in _VECTORS}
    values |= {name: _whole(found[name]) for name in _WHOLE}
    values |= {name: _number(found[name]) for name in _NUMBERS}
    return Probe(**values)


def _vector(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r:.120} is no text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.120} is no whole number")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"{value!r:.120} is no number")
    return float(value)
