"""The slow loop: evidence that may be looked at any time, and the account of disagreeing tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.control.betting import Evidence, add_audits
from edge_runtime.control.slow import AuditCounts, SlowSettings, SlowState, Verdict, watch

BUDGET = 0.02


def highest(random: np.random.Generator, rates: list[float], size: int = 4) -> tuple[float, int | None]:
    """The largest e-value over audits with these chances to disagree, and after how many it reached 20."""
    evidence, most, caught = Evidence(), 1.0, None
    for start in range(0, len(rates), size):
        batch = rates[start : start + size]
        evidence = add_audits(evidence, len(batch), int((random.random(len(batch)) < batch).sum()), BUDGET)
        most = max(most, evidence.e_value)
        if caught is None and evidence.e_value >= 20:
            caught = start + len(batch)
    return most, caught


def test_false_alarms_are_at_most_delta_however_long_one_looks() -> None:
    random = np.random.default_rng(1)
    found = np.array([highest(random, [BUDGET] * 1500)[0] for _ in range(500)])
    for delta in (0.05, 0.2):
        # at the budget exactly, the worst case; three standard errors of the simulation
        assert (found >= 1 / delta).mean() <= delta + 3 * math.sqrt(delta / 500)
    assert (found >= 20).any()  # … and not because nothing is ever bet


def test_the_capital_is_a_martingale_at_the_budget() -> None:
    """Exactly, by both outcomes of one more audit, from states after many different histories."""
    random = np.random.default_rng(2)
    for _ in range(50):
        n = int(random.integers(0, 300))
        evidence = add_audits(Evidence(), n, int(random.integers(0, min(n, 10) + 1)), BUDGET)
        after = [add_audits(evidence, 1, disagreed, BUDGET).e_value for disagreed in (0, 1)]
        assert (1 - BUDGET) * after[0] + BUDGET * after[1] == pytest.approx(evidence.e_value, rel=1e-9)


def test_a_shift_is_caught_soon_even_after_much_good_text() -> None:
    random = np.random.default_rng(3)
    for before in (0, 400, 2000):
        delays = []
        for _ in range(60):
            most, caught = highest(random, [0.01] * before + [0.3] * 200, size=1)
            assert most >= 20
            assert caught is not None
            delays.append(caught - before)
        assert np.median(delays) <= 40


def test_impossible_audits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 audits"):
        add_audits(Evidence(), 2, 3, BUDGET)
    with pytest.raises(ValueError, match="budget of 0"):
        add_audits(Evidence(), 2, 1, 0.0)
    with pytest.raises(ValueError, match="impossible audits"):
        AuditCounts(tokens=5, exits=3, audited=2, disagreed=3)


class Text:
    """Tokens under the slow loop, as an engine would publish and audit them; nothing exits while that is forbidden."""

    def __init__(self, seed: int, settings: SlowSettings | None = None) -> None:
        self.random = np.random.default_rng(seed)
        self.settings = settings or SlowSettings()
        self.state, self.verdict = SlowState(), Verdict(BUDGET, 1.0)
        self.tokens = self.wrong = self.exits = 0
        self.reasons: list[str] = []

    def go(self, n: int, chance: float, coverage: float = 0.4) -> None:
        """`n` looks at 5 tokens each, half a second apart."""
        for _ in range(n):
            self.tokens += 5
            exits = int(self.random.binomial(5, coverage)) if self.verdict.allowed else 0
            audited = int(self.random.binomial(exits, self.verdict.audit_rate))
            found = int(self.random.binomial(audited, chance))
            self.wrong += found + int(self.random.binomial(exits - audited, chance))
            self.exits += exits
            counts = AuditCounts(5, exits, audited, found, self.verdict.audit_rate)
            self.state, self.verdict = watch(self.state, counts, BUDGET, self.tokens / 10, self.settings)
            if self.verdict.reason:
                self.reasons.append(self.verdict.reason)

    @property
    def alarms(self) -> int:
        return self.state.alarms


def test_exits_that_keep_the_budget_are_left_alone() -> None:
    alarms = 0
    for seed in range(40):
        text = Text(seed)
        text.go(600, 0.6 * BUDGET)
        alarms += text.alarms > 0
        assert text.exits > 0.3 * text.tokens * 0.9
    assert alarms <= 2  # at most delta; what is tested is below the budget, so hardly ever


@pytest.mark.parametrize("bad", [0.08, 0.3, 0.9])
def test_a_shift_keeps_the_whole_run_within_the_budget_at_95_percent(bad: float) -> None:
    kept = alarms = 0
    for seed in range(100):
        text = Text(seed)
        text.go(150, 0.5 * BUDGET)
        text.go(350, bad)
        kept += text.wrong <= BUDGET * text.tokens
        alarms += text.alarms > 0
    assert kept >= 95
    assert alarms >= 90 or bad < 0.1


def test_without_the_two_watchmen_the_budget_breaks() -> None:
    text = Text(0, SlowSettings(delta=1e-300, account_share=math.inf))
    text.go(150, 0.5 * BUDGET)
    text.go(350, 0.3)
    assert text.wrong > BUDGET * text.tokens


def test_the_alarm_says_why_and_the_next_try_comes_later_each_time() -> None:
    text = Text(1)
    text.go(900, 0.5)
    assert text.alarms >= 2
    assert "exits disagree more often than 0.02 (e-value" in text.reasons[0]
    assert "full depth for 60 s at least" in text.reasons[0]
    assert any("full depth for 120 s at least" in reason for reason in text.reasons)
    assert any("exits are tried again" in reason for reason in text.reasons)


def test_after_an_alarm_a_new_test_begins_at_a_stricter_level() -> None:
    settings = SlowSettings(account_share=math.inf, reopen_share=math.inf)
    state, verdict = watch(SlowState(), AuditCounts(100, 10, 10, 3), BUDGET, 0.0, settings)
    assert verdict.allowed == BUDGET  # an e-value of 10 is not 40
    state, verdict = watch(state, AuditCounts(100, 10, 10, 5), BUDGET, 1.0, settings)
    assert (verdict.allowed, state.alarms) == (0.0, 1)
    state, verdict = watch(state, AuditCounts(100), BUDGET, 61.0, settings)
    assert verdict.allowed == BUDGET
    state, verdict = watch(state, AuditCounts(100, 10, 10, 0), BUDGET, 62.0, settings)
    assert verdict.allowed == BUDGET
    assert state.evidence.e_value < 1
    # what the first test would have taken for an alarm
    second = replace(SlowState(), alarms=1)
    assert watch(SlowState(), AuditCounts(100, 4, 4, 3), BUDGET, 0.0, settings)[1].allowed == 0
    assert watch(second, AuditCounts(100, 4, 4, 3), BUDGET, 0.0, settings)[1].allowed == BUDGET


def test_the_account_closes_before_anything_is_certain_and_opens_when_there_is_room() -> None:
    state, verdict = watch(SlowState(), AuditCounts(100, 30, 30, 1), BUDGET, 0.0)
    assert verdict.allowed == BUDGET
    state, verdict = watch(state, AuditCounts(20, 10, 10, 3), BUDGET, 1.0, SlowSettings(delta=1e-9))
    assert verdict.allowed == 0
    assert "up to 4.0 of 120 tokens disagree with full depth, the budget is 2.4" in verdict.reason
    state, verdict = watch(state, AuditCounts(100), BUDGET, 2.0)
    assert (verdict.allowed, verdict.reason) == (0.0, "")
    state, verdict = watch(state, AuditCounts(100), BUDGET, 3.0)
    assert verdict.allowed == BUDGET
    assert "there is room in the budget" in verdict.reason


def test_everything_is_audited_at_first_and_a_share_in_quiet_times() -> None:
    state, verdict = watch(SlowState(), AuditCounts(100, 20, 20, 0), BUDGET, 0.0)
    assert verdict.audit_rate == 1
    state, verdict = watch(state, AuditCounts(2000, 400, 400, 1), BUDGET, 1.0)
    assert verdict.audit_rate == SlowSettings().audit_rate
    _, verdict = watch(state, AuditCounts(5, 5, 5, 3), BUDGET, 2.0)
    assert verdict.audit_rate == 1  # three of five are suspicious


def test_exits_that_wait_for_their_audit_are_no_debt() -> None:
    _, verdict = watch(SlowState(), AuditCounts(12, 12, 0, 0), BUDGET, 0.0)
    assert verdict.allowed == BUDGET
    _, verdict = watch(SlowState(), AuditCounts(60, 60, 0, 0), BUDGET, 0.0)
    assert verdict.allowed == 0  # nobody audits


def test_the_upper_limit_covers_what_was_not_audited() -> None:
    random = np.random.default_rng(4)
    for wrong, rate in ((4, 0.25), (40, 0.25), (200, 0.5)):
        covered = 0
        for _ in range(400):
            found = int(random.binomial(wrong, rate))
            state = SlowState(10_000, 4000, round(4000 * rate), found, found / rate)
            covered += state.upper() >= wrong
        assert covered >= 0.93 * 400
    assert SlowState(100, 40, 40, 3, 3.0).upper() == 3  # all audited: known exactly


def test_full_depth_may_count_as_agreement() -> None:
    exits, tokens = (SlowSettings(delta=1e-9, account_share=math.inf, per=per) for per in ("exits", "tokens"))
    counts = AuditCounts(1000, 100, 100, 6)
    assert watch(SlowState(), counts, BUDGET, 0.0, exits)[0].evidence.e_value > 1
    assert watch(SlowState(), counts, BUDGET, 0.0, tokens)[0].evidence.e_value < 1


def test_without_a_budget_nothing_exits() -> None:
    state, verdict = watch(SlowState(), AuditCounts(10), 0.0, 0.0)
    assert (state.tokens, verdict.allowed) == (10, 0.0)
