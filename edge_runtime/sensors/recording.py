"""Readings in a file, and back: JSON lines, the first of which says what they are.

    {"format": "edge-runtime sensors", "version": 1, "machine": "Raspberry Pi 5 Model B Rev 1.0"}
    {"time_s": 12.5, "power_w": 4.1, "power_source": "measured", "rails": [], "temp_c": 51.2, …}

The other lines have the fields of `Reading`. What is not known is null, or not there at all; reasons to throttle are a
list, and [] means that there are none.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import EdgeError, UsageError
from .reading import Battery, PowerSource, Rail, Reading

FORMAT = "edge-runtime sensors"
VERSION = 1
_MAX_LINE = 2**20  # bytes
_RECORD_HINT = "make one with `edge-run sensors --record FILE`"
_FIELDS = tuple(field.name for field in dataclasses.fields(Reading))


# ── one reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


def reading_record(reading: Reading) -> dict[str, Any]:
    """A reading for JSON; what is not a finite number is not known, and `parse_reading` gives back all the rest."""
    battery = reading.battery
    return {
        "time_s": reading.time_s,
        "power_w": _finite(reading.power_w),
        "power_source": None if reading.power_source is None else reading.power_source.value,
        "rails": [
            {"name": rail.name, "power_w": rail.power_w, "source": rail.source.value}
            for rail in reading.rails
            if math.isfinite(rail.power_w)
        ],
        "temp_c": _finite(reading.temp_c),
        "freq_hz": _finite(reading.freq_hz),
        "throttled_now": _reasons(reading.throttled_now),
        "throttled_since_boot": _reasons(reading.throttled_since_boot),
        "battery": (
            None
            if battery is None or not math.isfinite(battery.percent)
            else {"percent": battery.percent, "charging": battery.charging}
        ),
        "load": _finite(reading.load),
        "sensors": list(reading.sensors),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _reasons(reasons: frozenset[str] | None) -> list[str] | None:
    return None if reasons is None else sorted(reasons)


def parse_reading(record: Any) -> Reading:
    """The reading that `reading_record` wrote. Raises ValueError in words for a person."""
    fields = _Fields(record, "a reading", _FIELDS)
    battery = fields.get("battery")
    return Reading(
        time_s=fields.number("time_s"),
        power_w=fields.optional_number("power_w"),
        power_source=None if fields.get("power_source") is None else fields.source("power_source"),
        rails=tuple(_parse_rail(rail) for rail in fields.list("rails")),
        temp_c=fields.optional_number("temp_c"),
        freq_hz=fields.optional_number("freq_hz"),
        throttled_now=None if fields.get("throttled_now") is None else frozenset(fields.texts("throttled_now")),
        throttled_since_boot=(
            None if fields.get("throttled_since_boot") is None else frozenset(fields.texts("throttled_since_boot"))
        ),
        battery=None if battery is None else _parse_battery(battery),
        load=fields.optional_number("load"),
        sensors=fields.texts("sensors"),
    )


def _parse_rail(record: Any) -> Rail:
    fields = _Fields(record, "a rail", ("name", "power_w", "source"))
    source = PowerSource.MEASURED if fields.get("source") is None else fields.source("source")
    return Rail(fields.text("name"), fields.number("power_w"), source)


def _parse_battery(record: Any) -> Battery:
    fields = _Fields(record, "a battery", ("percent", "charging"))
    charging = fields.get("charging")
    if not (charging is None or isinstance(charging, bool)):
        raise ValueError('"charging" is not true, false or null')
    return Battery(fields.number("percent"), charging)


class _Fields:
    """The fields of a JSON object, each by the type it must have. All raise ValueError."""

    def __init__(self, record: Any, what: str, known: Sequence[str]) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"{what} is a JSON object, and this is none")
        self._record: dict[str, Any] = record
        for name in record:
            if name not in known:
                raise ValueError(f'{what} has no field "{name}"; it has {", ".join(known)}')

    def get(self, name: str) -> Any:
        return self._record.get(name)

    def number(self, name: str) -> float:
        value = self.get(name)
        try:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except OverflowError:
            pass  # a whole number with hundreds of digits
        raise ValueError(f'"{name}" is not a finite number' if name in self._record else f'"{name}" is missing')

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(f'"{name}" is not a text' if name in self._record else f'"{name}" is missing')
        return value

    def list(self, name: str) -> Sequence[Any]:
        value = self.get(name)
        if not (value is None or isinstance(value, list)):
            raise ValueError(f'"{name}" is not a list')
        return value or []

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.list(name)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f'"{name}" is not a list of texts')
        return tuple(values)

    def source(self, name: str) -> PowerSource:
        value = self.text(name)
        try:
            return PowerSource(value)
        except ValueError:
            raise ValueError(f'"{name}" is "{value}", not {" or ".join(s.value for s in PowerSource)}') from None


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Recorder:
    """Writes a recording, each line by one call of the system: interrupted or killed, it leaves whole lines."""

    def __init__(self, path: Path, machine: str, *, overwrite: bool = False) -> None:
        """Open the file and write its header. Raises UsageError if there is a file or none can be made."""
        self.path = path
        self.n_readings = 0
        try:
            self._file = path.open("wb" if overwrite else "xb", buffering=0)
        except FileExistsError:
            raise UsageError(f"{path} is there already", "name another file, or overwrite it with --force") from None
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror}", "name a file in a folder of yours"
            ) from None
        try:
            self._write({"format": FORMAT, "version": VERSION, "machine": machine})
        except EdgeError:
            self.close()
            raise

    def append(self, reading: Reading) -> None:
        """Write one reading. Raises EdgeError if the disk is full."""
        self._write(reading_record(reading))
        self.n_readings += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise EdgeError(
                f"{self.path} cannot be written: {error.strerror}", "make room on the disk; what is there can be read"
            ) from None


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Recording:
    """A machine's description and at least one reading, in the order of their times."""

    machine: str
    readings: tuple[Reading, ...]


