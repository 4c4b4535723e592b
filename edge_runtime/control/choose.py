"""Which rung: targets applied in their order, the present rung at an advantage so that nothing flutters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .ladder import Rung

STAY = 1.04  # the present rung may miss a target by so much …
COME = 0.95  # … and another must hold it by so much
_WORTH = 1.1  # a rung that is to be preferred though the present one will do must be so many times better


@dataclass(frozen=True, slots=True)
class Limits:
    """What the rung must hold now; None: nothing asked."""

    disagreement: float = 0.0
    heat_w: float | None = None  # predicted power that the temperature allows
    time_ms: float | None = None  # per token
    power_w: float | None = None  # predicted power that the cap allows


@dataclass(frozen=True, slots=True)
class Choice:
    """The rung to run, and which limit it follows from."""

    rung: Rung
    kind: str  # quality, heat, speed or power: the limit that excludes the present rung; room: none does
    missed: tuple[str, ...] = ()  # limits that no rung, within those before, can hold


Times = Callable[[Rung], float]


def choose(rungs: Sequence[Rung], current: Rung | None, limits: Limits, time_ms: Times) -> Choice:
    """The best of `rungs`, of which at least one is lossless; `time_ms` is what each is now expected to take.

    Limits that cannot be held are held as well as possible, in the order quality, heat, speed, power. Of the rungs that
    are left, the least disagreement wins; then the fastest, or where a speed is asked for, which all of them have, the
    least power.
    """

    def power(rung: Rung) -> float:
        return rung.power_w

    stages: tuple[tuple[str, float | None, Times], ...] = (
        ("heat", limits.heat_w, power),
        ("speed", limits.time_ms, time_ms),
        ("power", limits.power_w, power),
    )
    left = [rung for rung in rungs if rung.disagreement <= limits.disagreement]
    kind = "" if current in left else "quality"
    missed = []
    for name, limit, measure in stages:
        if limit is None:
            continue
        good = [r for r in left if measure(r) <= limit * (STAY if r is current else COME)]
        if not good:
            missed.append(name)
            best = min(left, key=measure)
            good = [current] if current in left and measure(current) <= _WORTH * measure(best) else [best]
        left = good
        if not kind and current not in left:
            kind = name
    enough = limits.time_ms is not None and "speed" not in missed
    order = (power, time_ms) if enough else (time_ms, power)
    best = min(left, key=lambda r: (r.disagreement, order[0](r), order[1](r)))
    stays = (
        current is not None
        and current in left
        and current.disagreement == best.disagreement
        and order[0](current) <= _WORTH * order[0](best)
    )
    return Choice(current if stays and current is not None else best, kind or "room", tuple(missed))
