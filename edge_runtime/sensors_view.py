"""`edge-run sensors`: readings as a live table, as lines, as JSON, and in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import display
from .errors import EdgeError, UsageError
from .profiles import Profile, choose_profile
from .sensors.detect import detect, machine_name, recorded_machine
from .sensors.machine import Machine, Sensor
from .sensors.reading import Battery, PowerSource, Reading
from .sensors.recording import Recorder, Replay, read_recording, reading_record
from .sensors.sampler import SensorGroup

if TYPE_CHECKING:
    from rich.console import Console, Group

_UNKNOWN = "-"

Show = Callable[[Reading], None]
Find = Callable[[Machine, Profile], list[Sensor]]


@dataclass(frozen=True, slots=True)
class SensorsRequest:
    """What the verb was asked for."""

    interval_s: float = 1.0
    count: int | None = None  # readings; None: until interrupted, or the recording ends
    once: bool = False
    json: bool = False
    record: Path | None = None
    force: bool = False
    replay: Path | None = None
    root: Path | None = None
    device: str | None = None  # name or path of a profile; None: the one that fits


@dataclass(frozen=True, slots=True)
class _Source:
    """Where readings come from; `replay` where that is a recording."""

    machine: str
    sensors: list[Sensor]
    hint: str = ""  # what to do if none answers
    replay: Replay | None = None


def show_sensors(
    request: SensorsRequest,
    find: Find = detect,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show readings, and record them if that is wanted, until there are enough of them or Ctrl-C.

    Raises UsageError for requests that contradict themselves, EdgeError if no sensor answers or a recording is damaged.
    """
    _check(request)
    source = _open_source(request, find)
    group = SensorGroup(source.sensors, _warn)
    with contextlib.suppress(KeyboardInterrupt):
        if source.replay is None:
            group.settle(now, sleep)
        readings = _paced(group, request.interval_s, now, sleep)
        first = next(readings)
        if source.replay is None and not first.sensors:
            raise EdgeError("no sensor of this machine answers", source.hint)
        wanted = itertools.islice(itertools.chain([first], readings), 1 if request.once else request.count)
        with _recording(request, source.machine) as record, _showing(request, source.machine) as show:
            for reading in wanted:
                if source.replay is not None and source.replay.ended(reading.time_s):
                    break
                record(reading)
                show(reading)


def _check(request: SensorsRequest) -> None:
    if not request.interval_s > 0:  # NaN, too
        raise UsageError(f"an interval of {request.interval_s} s is none", "give seconds: --interval 0.5")
    if request.once and request.count is not None:
        raise UsageError("--once and --count exclude each other", "drop one of them")
    if request.force and request.record is None:
        raise UsageError("--force means nothing without --record", "name a file with --record")
    if request.replay is not None and request.record is not None:
        raise UsageError("--replay and --record exclude each other", "copy the file, it is a recording already")
    if request.replay is not None and request.root is not None:
        raise UsageError("--replay and --root exclude each other", "give one source of readings")
    if request.replay is not None and request.device is not None:
        raise UsageError("--replay and --device exclude each other", "a recording's sensors have spoken")
    if request.root is not None and not request.root.is_dir():
        raise UsageError(f"{request.root} is no folder", "--root names one that stands for /, with sys and proc in it")


def _open_source(request: SensorsRequest, find: Find) -> _Source:
    if request.replay is not None:
        recording = read_recording(request.replay, _warn)
        replay = Replay(recording.readings)
        return _Source(f"{recording.machine} (a recording)", [replay], replay=replay)
    machine = Machine() if request.root is None else recorded_machine(request.root)
    hint = "containers and virtual machines hide them; `edge-run doctor` says what is missing"
    if request.root is not None:
        hint = f"{request.root} stands for /: sensors are looked for in its folders sys and proc"
    profile = choose_profile(machine, platform.system(), platform.machine(), request.device).profile
    return _Source(machine_name(machine), find(machine, profile), hint)


def _paced(
    group: SensorGroup, interval_s: float, now: Callable[[], float], sleep: Callable[[float], None]
) -> Iterator[Reading]:
    """A reading each `interval_s`, without end; late if sensors or the consumer take longer."""
    while True:
        start_s = now()
        yield group.read(start_s)
        sleep(max(0.0, start_s + interval_s - now()))


