"""Figures against values worked out by hand, and against definitions counted out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.metrics import auroc, calibration_error, confusion, macro_f1, precision_recall

# three labels: 0 four times, 1 three times, 2 once
TRUTH = np.array([0, 0, 0, 0, 1, 1, 1, 2])
DECIDED = np.array([0, 0, 1, 2, 1, 1, 0, 0])
NONE = np.array([], np.int64)


def test_confusion_has_true_labels_in_rows() -> None:
    assert confusion(TRUTH, DECIDED, 3).tolist() == [[2, 1, 1], [1, 2, 0], [1, 0, 0]]
    assert confusion(np.array([0]), np.array([2]), 4)[0].tolist() == [0, 0, 1, 0]
    assert confusion(NONE, NONE, 2).tolist() == [[0, 0], [0, 0]]


def test_precision_and_recall_by_hand() -> None:
    precision, recall = precision_recall(confusion(TRUTH, DECIDED, 3))
    assert precision == pytest.approx([2 / 4, 2 / 3, 0])
    assert recall == pytest.approx([2 / 4, 2 / 3, 0])


def test_a_label_never_decided_or_never_true_has_no_precision_or_recall() -> None:
    precision, recall = precision_recall(np.array([[3, 0, 0], [2, 0, 0], [0, 0, 0]]))
    assert precision == pytest.approx([3 / 5, 0, 0])
    assert recall == pytest.approx([1, 0, 0])


def test_macro_f1_by_hand() -> None:
    assert macro_f1(TRUTH, DECIDED, 3) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    unequal = macro_f1(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]), 2)
    assert unequal == pytest.approx((2 * 1 * (1 / 3) / (1 + 1 / 3) + 2 * (1 / 3) * 1 / (1 / 3 + 1)) / 2)
    assert macro_f1(TRUTH, TRUTH, 3) == 1
    assert macro_f1(NONE, NONE, 3) == 0


def test_auroc_by_hand() -> None:
    positive = np.array([True, False, True, False])
    assert auroc(positive, np.float32([0.9, 0.1, 0.8, 0.2])) == 1
    assert auroc(positive, np.float32([0.1, 0.9, 0.2, 0.8])) == 0
    assert auroc(positive, np.float32([0.9, 0.5, 0.3, 0.4])) == 0.5
    assert auroc(positive, np.float32([1, 1, 1, 1])) == 0.5
    assert auroc(positive, np.float32([0.7, 0.7, 0.9, 0.1])) == (0.5 + 1 + 1 + 1) / 4


def test_auroc_needs_one_of_both() -> None:
    assert math.isnan(auroc(np.array([True, True]), np.float32([0, 1])))
    assert math.isnan(auroc(np.array([False]), np.float32([0])))
    assert math.isnan(auroc(np.array([], bool), np.float32([])))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(pairs: list[tuple[bool, int]]) -> None:
    positives = [score for positive, score in pairs if positive]
    negatives = [score for positive, score in pairs if not positive]
    found = auroc(np.array([p for p, _ in pairs]), np.array([s for _, s in pairs], np.float32))
    if not positives or not negatives:
        assert math.isnan(found)
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert found == pytest.approx(wins / (len(positives) * len(negatives)))


def test_calibration_error_by_hand() -> None:
    confidences = np.float32([0.95, 0.85, 0.6, 0.7])  # two bins: {0.6, 0.7} and {0.85, 0.95}
    right = np.array([True, True, True, False])
    assert calibration_error(confidences, right, 2) == pytest.approx((abs(0.65 - 0.5) + abs(0.9 - 1)) / 2, abs=1e-6)
    assert calibration_error(confidences, right, 1) == pytest.approx(abs(0.775 - 0.75), abs=1e-6)


def test_calibration_error_weighs_unequal_bins_by_their_size() -> None:
    confidences = np.float32([0.1, 0.2, 0.9])  # bins {0.1, 0.2} and {0.9}
    right = np.array([False, False, False])
    assert calibration_error(confidences, right, 2) == pytest.approx((2 * 0.15 + 0.9) / 3, abs=1e-6)


def test_calibration_error_with_fewer_messages_than_bins() -> None:
    assert calibration_error(np.float32([0.75]), np.array([True])) == pytest.approx(0.25)
    assert calibration_error(np.float32([]), np.array([], bool)) == 0


def test_what_is_calibrated_has_a_small_error_and_what_is_too_sure_a_large_one() -> None:
    random = np.random.default_rng(0)
    confidences = random.uniform(0.5, 1, 20_000).astype(np.float32)
    right = random.random(20_000) < confidences
    assert calibration_error(confidences, right) < 0.015
    assert calibration_error(np.minimum(confidences + np.float32(0.2), 1), right) > 0.1
