"""Logistic regression with a ridge penalty."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SURE = 40.0  # log-odds: as good as certain, and yet finite
_LEAST_PENALTY = 1e-6
_STEPS = 60
_SMALLEST_STEP = 1e-6
_CONVERGED = 1e-12

_Numbers = NDArray[np.float64]


def probability(log_odds: _Numbers) -> _Numbers:
    """Of log-odds, elementwise; never 0 or 1."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(log_odds, -SURE, SURE))))


def logistic_regression(inputs: _Numbers, targets: _Numbers, penalty: float, start: _Numbers | None = None) -> _Numbers:
    """Weights (k,) and bias of the penalised regression of `targets` (n,), 0 … 1, on inputs (n, k).

    Newton's method (iteratively reweighted least squares) from `start`, its steps halved where they lead uphill.
    """
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    ridge = np.append(np.full(inputs.shape[1], max(penalty, _LEAST_PENALTY)), 0.0)

    def loss(theta: _Numbers) -> float:
        score = design @ theta
        return float((np.logaddexp(0.0, score) - targets * score).sum() + 0.5 * (ridge * theta * theta).sum())

    theta = log_odds_alone(targets, design.shape[1]) if start is None else start
    value = loss(theta)
    for _ in range(_STEPS):
        p = probability(design @ theta)
        slope = design.T @ (p - targets) + ridge * theta
        bend = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        bend[-1, -1] += _LEAST_PENALTY
        step = np.linalg.solve(bend, slope)
        if float(slope @ step) < _CONVERGED * max(value, 1.0):
            break
        size = 1.0
        while (lower := loss(theta - size * step)) > value and size > _SMALLEST_STEP:
            size /= 2
        if lower > value:
            break
        theta, value = theta - size * step, lower
    return theta


def log_odds_alone(targets: _Numbers, n: int) -> _Numbers:
    """`n` numbers of a regression that knows how many targets are 1 and nothing else."""
    theta: _Numbers = np.zeros(n)
    theta[-1] = math.log(targets.mean() / (1 - targets.mean()))
    return theta
