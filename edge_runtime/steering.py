"""Generation under targets: sensors, the device's profile and a controller put together for one runtime."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .control import BatteryPolicy, Controller, Event, EventLog, Ladder, Targets
from .energy.model import PowerModel
from .errors import UsageError
from .generate import Runtime
from .pilot import STEP_S, Pilot, lossless_ladder, token_times_ms
from .profiles import Profile, choose_profile
from .sensors.detect import detect
from .sensors.machine import Machine
from .sensors.reading import Reading
from .sensors.sampler import Sampler, Timing
from .slices import default_threads
from .types import Mode

LOSSLESS = (Mode.FULL, Mode.VERIFIED)
DEFAULT_TARGET = "balanced"
_PATIENCE_S = 2.0  # for the first reading


@dataclass(frozen=True, slots=True)
class SteeringRequest:
    """What is to be held while a model answers. What is None comes from the profile's `target`, if one is named."""

    target: str | None = None  # of the profile: battery, quiet, balanced or fast
    power_cap_w: float | None = None
    ceiling_c: float | None = None
    latency_ms: float | None = None  # per token
    explain: bool = False
    log: Path | None = None
    device: str | None = None  # name or path of a profile; None: the one that fits

    @property
    def wanted(self) -> bool:
        """Whether anything is to be controlled."""
        return replace(self, device=None) != SteeringRequest()


def targets_of(request: SteeringRequest, profile: Profile) -> Targets:
    """The targets asked for, over those that the profile's named target has. Raises UsageError for an unknown name."""
    nothing_else = request.power_cap_w is request.ceiling_c is request.latency_ms is None
    name = request.target or (DEFAULT_TARGET if nothing_else else None)
    if name is not None and name not in profile.targets:
        raise UsageError(f"there is no target '{name}'", f"targets: {', '.join(profile.targets)}")
    base = profile.targets[name] if name is not None else None
    asked = Targets(request.latency_ms, power_cap_w=request.power_cap_w, ceiling_c=request.ceiling_c)
    if base is None:
        return asked
    return replace(
        asked,
        tokens_per_second=base.min_tokens_per_s if asked.latency_ms is None else None,
        power_cap_w=base.power_cap_w if asked.power_cap_w is None else asked.power_cap_w,
        ceiling_c=base.temp_ceiling_c if asked.ceiling_c is None else asked.ceiling_c,
        battery=BatteryPolicy() if name == "battery" else None,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that can be met: what is to be held on this device."""

    request: SteeringRequest
    machine: Machine
    profile: Profile
    power: PowerModel
    targets: Targets


def plan_steering(request: SteeringRequest, mode: Mode) -> Plan | None:
    """What is to be done, checked before anything is loaded; None if nothing is asked.

    Raises UsageError for a mode that is not lossless, targets that are none, and a device that is unknown or whose
    profile has no power model.
    """
    if not request.wanted:
        return None
    if mode not in LOSSLESS:
        raise UsageError(f"targets cannot be held in mode {mode.value}", "use --mode full or --mode verified")
    machine = Machine()
    profile = choose_profile(machine, platform.system(), platform.machine(), request.device).profile
    targets, power = targets_of(request, profile), PowerModel.of(profile)
    if power is None:
        raise UsageError(
            f"the device profile '{profile.name}' has no power model, so that settings cannot be compared",
            "name another one with --device, or add [power] to it: `edge-run energy calibrate` makes it",
        )
    return Plan(request, machine, profile, power, targets)


@contextmanager
def steering(plan: Plan, runtime: Runtime, say: Callable[[str], None]) -> Iterator[Pilot]:
    """Sensors are read and settings chosen while inside; `say` gets what happens, if it is to be explained.

    The runtime's caches must be empty. Raises UsageError if the log cannot be written.
    """
    start_s = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - start_s

    with ExitStack() as opened:
        hear = opened.enter_context(_listening(plan.request, say))
        answered = threading.Event()
        sensors = detect(plan.machine, plan.profile)
        listeners = [lambda _reading: answered.set()]
        sampler = opened.enter_context(Sampler(sensors, STEP_S, listeners=listeners, timing=Timing(now=now)))
        ladder = _ladder(plan, runtime, say)
        answered.wait(_PATIENCE_S)
        controller = Controller(_answerable(plan, sampler.latest, say), ladder, hear)

        def set_threads(n_threads: int) -> None:
            for piece in runtime.engine.slices:
                piece.set_threads(n_threads)

        pilot = Pilot(controller, set_threads, lambda: sampler.latest, now, time.sleep)
        pilot.begin()
        try:
            yield pilot
        finally:
            if plan.request.explain:
                say(f"control: {controller.explain()[-1]}")


@contextmanager
def _listening(request: SteeringRequest, say: Callable[[str], None]) -> Iterator[Callable[[Event], None]]:
    """What passes events on to people and to the log, as far as that is asked for."""
    with ExitStack() as opened:
        listeners: list[Callable[[Event], None]] = []
        if request.explain:
            listeners.append(lambda event: say(f"control: {event.sentence()}"))
        if request.log is not None:
            try:
                listeners.append(EventLog(opened.enter_context(request.log.open("a", encoding="utf-8"))))
            except OSError as error:
                raise UsageError(f"{request.log} cannot be written: {error.strerror}", "choose another file") from None

        def hear(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield hear


def _ladder(plan: Plan, runtime: Runtime, say: Callable[[str], None]) -> Ladder:
    most = runtime.options.n_threads or default_threads()
    say(f"measure the time of a token with 1 to {most} threads")
    times = token_times_ms(runtime.engine.slices, range(1, most + 1))
    return lossless_ladder(times, plan.power, runtime.header.file_bytes / 1e9, runtime.options.mode)


def _answerable(plan: Plan, reading: Reading | None, say: Callable[[str], None]) -> Targets:
    """The targets without the profile's ceiling, where no sensor says the temperature.

    A ceiling that somebody asked for stays: what it needs is said, and the most saving setting is used.
    """
    blind = reading is None or reading.temp_c is None
    if not blind or plan.targets.ceiling_c is None or plan.request.ceiling_c is not None:
        return plan.targets
    say(f"warning: no sensor says the temperature, so the ceiling of {plan.targets.ceiling_c:g} °C is not held")
    return replace(plan.targets, ceiling_c=None)
