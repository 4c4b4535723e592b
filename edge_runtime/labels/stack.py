"""Fitting the stages of a cascade: each sees the scores of those before it.

Scores that a stage is fitted with must be of the kind it will see later. Training rows therefore get the scores of
earlier stages from models that were fitted without them (stacked generalisation, Wolpert 1992): five folds, one model
each. The models of the pack are then fitted on all training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Floats
from .fit import Linear, fit_dense, fit_sparse, fit_temperature, log_loss, log_softmax
from .ngrams import Sparse, scores

Labels = NDArray[np.int64]

N_FOLDS = 5
POOL_SETS = (("mean",), ("max",), ("last",), ("mean", "max"), ("mean", "last"))
_SCORE_FLOOR = -12.0  # log-probabilities below this say the same
_PENALTIES = (0.3, 0.1, 0.03, 0.01)
_SCORE_PENALTY = 0.01  # of the earlier stages' scores: few, and known to be good
# of the log-loss, for a boundary to be worth having: at least, and for as many layers as the model has
_MIN_GAIN, _GAIN_PER_MODEL = 0.003, 0.03
_LEAST_GAIN = 1e-4  # nats: below, hardly a message is decided otherwise
_TRIAL_ROWS = 6000  # to choose poolings with
_TRIAL_ITERATIONS = 40


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear probe at a boundary, on pooled states and the scores of earlier stages, in this order."""

    layer: int
    pools: tuple[str, ...]
    linear: Linear  # (n_labels, len(pools) · n_embd + stages before · n_labels)
    temperature: float

    def scores(self, pooled: Floats, earlier: Sequence[Floats]) -> Floats:
        """Uncalibrated scores (n, n_labels) from pooled states (n, len(pools) · n_embd) and the score features of
        each earlier stage (n, n_labels)."""
        return self.linear.scores(np.concatenate([pooled, *earlier], axis=1))

    def probabilities(self, raw: Floats) -> Floats:
        """Calibrated, (n, n_labels)."""
        return np.exp(log_softmax(raw / np.float32(self.temperature)))


def score_features(raw: Floats) -> Floats:
    """What later stages see of a stage's scores (n, n_labels)."""
    return np.maximum(log_softmax(raw), np.float32(_SCORE_FLOOR))


@dataclass(frozen=True, slots=True)
class Trial:
    """A pooling tried at a layer: log-loss in nats on rows it was not fitted on."""

    layer: int
    pools: tuple[str, ...]
    penalty: float
    loss: float


@dataclass(frozen=True, slots=True)
class FittedStage:
    """A stage's scores (n, n_labels) of training rows, from models fitted without each, and its temperature."""

    out_of_fold: Floats
    temperature: float

    @property
    def probabilities(self) -> Floats:
        """Calibrated, (n, n_labels)."""
        return np.exp(log_softmax(self.out_of_fold / np.float32(self.temperature)))


def folds_of(labels: Labels, n_folds: int, seed: int) -> Labels:
    """Fold (n,) of each row, labels spread evenly."""
    folds = np.empty(len(labels), np.int64)
    random = np.random.default_rng(seed)
    start = 0
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        folds[rows] = (np.arange(len(rows)) + start) % n_folds
        start += len(rows)
    return folds


