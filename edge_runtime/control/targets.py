"""What a run is to hold, and whether it can: the order is quality, then speed, then power.

A temperature ceiling stands above speed: past it the hardware slows itself down, and by more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..sensors.reading import Reading
from .ladder import Ladder, Rung


@dataclass(frozen=True, slots=True)
class BatteryPolicy:
    """When to save on battery: below `save_below` percent at most `save_share` of the ladder's highest power, below
    `critical_below` the most saving rung, whatever the speed. While it charges, nothing is saved."""

    save_below: float = 30.0
    critical_below: float = 10.0
    save_share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.critical_below <= self.save_below <= 100:
            raise UsageError(
                f"a battery cannot be critical below {self.critical_below}% and low below {self.save_below}%",
                "allowed: 0 ≤ critical ≤ low ≤ 100",
            )
        if not 0 < self.save_share <= 1:
            raise UsageError(f"{self.save_share} is no share of the power", "allowed: above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Targets:
    """What to hold; None: nothing asked. Without `max_disagreement` only lossless rungs are used."""

    latency_ms: float | None = None  # per token, at most
    tokens_per_second: float | None = None  # at least; with both, the stricter one counts
    power_cap_w: float | None = None
    ceiling_c: float | None = None
    battery: BatteryPolicy | None = None
    max_disagreement: float | None = None  # share of tokens, and of exits, that full depth would have chosen otherwise

    def __post_init__(self) -> None:
        above_zero = [
            ("latency", self.latency_ms, "ms per token"),
            ("speed", self.tokens_per_second, "tokens per second"),
            ("power cap", self.power_cap_w, "W"),
            ("temperature ceiling", self.ceiling_c, "°C"),
        ]
        for name, value, unit in above_zero:
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"a {name} of {value} {unit} cannot be held", f"allowed: a number of {unit} above 0")
        if self.max_disagreement is not None and not 0 <= self.max_disagreement < 1:
            raise UsageError(
                f"a disagreement of {self.max_disagreement} is no share",
                "allowed: from 0, lossless, to below 1; for example 0.02",
            )

    @property
    def time_per_token_ms(self) -> float | None:
        """The stricter of both ways to ask for speed."""
        asked = [self.latency_ms] if self.latency_ms is not None else []
        if self.tokens_per_second is not None:
            asked.append(1000 / self.tokens_per_second)
        return min(asked, default=None)

    @property
    def limits_anything(self) -> bool:
        """Whether there is more to hold than the disagreement."""
        return replace(self, max_disagreement=None) != Targets()

    @property
    def budget(self) -> float:
        return self.max_disagreement or 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the targets that a user must know before the run."""

    quantity: str  # disagreement, latency_ms, power_w, temp_c, battery
    kind: str  # impossible, contradiction, unknown
    text: str  # a sentence without a full stop
    best: float | None = None  # the best possible value, in the unit of `quantity`


def check_targets(targets: Targets, ladder: Ladder, reading: Reading | None = None) -> tuple[Finding, ...]:
    """What cannot be held, or not together, by the ladder's predictions, with the best possible values.

    With a first `reading`, also what no sensor answers for. Nothing here is fatal: the run holds what it can, in the
    order quality, speed, power.
    """
    rungs = ladder.within(targets.budget)
    found = [*_quality(targets, ladder), *_speed(targets, ladder, rungs), *_power(targets, rungs)]
    return (*found, *_together(targets, rungs), *(_sensors(targets, reading) if reading is not None else ()))


def _quality(targets: Targets, ladder: Ladder) -> list[Finding]:
    there_are = (*ladder.rungs, *(dropped.rung for dropped in ladder.dropped))
    bounds = [rung.disagreement for rung in there_are if not rung.lossless]
    if not targets.budget or (bounds and min(bounds) <= targets.budget):
        return []
    there = f"the most careful exits are certified for {min(bounds):g}" if bounds else "no exits are certified at all"
    text = f"no exits are certified for a disagreement of {targets.budget:g}: {there}; only lossless rungs are used"
    return [Finding("disagreement", "impossible", text, min(bounds, default=0.0))]


def _speed(targets: Targets, ladder: Ladder, rungs: tuple[Rung, ...]) -> list[Finding]:
    wanted = targets.time_per_token_ms
    fastest = min(rungs, key=lambda r: r.time_per_token_ms)
    if wanted is None or fastest.time_per_token_ms <= wanted:
        return []
    best = fastest.time_per_token_ms
    text = f"{wanted:.3g} ms per token is not possible: the best is {best:.3g} ms, by '{fastest.name}'"
    bolder = [r for r in ladder.rungs if r not in rungs and r.time_per_token_ms < best]
    if bolder:
        next_one = min(bolder, key=lambda r: r.disagreement)
        text += (
            f"; quality beats speed, so '{next_one.name}', {next_one.time_per_token_ms:.3g} ms at a disagreement of "
            f"{next_one.disagreement:g}, is not used"
        )
    return [Finding("latency_ms", "impossible", text, best)]


def _power(targets: Targets, rungs: tuple[Rung, ...]) -> list[Finding]:
    least = min(rungs, key=lambda r: r.power_w)
    if targets.power_cap_w is None or least.power_w <= targets.power_cap_w:
        return []
    text = f"{targets.power_cap_w:.3g} W is not possible: the best is {least.power_w:.3g} W, by '{least.name}'"
    return [Finding("power_w", "impossible", text, least.power_w)]


def _together(targets: Targets, rungs: tuple[Rung, ...]) -> list[Finding]:
    """Where speed and power can each be held, but not by one rung."""
    wanted, cap = targets.time_per_token_ms, targets.power_cap_w
    if wanted is None or cap is None:
        return []
    fast = [r for r in rungs if r.time_per_token_ms <= wanted]
    saving = [r for r in rungs if r.power_w <= cap]
    if not fast or not saving or any(r in saving for r in fast):
        return []
    taken = min(fast, key=lambda r: r.power_w)
    given_up = min(saving, key=lambda r: r.time_per_token_ms)
    text = (
        f"{wanted:.3g} ms per token and {cap:.3g} W exclude each other; speed beats power, so that it takes "
        f"{taken.power_w:.3g} W ('{taken.name}'); within {cap:.3g} W the best is {given_up.time_per_token_ms:.3g} ms"
    )
    return [Finding("power_w", "contradiction", text, taken.power_w)]


def _sensors(targets: Targets, reading: Reading) -> list[Finding]:
    missing = [
        ("temp_c", targets.ceiling_c, reading.temp_c, "temperature", "the most saving rung is used"),
        ("power_w", targets.power_cap_w, reading.power_w, "power", "predictions are used, with 15% to spare"),
        ("battery", targets.battery, reading.battery, "battery", "the battery policy does nothing"),
    ]
    return [
        Finding(quantity, "unknown", f"no sensor says the {name}: {instead}")
        for quantity, target, value, name, instead in missing
        if target is not None and value is None
    ]
