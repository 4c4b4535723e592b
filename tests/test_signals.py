"""Entropy, top-1 and margin against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from edge_runtime.signals import cosine, signals_of, uncertainty
from edge_runtime.types import SIGNALS, Signals

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


# ── shortlists, clusters, and what decides ──────────────────────────────────────────────────────────────────────────


def slow_signals(logits: Sequence[float], starts: Sequence[int], has_other: bool) -> dict[str, float]:
    """The definitions in plain Python; `starts` begin clusters of the rows that name a token."""
    weights = [math.exp(v - max(logits)) for v in logits]
    p = [w / sum(weights) for w in weights]
    named, other = (p[:-1], p[-1]) if has_other else (p, 0.0)
    best = max(range(len(named)), key=lambda i: logits[i])
    ends = [*starts[1:], len(named)]
    masses = [sum(named[a:b]) for a, b in zip(starts, ends, strict=True)] + [other] * has_other
    return {
        "entropy": -sum(x * math.log(x) for x in p if x > 0),
        "top1": p[best],
        "margin": p[best] - max([x for i, x in enumerate(p) if i != best], default=0.0),
        "clusters": -sum(x * math.log(x) for x in masses if x > 0),
        "other": other,
    }


@given(
    st.lists(st.floats(-12, 12, width=32), min_size=2, max_size=60),
    st.sets(st.integers(1, 58)),
    st.booleans(),
)
def test_clusters_and_the_row_for_other_tokens(logits: list[float], cuts: set[int], has_other: bool) -> None:
    n_named = len(logits) - has_other
    starts = [0, *sorted(c for c in cuts if c < n_named)]
    row = np.array(logits, np.float32)
    before = row.copy()
    found = signals_of(row, np.array(starts, np.int32), has_other)
    assert np.array_equal(row, before)
    for name, value in slow_signals(row.tolist(), starts, has_other).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-4), name
        assert type(getattr(found, name)) is float
    assert 0 <= found.clusters <= found.entropy + 1e-4
    assert math.isnan(found.stability)
    assert math.isnan(found.gate)


def test_each_token_a_cluster_is_plain_entropy_and_one_cluster_none() -> None:
    row = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 4
    single = signals_of(row, np.arange(1000, dtype=np.int32))
    assert single.clusters == pytest.approx(single.entropy, abs=1e-4)
    assert signals_of(row, np.array([0], np.int32)).clusters == pytest.approx(0.0, abs=1e-5)
    # of the tokens that are named, and all others
    p = signals_of(row, np.array([0], np.int32), has_other=True).other
    assert signals_of(row, np.array([0], np.int32), has_other=True).clusters == pytest.approx(
        -p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-5
    )


def test_a_likely_other_token_is_no_top_1() -> None:
    found = signals_of(np.array([1.0, 2.0, 5.0], np.float32), None, has_other=True)
    p = np.exp([1.0, 2.0, 5.0]) / np.exp([1.0, 2.0, 5.0]).sum()
    assert (found.top1, found.other) == (pytest.approx(p[1]), pytest.approx(p[2]))
    assert found.margin == pytest.approx(p[1] - p[2])
    assert math.isnan(found.clusters)


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_clusters_change_nothing_else(logits: list[float]) -> None:
    row = np.array(logits, np.float32)
    plain, more = signals_of(row), signals_of(row, np.array([0], np.int32))
    assert (plain.entropy, plain.top1, plain.margin, plain.other) == (more.entropy, more.top1, more.margin, 0.0)


SEEN = Signals(1.5, 0.6, 0.25, clusters=1.25, stability=0.75, other=0.1, gate=0.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [("entropy", 1.5), ("top1", 0.4), ("margin", 0.75), ("clusters", 1.25), ("stability", 0.25), ("gate", 0.05)],
)
def test_uncertainty_is_lower_where_a_signal_is_surer(name: str, value: float) -> None:
    assert uncertainty(SEEN, name) == pytest.approx(value)


def test_every_signal_is_an_uncertainty() -> None:
    for name in SIGNALS:
        assert not uncertainty(signals_of(np.array([math.nan, 1.0], np.float32), np.array([0]), True), name) < math.inf
    for name in ("clusters", "stability", "gate"):  # what a plain row of logits has not
        assert not uncertainty(signals_of(np.zeros(3, np.float32)), name) < math.inf
    with pytest.raises(UsageError, match="no signal 'mood'"):
        uncertainty(SEEN, "mood")


@given(st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3), st.lists(st.floats(-8, 8), min_size=3, max_size=3))
def test_cosine(a: list[float], b: list[float]) -> None:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    found = cosine(np.array(a, np.float32), np.array(b, np.float32))
    if lengths > 1e-3:
        assert found == pytest.approx(sum(x * y for x, y in zip(a, b, strict=True)) / lengths, abs=1e-4)
    elif lengths == 0:
        assert math.isnan(found)
