"""Settings that cannot be met are refused, with a hint; counts that do not exist yet are not numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from edge_runtime.errors import BoundaryError, EdgeError, UsageError
from edge_runtime.types import (
    Audit,
    EngineSettings,
    EngineStats,
    Mode,
    SamplingSettings,
    Signals,
    Step,
    Thresholds,
    check_boundaries,
)


@pytest.mark.parametrize("value", [-0.001, math.nan, -math.inf])
def test_a_threshold_bounds_uncertainty(value: float) -> None:
    with pytest.raises(UsageError, match="is no bound on uncertainty") as failure:
        Thresholds((1.0, value))
    assert "0 never exits" in failure.value.hint


def test_thresholds_may_be_never_and_always() -> None:
    assert Thresholds((0.0, 2.5, math.inf)).exit_below == (0.0, 2.5, math.inf)
    assert Thresholds(()).exit_below == ()


BAD: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.01},
    {"top_p": math.nan},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"min_p": math.nan},
    {"repeat_penalty": 0.0},
    {"repeat_penalty": -1.0},
    {"repeat_penalty": math.inf},
    {"repeat_penalty": math.nan},
    {"repeat_last_n": -1},
    {"seed": -1},
    {"seed": 2**32 - 1},  # which means a random seed to llama.cpp
    {"seed": 2**32},
]


@pytest.mark.parametrize("values", BAD, ids=str)
def test_sampling_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is out of range") as failure:
        SamplingSettings(**values)
    assert str(next(iter(values.values()))) in failure.value.message
    assert failure.value.hint.startswith("allowed: ")


def test_sampling_at_the_edges_of_its_range() -> None:
    SamplingSettings(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1e-3, repeat_last_n=0, seed=0)
    SamplingSettings(temperature=9.0, top_k=10**6, top_p=1e-6, min_p=1.0, repeat_penalty=9.0, seed=2**32 - 2)


@pytest.mark.parametrize("values", [{"cap": 0}, {"cap": -3}, {"audit_rate": -0.1}, {"audit_rate": 1.1}], ids=str)
def test_engine_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as failure:
        EngineSettings(**values)
    assert failure.value.hint


def test_an_audit_rate_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="audit rate nan"):
        EngineSettings(audit_rate=math.nan)


def test_modes_are_words() -> None:
    assert [mode.value for mode in Mode] == ["auto", "full", "exit", "verified", "margin"]
    assert Mode("exit") is Mode.EXIT
    assert [mode for mode in Mode if mode.verifies] == [Mode.VERIFIED, Mode.MARGIN]


@pytest.mark.parametrize("theta", [0.0, -1.0, 1.1, math.nan, math.inf])
def test_a_theta_that_is_no_ratio(theta: float) -> None:
    with pytest.raises(UsageError, match="theta") as failure:
        EngineSettings(Mode.MARGIN, theta=theta)
    assert failure.value.hint


# ── boundaries ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("boundaries", [(), (1,), (5,), (1, 2, 3, 4, 5)])
def test_boundaries_that_fit(boundaries: tuple[int, ...]) -> None:
    check_boundaries(boundaries, 6)


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        ((0,), "boundary 0 is outside this model's 6 layers"),
        ((6,), "boundary 6 is outside"),
        ((-1,), "boundary -1 is outside"),
        ((2, 7), "boundary 7 is outside"),
        ((2, 2), "boundary 2 is given twice"),
        ((3, 2), "boundaries are not in order: 2 comes after 3"),
    ],
)
def test_boundaries_that_do_not_fit(boundaries: tuple[int, ...], words: str) -> None:
    with pytest.raises(BoundaryError, match=words) as failure:
        check_boundaries(boundaries, 6)
    assert failure.value.hint == "give increasing layers from 1 to 5, for example --boundaries 3"


def test_a_model_of_one_layer_has_no_boundaries() -> None:
    check_boundaries((), 1)
    with pytest.raises(BoundaryError):
        check_boundaries((1,), 1)


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_counts_before_the_first_token_are_not_numbers() -> None:
    stats = EngineStats()
    assert math.isnan(stats.mean_depth)
    assert math.isnan(stats.acceptance)
    assert math.isnan(stats.disagreement)


def test_shares_and_means() -> None:
    stats = EngineStats(published=4, drafted=5, accepted=2, audited=8, disagreed=2, by_depth={2: 3, 6: 1})
    assert stats.mean_depth == 3.0
    assert stats.acceptance == 0.4
    assert stats.disagreement == 0.25


def test_stats_do_not_share_their_counts() -> None:
    one, other = EngineStats(), EngineStats()
    one.by_depth[3] = 1
    assert other.by_depth == {}


@pytest.mark.parametrize(
    "value", [Thresholds((1.0,)), Audit(1, 2, True), Step(1, 2, 3), Signals(0.0, 1.0, 1.0), SamplingSettings()]
)
def test_what_crosses_modules_cannot_be_changed(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))


def test_an_error_is_shown_with_its_hint() -> None:
    assert str(EdgeError("it failed", "do this")) == "it failed\nhint: do this"
    assert str(EdgeError("it failed")) == "it failed"
    assert (EdgeError.exit_code, UsageError.exit_code, BoundaryError.exit_code) == (1, 2, 2)
