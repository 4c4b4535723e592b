"""Talking with systemd through `systemctl`, and what it knows of the service."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import EdgeError
from .unit import SERVICE

_PATIENCE_S = 120.0  # a start waits until the model is loaded, unless it is told not to
_PROPERTIES = (
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "UnitFileState",
    "StatusText",
    "MainPID",
    "ExecMainStatus",
    "NRestarts",
    "ActiveEnterTimestamp",
    "WatchdogUSec",
    "WatchdogTimestamp",
    "MemoryCurrent",
    "MemoryPeak",
    "MemoryMax",
    "NeedDaemonReload",
)


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


Run = Callable[[Sequence[str]], Done]


def run(command: Sequence[str]) -> Done:
    """Raises EdgeError if the command is not there or takes minutes."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            env={**os.environ, "LC_ALL": "C", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"},
        )
    except FileNotFoundError:
        raise EdgeError(f"{command[0]} is not there", "this needs a Linux system with systemd") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EdgeError(f"{' '.join(command)} failed: {error}", "see `journalctl -xe`") from None
    return Done(done.returncode, done.stdout, done.stderr)


class Systemctl:
    """The system's manager, or the user's own."""

    def __init__(self, *, user: bool, run: Run = run, root: Path = Path("/")) -> None:
        """`root` stands for /, where a running system has /run/systemd/system."""
        self.user, self._run, self._root = user, run, root

    def is_running(self) -> bool:
        """Whether there is a manager to talk to."""
        if not (self._root / "run/systemd/system").is_dir():
            return False
        return not self.user or self._call("show", "--property=Version").code == 0

    def version(self) -> int | None:
        """As 252; None if it cannot be told."""
        found = re.match(r"systemd (\d+)", self._run(["systemctl", "--version"]).out)
        return int(found[1]) if found else None

    def must(self, *arguments: str) -> None:
        """Raises EdgeError with systemd's words if it refuses."""
        done = self._call(*arguments)
        if done.code != 0:
            lines = done.err.strip().splitlines() or [f"exit code {done.code}"]
            raise EdgeError(f"`{self.words(*arguments)}` failed: {lines[0]}", "see `journalctl -xe`")

    def reset_failed(self, *names: str) -> None:
        """Forget that units failed; after too many failures systemd would start them no more."""
        self._call("reset-failed", *names)

    def words(self, *arguments: str) -> str:
        """The command as a person would type it."""
        return " ".join(["systemctl", *(["--user"] if self.user else []), *arguments])

    def service(self) -> ServiceStatus:
        """What systemd knows of the service. Raises EdgeError if it does not answer."""
        done = self._call("show", SERVICE, f"--property={','.join(_PROPERTIES)}")
        if done.code != 0:
            raise EdgeError(f"systemd does not answer: {done.err.strip() or done.code}", "see `systemctl status`")
        return parse_status(done.out)

    def _call(self, *arguments: str) -> Done:
        return self._run(["systemctl", *(["--user"] if self.user else []), "--no-ask-password", *arguments])


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """The service as systemd sees it; None is not known, or not set."""

    installed: bool
    state: str  # "active", "failed" …
    detail: str  # "running", "dead" …
    enabled: str  # "enabled", "disabled" …
    status: str  # the service's own last word, one line
    result: str  # "success", "watchdog", "oom-kill" …
    pid: int | None
    exit_status: int | None
    restarts: int | None
    since: str
    watchdog_s: float | None
    watchdog_heard: str  # when it last said that it is alive
    memory_bytes: int | None
    memory_peak_bytes: int | None
    memory_max_bytes: int | None
    needs_reload: bool  # the unit's file is newer than what systemd has read

    @property
    def active(self) -> bool:
        return self.state in ("active", "reloading")


def parse_status(text: str) -> ServiceStatus:
    """From the lines of `systemctl show`."""
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def number(name: str) -> int | None:
        value = told.get(name, "")
        # 2⁶⁴ - 1 is systemd's "not set"
        return int(value) if value.isascii() and value.isdigit() and int(value) < 2**64 - 1 else None

    return ServiceStatus(
        installed=told.get("LoadState", "not-found") not in ("not-found", ""),
        state=told.get("ActiveState", "unknown"),
        detail=told.get("SubState", ""),
        enabled=told.get("UnitFileState", ""),
        status=told.get("StatusText", ""),
        result=told.get("Result", ""),
        pid=number("MainPID") or None,
        exit_status=number("ExecMainStatus"),
        restarts=number("NRestarts"),
        since=told.get("ActiveEnterTimestamp", ""),
        watchdog_s=_span_s(told.get("WatchdogUSec", "")),
        watchdog_heard=told.get("WatchdogTimestamp", ""),
        memory_bytes=number("MemoryCurrent"),
        memory_peak_bytes=number("MemoryPeak"),
        memory_max_bytes=number("MemoryMax"),
        needs_reload=told.get("NeedDaemonReload") == "yes",
    )


_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _span_s(text: str) -> float | None:
    """`3min`, `1min 30s` → seconds; None for 0 and what is no span."""
    parts = [re.fullmatch(r"([0-9.]+)(us|ms|s|min|h|d)", part) for part in text.split()]
    try:
        seconds = math.fsum(float(p[1]) * _UNITS_S[p[2]] for p in parts if p is not None)
    except ValueError:
        return None
    return seconds if seconds and None not in parts else None
