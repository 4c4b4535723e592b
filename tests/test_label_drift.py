"""Warnings come when a stream has shifted, with the right figures, and not by chance."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from edge_runtime.labels.drift import WINDOW, Drift, DriftMonitor, Reference, reference_of

MEDIAN = Reference(np.float32([0.0]), np.float32([0.5]), 10**6)


def warnings_of(monitor: DriftMonitor, values: Iterable[float]) -> list[tuple[int, Drift]]:
    """After how many values, and what."""
    found = []
    for count, value in enumerate(values, 1):
        drift = monitor.add(float(value))
        if drift is not None:
            found.append((count, drift))
    return found


def test_a_reference_has_deciles_and_the_shares_up_to_each() -> None:
    reference = reference_of(np.arange(1, 1001, dtype=np.float32))
    assert len(reference.values) == 9
    assert reference.values == pytest.approx(np.arange(100, 1000, 100), abs=1)
    assert reference.shares == pytest.approx(np.linspace(0.1, 0.9, 9), abs=0.002)


def test_equal_values_are_counted_out_not_guessed() -> None:
    reference = reference_of(np.float32([1] * 70 + [2] * 25 + [3] * 5))
    assert reference.values.tolist() == [1, 2]
    assert reference.shares == pytest.approx([0.7, 0.95])
    assert reference_of(np.float32([4, 4, 4])).shares.tolist() == [1]
    assert reference_of(np.float32([4])).values.tolist() == [4]


def test_the_same_distribution_hardly_ever_warns() -> None:
    random = np.random.default_rng(0)
    monitor = DriftMonitor("x", reference_of(random.standard_normal(50_000).astype(np.float32)))
    assert len(warnings_of(monitor, random.standard_normal(300 * WINDOW))) <= 1


def test_few_held_out_messages_are_no_reason_to_warn() -> None:
    """A reference of few messages is itself off by chance: what follows must not be taken for a shift."""
    random = np.random.default_rng(0)
    n_warnings = 0
    for _ in range(150):
        reference = reference_of(random.standard_normal(150).astype(np.float32))
        n_warnings += len(warnings_of(DriftMonitor("x", reference), random.standard_normal(WINDOW)))
    assert n_warnings <= 3


def test_a_quantity_of_few_values_does_not_warn_either() -> None:
    random = np.random.default_rng(1)
    values = random.choice([0.0, 0.5, 1.0], 60_000, p=[0.6, 0.1, 0.3]).astype(np.float32)
    monitor = DriftMonitor("x", reference_of(values[:20_000]))
    assert not warnings_of(monitor, values[20_000:])


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_a_shift_is_caught_with_its_figures(shift: float) -> None:
    random = np.random.default_rng(2)
    monitor = DriftMonitor("distance", reference_of(random.standard_normal(20_000).astype(np.float32)))
    assert not warnings_of(monitor, random.standard_normal(4 * WINDOW))
    shifted = random.standard_normal(WINDOW) + shift
    ((count, drift),) = warnings_of(monitor, shifted)
    assert count == WINDOW
    assert (drift.quantity, drift.n) == ("distance", WINDOW)
    assert drift.share == pytest.approx((shifted.astype(np.float32) <= np.float32(drift.value)).mean())
    assert abs(drift.share - drift.expected) > 0.1
    assert np.sign(drift.expected - drift.share) == np.sign(shift)


def test_the_worst_quantile_is_named() -> None:
    reference = Reference(np.float32([1, 2, 3]), np.float32([0.2, 0.5, 0.8]), 10**6)
    values = [0.5] * 30 + [1.5] * 60 + [2.5] * 5 + [3.5] * 5  # shares .3, .9, .95
    ((_, drift),) = warnings_of(DriftMonitor("x", reference, window=100), values)
    assert drift == Drift("x", 2.0, pytest.approx(0.9), pytest.approx(0.5), 100)
    assert drift.sentence() == (
        "the messages drift from the training data: 90% of the last 100 have a x of 2.00 or less, in training 50%"
    )


def test_a_stream_that_stays_shifted_warns_once_per_window() -> None:
    found = warnings_of(DriftMonitor("x", MEDIAN, window=100), [1.0] * 350)
    assert [count for count, _ in found] == [100, 200, 300]


def test_windows_do_not_overlap() -> None:
    """A shift that straddles two windows shows in each only with the values that fall in it."""
    monitor = DriftMonitor("x", MEDIAN, window=1000)
    fine = [-1.0, 1.0] * 250
    found = warnings_of(monitor, fine + [-1.0] * 500 + [-1.0] * 500 + fine)
    assert [(count, round(drift.share, 3)) for count, drift in found] == [(1000, 0.75), (2000, 0.75)]
    later = warnings_of(DriftMonitor("x", MEDIAN, window=1000), fine * 2 + [-1.0] * 1000 + fine * 2)
    assert [(count, drift.share) for count, drift in later] == [(2000, 1.0)]


def test_less_than_a_window_says_nothing() -> None:
    assert not warnings_of(DriftMonitor("x", MEDIAN, window=100), [1.0] * 99)


def test_shifts_too_small_to_matter_are_no_news() -> None:
    def share_of(share: float) -> list[float]:
        return [-1.0] * round(10_000 * share) + [1.0] * round(10_000 * (1 - share))

    assert not warnings_of(DriftMonitor("x", MEDIAN, window=10_000), share_of(0.59))
    assert warnings_of(DriftMonitor("x", MEDIAN, window=10_000), share_of(0.61))


def test_a_small_window_asks_for_a_larger_shift() -> None:
    """By the bound, 100 values must be off by sqrt(ln(2000) / 200) = 0.195."""
    assert not warnings_of(DriftMonitor("x", MEDIAN, window=100), [-1.0] * 69 + [1.0] * 31)
    assert warnings_of(DriftMonitor("x", MEDIAN, window=100), [-1.0] * 70 + [1.0] * 30)


def test_an_empty_reference_never_warns() -> None:
    monitor = DriftMonitor("x", Reference(np.empty(0, np.float32), np.empty(0, np.float32), 10), window=10)
    assert not warnings_of(monitor, range(100))
