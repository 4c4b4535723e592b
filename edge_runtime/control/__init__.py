"""From readings and audits to the rung to run: pure functions of frozen data. Never imports the engine."""

from .controller import Controller, ControlSettings, ControlState, step
from .events import Event, EventLog
from .ladder import Dropped, Ladder, Rung, ladder_of
from .slow import AuditCounts, SlowSettings, SlowState
from .state import Decision, FastSettings, FastState, Observation
from .targets import BatteryPolicy, Finding, Targets, check_targets

__all__ = [
    "AuditCounts",
    "BatteryPolicy",
    "ControlSettings",
    "ControlState",
    "Controller",
    "Decision",
    "Dropped",
    "Event",
    "EventLog",
    "FastSettings",
    "FastState",
    "Finding",
    "Ladder",
    "Observation",
    "Rung",
    "SlowSettings",
    "SlowState",
    "Targets",
    "check_targets",
    "ladder_of",
    "step",
]
