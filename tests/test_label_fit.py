"""Fits end at the optimum, told by the gradient that the definition gives, and do not depend on how data are scaled."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.labels.fit import Linear, fit_dense, fit_sparse, fit_temperature, log_loss, log_softmax, minimise
from edge_runtime.labels.ngrams import Sparse
from edge_runtime.types import Floats

Exact = NDArray[np.float64]
Labels = NDArray[np.int64]


def drawn(n: int, d: int, n_labels: int, seed: int = 0, signal: float = 1.0) -> tuple[Floats, Labels]:
    """Features (n, d), and labels that a random linear model gives them."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((n, d)).astype(np.float32)
    logits = signal * features @ random.standard_normal((d, n_labels)) + random.gumbel(size=(n, n_labels))
    return features, logits.argmax(axis=1).astype(np.int64)


def softmax(scores: Exact) -> Exact:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def objective(
    features: Exact, labels: Labels, weights: Exact, bias: Exact, penalty: float | Exact
) -> tuple[float, Exact, Exact]:
    """Loss as the docstring defines it, in float64, with its gradient by weights and bias."""
    p = softmax(features @ weights.T + bias)
    rows = np.arange(len(labels))
    loss = float(-np.log(p[rows, labels]).mean() + 0.5 * (penalty * weights**2).sum())
    errors = p.copy()
    errors[rows, labels] -= 1
    errors /= len(labels)
    return loss, errors.T @ features + penalty * weights, errors.sum(axis=0)


def newton(features: Exact, labels: Labels, n_labels: int, penalty: float | Exact) -> float:
    """The least loss, by Newton steps on the exact Hessian: for small problems."""
    n, d = features.shape
    inputs = np.hstack([features, np.ones((n, 1))])
    penalties = np.append(np.broadcast_to(penalty, d), 1e-9)
    point = np.zeros((n_labels, d + 1))
    for _ in range(60):
        p = softmax(inputs @ point.T)
        _, by_weights, by_bias = objective(features, labels, point[:, :-1], point[:, -1], penalty)
        gradient = np.hstack([by_weights, by_bias[:, None]])
        hessian = np.zeros((n_labels, d + 1, n_labels, d + 1))
        for a in range(n_labels):
            for b in range(n_labels):
                share = p[:, a] * ((a == b) - p[:, b]) / n
                hessian[a, :, b, :] = (inputs * share[:, None]).T @ inputs + (a == b) * np.diag(penalties)
        size = point.size
        change = np.linalg.solve(hessian.reshape(size, size) + 1e-10 * np.eye(size), gradient.ravel())
        point = point - change.reshape(point.shape)
    return objective(features, labels, point[:, :-1], point[:, -1], penalty)[0]


def standardised(features: Floats, model: Linear) -> tuple[Exact, Exact, Exact]:
    """Features, weights and bias in the units that the penalty is about."""
    exact = features.astype(np.float64)
    mean, scale = exact.mean(axis=0), exact.std(axis=0)
    return (exact - mean) / scale, model.weights * scale, model.bias + model.weights @ mean


def sparse_of(features: Floats) -> Sparse:
    rows, buckets = np.nonzero(features)
    starts = np.searchsorted(rows, np.arange(len(features) + 1))
    return Sparse(buckets.astype(np.int32), features[rows, buckets], starts.astype(np.int64))


# ── logistic regression ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_labels", [2, 4])
@pytest.mark.parametrize("penalty", [0.3, 0.01, 0.001])
def test_a_dense_fit_reaches_the_optimum(n_labels: int, penalty: float) -> None:
    features, labels = drawn(400, 12, n_labels, seed=n_labels)
    features = features * np.float32([3.0]) + np.float32([0.5])
    inputs, weights, bias = standardised(features, fit_dense(features, labels, n_labels, penalty))
    loss, by_weights, by_bias = objective(inputs, labels, weights, bias, penalty)
    assert max(np.abs(by_weights).max(), np.abs(by_bias).max()) < 3e-3
    assert loss <= newton(inputs, labels, n_labels, penalty) * 1.0005


