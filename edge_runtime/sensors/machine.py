"""Where sensors look: a tree of files and a way to run commands, both replaceable by a recording.

Files of /sys vanish, move, hold garbage or are forbidden, and commands hang. Here all of that is an absent answer.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .reading import Reading

Run = Callable[[Sequence[str]], str | None]  # a command's output; None if it is missing, fails or takes too long

_PATIENCE_S = 2.0


def run_command(command: Sequence[str]) -> str | None:
    """Standard output of `command`, None if it is not there, fails, or takes longer than two seconds."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine to read: `root` stands for /, so that "sys/class/thermal" below it is the kernel's or a recording."""

    root: Path = Path("/")
    run: Run = run_command

    def text(self, path: str) -> str | None:
        """What the file says, without the white space around it; None if it cannot be read or is empty."""
        try:
            return (self.root / path).read_bytes().decode("utf-8", "replace").strip(" \t\r\n\0") or None
        except OSError:
            return None

    def number(self, path: str) -> float | None:
        """The finite number in the file; None if there is none."""
        text = self.text(path)
        try:
            value = float(text) if text is not None else math.nan
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def find(self, pattern: str) -> list[str]:
        """Paths below the root that match the glob `pattern`, sorted; none where a folder cannot be listed."""
        try:
            return sorted(str(found.relative_to(self.root)) for found in self.root.glob(pattern))
        except OSError:
            return []


class Sensor(Protocol):
    """Something that knows a part of a reading. `read` never raises; what it does not know is None."""

    @property
    def name(self) -> str:
        """Short and stable: it is shown, recorded and named in profiles."""

    def read(self, time_s: float) -> Reading:
        """The part of a reading this sensor knows, now; `sensors` names it if it knew anything."""
