"""The fast loop: which rung for which readings, when it changes, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.control import BatteryPolicy, Decision, Event, FastSettings, FastState, Observation, Rung, Targets
from edge_runtime.control.choose import Limits, choose
from edge_runtime.control.fast import step
from edge_runtime.control.heat import HeatSettings, allowance
from edge_runtime.control.ladder import ladder_of
from edge_runtime.control.speed import Pace, keep_pace
from edge_runtime.control.trend import Trend, follow
from edge_runtime.sensors.reading import Battery, Reading
from edge_runtime.types import Mode

FULL4, FULL2, FULL1 = (Rung(f"full {n}t", Mode.FULL, ms, w, n) for n, ms, w in ((4, 100, 10), (2, 160, 7), (1, 300, 5)))
EXIT4, EXIT2 = (Rung(f"exit {n}t", Mode.EXIT, ms, w, n, disagreement=0.02) for n, ms, w in ((4, 70, 10), (2, 110, 7)))
LADDER = ladder_of((FULL4, FULL2, FULL1, EXIT4, EXIT2))


class Bench:
    """Steps the loop twice a second; what readings say is a function of the rung that runs."""

    def __init__(self, targets: Targets, settings: FastSettings | None = None) -> None:
        self.targets, self.settings = targets, settings
        self.state, self.decision = FastState(), Decision(FULL4)
        self.time_s = 0.0
        self.events: list[Event] = []
        self.allowed: float | None = None

    def run(
        self,
        seconds: float,
        temp_c: Callable[[float], float | None] = lambda _s: 50.0,
        power_w: Callable[[Rung], float | None] = lambda rung: rung.power_w,
        ms: Callable[[Rung], float | None] = lambda rung: rung.time_per_token_ms,
        **more: object,
    ) -> str:
        """The rung after so many seconds; `temp_c` is told how many of them have passed."""
        for i in range(round(seconds * 2)):
            rung = self.decision.rung
            reading = Reading(self.time_s, temp_c=temp_c(i / 2), power_w=power_w(rung), **more)  # type: ignore[arg-type]
            self.state, self.decision = step(
                self.state,
                Observation(self.time_s, reading, ms(rung)),
                self.targets,
                LADDER,
                self.settings,
                self.allowed,
            )
            self.events += self.decision.events
            self.time_s += 0.5
        return self.decision.rung.name

    @property
    def changes(self) -> list[Event]:
        return [event for event in self.events if event.is_change]


# ── choosing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen(current: Rung | None, limits: Limits) -> tuple[str, str, tuple[str, ...]]:
    found = choose(LADDER.rungs, current, limits, lambda rung: rung.time_per_token_ms)
    return found.rung.name, found.kind, found.missed


def test_without_limits_the_fastest_lossless_rung_runs() -> None:
    assert chosen(None, Limits())[0] == "full 4t"
    # disagreement that is allowed is not used where nothing asks for speed
    assert chosen(None, Limits(disagreement=0.02))[0] == "full 4t"


def test_a_latency_is_held_with_the_least_power_and_disagreement() -> None:
    assert chosen(None, Limits(0.02, time_ms=400))[0] == "full 1t"
    assert chosen(None, Limits(0.02, time_ms=180))[0] == "full 2t"
    assert chosen(None, Limits(0.02, time_ms=80))[0] == "exit 4t"


def test_quality_beats_speed_beats_power() -> None:
    assert chosen(None, Limits(0.0, time_ms=80)) == ("full 4t", "quality", ("speed",))
    assert chosen(FULL1, Limits(0.0, time_ms=110, power_w=6)) == ("full 4t", "speed", ("power",))
    assert chosen(EXIT4, Limits(0.0, time_ms=80))[:2] == ("full 4t", "quality")


def test_heat_beats_speed() -> None:
    assert chosen(FULL4, Limits(0.02, heat_w=8, time_ms=80)) == ("exit 2t", "heat", ("speed",))


def test_the_present_rung_stays_where_another_would_not_come() -> None:
    for power_w, current, expected in ((9.8, FULL4, "full 4t"), (10.3, FULL2, "full 2t"), (10.6, FULL2, "full 4t")):
        assert chosen(current, Limits(power_w=power_w))[0] == expected


@given(
    st.sampled_from((None, *LADDER.rungs)),
    st.sampled_from((0.0, 0.02)),
    *(st.none() | st.floats(0, 400, allow_nan=False) for _ in range(3)),
)
def test_the_allowed_disagreement_is_never_passed(
    current: Rung | None, allowed: float, heat_w: float | None, time_ms: float | None, power_w: float | None
) -> None:
    found = choose(LADDER.rungs, current, Limits(allowed, heat_w, time_ms, power_w), lambda r: r.time_per_token_ms)
    assert found.rung.disagreement <= allowed
    assert found.rung in LADDER.rungs


# ── power ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_cap_is_held_by_the_measured_power_not_the_predicted() -> None:
    bench = Bench(Targets(power_cap_w=7.5))
    assert bench.run(30) == "full 2t"
    # other programs now take 2 W
    assert bench.run(30, power_w=lambda rung: rung.power_w + 2) == "full 1t"
    assert bench.changes[-1].kind == "power"
    assert "cap 7.5 W" in bench.changes[-1].reason
    assert bench.run(60) == "full 2t"
    assert "room for more speed" in bench.changes[-1].reason


def test_an_idle_machine_teaches_nothing_about_the_rung() -> None:
    bench = Bench(Targets(power_cap_w=7.5))
    bench.run(60, power_w=lambda _rung: 2.0, ms=lambda _rung: None)
    assert bench.state.power_off_w == 0
    bench.run(60, power_w=lambda _rung: 2.0, throttled_now=frozenset({"throttled"}))
    assert bench.state.power_off_w == 0


def test_a_sensor_that_still_shows_the_last_rung_is_not_believed() -> None:
    bench = Bench(Targets(power_cap_w=7.5))
    bench.run(1.5, power_w=lambda _rung: 30.0)
    assert bench.state.power_off_w == 0
    bench.run(2, power_w=lambda _rung: 30.0)
    assert bench.state.power_off_w > 5


def test_without_a_power_reading_the_rung_is_held_and_then_chosen_by_predictions_with_some_to_spare() -> None:
    bench = Bench(Targets(power_cap_w=7.5))
    bench.run(30)
    assert bench.run(9, power_w=lambda _rung: None) == "full 2t"
    assert not [event for event in bench.events if event.kind == "sensor"]
    # 85% of the cap is below the 7 W of two threads
    assert bench.run(10, power_w=lambda _rung: None) == "full 1t"
    assert bench.changes[-1].kind == "sensor"
    assert "by predictions, at 85% of the cap" in bench.changes[-1].reason
    assert bench.run(60) == "full 2t"


def test_power_that_is_not_known_is_never_thought_less_than_predicted() -> None:
    bench = Bench(Targets(power_cap_w=10.5))
    bench.run(30, power_w=lambda rung: rung.power_w - 3)
    assert bench.decision.rung.name == "full 4t"
    assert bench.run(20, power_w=lambda _rung: None) == "full 2t"  # 85% of the cap are 8.9 W
    bench = Bench(Targets(power_cap_w=12.5))
    bench.run(30, power_w=lambda rung: rung.power_w + 2)
    assert bench.decision.rung.name == "full 4t"
    assert bench.run(20, power_w=lambda _rung: None) == "full 2t"  # 85% are 10.6 W, and others took 2 of them


def test_while_a_reading_is_missing_nothing_takes_more_power() -> None:
    bench = Bench(Targets(power_cap_w=7.5, ceiling_c=80), FastSettings(hold_s=1e9))
    bench.run(30, power_w=lambda rung: rung.power_w + 2)
    assert bench.decision.rung.name == "full 1t"
    bench.run(3, power_w=lambda _rung: None)
    bench.targets = Targets(power_cap_w=20, ceiling_c=80)
    assert bench.run(60, power_w=lambda _rung: None) == "full 1t"
    assert bench.run(60) == "full 4t"
    bench = Bench(Targets(power_cap_w=5, ceiling_c=80), FastSettings(hold_s=1e9))
    bench.run(30)
    bench.run(3, temp_c=lambda _s: None)
    bench.targets = Targets(ceiling_c=80)
    assert bench.run(60, temp_c=lambda _s: None) == "full 1t"
    assert bench.run(60) == "full 4t"


def test_a_contradiction_at_run_time_is_said_once_a_minute() -> None:
    bench = Bench(Targets(latency_ms=110, power_cap_w=6))
    assert bench.run(90) == "full 4t"
    told = [event for event in bench.events if event.kind == "power"]
    assert [event.is_change for event in told] == [False, False]
    assert "as the speed comes first: 10 W are needed" in told[0].reason


# ── heat ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_ceiling_is_seen_coming() -> None:
    bench = Bench(Targets(ceiling_c=80))
    bench.run(40, temp_c=lambda s: 60 + 0.4 * s)
    first = next(event for event in bench.changes if event.kind == "heat")
    assert dict(first.numbers)["temp_c"] < 76
    assert dict(first.numbers)["temp_c_per_s"] == pytest.approx(0.4, abs=0.05)
    assert "ceiling 80 °C" in first.reason


def test_above_the_ceiling_it_goes_down_to_the_most_saving_rung_and_says_when_that_is_not_enough() -> None:
    bench = Bench(Targets(ceiling_c=80))
    assert bench.run(60, temp_c=lambda _s: 85.0) == "full 1t"
    assert any("above the ceiling of 80 °C on the most saving rung" in event.reason for event in bench.events)


def test_the_hardware_that_slows_itself_down_is_too_warm_whatever_it_says() -> None:
    bench = Bench(Targets(ceiling_c=80))
    bench.run(30, throttled_now=frozenset({"throttled"}))
    assert bench.changes[1].kind == "heat"
    assert any("the hardware slows itself down: throttled" in event.reason for event in bench.events)


def test_time_in_the_cold_does_not_delay_the_answer_to_heat() -> None:
    """Anti-windup: an hour of cold leaves the integral where ten seconds do."""
    trend = Trend(20.0, 0.0, 0.0)
    short = long = None
    for _ in range(20):
        short, _ = allowance(short, trend, 80, LADDER, 0.5, HeatSettings())
    for _ in range(7200):
        long, _ = allowance(long, trend, 80, LADDER, 0.5, HeatSettings())
    assert short == long
    low = None
    for _ in range(7200):
        low, allowed = allowance(low, Trend(120.0, 0.0, 0.0), 80, LADDER, 0.5, HeatSettings())
    assert low == allowed == pytest.approx(LADDER.power_range_w[0], rel=0.06)


def test_without_a_temperature_the_rung_is_held_and_then_the_most_saving_one_runs() -> None:
    bench = Bench(Targets(ceiling_c=80))
    bench.run(30)
    assert bench.run(9.5, temp_c=lambda _s: None) == "full 4t"
    assert bench.run(3, temp_c=lambda _s: math.nan) == "full 1t"
    assert bench.changes[-1].kind == "sensor"
    assert "no temperature for 10 s: the most saving rung, to be safe" in bench.changes[-1].reason
    assert bench.run(90) == "full 4t"  # it is back


def test_a_reading_that_never_changes_its_time_is_no_reading() -> None:
    state, decision = FastState(), Decision(FULL4)
    for i in range(60):
        stale = Reading(min(i, 10) / 2, temp_c=50.0)
        state, decision = step(state, Observation(i / 2, stale, 100.0), Targets(ceiling_c=80), LADDER)
    assert decision.rung is FULL1


def test_power_comes_back_one_level_at_a_time() -> None:
    bench = Bench(Targets(ceiling_c=80))
    bench.run(60, temp_c=lambda _s: 85.0)
    bench.events.clear()
    bench.run(300, temp_c=lambda _s: 40.0)
    assert [event.new for event in bench.changes] == ["full 2t", "full 4t"]


def test_a_step_up_that_proved_wrong_waits_longer_unless_it_became_cooler() -> None:
    def times_to_rise(temp_c: float) -> float:
        bench = Bench(Targets(ceiling_c=80))
        bench.run(60, temp_c=lambda _s: 85.0)
        bench.run(40, temp_c=lambda _s: 60.0)
        assert bench.decision.rung.name == "full 4t"
        bench.run(30, temp_c=lambda _s: 85.0)
        assert bench.decision.rung.name == "full 1t"
        assert bench.state.wrong_w == 10
        bench.events.clear()
        bench.run(200, temp_c=lambda _s: temp_c)
        # two threads were not wrong, and may come back soon
        assert [event.new for event in bench.changes] == ["full 2t", "full 4t"]
        return bench.changes[1].time_s - bench.changes[0].time_s

    assert times_to_rise(60.0) >= 30
    assert times_to_rise(40.0) == 15


def test_no_news_of_the_temperature_is_not_integrated() -> None:
    bench = Bench(Targets(ceiling_c=80), FastSettings(hold_s=1e9))
    bench.run(30, temp_c=lambda _s: 79.5)
    before = bench.state.heat_w
    bench.run(30, temp_c=lambda _s: None)
    assert bench.state.heat_w == before


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_machine_that_became_slow_goes_up_the_ladder() -> None:
    bench = Bench(Targets(latency_ms=180))
    assert bench.run(20) == "full 2t"
    assert bench.run(60, ms=lambda rung: rung.time_per_token_ms * 1.5) == "full 4t"
    assert bench.changes[-1].kind == "speed"
    assert "180 asked" in bench.changes[-1].reason


def test_what_one_rung_teaches_holds_mostly_for_all() -> None:
    pace = Pace()
    for _ in range(100):
        pace = keep_pace(pace, FULL4, 200.0, 0.5)
    assert pace.time_ms(FULL4) == pytest.approx(200, rel=0.01)
    assert 220 < pace.time_ms(FULL2) < 300  # predicted 160
    for _ in range(100):
        pace = keep_pace(pace, FULL4, None, 5.0)
    assert pace.time_ms(FULL4) == pytest.approx(200, rel=0.01)


# ── battery ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_low_battery_saves_and_a_critical_one_saves_all_it_can() -> None:
    bench = Bench(Targets(battery=BatteryPolicy(30, 10, 0.75), latency_ms=110))
    assert bench.run(20, battery=Battery(50, False)) == "full 4t"
    # the speed comes first
    assert bench.run(20, battery=Battery(29, False)) == "full 4t"
    assert bench.run(20, battery=Battery(9, False)) == "full 1t"
    assert "the battery is critical" in bench.changes[-1].reason
    assert bench.run(60, battery=Battery(9, True)) == "full 4t"
    bench = Bench(Targets(battery=BatteryPolicy(30, 10, 0.75)))
    bench.run(20, battery=Battery(29, False))
    assert bench.decision.rung.name == "full 2t"
    assert bench.run(90, battery=Battery(31, False)) == "full 2t"  # hysteresis
    assert bench.run(90, battery=Battery(33, False)) == "full 4t"


# ── changes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whatever_the_readings_do_a_rung_stays_five_seconds() -> None:
    bench = Bench(Targets(ceiling_c=80, power_cap_w=8, latency_ms=120, max_disagreement=0.02))
    for i in range(60):
        wild = (20.0, 95.0, 60.0)[i % 3]
        bench.run(7, temp_c=lambda _s, t=wild: t, power_w=lambda rung, w=wild: rung.power_w + w / 40)  # type: ignore[misc]
    times = [event.time_s for event in bench.changes]
    assert len(times) > 3
    assert min(b - a for a, b in zip(times, times[1:], strict=False)) >= 5
    # each step up that proves wrong makes the next one wait longer
    assert bench.state.patience_s is not None
    assert bench.state.patience_s > 15


def test_quality_waits_for_nothing() -> None:
    bench = Bench(Targets(latency_ms=80, max_disagreement=0.02))
    bench.run(1)
    assert bench.decision.rung is EXIT4
    bench.allowed = 0.0
    bench.run(0.5)
    assert bench.decision.rung is FULL4
    assert bench.changes[-1].kind == "quality"


def test_a_ladder_that_lost_the_rung_is_started_anew() -> None:
    state, _ = step(FastState(), Observation(0.0, Reading(0.0), 100.0), Targets(), LADDER)
    other = ladder_of((replace(FULL4, name="plain"),))
    state, decision = step(state, Observation(0.5, Reading(0.5), 100.0), Targets(), other)
    assert (decision.events[0].old, decision.events[0].new) == ("full 4t", "plain")


numbers = st.none() | st.floats() | st.integers(-(10**6), 10**6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers, numbers, st.booleans()), min_size=1, max_size=30), st.sampled_from((0.0, 0.02))
)
def test_no_reading_however_wild_is_too_much(
    readings: list[tuple[float | None, float | None, float | None, bool]], allowed: float
) -> None:
    targets = Targets(latency_ms=90, power_cap_w=8, ceiling_c=80, max_disagreement=0.02, battery=BatteryPolicy())
    state = FastState()
    for i, (temp_c, power_w, ms, throttled) in enumerate(readings):
        reading = Reading(
            float(i), temp_c=temp_c, power_w=power_w, throttled_now=frozenset({"x"}) if throttled else None
        )
        state, decision = step(state, Observation(float(i), reading, ms), targets, LADDER, allowed=allowed)
        assert decision.rung.disagreement <= allowed
        for event in decision.events:
            event.json_line()
    assert math.isfinite(state.power_off_w)
    assert state.temp is None or math.isfinite(state.temp.level)


def test_a_trend_follows_level_and_rate_through_noise() -> None:
    trend = None
    for i in range(200):
        trend = follow(trend, 40 + 0.1 * i / 2 + (0.5 if i % 2 else -0.5), i / 2)
    assert trend is not None
    assert trend.level == pytest.approx(50, abs=0.4)
    assert trend.slope == pytest.approx(0.1, abs=0.03)
    assert follow(trend, 20.0, trend.time_s + 120).slope == 0  # after a long gap, anew
