"""Figures of boundaries against definitions counted out in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from edge_runtime.exits.evaluate import Predictions
from edge_runtime.exits.policies import Family, fit_family
from edge_runtime.exits.quality import (
    Resamples,
    boundary_quality,
    exit_outcomes,
    interval,
    policy_depths,
    risk_coverage,
    signal_quality,
)
from edge_runtime.metrics import auroc

Target = tuple[int, float, bool]  # prompt, uncertainty, wrong


def predictions(
    uncertain: list[float] | np.ndarray,
    wrong: list[bool] | np.ndarray,
    prompts: list[int] | np.ndarray | None = None,
    layer: int = 4,
    **values: np.ndarray,
) -> Predictions:
    """A boundary whose entropies are `uncertain`."""
    n = len(uncertain)
    nan = np.full(n, np.nan, np.float32)
    return Predictions(
        layer=layer,
        prompts=np.arange(n, dtype=np.int32) if prompts is None else np.asarray(prompts, np.int32),
        groups=np.zeros(n, np.int8),
        agree=~np.asarray(wrong, bool),
        in_shortlist=np.ones(n, bool),
        acceptance=np.where(wrong, 0.25, 0.75).astype(np.float32),
        guessed=np.ones(n, bool),
        values={"entropy": np.asarray(uncertain, np.float32), "stability": nan, **values},
    )


def thresholds(uncertain: list[float]) -> list[float]:
    return sorted({u for u in uncertain if math.isfinite(u)})


def by_hand(targets: list[Target], bound: float) -> tuple[float, float, float]:
    """AUROC, AURC and coverage at a bound, pair by pair and threshold by threshold."""
    ranked = [(p, math.inf if math.isnan(u) else u, w) for p, u, w in targets]
    wrong = [u for _, u, w in ranked if w]
    right = [u for _, u, w in ranked if not w]
    pairs = [(a > b) + 0.5 * (a == b) for a in wrong for b in right]
    area, best = 0.0, 0.0
    for limit in sorted({u for _, u, _ in ranked}):
        out = [w for _, u, w in ranked if u <= limit]
        new = sum(u == limit for _, u, _ in ranked)
        risk = sum(out) / len(out)
        area += new * risk / len(ranked)
        if math.isfinite(limit) and risk <= bound:
            best = max(best, len(out) / len(ranked))
    return (sum(pairs) / len(pairs) if pairs else math.nan), area, best


TARGETS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, math.nan]), st.booleans()),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(TARGETS, st.sampled_from([0.0, 0.1, 0.34, 0.5, 1.0]))
def test_figures_are_their_definitions(targets: list[Target], bound: float) -> None:
    prompts, uncertain, wrong = (np.array(column) for column in zip(*targets, strict=True))
    found = signal_quality(uncertain.astype(np.float32), wrong, Resamples(prompts, 5), [bound])
    area, aurc, coverage = by_hand(targets, bound)
    assert found.auroc.value == pytest.approx(area, nan_ok=True)
    assert found.aurc.value == pytest.approx(aurc)
    assert found.coverage[bound].value == pytest.approx(coverage)
    assert found.auroc.value == pytest.approx(auroc(wrong, np.nan_to_num(uncertain, nan=9.0)), nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(TARGETS, st.integers(0, 99))
def test_a_resample_is_what_its_prompts_written_out_would_give(targets: list[Target], seed: int) -> None:
    prompts = np.array([p for p, _, _ in targets])
    resamples = Resamples(prompts, 6, seed)
    uncertain = np.float32([u for _, u, _ in targets])
    wrong = np.array([w for _, _, w in targets])
    found = signal_quality(uncertain, wrong, resamples, [0.3])
    figures = []
    names = np.unique(prompts).tolist()
    for counts in resamples.counts:
        written = [t for t in targets for _ in range(int(counts[names.index(t[0])]))]
        figures.append(by_hand(written, 0.3))
    for column, got in zip(np.array(figures).T, (found.auroc, found.aurc, found.coverage[0.3]), strict=True):
        expected = interval(column)
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high), nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(TARGETS)
def test_the_curve_runs_through_every_threshold(targets: list[Target]) -> None:
    uncertain = [u for _, u, _ in targets]
    coverage, risk = risk_coverage(np.float32(uncertain), np.array([w for _, _, w in targets]))
    expected = []
    for limit in thresholds(uncertain):
        out = [w for _, u, w in targets if u <= limit]
        expected.append((len(out) / len(targets), sum(out) / len(out)))
    assert coverage.tolist() == pytest.approx([c for c, _ in expected])
    assert risk.tolist() == pytest.approx([r for _, r in expected])


@settings(max_examples=60, deadline=None)
@given(TARGETS, st.randoms(use_true_random=False))
def test_the_order_of_targets_does_not_count(targets: list[Target], random: object) -> None:
    mixed = list(targets)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, two = (
        boundary_quality(predictions([u for _, u, _ in t], [w for _, _, w in t], [p for p, _, _ in t]), n_resamples=8)
        for t in (targets, mixed)
    )
    assert str(one) == str(two) or one.agreement.value == pytest.approx(two.agreement.value)
    for name in one.signals:
        assert str(one.signals[name].aurc) == str(two.signals[name].aurc)


def test_a_perfect_signal_and_a_reversed_one() -> None:
    wrong = np.array([False] * 6 + [True] * 4)
    uncertain = np.arange(10, dtype=np.float32)
    resamples = Resamples(np.arange(10), 10)
    good = signal_quality(uncertain, wrong, resamples, [0.0, 0.4])
    assert (good.auroc.value, good.coverage[0.0].value, good.coverage[0.4].value) == (1.0, 0.6, 1.0)
    bad = signal_quality(-uncertain, wrong, resamples, [0.0, 0.4])
    assert (bad.auroc.value, bad.coverage[0.0].value, bad.coverage[0.4].value) == (0.0, 0.0, 1.0)
    assert good.aurc.value < 0.4 < bad.aurc.value


def test_means_of_a_boundary_by_hand() -> None:
    found = boundary_quality(predictions([1, 2, 3, 4], [False, False, True, False], [0, 0, 1, 1]))
    assert (found.n_prompts, found.n_targets, found.layer) == (2, 4, 4)
    assert found.agreement.value == 0.75
    assert found.acceptance.value == pytest.approx((3 * 0.75 + 0.25) / 4)
    # two prompts: one all right, one half right
    assert (found.agreement.low, found.agreement.high) == (0.5, 1.0)
    assert found.in_shortlist.value == found.in_shortlist.low == 1.0
    assert list(found.signals) == ["entropy"]  # stability is nowhere a number


def test_intervals_are_of_prompts_and_not_of_tokens() -> None:
    """Tokens of one prompt share their fate: a hundred copies of each token say no more."""
    random = np.random.default_rng(0)
    wrong = random.random(40) < 0.4
    uncertain = random.random(40)
    once = boundary_quality(predictions(uncertain, wrong), n_resamples=200)
    many = boundary_quality(
        predictions(np.repeat(uncertain, 100), np.repeat(wrong, 100), np.repeat(np.arange(40), 100)), n_resamples=200
    )
    assert str(many.agreement) == str(once.agreement)
    assert str(many.signals["entropy"].auroc) == str(once.signals["entropy"].auroc)
    alone = boundary_quality(predictions(np.repeat(uncertain, 100), np.repeat(wrong, 100)), n_resamples=200)
    assert alone.agreement.high - alone.agreement.low < 0.3 * (once.agreement.high - once.agreement.low)


def test_intervals_hold_what_they_promise() -> None:
    """Of 120 experiments with prompts of different difficulty, about 95% hold the truth."""
    held = 0
    for seed in range(120):
        random = np.random.default_rng(seed)
        rate = random.beta(4, 6, 60)
        prompts = np.repeat(np.arange(60), random.integers(5, 40, 60))
        wrong = random.random(len(prompts)) < rate[prompts]
        found = boundary_quality(predictions(np.zeros(len(prompts)), wrong, prompts), n_resamples=200, seed=seed)
        held += found.agreement.low <= 0.6 <= found.agreement.high
    assert 105 <= held <= 119


def test_equal_seeds_draw_equally() -> None:
    random = np.random.default_rng(1)
    made = predictions(random.random(300), random.random(300) < 0.3, np.arange(300) // 10)
    assert boundary_quality(made, seed=3) == boundary_quality(made, seed=3)
    assert boundary_quality(made, seed=3) != boundary_quality(made, seed=4)


def test_large_weights_are_counted_without_blocks_changing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    made = predictions(random.random(500), random.random(500) < 0.3, np.arange(500) // 7)
    whole = boundary_quality(made, n_resamples=40)
    monkeypatch.setattr("edge_runtime.exits.quality._VALUES_AT_ONCE", 1700)  # three resamples at once
    assert boundary_quality(made, n_resamples=40) == whole


def test_no_targets() -> None:
    with pytest.raises(UsageError, match="no held-out tokens"):
        boundary_quality(predictions([], []))
    with pytest.raises(UsageError, match="no held-out tokens"):
        policy_depths([predictions([], [])], "entropy", 8)
    with pytest.raises(UsageError, match="no held-out tokens"):
        policy_depths([], "entropy", 8)


def test_signals_are_turned_so_that_lower_is_surer() -> None:
    made = predictions([0.5], [False], top1=np.float32([0.75]), margin=np.float32([0.25]), gate=np.float32([0.1]))
    assert made.uncertainty("entropy").tolist() == [0.5]
    assert made.uncertainty("top1").tolist() == [0.25]
    assert made.uncertainty("margin").tolist() == [0.75]
    assert made.uncertainty("gate").tolist() == pytest.approx([0.1])
    assert math.isnan(made.uncertainty("stability")[0])
    assert math.isnan(made.uncertainty("clusters")[0])  # there is no such column
    assert made.signals == ("entropy", "top1", "margin", "gate")
    with pytest.raises(UsageError, match="no signal 'mood'"):
        made.uncertainty("mood")


def test_a_part_of_the_predictions() -> None:
    made = predictions([1, 2, 3], [True, False, True], [5, 6, 6])
    part = made.take(made.prompts == 6)
    assert (len(part), part.prompts.tolist(), part.agree.tolist()) == (2, [6, 6], [True, False])
    assert part.uncertainty("entropy").tolist() == [2, 3]
    assert (len(part.groups), len(part.acceptance), len(part.in_shortlist)) == (2, 2, 2)


# policies over several boundaries


def two_boundaries(n: int = 400, seed: int = 0) -> list[Predictions]:
    random = np.random.default_rng(seed)
    prompts = np.arange(n) // 8
    made = []
    for layer, skill in ((4, 0.5), (7, 0.8)):
        uncertain = random.random(n)
        wrong = random.random(n) < uncertain * (1.3 - skill)
        made.append(predictions(uncertain, wrong, prompts, layer, gate=uncertain.astype(np.float32)))
    return made


@pytest.mark.parametrize("signal", ["entropy", "gate"])
def test_policies_by_hand(signal: str) -> None:
    boundaries = two_boundaries()
    n, n_layer = len(boundaries[0]), 10
    uncertain = [b.uncertainty(signal) for b in boundaries]
    family = fit_family(signal, boundaries, uncertain, 40)
    found = policy_depths(boundaries, signal, n_layer, [0.05, 0.2], n_resamples=4, family=family)
    for bound in (0.05, 0.2):
        best = (float(n_layer), 0.0)
        for limits in family.thresholds:
            depths, exits, errors = [], 0, 0
            for i in range(n):
                depth = n_layer
                for b, u, limit in zip(boundaries, uncertain, limits, strict=True):
                    if u[i] < limit:
                        depth, exits, errors = b.layer, exits + 1, errors + (not b.agree[i])
                        break
                depths.append(depth)
            if exits and errors / exits <= bound:
                best = min(best, (sum(depths) / n, exits / n))
        assert found[bound].depth.value == pytest.approx(best[0])
        assert found[bound].coverage.value == pytest.approx(best[1])
    assert found[0.2].depth.value < found[0.05].depth.value < n_layer
    assert found[0.05].depth.low <= found[0.05].depth.value <= found[0.05].depth.high


def test_outcomes_of_one_setting() -> None:
    first = predictions([0.1, 0.9, math.nan, 0.1], [False, True, False, True], layer=3)
    second = predictions([0.1, 0.2, 0.9, 0.1], [True, True, False, False], layer=6)
    left, wrong, saved = exit_outcomes(
        [first, second], [b.uncertainty("entropy") for b in (first, second)], (0.5, 0.5), 8
    )
    assert left.tolist() == [True, True, False, True]
    assert wrong.tolist() == [False, True, False, True]
    assert saved.tolist() == [5, 2, 0, 5]
    left, _, _ = exit_outcomes([first], [first.uncertainty("entropy")], (math.inf,), 8)
    assert left.tolist() == [True, True, False, True]  # NaN never exits, whatever the threshold


def test_nothing_exits_where_all_disagree_or_a_signal_is_missing() -> None:
    made = predictions(np.linspace(0, 1, 50), [True] * 50)
    for signal in ("entropy", "stability", "gate"):
        found = policy_depths([made], signal, 9)[0.05]
        assert (found.depth.value, found.coverage.value) == (9.0, 0.0)


def test_depths_are_resampled_by_prompt() -> None:
    """Two prompts, one always right and surest, one always wrong: a resample is all, half or nothing."""
    made = predictions([0.1] * 10 + [0.9] * 10, [False] * 10 + [True] * 10, [0] * 10 + [1] * 10)
    family = Family("entropy", np.array([[0.5], [1.0]]))
    found = policy_depths([made], "entropy", 8, [0.0], n_resamples=100, family=family)[0.0]
    assert (found.depth.value, found.depth.low, found.depth.high) == (6.0, 4.0, 8.0)
    assert (found.coverage.value, found.coverage.low, found.coverage.high) == (0.5, 0.0, 1.0)


def test_by_default_policies_are_fitted_to_the_targets_themselves() -> None:
    boundaries = two_boundaries()
    found = policy_depths(boundaries, "entropy", 10)
    assert found[0.01].depth.value >= found[0.02].depth.value >= found[0.05].depth.value
    assert found[0.05].depth.value < 10