def test_each_feature_can_have_its_own_penalty() -> None:
    features, labels = drawn(400, 6, 3)
    penalties = np.array([10, 10, 10, 0.001, 0.001, 0.001], np.float32)
    inputs, weights, bias = standardised(features, fit_dense(features, labels, 3, penalties))
    loss, by_weights, _ = objective(inputs, labels, weights, bias, penalties)
    assert np.abs(by_weights).max() < 3e-3
    assert loss <= newton(inputs, labels, 3, penalties) * 1.0005
    assert np.abs(weights[:, :3]).max() < 0.1 * np.abs(weights[:, 3:]).max()


@pytest.mark.parametrize("penalty", [0.01, 0.0005])
def test_a_sparse_fit_reaches_the_optimum(penalty: float) -> None:
    features, labels = drawn(300, 15, 3, seed=5)
    features[np.random.default_rng(1).random(features.shape) < 0.6] = 0
    model = fit_sparse(sparse_of(features), labels, 3, 15, penalty)
    exact = features.astype(np.float64)
    loss, by_weights, by_bias = objective(exact, labels, model.weights, model.bias, penalty)
    assert max(np.abs(by_weights).max(), np.abs(by_bias).max()) < 3e-3
    assert loss <= newton(exact, labels, 3, penalty) * 1.001


def test_sparse_and_dense_fits_agree_on_the_same_data() -> None:
    features, labels = drawn(500, 8, 3, seed=2)
    features = ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float32)
    dense = fit_dense(features, labels, 3, 0.01)
    sparse = fit_sparse(sparse_of(features), labels, 3, 8, 0.01)
    assert dense.weights == pytest.approx(sparse.weights, abs=0.02)
    assert dense.bias - dense.bias.mean() == pytest.approx(sparse.bias - sparse.bias.mean(), abs=0.02)


def test_rows_and_buckets_without_entries_are_fitted_around() -> None:
    features, labels = drawn(200, 6, 2, seed=3)
    features[[0, 1, 50, 198, 199]] = 0
    wide = np.zeros((200, 40), np.float32)
    wide[:, 5:35:5] = features
    narrow_model = fit_sparse(sparse_of(features), labels, 2, 6, 0.01)
    wide_model = fit_sparse(sparse_of(wide), labels, 2, 40, 0.01)
    assert wide_model.weights.shape == (2, 40)
    assert wide_model.weights[:, 5:35:5] == pytest.approx(narrow_model.weights, abs=1e-5)
    assert np.count_nonzero(wide_model.weights[:, :5]) == 0
    _, by_weights, by_bias = objective(wide.astype(np.float64), labels, wide_model.weights, wide_model.bias, 0.01)
    assert max(np.abs(by_weights).max(), np.abs(by_bias).max()) < 3e-3


def test_separable_data_end_with_finite_weights_and_every_row_right() -> None:
    features = np.concatenate([np.full((50, 2), -1.0), np.full((50, 2), 1.0)]).astype(np.float32)
    features += np.random.default_rng(0).normal(0, 0.1, features.shape).astype(np.float32)
    labels = np.repeat([0, 1], 50).astype(np.int64)
    for penalty in (0.01, 1e-6):
        model = fit_dense(features, labels, 2, penalty)
        assert np.isfinite(model.weights).all()
        assert (model.scores(features).argmax(axis=1) == labels).all()


def test_a_label_without_rows_is_the_least_likely() -> None:
    features, labels = drawn(300, 5, 2)
    labels[labels == 1] = 2  # of 0, 1, 2, 3
    model = fit_dense(features, labels, 4, 0.01)
    p = softmax(model.scores(features).astype(np.float64))
    assert np.isfinite(p).all()
    assert p[:, [1, 3]].max() < 0.02
    assert (p.argmax(axis=1) == labels).mean() > 0.7


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 0.0), (0.001, 0.0), (1.0, 100.0), (50.0, -20.0)])
def test_scale_and_origin_of_features_do_not_matter(factor: float, shift: float) -> None:
    features, labels = drawn(600, 6, 3, seed=4)
    changed = (features.astype(np.float64) * factor + shift).astype(np.float32)
    plain = fit_dense(features, labels, 3, 0.01)
    moved = fit_dense(changed, labels, 3, 0.01)
    assert moved.scores(changed) == pytest.approx(plain.scores(features), abs=0.02)


