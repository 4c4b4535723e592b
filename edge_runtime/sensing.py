"""The sensors of a run: sampled once, for the energy of its answers and for the targets that it holds."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from . import display
from .energy.live import energy_meter, run_sampler
from .energy.model import PowerModel
from .energy.request import Meter
from .errors import UsageError
from .generate import Runtime
from .pilot import Pilot
from .profiles import Profile, choose_profile
from .resolve import RunOptions
from .sensing_options import SensingArguments
from .sensors.detect import detect, missing
from .sensors.machine import Machine, Sensor
from .sensors.reading import Reading
from .sensors.recording import Recording, Replay, read_recording
from .sensors.sampler import Sampler
from .steering import Plan, SteeredPlayer, SteeringRequest, plan_steering, steering
from .summary import Summary

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SensingPlan:
    """What is to be read and held, checked before anything is loaded."""

    energy: bool = False
    idle_power_w: float | None = None  # None: measured before the model is loaded
    request: SteeringRequest = field(default_factory=SteeringRequest)
    targets: Plan | None = None  # None: none are to be held
    profile: Profile | None = None
    recording: Recording | None = None  # instead of the machine's sensors
    recording_path: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether sensors are to be read at all."""
        return self.energy or self.targets is not None


def plan_sensing(arguments: SensingArguments, device: str | None, options: RunOptions, say: Say) -> SensingPlan:
    """What `arguments` ask for in a run with `options`; `say` hears of a recording that is cut short.

    Raises UsageError for what contradicts itself and as plan_steering does, EdgeError for a damaged recording.
    """
    request = SteeringRequest(
        arguments.target,
        arguments.power_cap,
        arguments.temp_ceiling,
        arguments.latency,
        arguments.explain,
        arguments.control_log,
        device,
    )
    idle_w, path = arguments.idle_power, arguments.replay
    if idle_w is not None and not arguments.energy:
        raise UsageError("--idle-power means nothing without --energy", "add --energy")
    if idle_w is not None and not 0 <= idle_w < math.inf:
        raise UsageError(f"{idle_w} W is no power of an idle machine", "give watts, as in --idle-power 2.5")
    if path is not None and not (arguments.energy or request.wanted):
        raise UsageError("--replay means nothing without --energy or a target", "add --energy, or as in --target quiet")
    return SensingPlan(
        arguments.energy,
        idle_w,
        request,
        plan_steering(request, options),
        choose_profile(Machine(), platform.system(), platform.machine(), device).profile,
        None if path is None else read_recording(path, lambda text: say(f"warning: {display.harmless(text)}")),
        path,
    )


class Sensing:
    """What is known of the machine while a run lasts."""

    def __init__(
        self,
        plan: SensingPlan,
        say: Say,
        sampler: Sampler | None = None,
        meter: Meter | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.plan, self.say, self.sampler, self.meter = plan, say, sampler, meter
        self._replay = replay
        self._told_gaps = self._told_end = False

    def tell_gaps(self, summary: Summary) -> None:
        """After an answer: that a recording is over, and what is not known of the energy and why; each once."""
        over = self._replay is not None and self._replay.ended(time.perf_counter())
        if over and not self._told_end:
            self._told_end = True
            path = self.plan.recording_path
            self.say(f"warning: the recording {path} is over: no sensor says anything any more")
        if self.meter is None or self._told_gaps or over or summary.generated_tokens == 0:
            return
        if summary.energy_j is None:
            self._told_gaps = True
            machine = Machine() if self._replay is None else None
            lack = next((m for m in missing(machine, Reading(0.0)) if m.what == "power"), None)
            self.say(f"warning: the energy is not known: {lack.why if lack else 'no sensor tells the power'}")
            if lack and lack.hint:
                self.say(f"hint: {lack.hint}")
        elif self.meter.idle_w is None and summary.net_energy_per_token_j is None:
            self._told_gaps = True
            self.say(
                "warning: the machine was not seen idle before, so nothing is known above idle: --idle-power can say it"
            )


@contextmanager
def sensing(plan: SensingPlan, say: Say) -> Iterator[Sensing]:
    """Sample the sensors while inside, if they are wanted; for the energy, watch the idle machine first."""
    if not plan.wanted:
        yield Sensing(plan, say)
        return
    replay = None if plan.recording is None else Replay(plan.recording.readings)
    sensors: Sequence[Sensor] = detect(Machine(), plan.profile) if replay is None else [replay]
    with run_sampler(sensors) as sampler:
        model = None if plan.profile is None else PowerModel.of(plan.profile)
        meter = energy_meter(sampler, plan.idle_power_w, model) if plan.energy else None
        yield Sensing(plan, say, sampler, meter, replay)


class Steered:
    """A runtime under the targets of its run, or under none. Inside, its answers are steered."""

    def __init__(self, sensing: Sensing, runtime: Runtime) -> None:
        """The runtime's caches must be empty on entry."""
        self.sensing, self._runtime = sensing, runtime
        self._opened = ExitStack()
        self._pilot: Pilot | None = None

    def begin(self) -> None:
        """Before an answer that is not the first."""
        if self._pilot is not None:
            self._pilot.begin()

    def token(self) -> None:
        """After each token."""
        if self._pilot is not None:
            self._pilot.token()

    def reopen(self, options: RunOptions) -> None:
        """Reopen the runtime with other options, and hold the targets there, too.

        Raises UsageError if they cannot be held with these, and as Runtime.reopen does; then all stays as it is.
        """
        plan = plan_steering(self.sensing.plan.request, options)
        self._runtime.reopen(options)
        self._close()
        self._open(plan)

    def _open(self, plan: Plan | None) -> None:
        if plan is not None and self.sensing.sampler is not None:
            steered = SteeredPlayer(self._runtime.player, self._runtime.header.file_bytes)
            held = steering(plan, steered, self.sensing.sampler, self.sensing.say)
            self._pilot = self._opened.enter_context(held)

    def _close(self) -> None:
        self._pilot = None
        self._opened.close()

    def __enter__(self) -> Steered:
        self._open(self.sensing.plan.targets)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
