"""What sensors and controller take of the time in which a model answers."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..energy.live import INTERVAL_S
from ..errors import UsageError
from ..generate import RunOptions, Runtime
from ..profiles import choose_profile
from ..sensors.detect import detect
from ..sensors.machine import Machine
from ..sensors.sampler import Sampler, Timing, thread_cpu_s
from ..steering import SteeredPlayer, SteeringRequest, plan_steering, steering
from .turns import Countdown, Quartiles, in_turns, quartiles, ratios

_OUT_OF_REACH_MS = 0.001  # a time per token that no setting holds: the fastest is used, and nothing ever rests


@dataclass(frozen=True, slots=True)
class ControlCosts:
    """Shares are medians (quartiles) over repeats, each of one answer."""

    sensors: tuple[str, ...]
    controller: Quartiles  # time in the controller ÷ time of decoding
    sampler: Quartiles  # processor time of the sampler ÷ time of decoding, of one core
    speed: Quartiles  # decoding under targets ÷ without; the sensors are read all the time
    tokens: int  # of an answer


class _CpuClock:
    """Processor time as a sampler counts it, and how much of it that sampler has used so far."""

    def __init__(self) -> None:
        self._first: float | None = None
        self.used_s = 0.0

    def __call__(self) -> float:
        now = thread_cpu_s()
        self._first = now if self._first is None else self._first
        self.used_s = now - self._first
        return now


def measure_control(
    options: RunOptions,
    device: str | None,
    prompt: Sequence[int],
    *,
    tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> ControlCosts:
    """Answers of `tokens` tokens with and without a controller, in turn, the same text, while sensors are read.

    The target is out of reach, so that the controller looks twice a second and always wants the fastest setting.
    Raises as `Runtime` and `plan_steering` do, UsageError for an answer that ends too early to time.
    """
    machine = Machine()
    plan = plan_steering(SteeringRequest(latency_ms=_OUT_OF_REACH_MS, device=device), options, machine)
    assert plan is not None
    profile = choose_profile(machine, platform.system(), platform.machine(), device).profile
    cpu, inside_s = _CpuClock(), [0.0]
    with Runtime(options, say, say) as runtime:

        def answer(after: Callable[[], None]) -> tuple[float, float, float]:
            """(tokens per second, seconds of decoding, processor seconds of the sampler in them)."""
            runtime.engine.rollback(0)
            inside_s[0], used_s, n = 0.0, cpu.used_s, 0
            started = 0.0
            for _ in runtime.stream(prompt, tokens):
                started = started or time.perf_counter()
                after()
                n += 1
            took_s = time.perf_counter() - started
            if n < tokens // 2:
                raise UsageError(f"the answer ended after {n} tokens", "give another --prompt")
            return (n - 1) / took_s, took_s, cpu.used_s - used_s

        sensors = detect(machine, profile)
        with (
            Sampler(sensors, INTERVAL_S, timing=Timing(now=time.perf_counter, cpu=cpu)) as sampler,
            steering(
                plan, SteeredPlayer(runtime.player, runtime.header.file_bytes), sampler, lambda _text: None
            ) as pilot,
        ):

            def timed() -> None:
                start = time.perf_counter()
                pilot.token()
                inside_s[0] += time.perf_counter() - start

            def steered() -> tuple[float, float, float]:
                pilot.begin()
                speed, took_s, used_s = answer(timed)
                return speed, inside_s[0] / took_s, used_s / took_s

            countdown = Countdown(2 * (repeats + 1), say)
            found = in_turns(
                {"answer": {"steered": steered, "alone": lambda: answer(lambda: None)}},
                repeats,
                done=countdown.step,
            )["answer"]
    return ControlCosts(
        tuple(sensor.name for sensor in sensors),
        quartiles([share for _, share, _ in found["steered"]]),
        quartiles([share for _, _, share in found["steered"]]),
        ratios([speed for speed, _, _ in found["steered"]], [speed for speed, _, _ in found["alone"]]),
        tokens,
    )