@contextlib.contextmanager
def _recording(request: SensorsRequest, machine: str) -> Iterator[Show]:
    """What writes readings into the file that is wanted, if one is. Raises UsageError as Recorder does."""
    if request.record is None:
        yield lambda _reading: None
        return
    with Recorder(request.record, machine, overwrite=request.force) as recorder:
        try:
            yield recorder.append
        finally:
            n = recorder.n_readings
            display.tell(f"{n:,} reading{'' if n == 1 else 's'} in {request.record}")


def _warn(text: str) -> None:
    display.tell(f"warning: {display.harmless(text)}")


# ── in words ────────────────────────────────────────────────────────────────────────────────────────────────────────


def entries(reading: Reading) -> list[tuple[str, str]]:
    """All that a reading can tell, each thing with its name; - where it is not known."""
    power = _UNKNOWN if reading.power_w is None else _watts(reading.power_w, reading.power_source)
    rails = [(f"  {rail.name}", _watts(rail.power_w, rail.source)) for rail in reading.rails]
    return [
        ("temperature", _UNKNOWN if reading.temp_c is None else f"{reading.temp_c:.1f} °C"),
        ("power", power),
        *rails,
        ("clock", _UNKNOWN if reading.freq_hz is None else _frequency(reading.freq_hz)),
        ("load", _UNKNOWN if reading.load is None else f"{reading.load:.0%}"),
        ("throttled now", _reasons(reading.throttled_now)),
        ("  since boot", _reasons(reading.throttled_since_boot)),
        ("battery", _UNKNOWN if reading.battery is None else _battery(reading.battery)),
        ("sensors", ", ".join(reading.sensors) or "none answers"),
    ]


def summary(reading: Reading) -> str:
    """What a reading knows, in one line."""
    shown = dataclasses.replace(reading, rails=())
    forms = {
        "load": "{} busy",
        "throttled now": "throttled: {}",
        "  since boot": "since boot: {}",
        "battery": "battery {}",
    }
    known = [
        forms.get(name, "{}").format(text) for name, text in entries(shown) if text != _UNKNOWN and name != "sensors"
    ]
    rails = [f"{rail.name} {rail.power_w:.2f} W" for rail in reading.rails] if reading.power_w is None else []
    return display.harmless(", ".join([*known, *rails])) or "nothing is known"


def _watts(power_w: float, source: PowerSource | None) -> str:
    return f"{power_w:.2f} W" + (f" {source.value}" if source is not None else "")


def _frequency(freq_hz: float) -> str:
    return f"{freq_hz / 1e9:.2f} GHz" if freq_hz >= 1e9 else f"{freq_hz / 1e6:.0f} MHz"


def _reasons(reasons: frozenset[str] | None) -> str:
    return _UNKNOWN if reasons is None else ", ".join(sorted(reasons)) or "no"


def _battery(battery: Battery) -> str:
    words = {True: ", charging", False: ", not charging", None: ""}
    return f"{battery.percent:.0f}%{words[battery.charging]}"


# ── on the screen ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _showing(request: SensorsRequest, machine: str) -> Iterator[Show]:
    """What shows readings: as JSON, as one table, as a table that is renewed on a terminal, or as lines elsewhere."""
    if request.json:
        yield lambda reading: display.write_json(reading_record(reading))
    elif request.once:
        yield lambda reading: _console().print(table(reading, machine))
    elif sys.stdout.isatty() and _console().is_terminal and not _console().is_dumb_terminal:
        from rich.live import Live

        with Live(console=_console(), auto_refresh=False) as live:
            yield lambda reading: live.update(table(reading, f"{machine}; Ctrl-C ends"), refresh=True)
    else:
        yield _line_printer()


def _line_printer() -> Show:
    """Prints a line for each reading, with the seconds since the first."""
    start_s: float | None = None

    def show(reading: Reading) -> None:
        nonlocal start_s
        start_s = reading.time_s if start_s is None else start_s
        print(f"{reading.time_s - start_s:8.1f} s  {summary(reading)}", flush=True)

    return show


def table(reading: Reading, title: str) -> Group:
    """A reading, one quantity a line; what slows the machine down is red where colours are."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column()
    for name, text in entries(reading):
        alarming = name == "throttled now" and bool(reading.throttled_now)
        shown.add_row(Text(display.harmless(name)), Text(display.harmless(text), style="red" if alarming else ""))
    return Group(Text(display.harmless(title), style="bold"), shown)


def _console() -> Console:
    from rich.console import Console

    colour = display.wants_colour(sys.stdout)
    # a pipe has no width: nothing must be cut there
    width = None if sys.stdout.isatty() else 200
    return Console(width=width, color_system="standard" if colour else None, highlight=False)
