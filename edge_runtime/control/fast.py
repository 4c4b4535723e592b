"""The fast loop: one look at the sensors, one decision. A pure function of frozen data; time is what it is told."""

from __future__ import annotations

import math
from dataclasses import replace

from ..sensors.reading import Reading
from .choose import Choice, Limits, choose
from .events import Event
from .heat import allowance
from .ladder import Ladder, Rung
from .limits import NO_POWER, NO_TEMPERATURE, Notice, cap_now_w, limits_now, missed_limits
from .speed import keep_pace
from .state import Decision, FastSettings, FastState, Observation, View
from .targets import BatteryPolicy, Targets
from .trend import follow, smooth
from .words import heat_words, power_words, quality_words, room_words, speed_words, start_words

_PLAUSIBLE_C = (-40.0, 150.0)
_TELL_AGAIN_S = 60.0
_BLIND = {"heat": NO_TEMPERATURE, "power": NO_POWER}  # the notice that a limit rests on no reading


def step(
    state: FastState,
    observation: Observation,
    targets: Targets,
    ladder: Ladder,
    settings: FastSettings | None = None,
    allowed: float | None = None,
) -> tuple[FastState, Decision]:
    """Choose the rung for what was observed.

    `allowed` is the certified disagreement that the slow loop allows now, the targets' budget if it is None. A step
    back for quality is taken at once, anything else not before the present rung had its time, and steps to more power
    go one level at a time. The ladder may differ from call to call, as predictions become better; a rung is known by
    its name.
    """
    view = View(state, observation, targets, ladder, settings or FastSettings(), ladder.named(state.rung))
    view = replace(view, state=_look(view))
    limits, notices = limits_now(view, targets.budget if allowed is None else min(allowed, targets.budget))
    choice = _choose(view, limits)
    notices += missed_limits(view, choice, limits)
    event = _change(view, choice, limits, notices)
    state, events = view.state, []
    if event is not None:
        events.append(event)
        state = _changed(view, choice)
    rung = choice.rung if event is not None or view.current is None else view.current
    told = dict(state.told)
    if event is not None and event.kind == "sensor":
        told[_BLIND[choice.kind]] = observation.time_s
    for kind, about, text in notices:
        if observation.time_s - told.get(about, -math.inf) >= _TELL_AGAIN_S:
            told[about] = observation.time_s
            events.append(Event(observation.time_s, rung.name, rung.name, kind, text, _numbers(view, limits)))
    state = replace(state, time_s=observation.time_s, told=tuple(told.items()))
    return state, Decision(rung, tuple(events), limits=limits)


# ── look: what the observation says ─────────────────────────────────────────────────────────────────────────────────


def _look(view: View) -> FastState:
    state, reading, current = view.state, view.observation.reading, view.current
    if state.rung is None:
        state = replace(state, started_s=view.observation.time_s, time_s=view.observation.time_s)
    passed_s = max(0.0, view.observation.time_s - state.time_s)
    measured_ms = view.observation.time_per_token_ms
    state = _feel(state, view)
    power = reading.power_w
    if power is not None and 0 <= power < math.inf:
        state = replace(state, power_seen_s=max(reading.time_s, state.power_seen_s or -math.inf))
        settled = reading.time_s - state.since_s >= view.settings.settle_s
        # an idle or throttled machine says nothing of what the rung takes
        if current is not None and settled and measured_ms is not None and not reading.throttled_now:
            off_w = smooth(state.power_off_w, power - current.power_w, passed_s, view.settings.power_memory_s)
            state = replace(state, power_off_w=off_w)
    if current is not None:
        state = replace(state, pace=keep_pace(state.pace, current, measured_ms, passed_s))
    return replace(state, saving=_saving(state.saving, reading, view.targets.battery))


def _feel(state: FastState, view: View) -> FastState:
    """The temperature's trend, and what it allows in the long run."""
    reading, temp, heat_w = view.observation.reading, state.temp, state.heat_w
    if reading.temp_c is not None and _PLAUSIBLE_C[0] < reading.temp_c < _PLAUSIBLE_C[1]:
        temp = follow(temp, reading.temp_c, reading.time_s)
    if temp is not None and view.targets.ceiling_c is not None:
        known_s = temp.time_s - state.temp.time_s if state.temp else 0.0  # 0 without news: nothing to integrate
        heat_w, _ = allowance(heat_w, temp, view.targets.ceiling_c, view.ladder, known_s, view.settings.heat)
    return replace(state, temp=temp, heat_w=heat_w)


