"""Both loops together, and what they tell."""

from __future__ import annotations

import io
import json

from edge_runtime.control import (
    AuditCounts,
    Controller,
    Event,
    EventLog,
    Observation,
    Rung,
    Targets,
    ladder_of,
)
from edge_runtime.sensors.reading import Reading
from edge_runtime.types import Mode

FULL = Rung("full", Mode.FULL, 100, 10)
EXIT = Rung("exit 2%", Mode.EXIT, 70, 10, disagreement=0.02, boundaries=(8, 16), thresholds=(0.5, 0.7))
LADDER = ladder_of((FULL, EXIT))
FAST = Targets(latency_ms=80, max_disagreement=0.02)


def look(time_s: float, ms: float = 70.0) -> Observation:
    return Observation(time_s, Reading(time_s, temp_c=50.0, power_w=10.0), ms)


def test_exits_run_while_audits_are_good_and_stop_at_once_when_they_are_not() -> None:
    controller = Controller(FAST, LADDER)
    decision = controller.observe(look(0.0))
    assert (decision.rung, decision.audit_rate) == (EXIT, 1.0)
    for i in range(1, 60):
        decision = controller.observe(look(i / 2), AuditCounts(20, 8, 8, 0))
    assert decision.rung is EXIT
    assert decision.audit_rate < 1
    decision = controller.observe(look(30.0), AuditCounts(20, 8, 8, 7))
    assert decision.rung is FULL
    (change,) = (event for event in decision.events if event.is_change)
    assert change.kind == "quality"
    assert "exits disagree more often than 0.02" in change.reason
    assert dict(change.numbers)["disagreed"] == 7
    assert controller.state.slow.alarms == 1


def test_exits_that_close_while_none_run_are_told_too() -> None:
    controller = Controller(Targets(max_disagreement=0.02), LADDER)
    assert controller.observe(look(0.0)).rung is FULL
    decision = controller.observe(look(0.5), AuditCounts(20, 8, 8, 8))
    (event,) = decision.events
    assert (event.kind, event.old, event.new) == ("quality", "full", "full")


def test_what_cannot_be_held_is_told_with_the_first_step_only() -> None:
    controller = Controller(Targets(latency_ms=20, ceiling_c=70), LADDER)
    assert [finding.kind for finding in controller.findings] == ["impossible"]
    bare = Observation(0.0, Reading(0.0), 100.0)
    told = [event.reason for event in controller.observe(bare).events if event.kind == "target"]
    assert told[0].startswith("20 ms per token is not possible: the best is 100 ms")
    assert told[1].startswith("no sensor says the temperature")
    assert not [event for event in controller.observe(look(0.5)).events if event.kind == "target"]


def test_explain_says_what_happened_and_what_runs_now() -> None:
    controller = Controller(FAST, LADDER)
    assert controller.explain() == []
    controller.observe(look(0.0))
    controller.observe(look(4.0))
    assert controller.explain() == [
        "0.0 s  start → exit 2%: predicted 70 ms per token, 10 W",
        "now 'exit 2%', since 4 s, 70 ms per token",
    ]


def test_the_log_has_one_object_a_line() -> None:
    stream = io.StringIO()
    controller = Controller(FAST, LADDER, EventLog(stream))
    controller.observe(look(0.0))
    controller.observe(look(0.5), AuditCounts(20, 8, 8, 8))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["from"], line["to"], line["kind"]) for line in lines[:2]] == [
        ("", "exit 2%", "start"),
        ("exit 2%", "full", "quality"),
    ]
    assert lines[1]["numbers"]["audited"] == 8


def test_numbers_that_are_none_stay_json() -> None:
    line = Event(1.0, "a", "a", "heat", "why", (("x", float("inf")), ("y", float("nan")), ("z", 1.5))).json_line()
    assert json.loads(line)["numbers"] == {"x": None, "y": None, "z": 1.5}
