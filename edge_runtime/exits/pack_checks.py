"""Whether the parts of an exit pack fit together, whoever put them there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import SIGNALS, check_boundaries
from .head import QUANTISATIONS, HeadShape
from .policies import RISKS
from .quantised import Quantised, kind_of
from .thresholds import Rung

if TYPE_CHECKING:
    from .pack import ExitPack
    from .packed_head import PackedHead

_METHODS = ("ltt", "crc")
_LONGEST_NAME = 100
_MOST_ROWS = 2**24
_LARGEST = 1e30  # of constants, which are 32-bit numbers to llama.cpp


def check_pack(pack: ExitPack) -> None:
    """Raise ValueError or BoundaryError, saying what is wrong."""
    _require(_is_text(pack.name) and 0 < len(pack.name) <= _LONGEST_NAME, f"its name is {pack.name!r:.120}")
    _require(_is_text(pack.library), f"its build is {pack.library!r:.120}")
    _require(pack.default_signal in SIGNALS, f"its signal is {pack.default_signal!r:.120}")
    _require(isinstance(pack.report, dict), "its report is no table")
    _check_model(pack)
    n = len(pack.boundaries)
    _require(n > 0, "it has no boundaries")
    _require(all(_is_whole(layer) for layer in pack.boundaries), f"its boundaries are {pack.boundaries!r:.120}")
    check_boundaries(pack.boundaries, pack.model.n_layer)
    for name in ("heads", "gates", "verify_thresholds"):
        found = len(getattr(pack, name))
        fits = found == n or (name == "heads" and pack.shared)
        _require(fits, f"it has {found} {name.replace('_', ' ')} for {n} boundaries")
    _require(len(pack.askers) in (0, n), f"it has {len(pack.askers)} askers for {n} boundaries")
    _check_thresholds(pack.verify_thresholds, "verify thresholds")
    for i, rung in enumerate(pack.rungs):
        _check_rung(rung, n, f"rung {i}")
    if pack.shared:
        _check_without_heads(pack)
        return
    _check_shortlist(pack)
    for layer, head in zip(pack.boundaries, pack.heads, strict=True):
        _require(head.layer == layer, f"the head of boundary {layer} is of layer {head.layer}")
        _check_head(head, pack.model.n_embd, len(pack.shortlist) + 1)
    for asker in pack.askers:
        fits = asker.weights.shape == (pack.model.n_embd,) and bool(np.isfinite(asker.weights).all())
        _require(fits and _is_number(asker.floor), "an asker's numbers do not fit")


def _check_model(pack: ExitPack) -> None:
    model = pack.model
    for key in ("file", "name", "architecture"):
        _require(isinstance(getattr(model, key), str), f"the model's {key} is no text")
    _require(
        isinstance(model.sha256, str) and re.fullmatch("[0-9a-f]{64}", model.sha256), "the model's sha256 is no hash"
    )
    for key in ("n_layer", "n_embd", "file_bytes"):
        value = getattr(model, key)
        _require(_is_whole(value) and value > 0, f"the model's {key} is {value!r:.120}")


def _check_without_heads(pack: ExitPack) -> None:
    sizes = {"a shortlist": pack.shortlist.size, "clusters": pack.cluster_starts.size, "askers": len(pack.askers)}
    for name, size in sizes.items():
        _require(size == 0, f"it has {name}, but no heads")
    used = {pack.default_signal, *(rung.signal for rung in pack.rungs)}
    _require("clusters" not in used, "it uses clusters of tokens, but has none")


def _check_shortlist(pack: ExitPack) -> None:
    ids, starts = pack.shortlist, pack.cluster_starts
    for name, array in (("shortlist", ids), ("clusters", starts)):
        _require(array.ndim == 1 and array.dtype == np.int32 and len(array) > 0, f"the {name} are no row of numbers")
    n = len(ids)
    _require(n < _MOST_ROWS and int(ids.min()) >= 0, "the shortlist has numbers that are no tokens")
    _require(len(np.unique(ids)) == n, "the shortlist has a token twice")
    ordered = starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < n
    _require(bool(ordered), "the clusters are not in order")


def _check_rung(rung: Rung, n: int, name: str) -> None:
    _require(rung.signal in SIGNALS, f"the signal of {name} is {rung.signal!r:.120}")
    _require(rung.risk in RISKS, f"the risk of {name} is {rung.risk!r:.120}")
    _require(len(rung.thresholds) == n, f"{name} has {len(rung.thresholds)} thresholds for {n} boundaries")
    _check_thresholds(rung.thresholds, name)
    _require(_is_number(rung.bound) and rung.bound > 0, f"the bound of {name} is {rung.bound!r:.120}")
    _require(rung.method in _METHODS, f"the method of {name} is {rung.method!r:.120}")
    _require(_is_number(rung.delta) and 0 < rung.delta <= 1, f"the delta of {name} is {rung.delta!r:.120}")
    _require(isinstance(rung.certificate, dict), f"the certificate of {name} is no table")
    kind, seen, risk = (rung.certificate.get(key) for key in ("kind", "n", "risk"))
    told = _is_text(kind) and _is_whole(seen) and (risk is None or _is_number(risk))
    _require(told, f"the certificate of {name} does not say what it is of")
    _require(_is_number(rung.coverage), f"the coverage of {name} is {rung.coverage!r:.120}")
    needed = rung.prompts_needed
    _require(needed is None or (_is_whole(needed) and needed >= 0), f"{name} needs {needed!r:.120} prompts")


def _check_thresholds(values: Sequence[float], name: str) -> None:
    """NaN is no threshold, infinity is one: it is always passed."""
    for value in values:
        _require(_is_number(value) and value >= 0, f"a threshold of the {name} is {value!r:.120}")


def _check_head(head: PackedHead, n_embd: int, n_rows: int) -> None:
    shape, name = head.shape, f"the head of boundary {head.layer}"
    _require(head.quantisation in QUANTISATIONS, f"{name} is quantised to {head.quantisation!r:.120}")
    whole = (shape.n_embd, shape.n_head, shape.n_head_kv, shape.n_ff, shape.n_rows)
    _require(all(map(_is_whole, whole)), f"{name} has dimensions that are no whole numbers")
    _require(shape.n_embd == n_embd, f"{name} is {shape.n_embd} wide, the model {n_embd}")
    _require(shape.n_rows == n_rows, f"{name} has {shape.n_rows} rows, the shortlist asks for {n_rows}")
    for constant in (shape.rope_base, shape.norm_epsilon):
        _require(_is_number(constant) and 0 < constant < _LARGEST, f"{name} has a constant of {constant!r:.120}")
    _check_tensors(head, shape, name)


def _check_tensors(head: PackedHead, shape: HeadShape, name: str) -> None:
    expected = {*shape.matrices, *shape.norms, "other"}
    _require(set(head.tensors) == expected, f"{name} lacks a tensor or has one too many")
    for key, found in head.tensors.items():
        if isinstance(found, Quantised):
            size = shape.matrices.get(key, (0, 0))
            good = found.kind == kind_of(size[1], head.quantisation) and found.shape == size and found.is_finite
        else:
            good = key not in shape.matrices and found.dtype == np.float32 and found.shape == (shape.n_embd,)
            good = good and bool(np.isfinite(found).all())
        _require(good, f"{key} of {name} does not fit, or is not finite")
    fits = head.projection.dtype == np.float16 and head.projection.shape == (shape.n_embd, shape.n_embd)
    _require(fits and np.isfinite(head.projection).all(), f"the projection of {name} does not fit, or is not finite")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Infinity is a number here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _require(good: object, fault: str) -> None:
    if not good:
        raise ValueError(fault)
