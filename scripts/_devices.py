"""What a build needs of the device profiles. The package's own module reads and checks them, installed or not."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from _upstream import ROOT, BuildError

sys.path.insert(0, str(ROOT))  # these modules of the package need nothing but the standard library, and tomli on 3.10

from edge_runtime.errors import EdgeError
from edge_runtime.profiles import load_profile, profile_names

DEVICES = ROOT / "devices"


@dataclass(frozen=True)
class Device:
    name: str
    description: str
    systems: tuple[str, ...]  # empty: any
    machines: tuple[str, ...]  # empty: any
    cmake: dict[str, str]

    @property
    def native(self) -> bool:
        """Built for the very processor it is built on."""
        return self.cmake.get("GGML_NATIVE") == "ON"

    @property
    def flags(self) -> list[str]:
        return [f"-D{name}={value}" for name, value in sorted(self.cmake.items())]


def device_names(folder: Path = DEVICES) -> list[str]:
    return profile_names(folder)


def load_device(name: str, folder: Path = DEVICES) -> Device:
    try:
        profile = load_profile(name, folder)
    except EdgeError as error:
        raise BuildError("cannot use the device profile", error.message, error.hint) from None
    build = profile.build
    return Device(profile.name, profile.description, build.systems, build.machines, dict(build.cmake))


def check_host(device: Device, system: str = "", machine: str = "") -> None:
    """A profile with another processor's flags would fail deep inside the compiler, so refuse it here."""
    system, machine = system or platform.system(), machine or platform.machine()
    for wanted, here in ((device.systems, system), (device.machines, machine)):
        if wanted and here not in wanted:
            raise BuildError(
                f"cannot build for {device.name!r} here",
                f"it is for {' or '.join(wanted)}, this machine is {system} {machine}",
                "build on the board itself, or use --device native",
            )
