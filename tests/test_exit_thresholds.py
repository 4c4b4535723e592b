"""Certified thresholds hold as often as they say; broken ways to certify are found out by the same simulation."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from edge_runtime.exits.policies import RISKS, Family, Tally, fit_family, tally
from edge_runtime.exits.thresholds import BOUNDS, Rung, certify, certify_family, held_out
from edge_runtime.types import Floats

N_RUNS = 300
DELTA = 0.1


@dataclass
class Told:
    """Predictions of one boundary, as far as they are read."""

    prompts: np.ndarray
    agree: np.ndarray
    acceptance: Floats


Split = tuple[list[Told], list[Floats]]


def world(seed: int, n: int, *, spread: float = 1.5, n_boundaries: int = 2, first: int = 0) -> Split:
    """`n` prompts of 10 to 49 tokens; how right the heads are, and how sure, differs from prompt to prompt."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 50, n)
    prompts = np.repeat(np.arange(first, first + n, dtype=np.int32), sizes)
    ease, luck = (np.repeat(rng.normal(0, spread, n), sizes) for _ in range(2))
    hardness = rng.normal(0, 2.0, len(prompts))
    told, doubts = [], []
    for b in range(n_boundaries):
        score = hardness + ease + rng.normal(0, 0.5, len(prompts)) - 0.5 * b
        p = 1 / (1 + np.exp(-(score + luck)))
        told.append(Told(prompts, rng.random(len(prompts)) >= p, (1 - p).astype(np.float32)))
        doubts.append((1 / (1 + np.exp(-score))).astype(np.float32))
    return told, doubts


def rows_of(found: Tally, rows: np.ndarray) -> Tally:
    """The tally of some of its prompts, some maybe more than once."""
    parts = {name: getattr(found, name)[rows] for name in ("prompts", "tokens", "exits", "errors", "refused")}
    return dataclasses.replace(found, **parts)


# --- validity


@lru_cache
def population() -> tuple[Family, Tally, Tally]:
    """Policies and their counts on a tune split, and on the 10,000 prompts there are: true risks are known exactly."""
    tune, everyone = world(1, 200, spread=2.5), world(2, 10_000, spread=2.5)
    family = fit_family("entropy", *tune, 40)
    return family, tally(family.thresholds, *tune), tally(family.thresholds, *everyone)


def most_allowed(level: float) -> float:
    """The share of broken certificates that chance explains at `level`: 3 standard errors above it."""
    return level + 3 * math.sqrt(level * (1 - level) / N_RUNS)


def broken_share(certified: Callable[[Tally, int], int | None], risk: str, bound: float, n: int) -> tuple[float, float]:
    """Shares of runs, with n prompts drawn each, that certify a policy at all, and one that breaks its bound.

    `certified` gives the place of the policy it would use, or None.
    """
    _, _, everyone = population()
    true = everyone.risk(risk)
    rng = np.random.default_rng(3)
    chosen = [certified(rows_of(everyone, rng.integers(0, len(everyone.tokens), n)), i) for i in range(N_RUNS)]
    broken = [c is not None and not true[c] <= bound for c in chosen]
    return float(np.mean([c is not None for c in chosen])), float(np.mean(broken))


def place_of(rung: Rung) -> int | None:
    family, _, _ = population()
    if not rung.holds:
        return None
    (place, *_) = np.flatnonzero((family.thresholds == rung.thresholds).all(axis=1))
    return int(place)


def sharp_bound(risk: str, per_token: bool = False) -> float:
    """A bound that one of the policies breaks by a hair."""
    _, _, everyone = population()
    true = everyone.parts(risk)[0].mean(axis=0) if per_token else everyone.risk(risk)
    return float(0.999 * true[33])


