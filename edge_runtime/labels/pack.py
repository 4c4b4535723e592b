"""Label packs: everything a classifier needs beside the model, in one GGUF file of 2 MB at most.

The file holds tensors and one JSON text, the manifest; see `LabelPack` for what is in them. It names the model it was
made for by hash: probes read hidden states, which differ between models and between quantisations of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import replacing
from ..errors import EdgeError, ModelNotFoundError, PackError, UsageError
from ..identity import ModelIdentity, difference
from ..native import read_tensors
from ..types import Floats
from .drift import Reference
from .fit import Linear, log_softmax
from .ngrams import ngram_rows, scores
from .novelty import StateNovelty, WordNovelty
from .stack import Probe

MAX_BYTES = 2 * 2**20
_ARCHITECTURE = "edge-labels"
_VERSION = 1
_MANIFEST, _CHECKSUM = "edge.labels.manifest", "edge.labels.crc32"
_MAKE = "make a pack with `edge-run labels train`"
_STATE_NUMBERS = ("length_slope", "distance_scale", "words_scale", "offset")
_INT8 = ("ngrams.weights", "words.table")
_AGAIN = "train it again with `edge-run labels train`"


@dataclass(frozen=True, slots=True)
class NgramStage:
    """Stage 0; weights (n_labels, 2**bits) int8 times scale (n_labels,)."""

    bits: int
    weights: NDArray[np.int8]
    scale: Floats
    bias: Floats
    temperature: float

    def scores(self, texts: Sequence[str]) -> Floats:
        """Uncalibrated scores (n, n_labels) of prepared texts."""
        return scores(ngram_rows(texts, self.bits), self.weights, np.zeros(1, np.float32)) * self.scale + self.bias

    def probabilities(self, raw: Floats) -> Floats:
        """Calibrated, (n, n_labels)."""
        return np.exp(log_softmax(raw / np.float32(self.temperature)))


def quantise(linear: Linear, bits: int, temperature: float) -> NgramStage:
    """Weights rounded to 8 bits per label."""
    scale = np.maximum(np.abs(linear.weights).max(axis=1), 1e-12) / 127
    weights = np.round(linear.weights / scale[:, None]).astype(np.int8)
    return NgramStage(bits, weights, scale.astype(np.float32), linear.bias, temperature)


@dataclass(frozen=True, slots=True)
class LabelPack:
    """A trained cascade. Stage 0 is the n-gram model, stage i the probe at `probes[i - 1].layer`."""

    name: str
    labels: tuple[str, ...]
    instruction: str  # text before the message, special tokens and all
    max_tokens: int  # of a message; what is longer is cut at its end
    model: ModelIdentity
    ngrams: NgramStage
    probes: tuple[Probe, ...]
    weights: Floats  # (n_labels,): decision weights
    thresholds: Floats  # (n_stages, n_labels): see `cascade.run`
    unsure_below: float  # labels less probable than this are answered UNSURE
    words: WordNovelty
    states: StateNovelty | None  # at the first boundary; None without probes
    references: dict[str, Reference]  # of quantities watched for drift
    report: dict[str, Any]  # of the training

    @classmethod
    def load(cls, path: Path | str) -> LabelPack:
        """The pack at `path`. Raises PackError for what is no pack, damaged, or of a later version."""
        return _load(Path(path))

    def save(self, path: Path) -> int:
        """Write the pack; its size in bytes. Raises PackError if it is too large, or cannot be written."""
        return _save(self, path)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers behind each stage, 0 for the first."""
        return (0, *(probe.layer for probe in self.probes))

    def check_model(self, found: ModelIdentity) -> None:
        """Raise PackError, saying what differs, unless `found` is the model the pack is for."""
        what = difference(self.model, found)
        if what is None:
            return
        raise PackError(
            f"the pack '{self.name}' is for {self.model}, this is {what}: {found}",
            "name the right model with --model, or train a pack for this one with `edge-run labels train`",
        )


# ── file ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(pack: LabelPack, path: Path) -> int:
    from gguf import GGUFWriter  # slow to import, and only training writes

    arrays = _arrays(pack)
    manifest = json.dumps(_manifest(pack))
    staging = path.with_name(f".{path.name}.staging")
    writer = GGUFWriter(staging, _ARCHITECTURE)
    try:
        writer.add_name(pack.name)
        writer.add_string(_MANIFEST, manifest)
        writer.add_string(_CHECKSUM, str(_checksum(manifest, arrays)))
        for name, array in arrays.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = staging.read_bytes()
        if len(data) > MAX_BYTES:
            raise PackError(f"the pack would have {len(data):,} bytes, {MAX_BYTES:,} are allowed", "use fewer labels")
        with replacing(path) as out:
            out.write(data)
        return len(data)
    except OSError as error:
        raise PackError(f"{path} cannot be written: {error.strerror}", "choose another place with --out") from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        with contextlib.suppress(OSError):
            staging.unlink()


