"""The gate against known coefficients, and what must not break it."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.gate import FEATURES, Gate, feature_column, fit_gate, held_out_probabilities
from edge_runtime.metrics import auroc, calibration_error
from edge_runtime.types import Signals

Columns = dict[str, np.ndarray]


def columns(n: int, seed: int = 0, *, stability: bool = True) -> Columns:
    random = np.random.default_rng(seed)
    top1 = random.beta(1.5, 1.0, n)
    return {
        "entropy": (4 * (1 - top1) * random.uniform(0.7, 1.3, n)).astype(np.float32),
        "top1": top1.astype(np.float32),
        "margin": (top1 * random.uniform(0, 1, n)).astype(np.float32),
        "clusters": (3 * (1 - top1) * random.uniform(0.7, 1.3, n)).astype(np.float32),
        "stability": (random.uniform(0.2, 1, n) if stability else np.full(n, np.nan)).astype(np.float32),
        "other": random.beta(1, 12, n).astype(np.float32),
    }


def truth(values: Columns, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that a gate can express, and what was drawn by them."""
    score = -0.5 - 1.2 * feature_column("log odds", values) + 0.8 * feature_column("entropy", values)
    p = 1 / (1 + np.exp(-score))
    return p, random.random(len(p)) < p


def prompts(n: int, each: int = 50) -> np.ndarray:
    return (np.arange(n) // each).astype(np.int32)


def row(values: Columns, i: int) -> Signals:
    return Signals(**{name: float(column[i]) for name, column in values.items()})


def test_known_coefficients_are_found() -> None:
    values = columns(60_000)
    _, wrong = truth(values, np.random.default_rng(1))
    gate = fit_gate(values, wrong, prompts(60_000), ["log odds", "entropy"], penalty=1e-6)
    slopes = np.array(gate.weights) / np.array(gate.scale)
    bias = gate.bias - float(slopes @ np.array(gate.mean))
    assert gate.names == ("log odds", "entropy")
    # the standard errors are some 0.03
    assert slopes == pytest.approx([-1.2, 0.8], abs=0.1)
    assert bias == pytest.approx(-0.5, abs=0.15)


def test_the_optimum_is_one() -> None:
    """At the minimum the gradient of the penalised loss vanishes."""
    values = columns(400)
    _, wrong = truth(values, np.random.default_rng(2))
    gate = fit_gate(values, wrong, prompts(400), penalty=3.0)
    table = np.stack([feature_column(name, values) for name in gate.names], axis=1)
    z = np.clip((table - gate.mean) / gate.scale, -8, 8)
    targets = np.where(wrong, (wrong.sum() + 1) / (wrong.sum() + 2), 1 / ((~wrong).sum() + 2))
    errors = gate.probabilities(values).astype(float) - targets
    assert z.T @ errors + 3.0 * np.array(gate.weights) == pytest.approx(np.zeros(len(gate.names)), abs=2e-3)
    assert errors.sum() == pytest.approx(0, abs=2e-3)


def test_held_out_probabilities_are_calibrated_and_no_worse_than_the_truth() -> None:
    values = columns(20_000)
    p, wrong = truth(values, np.random.default_rng(3))
    found = held_out_probabilities(values, wrong, prompts(20_000))
    assert calibration_error(found, wrong) < 0.02
    assert abs(auroc(wrong, found) - auroc(wrong, p.astype(np.float32))) < 0.005
    assert np.abs(found - p).mean() < 0.02


def test_a_prompt_is_never_judged_by_a_gate_that_saw_it() -> None:
    """One prompt is all wrong, for no reason that signals show: only a gate fitted to it could tell."""
    values = columns(1000)
    number = prompts(1000, 100)
    wrong = number == 0
    values["other"] = np.where(wrong, 0.9, 0.1).astype(np.float32)
    found = held_out_probabilities(values, wrong, number, n_folds=10)
    assert found[wrong].max() < 0.05
    assert fit_gate(values, wrong, number, penalty=0.01).probabilities(values)[wrong].min() > 0.9


def test_few_prompts_are_regularised_more() -> None:
    """Signals that say nothing: cross-validation over prompts must not believe them."""
    random = np.random.default_rng(4)
    values = columns(300)
    number = prompts(300, 60)
    wrong = random.random(300) < 0.3
    free = fit_gate(values, wrong, number, penalty=1e-3)
    chosen = fit_gate(values, wrong, number)
    assert np.abs(chosen.weights).sum() < 0.2 * np.abs(free.weights).sum()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 499))
def test_one_number_and_many_agree(i: int) -> None:
    gate, values = _fitted()
    assert gate.probability(row(values, i)) == pytest.approx(float(gate.probabilities(values)[i]), abs=1e-6)


def _fitted(made: list[tuple[Gate, Columns]] = []) -> tuple[Gate, Columns]:  # noqa: B006
    if not made:
        values = columns(500)
        made.append((fit_gate(values, truth(values, np.random.default_rng(5))[1], prompts(500)), values))
    return made[0]


