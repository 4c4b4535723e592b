"""A stage is fitted on scores that come from models which did not see the row, and kept only where it helps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edge_runtime.labels import stack
from edge_runtime.labels.fit import Linear, log_loss, log_softmax
from edge_runtime.labels.ngrams import Sparse, scores
from edge_runtime.labels.stack import (
    N_FOLDS,
    POOL_SETS,
    FittedStage,
    Probe,
    StackFitter,
    Trial,
    folds_of,
    score_features,
)
from edge_runtime.types import Floats

N_EMBD = 6


def one_bucket_each(buckets: np.ndarray) -> Sparse:
    n = len(buckets)
    return Sparse(buckets.astype(np.int32), np.ones(n, np.float32), np.arange(n + 1, dtype=np.int64))


class Pools:
    """Random pooled states (n, N_EMBD) of every kind; `signal` of them tells the label in those named."""

    def __init__(self, labels: np.ndarray, signal: float, kinds: tuple[str, ...] = ("mean",), seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.asked: list[str] = []
        self._values = {}
        for kind in ("mean", "max", "last"):
            noise = random.standard_normal((len(labels), N_EMBD)).astype(np.float32)
            directions = random.standard_normal((int(labels.max()) + 1, N_EMBD)).astype(np.float32)
            self._values[kind] = noise + (signal * directions[labels] if kind in kinds else np.float32(0))

    def __call__(self, kind: str) -> Floats:
        self.asked.append(kind)
        return self._values[kind]


def fitter_with_ngrams(labels: np.ndarray, told: float = 0.6, seed: int = 0) -> StackFitter:
    """Stage 0 knows the label of a share `told` of the rows."""
    random = np.random.default_rng(seed)
    buckets = np.where(random.random(len(labels)) < told, labels, random.integers(0, labels.max() + 1, len(labels)))
    fitter = StackFitter(labels, int(labels.max()) + 1)
    fitter.fit_ngrams(one_bucket_each(buckets), 8)
    return fitter


def random_labels(n: int, n_labels: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_labels, n).astype(np.int64)


# ── folds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_fold_has_its_share_of_every_label() -> None:
    labels = np.repeat([0, 1, 2, 3], [103, 41, 7, 2])
    folds = folds_of(labels, 5, seed=3)
    for label, count in Counter(labels.tolist()).items():
        sizes = np.bincount(folds[labels == label], minlength=5)
        assert sizes.max() - sizes.min() <= 1, label
        assert sizes.sum() == count
    sizes = np.bincount(folds, minlength=5)
    assert sizes.max() - sizes.min() <= 1


def test_folds_are_drawn_by_the_seed() -> None:
    labels = random_labels(200)
    assert (folds_of(labels, 5, 1) == folds_of(labels, 5, 1)).all()
    assert (folds_of(labels, 5, 1) != folds_of(labels, 5, 2)).any()
    assert len(set(folds_of(np.zeros(50, np.int64), 5, 1)[:5])) > 1  # not in the order of the rows
    assert (folds_of(np.zeros(50, np.int64), 5, 1) != np.arange(50) % 5).any()


# ── out of fold ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ngram_scores_of_training_rows_come_from_models_that_did_not_see_them() -> None:
    """Every row has a bucket of its own: a model that saw the row knows its label, any other knows nothing."""
    labels = random_labels(400)
    fitter = StackFitter(labels, 2)
    rows = one_bucket_each(np.arange(400))
    model, _ = fitter.fit_ngrams(rows, 400)
    assert (scores(rows, model.weights, model.bias).argmax(axis=1) == labels).all()
    (stage,) = fitter.stages
    assert abs((stage.out_of_fold.argmax(axis=1) == labels).mean() - 0.5) < 0.1
    assert fitter.loss_of(stage) > 0.65


def test_probe_scores_of_training_rows_come_from_models_that_did_not_see_them() -> None:
    """More features than rows, and labels at random: a model that saw the rows knows them all."""
    labels = random_labels(120)
    fitter = StackFitter(labels, 2)
    states = np.random.default_rng(0).standard_normal((120, 300)).astype(np.float32)
    probe = fitter.fit_probe(Trial(3, ("mean",), 0.001, 0.0), lambda _: states)
    assert (probe.scores(states, []).argmax(axis=1) == labels).all()
    (stage,) = fitter.stages
    assert abs((stage.out_of_fold.argmax(axis=1) == labels).mean() - 0.5) < 0.15
    assert fitter.loss_of(stage) > 0.6


def test_out_of_fold_scores_are_those_of_the_model_of_the_other_folds() -> None:
    labels = random_labels(300)
    buckets = (labels + (np.random.default_rng(0).random(300) < 0.2)) % 4
    fitter = StackFitter(labels, 2, seed=7)
    fitter.fit_ngrams(one_bucket_each(buckets), 4)
    folds = folds_of(labels, N_FOLDS, 7)
    for fold in range(N_FOLDS):
        inside = folds == fold
        chosen = np.flatnonzero(~inside)
        alone = stack.fit_sparse(one_bucket_each(buckets[chosen]), labels[chosen], 2, 4, 1 / (4 * len(chosen)))
        expected = alone.weights[:, buckets[inside]].T + alone.bias
        assert fitter.stages[0].out_of_fold[inside] == pytest.approx(expected, abs=1e-5)


def test_stages_have_calibrated_probabilities() -> None:
    labels = random_labels(1500)
    fitter = fitter_with_ngrams(labels)
    (stage,) = fitter.stages
    p = stage.probabilities
    assert p.sum(axis=1) == pytest.approx(np.ones(1500), abs=1e-5)
    assert p == pytest.approx(np.exp(log_softmax(stage.out_of_fold / np.float32(stage.temperature))))
    right = p.argmax(axis=1) == labels
    assert p.max(axis=1).mean() == pytest.approx(right.mean(), abs=0.03)
    assert fitter.loss_of(stage) == pytest.approx(log_loss(np.log(p), labels), abs=1e-5)


# ── boundaries ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_useless_boundary_is_dropped_and_a_useful_one_kept() -> None:
    labels = random_labels(800, 3)
    fitter = fitter_with_ngrams(labels)
    useless, useful = Pools(labels, 0.0), Pools(labels, 0.8)
    fitter.fit_probe(fitter.choose_pools(2, useless), useless)
    assert len(fitter.stages) == 2
    assert not fitter.drop_unless_worth(0.1)
    assert len(fitter.stages) == 1
    before = fitter.loss_of(fitter.stages[0])
    probe = fitter.fit_probe(fitter.choose_pools(4, useful), useful)
    assert fitter.drop_unless_worth(0.1)
    assert probe.layer == 4
    assert len(fitter.stages) == 2
    assert fitter.loss_of(fitter.stages[1]) < 0.8 * before
    assert probe.linear.weights.shape == (3, len(probe.pools) * N_EMBD + 3)
    # and after a kept one, the same states again bring nothing new
    fitter.fit_probe(fitter.choose_pools(5, useful), useful)
    assert not fitter.drop_unless_worth(0.1)
    assert len(fitter.stages) == 2


@pytest.mark.parametrize(
    ("depth", "gain", "worth"),
    [
        (0.0, 0.0032, True),
        (0.0, 0.0028, False),
        (0.1, 0.0032, True),
        (0.1, 0.0028, False),
        (0.5, 0.0155, True),
        (0.5, 0.0145, False),
        (1.0, 0.0305, True),
        (1.0, 0.0295, False),
        (0.1, -0.1, False),
    ],
)
def test_a_boundary_must_gain_what_its_layers_cost(depth: float, gain: float, worth: bool) -> None:
    """3% of the log-loss for all layers of a model, 0.3% at least."""
    fitter = StackFitter(np.zeros(1000, np.int64), 2)

    def stage(loss: float) -> FittedStage:
        p = np.exp(-loss)
        return FittedStage(np.tile(np.log(np.float32([p, 1 - p])), (1000, 1)), 1.0)

    fitter.stages += [stage(9.0), stage(0.5), stage(0.5 * (1 - gain))]
    assert fitter.loss_of(fitter.stages[1]) == pytest.approx(0.5, rel=1e-5)
    assert fitter.drop_unless_worth(depth) == worth
    assert len(fitter.stages) == 2 + worth


@pytest.mark.parametrize("kinds", [("max",), ("mean", "last")])
def test_the_pooling_that_tells_most_is_chosen(kinds: tuple[str, ...]) -> None:
    labels = random_labels(900, 3)
    fitter = fitter_with_ngrams(labels, 0.3)
    best = fitter.choose_pools(3, Pools(labels, 0.8, kinds))
    assert set(kinds) <= set(best.pools)
    assert [trial.pools for trial in fitter.trials] == list(POOL_SETS)
    assert best.loss == min(trial.loss for trial in fitter.trials)
    assert {trial.layer for trial in fitter.trials} == {3}


def test_rows_sorted_by_label_do_not_spoil_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only part of the rows is tried, it must have all labels: files are often sorted by them."""
    monkeypatch.setattr(stack, "_TRIAL_ROWS", 200)
    labels = np.sort(random_labels(900, 3))
    pools = Pools(labels, 1.5)
    best = StackFitter(labels, 3).choose_pools(3, pools)
    assert "mean" in best.pools
    assert best.loss < 0.5


