"""Targets of a server: what is to be held, and how a pilot steers the engine of several conversations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..batching import Conversations, ExitBatchEngine
from ..config import NO_TARGET
from ..config_load import LoadedConfig
from ..errors import UsageError
from ..exits.pack import ExitPack
from ..native import Model
from ..pilot import Pilot, TokenTimes
from ..resolve import RunOptions, thresholds_of
from ..sensors.sampler import Sampler
from ..slices import Slice
from ..steering import Plan, SteeringRequest, answerable, first_reading, plan_steering, steering
from ..types import EngineStats, Mode, Thresholds

logger = logging.getLogger("edge_runtime.serving")

NOW = time.perf_counter  # the clock of readings and of pilots


def plan_targets(loaded: LoadedConfig, run: RunOptions, pack: ExitPack | None, profile: str | None) -> Plan | None:
    """What a server holds that runs as `run` says, with `pack`, on the device of `profile`; None if nothing is asked.

    What nobody but the profile asks for is held as far as the device allows, and not in mode exit. Raises UsageError
    for what was asked for and cannot be held.
    """
    config, origins = loaded.config.device, loaded.origins

    def asked(name: str) -> bool:
        return not origins[f"device.{name}"].startswith(("default", "device profile"))

    exits = run.mode is Mode.EXIT  # which a target that nobody chose would close, though nothing needs it
    request = SteeringRequest(
        target=None if config.target == NO_TARGET or (exits and not asked("target")) else config.target,
        power_cap_w=config.power_cap_w if asked("power_cap_w") else None,
        ceiling_c=config.temp_ceiling_c if asked("temp_ceiling_c") else None,
        device=profile,
    )
    run = replace(run, thresholds=None)  # of the pack: nobody can give a server others
    wanted = any(map(asked, ("target", "power_cap_w", "temp_ceiling_c")))
    if exits and not wanted:
        logger.info("in mode exit, only targets that are asked for are held")
        return None
    try:
        plan = plan_steering(request, run, pack=pack)
    except UsageError as error:
        if wanted:
            raise
        logger.info("no targets are held: %s", error.message)
        return None
    if plan is None:
        return None
    if asked("power_cap_w") and config.power_cap_w is None:  # 0: not the profile's either
        plan = replace(plan, targets=replace(plan.targets, power_cap_w=None))
    if asked("temp_ceiling_c") and config.temp_ceiling_c is None:
        plan = replace(plan, targets=replace(plan.targets, ceiling_c=None))
    return plan if _matters(plan) else None


def _matters(plan: Plan) -> bool:
    """Whether there is anything to hold: with exits, their disagreement is."""
    return plan.pack is not None or plan.targets.limits_anything


class SteeredEngine:
    """The engine of several conversations, as a pilot steers it."""

    def __init__(
        self,
        engine: Conversations,
        model: Model,
        run: RunOptions,
        file_bytes: int,
        set_thresholds: Callable[[Thresholds], None],
    ) -> None:
        """`run` are the resolved options of `engine`, an engine of `model`, whose file has `file_bytes`."""
        self.engine, self.model, self.options, self.file_bytes = engine, model, run, file_bytes
        self.times: dict[int, TokenTimes] | None = None
        self._set_thresholds = set_thresholds
        self._stats = EngineStats()

    @property
    def slices(self) -> Sequence[Slice]:
        return self.engine.slices

    @property
    def stats(self) -> EngineStats:
        found, stats = self.engine.stats, self._stats
        stats.published, stats.exits = found.published, found.exits
        stats.audited, stats.disagreed = found.audited, found.disagreed
        return stats

    def empty(self) -> None:
        """Give up all conversations that are held; none may be under way."""
        for sequence in self.engine.pool.sequences:
            sequence.keep(0)
            for piece in self.slices:
                piece.remove(0, sequence.number)

    def restore(self) -> None:
        """As the options say, whatever was set since."""
        self.set_threads(self.options.n_threads)
        self._set_thresholds(thresholds_of(self.options))
        self.set_audit_rate(self.options.audit_rate)

    def set_threads(self, n_threads: int) -> None:
        self.engine.set_threads(n_threads)

    def set_thresholds(self, exit_below: tuple[float, ...]) -> None:
        self._set_thresholds(Thresholds(exit_below))

    def set_audit_rate(self, rate: float) -> None:
        if isinstance(self.engine, ExitBatchEngine):
            self.engine.audit_rate = rate


@contextmanager
def held(
    plan: Plan | None, steered: SteeredEngine, sampler: Sampler, sleep: Callable[[float], None]
) -> Iterator[Pilot | None]:
    """The targets are held while inside, with rests by `sleep`; without any, all is as the configuration says.

    No answer may be under way as long as `steered.times` are not known.
    """
    if plan is not None:
        plan = replace(plan, targets=answerable(plan, first_reading(sampler, NOW), _tell))
    if plan is None or not _matters(plan):  # the configuration's threads are best for many answers
        yield None
        return
    if steered.times is None:
        steered.empty()
    with steering(plan, steered, sampler, _tell, NOW, sleep) as pilot:
        for finding in pilot.findings:
            _tell(f"warning: {finding.text}")
        try:
            yield pilot
        finally:
            steered.restore()


def _tell(text: str) -> None:
    (logger.warning if text.startswith("warning: ") else logger.info)(text.removeprefix("warning: "))