@pytest.mark.parametrize("value", [0.1, 1000.1, -30000.3])
def test_a_constant_feature_changes_nothing(value: float) -> None:
    features, labels = drawn(3000, 4, 2, seed=6)
    more = np.hstack([features, np.full((3000, 1), value, np.float32)])
    plain, model = fit_dense(features, labels, 2, 0.01), fit_dense(more, labels, 2, 0.01)
    assert model.scores(more) == pytest.approx(plain.scores(features), abs=0.02)


# ── minimiser ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_a_badly_conditioned_quadratic_is_minimised(condition: float) -> None:
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.standard_normal((20, 20)))
    matrix = basis * np.geomspace(1, condition, 20) @ basis.T
    target = random.standard_normal(20)
    calls = 0

    def quadratic(point: Floats) -> tuple[float, Floats]:
        nonlocal calls
        calls += 1
        away = point.astype(np.float64).ravel() - target
        return float(0.5 * away @ matrix @ away), (matrix @ away).reshape(point.shape).astype(np.float32)

    start = np.zeros((4, 5), np.float32)
    first, _ = quadratic(start)
    found = minimise(quadratic, start, 400, tolerance=1e-9)
    assert quadratic(found)[0] < 1e-6 * first
    assert calls < 1000


def test_a_minimum_to_begin_with_is_left_alone() -> None:
    start = np.array([[1.0, 2.0]], np.float32)
    found = minimise(lambda p: (float(np.square(p - start).sum()), 2 * (p - start)), start, 50)
    assert (found == start).all()


def test_no_more_steps_are_taken_than_allowed() -> None:
    def bowl(point: Floats) -> tuple[float, Floats]:
        return float(np.square(point).sum()), 2 * point

    start = np.full((1, 3), 100.0, np.float32)
    assert (minimise(bowl, start, 0) == start).all()
    assert bowl(minimise(bowl, start, 1))[0] < bowl(start)[0]


# ── temperature, log-probabilities ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 10.0])
def test_the_temperature_undoes_a_known_factor(factor: float) -> None:
    random = np.random.default_rng(1)
    logits = 1.5 * random.standard_normal((20_000, 3))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1).astype(np.int64)
    assert fit_temperature((logits * factor).astype(np.float32), labels) == pytest.approx(factor, rel=0.05)


def test_the_temperature_is_the_best_there_is() -> None:
    random = np.random.default_rng(2)
    scores = (4 * random.standard_normal((300, 3))).astype(np.float32)
    labels = (scores / 2.5 + random.gumbel(size=scores.shape)).argmax(axis=1).astype(np.int64)
    best = fit_temperature(scores, labels)
    losses = {t: log_loss(log_softmax(scores / np.float32(t)), labels) for t in (best, best * 0.9, best * 1.1)}
    assert min(losses, key=losses.__getitem__) == best


def test_scores_that_are_always_right_are_sharpened_and_those_always_wrong_flattened() -> None:
    labels = np.array([0, 1, 0, 1], np.int64)
    right = np.float32([[2, 0], [0, 2], [2, 0], [0, 2]])
    assert 0.05 <= fit_temperature(right, labels) < 0.2
    assert fit_temperature(-right, labels) == pytest.approx(20.0, rel=0.01)


def test_log_softmax_of_large_scores() -> None:
    scores = np.float32([[1000, 0], [-1000, -1000], [3e4, 3e4]])
    assert log_softmax(scores) == pytest.approx(np.array([[0, -1000], [-np.log(2)] * 2, [-np.log(2)] * 2]))


def test_log_loss_by_hand() -> None:
    p = np.log(np.float32([[0.5, 0.5], [0.25, 0.75]]))
    assert log_loss(p, np.array([0, 1])) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
