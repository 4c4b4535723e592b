"""When a message leaves: pure functions of what each stage said.

A stage gives calibrated probabilities (n, n_labels). They are weighed by the pack's decision weights, one per label,
which make up for rare labels where macro-F1 counts; the largest is the label, and its share of the weighed sum is the
confidence that is held against the threshold of this stage and label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..metrics import macro_f1
from ..types import Floats

Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]

NEVER = np.inf
_MIN_EXITS = 30  # of a label at a stage, in training, for a threshold to be believed
_STEPS = 25
_NATS_PER_LOSS = 4.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where each message left, and with which label; arrays (n,)."""

    stages: Labels
    labels: Labels


def weigh(probabilities: Floats, weights: Floats) -> Floats:
    """Probabilities (n, n_labels) with each label multiplied by its weight, normalised again."""
    product = probabilities * weights
    return np.asarray(product / product.sum(axis=1, keepdims=True), np.float32)


def leaves(weighed: Floats, thresholds: Floats) -> Mask:
    """Which messages are sure enough to leave at a stage with thresholds (n_labels,)."""
    return np.asarray(weighed.max(axis=1) >= thresholds[weighed.argmax(axis=1)])


def run(weighed: Sequence[Floats], thresholds: Floats, held: Sequence[Mask] | None = None) -> Outcome:
    """Send messages through stages of weighed probabilities (n, n_labels) with thresholds (n_stages, n_labels).

    Whoever leaves nowhere leaves at the last stage. `held` has a mask (n,) per stage of messages that must not leave
    there, however sure it is.
    """
    n = len(weighed[0])
    stages = np.full(n, len(weighed) - 1, np.int64)
    for stage in range(len(weighed) - 2, -1, -1):
        free = leaves(weighed[stage], thresholds[stage])
        stages[free if held is None else free & ~held[stage]] = stage
    labels = np.choose(stages, [w.argmax(axis=1) for w in weighed])
    return Outcome(stages, labels.astype(np.int64))


def decision_weights(probabilities: Floats, truth: Labels, objective: str) -> Floats:
    """Weights (n_labels,) of the labels under an objective: 'accuracy' gives ones, 'macro-f1' searches for them.

    The search goes label by label, the largest one fixed at 1, over factors from 1/8 to 8.
    """
    n_labels = probabilities.shape[1]
    weights = np.ones(n_labels, np.float32)
    if objective == "accuracy":
        return weights
    counts = np.bincount(truth, minlength=n_labels)
    others = [k for k in np.argsort(counts) if k != counts.argmax()]
    for _ in range(2):
        for k in others:
            tried = []
            for factor in np.geomspace(1 / 8, 8, _STEPS):
                weights[k] = factor
                tried.append(
                    (macro_f1(truth, (probabilities * weights).argmax(axis=1), n_labels), -abs(np.log(factor)), factor)
                )
            weights[k] = max(tried)[2]
    return weights


def candidates(
    weighed: Sequence[Floats],
    truth: Labels,
    levels: Sequence[float],
    row_weights: Floats,
    excess: Sequence[Floats] | None = None,
) -> list[Floats]:
    """Thresholds (n_stages, n_labels) for each of `levels`, from the safest to the boldest, behind one of no exits.

    At level a, a stage lets go of as many messages per label as it can while at most a share a of those is lost by it:
    wrong there and right at the last stage. What is won by leaving early does not count: it would pay for losses
    elsewhere, and sure messages for unsure ones. `row_weights` (n,) with mean 1 say how much each message counts.

    With `excess`, for each stage the log-loss (n,) in nats beyond that of the last stage, its mean over those that
    leave is at most 4a as well: labels alone would let go of messages whose label is settled and whose probability is
    not, at the cost of ranking. A bolder candidate has no higher threshold than a safer one.
    """
    n_stages, n_labels = len(weighed), weighed[0].shape[1]
    last_right = weighed[-1].argmax(axis=1) == truth
    chosen: list[Floats] = [np.full((n_stages, n_labels), NEVER, np.float32)]
    chosen[0][-1] = 0
    for level in levels:
        thresholds = chosen[0].copy()
        for stage in range(n_stages - 1):
            label = weighed[stage].argmax(axis=1)
            confidence = weighed[stage].max(axis=1)
            harm = row_weights * (last_right & (label != truth))
            for k in range(n_labels):
                rows = np.flatnonzero(label == k)
                order = rows[np.argsort(-confidence[rows], kind="stable")]
                sure = confidence[order]
                counts = np.arange(1, len(order) + 1)
                good = counts >= _MIN_EXITS
                good &= np.append(sure[1:] < sure[:-1], True)[: len(order)]  # a threshold lets all equals go
                good &= np.cumsum(harm[order]) <= level * np.cumsum(row_weights[order])
                if excess is not None:
                    good &= np.cumsum(excess[stage][order]) <= _NATS_PER_LOSS * level * counts
                if good.any():
                    thresholds[stage, k] = sure[np.flatnonzero(good)[-1]]
        chosen.append(np.minimum(thresholds, chosen[-1]))
    return chosen
