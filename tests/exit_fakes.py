"""Exit packs of random numbers, for tiny random models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from edge_runtime.exits.asking import Asker
from edge_runtime.exits.gate import Gate
from edge_runtime.exits.head import HeadShape, HeadWeights, usual_shape
from edge_runtime.exits.pack import ExitPack, this_library
from edge_runtime.exits.packed_head import PackedHead
from edge_runtime.exits.thresholds import Rung
from edge_runtime.identity import identify

CLUSTER = 4  # tokens of a cluster, at most


def random_weights(layer: int, shape: HeadShape, seed: int = 0) -> HeadWeights:
    """A head that is sure of something, whatever it reads."""
    random = np.random.default_rng([seed, layer])

    def normal(*size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(size).astype(np.float32)

    tensors = {name: normal(*size) / np.float32(size[1] ** 0.5) for name, size in shape.matrices.items()}
    tensors |= {name: 1 + 0.1 * normal(shape.n_embd) for name in shape.norms}
    tensors["other"] = normal(shape.n_embd) / np.float32(shape.n_embd**0.5)
    projection = np.eye(shape.n_embd, dtype=np.float32) + 0.1 * normal(shape.n_embd, shape.n_embd)
    return HeadWeights(layer, shape, tensors, projection)


def n_vocab_of(model_path: Path) -> int:
    (table,) = (t for t in GGUFReader(model_path).tensors if t.name == "token_embd.weight")
    return int(table.shape[1])


def random_pack(
    model_path: Path,
    boundaries: Sequence[int] = (2, 4),
    n_rows: int = 65,
    seed: int = 0,
    *,
    quantisation: str = "Q8_0",
    threshold: float = 1.0,
    **changes: Any,
) -> ExitPack:
    """A pack for the model at `model_path`; `n_rows` counts the row for all other tokens.

    Gates give every token about the same probability, heads are always asked, all thresholds are `threshold`; `changes`
    replace fields.
    """
    random = np.random.default_rng(seed)
    identity = identify(model_path)
    n_ids, n = n_rows - 1, len(boundaries)
    shape = usual_shape(identity.n_embd, n_rows)
    heads = tuple(PackedHead.of(random_weights(layer, shape, seed), quantisation) for layer in boundaries)
    gate = Gate(names=("margin", "entropy"), mean=(0.5, 1.0), scale=(0.25, 0.5), weights=(-0.5, 0.25), bias=-1.0)
    certificate = {"kind": "disagreement", "bound": 0.05, "n": 0, "risk": None, "holds": False}
    rung = Rung("entropy", "exits", 0.05, 0.05, (threshold,) * n, certificate, 0.25, 59)
    fields: dict[str, Any] = {
        "name": "random",
        "model": identity,
        "library": this_library(),
        "boundaries": tuple(boundaries),
        "shortlist": random.permutation(n_vocab_of(model_path))[:n_ids].astype(np.int32),
        "cluster_starts": np.arange(0, n_ids, CLUSTER, dtype=np.int32),
        "heads": heads,
        "gates": (gate,) * n,
        "rungs": (rung,),
        "default_signal": "entropy",
        "verify_thresholds": (threshold,) * n,
        "askers": tuple(Asker(random.standard_normal(identity.n_embd).astype(np.float32), -1e9) for _ in boundaries),
        "report": {"agreement": [0.5, float("nan")], "limit": float("inf"), "text": "naïve"},
    }
    return ExitPack(**{**fields, **changes})
