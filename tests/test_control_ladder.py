"""The ladder of rungs, and targets checked against it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.control import BatteryPolicy, Ladder, Rung, Targets, check_targets, ladder_of
from edge_runtime.errors import UsageError
from edge_runtime.sensors.reading import Reading
from edge_runtime.types import Mode

FULL4 = Rung("full 4t", Mode.FULL, 100, 10)
FULL1 = Rung("full 1t", Mode.FULL, 300, 4)
DRAFTS = Rung("verified 4t", Mode.VERIFIED, 80, 10)
CAREFUL = Rung("exit 1%", Mode.EXIT, 70, 10, disagreement=0.01)
BOLD = Rung("exit 5%", Mode.EXIT, 50, 9, disagreement=0.05)


def ladder(*rungs: Rung) -> Ladder:
    return ladder_of(rungs or (FULL4, FULL1, DRAFTS, CAREFUL, BOLD))


def test_a_ladder_goes_from_most_power_and_quality_to_the_most_saving() -> None:
    assert [rung.name for rung in ladder(BOLD, FULL1, CAREFUL, FULL4).rungs] == [
        "full 4t",
        "exit 1%",
        "exit 5%",
        "full 1t",
    ]
    assert ladder().power_range_w == (4, 10)


def test_a_rung_that_another_beats_is_dropped_with_the_reason() -> None:
    slow = Rung("exit slow", Mode.EXIT, 90, 11, disagreement=0.02)
    found = ladder(FULL4, CAREFUL, slow)
    assert slow not in found.rungs
    (dropped,) = found.dropped
    assert dropped.rung is slow
    assert "'exit 1%' is faster (70 against 90 ms per token)" in dropped.reason
    assert "more saving (10 against 11 W)" in dropped.reason
    assert "nearer to full depth (0.01 against 0.02)" in dropped.reason


def test_of_equal_rungs_one_stays() -> None:
    same = dataclasses.replace(FULL4, name="again")
    found = ladder(FULL4, same)
    assert found.rungs == (FULL4,)
    assert "the same" in found.dropped[0].reason


def test_full_depth_is_not_dropped_for_drafts_whose_speed_depends_on_the_text() -> None:
    assert FULL4 in ladder(FULL4, DRAFTS).rungs
    slower = dataclasses.replace(FULL4, name="slower", time_per_token_ms=120)
    assert slower not in ladder(FULL4, slower).rungs


rungs = st.builds(
    lambda mode, ms, watts, bound, n: Rung(f"r{n}", mode, ms, watts, disagreement=bound * (mode is Mode.EXIT)),
    st.sampled_from((Mode.FULL, Mode.VERIFIED, Mode.EXIT)),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from((0.01, 0.02, 0.05)),
    st.integers(0, 10**9),
)


@given(st.lists(rungs, max_size=12, unique_by=lambda r: r.name))
def test_nothing_kept_is_beaten_and_everything_dropped_is(given_rungs: list[Rung]) -> None:
    found = ladder(FULL4, *given_rungs)
    assert {r.name for r in found.rungs} | {d.rung.name for d in found.dropped} == {
        r.name for r in (FULL4, *given_rungs)
    }

    def beats(one: Rung, other: Rung) -> bool:
        return all(
            getattr(one, name) <= getattr(other, name) for name in ("disagreement", "time_per_token_ms", "power_w")
        ) and (other.mode is not Mode.FULL or one.mode is Mode.FULL)

    assert not any(beats(one, other) for one in found.rungs for other in found.rungs if one is not other)
    assert all(any(beats(one, dropped.rung) for one in found.rungs) for dropped in found.dropped)
    assert any(rung.lossless for rung in found.rungs)


def test_a_ladder_needs_a_lossless_rung_and_names_that_differ() -> None:
    with pytest.raises(UsageError, match="no lossless rung"):
        ladder(CAREFUL, BOLD)
    with pytest.raises(UsageError, match="two rungs are named 'full 4t'"):
        ladder(FULL4, dataclasses.replace(FULL1, name="full 4t"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("time_per_token_ms", 0.0), ("time_per_token_ms", float("nan")), ("power_w", -1.0), ("rest", 1.0)],
)
def test_an_impossible_rung_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match="is out of range") as caught:
        dataclasses.replace(FULL4, **{field: value})
    assert caught.value.hint.startswith("allowed: ")


def test_exits_need_a_certificate_and_lossless_modes_have_none() -> None:
    with pytest.raises(UsageError, match="mode exit and a disagreement of"):
        Rung("exit", Mode.EXIT, 50, 9)
    with pytest.raises(UsageError, match="mode verified and a disagreement of"):
        Rung("drafts", Mode.VERIFIED, 50, 9, disagreement=0.02)


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_targets_that_can_be_held_have_no_findings() -> None:
    targets = Targets(latency_ms=75, power_cap_w=10, ceiling_c=80, max_disagreement=0.01)
    assert check_targets(targets, ladder(), Reading(0.0, power_w=5.0, temp_c=50.0)) == ()


def test_the_stricter_of_two_speeds_counts() -> None:
    assert Targets(latency_ms=100, tokens_per_second=20).time_per_token_ms == 50
    assert Targets(latency_ms=40, tokens_per_second=20).time_per_token_ms == 40
    assert Targets().time_per_token_ms is None


def test_an_impossible_latency_is_said_with_the_best_and_what_quality_forbids() -> None:
    (finding,) = check_targets(Targets(latency_ms=60, max_disagreement=0.01), ladder())
    assert (finding.kind, finding.quantity, finding.best) == ("impossible", "latency_ms", 70)
    assert "the best is 70 ms, by 'exit 1%'" in finding.text
    assert "quality beats speed, so 'exit 5%', 50 ms at a disagreement of 0.05, is not used" in finding.text


def test_an_impossible_power_cap_is_said_with_the_best() -> None:
    (finding,) = check_targets(Targets(power_cap_w=3), ladder())
    assert (finding.kind, finding.best) == ("impossible", 4)
    assert "the best is 4 W, by 'full 1t'" in finding.text


def test_speed_beats_power_where_they_exclude_each_other() -> None:
    (finding,) = check_targets(Targets(latency_ms=85, power_cap_w=5), ladder())
    assert (finding.kind, finding.best) == ("contradiction", 10)
    assert "speed beats power, so that it takes 10 W ('verified 4t')" in finding.text
    assert "within 5 W the best is 300 ms" in finding.text


def test_a_budget_below_all_certificates_leaves_the_lossless() -> None:
    (finding,) = check_targets(Targets(max_disagreement=0.005), ladder())
    assert finding.best == 0.01
    assert "the most careful exits are certified for 0.01; only lossless rungs are used" in finding.text
    (finding,) = check_targets(Targets(max_disagreement=0.02), ladder(FULL4))
    assert "no exits are certified at all" in finding.text


def test_targets_that_no_sensor_answers_for_are_said() -> None:
    targets = Targets(power_cap_w=10, ceiling_c=80, battery=BatteryPolicy())
    found = check_targets(targets, ladder(), Reading(0.0))
    assert [f.quantity for f in found] == ["temp_c", "power_w", "battery"]
    assert all(f.kind == "unknown" for f in found)


@pytest.mark.parametrize(
    "values",
    [
        {"latency_ms": 0.0},
        {"tokens_per_second": -1.0},
        {"power_cap_w": float("nan")},
        {"ceiling_c": float("inf")},
        {"max_disagreement": 1.0},
        {"max_disagreement": float("nan")},
    ],
)
def test_targets_that_mean_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Targets(**values)  # type: ignore[arg-type]
    assert caught.value.hint


def test_a_battery_policy_must_be_in_order() -> None:
    with pytest.raises(UsageError, match="critical below 50"):
        BatteryPolicy(save_below=30, critical_below=50)
    with pytest.raises(UsageError, match="no share of the power"):
        BatteryPolicy(save_share=0)
