"""Generation under targets: sensors, the device's profile and a controller put together for one engine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from .batch_costs import CostKey
from .control import (
    BatteryPolicy,
    Controller,
    ControlSettings,
    Event,
    EventLog,
    Ladder,
    SlowSettings,
    Targets,
)
from .energy.model import PowerModel
from .engine import Engine
from .errors import UsageError
from .exits.pack import ExitPack
from .exits.packs import find_exit_pack
from .exits.settings import DEFAULT_DISAGREEMENT
from .kept import Kept
from .native import Model
from .pilot import (
    LATE_BATCH,
    Controls,
    Exits,
    Pilot,
    TokenTimes,
    exits_of,
    measure_token_times,
    run_ladder,
    times_from_json,
    times_to_json,
)
from .playing import Player
from .profiles import Profile, choose_profile
from .resolve import RunOptions, context_options, engine_settings
from .sensors.machine import Machine
from .sensors.reading import Reading
from .sensors.sampler import Sampler
from .slices import Slice, default_threads
from .types import EngineStats, Mode, Thresholds

DEFAULT_TARGET = "balanced"
_PATIENCE_S = 2.0  # for the first reading
_LOOK_S = 0.02  # between looks for it
_FORMAT = 1

Say = Callable[[str], None]


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
    profile: Profile
    power: PowerModel
    targets: Targets
    pack: ExitPack | None = None  # whose certified exits may be used, in mode exit


def plan_steering(
    request: SteeringRequest, options: RunOptions, machine: Machine | None = None, pack: ExitPack | None = None
) -> Plan | None:
    """What is to be done in a run with `options`, checked before anything is loaded; None if nothing is asked.

    `pack` is the run's, if it is loaded already.

    Raises UsageError for a mode in which nothing can be held, targets that are none, and a device that is unknown or
    whose profile has no power model; PackError for an exit pack that cannot be used.
    """
    if not request.wanted:
        return None
    pack = _certifying_pack(options, pack)
    profile = choose_profile(machine or Machine(), platform.system(), platform.machine(), request.device).profile
    targets, power = targets_of(request, profile), PowerModel.of(profile)
    if power is None:
        raise UsageError(
            f"the device profile '{profile.name}' has no power model, so that settings cannot be compared",
            "name another one with --device, or add [power] to it: `edge-run energy calibrate` makes it",
        )
    if pack is not None:
        targets = replace(targets, max_disagreement=_budget(request, profile, options))
    return Plan(request, profile, power, targets, pack)


def _certifying_pack(options: RunOptions, loaded: ExitPack | None) -> ExitPack | None:
    """What certifies the exits of a run; None in modes without exits. Raises UsageError where nothing does."""
    if options.mode is Mode.MARGIN:
        raise UsageError("targets cannot be held in mode margin", "use --mode verified, which is lossless")
    if options.mode is Mode.AUTO and options.max_disagreement is not None:
        raise UsageError(
            "with targets, tokens may exit in mode exit only", "add --mode exit, or leave --max-disagreement out"
        )
    if options.mode is not Mode.EXIT:
        return None
    why = "targets are held in mode exit only by exits that are certified"
    if options.pack is None:
        raise UsageError(f"{why}, and no exit pack was given", "give one with --pack, or use --mode verified")
    if options.thresholds is not None:
        raise UsageError(f"{why}, and nothing is certified of a --threshold of your own", "leave --threshold out")
    pack = loaded or ExitPack.load(find_exit_pack(options.pack))
    if options.head == "shared" and not pack.shared:
        raise UsageError(
            f"{why}, and the exit pack '{pack.name}' certifies nothing of the model's own output head",
            "leave --head out",
        )
    return pack


def _budget(request: SteeringRequest, profile: Profile, options: RunOptions) -> float:
    """The disagreement allowed: what was asked for, else what the target named has, else the usual."""
    named = profile.targets[request.target].max_disagreement if request.target is not None else None
    found = named if options.max_disagreement is None else options.max_disagreement
    return DEFAULT_DISAGREEMENT if found is None else found


@contextmanager
def steering(
    plan: Plan,
    steered: Steerable,
    sampler: Sampler,
    say: Say,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Pilot]:
    """Settings are chosen while inside, by what the running `sampler` reads; `say` gets what is to be explained.

    `now` is the clock that its readings have, `sleep` what rests. What is `steered` is left with the settings chosen
    last. Raises UsageError if the log cannot be written.
    """
    start_s = now()
    with ExitStack() as opened:
        hear = opened.enter_context(_listening(plan.request, say, start_s))
        exits = _exits(plan, steered)
        if exits is not None:
            _tell_exits(plan, exits, say)
        gb_per_token = steered.file_bytes / 1e9
        times = token_times(steered, say)
        ladder = run_ladder(times, plan.power, gb_per_token, steered.options.mode, exits)
        _tell_dropped(plan, ladder, say)
        targets = answerable(plan, first_reading(sampler, now), say)
        controller = Controller(targets, ladder, hear, _settings(steered, exits))
        estimate = _Estimate(plan.power, os.cpu_count() or 1, gb_per_token)
        pilot = Pilot(controller, steered, lambda: sampler.latest, now, sleep, estimate)
        pilot.begin()
        try:
            yield pilot
        finally:
            if plan.request.explain:
                say(f"control: {controller.explain()[-1]}")


class _Estimate:
    """The board's power, by its model, where no sensor knows it: by the load of its cores and the weights read."""

    def __init__(self, model: PowerModel, n_cores: int, gb_per_token: float) -> None:
        self._model, self._n_cores, self._gb = model, n_cores, gb_per_token

    def __call__(self, reading: Reading, time_per_token_ms: float | None) -> Reading:
        if reading.power_w is not None:
            return reading
        gb_per_s = self._gb / (time_per_token_ms / 1e3) if time_per_token_ms else 0.0
        return self._model.fill([reading], self._n_cores, gb_per_s)[0]


