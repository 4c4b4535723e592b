"""How much power the temperature allows: a proportional-integral law on the temperature that is to come."""

from __future__ import annotations

from dataclasses import dataclass

from .choose import COME
from .ladder import Ladder
from .trend import Trend


@dataclass(frozen=True, slots=True)
class HeatSettings:
    """How the ceiling is approached."""

    ahead_s: float = 20.0  # how far the present rate of rise is carried on
    margin_c: float = 1.5  # below the ceiling, what is aimed at
    span_c: float = 6.0  # an error of so much moves the allowance over the whole ladder
    memory_s: float = 40.0  # … and one that lasts so long does so once more


def allowance(
    integral_w: float | None, trend: Trend, ceiling_c: float, ladder: Ladder, passed_s: float, settings: HeatSettings
) -> tuple[float, float]:
    """The integral and the allowed power in W, on the scale of the ladder's predictions.

    Both are clamped to the ladder's range, where a larger or smaller value would change nothing but take time to come
    back from (anti-windup). So at first, and after any time in the cold, everything is allowed.
    """
    least_w, most_w = ladder.power_range_w
    low, high = least_w / COME, 1.02 * most_w / COME
    error_c = ceiling_c - settings.margin_c - trend.at(settings.ahead_s)
    gain = (high - low) / settings.span_c
    integral = high if integral_w is None else integral_w + gain * error_c * passed_s / settings.memory_s
    integral = min(high, max(low, integral))
    return integral, min(high, max(low, integral + gain * error_c))
