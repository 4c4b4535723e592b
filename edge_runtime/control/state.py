"""What the fast loop is told, what it remembers, and what it answers: frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..sensors.reading import Reading
from .choose import Limits
from .events import Event
from .heat import HeatSettings
from .ladder import Ladder, Rung
from .speed import Pace
from .targets import Targets
from .trend import Trend


@dataclass(frozen=True, slots=True)
class FastSettings:
    """How quick and how cautious the fast loop is."""

    dwell_s: float = 5.0  # on a rung at least, but for quality
    patience_s: float = 15.0  # … before one that takes more power or is merely better; doubles when that proves wrong
    most_patience_s: float = 240.0
    regret_s: float = 60.0  # a step up that is undone within this was wrong
    relief_c: float = 2.0  # cooler than at that step by so much, it may be tried again soon
    hold_s: float = 10.0  # without a reading, the rung is held so long; then it is a safe one
    power_memory_s: float = 3.0
    settle_s: float = 1.5  # after a change, until a power sensor shows the new rung alone
    blind_share: float = 0.85  # of a power cap that is filled by predictions alone
    heat: HeatSettings = field(default_factory=HeatSettings)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known at one moment; `reading` may be older than `time_s`, of the same clock."""

    time_s: float
    reading: Reading
    time_per_token_ms: float | None = None  # since the last observation; None: no tokens, the machine rests


@dataclass(frozen=True, slots=True)
class FastState:
    """What the loop remembers."""

    rung: str | None = None  # None: before the first step
    started_s: float = 0.0
    time_s: float = 0.0
    since_s: float = 0.0  # of the last change
    risen_s: float = -math.inf  # of the last change to more power, or to what is merely better
    risen_c: float = -math.inf  # the temperature then
    patience_s: float | None = None  # None: as the settings say
    wrong_w: float = math.inf  # power of the rung that a step up led to, and that had to be left soon
    wrong_c: float = -math.inf  # the temperature when that step was taken
    temp: Trend | None = None
    heat_w: float | None = None  # the integral of `heat.allowance`
    power_off_w: float = 0.0  # measured power minus the rung's
    power_seen_s: float | None = None
    pace: Pace = field(default_factory=Pace)
    saving: str = ""  # battery: "low" or "critical"
    told: tuple[tuple[str, float], ...] = ()  # when which notice was given last


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run from now on. `events` has the change, if there is one, and notices."""

    rung: Rung
    events: tuple[Event, ...] = ()
    audit_rate: float = 1.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class View:
    """All that one decision rests on; `current` is None where the ladder does not have the state's rung."""

    state: FastState
    observation: Observation
    targets: Targets
    ladder: Ladder
    settings: FastSettings
    current: Rung | None