def test_every_model_fitted_is_told() -> None:
    labels = random_labels(200)
    told = []
    fitter = StackFitter(labels, 2, lambda: told.append(len(fitter.stages)))
    fitter.fit_ngrams(one_bucket_each(labels), 4)
    assert len(told) == N_FOLDS + 1
    pools = Pools(labels, 1.0)
    chosen = fitter.choose_pools(1, pools)
    assert len(told) == N_FOLDS + 1 + len(POOL_SETS)
    fitter.fit_probe(chosen, pools)
    assert len(told) == 2 * (N_FOLDS + 1) + len(POOL_SETS)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_probe_reads_pools_first_and_then_earlier_stages_in_order() -> None:
    weights = np.arange(2 * 8, dtype=np.float32).reshape(2, 8)
    probe = Probe(3, ("mean", "max"), Linear(weights, np.float32([1, -1])), 2.0)
    pooled = np.float32([[1, 0, 0, 2]])
    earlier = [np.float32([[-1, -2]]), np.float32([[-3, -4]])]
    inputs = np.array([1, 0, 0, 2, -1, -2, -3, -4])
    assert probe.scores(pooled, earlier)[0] == pytest.approx(weights @ inputs + [1, -1])


def test_a_fitted_probe_reads_the_score_features_of_all_stages_before_it() -> None:
    """The last stage's scores, out of fold, are what the final model gives for the inputs in this order, nearly."""
    labels = random_labels(1000, 2)
    fitter = fitter_with_ngrams(labels, 0.5)
    first, second = Pools(labels, 0.5, seed=1), Pools(labels, 0.5, seed=2)
    fitter.fit_probe(Trial(1, ("mean",), 0.03, 0.0), first)
    probe = fitter.fit_probe(Trial(2, ("last", "mean"), 0.03, 0.0), second)
    assert second.asked == ["last", "mean"]
    pooled = np.concatenate([second("last"), second("mean")], axis=1)
    earlier = [score_features(stage.out_of_fold) for stage in fitter.stages[:2]]
    inside = probe.scores(pooled, earlier)
    outside = fitter.stages[2].out_of_fold
    assert np.corrcoef(inside[:, 0] - inside[:, 1], outside[:, 0] - outside[:, 1])[0, 1] > 0.98
    swapped = probe.scores(pooled, earlier[::-1])
    assert np.abs(inside - outside).mean() < np.abs(swapped - outside).mean()


