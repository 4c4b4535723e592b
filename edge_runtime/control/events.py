"""What the controller did and why, in words and in numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True, slots=True)
class Event:
    """A change of rung or, where `old` and `new` are the same, something to know about the one that stays."""

    time_s: float  # of the readings' monotonic clock
    old: str  # name of the rung before, empty at the start
    new: str
    kind: str  # what asked for it: start, quality, heat, speed, power, room, sensor
    reason: str  # a sentence without a full stop
    numbers: tuple[tuple[str, float], ...] = ()  # what the reason rests on, with units in the names

    @property
    def is_change(self) -> bool:
        return self.old != self.new

    def sentence(self) -> str:
        """For people: "12.5 s  full 4t → full 2t: 78.4 °C in 20 s at this rate, ceiling 78 °C"."""
        what = f"{self.old or 'start'} → {self.new}" if self.is_change else self.new
        return f"{self.time_s:.1f} s  {what}: {self.reason}"

    def json_line(self) -> str:
        """For programs: one object on one line, without a line end. What is no finite number is null."""
        numbers = {name: value if math.isfinite(value) else None for name, value in self.numbers}
        data = {"time_s": round(self.time_s, 3), "from": self.old, "to": self.new, "kind": self.kind}
        return json.dumps({**data, "reason": self.reason, "numbers": numbers}, ensure_ascii=False)


class EventLog:
    """Writes events to a stream as JSON lines, each at once, so that a log cut short is still whole lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        self._stream.write(event.json_line() + "\n")
        self._stream.flush()