def properly(risk: str, bound: float, method: str = "ltt") -> Callable[[Tally, int], int | None]:
    family, tuned, _ = population()

    def certified(held: Tally, seed: int) -> int | None:
        rungs = certify_family(family, tuned, held, [risk], [bound], DELTA, seed)
        (rung,) = (r for r in rungs if r.method == method)
        return place_of(rung)

    return certified


@pytest.mark.parametrize("risk", RISKS)
def test_certificates_break_no_more_often_than_delta(risk: str) -> None:
    bound = sharp_bound(risk)
    held, broken = broken_share(properly(risk, bound), risk, bound, 500)
    assert held > 0.5
    assert broken <= most_allowed(DELTA)


@pytest.mark.parametrize("risk", RISKS)
def test_the_policy_that_looks_right_on_the_certifying_prompts_does_break(risk: str) -> None:
    bound = sharp_bound(risk)

    def picked(held: Tally, _: int) -> int | None:
        fine = np.flatnonzero(held.risk(risk) <= bound)
        return int(fine[-1]) if len(fine) else None

    assert broken_share(picked, risk, bound, 500)[1] > most_allowed(DELTA)


def test_tokens_as_units_do_break() -> None:
    """Tokens of one prompt are right or wrong together: a thousand of them are not a thousand examples."""
    bound = sharp_bound("exits")
    family, tuned, _ = population()
    told, doubts = world(2, 10_000, spread=2.5)
    edges = np.append(np.flatnonzero(np.diff(told[0].prompts, prepend=-1)), len(told[0].prompts))

    def certified(held: Tally, seed: int) -> int | None:
        tokens = np.concatenate([np.arange(edges[p], edges[p + 1]) for p in held.prompts])
        numbers = np.arange(len(tokens), dtype=np.int32)
        alone = [Told(numbers, item.agree[tokens], item.acceptance[tokens]) for item in told]
        by_token = tally(family.thresholds, alone, [column[tokens] for column in doubts])
        return place_of(certify_family(family, tuned, by_token, ["exits"], [bound], DELTA, seed)[0])

    assert broken_share(certified, "exits", bound, 100)[1] > most_allowed(DELTA)


@pytest.mark.parametrize("risk", ["tokens", "acceptance"])
def test_risk_control_holds_on_average(risk: str) -> None:
    bound = sharp_bound(risk, per_token=True)
    _, _, everyone = population()
    true = everyone.parts(risk)[0].mean(axis=0)
    rng = np.random.default_rng(4)
    method = properly(risk, bound, "crc")
    found = []
    for i in range(N_RUNS):
        place = method(rows_of(everyone, rng.integers(0, len(everyone.tokens), 500)), i)
        found.append(0.0 if place is None else true[place])
    mean, error = np.mean(found), np.std(found) / math.sqrt(N_RUNS)
    assert mean <= bound + 3 * error
    assert mean > 0.6 * bound
    assert np.mean(np.array(found) > bound) > DELTA  # on average only: no confidence for one draw


def test_risk_control_is_bolder_than_a_certificate() -> None:
    tune, held = world(5, 200), world(6, 300, first=1000)
    rungs = certify("entropy", tune, held, risks=["tokens"])
    for bound in BOUNDS:
        certified, averaged = (next(r for r in rungs if (r.bound, r.method) == (bound, m)) for m in ("ltt", "crc"))
        assert averaged.coverage >= certified.coverage
    assert rungs[-1].holds
    assert "in expectation" in rungs[-1].sentence()


# --- counting


