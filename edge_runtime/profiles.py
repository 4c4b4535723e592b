"""Which device this is: profiles by name, and the one that fits the machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from .profile_schema import Build, Detect, PowerFit, PowerModel, Profile, Targets, Thermal, read_profile, unknown

__all__ = [
    "DEVICE_ENV",
    "Build",
    "Detect",
    "Detected",
    "PowerFit",
    "PowerModel",
    "Profile",
    "RunDefaults",
    "Targets",
    "Thermal",
    "choose_profile",
    "describe",
    "detect_profile",
    "load_profile",
    "profile_names",
    "profiles_dir",
    "run_defaults",
    "usable_cores",
]

DEVICE_ENV = "EDGE_RUNTIME_DEVICE"
THIS_MACHINE = "native"  # names no kind of device but the very machine: it is looked at
FALLBACK = "generic"
DEFAULT_N_BATCH = 128

_DEVICE_TREES = ("proc/device-tree", "sys/firmware/devicetree/base")
_DMI = "sys/class/dmi/id"


class Files(Protocol):
    """The machine's files, as sensors.machine.Machine has them."""

    def text(self, path: str) -> str | None:
        """What the file below the root says; None if it cannot be read."""


@dataclass(frozen=True, slots=True)
class Detected:
    """A profile, and why it is this one, in words that follow "because"."""

    profile: Profile
    why: str


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a machine says of itself."""

    compatible: tuple[str, ...]  # the device tree's names, from the board to the family of its chip
    dmi: tuple[str, ...]  # "vendor product" of system and board
    system: str
    machine: str

    def __str__(self) -> str:
        return f"{self.system or 'an unknown system'} on {self.machine or 'an unknown processor'}"


def profiles_dir() -> Path:
    """Where the profiles are: in an installed package, or beside it in the source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "devices"
    return inside if inside.is_dir() else package.parent / "devices"


def profile_names(folder: Path | None = None) -> list[str]:
    """Names of the profiles in `folder`, or of the project's own; sorted."""
    return sorted(path.stem for path in (folder or profiles_dir()).glob("*.toml"))


def load_profile(name: str, folder: Path | None = None) -> Profile:
    """The profile of this name, or of this path if it ends in .toml.

    Raises UsageError: no such profile, or something wrong in its file.
    """
    if name.endswith(".toml"):
        return read_profile(Path(name))
    folder = folder or profiles_dir()
    names = profile_names(folder)
    if name not in names:
        raise unknown(f"unknown device {name!r}", name, names)
    return read_profile(folder / f"{name}.toml")


def choose_profile(
    machine: Files,
    system: str,
    machine_arch: str,
    name: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Detected:
    """The profile asked for by name, else by $EDGE_RUNTIME_DEVICE, else the one that fits, else `generic`.

    `native` asks for this very machine, so that it is looked at. Raises UsageError as load_profile does.
    """
    asked = ((name, "it was asked for"), (environment.get(DEVICE_ENV), f"${DEVICE_ENV} names it"))
    wanted, why = next(((n, reason) for n, reason in asked if n), (THIS_MACHINE, ""))
    if wanted != THIS_MACHINE:
        return Detected(load_profile(wanted), why)
    return detect_profile(machine, system, machine_arch)


def detect_profile(machine: Files, system: str, machine_arch: str, folder: Path | None = None) -> Detected:
    """The profile that fits the machine best, `generic` if none does.

    `system` and `machine_arch` are as `uname` gives them: "Linux", "aarch64". A name in the device tree is better than
    one in DMI, and that better than the kind of processor; in the device tree, the earlier a name stands, the better.
    Raises UsageError if a profile cannot be read.
    """
    identity = _identify(machine, system, machine_arch)
    profiles = [load_profile(name, folder) for name in profile_names(folder)]
    fits = [(rank, p.name, why, p) for p in profiles for rank, why in _fits(p.detect, identity)]
    if fits:
        _, _, why, profile = min(fits, key=lambda fit: fit[:2])
        return Detected(profile, why)
    return Detected(load_profile(FALLBACK, folder), f"no other profile is for {identity}")


def _identify(machine: Files, system: str, machine_arch: str) -> _Identity:
    trees = (machine.text(f"{tree}/compatible") for tree in _DEVICE_TREES)
    compatible = next((text for text in trees if text), "").split("\0")
    dmi = [
        " ".join(filter(None, (machine.text(f"{_DMI}/{vendor}"), machine.text(f"{_DMI}/{product}"))))
        for vendor, product in (("sys_vendor", "product_name"), ("board_vendor", "board_name"))
    ]
    return _Identity(_shown(compatible), _shown(dmi), system, machine_arch)


def _shown(names: Iterable[str]) -> tuple[str, ...]:
    """The names that can be shown to a person: firmware may say anything."""
    return tuple(name for name in names if name and name.isprintable())


def _fits(detect: Detect, identity: _Identity) -> Iterator[tuple[tuple[int, int], str]]:
    """Each reason for a profile, with its rank: lower is better. Nothing if it is for another kind of machine."""
    needed = ((detect.systems, identity.system), (detect.machines, identity.machine))
    if any(patterns and not _matches(found, patterns) for patterns, found in needed):
        return
    lists = (
        (identity.compatible, detect.device_tree, "the device tree names"),
        (identity.dmi, detect.dmi, "the firmware (DMI) names"),
    )
    for kind, (names, patterns, what) in enumerate(lists):
        for place, name in enumerate(names):
            if _matches(name, patterns):
                yield (kind, place), f"{what} {name}"
    if (detect.systems or detect.machines) and not (detect.device_tree or detect.dmi):
        n_needed = sum(bool(patterns) for patterns, _ in needed)
        yield (len(lists), -n_needed), f"this is {identity}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class RunDefaults:
    """How a model runs on a device where nobody says otherwise."""

    n_threads: int  # 0: one per physical core
    n_batch: int  # prompt tokens computed at once


def run_defaults(profile: Profile, n_usable: int) -> RunDefaults:
    """What the profile states, with no more threads than the `n_usable` cores that a process may use."""
    return RunDefaults(min(profile.n_threads, n_usable), profile.n_ubatch or DEFAULT_N_BATCH)


def usable_cores() -> int:
    """Cores that this process may use, their second threads counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(profile: Profile) -> str:
    """What a profile sets, in one line."""
    parts = [
        f"{profile.n_threads} threads" if profile.n_threads else "a thread per physical core",
        f"prompts in batches of {profile.n_ubatch}" if profile.n_ubatch else "",
        f"sensors {', '.join(profile.sensors)}" if profile.sensors else "",
        f"{profile.power.label} power model" if profile.power else "no power model",
    ]
    if profile.thermal:
        parts.append(f"ceiling {profile.thermal.ceiling_c:g} °C, throttles at {profile.thermal.throttle_c:g} °C")
    set_targets = [name for name, targets in profile.targets.items() if targets != Targets()]
    parts.append(f"targets {', '.join(set_targets)}" if set_targets else "")
    return "; ".join(filter(None, parts))
