"""Logits → one token drawn at a temperature, and how likely it was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..types import Floats

# e^-80 of the likeliest token's weight: nothing, and yet finite where a logit is -infinity
_NEGLIGIBLE = -80.0
_BLOCK = 256  # running sums of blocks, and then of one block's tokens: those of the whole vocabulary take longest


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, with the model's own (temperature 1) log-likelihood of it and entropy of its distribution, in nats."""

    token: int
    log_likelihood: float
    entropy: float


def draw_token(logits: Floats, temperature: float, uniform: float) -> Drawn:
    """Token from softmax(logits / temperature), logits (n,) float32 with a finite maximum; `uniform` from [0, 1)."""
    shifted = logits - logits.max()
    np.maximum(shifted, _NEGLIGIBLE, out=shifted)
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    log_total = float(np.log(total))
    entropy = log_total - float(weights @ shifted) / total
    if temperature != 1:
        weights = np.exp(shifted / np.float32(temperature))
    token = _pick(weights, uniform)
    return Drawn(token, float(shifted[token]) - log_total, max(entropy, 0.0))


def _pick(weights: Floats, uniform: float) -> int:
    """The first index at which the running sum of weights (n,) is above the share `uniform` of all."""
    blocks = np.add.reduceat(weights, range(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    wanted = uniform * blocks[-1]
    block = min(int(blocks.searchsorted(wanted, side="right")), len(blocks) - 1)
    sums = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    sums += blocks[block - 1] if block else 0.0
    return block * _BLOCK + min(int(sums.searchsorted(wanted, side="right")), len(sums) - 1)