def plainly(thresholds: np.ndarray, told: list[Told], doubts: list[Floats]) -> dict[str, np.ndarray]:
    """What policies do, token by token."""
    numbers = sorted(set(told[0].prompts.tolist()))
    shape = (len(numbers), len(thresholds))
    found = {name: np.zeros(shape) for name in ("exits", "errors", "refused")}
    found["by_boundary"] = np.zeros((len(thresholds), len(told)))
    for c, limits in enumerate(thresholds):
        for i, prompt in enumerate(told[0].prompts.tolist()):
            for b, limit in enumerate(limits):
                if float(doubts[b][i]) < limit:
                    row = numbers.index(prompt)
                    found["exits"][row, c] += 1
                    found["errors"][row, c] += not told[b].agree[i]
                    found["refused"][row, c] += 1 - float(told[b].acceptance[i])
                    found["by_boundary"][c, b] += 1
                    break
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 40), st.integers(1, 6))
def test_counts_are_those_of_plain_python(seed: int, n_boundaries: int, m: int, n_candidates: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 7, m).astype(np.int32)
    told = [Told(prompts, rng.random(m) < 0.5, rng.random(m).astype(np.float32)) for _ in range(n_boundaries)]
    # few values, so that uncertainties often equal a threshold
    doubts = [rng.choice([0.0, 0.25, 0.5, 1.0, math.nan], m).astype(np.float32) for _ in range(n_boundaries)]
    thresholds = np.sort(rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, 2.0], (n_candidates, n_boundaries)), axis=0)
    found, expected = tally(thresholds, told, doubts), plainly(thresholds, told, doubts)
    for name, table in expected.items():
        np.testing.assert_allclose(getattr(found, name), table, atol=1e-9)
    assert found.tokens.sum() == m
    assert found.prompts.tolist() == sorted(set(prompts.tolist()))


def test_risks_by_hand() -> None:
    """Two prompts of 4 and 2 tokens; the policy takes three of the first, one of them wrong, and one of the second."""
    prompts = np.array([7, 7, 7, 7, 9, 9], np.int32)
    agree = np.array([True, False, True, False, True, False])
    told = [Told(prompts, agree, np.array([1, 0.5, 1, 0, 0.75, 0], np.float32))]
    doubts = [np.array([0.1, 0.2, 0.1, 0.9, 0.1, 0.9], np.float32)]
    found = tally(np.array([[0.5]]), told, doubts)
    assert found.risk("tokens") == pytest.approx([(1 / 4) / 2])
    assert found.risk("exits") == pytest.approx([(1 / 4) / (3 / 4 + 1 / 2)])
    assert found.risk("prompts") == pytest.approx([(1 / 3 + 0) / 2])
    assert found.risk("acceptance") == pytest.approx([(0.5 / 4 + 0.25 / 2) / (3 / 4 + 1 / 2)])
    assert found.coverage() == pytest.approx([(3 / 4 + 1 / 2) / 2])
    for risk in RISKS:
        assert found.excess(risk, float(found.risk(risk)[0])).mean() == pytest.approx(0, abs=1e-12)
        assert found.excess(risk, 0.9).mean() < 0


# --- policies


def test_policies_grow_bolder_to_the_last_token() -> None:
    told, doubts = world(7, 200, n_boundaries=3)
    for signal in ("gate", "entropy"):
        family = fit_family(signal, told, doubts)
        assert (np.diff(family.thresholds, axis=0) >= 0).all()
        share = tally(family.thresholds, told, doubts).exits.sum(axis=0) / len(doubts[0])
        assert share[-1] == 1
        assert share == pytest.approx(np.geomspace(0.003, 1, 60), abs=0.02)
        assert (signal == "gate") == bool((np.ptp(family.thresholds, axis=1) == 0).all())


def test_a_signal_stands_for_the_same_disagreement_at_every_boundary() -> None:
    """Equal uncertainties mean less at a boundary that errs more: its thresholds are lower."""
    rng = np.random.default_rng(8)
    prompts = np.arange(20_000, dtype=np.int32) // 20
    doubts = [rng.random(len(prompts)).astype(np.float32) for _ in range(2)]
    worth = [doubts[0], doubts[1] ** 3]
    told = [Told(prompts, rng.random(len(prompts)) >= p, 1 - p) for p in worth]
    family = fit_family("top1", told, doubts)
    middle = family.thresholds[(family.thresholds[:, 0] > 0.1) & (family.thresholds[:, 0] < 0.9)]
    assert middle[:, 1] ** 3 == pytest.approx(middle[:, 0], abs=0.07)


