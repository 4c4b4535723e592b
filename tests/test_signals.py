"""Entropy, top-1 and margin against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.signals import signals_of
from edge_runtime.types import Signals

FLOATS = st.floats(-1e4, 1e4, width=32)


def reference(logits: Sequence[float]) -> Signals:
    """The definition, by the book."""
    values = np.sort(np.asarray(logits, np.float64))[::-1]
    p = np.exp(values - values[0])
    p /= p.sum()
    positive = p[p > 0]
    second = float(p[1]) if len(p) > 1 else 0.0
    return Signals(float(-(positive * np.log(positive)).sum()), float(p[0]), float(p[0]) - second)


def check(logits: Sequence[float]) -> Signals:
    row = np.array(logits, np.float32)
    before = row.copy()
    found, expected = signals_of(row), reference(row.tolist())
    assert np.array_equal(row, before)  # a view of llama.cpp's buffer: others read it, too
    assert found.entropy == pytest.approx(expected.entropy, abs=1e-4 * max(1.0, expected.entropy))
    assert found.top1 == pytest.approx(expected.top1, abs=1e-5)
    assert found.margin == pytest.approx(expected.margin, abs=1e-5)
    assert found.entropy >= 0
    assert all(type(v) is float for v in (found.entropy, found.top1, found.margin))
    return found


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_any_logits(logits: list[float]) -> None:
    check(logits)


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=300))
def test_logits_as_a_model_has_them(logits: list[float]) -> None:
    check(logits)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.floats(-1e3, 1e3))
def test_only_differences_count(logits: list[float], shift: float) -> None:
    shifted = [np.float32(v + np.float32(shift)) for v in logits]
    unshifted = [v - np.float32(shift) for v in shifted]  # what is left of them in float32
    assert signals_of(np.array(shifted, np.float32)).entropy == pytest.approx(
        signals_of(np.array(unshifted, np.float32)).entropy, abs=2e-2
    )


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20), st.randoms())
def test_order_does_not_count(logits: list[float], random: object) -> None:
    mixed = list(logits)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    a, b = (signals_of(np.array(v, np.float32)) for v in (logits, mixed))
    assert a.entropy == pytest.approx(b.entropy, abs=1e-5)
    assert (a.top1, a.margin) == (pytest.approx(b.top1), pytest.approx(b.margin))


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 150_000])
def test_uniform(n: int) -> None:
    found = check([3.5] * n)
    assert found.entropy == pytest.approx(math.log(n), abs=1e-4)
    assert found.margin == (1.0 if n == 1 else pytest.approx(0.0))


@pytest.mark.parametrize("top", [1e38, -1e38, 0.0, 88.0, 1e10])
def test_huge_logits(top: float) -> None:
    assert check([top]).entropy == 0.0
    assert check([top, top]).entropy == pytest.approx(math.log(2))
    if top >= 0:
        found = check([top, -1e38, top])
        assert (found.top1, found.margin) == (pytest.approx(0.5), pytest.approx(0.0))


def test_forbidden_tokens_carry_no_weight() -> None:
    found = check([-math.inf, 1.0, -math.inf, 2.0])
    assert found.entropy == pytest.approx(reference([1.0, 2.0]).entropy, abs=1e-6)
    assert check([-math.inf, 7.0]).entropy == pytest.approx(0.0, abs=1e-9)
    one_left = np.full(100_000, -np.inf, np.float32)
    one_left[5] = 1.0
    found = signals_of(one_left)
    assert found.entropy == pytest.approx(0.0, abs=1e-9)
    assert (found.top1, found.margin) == (1.0, 1.0)


def test_a_sure_distribution_is_never_below_zero() -> None:
    for gap in np.linspace(0, 120, 500):
        assert signals_of(np.array([gap, 0.0], np.float32)).entropy >= 0.0


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.nan], [1.0, math.nan, 2.0]])
def test_what_is_not_a_number_is_never_sure(bad: list[float]) -> None:
    """An exit asks `entropy < threshold`: for NaN that must be false, whatever the threshold."""
    assert not signals_of(np.array(bad, np.float32)).entropy < math.inf
