"""A semantic entropy probe: from a prompt's own hidden state to how uncertain the model's answers to it will be.

A logistic regression on the state of the prompt's last token at a boundary says, before anything is generated, how
likely the answers' semantic entropy is to be high (Kossen et al. 2024, arXiv 2406.15927). Where high begins is found
as they do: at the split of the training prompts' entropies that leaves the least variance on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..logistic import log_odds_alone, logistic_regression, probability
from ..metrics import auroc
from ..types import Floats

FEWEST_PROMPTS = 20
_FEWEST_OF_A_KIND = 5
_FOLDS = 5
_PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01)  # per input; the strongest of equally good ones is taken
_FAR = 8.0  # standard deviations: what lies further out was not seen when the probe was fitted
_TINY_SHARE = 1e-6
_CONSTANT = 1e-6

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """probability = 1 / (1 + e^-(bias + Σ weight · (state - mean) / scale)) of states behind `layer` layers.

    Raises ValueError if its numbers do not fit together.
    """

    layer: int
    weights: Floats  # (n_embd,) float32
    bias: float
    mean: Floats  # (n_embd,) float32
    scale: Floats  # (n_embd,) float32, above 0
    threshold: float  # nats; semantic entropy above it is high
    penalty: float  # per input
    n_prompts: int  # fitted to
    n_high: int  # of them
    loss: float  # nats per prompt, on prompts that were held out when the penalty was chosen
    auroc: float  # on the same

    def __post_init__(self) -> None:
        vectors = [np.asarray(getattr(self, name), np.float32) for name in ("weights", "mean", "scale")]
        for name, vector in zip(("weights", "mean", "scale"), vectors, strict=True):
            object.__setattr__(self, name, vector)
        if {vector.shape for vector in vectors} != {(len(vectors[0].ravel()),)} or not len(vectors[0]):
            raise ValueError("its weights, means and scales are not equally many")
        numbers = (self.bias, self.threshold, self.penalty)
        if not (all(map(math.isfinite, numbers)) and all(np.isfinite(vector).all() for vector in vectors)):
            raise ValueError("not all of its numbers are finite")
        if self.layer < 1 or self.threshold < 0 or not (self.scale > 0).all():
            raise ValueError("its layer, threshold or scales are out of range")

    @property
    def n_embd(self) -> int:
        return len(self.weights)

    def predict(self, states: Floats) -> Floats:
        """Probability (n,) that semantic entropy is high, for states (n, n_embd); NaN for a state with no number in it.

        Raises ValueError for states of another width.
        """
        if states.ndim != 2 or states.shape[1] != self.n_embd:
            raise ValueError(f"states of shape {states.shape} for a probe of width {self.n_embd}")
        with np.errstate(invalid="ignore"):  # infinity is far out, NaN stays what it is
            inputs = np.clip((states.astype(np.float64) - self.mean) / self.scale, -_FAR, _FAR)
        return np.asarray(probability(inputs @ self.weights.astype(np.float64) + self.bias), np.float32)


def best_split(entropies: Floats) -> float:
    """The threshold, between two of `entropies` (n,), that leaves the least sum of squared deviations on both sides.

    Raises UsageError if all are the same, or some no numbers.
    """
    values = np.sort(np.asarray(entropies, np.float64))
    if not len(values) or not np.isfinite(values).all() or values[0] == values[-1]:
        raise UsageError(
            "the answers to all prompts are equally uncertain: there is nothing to learn",
            "give prompts of which some are easy for the model and some are not",
        )
    n_below = np.arange(1, len(values))
    below, above = values.cumsum()[:-1], values[::-1].cumsum()[-2::-1]
    # squares of all values are the same for every split, so that these are what differs
    gained = below**2 / n_below + above**2 / (len(values) - n_below)
    place = int(gained.argmax())  # never between equal values: gains are convex there
    return float((values[place] + values[place + 1]) / 2)


def fit_probe(
    states: Floats,
    entropies: Floats,
    layer: int,
    *,
    threshold: float | None = None,
    penalty: float | None = None,
    seed: int = 0,
) -> Probe:
    """Fit to states (n, n_embd) of prompts' last tokens behind `layer` layers, and semantic entropies (n,) in nats.

    Minimises the sum of log-losses + ½ · penalty · n_embd · |weights|² on standardised states, the bias free. Without a
    `threshold` it is `best_split`'s, without a `penalty` that of the least log-loss in cross-validation over prompts,
    which `seed` deals out. Labels are drawn in as by one more prompt of each kind (Platt 1999).

    Raises UsageError for too few prompts, or too few with high or low entropy.
    """
    states, entropies = np.asarray(states), np.asarray(entropies)
    if len(states) < FEWEST_PROMPTS:
        raise UsageError(f"{len(states)} prompts are too few to fit a probe to", f"give {FEWEST_PROMPTS} or more")
    if not np.isfinite(states).all():
        raise UsageError(f"some hidden states behind layer {layer} are no numbers", "the model may be damaged")
    threshold = best_split(entropies) if threshold is None else threshold
    high = entropies > threshold
    if min(n_high := int(high.sum()), len(high) - n_high) < _FEWEST_OF_A_KIND:
        raise UsageError(
            f"semantic entropy is above {threshold:.2f} nats for {n_high} of {len(high)} prompts: too few of one kind "
            "to learn from",
            "give more prompts, some easy for the model and some not",
        )
    penalties = _PENALTIES if penalty is None else (penalty,)
    columns = _held_out(states, high, penalties, seed)
    losses = [_log_loss(column, high) for column in columns]
    best = int(np.argmin(losses))
    mean, scale = _moments(states)
    found = _logistic(_standardised(states, mean, scale), high, [penalties[best]])[0]
    return Probe(
        layer=layer,
        weights=found[:-1].astype(np.float32),
        bias=float(found[-1]),
        mean=mean,
        scale=scale,
        threshold=float(threshold),
        penalty=penalties[best],
        n_prompts=len(states),
        n_high=n_high,
        loss=losses[best],
        auroc=auroc(high, columns[best].astype(np.float32)),
    )


def _held_out(states: Floats, high: NDArray[np.bool_], penalties: tuple[float, ...], seed: int) -> list[_Numbers]:
    """For each penalty, the probability (n,) of each prompt by a regression on others."""
    found: list[_Numbers] = [np.empty(len(high)) for _ in penalties]
    for held in _folds(high, seed):
        mean, scale = _moments(states[~held])
        fitted = _logistic(_standardised(states[~held], mean, scale), high[~held], penalties)
        others = _standardised(states[held], mean, scale)
        for column, theta in zip(found, fitted, strict=True):
            column[held] = probability(others @ theta[:-1] + theta[-1])
    return found


def _folds(high: NDArray[np.bool_], seed: int) -> Iterator[NDArray[np.bool_]]:
    """Which prompts (n,) each fold holds out; both kinds are spread evenly."""
    order = np.random.default_rng(seed).permutation(len(high))
    dealt = np.empty(len(high), np.int64)
    dealt[order[np.argsort(high[order], kind="stable")]] = np.arange(len(high)) % _FOLDS
    for fold in range(_FOLDS):
        yield dealt == fold


def _moments(states: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation (n_embd,) of states (n, n_embd); 1 where a state hardly changes."""
    wide = states.astype(np.float64)
    mean, scale = wide.mean(axis=0), wide.std(axis=0)
    scale[scale <= _CONSTANT * np.maximum(np.abs(mean), 1)] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def _standardised(states: Floats, mean: Floats, scale: Floats) -> _Numbers:
    return np.clip((states.astype(np.float64) - mean) / scale, -_FAR, _FAR)


def _log_loss(probabilities: _Numbers, high: NDArray[np.bool_]) -> float:
    p = np.clip(probabilities, _TINY_SHARE, 1 - _TINY_SHARE)
    return float(-np.log(np.where(high, p, 1 - p)).mean())


def _logistic(inputs: _Numbers, high: NDArray[np.bool_], penalties: tuple[float, ...] | list[float]) -> list[_Numbers]:
    """Weights (d,) and bias of the regression on inputs (n, d), for each penalty.

    The weights lie in the space that the inputs span: with fewer inputs than dimensions, all is done in it.
    """
    n, d = inputs.shape
    basis, inside = (None, inputs) if n > d else np.linalg.qr(inputs.T)
    inside = inside if basis is None else inside.T
    n_high, n_low = int(high.sum()), int((~high).sum())
    targets = np.where(high, (n_high + 1) / (n_high + 2), 1 / (n_low + 2))
    found = []
    theta = log_odds_alone(targets, inside.shape[1] + 1)
    for penalty in penalties:  # each begins where the one before ended
        theta = logistic_regression(inside, targets, penalty * d, theta)
        found.append(theta if basis is None else np.append(basis @ theta[:-1], theta[-1]))
    return found
