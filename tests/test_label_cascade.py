"""Messages leave where a loop over single messages says, and thresholds keep what their level promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.labels.cascade import NEVER, Outcome, candidates, decision_weights, leaves, run, weigh
from edge_runtime.metrics import macro_f1
from edge_runtime.types import Floats

MIN_EXITS = 30


def probabilities(random: np.random.Generator, n: int, n_labels: int, steps: int = 0) -> Floats:
    """(n, n_labels); with `steps`, of so few values that many are equal."""
    values = random.dirichlet(np.full(n_labels, 0.7), n)
    if steps:
        values = np.round(values * steps) + 0.5
        values /= values.sum(axis=1, keepdims=True)
    return values.astype(np.float32)


def stages_of(seed: int, n: int, n_labels: int, n_stages: int, steps: int = 0) -> tuple[list[Floats], np.ndarray]:
    """Probabilities of stages that know more and more of the truth, and the truth."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, n_labels, n)
    stages = []
    for stage in range(n_stages):
        known = probabilities(random, n, n_labels, steps)
        known[np.arange(n), truth] += 0.3 * (stage + 1)
        stages.append(weigh(known, np.ones(n_labels, np.float32)))
    return stages, truth


# ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weigh_by_hand() -> None:
    weighed = weigh(np.float32([[0.5, 0.3, 0.2]]), np.float32([1, 2, 0.5]))
    assert weighed[0] == pytest.approx(np.array([0.5, 0.6, 0.1]) / 1.2)
    assert weighed.dtype == np.float32


