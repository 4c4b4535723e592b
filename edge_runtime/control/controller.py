"""Both loops together: the slow one says which quality is allowed, the fast one chooses within it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from . import fast
from .events import Event
from .ladder import Ladder
from .slow import AuditCounts, SlowSettings, SlowState, Verdict, watch
from .state import Decision, FastSettings, FastState, Observation
from .targets import Finding, Targets, check_targets

_REMEMBERED = 1000  # events for `explain`


@dataclass(frozen=True, slots=True)
class ControlSettings:
    fast: FastSettings = field(default_factory=FastSettings)
    slow: SlowSettings = field(default_factory=SlowSettings)


@dataclass(frozen=True, slots=True)
class ControlState:
    fast: FastState = field(default_factory=FastState)
    slow: SlowState = field(default_factory=SlowState)


def step(
    state: ControlState,
    observation: Observation,
    counts: AuditCounts,
    targets: Targets,
    ladder: Ladder,
    settings: ControlSettings | None = None,
) -> tuple[ControlState, Decision]:
    """One decision of both loops; `counts` are those since the last call.

    Where the slow loop closes exits, a lossy rung is left in this very step.
    """
    settings = settings or ControlSettings()
    slow, verdict = watch(state.slow, counts, targets.budget, observation.time_s, settings.slow)
    quick, decision = fast.step(state.fast, observation, targets, ladder, settings.fast, verdict.allowed)
    events = _with_verdict(decision, verdict, observation.time_s)
    return ControlState(quick, slow), replace(decision, events=events, audit_rate=verdict.audit_rate)


def _with_verdict(decision: Decision, verdict: Verdict, time_s: float) -> tuple[Event, ...]:
    """The events, with the slow loop's reason for the change that it caused, or beside them if it caused none."""
    if not verdict.reason:
        return decision.events
    told = [
        replace(event, reason=verdict.reason, numbers=verdict.numbers) if event.kind == "quality" else event
        for event in decision.events
    ]
    if not any(event.kind == "quality" for event in told):
        name = decision.rung.name
        told.append(Event(time_s, name, name, "quality", verdict.reason, verdict.numbers))
    return tuple(told)


class Controller:
    """Holds the state between steps; everything else is `step`.

    `on_event` hears each event once, for example an `EventLog`. What the targets ask that cannot be held is in
    `findings`, and comes as events of kind "target" with the first step.
    """

    def __init__(
        self,
        targets: Targets,
        ladder: Ladder,
        on_event: Callable[[Event], None] | None = None,
        settings: ControlSettings | None = None,
    ) -> None:
        self.targets, self.ladder = targets, ladder
        self.findings: tuple[Finding, ...] = check_targets(targets, ladder)
        self._settings = settings or ControlSettings()
        self._state = ControlState()
        self._on_event = on_event or (lambda _event: None)
        self._events: deque[Event] = deque(maxlen=_REMEMBERED)

    @property
    def state(self) -> ControlState:
        return self._state

    def observe(self, observation: Observation, counts: AuditCounts | None = None) -> Decision:
        """Take in what happened since the last call, and say what to run from now on."""
        first = self._state.fast.rung is None
        self._state, decision = step(
            self._state, observation, counts or AuditCounts(), self.targets, self.ladder, self._settings
        )
        if first:
            self.findings = check_targets(self.targets, self.ladder, observation.reading)
            name = decision.rung.name
            said = (Event(observation.time_s, name, name, "target", finding.text) for finding in self.findings)
            decision = replace(decision, events=(*decision.events, *said))
        for event in decision.events:
            self._events.append(event)
            self._on_event(event)
        return decision

    def explain(self) -> list[str]:
        """Lines for people: each event with its reason, the oldest first, and what runs now."""
        lines = [event.sentence() for event in self._events]
        rung = self.ladder.named(self._state.fast.rung)
        if rung is not None:
            seconds = self._state.fast.time_s - self._state.fast.since_s
            now_ms = self._state.fast.pace.time_ms(rung)
            lines.append(f"now '{rung.name}', since {seconds:.0f} s, {now_ms:.3g} ms per token")
        return lines
