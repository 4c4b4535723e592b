"""Which sensors a machine has, and why it lacks others."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..profiles import Profile
from . import rapl
from .apple import find_apple
from .jetson import find_jetson
from .linux import find_linux, find_psutil
from .machine import Machine, Sensor
from .nvml import find_nvml
from .raspberry import PMIC_FIT, find_raspberry
from .reading import Reading

_THIS_MACHINE = Machine()


def _find_apple(machine: Machine) -> list[Sensor]:
    """None for a recording: what system that is from, its files say."""
    return find_apple(machine) if machine.root == Path("/") else []


# Of several sensors with a power the first one is believed: a board knows its whole self, a processor its package, a
# battery a screen, too, and a graphics card only itself.
_OTHERS = (find_jetson, _find_apple, rapl.find_rapl, find_linux, find_psutil, find_nvml)

_COUNTERS = "/sys/class/powercap/intel-rapl:*/energy_uj"


def detect(machine: Machine = _THIS_MACHINE, profile: Profile | None = None) -> list[Sensor]:
    """The sensors there seem to be, the most trustworthy first; whether they answer is known only by reading them.

    Those that `profile` names come before all others, in its order; its fit makes a Raspberry Pi's power.
    """
    fit = profile.power_fit if profile is not None else None
    found = [*find_raspberry(machine, fit or PMIC_FIT), *(sensor for find in _OTHERS for sensor in find(machine))]
    preferred = () if profile is None else profile.sensors
    return sorted(found, key=lambda s: preferred.index(s.name) if s.name in preferred else len(preferred))


def recorded_machine(root: Path) -> Machine:
    """A machine whose files are below `root`. No command is run: it would speak of the machine we are on."""
    return Machine(root, lambda _command: None)


def machine_name(machine: Machine = _THIS_MACHINE) -> str:
    """What the machine calls itself: by its device tree, its firmware (DMI), or the kind of its processor."""
    model = machine.text("proc/device-tree/model")
    if model is None:
        parts = [machine.text(f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
        model = " ".join(part for part in parts if part is not None)
    if model:
        return model
    return f"{platform.system()} {platform.machine()}" if machine.root == Path("/") else "unknown machine"


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that could be known of a machine, and is not."""

    what: str
    why: str
    hint: str = ""


def missing(machine: Machine | None, reading: Reading) -> Iterator[Missing]:
    """What a reading of the machine lacks that others have, and what to do about it; None: it is of a recording."""
    who = "no sensor" if machine is not None else "no sensor in the recording"
    if reading.power_w is None:
        yield _missing_power(machine) if machine is not None else Missing("power", f"{who} tells it")
    if reading.temp_c is None:
        yield Missing("temperature", f"{who} tells it")
    if reading.throttled_now is None:
        yield Missing("throttling", f"{who} tells whether heat or the supply slows the processor down")
    if machine is None:
        return
    if "nvml" not in reading.sensors and machine.text("proc/driver/nvidia/version") is not None:
        yield Missing("GPU", "NVIDIA's driver is there, but its NVML does not answer", "pip install nvidia-ml-py")


def _missing_power(machine: Machine) -> Missing:
    if _find_apple(machine):
        return Missing("power", "macmon is not installed, or does not answer", "brew install macmon")
    why = rapl.explain(machine)
    if why is not None and "root" in why:
        return Missing("power", why, f"until the next start, `sudo chmod a+r {_COUNTERS}` lets all users read it")
    return Missing("power", why or "no sensor tells it")