def test_a_message_leaves_at_its_own_labels_threshold_or_above() -> None:
    weighed = np.float32([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    assert leaves(weighed, np.float32([0.75, 0.8])).tolist() == [True, False, False]
    assert leaves(weighed, np.float32([0.5, 0.76])).tolist() == [True, False, True]  # the first of equal labels
    assert leaves(np.float32([[1, 0]]), np.float32([NEVER, 0])).tolist() == [False]


def run_slowly(weighed: list[Floats], thresholds: Floats, held: list[np.ndarray] | None) -> Outcome:
    stages, labels = [], []
    for i in range(len(weighed[0])):
        for stage, rows in enumerate(weighed):
            label = max(range(rows.shape[1]), key=lambda k, rows=rows, i=i: (rows[i, k], -k))
            sure = rows[i, label] >= thresholds[stage, label] and not (held is not None and held[stage][i])
            if sure or stage == len(weighed) - 1:
                stages.append(stage)
                labels.append(label)
                break
    return Outcome(np.array(stages, np.int64), np.array(labels, np.int64))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(2, 4), st.integers(1, 4), st.booleans(), st.booleans()
)
def test_messages_leave_where_a_loop_says(
    seed: int, n: int, n_labels: int, n_stages: int, hold: bool, coarse: bool
) -> None:
    random = np.random.default_rng(seed)
    weighed = [probabilities(random, n, n_labels, 4 if coarse else 0) for _ in range(n_stages)]
    thresholds = random.choice(np.float32([0, 0.3, 0.5, 0.7, 0.9, 2, NEVER]), (n_stages, n_labels))
    held = [random.random(n) < 0.4 for _ in range(n_stages)] if hold else None
    found, expected = run(weighed, thresholds, held), run_slowly(weighed, thresholds, held)
    assert found.stages.tolist() == expected.stages.tolist()
    assert found.labels.tolist() == expected.labels.tolist()


def test_held_messages_go_on_however_sure_and_all_leave_at_the_last_stage() -> None:
    sure = np.float32([[1, 0], [1, 0], [1, 0]])
    free = np.zeros((3, 2), np.float32)
    held = [np.array([False, True, True]), np.array([True, False, True]), np.array([True, True, True])]
    assert run([sure] * 3, free, held).stages.tolist() == [0, 1, 2]
    assert run([sure] * 3, free).stages.tolist() == [0, 0, 0]


# ── thresholds ──────────────────────────────────────────────────────────────────────────────────────────────────────

LEVELS = (0.0, 0.01, 0.03, 0.1, 0.3)


def lost_share(weighed: list[Floats], truth: np.ndarray, thresholds: Floats, weights: Floats) -> Floats:
    """Per stage and label, the share of exits, by weight, that are wrong there and right at the last stage."""
    last_right = weighed[-1].argmax(axis=1) == truth
    shares = np.zeros(thresholds.shape)
    for stage in range(len(weighed) - 1):
        label = weighed[stage].argmax(axis=1)
        for k in range(thresholds.shape[1]):
            out = (label == k) & (weighed[stage][:, k] >= thresholds[stage, k])
            lost = (weights * (last_right & (label != truth)))[out].sum()
            shares[stage, k] = lost / weights[out].sum() if out.any() else 0
    return shares


def test_the_first_candidate_lets_nobody_leave_early() -> None:
    weighed, truth = stages_of(0, 300, 2, 3)
    first = candidates(weighed, truth, LEVELS, np.ones(300, np.float32))[0]
    assert (first[:-1] == NEVER).all()
    assert (run(weighed, first).stages == 2).all()


def test_candidates_go_from_safe_to_bold() -> None:
    for seed in range(10):
        weighed, truth = stages_of(seed, 400, 3, 3)
        found = candidates(weighed, truth, LEVELS, np.ones(400, np.float32))
        assert len(found) == 1 + len(LEVELS)
        assert all((after <= before).all() for before, after in zip(found, found[1:], strict=False))
        exits = [(run(weighed, thresholds).stages < 2).sum() for thresholds in found]
        assert exits == sorted(exits)
        assert exits[0] == 0 < exits[-1]
        assert all((thresholds[-1] == 0).all() for thresholds in found)


@pytest.mark.parametrize("steps", [0, 6])
def test_exits_lose_no_more_than_their_level(steps: int) -> None:
    """With few different confidences, too, where a threshold lets all of those go that are equal to it."""
    for seed in range(20):
        weighed, truth = stages_of(seed, 300, 2, 3, steps)
        weights = np.random.default_rng(seed).uniform(0.2, 1.8, 300).astype(np.float32)
        for level, thresholds in zip(LEVELS, candidates(weighed, truth, LEVELS, weights)[1:], strict=True):
            assert lost_share(weighed, truth, thresholds, weights).max() <= level + 1e-5, (seed, level)


def test_a_stage_lets_go_of_as_many_as_it_can() -> None:
    weighed, truth = stages_of(3, 400, 2, 2)
    weights = np.ones(400, np.float32)
    for level, thresholds in zip(LEVELS, candidates(weighed, truth, LEVELS, weights)[1:], strict=True):
        label = weighed[0].argmax(axis=1)
        for k in range(2):
            for lower in weighed[0][label == k, k]:
                if lower < thresholds[0, k] and (weighed[0][label == k, k] >= lower).sum() >= MIN_EXITS:
                    bolder = thresholds.copy()
                    bolder[0, k] = lower
                    assert lost_share(weighed, truth, bolder, weights)[0, k] > level


def test_at_level_0_only_those_leave_who_lose_nothing() -> None:
    """Right down to a confidence of 0.6, wrong below it, while the last stage is always right."""
    n = 200
    confidence = np.linspace(1, 0.5, n, endpoint=False).astype(np.float32)
    first = np.stack([confidence, 1 - confidence], axis=1)
    truth = np.where(confidence > 0.6, 0, 1)
    last = np.eye(2, dtype=np.float32)[truth]
    (_, safe) = candidates([first, last], truth, (0.0,), np.ones(n, np.float32))
    assert safe[0, 0] == confidence[confidence > 0.6].min()
    assert safe[0, 1] == NEVER  # which nobody is given there


def test_too_few_exits_are_none() -> None:
    def thresholds_with(n: int) -> Floats:
        sure = np.tile(np.float32([0.9, 0.1]), (n, 1))
        return candidates([sure, sure], np.zeros(n, np.int64), (0.0,), np.ones(n, np.float32))[1]

    assert thresholds_with(MIN_EXITS - 1)[0, 0] == NEVER
    assert thresholds_with(MIN_EXITS)[0, 0] == np.float32(0.9)


def test_no_levels_leave_the_one_without_exits() -> None:
    weighed, truth = stages_of(0, 50, 2, 2)
    (only,) = candidates(weighed, truth, (), np.ones(50, np.float32))
    assert only.tolist() == [[NEVER, NEVER], [0, 0]]


# ── decision weights ────────────────────────────────────────────────────────────────────────────────────────────────


def imbalanced(seed: int) -> tuple[Floats, np.ndarray]:
    """Calibrated probabilities of three labels, the second and third rare."""
    random = np.random.default_rng(seed)
    truth = random.choice(3, 3000, p=[0.9, 0.07, 0.03])
    logits = 1.2 * np.eye(3)[truth] + random.standard_normal((3000, 3)) * 0.8 + np.log([0.9, 0.07, 0.03])
    powers = np.exp(logits)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32), truth


def test_for_accuracy_all_labels_weigh_the_same() -> None:
    assert decision_weights(*imbalanced(0), "accuracy").tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_for_macro_f1_rare_labels_gain(seed: int) -> None:
    p, truth = imbalanced(seed)
    weights = decision_weights(p, truth, "macro-f1")
    plain = macro_f1(truth, p.argmax(axis=1), 3)
    assert macro_f1(truth, weigh(p, weights).argmax(axis=1), 3) > plain + 0.05
    assert weights[0] == 1
    assert weights[1:].min() > 1
    assert (weights >= 1 / 8).all()
    assert (weights <= 8).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_weights_never_make_macro_f1_worse(seed: int, n_labels: int) -> None:
    random = np.random.default_rng(seed)
    p, truth = probabilities(random, 60, n_labels), random.integers(0, n_labels, 60)
    weights = decision_weights(p, truth, "macro-f1")
    assert macro_f1(truth, (p * weights).argmax(axis=1), n_labels) >= macro_f1(truth, p.argmax(axis=1), n_labels)
