"""Fitting linear probes with numpy alone: multinomial logistic regression by L-BFGS, and temperature scaling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Floats
from .ngrams import Sparse

_MEMORY = 10  # pairs of steps and gradient changes that L-BFGS remembers
_ARMIJO = 1e-4


@dataclass(frozen=True, slots=True)
class Linear:
    """Scores = features @ weights.T + bias; weights (n_labels, n_features), bias (n_labels,)."""

    weights: Floats
    bias: Floats

    def scores(self, features: Floats) -> Floats:
        """(n, n_features) → (n, n_labels), row by row: a product of matrices would depend on n in the last bits."""
        rows = [self.weights @ row + self.bias for row in features]
        return np.array(rows, np.float32).reshape(len(features), len(self.bias))


def log_softmax(scores: Floats) -> Floats:
    """Log-probabilities (n, n_labels) of scores (n, n_labels)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float32)


def log_loss(log_probabilities: Floats, labels: NDArray[np.int64]) -> float:
    """Mean negative log-probability of the true labels, in nats."""
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def fit_dense(
    features: Floats, labels: NDArray[np.int64], n_labels: int, penalty: float | Floats, max_iterations: int = 80
) -> Linear:
    """Multinomial logistic regression on features (n, d), standardised inside, with an L2 penalty on the weights.

    Minimises mean log-loss + ½ · Σ penalty · weights² (the bias is free); `penalty` is one, or one per feature (d,).
    The result takes features as they came.
    """
    mean = features.mean(axis=0)
    scale = np.maximum(features.std(axis=0), 1e-6)
    inputs = (features - mean) / scale
    d = inputs.shape[1]

    def forward(weights: Floats) -> Floats:
        return np.asarray(inputs @ weights.T)

    def backward(errors: Floats) -> Floats:
        return np.asarray(errors.T @ inputs)

    weights, bias = _fit(forward, backward, d, labels, n_labels, penalty, max_iterations)
    weights = weights / scale
    return Linear(weights.astype(np.float32), (bias - weights @ mean).astype(np.float32))


def fit_sparse(
    rows: Sparse, labels: NDArray[np.int64], n_labels: int, n_features: int, penalty: float, max_iterations: int = 40
) -> Linear:
    """As `fit_dense`, for sparse rows of n_features buckets, which are not standardised."""
    used, buckets = np.unique(rows.buckets, return_inverse=True)
    lengths = np.diff(rows.starts)
    row_of = np.repeat(np.arange(rows.n_rows, dtype=np.int32), lengths)
    order = np.argsort(buckets, kind="stable")
    by_bucket_rows, by_bucket_values = row_of[order], rows.values[order]
    bucket_starts = np.searchsorted(buckets[order], np.arange(len(used)))
    filled = np.flatnonzero(lengths)
    row_starts = rows.starts[:-1][filled]

    def forward(weights: Floats) -> Floats:
        out = np.zeros((rows.n_rows, n_labels), np.float32)
        for k, weight in enumerate(weights):
            out[filled, k] = np.add.reduceat(weight[buckets] * rows.values, row_starts)
        return out

    def backward(errors: Floats) -> Floats:
        return np.stack([np.add.reduceat(e[by_bucket_rows] * by_bucket_values, bucket_starts) for e in errors.T])

    weights, bias = _fit(forward, backward, len(used), labels, n_labels, penalty, max_iterations)
    full = np.zeros((n_labels, n_features), np.float32)
    full[:, used] = weights
    return Linear(full, bias)


def _fit(
    forward: Callable[[Floats], Floats],
    backward: Callable[[Floats], Floats],
    n_features: int,
    labels: NDArray[np.int64],
    n_labels: int,
    penalty: float | Floats,
    max_iterations: int,
) -> tuple[Floats, Floats]:
    n = len(labels)
    truth = np.zeros((n, n_labels), np.float32)
    truth[np.arange(n), labels] = 1

    def loss_and_gradient(point: Floats) -> tuple[float, Floats]:
        weights, bias = point[:, :-1], point[:, -1]
        log_p = log_softmax(forward(weights) + bias)
        errors = np.asarray((np.exp(log_p) - truth) / n, np.float32)
        gradient = np.empty_like(point)
        gradient[:, :-1] = backward(errors) + penalty * weights
        gradient[:, -1] = errors.sum(axis=0)
        return log_loss(log_p, labels) + 0.5 * float((penalty * np.square(weights)).sum()), gradient

    start = np.zeros((n_labels, n_features + 1), np.float32)
    start[:, -1] = np.log((truth.sum(axis=0) + 1) / (n + n_labels))
    best = minimise(loss_and_gradient, start, max_iterations)
    return best[:, :-1], best[:, -1]


def minimise(
    loss_and_gradient: Callable[[Floats], tuple[float, Floats]],
    start: Floats,
    max_iterations: int,
    tolerance: float = 1e-5,
) -> Floats:
    """A minimum of a smooth convex function by L-BFGS (Liu & Nocedal 1989) with backtracking.

    Ends when a step lowers the loss by less than `tolerance` of it, or after `max_iterations`.
    """
    point = start
    loss, gradient = loss_and_gradient(point)
    history: deque[tuple[Floats, Floats, float]] = deque(maxlen=_MEMORY)
    for _ in range(max_iterations):
        direction = _direction(gradient, history)
        slope = float(np.vdot(direction, gradient))
        if slope >= 0:  # rounding has spoiled the history: start over from the plain gradient
            history.clear()
            direction, slope = -gradient, -float(np.vdot(gradient, gradient))
        step = 1.0 if history else min(1.0, 1.0 / max(float(np.abs(gradient).sum()), 1e-12))
        while True:
            candidate = (point + step * direction).astype(np.float32)
            new_loss, new_gradient = loss_and_gradient(candidate)
            if new_loss <= loss + _ARMIJO * step * slope or step < 1e-6:
                break
            step /= 2
        if not new_loss < loss:
            break
        change, turn = candidate - point, new_gradient - gradient
        curvature = float(np.vdot(change, turn))
        if curvature > 1e-12:
            history.append((change, turn, curvature))
        gain, size = loss - new_loss, abs(new_loss)
        point, loss, gradient = candidate, new_loss, new_gradient
        if gain <= tolerance * size and len(history) > 2:
            break
    return point


def _direction(gradient: Floats, history: deque[tuple[Floats, Floats, float]]) -> Floats:
    direction = -gradient
    shares: list[float] = []
    for change, turn, curvature in reversed(history):
        share = float(np.vdot(change, direction)) / curvature
        shares.append(share)
        direction = direction - share * turn
    if history:
        _, turn, curvature = history[-1]
        direction = direction * (curvature / float(np.vdot(turn, turn)))
    for (change, turn, curvature), share in zip(history, reversed(shares), strict=True):
        direction = direction + (share - float(np.vdot(turn, direction)) / curvature) * change
    return direction


def fit_temperature(scores: Floats, labels: NDArray[np.int64]) -> float:
    """The temperature that calibrates softmax(scores / temperature) (Guo et al. 2017), by golden-section search."""
    ratio = (np.sqrt(5) - 1) / 2
    low, high = np.log(0.05), np.log(20.0)

    def loss(log_temperature: float) -> float:
        return log_loss(log_softmax((scores / np.exp(log_temperature)).astype(np.float32)), labels)

    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))
