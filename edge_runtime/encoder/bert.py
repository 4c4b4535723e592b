"""BERT as a sentence encoder: its shape and weights, and a plain forward pass that other ways are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadableError, UnsupportedModelError

Array = NDArray[np.float32]
Weights = Mapping[str, Array]

_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, slots=True)
class BertShape:
    """The sizes of a BERT."""

    n_layer: int
    n_embd: int
    n_head: int
    n_ff: int
    n_vocab: int
    n_positions: int
    norm_eps: float


def read_shape(config: Any) -> BertShape:
    """The shape that the JSON of a config.json gives.

    Raises ModelUnreadableError if something is missing, UnsupportedModelError for another architecture.
    """
    hint = "only a BERT with absolute positions and the exact GELU can be built"
    try:
        kind = (config["model_type"], config["hidden_act"], config.get("position_embedding_type", "absolute"))
        shape = BertShape(
            n_layer=int(config["num_hidden_layers"]),
            n_embd=int(config["hidden_size"]),
            n_head=int(config["num_attention_heads"]),
            n_ff=int(config["intermediate_size"]),
            n_vocab=int(config["vocab_size"]),
            n_positions=int(config["max_position_embeddings"]),
            norm_eps=float(config["layer_norm_eps"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelUnreadableError(f"the encoder's config.json is not one of a BERT: {error!r}", hint) from None
    if kind != ("bert", "gelu", "absolute"):
        raise UnsupportedModelError(f"the encoder is of the kind {', '.join(map(str, kind))}", hint)
    if min(shape.n_layer, shape.n_embd, shape.n_head) < 1 or shape.n_embd % shape.n_head:
        raise ModelUnreadableError(f"{shape.n_embd} values cannot be shared out to {shape.n_head} heads", hint)
    return shape


def check_weights(weights: Weights, shape: BertShape) -> None:
    """Raises ModelUnreadableError for a tensor that is missing, of another size, or not finite."""
    hint = "install the weights' package anew"
    for name, size in expected_sizes(shape).items():
        if name not in weights:
            raise ModelUnreadableError(f"the weights have no tensor {name}", hint)
        if weights[name].shape != size:
            raise ModelUnreadableError(f"the tensor {name} is {weights[name].shape}, not {size}", hint)
        if not np.isfinite(weights[name]).all():
            raise ModelUnreadableError(f"the tensor {name} has values that are not finite", hint)


def expected_sizes(shape: BertShape) -> dict[str, tuple[int, ...]]:
    """The tensors that are used, by name; matrices are (n_out, n_in)."""
    n, n_ff = shape.n_embd, shape.n_ff
    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (shape.n_vocab, n),
        "embeddings.position_embeddings.weight": (shape.n_positions, n),
        "embeddings.token_type_embeddings.weight": (2, n),
        **_norm("embeddings.LayerNorm", n),
    }
    for layer in range(shape.n_layer):
        at = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            sizes |= _dense(f"{at}.attention.self.{part}", n, n)
        sizes |= _dense(f"{at}.attention.output.dense", n, n) | _norm(f"{at}.attention.output.LayerNorm", n)
        sizes |= _dense(f"{at}.intermediate.dense", n_ff, n)
        sizes |= _dense(f"{at}.output.dense", n, n_ff) | _norm(f"{at}.output.LayerNorm", n)
    return sizes


def _dense(name: str, n_out: int, n_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _norm(name: str, n: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def reference_embedding(weights: Weights, shape: BertShape, ids: list[int]) -> NDArray[np.float64]:
    """The embedding (n_embd,) of one sentence of token ids, in float64 and without any batching: unit length."""

    def dense(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return np.asarray(x @ weights[f"{name}.weight"].T.astype(np.float64) + weights[f"{name}.bias"])

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + shape.norm_eps)
        return np.asarray(scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def attend(x: NDArray[np.float64], at: str) -> NDArray[np.float64]:
        query, key, value = (dense(x, f"{at}.{part}") for part in ("query", "key", "value"))
        heads = []
        for head in np.split(np.arange(shape.n_embd), shape.n_head):
            scores = query[:, head] @ key[:, head].T / math.sqrt(len(head))
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(shares / shares.sum(-1, keepdims=True) @ value[:, head])
        return np.concatenate(heads, -1)

    states = weights["embeddings.word_embeddings.weight"][ids].astype(np.float64)
    states += weights["embeddings.position_embeddings.weight"][: len(ids)]
    states += weights["embeddings.token_type_embeddings.weight"][0]
    states = norm(states, "embeddings.LayerNorm")
    for layer in range(shape.n_layer):
        at = f"encoder.layer.{layer}"
        attended = dense(attend(states, f"{at}.attention.self"), f"{at}.attention.output.dense")
        states = norm(states + attended, f"{at}.attention.output.LayerNorm")
        wide = dense(states, f"{at}.intermediate.dense")
        wide *= 0.5 * (1 + _erf(wide / math.sqrt(2)))
        states = norm(states + dense(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = states.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))
