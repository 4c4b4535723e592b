"""What an `EdgeLlama` holds: the device's profile and targets, by the sensors that run as long as it is open."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real

from .energy.live import run_sampler
from .errors import UsageError
from .pilot import Pilot
from .playing import Player
from .profiles import RunDefaults, choose_profile, run_defaults, usable_cores
from .resolve import RunOptions
from .sensors.detect import detect
from .sensors.machine import Machine
from .steering import Plan, SteeredPlayer, SteeringRequest, plan_steering, steering

_logger = logging.getLogger("edge_runtime")
_NUMBERS = ("power_cap_w", "ceiling_c", "latency_ms")


def defaults_of(profile: str | None) -> RunDefaults | None:
    """Threads and batch of a profile by name or path; None without one. Raises UsageError for one that is not there."""
    if profile is None:
        return None
    if not isinstance(profile, str) or not profile:
        raise UsageError(f"{profile!r} is no profile", "give its name, or the path of a .toml file")
    found = choose_profile(Machine(), platform.system(), platform.machine(), profile).profile
    return run_defaults(found, usable_cores())


def plan_targets(targets: str | Mapping[str, float] | None, profile: str | None, options: RunOptions) -> Plan | None:
    """What is to be held, checked before anything is loaded; None if nothing is. Raises UsageError, PackError."""
    if targets is None:
        return None
    if isinstance(targets, str):
        return plan_steering(SteeringRequest(target=targets, device=profile), options)
    named = targets if isinstance(targets, Mapping) else {}
    bad = [f"{key}={value!r}" for key, value in named.items() if key not in _NUMBERS or not _is_number(value)]
    if bad or not named:
        raise UsageError(
            f"these are no targets: {', '.join(bad) or repr(targets)}",
            f"give the name of one of the profile's targets, or a dict of numbers by name: {', '.join(_NUMBERS)}",
        )
    return plan_steering(SteeringRequest(**named, device=profile), options)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@contextmanager
def held(plan: Plan, player: Player, file_bytes: int) -> Iterator[Pilot]:
    """The targets are held while inside. The player's caches must be empty."""
    steered = SteeredPlayer(player, file_bytes)
    with run_sampler(detect(Machine(), plan.profile)) as sampler, steering(plan, steered, sampler, _tell) as pilot:
        yield pilot


def _tell(text: str) -> None:
    (_logger.warning if text.startswith("warning: ") else _logger.info)(text.removeprefix("warning: "))
