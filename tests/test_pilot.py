"""The controller at the wheel: what it says is done, when it is time, and the text stays what it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest

from edge_runtime.control import AuditCounts, Controller, Event, Observation, Rung, SlowSettings, Targets
from edge_runtime.energy.model import PowerModel
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.thresholds import Rung as Certified
from edge_runtime.native import ContextOptions, Model
from edge_runtime.pilot import (
    Exits,
    Pilot,
    TokenTimes,
    certified_rungs,
    exits_of,
    measure_token_times,
    run_ladder,
    times_from_json,
    times_to_json,
)
from edge_runtime.sensors.reading import Reading
from edge_runtime.slices import Slice, open_slices
from edge_runtime.types import EngineStats, Mode

from .conftest import TinyMaker
from .exit_fakes import random_pack
from .fakes import FakeSlice

POWER = PowerModel(static_w=2.0, active_w_per_core=1.0, joule_per_gb=0.1)


# ── what a token takes ──────────────────────────────────────────────────────────────────────────────────────────────


class Stopwatch:
    """Slices of eight layers on a clock that only they move: a layer takes 12 ms, two threads halve it.

    A batch of k costs (1 + k) / 2 of one token. `slow` tells how many times longer a decode takes, by its number.
    """

    def __init__(self, *boundaries: int, slow: dict[int, float] | None = None) -> None:
        self.now_s, self.n_threads, self.n_decodes = 0.0, 0, 0
        self.slow = slow or {}
        edges = [0, *boundaries, 8]
        self.slices = [TimedSlice(self, a, b) for a, b in zip(edges, edges[1:], strict=False)]

    def measure(self, thread_counts: Sequence[int], batch: int = 0) -> tuple[dict[int, TokenTimes], bool]:
        found = measure_token_times(cast(list[Slice], self.slices), thread_counts, batch, lambda: self.now_s)
        assert all(piece.inputs == [] for piece in self.slices)
        return found


class TimedSlice(FakeSlice):
    def __init__(self, watch: Stopwatch, start: int, end: int) -> None:
        super().__init__(start, end, 8, n_batch=16, n_outputs_max=16, has_hidden=False)
        self.watch = watch

    def set_threads(self, n_threads: int) -> None:
        self.watch.n_threads = n_threads

    def synchronize(self) -> None:
        pass

    def _decode(self, rows: list[list[int]], first_pos: int, want: Sequence[int]) -> None:
        super()._decode(rows, first_pos, want)
        watch = self.watch
        watch.n_decodes += 1
        seconds = 0.012 * (self.end - self.start) * (1 + len(rows)) / 2 / watch.n_threads
        watch.now_s += seconds * watch.slow.get(watch.n_decodes, 1.0)


def test_a_tokens_time_with_each_number_of_threads() -> None:
    times, steady = Stopwatch().measure((1, 2))
    assert {n: t.full_ms for n, t in times.items()} == pytest.approx({1: 96.0, 2: 48.0})
    assert steady


@pytest.mark.parametrize("boundaries", [(6,), (2, 6), (1, 3, 6)])
def test_what_lies_before_the_last_boundary_and_a_batch_behind_it(boundaries: tuple[int, ...]) -> None:
    times, _ = Stopwatch(*boundaries).measure((1, 2), 4)
    assert times[1].full_ms == pytest.approx(96)
    assert times[1].early_ms == pytest.approx(72)
    assert (times[2].batch, times[2].late_ms) == (4, pytest.approx(12 * 2.5))


def test_the_first_token_and_a_slow_spell_do_not_count() -> None:
    times, steady = Stopwatch(slow={1: 50.0, 4: 9.0}).measure((1,))
    assert times[1].full_ms == pytest.approx(96)
    assert steady


def test_a_busy_machine_is_noticed() -> None:
    assert not Stopwatch(slow={4: 2.0, 6: 2.0}).measure((1,))[1]


def test_times_of_a_real_model(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama"))) as model:
        slices = open_slices(model, (1, 3), ContextOptions(n_ctx=32, n_batch=8, n_threads=1), n_outputs_max=4)
        times, _ = measure_token_times(slices, (1,), 4)
        assert all(t.early_ms > 0 and 0 < t.late_ms < math.inf for t in times.values())
        assert [piece.last_position() for piece in slices] == [-1, -1, -1]
        for piece in slices:
            piece.close()


def test_times_are_kept_as_they_are() -> None:
    plain = {1: TokenTimes(10.5), 2: TokenTimes(6.25)}
    parts = {1: TokenTimes(10.0, 7.0, 4, 8.0), 2: TokenTimes(6.0, 4.0, 4, 5.0)}
    assert times_from_json(json.loads(json.dumps(times_to_json(plain))), (1, 2)) == plain
    assert times_from_json(json.loads(json.dumps(times_to_json(parts))), (1, 2), 4) == parts


@pytest.mark.parametrize(
    ("rows", "batch"),
    [
        (None, 0),
        ([], 0),
        ([[1, 10.0]], 0),
        ([[1, 10.0], [3, 5.0]], 0),
        ([[1, 10.0], [2]], 0),
        ([[1, 10.0], [2, 0.0]], 0),
        ([[1, 10.0], [2, math.nan]], 0),
        ([[1, 10.0], [2, math.inf]], 0),
        ([[1, 10.0], [2, "5"]], 0),
        ([[1, 10.0], [2, True]], 0),
        ([[1, 10.0], []], 0),
        ([[1, 10.0], [2, 5.0]], 4),
        ([[1, 10.0, 7.0, 3, 8.0], [2, 5.0, 4.0, 3, 4.0]], 4),
    ],
    ids=str,
)
def test_times_that_are_none(rows: Any, batch: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        times_from_json(rows, (1, 2), batch)


# ── the ladder ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_ladder_has_threads_and_rests_that_pay() -> None:
    # three threads are no faster than two here, and take more power
    times = {1: TokenTimes(10.0), 2: TokenTimes(5.0), 3: TokenTimes(5.0)}
    ladder = run_ladder(times, POWER, gb_per_token=0.1, mode=Mode.VERIFIED)
    rungs = {rung.name: rung for rung in ladder.rungs}
    assert rungs["2 threads"].time_per_token_ms == 5.0
    assert rungs["2 threads"].power_w == pytest.approx(2 + 2 * 1 + 0.1 * 0.1 / 0.005)
    assert rungs["1 thread, resting 50%"].time_per_token_ms == 20.0
    assert rungs["1 thread, resting 50%"].power_w == pytest.approx(2 + (1 + 0.1 * 0.1 / 0.01) / 2)
    assert all(rung.n_threads < 3 for rung in ladder.rungs)
    assert all(rung.lossless and rung.mode is Mode.VERIFIED and not rung.thresholds for rung in ladder.rungs)


def certified(bound: float, thresholds: tuple[float, ...] = (0.1, 0.2), **changes: Any) -> Certified:
    certificate = {"kind": "disagreement of exits", "n": 900, "risk": 0.01, "holds": True}
    fields: dict[str, Any] = {"signal": "entropy", "risk": "exits", "delta": 0.05, "coverage": 0.5, **changes}
    fields["certificate"] = {**certificate, "holds": fields.pop("holds", True)}
    return Certified(bound=bound, thresholds=thresholds, **fields)


EXITS = Exits((certified(0.05),), n_boundaries=2, early_share=0.75, head_share=0.1, cap=3)
TIMES = {1: TokenTimes(10.0, 4.0, 4, 12.0), 2: TokenTimes(6.0, 2.0, 4, 7.0)}


def test_what_exits_take_by_their_coverage() -> None:
    # half of the tokens exit, and 1 + 1/2 + 1/4 + 1/8 settle together
    assert EXITS.tokens_per_settle(0.5) == 1.875
    assert EXITS.tokens_per_settle(1.0) == 4
    # the first layers, the heads, and a share of a batch that costs 6 for one token and 2 for each more
    assert EXITS.token_ms(TIMES[1], 0.5) == pytest.approx(4 + 1 + (6 + 0.875 * 2) / 1.875)
    assert EXITS.token_ms(TIMES[1], 0.0) == pytest.approx(10 + 1)
    alone = TokenTimes(10.0, 4.0, 1, 6.0)  # where a batch holds one token, exits save nothing
    assert EXITS.token_ms(alone, 0.5) == pytest.approx(10 + 1)


def test_each_certificate_is_a_rung_beside_full_depth() -> None:
    ladder = run_ladder(TIMES, POWER, gb_per_token=0.1, mode=Mode.EXIT, exits=EXITS)
    rungs = {rung.name: rung for rung in ladder.rungs}
    full, exiting = rungs["1 thread"], rungs["1 thread, exits certified for 0.05"]
    assert (full.mode, full.disagreement, full.thresholds) == (Mode.FULL, 0.0, (0.0, 0.0))
    assert (exiting.mode, exiting.disagreement, exiting.thresholds) == (Mode.EXIT, 0.05, (0.1, 0.2))
    ms = EXITS.token_ms(TIMES[1], 0.5)
    assert exiting.time_per_token_ms == ms
    # of the last quarter of the weights, 1 in 1.875 tokens reads anything
    assert exiting.power_w == pytest.approx(2 + 1 + 0.1 * 0.1 * (0.75 + 0.25 / 1.875) / (ms / 1e3))
    resting = rungs["1 thread, exits certified for 0.05, resting 75%"]
    assert (resting.thresholds, resting.rest, resting.n_threads) == ((0.1, 0.2), 0.75, 1)
    assert resting.time_per_token_ms == pytest.approx(4 * ms)


def test_exits_that_are_slower_but_save_power_are_rungs() -> None:
    dear = Exits((certified(0.05),), 2, early_share=0.75, head_share=0.5, cap=3)
    ladder = run_ladder({1: TIMES[1]}, POWER, 0.1, Mode.EXIT, dear)
    slow = ladder.named("1 thread, exits certified for 0.05")
    assert slow is not None
    assert slow.time_per_token_ms > 10
    assert slow.power_w < next(r for r in ladder.rungs if r.name == "1 thread").power_w


def test_without_certificates_there_is_full_depth_alone() -> None:
    none = Exits((), 2, early_share=0.75, head_share=0.1, cap=3)
    ladder = run_ladder(TIMES, POWER, 0.1, Mode.EXIT, none)
    assert {rung.thresholds for rung in ladder.rungs} == {(0.0, 0.0)}


@pytest.fixture(scope="module")
def pack(tiny_path: TinyMaker) -> ExitPack:
    rungs = (
        certified(0.01, holds=False),
        certified(0.02, risk="tokens", coverage=0.4),
        certified(0.02, risk="prompts", thresholds=(0.3, 0.3)),
        certified(0.02, method="crc", delta=1.0, thresholds=(9.0, 9.0)),
        certified(0.02, risk="acceptance", thresholds=(8.0, 8.0)),
        certified(0.05, thresholds=(0.5, 0.6)),
        certified(0.05, risk="tokens", thresholds=(7.0, 7.0)),
        certified(0.03, signal="margin", thresholds=(0.9, 0.9)),
        certified(0.1, risk="acceptance", thresholds=(6.0, 6.0)),
        certified(0.2, thresholds=(2.0, 2.0)),
    )
    return random_pack(
        tiny_path("llama", tokenizer=True), (2, 4), rungs=rungs, report={"costs": {"head_share": {"2": 0.25}}}
    )


def test_certified_thresholds_are_those_that_a_plain_run_would_use(pack: ExitPack) -> None:
    found = certified_rungs(pack, "entropy", 0.1)
    assert [(rung.bound, rung.risk, rung.thresholds) for rung in found] == [
        (0.02, "prompts", (0.3, 0.3)),
        (0.05, "exits", (0.5, 0.6)),
    ]
    assert [rung.bound for rung in certified_rungs(pack, "margin", 0.1)] == [0.03]
    assert certified_rungs(pack, "entropy", 0.0) == ()
    assert certified_rungs(pack, "gate", 0.5) == ()


def test_what_the_heads_take_is_from_the_pack_or_guessed(pack: ExitPack) -> None:
    exits = exits_of(pack, "entropy", 0.05, n_layer=8, cap=5)
    assert (exits.n_boundaries, exits.early_share, exits.cap) == (2, 0.5, 5)
    assert exits.head_share == 0.25 + 1 / 8


# ── between tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


class FakeController:
    """Says one rung after the other, and keeps what it was told."""

    def __init__(self, *rungs: Rung, rates: Sequence[float] = (1.0,)) -> None:
        self.told: list[Observation] = []
        self.counts: list[AuditCounts] = []
        self._rungs, self._rates = list(rungs), list(rates)

    def observe(self, observation: Observation, counts: AuditCounts) -> Any:
        self.told.append(observation)
        self.counts.append(counts)
        rung, rate = (said.pop(0) if len(said) > 1 else said[0] for said in (self._rungs, self._rates))
        return type("Decision", (), {"rung": rung, "audit_rate": rate})()


class FakeControls:
    """An engine of which a test says what it counts."""

    def __init__(self) -> None:
        self.engine, self.stats = object(), EngineStats()
        self.threads: list[int] = []
        self.thresholds: list[tuple[float, ...]] = []
        self.rates: list[float] = []

    def set_threads(self, n_threads: int) -> None:
        self.threads.append(n_threads)

    def set_thresholds(self, exit_below: tuple[float, ...]) -> None:
        self.thresholds.append(exit_below)

    def set_audit_rate(self, rate: float) -> None:
        self.rates.append(rate)


class Wheel:
    """A pilot with a clock that only tokens and rests move."""

    def __init__(self, *rungs: Rung, reading: Reading | None = None, controller: Any = None, **options: Any) -> None:
        self.now_s = 100.0
        self.rests: list[float] = []
        self.controller = controller or FakeController(*rungs, **options)
        self.controls = FakeControls()
        self.pilot = Pilot(self.controller, self.controls, lambda: reading, lambda: self.now_s, self._rest)

    def _rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now_s += seconds

    def tokens(self, n: int, seconds: float, *, exits: int = 0, audited: int = 0, disagreed: int = 0) -> None:
        """`n` tokens; what is told of the audits is of the last one."""
        for i in range(n):
            self.now_s += seconds
            stats = self.controls.stats
            stats.published += 1
            stats.exits += i < exits
            if i == n - 1:
                stats.audited += audited
                stats.disagreed += disagreed
            self.pilot.token()


FULL = Rung("2 threads", Mode.FULL, 100.0, 9.0, n_threads=2)
RESTING = Rung("1 thread, resting 75%", Mode.FULL, 400.0, 4.0, n_threads=1, rest=0.75)


def test_decisions_are_made_each_half_second_with_the_time_per_token() -> None:
    reading = Reading(99.0, temp_c=50.0)
    wheel = Wheel(FULL, reading=reading)
    wheel.pilot.begin()
    wheel.tokens(1, 7.0)  # a long prompt, which is no token's time
    wheel.tokens(6, 0.125)
    told = [(o.time_s, o.reading, o.time_per_token_ms) for o in wheel.controller.told]
    assert told == [(100.0, reading, None), (107.5, reading, 125.0)]
    wheel.tokens(1, 0.75)  # with the two that came since
    assert wheel.controller.told[-1].time_per_token_ms == pytest.approx(1000 / 3)


def test_threads_are_set_when_the_rung_changes_and_not_otherwise() -> None:
    wheel = Wheel(FULL, FULL, RESTING, RESTING)
    wheel.pilot.begin()
    wheel.tokens(9, 0.5)
    assert wheel.controls.threads == [2, 1]


def test_a_rest_is_its_share_of_the_time_and_counts_as_time_per_token() -> None:
    wheel = Wheel(RESTING)
    wheel.pilot.begin()
    wheel.tokens(1, 5.0)
    assert wheel.rests == []  # nobody rests for the prompt
    wheel.tokens(2, 0.0625)
    assert wheel.rests == [0.1875, 0.1875]
    assert wheel.controller.told[-1].time_per_token_ms == 250.0


def test_without_a_reading_nothing_is_known() -> None:
    wheel = Wheel(FULL)
    wheel.pilot.begin()
    assert wheel.controller.told == [Observation(100.0, Reading(100.0))]


EXITING = Rung("exits", Mode.EXIT, 70.0, 9.0, n_threads=2, disagreement=0.02, thresholds=(0.5, 0.7))
CLOSED = Rung("closed", Mode.FULL, 100.0, 9.0, n_threads=2, thresholds=(0.0, 0.0))


def test_thresholds_are_set_with_their_rung_and_left_alone_without() -> None:
    wheel = Wheel(EXITING, EXITING, CLOSED, FULL)
    wheel.pilot.begin()
    wheel.tokens(9, 0.5)
    assert wheel.controls.thresholds == [(0.5, 0.7), (0.0, 0.0)]


def test_the_audit_rate_is_set_when_it_changes() -> None:
    wheel = Wheel(EXITING, rates=(1.0, 1.0, 0.25, 0.25, 1.0))
    wheel.pilot.begin()
    wheel.tokens(9, 0.5)
    assert wheel.controls.rates == [1.0, 0.25, 1.0]


def test_another_engine_is_told_all_again() -> None:
    wheel = Wheel(EXITING, rates=(0.25,))
    wheel.pilot.begin()
    wheel.tokens(3, 0.0625)
    wheel.controls.engine = object()
    wheel.tokens(3, 0.0625)
    assert wheel.controls.threads == [2, 2]
    assert wheel.controls.thresholds == [(0.5, 0.7)] * 2
    assert wheel.controls.rates == [0.25] * 2


def test_what_was_counted_goes_to_the_next_decision_with_the_rate_in_force() -> None:
    wheel = Wheel(EXITING, rates=(1.0, 0.25))
    wheel.controls.stats.published = 7
    wheel.pilot = Pilot(wheel.controller, wheel.controls, lambda: None, lambda: wheel.now_s, wheel._rest)
    wheel.pilot.begin()
    wheel.tokens(1, 3.0)
    wheel.tokens(4, 0.125, exits=3, audited=2)
    wheel.tokens(4, 0.125, exits=4)
    assert wheel.controller.counts == [AuditCounts(), AuditCounts(5, 3, 2, 0, 1.0), AuditCounts(4, 4, 0, 0, 0.25)]


def test_confirmed_drafts_are_no_exits() -> None:
    wheel = Wheel(FULL)
    wheel.pilot.begin()
    wheel.tokens(5, 0.125, exits=5)
    assert wheel.controller.counts[-1] == AuditCounts(5)


def test_counts_that_begin_anew_are_counted_anew() -> None:
    wheel = Wheel(EXITING)
    wheel.pilot.begin()
    wheel.tokens(3, 0.125, exits=3)
    wheel.controls.stats = EngineStats()
    wheel.tokens(2, 0.125, exits=1)
    assert wheel.controller.counts[-1] == AuditCounts(2, 1)


@pytest.mark.parametrize("n_before", [0, 2])
def test_a_disagreement_is_told_at_once(n_before: int) -> None:
    """With the first token, too, with which audits of an answer before may come."""
    wheel = Wheel(EXITING, CLOSED)
    wheel.pilot.begin()
    wheel.tokens(n_before, 0.0625)
    wheel.tokens(1, 0.0625, audited=3, disagreed=1)
    assert wheel.controller.counts[-1].disagreed == 1
    assert wheel.controls.thresholds[-1] == CLOSED.thresholds
    wheel.tokens(2, 0.0625)
    assert len(wheel.controller.counts) == 2  # the same news is not told twice


# ── with the controller itself ──────────────────────────────────────────────────────────────────────────────────────


def steered(budget: float, events: list[Event] | None = None) -> Wheel:
    """Targets that full depth cannot meet, on the ladder of a run with exits certified for 2%."""
    exits = Exits((certified(0.02),), 2, early_share=0.5, head_share=0.05, cap=8)
    ladder = run_ladder({2: TokenTimes(100.0, 50.0, 4, 60.0)}, POWER, 0.1, Mode.EXIT, exits)
    hear = None if events is None else events.append
    wheel = Wheel(controller=Controller(Targets(latency_ms=85.0, max_disagreement=budget), ladder, hear))
    wheel.pilot.begin()
    wheel.tokens(1, 1.0)
    return wheel


def good_text(wheel: Wheel, n: int) -> None:
    for _ in range(n):
        wheel.tokens(4, 0.08, exits=2, audited=2)


def test_exits_close_with_the_very_token_that_shows_too_many_disagreements() -> None:
    events: list[Event] = []
    wheel = steered(0.02, events)
    assert wheel.controls.thresholds == [(0.1, 0.2)]
    good_text(wheel, 100)
    for _ in range(20):
        if len(wheel.controls.thresholds) > 1:
            break
        wheel.tokens(3, 0.08, exits=2, audited=2, disagreed=2)
    assert wheel.controls.thresholds == [(0.1, 0.2), (0.0, 0.0)]
    closing = [event for event in events if event.is_change][-1]
    assert (closing.old, closing.new) == ("2 threads, exits certified for 0.02", "2 threads")
    assert closing.kind == "quality"
    assert "disagree" in closing.reason
    assert closing.time_s == wheel.now_s  # with the token itself, not at the next half second
    wheel.tokens(50, 0.1)
    assert len(wheel.controls.thresholds) == 2


def test_closing_exits_takes_no_more_speed_than_it_must() -> None:
    """Though the power of other exits lies between that of those that ran and that of full depth."""
    both = (certified(0.01, (0.01, 0.02), coverage=0.1), certified(0.02))
    exits = Exits(both, 2, early_share=0.2, head_share=0.05, cap=8)
    ladder = run_ladder({2: TokenTimes(100.0, 50.0, 4, 60.0)}, POWER, 0.1, Mode.EXIT, exits)
    watts = {rung.name: rung.power_w for rung in ladder.rungs}
    careful, bold = (watts[f"2 threads, exits certified for {rung.bound:g}"] for rung in both)
    assert bold < careful < watts["2 threads"]
    wheel = Wheel(controller=Controller(Targets(latency_ms=1.0, max_disagreement=0.02), ladder))
    wheel.pilot.begin()
    wheel.tokens(1, 1.0)
    assert wheel.controls.thresholds == [(0.1, 0.2)]
    wheel.tokens(9, 0.08, exits=8, audited=8, disagreed=8)
    assert wheel.controls.thresholds[-1] == (0.0, 0.0)
    assert wheel.controls.threads[-1] == 2
    wheel.tokens(1, 0.1)
    assert wheel.rests == []


def test_the_audit_rate_follows_what_is_known() -> None:
    wheel = steered(0.02)
    assert wheel.controls.rates == [1.0]
    good_text(wheel, 60)
    assert wheel.controls.rates == [1.0, SlowSettings().audit_rate]
    wheel.tokens(1, 0.08, audited=1, disagreed=1)  # one is no alarm, and four times as many must be expected
    assert len(wheel.controls.thresholds) == 1
    assert wheel.controls.rates[-1] == 1.0


def test_without_a_budget_no_token_may_exit_whatever_is_asked() -> None:
    wheel = steered(0.0)
    wheel.tokens(100, 0.1)
    assert wheel.controls.thresholds == [(0.0, 0.0)]


# ── between batches of several conversations ────────────────────────────────────────────────────────────────────────


def batches(wheel: Wheel, n: int, seconds: float, count: float) -> None:
    for _ in range(n):
        wheel.now_s += seconds
        wheel.pilot.batch(seconds, count)


def test_each_batch_is_rested_for_by_its_own_time() -> None:
    wheel = Wheel(RESTING)
    wheel.pilot.begin()
    wheel.now_s += 1000.0  # nobody asked for anything
    batches(wheel, 1, 0.1, 0)  # a prompt's
    batches(wheel, 1, 0.02, 1)
    assert wheel.rests == [pytest.approx(0.3), pytest.approx(0.06)]


def test_prompts_say_nothing_of_the_time_per_token() -> None:
    wheel = Wheel(FULL)
    wheel.pilot.begin()
    batches(wheel, 3, 0.1, 0)
    batches(wheel, 2, 0.125, 2.5)
    told = [(o.time_s, o.time_per_token_ms) for o in wheel.controller.told]
    assert told == [(100.0, None), (pytest.approx(100.55), pytest.approx(50.0))]
    batches(wheel, 6, 0.1, 0)
    assert wheel.controller.told[-1].time_per_token_ms is None


# ── who reads the tokens ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_that_takes_its_time_is_not_rested_for() -> None:
    wheel = Wheel(RESTING)
    wheel.pilot.begin()
    wheel.tokens(1, 0.1)
    wheel.now_s += 10.0
    wheel.pilot.resume(10.0)
    wheel.tokens(1, 0.1)
    assert wheel.rests == [pytest.approx(0.3)]
    assert len(wheel.controller.told) == 1


def test_another_engine_hears_of_the_rung_before_the_prompt() -> None:
    wheel = Wheel(RESTING)
    wheel.pilot.begin()
    wheel.controls.engine = object()
    wheel.pilot.begin()
    assert wheel.controls.threads == [1, 1]
    assert len(wheel.controls.rates) == 2