class StackFitter:
    """Fits stages one after the other on training rows; `labels` (n,) number the labels."""

    def __init__(self, labels: Labels, n_labels: int, step: Callable[[], None] = lambda: None, seed: int = 0) -> None:
        """`step` is called after each model fitted."""
        self._labels, self._n_labels, self._step = labels, n_labels, step
        self._folds = folds_of(labels, N_FOLDS, seed)
        self.stages: list[FittedStage] = []
        self.trials: list[Trial] = []

    def fit_ngrams(self, rows: Sparse, n_buckets: int) -> tuple[Linear, float]:
        """Stage 0 and its temperature."""

        def fit(chosen: NDArray[np.int64]) -> Linear:
            # as strong as the customary C = 4
            return fit_sparse(rows.rows(chosen), self._labels[chosen], self._n_labels, n_buckets, 1 / (4 * len(chosen)))

        out = np.empty((len(self._labels), self._n_labels), np.float32)
        for fold in range(N_FOLDS):
            inside = np.flatnonzero(self._folds == fold)
            model = fit(np.flatnonzero(self._folds != fold))
            out[inside] = scores(rows.rows(inside), model.weights, model.bias)
            self._step()
        model = fit(np.arange(len(self._labels)))
        self._step()
        return model, self._keep(out).temperature

    def choose_pools(self, layer: int, pooled: Callable[[str], Floats]) -> Trial:
        """The best of the poolings at a layer, by log-loss on a fold left out; `pooled(kind)` is (n, n_embd)."""
        left_out = np.flatnonzero(self._folds == 0)
        inside = np.flatnonzero(self._folds != 0)
        if len(inside) > _TRIAL_ROWS:  # of all labels: files are often sorted by them
            inside = np.random.default_rng(0).choice(inside, _TRIAL_ROWS, replace=False)
        best: Trial | None = None
        for pools in POOL_SETS:
            features = np.concatenate([pooled(kind) for kind in pools] + self._earlier(), axis=1)
            loss, penalty = np.inf, _PENALTIES[0]
            for tried in _PENALTIES:
                model = self._fit(features, inside, tried, _TRIAL_ITERATIONS)
                new = log_loss(log_softmax(model.scores(features[left_out])), self._labels[left_out])
                if new >= loss:
                    break  # weaker penalties only fit closer
                loss, penalty = new, tried
            trial = Trial(layer, pools, penalty, loss)
            self.trials.append(trial)
            self._step()
            if best is None or loss < best.loss:
                best = trial
        assert best is not None
        return best

    def fit_probe(self, chosen: Trial, pooled: Callable[[str], Floats]) -> Probe:
        """A probe with the chosen pooling, and its stage."""
        features = np.concatenate([pooled(kind) for kind in chosen.pools] + self._earlier(), axis=1)
        out = np.empty((len(self._labels), self._n_labels), np.float32)
        for fold in range(N_FOLDS):
            inside = np.flatnonzero(self._folds == fold)
            model = self._fit(features, np.flatnonzero(self._folds != fold), chosen.penalty)
            out[inside] = model.scores(features[inside])
            self._step()
        linear = self._fit(features, np.arange(len(self._labels)), chosen.penalty)
        self._step()
        stage = self._keep(out)
        return Probe(chosen.layer, chosen.pools, linear, stage.temperature)

    def drop_unless_worth(self, depth: float) -> bool:
        """Drop the last stage unless it gains enough log-loss on the one before; whether it stays.

        `depth`: the layers it takes more, as a share of the model's. They have to be paid for.
        """
        before, after = (self.loss_of(stage) for stage in self.stages[-2:])
        worth = before - after >= max(_LEAST_GAIN, before * max(_MIN_GAIN, _GAIN_PER_MODEL * depth))
        if not worth:
            self.stages.pop()
        return worth

    def loss_of(self, stage: FittedStage) -> float:
        """Log-loss in nats of the calibrated out-of-fold probabilities."""
        return log_loss(np.log(np.maximum(stage.probabilities, 1e-12)), self._labels)

    def _fit(self, features: Floats, rows: NDArray[np.int64], penalty: float, max_iterations: int = 80) -> Linear:
        penalties = np.full(features.shape[1], penalty, np.float32)
        n_scores = len(self.stages) * self._n_labels
        if n_scores:
            penalties[-n_scores:] = min(penalty, _SCORE_PENALTY)
        return fit_dense(features[rows], self._labels[rows], self._n_labels, penalties, max_iterations)

    def _earlier(self) -> list[Floats]:
        return [score_features(stage.out_of_fold) for stage in self.stages]

    def _keep(self, out_of_fold: Floats) -> FittedStage:
        stage = FittedStage(out_of_fold, fit_temperature(out_of_fold, self._labels))
        self.stages.append(stage)
        return stage
