"""Logits → how sure they are."""

from __future__ import annotations

import numpy as np

from .types import Floats, Signals

# e^-80 of the likeliest token's weight: nothing, and yet finite where a logit is -infinity
_NEGLIGIBLE = -80.0


def signals_of(logits: Floats) -> Signals:
    """Entropy (nats), top-1 probability and margin of softmax(logits), logits (n,) float32 with a finite maximum.

    Entropy is log Σe^x − Σx·e^x / Σe^x, with x counted from the largest logit.
    """
    top = int(logits.argmax())
    shifted = logits - logits[top]
    np.maximum(shifted, _NEGLIGIBLE, out=shifted)
    weights = np.exp(shifted)
    total = float(weights.sum())
    entropy = float(np.log(total)) - float(weights @ shifted) / total
    weights[top] = 0.0
    first, second = 1.0 / total, float(weights.max()) / total
    # in this order max() keeps NaN, which is below no threshold
    return Signals(entropy=max(entropy, 0.0), top1=first, margin=first - second)
