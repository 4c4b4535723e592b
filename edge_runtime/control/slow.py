"""The slow loop: whether exits may go on, from what audits found. Quality is never traded for speed or power.

Two watchmen, and either closes the exits at once:

    the alarm       tests whether exits disagree more often than the budget allows (`betting`). It is false with
                    probability delta at most over the whole run, however often it looks: the k-th test, after k - 1
                    alarms, has delta / (k·(k + 1)).
    the account     compares the upper 95% limit of all disagreeing tokens so far with the budget for all tokens so far,
                    before anything is certain, so that the run as a whole stays within. Tokens from lossless rungs pay
                    debts back.

The share of exits to audit rises to 1 where little is known yet, or suspicion or the account asks for it. It is decided
before the outcomes, which the test and the weights 1 / rate of the account's estimate (Horvitz and Thompson 1952) need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .betting import Evidence, add_audits

_Z = 1.645  # one-sided 95% of a normal variable


@dataclass(frozen=True, slots=True)
class SlowSettings:
    """How careful the slow loop is."""

    delta: float = 0.05  # chance that the alarm is ever false
    per: str = "exits"  # what the alarm's test is of: "exits", or "tokens", where full depth counts as agreement
    audit_rate: float = 0.25  # in quiet times
    trial: int = 50  # audits at rate 1 after each opening
    suspicion: float = 2.0  # an e-value from which everything is audited
    account_share: float = 0.9  # of the budget, above which the account closes
    reopen_share: float = 0.7  # … and below which it opens again
    waiting: int = 16  # exits that may be published and not yet have been audited
    advance: float = 3.0  # disagreeing tokens that are granted while the run is still short
    pause_s: float = 60.0  # after the first alarm; doubles with each


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """What happened since the last look; `audit_rate` is the one that was in force then."""

    tokens: int = 0  # published
    exits: int = 0  # of them, by lossy rungs
    audited: int = 0  # exits compared with full depth
    disagreed: int = 0  # of the audited
    audit_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.disagreed <= self.audited or self.exits < 0 or not 0 < self.audit_rate <= 1:
            raise ValueError(f"impossible audits: {self}")


@dataclass(frozen=True, slots=True)
class SlowState:
    """Counts of the whole run, the present test, and until when exits are closed."""

    tokens: int = 0
    exits: int = 0
    audited: int = 0
    disagreed: int = 0
    estimate: float = 0.0  # of all disagreeing tokens: Σ disagreed / rate
    evidence: Evidence = field(default_factory=Evidence)
    since_opening: int = 0  # audits
    alarms: int = 0
    closed: str = ""  # "alarm" or "account", empty: open
    closed_until_s: float = -math.inf

    def upper(self, waiting: int = 0) -> float:
        """Upper 95% limit of the number of disagreeing tokens so far, but for the last `waiting` exits.

        A score interval, which says something where no disagreement was found, too.
        """
        due = max(0, self.exits - waiting)
        spread = max(0.0, due / self.audited - 1) if self.audited else float(due)
        limit = self.estimate + _Z**2 * spread / 2 + _Z * math.sqrt(self.estimate * spread + (_Z * spread / 2) ** 2)
        return min(float(self.exits), limit)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the slow loop allows from now on."""

    allowed: float  # certified disagreement of the boldest rung that may be used; 0: lossless only
    audit_rate: float
    reason: str = ""  # only where exits have just been closed or opened
    numbers: tuple[tuple[str, float], ...] = ()


def watch(
    state: SlowState, counts: AuditCounts, budget: float, time_s: float, settings: SlowSettings | None = None
) -> tuple[SlowState, Verdict]:
    """Take in `counts` and decide; `budget` is the allowed share of disagreeing tokens, the same in all calls."""
    settings = settings or SlowSettings()
    if budget <= 0:
        return replace(state, tokens=state.tokens + counts.tokens), Verdict(0.0, settings.audit_rate)
    state = _counted(state, counts, budget, settings)
    level = settings.delta / ((state.alarms + 1) * (state.alarms + 2))
    e_value, upper, share = state.evidence.e_value, state.upper(settings.waiting), budget * state.tokens
    numbers = (
        ("e_value", e_value),
        ("audited", float(state.audited)),
        ("disagreed", float(state.disagreed)),
        ("disagreeing_tokens_at_most", upper),
        ("budget_tokens", share),
    )
    if state.closed != "alarm" and e_value >= 1 / level:
        pause_s = settings.pause_s * 2**state.alarms
        reason = (
            f"exits disagree more often than {budget:g} (e-value {e_value:.3g}, of {state.evidence.n:.0f} audits): "
            f"full depth for {pause_s:.0f} s at least"
        )
        state = replace(
            state, alarms=state.alarms + 1, closed="alarm", closed_until_s=time_s + pause_s, evidence=Evidence()
        )
        return state, Verdict(0.0, 1.0, reason, numbers)
    if not state.closed and upper > max(settings.advance, settings.account_share * share):
        reason = (
            f"up to {upper:.1f} of {state.tokens:,} tokens disagree with full depth, the budget is {share:.1f}: "
            "full depth until there is room again"
        )
        return replace(state, closed="account"), Verdict(0.0, 1.0, reason, numbers)
    if state.closed:
        if time_s < state.closed_until_s or upper > settings.reopen_share * share:
            return state, Verdict(0.0, 1.0)
        state = replace(state, closed="", since_opening=0)
        return state, Verdict(budget, 1.0, "exits are tried again: there is room in the budget", numbers)
    careful = (
        state.since_opening < settings.trial
        or e_value >= settings.suspicion
        or upper > settings.reopen_share * max(share, settings.advance)
    )
    return state, Verdict(budget, 1.0 if careful else settings.audit_rate)


def _counted(state: SlowState, counts: AuditCounts, budget: float, settings: SlowSettings) -> SlowState:
    agreeing = counts.audit_rate * max(0, counts.tokens - counts.exits) if settings.per == "tokens" else 0.0
    return replace(
        state,
        tokens=state.tokens + counts.tokens,
        exits=state.exits + counts.exits,
        audited=state.audited + counts.audited,
        disagreed=state.disagreed + counts.disagreed,
        estimate=state.estimate + counts.disagreed / counts.audit_rate,
        evidence=add_audits(state.evidence, counts.audited + agreeing, counts.disagreed, budget),
        since_opening=state.since_opening + counts.audited,
    )