def test_a_boundary_without_numbers_never_exits() -> None:
    told, doubts = world(9, 50)
    family = fit_family("stability", told, [np.full(len(doubts[0]), np.nan, np.float32), doubts[1]])
    assert not family.thresholds[:, 0].any()
    assert family.thresholds[-1, 1] > 0
    nothing = fit_family("stability", told, [np.full(len(doubts[0]), np.nan, np.float32)] * 2)
    assert not nothing.thresholds.any()


def test_thresholds_are_of_the_tune_split_alone() -> None:
    tune = world(10, 100)
    family = fit_family("margin", *tune)
    for seed in (11, 12):
        for rung in certify("margin", tune, world(seed, 300, first=500), bounds=[0.2]):
            assert rung.holds
            assert (family.thresholds == rung.thresholds).all(axis=1).any()


# --- rungs


def test_a_ladder() -> None:
    tune, held, other = world(13, 400), world(14, 2000, first=1000), world(15, 2000, first=5000)
    rungs = certify("gate", tune, held)
    assert len(rungs) == len(BOUNDS) * (len(RISKS) + 2)
    for risk in RISKS:
        ladder = [r for r in rungs if r.risk == risk and r.method == "ltt"]
        assert [r.bound for r in ladder] == list(BOUNDS)
        assert [r.coverage for r in ladder] == sorted(r.coverage for r in ladder)
        assert ladder[-1].holds
    for rung in rungs:
        assert rung.signal == "gate"
        assert rung.delta == (0.05 if rung.method == "ltt" else 1)
        found = held_out(rung, *other, n_resamples=200)
        assert found.coverage == pytest.approx(rung.coverage, abs=0.03)
        if rung.holds:
            assert rung.prompts_needed is None
            assert rung.certificate["risk"] <= rung.bound
            assert found.risk <= rung.bound * 1.1
            assert found.risk_low <= found.risk <= found.risk_high
            assert found.coverage_low <= found.coverage <= found.coverage_high
            assert "not certified" not in rung.sentence()
    assert (
        Rung(**json.loads(json.dumps(dataclasses.asdict(rungs[0]), allow_nan=False))).certificate
        == rungs[0].certificate
    )
    assert rungs == certify("gate", tune, held)


def test_too_few_prompts() -> None:
    tune, held = world(16, 100), world(17, 20, first=500)
    for rung in certify("entropy", tune, held, bounds=[0.01, 0.02]):
        assert not rung.holds
        assert rung.thresholds == (0.0, 0.0)
        assert rung.coverage == 0
        assert (
            rung.prompts_minimum
            == {("ltt", 0.01): 299, ("ltt", 0.02): 149, ("crc", 0.01): 99, ("crc", 0.02): 49}[rung.method, rung.bound]
        )
        assert rung.prompts_needed is None or rung.prompts_needed >= rung.prompts_minimum
        assert "not certified" in rung.sentence()
        assert f"at least {rung.prompts_minimum}" in rung.sentence() or rung.prompts_needed is None