def _saving(before: str, reading: Reading, policy: BatteryPolicy | None) -> str:
    """The battery's state by the policy; it takes two percent more to leave one than to enter it."""
    if policy is None or reading.battery is None:
        return before if policy is not None else ""
    if reading.battery.charging:
        return ""
    percent = reading.battery.percent
    if percent < policy.critical_below + (2 if before == "critical" else 0):
        return "critical"
    return "low" if percent < policy.save_below + (2 if before else 0) else ""


# ── change: what to, when, and in which words ───────────────────────────────────────────────────────────────────────


def _choose(view: View, limits: Limits) -> Choice:
    current, rungs, pace = view.current, view.ladder.rungs, view.state.pace
    choice = choose(rungs, current, limits, pace.time_ms)
    if current is None or choice.rung.power_w <= current.power_w:
        return choice
    # what a step up does to the temperature shows before the next one is due
    allowed = [rung for rung in rungs if rung.disagreement <= limits.disagreement]
    next_w = min(rung.power_w for rung in allowed if rung.power_w > current.power_w)
    return choose([rung for rung in rungs if rung.power_w <= next_w], current, limits, pace.time_ms)


def _change(view: View, choice: Choice, limits: Limits, notices: list[Notice]) -> Event | None:
    """The event of the change to `choice`; None if there is none to make, or not yet."""
    now_s, current, rung = view.observation.time_s, view.current, choice.rung
    numbers = _numbers(view, limits)
    if current is None:
        return Event(now_s, view.state.rung or "", rung.name, "start", start_words(rung), numbers)
    if rung is current or now_s - view.state.since_s < _wait_s(view, choice, current):
        return None
    blind = [notice.text for notice in notices if notice.about == _BLIND.get(choice.kind)]
    if blind:
        return Event(now_s, current.name, rung.name, "sensor", blind[0], numbers)
    return Event(now_s, current.name, rung.name, choice.kind, _reason(view, choice, current, limits), numbers)


def _rises(choice: Choice, current: Rung) -> bool:
    """Whether nothing but hope asks for the change, or it takes more power: what may prove to be wrong."""
    return choice.kind == "room" or choice.rung.power_w > current.power_w


def _wait_s(view: View, choice: Choice, current: Rung) -> float:
    if choice.kind == "quality":
        return 0.0
    if not _rises(choice, current):
        return view.settings.dwell_s
    state = view.state
    cooler = state.temp is not None and state.temp.level < state.wrong_c - view.settings.relief_c
    hopeful = choice.rung.power_w > current.power_w and (choice.rung.power_w < state.wrong_w or cooler)
    return max(view.settings.dwell_s, view.settings.patience_s if hopeful else _patience_s(view))


def _patience_s(view: View) -> float:
    return view.settings.patience_s if view.state.patience_s is None else view.state.patience_s


def _changed(view: View, choice: Choice) -> FastState:
    state, settings, now_s = view.state, view.settings, view.observation.time_s
    patience_s = _patience_s(view)
    risen_s, risen_c, wrong_w, wrong_c = state.risen_s, state.risen_c, state.wrong_w, state.wrong_c
    if view.current is not None and _rises(choice, view.current):
        if now_s - risen_s > settings.regret_s + 2 * patience_s:
            patience_s, wrong_w = settings.patience_s, math.inf
        risen_s, risen_c = now_s, state.temp.level if state.temp else -math.inf
    elif now_s - risen_s < settings.regret_s + patience_s and choice.kind != "quality":
        patience_s = min(settings.most_patience_s, 2 * patience_s)
        wrong_w, wrong_c = view.current.power_w if view.current is not None else math.inf, risen_c
    state = replace(state, rung=choice.rung.name, since_s=now_s, risen_s=risen_s, risen_c=risen_c)
    return replace(state, patience_s=patience_s, wrong_w=wrong_w, wrong_c=wrong_c)


def _reason(view: View, choice: Choice, current: Rung, limits: Limits) -> str:
    state = view.state
    match choice.kind:
        case "heat":
            return heat_words(state.temp, view.settings.heat.ahead_s, view.targets.ceiling_c)
        case "speed":
            return speed_words(state.pace, current, limits)
        case "power":
            return power_words(current, state.power_off_w, cap_now_w(view), state.saving)
        case "quality":
            return quality_words(current, limits)
    return room_words(state.pace, current, choice)


def _numbers(view: View, limits: Limits) -> tuple[tuple[str, float], ...]:
    state = view.state
    found = {
        "temp_c": state.temp.level if state.temp else None,
        "temp_c_per_s": state.temp.slope if state.temp else None,
        "heat_allows_w": limits.heat_w,
        "cap_allows_w": limits.power_w,
        "power_off_w": state.power_off_w if state.power_seen_s is not None else None,
        "asked_ms": limits.time_ms,
        "allowed_disagreement": limits.disagreement,
    }
    return tuple((name, round(value, 4)) for name, value in found.items() if value is not None)