def read_recording(path: Path, warn: Callable[[str], None] = lambda _text: None) -> Recording:
    """Read a recording; a last line that is cut short is left out, and `warn` told.

    Raises EdgeError that names the line and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            lines = _lines(file, path)
            machine = _parse_header(next(lines, b""), path)
            readings = tuple(_readings(lines, path, warn))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the name and its permissions") from None
    if not readings:
        raise EdgeError(f"{path} is a recording without readings", "record for longer than --interval")
    return Recording(machine, readings)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines with their ends. Raises EdgeError for one that no recorder has written, as /dev/zero has."""
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
            raise EdgeError(f"{path}, line {number}: longer than {_MAX_LINE} bytes", _RECORD_HINT)
        yield line


def _parse_header(line: bytes, path: Path) -> str:
    """The machine's description."""
    try:
        header = json.loads(line)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError
    except (ValueError, RecursionError):
        raise EdgeError(f"{path}, line 1: this is no recording of sensors", _RECORD_HINT) from None
    version, machine = header.get("version"), header.get("machine")
    if version != VERSION:
        raise EdgeError(
            f"{path}, line 1: the format has version {version}, and {VERSION} can be read", "update edge-runtime"
        )
    if not isinstance(machine, str):
        raise EdgeError(f"{path}, line 1: the machine's description is missing", 'add a text: "machine": "…"')
    return machine


def _readings(lines: Iterator[bytes], path: Path, warn: Callable[[str], None]) -> Iterator[Reading]:
    before_s = -math.inf
    for number, line in enumerate(lines, 2):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith(b"\n"):
                warn(f"{path}, line {number}: cut short, and left out")
                return
            raise _line_error(path, number, "not JSON, or not UTF-8") from None
        try:
            reading = parse_reading(record)
        except ValueError as error:
            raise _line_error(path, number, str(error)) from None
        if reading.time_s < before_s:
            raise _line_error(path, number, f'"time_s" is {reading.time_s}, earlier than {before_s} before it')
        before_s = reading.time_s
        yield reading


def _line_error(path: Path, number: int, what: str) -> EdgeError:
    return EdgeError(f"{path}, line {number}: {what}", "mend or delete that line, or record again")


# ── replaying ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Replay:
    """A sensor that says what was recorded, as long after its first reading as it was then.

    A reading holds until the next one, the last one for as long as readings usually did; then nothing is known.
    """

    def __init__(self, readings: Sequence[Reading], name: str = "replay") -> None:
        """`readings`: at least one, in the order of their times."""
        self._name = name
        self._readings = tuple(readings)
        self._offsets_s = [reading.time_s - readings[0].time_s for reading in readings]
        gaps_s = [b - a for a, b in zip(self._offsets_s[:-1], self._offsets_s[1:], strict=True)]
        self._length_s = self._offsets_s[-1] + (statistics.median(gaps_s) if gaps_s else 1.0)
        self._start_s: float | None = None

    @property
    def name(self) -> str:
        return self._name

    def read(self, time_s: float) -> Reading:
        """The reading of that time, which is now, with the names of the sensors that answered then."""
        if self._start_s is None:
            self._start_s = time_s
        if self.ended(time_s):
            return Reading(time_s)
        index = bisect.bisect_right(self._offsets_s, time_s - self._start_s) - 1
        return dataclasses.replace(self._readings[max(index, 0)], time_s=time_s)

    def ended(self, time_s: float) -> bool:
        """Whether all that was recorded is over; never before the first reading."""
        return self._start_s is not None and time_s - self._start_s >= self._length_s