@pytest.mark.parametrize(("risk", "bound"), [("tokens", 0.02), ("exits", 0.1)])
def test_the_number_of_prompts_needed_is_about_right(risk: str, bound: float) -> None:
    family, tuned, everyone = population()
    rng = np.random.default_rng(18)

    def rung(n: int) -> Rung:
        rows = rng.integers(0, len(everyone.tokens), n)
        return certify_family(family, tuned, rows_of(everyone, rows), [risk], [bound], 0.05)[0]

    few = [rung(40) for _ in range(30)]
    assert not any(r.holds for r in few)
    needed = int(np.median([r.prompts_needed for r in few if r.prompts_needed is not None]))
    assert np.mean([rung(2 * needed).holds for _ in range(30)]) > 0.7
    assert np.mean([rung(needed // 2).holds for _ in range(30)]) < 0.3


def test_no_exits() -> None:
    told, doubts = world(19, 60)
    never = [np.full(len(column), np.nan, np.float32) for column in doubts]
    for rung in certify("stability", (told, never), (told, never)):
        assert not any(rung.thresholds)
        assert rung.coverage == 0
        if rung.risk in ("exits", "prompts") and rung.method == "ltt":
            assert not rung.holds
            assert rung.prompts_needed is None
            assert rung.certificate["risk"] is None
            assert "no number of prompts" in rung.sentence()
        json.dumps(dataclasses.asdict(rung), allow_nan=False)


def test_all_disagree() -> None:
    told, doubts = world(20, 300)
    for item in told:
        item.agree[:] = False
        item.acceptance[:] = 0
    for rung in certify("entropy", (told, doubts), (told, doubts), risks=["exits", "prompts", "acceptance"]):
        if rung.method == "ltt":
            assert not rung.holds
            assert rung.prompts_needed is None
            assert rung.certificate["risk"] == pytest.approx(1)


def test_all_agree() -> None:
    told, doubts = world(21, 400)
    for item in told:
        item.agree[:] = True
        item.acceptance[:] = 1
    for rung in certify("entropy", (told, doubts), (told, doubts), bounds=[0.02]):
        assert rung.holds
        assert rung.coverage == 1


def test_one_prompt() -> None:
    told, doubts = world(22, 1)
    for rung in certify("gate", (told, doubts), (told, doubts)):
        assert not rung.holds
    found = held_out(Rung("gate", "exits", 0.1, 0.05, (2.0, 2.0)), told, doubts, n_resamples=10)
    assert found.n_prompts == 1
    assert found.risk_low == found.risk == found.risk_high


# --- other prompts


def test_the_interval_on_other_prompts_is_neither_too_narrow_nor_too_wide() -> None:
    everyone = world(23, 3000)
    limits = (0.3, 0.3)
    rung = Rung("entropy", "exits", 0.1, 0.05, limits)
    true = float(tally(np.array([limits]), *everyone).risk("exits")[0])
    inside = []
    for i in range(100):
        part = held_out(rung, *world(1000 + i, 120), n_resamples=200)
        inside.append(part.risk_low <= true <= part.risk_high)
    assert 0.85 <= np.mean(inside) < 1


def test_what_never_exits_has_no_risk() -> None:
    told, doubts = world(24, 30)
    for risk, expected in (("exits", math.nan), ("tokens", 0.0)):
        found = held_out(Rung("entropy", risk, 0.1, 0.05, (0.0, 0.0)), told, doubts)
        assert found.risk == pytest.approx(expected, nan_ok=True)
        assert found.risk_high == pytest.approx(expected, nan_ok=True)
        assert (found.coverage, found.coverage_high, found.n_exits) == (0, 0, 0)


# --- bad input


def test_predictions_that_do_not_fit() -> None:
    told, doubts = world(25, 5)
    other = Told(told[0].prompts + 1, told[0].agree, told[0].acceptance)
    for heard, columns in (([told[0], other], doubts), (told, doubts[:1]), (told, [doubts[0], doubts[1][1:]])):
        with pytest.raises(UsageError, match="same tokens"):
            fit_family("entropy", heard, columns)
    with pytest.raises(UsageError, match="no predictions"):
        fit_family("entropy", [], [])
    with pytest.raises(UsageError, match="no risk"):
        certify("entropy", (told, doubts), (told, doubts), risks=["luck"])
    for bound in (0.0, 1.0, math.nan):
        with pytest.raises(UsageError, match="not a share"):
            certify("entropy", (told, doubts), (told, doubts), bounds=[bound])
    with pytest.raises(UsageError, match="delta"):
        certify("entropy", (told, doubts), (told, doubts), delta=0.0)