class Steerable(Controls, Protocol):
    """What targets are held for, as far as it is asked once, before the first token."""

    @property
    def model(self) -> Model: ...

    @property
    def file_bytes(self) -> int:
        """Size of the model's file: the weights that a token reads at full depth."""

    @property
    def options(self) -> RunOptions:
        """Resolved ones."""

    @property
    def slices(self) -> Sequence[Slice]:
        """Those that are open, with empty caches where `times` are not known."""

    times: dict[int, TokenTimes] | None
    """Of this run, by number of threads; None until they are looked up or measured."""


class SteeredPlayer:
    """A player, as a pilot steers it."""

    def __init__(self, player: Player, file_bytes: int) -> None:
        self._player, self.file_bytes, self.model = player, file_bytes, player.model
        self.times: dict[int, TokenTimes] | None = None

    @property
    def options(self) -> RunOptions:
        return self._player.options

    @property
    def slices(self) -> Sequence[Slice]:
        return self._player.engine.slices

    @property
    def engine(self) -> Engine:
        return self._player.engine

    @property
    def stats(self) -> EngineStats:
        return self._player.stats

    def set_threads(self, n_threads: int) -> None:
        self._player.set_threads(n_threads)

    def set_thresholds(self, exit_below: tuple[float, ...]) -> None:
        self._player.thresholds = Thresholds(exit_below)

    def set_audit_rate(self, rate: float) -> None:
        self._player.engine.audit_rate = rate


@contextmanager
def _listening(request: SteeringRequest, say: Say, start_s: float) -> Iterator[Callable[[Event], None]]:
    """What passes events on to people and to the log, as far as that is asked for, with times since `start_s`."""
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
                listener(replace(event, time_s=event.time_s - start_s))

        yield hear


# ── what may be chosen, and what it takes ───────────────────────────────────────────────────────────────────────────


def _exits(plan: Plan, steered: Steerable) -> Exits | None:
    """What the run's pack certifies within the targets; None in a run without exits."""
    if plan.pack is None:
        return None
    options = steered.options
    signal, cap = options.signal or plan.pack.default_signal, engine_settings(options).cap
    return exits_of(plan.pack, signal, plan.targets.budget, steered.model.n_layer, cap)


def _tell_exits(plan: Plan, exits: Exits, say: Say) -> None:
    if plan.targets.budget == 0:
        say(f"warning: the target '{plan.request.target}' allows no disagreement, so no token exits")
    elif plan.request.explain:
        for rung in exits.certified:
            say(f"control: exits certified for {rung.bound:g}: {rung.sentence()}")


def _tell_dropped(plan: Plan, ladder: Ladder, say: Say) -> None:
    """Exits that are never worth it on this machine, by prediction."""
    if plan.request.explain:
        for dropped in ladder.dropped:
            if not dropped.rung.lossless and not dropped.rung.rest:
                say(f"control: '{dropped.rung.name}' is never used: {dropped.reason}")


def token_times(steered: Steerable, say: Say) -> dict[int, TokenTimes]:
    """Times with each number of threads up to the run's own; measured, if they never were."""
    if steered.times is not None:
        return steered.times
    options = steered.options
    most = options.n_threads or default_threads()
    # more threads than the machine has are never tried, unless the run itself has so many
    counts = sorted({*range(1, min(most, os.cpu_count() or most) + 1), most})
    exits = options.mode is Mode.EXIT
    batch = min(LATE_BATCH, engine_settings(options).cap + 1, options.n_batch) if exits else 0
    kept = Kept(
        "token-times",
        _FORMAT,
        {
            **asdict(CostKey.of(steered.model, context_options(options))),
            "boundaries": options.boundaries or (),
            "batch": batch,
        },
    )
    times = kept.read(lambda rows: times_from_json(rows, counts, batch))
    if times is None:
        threads = "1 thread" if most == 1 else f"1 to {counts[-1]} threads"
        say(f"measure the time of a token with {threads}, once for this model and machine")
        times, steady = measure_token_times(steered.slices, counts, batch)
        if steady:
            kept.write(times_to_json(times))
    steered.times = times
    return times


# ── what is held ────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(steered: Steerable, exits: Exits | None) -> ControlSettings:
    """Audits as often as the run asks for at least, and a test of what is certified: of exits, or of all tokens."""
    per_tokens = exits is not None and any(rung.risk == "tokens" for rung in exits.certified)
    usual = SlowSettings()
    rate = max(usual.audit_rate, steered.options.audit_rate)
    return ControlSettings(slow=replace(usual, audit_rate=rate, per="tokens" if per_tokens else usual.per))


def first_reading(sampler: Sampler, now: Callable[[], float]) -> Reading | None:
    """The newest reading, waited for a moment; None if there is none then."""
    until_s = now() + _PATIENCE_S
    while (reading := sampler.latest) is None and now() < until_s:
        time.sleep(_LOOK_S)
    return reading


def answerable(plan: Plan, reading: Reading | None, say: Say) -> Targets:
    """The targets without the profile's ceiling, where no sensor says the temperature.

    A ceiling that somebody asked for stays: what it needs is said, and the most saving setting is used.
    """
    blind = reading is None or reading.temp_c is None
    if not blind or plan.targets.ceiling_c is None or plan.request.ceiling_c is not None:
        return plan.targets
    say(f"warning: no sensor says the temperature, so the ceiling of {plan.targets.ceiling_c:g} °C is not held")
    return replace(plan.targets, ceiling_c=None)
