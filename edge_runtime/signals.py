"""Logits → how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .errors import UsageError
from .types import SIGNALS, Floats, Signals, TokenIds

# e^-80 of the likeliest token's weight: nothing, and yet finite where a logit is -infinity
_NEGLIGIBLE = -80.0

_UNCERTAINTY: dict[str, Callable[[Signals], float]] = {
    "entropy": lambda s: s.entropy,
    "top1": lambda s: 1.0 - s.top1,
    "margin": lambda s: 1.0 - s.margin,
    "clusters": lambda s: s.clusters,
    "stability": lambda s: 1.0 - s.stability,
    "gate": lambda s: s.gate,
}


def signals_of(logits: Floats, cluster_starts: TokenIds | None = None, has_other: bool = False) -> Signals:
    """Entropy (nats), top-1 probability and margin of softmax(logits), logits (n,) float32 with a finite maximum.

    Entropy is log Σe^x − Σx·e^x / Σe^x, with x counted from the largest logit. With `has_other`, the last of at least
    two rows stands for every token that the others do not name: it counts in all sums, has its probability in `other`,
    and is no top-1, so that the margin is below 0 where it is the likeliest. `cluster_starts` (C,), from 0 upwards, are
    the rows at which clusters of tokens that mean the same begin: `clusters` is the entropy of their probabilities, the
    last row being a cluster of its own (the per-token form of semantic entropy; Kuhn, Gal, Farquhar 2023,
    arXiv 2302.09664).
    """
    best = int(logits.argmax())
    shifted = logits - logits[best]
    np.maximum(shifted, _NEGLIGIBLE, out=shifted)
    weights = np.exp(shifted)
    total = float(weights.sum())
    entropy = float(np.log(total)) - float(weights @ shifted) / total
    named, other = weights, 0.0
    if has_other:
        named, other = weights[:-1], float(weights[-1])
        if best == len(named):
            best = int(logits[:-1].argmax())
    clusters = math.nan if cluster_starts is None else _cluster_entropy(named, other, total, cluster_starts)
    first = float(weights[best]) / total
    weights[best] = 0.0
    second = float(weights.max()) / total
    # in this order max() keeps NaN, which is below no threshold
    return Signals(max(entropy, 0.0), first, first - second, clusters, other=other / total)


def _cluster_entropy(named: Floats, other: float, total: float, starts: TokenIds) -> float:
    """Entropy (nats) of clusters of weights that sum up to `total`, `other` being one more cluster."""
    masses = np.add.reduceat(named, starts)
    spread = float(masses @ np.log(masses))
    if other:
        spread += other * math.log(other)
    return max(math.log(total) - spread / total, 0.0)


def uncertainty(signals: Signals, name: str) -> float:
    """How unsure `signals` are by the one named, of SIGNALS: lower is surer, NaN if there is none.

    Entropies are in nats; the others run from 0 to 1, margin and stability up to 2. Raises UsageError for other names.
    """
    try:
        return _UNCERTAINTY[name](signals)
    except KeyError:
        raise UsageError(f"there is no signal '{name}'", f"there are {', '.join(SIGNALS)}") from None


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of two vectors (n,); NaN if one is zero."""
    lengths = float(a @ a) * float(b @ b)
    return float(a @ b) / math.sqrt(lengths) if lengths > 0 else math.nan
