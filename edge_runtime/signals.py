"""Logits → how sure they are."""

from __future__ import annotations

import numpy as np

from .types import Floats, Signals


def signals_of(logits: Floats) -> Signals:
    """Entropy (nats), top-1 probability and margin of softmax(logits), logits (n,) float32."""
    shifted = logits - logits.max()
    weights = np.exp(shifted)
    total = float(weights.sum())
    # H = log Σe^x - Σ x·e^x / Σe^x, one pass and no log of zero; rows at -inf carry no weight
    weighted = float(np.dot(weights, np.where(weights > 0, shifted, 0)))
    entropy = max(0.0, float(np.log(total)) - weighted / total)
    second, first = np.partition(weights, -2)[-2:] / total if weights.size > 1 else (0.0, 1.0)
    return Signals(entropy=entropy, top1=float(first), margin=float(first - second))
