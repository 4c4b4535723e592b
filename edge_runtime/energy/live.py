"""The energy of answers that are being given: readings of a sampler that runs, and what the machine takes when idle."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

from ..sensors.machine import Sensor
from ..sensors.sampler import Sampler, Timing
from .account import MIN_IDLE_READINGS, idle_power
from .model import PowerModel
from .request import Meter

INTERVAL_S = 0.2
IDLE_WATCH_S = 1.5  # a sensor's first reading has often no power
_IDLE_WATCHES = 4  # at most: dear sensors are read seldom
_TIMING = Timing(now=time.perf_counter)  # the clock of answers


def run_sampler(sensors: Sequence[Sensor], timing: Timing = _TIMING) -> Sampler:
    """What samples `sensors` for a run's answers, by their clock; it begins with `with`."""
    return Sampler(sensors, INTERVAL_S, timing=timing)


def energy_meter(
    sampler: Sampler,
    idle_w: float | None = None,
    model: PowerModel | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Meter:
    """The meter of answers while `sampler` runs. Without `idle_w`, the machine is watched for a moment, as it idles.

    The meter's idle power is None if it does not. `model` is used where no sensor has a power.
    """
    if idle_w is None:
        idle_w = _watch_idling(sampler, sleep)
    return Meter(sampler.since, idle_w, model, os.cpu_count() or 1)


def _watch_idling(sampler: Sampler, sleep: Callable[[float], None]) -> float | None:
    """The idle power, as soon as there are readings enough; None if there is no power, or the machine is busy."""
    for _ in range(_IDLE_WATCHES):
        sleep(IDLE_WATCH_S)
        readings = sampler.since(-math.inf)
        n_powered = sum(reading.power_w is not None for reading in readings)
        if n_powered == 0 or n_powered >= MIN_IDLE_READINGS:
            break
    return idle_power(readings)
