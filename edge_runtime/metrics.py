"""How good a classifier is: pure functions of true labels, decided labels and scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .types import Floats

Labels = NDArray[np.int64]


def confusion(truth: Labels, decided: Labels, n_labels: int) -> NDArray[np.int64]:
    """Counts (n_labels, n_labels): row = true label, column = decided label."""
    return np.bincount(truth * n_labels + decided, minlength=n_labels**2).reshape(n_labels, n_labels)


def precision_recall(table: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Precision and recall (n_labels,) each, from a confusion table; 0 for a label never decided, or never true."""
    hits = np.diag(table).astype(np.float32)
    return hits / np.maximum(table.sum(axis=0), 1), hits / np.maximum(table.sum(axis=1), 1)


def macro_f1(truth: Labels, decided: Labels, n_labels: int) -> float:
    """Mean over labels of the harmonic mean of precision and recall."""
    table = confusion(truth, decided, n_labels)
    hits = np.diag(table)
    return float((2 * hits / np.maximum(table.sum(axis=0) + table.sum(axis=1), 1)).mean())


def auroc(positive: NDArray[np.bool_], scores: Floats) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN without one of both.

    The Mann–Whitney statistic, by ranks.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def calibration_error(confidences: Floats, right: NDArray[np.bool_], n_bins: int = 15) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of equal size (Guo et al. 2017).

    Bins hold equally many messages, so that none is empty.
    """
    order = np.argsort(confidences, kind="stable")
    parts = [part for part in np.array_split(order, n_bins) if len(part)]
    gaps = [len(part) * abs(float(confidences[part].mean()) - float(right[part].mean())) for part in parts]
    return sum(gaps) / max(1, len(confidences))
