"""How long a token takes on each rung now: what was predicted, times how far the machine and the text are from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .ladder import Rung
from .trend import smooth

_MEMORY_S = 4.0
_SHARED = 0.7  # of an error, what is put down to the machine, which slows all rungs alike; the rest is the rung's own
_FORGET_S = 120.0  # what was learned of a rung's own is out of date so long after it was last used
_MOST = math.log(20.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """Logarithms of factors on predicted times: one of the machine, one for each rung that was used."""

    machine: float = 0.0
    own: tuple[tuple[str, float], ...] = ()

    def time_ms(self, rung: Rung) -> float:
        return rung.time_per_token_ms * math.exp(self.machine + dict(self.own).get(rung.name, 0.0))


def keep_pace(pace: Pace, current: Rung, measured_ms: float | None, passed_s: float) -> Pace:
    """After tokens on `current` took `measured_ms` each; None, or what is no time: there were none."""
    own = {name: smooth(factor, 0.0, passed_s, _FORGET_S) for name, factor in pace.own if name != current.name}
    present = dict(pace.own).get(current.name, 0.0)
    machine = pace.machine
    if measured_ms is not None and 0 < measured_ms < math.inf:
        error = math.log(measured_ms / pace.time_ms(current))
        learned = smooth(0.0, error, passed_s, _MEMORY_S)
        machine = min(_MOST, max(-_MOST, machine + _SHARED * learned))
        present = min(_MOST, max(-_MOST, present + (1 - _SHARED) * learned))
    own[current.name] = present
    return Pace(machine, tuple(own.items()))
