"""Certificates hold as often as they say: p-values against exact sums, and the share of wrong ones in simulations."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.certify import (
    Certificate,
    betting_p_value,
    binomial_p_value,
    conformal_risk_control,
    examples_to_control,
    fixed_sequence,
    messages_needed,
)
from edge_runtime.errors import UsageError

SHARES = st.floats(0, 1)
N_RUNS = 2000


def exact(errors: int, n: int, bound: float) -> Fraction:
    """The definition, without rounding."""
    p = Fraction(bound)
    return sum((math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(errors + 1)), Fraction(0))


def most_allowed(level: float) -> float:
    """The share of wrong runs that chance explains at `level`: 3 standard errors above it."""
    return level + 3 * math.sqrt(level * (1 - level) / N_RUNS)


def differences(rng: np.random.Generator, shape: tuple[int, ...], worse: float, better: float) -> np.ndarray:
    """Losses 1 with probability `worse`, -1 with probability `better`, else 0: one classifier against another."""
    draws = rng.random(shape)
    return (draws < worse).astype(float) - (draws >= 1 - better)


# --- binomial


@pytest.mark.parametrize("bound", [1e-12, 0.001, 0.05, 0.3, 0.5, 0.7, 0.99, 1 - 1e-12])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_binomial_p_value_is_exact(n: int, bound: float) -> None:
    for errors in range(n + 1):
        expected = float(exact(errors, n, bound))
        assert binomial_p_value(errors, n, bound) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_small_p_values_keep_their_digits() -> None:
    assert binomial_p_value(3, 200, 0.25) == pytest.approx(float(exact(3, 200, 0.25)), rel=1e-10, abs=0)


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_the_binomial_p_value_of_any_counts(n: int, data: st.DataObject) -> None:
    errors, bound = data.draw(st.integers(0, n)), data.draw(st.floats(0, 1, exclude_max=True))
    found = binomial_p_value(errors, n, bound)
    assert 0 <= found <= 1
    assert found == pytest.approx(float(exact(errors, n, bound)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("errors", "bound"), [(49_000, 0.05), (499_000, 0.5), (10, 3e-5), (998_900, 0.999)])
def test_a_million_examples(errors: int, bound: float) -> None:
    n = 1_000_000
    k = np.arange(1, errors + 1)
    # from the probability of no error upwards, each term times the ratio to the next
    log_terms = n * math.log1p(-bound) + np.cumsum(np.log((n - k + 1) / k * (bound / (1 - bound))))
    expected = math.exp(n * math.log1p(-bound)) + float(np.exp(log_terms).sum())
    assert binomial_p_value(errors, n, bound) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(st.integers(1, 10_000), SHARES, SHARES, SHARES)
def test_more_errors_or_a_lower_bound_are_harder_to_certify(n: int, share: float, low: float, high: float) -> None:
    errors = int(share * (n - 1))
    low, high = sorted((low, high))
    rounding = 1 + 1e-8
    assert binomial_p_value(errors, n, low) <= binomial_p_value(errors + 1, n, low) * rounding
    assert binomial_p_value(errors, n, high) <= binomial_p_value(errors, n, low) * rounding
    assert binomial_p_value(errors, n + 1, low) <= binomial_p_value(errors, n, low) * rounding


@pytest.mark.parametrize(
    ("errors", "n", "bound", "p"),
    [
        (0, 0, 0.05, 1.0),  # nothing was seen
        (0, 0, 1.0, 1.0),
        (0, 1000, 0.0, 1.0),  # no number of examples proves a rate of exactly 0
        (1000, 1000, 1.0, 0.0),  # no rate exceeds 1
        (3, 10, 1.5, 0.0),
        (10, 10, 0.999, 1.0),
        (0, 1_000_000, 5e-324, 1.0),
        (1, 1_000_000, 5e-324, 1.0),
        (0, 1_000_000, 0.999, 0.0),
    ],
)
def test_the_edges_of_the_binomial(errors: int, n: int, bound: float, p: float) -> None:
    assert binomial_p_value(errors, n, bound) == p


@pytest.mark.parametrize(("errors", "n"), [(-1, 10), (11, 10), (0, -1)])
def test_impossible_counts(errors: int, n: int) -> None:
    with pytest.raises(ValueError, match="errors in"):
        binomial_p_value(errors, n, 0.05)


@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_a_bound_that_is_no_share(bound: float) -> None:
    with pytest.raises(UsageError, match="bound"):
        binomial_p_value(1, 10, bound)


# --- betting


@pytest.mark.parametrize("delta", [0.05, 1e-9])  # bets set by the variance, and by the largest stake
def test_the_capital_by_hand(delta: float) -> None:
    losses, bound = [0.0, 0.5, 0.0, 1.0, 0.0, 0.25] * 10, 0.4
    capital, largest = 1.0, 1.0
    seen: list[float] = []
    variance, squares = 0.25, 0.25
    for loss in losses:
        bet = min(math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)), 0.75 / (1 - bound))
        capital *= 1 + bet * (bound - loss)
        largest = max(largest, capital)
        seen.append(loss)
        mean = (0.5 + sum(seen)) / (1 + len(seen))
        squares += (loss - mean) ** 2
        variance = squares / (1 + len(seen))
    assert largest > 1.2
    assert betting_p_value(losses, bound, delta=delta) == pytest.approx(1 / largest)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), max_size=60), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_a_lower_bound_is_harder_to_certify_by_betting(losses: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    p_low, p_high = betting_p_value(losses, low, -1), betting_p_value(losses, high, -1)
    assert 0 <= p_low <= 1
    assert p_high <= p_low * (1 + 1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=50), st.integers(-4, 12))
def test_only_where_a_loss_lies_between_its_limits_counts(eighths: list[int], bound: int) -> None:
    row = np.array(eighths) / 8
    assert betting_p_value(6 * row - 2, 6 * bound / 8 - 2, -2, 4) == pytest.approx(betting_p_value(row, bound / 8))


@pytest.mark.parametrize(
    ("losses", "bound", "p"),
    [
        ([], 0.5, 1.0),
        ([0.0] * 100, 0.0, 1.0),
        ([0.0] * 100, -1.0, 1.0),
        ([1.0] * 100, 1.0, 0.0),
        ([1.0] * 100, 7.0, 0.0),
        ([1.0] * 100, 0.999, 1.0),
        ([0.0] * 100, math.nextafter(1, 0), 0.0),
        ([1.0] * 100, math.nextafter(1, 0), 1.0),
    ],
)
def test_the_edges_of_betting(losses: list[float], bound: float, p: float) -> None:
    assert betting_p_value(losses, bound) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("losses", [[0.5, 1.01], [-0.01], [0.0, math.nan], [[0.0, 1.0]], 0.5])
def test_losses_outside_their_limits(losses: object) -> None:
    with pytest.raises(ValueError, match="one row of numbers"):
        betting_p_value(losses, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_limits_without_room(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="losses cannot lie"):
        betting_p_value([], 0.5, low, high)


def test_a_bound_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="not a number"):
        betting_p_value([0.0], math.nan)


def test_betting_certifies_sparse_losses_where_hoeffding_cannot() -> None:
    """1000 comparisons of which about 2 % differ, either way: is the excess at most 0.02?"""
    rng = np.random.default_rng(1)
    n, bound, level = 1000, 0.02, 0.05
    rows = differences(rng, (200, n), worse=0.01, better=0.01)
    betting = np.array([betting_p_value(row, bound, -1) for row in rows])
    hoeffding = np.exp(-2 * n * (np.maximum(bound - rows.mean(axis=1), 0) / 2) ** 2)
    assert (betting <= level).mean() > 0.9
    assert (hoeffding <= level).mean() == 0


def test_betting_on_errors_is_not_far_from_the_exact_test() -> None:
    rng = np.random.default_rng(2)
    rows = (rng.random((200, 1000)) < 0.03).astype(float)
    exactly = np.array([binomial_p_value(int(row.sum()), 1000, 0.05) for row in rows])
    betting = np.array([betting_p_value(row, 0.05) for row in rows])
    assert (exactly <= 0.05).mean() > 0.9
    assert (betting <= 0.05).mean() > 0.7


def test_earlier_losses_set_the_first_bets() -> None:
    earlier, losses, bound = [0.0, 0.5, 0.25, 0.25], [0.0, 0.5, 0.0, 0.25] * 5, 0.4
    seen, capital, largest = list(earlier), 1.0, 1.0
    squares = float(np.var(earlier)) * len(earlier)
    for loss in losses:
        bet = min(math.sqrt(2 * math.log(20) / (len(losses) * squares / len(seen))), 0.9 / (1 - bound))
        capital *= 1 + bet * (bound - loss)
        largest = max(largest, capital)
        seen.append(loss)
        squares += (loss - sum(seen) / len(seen)) ** 2
    assert largest > 1.2
    assert betting_p_value(losses, bound, earlier=earlier, max_stake=0.9) == pytest.approx(1 / largest)


def test_earlier_losses_that_are_all_equal_bet_the_most() -> None:
    assert betting_p_value([0.0] * 10, 0.1, earlier=[0.0] * 50, max_stake=0.9) == pytest.approx(1 / (1 + 0.1) ** 10)


def test_earlier_losses_and_higher_stakes_prove_more_and_stay_valid() -> None:
    rng = np.random.default_rng(5)
    n, bound, level = 120, 0.05, 0.05
    fair, good = (0.1 * rng.binomial(1, mean / 0.1, (N_RUNS, n)) for mean in (bound, 0.4 * bound))
    before = 0.1 * rng.binomial(1, 0.2, 200)

    def share(rows: np.ndarray, **how: object) -> float:
        return float(np.mean([betting_p_value(row, bound, **how) <= level for row in rows]))  # type: ignore[arg-type]

    told = {"earlier": before, "max_stake": 0.95}
    assert share(fair, **told) <= most_allowed(level)
    assert share(good, **told) > share(good) + 0.1


@pytest.mark.parametrize("earlier", [[1.5], [math.nan], [[0.5]]])
def test_earlier_losses_outside_their_limits(earlier: object) -> None:
    with pytest.raises(ValueError, match="one row of numbers"):
        betting_p_value([0.5], 0.5, earlier=earlier)  # type: ignore[arg-type]


@pytest.mark.parametrize("stake", [0.0, 1.0, -0.1, math.nan])
def test_a_stake_that_is_no_share(stake: float) -> None:
    with pytest.raises(ValueError, match="stake"):
        betting_p_value([0.5], 0.5, max_stake=stake)


# --- many candidates


def test_the_first_failure_ends_the_sequence() -> None:
    p_values = [0.001, 0.05, 0.051, 0.0]
    assert fixed_sequence(p_values, 4, 0.05) == 2
    assert fixed_sequence(np.array(p_values), 4, 0.05) == 2
    assert fixed_sequence(p_values, 1, 0.05) == 1
    assert fixed_sequence(p_values, 4, 0.06) == 4
    assert fixed_sequence([0.9, 0.0], 2, 0.05) == 0
    assert fixed_sequence([math.nan], 1, 0.05) == 0
    assert fixed_sequence([], 0, 0.05) == 0


def test_candidates_after_a_failure_cost_nothing() -> None:
    asked: list[int] = []

    def p_value_of(i: int) -> float:
        asked.append(i)
        return 0.0 if i < 2 else 1.0

    assert fixed_sequence(p_value_of, 1000, 0.05) == 2
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_a_delta_that_is_no_level(delta: float) -> None:
    for call in (
        lambda: fixed_sequence([0.0], 1, delta),
        lambda: messages_needed(0.05, delta),
        lambda: betting_p_value([0.0], 0.5, delta=delta),
    ):
        with pytest.raises(UsageError, match="delta"):
            call()


def wrong_shares(
    p_values: np.ndarray, risks: np.ndarray, averages: np.ndarray, bound: float, delta: float
) -> list[float]:
    """Share of runs that let through a candidate above `bound`; arrays (runs, candidates), risks (candidates,).

    By fixed-sequence testing, by testing all candidates in any order, and by trusting the average on the examples.
    """
    too_high = risks > bound
    certified = np.array([fixed_sequence(row, len(row), delta) for row in p_values])
    in_sequence = np.arange(len(risks)) < certified[:, None]
    return [
        float((passed & too_high).any(axis=1).mean()) for passed in (in_sequence, p_values <= delta, averages <= bound)
    ]


@pytest.mark.parametrize(("n", "bound", "delta"), [(300, 0.05, 0.1), (150, 0.1, 0.05)])
def test_error_rates_above_the_bound_are_certified_no_more_often_than_delta(n: int, bound: float, delta: float) -> None:
    rng = np.random.default_rng(3)
    risks = bound * np.array([0.3, 0.6, 1.001, 1.001, 1.01, 1.02, 1.05, 1.1])
    errors = rng.binomial(n, risks, (N_RUNS, len(risks)))
    p_value = lru_cache(lambda e: binomial_p_value(e, n, bound))
    p_values = np.array([[p_value(e) for e in row] for row in errors.tolist()])
    sequence, unordered, naive = wrong_shares(p_values, risks, errors / n, bound, delta)
    assert sequence <= most_allowed(delta)
    assert unordered > most_allowed(delta)
    assert naive > most_allowed(delta)
    assert (p_values[:, 0] <= delta).mean() > 0.8  # the safest does pass


def test_differences_above_the_bound_are_certified_no_more_often_than_delta() -> None:
    rng = np.random.default_rng(4)
    n, bound, delta = 300, 0.02, 0.1
    better = 0.02
    risks = np.array([-0.015, 0.0201, 0.0201, 0.022, 0.025])
    losses = np.stack([differences(rng, (N_RUNS, n), better + risk, better) for risk in risks], axis=1)
    p_values = np.array([[betting_p_value(row, bound, -1, delta=delta) for row in run] for run in losses])
    sequence, _, naive = wrong_shares(p_values, risks, losses.mean(axis=2), bound, delta)
    assert sequence <= most_allowed(delta)
    assert naive > most_allowed(delta)
    for column in p_values[:, risks > bound].T:
        assert (column <= delta).mean() <= most_allowed(delta)
    assert (p_values[:, 0] <= delta).mean() > 0.5


# --- on average


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_risk_control_is_its_definition(n_candidates: int, n: int, bound: float, seed: int) -> None:
    losses = np.random.default_rng(seed).integers(0, 9, (n_candidates, n)) / 8
    allowed = 0
    for i in range(n_candidates):
        worst = [max(losses[j][k] for j in range(i + 1)) for k in range(n)]
        if sum(worst) + 1 > bound * (n + 1) * (1 + 1e-9):
            break
        allowed = i + 1
    assert conformal_risk_control(losses, bound) == allowed
    assert conformal_risk_control(3 * losses, 3 * bound, high=3) == allowed


def test_the_edges_of_risk_control() -> None:
    assert conformal_risk_control(np.zeros((3, 18)), 0.05) == 0
    assert conformal_risk_control(np.zeros((3, 19)), 0.05) == 3  # 1 / 20 is just allowed
    assert conformal_risk_control(np.ones((3, 19)), 1.0) == 3
    assert conformal_risk_control(np.zeros((0, 19)), 0.05) == 0
    # an example that is right again counts as wrong all the same
    assert conformal_risk_control([[0.0] * 20, [1.0] + [0.0] * 19, [0.0] * 20], 0.05) == 1
    for losses in ([[1.1]], [[-0.1]], [[math.nan]], [0.5]):
        with pytest.raises(ValueError, match="must be a table"):
            conformal_risk_control(losses, 0.1)
    for bound in (-0.1, math.nan):
        with pytest.raises(UsageError, match="not a share"):
            conformal_risk_control([[0.0]], bound)


@settings(deadline=None)
@given(st.floats(0.001, 1), st.floats(0, 1), st.floats(0.5, 3))
def test_examples_to_control_are_the_fewest(bound: float, risk: float, high: float) -> None:
    n = examples_to_control(bound, risk, high)
    if n is None:
        assert bound <= risk
        return
    slack = 1 + 1e-9
    assert n * risk + high <= bound * (n + 1) * slack
    assert n == 0 or (n - 1) * risk + high > bound * n / slack


def test_examples_to_control_without_loss() -> None:
    assert [examples_to_control(bound) for bound in (0.01, 0.05, 0.5, 1.0)] == [99, 19, 1, 0]
    assert examples_to_control(0.05, 0.05) is None


def test_the_expected_loss_is_controlled_and_one_draw_is_not() -> None:
    """Losses that fall back in places: the largest so far is what counts."""
    rng = np.random.default_rng(6)
    n, bound, n_candidates = 60, 0.2, 30
    levels = np.linspace(0.02, 0.6, n_candidates)
    chosen = []
    for _ in range(N_RUNS):
        draws, noise = rng.random(n), rng.random((n_candidates, n))
        losses = (draws < levels[:, None]) * (noise < 0.9)
        count = conformal_risk_control(losses, bound)
        chosen.append(0.9 * levels[count - 1] if count else 0.0)
    assert np.mean(chosen) <= bound
    assert np.mean(chosen) > 0.7 * bound
    assert np.mean(np.array(chosen) > bound) > 0.1


# --- how many examples, and in words


@pytest.mark.parametrize(
    ("bound", "delta", "n"), [(0.05, 0.05, 59), (0.01, 0.05, 299), (0.05, 0.1, 45), (0.5, 0.25, 2), (0.99, 0.5, 1)]
)
def test_examples_needed(bound: float, delta: float, n: int) -> None:
    assert messages_needed(bound, delta) == n


@settings(deadline=None)
@given(st.floats(1e-9, 1), st.floats(1e-6, 1, exclude_max=True))
def test_one_example_fewer_than_needed_does_not_do(bound: float, delta: float) -> None:
    n = messages_needed(bound, delta)
    assert binomial_p_value(0, n, bound) <= delta < binomial_p_value(0, n - 1, bound)


@pytest.mark.parametrize(("bound", "n"), [(0.01, 8), (0.01, 11), (0.05, 59), (0.13436424411240122, 392)])
def test_rounding_costs_no_example_and_saves_none(bound: float, n: int) -> None:
    reached = binomial_p_value(0, n, bound)
    assert messages_needed(bound, reached) == n
    assert messages_needed(bound, math.nextafter(reached, 0)) == n + 1


@pytest.mark.parametrize("bound", [0.0, -1.0, 1e-300, math.nan])
def test_no_number_of_examples_is_enough(bound: float) -> None:
    with pytest.raises(UsageError, match="cannot be certified") as failure:
        messages_needed(bound, 0.05)
    assert failure.value.hint


def test_certificates_in_words() -> None:
    good = Certificate("error rate", 0.05, 0.05, 2974, 0.0313, 1e-7, True)
    assert good.sentence() == "error rate at most 0.05 with confidence 95% (0.031 on 2,974 messages)"
    bad = Certificate("loss of accuracy", 0.01, 0.001, 40, -0.025, 0.6, False)
    assert (
        bad.sentence("tokens")
        == "loss of accuracy at most 0.01 not certified with confidence 99.9% (-0.025 on 40 tokens)"
    )
    none = Certificate("error rate", 0.05, 0.1, 0, math.nan, 1.0, False)
    assert none.sentence() == "error rate at most 0.05 not certified with confidence 90% (no messages)"
