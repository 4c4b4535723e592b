"""Why a rung was chosen, for people."""

from __future__ import annotations

from .choose import Choice, Limits
from .ladder import Rung
from .speed import Pace
from .trend import Trend


def start_words(rung: Rung) -> str:
    return f"predicted {rung.time_per_token_ms:.3g} ms per token, {rung.power_w:.3g} W"


def heat_words(temp: Trend | None, ahead_s: float, ceiling_c: float | None) -> str:
    if temp is None or ceiling_c is None:
        return "the temperature is not known"
    return f"{temp.level:.1f} °C, {temp.at(ahead_s):.1f} °C in {ahead_s:.0f} s at this rate, ceiling {ceiling_c:g} °C"


def speed_words(pace: Pace, current: Rung, limits: Limits) -> str:
    return f"{pace.time_ms(current):.3g} ms per token, {limits.time_ms or 0:.3g} asked"


def power_words(current: Rung, off_w: float, cap_w: float | None, saving: str) -> str:
    if saving == "critical":
        return "the battery is critical: the most saving rung, whatever the speed"
    limit = f"cap {cap_w:.3g} W" if cap_w is not None else "no cap"
    return f"{current.power_w + off_w:.3g} W, {limit}{', the battery is low' if saving else ''}"


def quality_words(current: Rung, limits: Limits) -> str:
    return f"a disagreement of {limits.disagreement:g} is allowed, '{current.name}' has {current.disagreement:g}"


def room_words(pace: Pace, current: Rung, choice: Choice) -> str:
    rung = choice.rung
    if rung.disagreement < current.disagreement:
        return "there is room for better quality"
    if pace.time_ms(rung) < pace.time_ms(current):
        return f"there is room for more speed, {pace.time_ms(rung):.3g} ms per token"
    return f"the speed asked for takes less power, {rung.power_w:.3g} W"