@pytest.mark.parametrize("label", [True, False])
def test_all_agree_or_none(label: bool) -> None:
    values = columns(200)
    wrong = np.full(200, label)
    for p in (
        fit_gate(values, wrong, prompts(200)).probabilities(values),
        held_out_probabilities(values, wrong, prompts(200)),
    ):
        assert np.isfinite(p).all()
        assert (p > 0.9).all() if label else (p < 0.1).all()


def test_labels_that_a_feature_separates_leave_the_gate_finite() -> None:
    values = columns(500)
    wrong = values["top1"] < 0.5
    gate = fit_gate(values, wrong, prompts(500), penalty=0.0)
    p = gate.probabilities(values)
    assert np.isfinite(p).all()
    assert auroc(wrong, p) > 0.995


def test_missing_signals_are_dropped() -> None:
    values = columns(500, stability=False)
    _, wrong = truth(values, np.random.default_rng(6))
    gate = fit_gate(values, wrong, prompts(500))
    assert set(gate.names) == set(FEATURES) - {"log turn"}
    assert math.isfinite(gate.probability(row(values, 0)))
    del values["clusters"]
    assert not {"clusters", "log clusters"} & set(fit_gate(values, wrong, prompts(500)).names)


def test_constant_features_get_no_weight() -> None:
    values = columns(500)
    values["other"] = np.zeros(500, np.float32)
    values["clusters"] = np.full(500, 2.5, np.float32)
    gate = fit_gate(values, truth(values, np.random.default_rng(7))[1], prompts(500))
    weights = dict(zip(gate.names, gate.weights, strict=True))
    assert {name for name, w in weights.items() if w == 0} == {"other", "log other", "clusters", "log clusters"}
    before = gate.probability(row(values, 3))
    values["other"][3] = 0.7
    assert gate.probability(row(values, 3)) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["entropy", "top1", "margin", "clusters", "stability", "other"])
def test_what_is_no_number_is_never_surer_than_what_is(name: str, bad: float) -> None:
    """An exit asks `gate < threshold`: no broken signal may let a token go that a sound one holds."""
    gate, values = _fitted()
    values = {key: column[:1].copy() for key, column in values.items()}
    values[name][0] = bad
    one, many = gate.probability(row(values, 0)), float(gate.probabilities(values)[0])
    assert one == pytest.approx(many, abs=1e-6, nan_ok=True)
    assert math.isnan(one) or math.isinf(bad)
    assert math.isnan(one) or 0 <= one <= 1


def test_tokens_without_a_number_are_left_out_of_the_fit() -> None:
    values = columns(1000)
    _, wrong = truth(values, np.random.default_rng(8))
    part = {name: column[:900] for name, column in values.items()}
    expected = fit_gate(part, wrong[:900], prompts(900), penalty=1.0)
    values["stability"][900:] = np.nan
    values["entropy"][950:] = np.inf
    assert fit_gate(values, wrong, prompts(1000), penalty=1.0) == expected


def test_far_out_values_do_not_decide_alone() -> None:
    gate, values = _fitted()
    one = row(values, 0)
    wild = Signals(entropy=1e30, top1=one.top1, margin=one.margin, clusters=one.clusters, stability=one.stability)
    assert 0 <= gate.probability(wild) <= 1


def test_no_tokens() -> None:
    empty = {name: column[:0] for name, column in columns(1).items()}
    with pytest.raises(UsageError, match="no tokens"):
        fit_gate(empty, np.zeros(0, bool), np.zeros(0, np.int32))
    values = columns(3)
    values["entropy"][:2] = np.nan
    values["margin"][2] = np.nan
    with pytest.raises(UsageError, match="no tokens"):
        fit_gate(values, np.zeros(3, bool), np.arange(3, dtype=np.int32))


def test_one_prompt_has_no_others_to_learn_from() -> None:
    values = columns(60)
    wrong = values["top1"] < 0.4
    assert np.isnan(held_out_probabilities(values, wrong, np.zeros(60, np.int32))).all()
    assert np.isfinite(fit_gate(values, wrong, np.zeros(60, np.int32)).probabilities(values)).all()


def test_a_gate_survives_being_written_down() -> None:
    gate, _ = _fitted()
    assert Gate(**asdict(gate)) == gate
    halved = [np.float32(getattr(gate, name)) for name in ("mean", "scale", "weights")]
    assert Gate(list(gate.names), *halved, np.float32(gate.bias)) == gate  # type: ignore[arg-type]
    assert hash(gate) == hash(Gate(**asdict(gate)))


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("entropy", "mood")},
        {"mean": (0.0,)},
        {"scale": (1.0, 0.0)},
        {"scale": (1.0, math.nan)},
        {"weights": (1.0, math.inf)},
        {"bias": math.nan},
    ],
)
def test_a_damaged_gate_is_refused(change: dict[str, object]) -> None:
    good = {
        "names": ("entropy", "other"),
        "mean": (0.0, 0.0),
        "scale": (1.0, 1.0),
        "weights": (1.0, 1.0),
        "bias": 0.0,
    }
    Gate(**good)  # type: ignore[arg-type]
    with pytest.raises(PackError, match="gate"):
        Gate(**{**good, **change})  # type: ignore[arg-type]