def _arrays(pack: LabelPack) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        "ngrams.weights": pack.ngrams.weights,
        "ngrams.scale": pack.ngrams.scale,
        "ngrams.bias": pack.ngrams.bias,
        "weights": pack.weights,
        # a threshold never reached is infinite, which some readers of GGUF refuse
        "thresholds": np.minimum(pack.thresholds, 2.0),
        "words.table": pack.words.table.view(np.int8),
    }
    for i, probe in enumerate(pack.probes):
        arrays[f"probe.{i}.weights"], arrays[f"probe.{i}.bias"] = probe.linear.weights, probe.linear.bias
    if pack.states is not None:
        arrays |= {f"states.{key}": getattr(pack.states, key) for key in ("mean", "basis", "variances")}
    for key, reference in pack.references.items():
        arrays[f"reference.{key}.values"], arrays[f"reference.{key}.shares"] = reference.values, reference.shares
    return {k: np.ascontiguousarray(v if v.dtype == np.int8 else v.astype(np.float32)) for k, v in arrays.items()}


def _manifest(pack: LabelPack) -> dict[str, Any]:
    states = pack.states
    return {
        "version": _VERSION,
        "name": pack.name,
        "labels": pack.labels,
        "instruction": pack.instruction,
        "max_tokens": pack.max_tokens,
        "unsure_below": pack.unsure_below,
        "model": asdict(pack.model),
        "ngrams": {"bits": pack.ngrams.bits, "temperature": pack.ngrams.temperature},
        "probes": [{"layer": p.layer, "pools": p.pools, "temperature": p.temperature} for p in pack.probes],
        "words": {"limit": pack.words.limit},
        "states": states and {key: getattr(states, key) for key in _STATE_NUMBERS},
        "references": {key: reference.n for key, reference in pack.references.items()},
        "report": pack.report,
    }


def _checksum(manifest: str, arrays: dict[str, NDArray[Any]]) -> int:
    crc = zlib.crc32(manifest.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def _load(path: Path) -> LabelPack:
    if os.path.isfile(path) and os.path.getsize(path) > 2 * MAX_BYTES:
        raise PackError(f"{path} is no label pack: it is larger than any", _MAKE)
    try:
        found = read_tensors(os.fspath(path), ("general.architecture", _MANIFEST, _CHECKSUM))
    except EdgeError as error:
        hint = "check the path" if isinstance(error, ModelNotFoundError) else f"copy it again, or {_AGAIN}"
        raise PackError(error.message.replace("model file", "label pack"), hint) from error
    if found.texts["general.architecture"] != _ARCHITECTURE:
        kind = found.texts["general.architecture"]
        raise PackError(f"{path} is no label pack but a GGUF of architecture '{kind}'", _MAKE)
    try:
        if str(_checksum(found.texts[_MANIFEST], found.arrays)) != found.texts[_CHECKSUM]:
            raise PackError(f"the label pack {path} is damaged: its checksum is wrong", f"copy it again, or {_AGAIN}")
        for name, array in found.arrays.items():
            if array.dtype != (np.int8 if name in _INT8 else np.float32):
                raise ValueError(f"{name} is of type {array.dtype}")
        manifest = json.loads(found.texts[_MANIFEST])
        if manifest["version"] != _VERSION:
            hint = "update edge_runtime" if manifest["version"] > _VERSION else _AGAIN
            raise PackError(f"the label pack {path} is of format {manifest['version']}, this reads {_VERSION}", hint)
        return _assemble(manifest, found.arrays)
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise PackError(f"the label pack {path} is damaged: {error}", f"copy it again, or {_AGAIN}") from error


def _assemble(manifest: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> LabelPack:
    model = ModelIdentity(**manifest["model"])
    labels = tuple(manifest["labels"])
    n, n_embd = len(labels), model.n_embd
    ngrams, words, states = manifest["ngrams"], manifest["words"], manifest["states"]
    probes = []
    for i, probe in enumerate(manifest["probes"]):
        n_features = len(probe["pools"]) * n_embd + (i + 1) * n
        linear = Linear(arrays[f"probe.{i}.weights"].reshape(n, n_features), arrays[f"probe.{i}.bias"].reshape(n))
        probes.append(Probe(probe["layer"], tuple(probe["pools"]), linear, probe["temperature"]))
    return LabelPack(
        name=manifest["name"],
        labels=labels,
        instruction=manifest["instruction"],
        max_tokens=manifest["max_tokens"],
        model=model,
        ngrams=NgramStage(
            ngrams["bits"],
            arrays["ngrams.weights"].reshape(n, 2 ** ngrams["bits"]),
            arrays["ngrams.scale"].reshape(n),
            arrays["ngrams.bias"].reshape(n),
            ngrams["temperature"],
        ),
        probes=tuple(probes),
        weights=arrays["weights"].reshape(n),
        thresholds=arrays["thresholds"].reshape(len(probes) + 1, n),
        unsure_below=manifest["unsure_below"],
        words=WordNovelty(arrays["words.table"].view(np.uint8), words["limit"]),
        states=states
        and StateNovelty(
            arrays["states.mean"].reshape(n_embd),
            arrays["states.basis"].reshape(-1, n_embd),
            arrays["states.variances"],
            *(states[key] for key in _STATE_NUMBERS),
        ),
        references={
            key: Reference(arrays[f"reference.{key}.values"], arrays[f"reference.{key}.shares"], n)
            for key, n in manifest["references"].items()
        },
        report=manifest["report"],
    )
