"""The settings that the controller chooses from, ordered from full quality and most power to the most saving."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError
from ..types import Mode

_LOSSLESS = (Mode.FULL, Mode.VERIFIED)


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to run the model, what is certified of it, and what it is expected to take.

    Time and power are averages while it generates, rests included; power is that of the whole board, as a sensor of
    the board would say.
    """

    name: str  # short, unique on its ladder
    mode: Mode
    time_per_token_ms: float  # predicted
    power_w: float  # predicted
    n_threads: int = 0  # 0: as the profile says
    disagreement: float = 0.0  # certified bound on the share of exits that full depth disagrees with; 0: lossless
    boundaries: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    draft_cap: int = 8
    rest: float = 0.0  # share of the time in which nothing is computed

    def __post_init__(self) -> None:
        checks = [
            ("time per token", self.time_per_token_ms, 0 < self.time_per_token_ms < math.inf, "above 0 ms"),
            ("power", self.power_w, 0 <= self.power_w < math.inf, "0 W or more"),
            ("disagreement", self.disagreement, 0 <= self.disagreement < 1, "0, lossless, to below 1"),
            ("rest", self.rest, 0 <= self.rest < 1, "0, none, to below 1"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise UsageError(f"{name} {value} of the rung '{self.name}' is out of range", f"allowed: {allowed}")
        if (self.mode in _LOSSLESS) != self.lossless:
            raise UsageError(
                f"the rung '{self.name}' has mode {self.mode.value} and a disagreement of {self.disagreement:g}",
                "modes full and verified have 0; modes exit and margin need a certified bound above 0",
            )

    @property
    def lossless(self) -> bool:
        return self.disagreement == 0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A rung that is never worth choosing."""

    rung: Rung
    reason: str


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs by falling power, then by rising disagreement; at least one of them is lossless."""

    rungs: tuple[Rung, ...]
    dropped: tuple[Dropped, ...] = ()

    def named(self, name: str | None) -> Rung | None:
        return next((rung for rung in self.rungs if rung.name == name), None)

    def within(self, disagreement: float) -> tuple[Rung, ...]:
        """Those certified for at most this disagreement, in the ladder's order; never empty."""
        return tuple(rung for rung in self.rungs if rung.disagreement <= disagreement)

    @property
    def power_range_w(self) -> tuple[float, float]:
        """Of the most saving and of the most powerful rung."""
        return self.rungs[-1].power_w, self.rungs[0].power_w


def ladder_of(rungs: Iterable[Rung]) -> Ladder:
    """Order `rungs` and drop those that another one beats or equals in disagreement, time and power.

    Plain full depth is only ever dropped for plain full depth: how fast drafts and exits are depends on the text.
    Raises UsageError without a lossless rung, which the controller needs to step back to, and for a name given twice.
    """
    given = list(rungs)
    twice = next((r.name for i, r in enumerate(given) if r.name in {other.name for other in given[:i]}), None)
    if twice is not None:
        raise UsageError(f"two rungs are named '{twice}'", "give each a name of its own")
    if not any(rung.lossless for rung in given):
        raise UsageError("there is no lossless rung to step back to", "add one of mode full")
    kept: list[Rung] = []
    dropped: list[Dropped] = []
    for rung in sorted(given, key=lambda r: (r.disagreement, r.time_per_token_ms, r.power_w, r.mode is not Mode.FULL)):
        # what beats a rung sorts before it, and if that was dropped, what beat that beats this one, too
        better = next((k for k in kept if _beats(k, rung)), None)
        if better is None:
            kept.append(rung)
        else:
            dropped.append(Dropped(rung, _why(better, rung)))
    kept.sort(key=lambda r: (-r.power_w, r.disagreement, r.time_per_token_ms))
    return Ladder(tuple(kept), tuple(dropped))


def _beats(one: Rung, other: Rung) -> bool:
    fair = other.mode is not Mode.FULL or one.mode is Mode.FULL
    return (
        fair
        and one.disagreement <= other.disagreement
        and one.time_per_token_ms <= other.time_per_token_ms
        and one.power_w <= other.power_w
    )


def _why(better: Rung, rung: Rung) -> str:
    gains = []
    if better.time_per_token_ms < rung.time_per_token_ms:
        gains.append(f"faster ({better.time_per_token_ms:.3g} against {rung.time_per_token_ms:.3g} ms per token)")
    if better.power_w < rung.power_w:
        gains.append(f"more saving ({better.power_w:.3g} against {rung.power_w:.3g} W)")
    if better.disagreement < rung.disagreement:
        gains.append(f"nearer to full depth ({better.disagreement:g} against {rung.disagreement:g})")
    return f"'{better.name}' is {' and '.join(gains) or 'the same'}, and in nothing worse"