def test_pools_have_the_chosen_penalty_and_earlier_scores_a_weaker_one() -> None:
    labels = random_labels(400, 2)
    fitter, pools = StackFitter(labels, 2), Pools(labels, 0.5)
    first = fitter.fit_probe(Trial(1, ("mean",), 0.3, 0.0), pools)
    alone = stack.fit_dense(pools("mean"), labels, 2, np.full(N_EMBD, 0.3, np.float32))
    assert first.linear.weights == pytest.approx(alone.weights, abs=1e-4)
    second = fitter.fit_probe(Trial(2, ("max",), 0.3, 0.0), pools)
    features = np.concatenate([pools("max"), score_features(fitter.stages[0].out_of_fold)], axis=1)
    after = stack.fit_dense(features, labels, 2, np.float32([0.3] * N_EMBD + [0.01] * 2))
    assert second.linear.weights == pytest.approx(after.weights, abs=1e-4)


def test_score_features_are_log_probabilities_with_a_floor() -> None:
    raw = np.float32([[0, 0], [1000, 0]])
    assert score_features(raw) == pytest.approx(np.array([[-np.log(2)] * 2, [0, -12]]))


def test_a_probes_probabilities_are_those_at_its_temperature() -> None:
    probe = Probe(1, ("mean",), Linear(np.zeros((2, 1), np.float32), np.zeros(2, np.float32)), 4.0)
    assert probe.probabilities(np.float32([[4, 0]]))[0] == pytest.approx([np.e / (1 + np.e), 1 / (1 + np.e)])
