"""What the rung must hold now, as limits on predicted power and on time; and what a person should know of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from .choose import STAY, Choice, Limits
from .heat import allowance
from .state import View
from .targets import Targets

NO_TEMPERATURE, NO_POWER = "no temperature", "no power"


class Notice(NamedTuple):
    """A sentence; the same thing is not said again so soon."""

    kind: str  # as that of an event
    about: str
    text: str


def limits_now(view: View, allowed: float) -> tuple[Limits, list[Notice]]:
    """The limits, `allowed` being the one on certified disagreement."""
    notices: list[Notice] = []
    heat_w = power_w = None
    if view.targets.ceiling_c is not None:
        heat_w = _heat_limit(view, view.targets.ceiling_c, notices)
    cap_w = cap_now_w(view)
    if cap_w is not None:
        power_w = _power_limit(view, cap_w, notices)
    time_ms = view.targets.time_per_token_ms
    if view.state.saving == "critical":
        time_ms, power_w = None, 0.0
    return Limits(allowed, heat_w, time_ms, power_w), notices


def cap_now_w(view: View) -> float | None:
    """The power cap, the battery's included."""
    targets: Targets = view.targets
    caps = [] if targets.power_cap_w is None else [targets.power_cap_w]
    if view.state.saving and targets.battery is not None:
        caps.append(targets.battery.save_share * view.ladder.power_range_w[1])
    return min(caps, default=None)


def missed_limits(view: View, choice: Choice, limits: Limits) -> list[Notice]:
    """What no rung can hold, within what comes before it in the order."""
    notices = []
    state, rung = view.state, choice.rung
    possible_ms = state.pace.time_ms(rung)
    if "speed" in choice.missed and limits.time_ms is not None and possible_ms > limits.time_ms:
        text = f"the latency cannot be held now: {limits.time_ms:.3g} ms asked, {possible_ms:.3g} possible"
        notices.append(Notice("speed", "latency", text))
    takes_w = rung.power_w + state.power_off_w
    if "power" in choice.missed and not state.saving and takes_w > (cap_now_w(view) or math.inf):
        why = ", as the speed comes first" if limits.time_ms is not None and "speed" not in choice.missed else ""
        notices.append(Notice("power", "cap", f"the power cap cannot be held now{why}: {takes_w:.3g} W are needed"))
    return notices


def _heat_limit(view: View, ceiling_c: float, notices: list[Notice]) -> float:
    state, settings, current = view.state, view.settings, view.current
    now_s, least_w = view.observation.time_s, view.ladder.power_range_w[0]
    blind_s = now_s - (state.temp.time_s if state.temp else state.started_s)
    if blind_s > settings.hold_s:
        text = f"no temperature for {blind_s:.0f} s: the most saving rung, to be safe"
        notices.append(Notice("sensor", NO_TEMPERATURE, text))
        return least_w
    if state.temp is None or state.heat_w is None:
        return current.power_w if current else math.inf
    _, allowed_w = allowance(state.heat_w, state.temp, ceiling_c, view.ladder, 0.0, settings.heat)
    if current is None:
        return allowed_w
    if blind_s > settings.dwell_s / 2:
        allowed_w = min(allowed_w, current.power_w)  # held, and no more than that
    throttled = view.observation.reading.throttled_now
    if throttled:
        notices.append(Notice("heat", "throttled", f"the hardware slows itself down: {', '.join(sorted(throttled))}"))
    if throttled or state.temp.level > ceiling_c:
        allowed_w = min(allowed_w, 0.99 * current.power_w / STAY)
    if state.temp.level > ceiling_c and current.power_w <= least_w:
        text = f"above the ceiling of {ceiling_c:g} °C on the most saving rung"
        notices.append(Notice("heat", "ceiling", text))
    return max(allowed_w, least_w)


def _power_limit(view: View, cap_w: float, notices: list[Notice]) -> float:
    """What the rung may take by prediction, so that the sensor shows `cap_w`."""
    state, settings, current = view.state, view.settings, view.current
    blind_s = view.observation.time_s - (state.started_s if state.power_seen_s is None else state.power_seen_s)
    if blind_s > settings.hold_s:
        share = settings.blind_share
        text = f"no power for {blind_s:.0f} s: by predictions, at {share:.0%} of the cap"
        notices.append(Notice("sensor", NO_POWER, text))
        return share * cap_w - max(0.0, state.power_off_w)
    limit_w = cap_w - state.power_off_w
    held = current is not None and blind_s > settings.dwell_s / 2
    return min(limit_w, current.power_w) if held and current is not None else limit_w
