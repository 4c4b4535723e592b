"""A power meter's CSV file: a time and a power per row, however meters and spreadsheets write them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..errors import UsageError

TIME_COLUMNS = ("time_s", "time", "timestamp")
POWER_COLUMNS = ("power_w",)
_DELIMITERS = ",;\t|"
_MAX_FILE = 2**28
_FRACTION = re.compile(r"[.,](\d+)")
_ISO = re.compile(r"\d{4}-\d\d-\d\d[T ]\d")


@dataclass(frozen=True, slots=True)
class MeterLog:
    """Samples (seconds, watts) in the file's order; `absolute` if the seconds are since 1970, by ISO times."""

    samples: tuple[tuple[float, float], ...]
    absolute: bool
    n_skipped: int  # rows without a time or a power


def read_meter(path: Path, time: str | None = None, power: str | None = None) -> MeterLog:
    """The samples in the columns `time` and `power`, by default the first of TIME_COLUMNS and POWER_COLUMNS.

    The delimiter is the one that separates these columns in the header. Times are seconds or ISO 8601, in which a time
    without a zone is local. Decimal points and commas are read. Raises UsageError, with the line, for what is neither.
    """
    text = _read(path)
    delimiter, header, places = _find_columns(path, text, time, power)
    samples: list[tuple[float, float]] = []
    kinds: set[bool] = set()
    n_skipped = 0
    for line, row in _rows(path, text, delimiter):
        if row == header:
            continue  # once more where logs were joined
        cells = [row[place].strip() if place < len(row) else "" for place in places]
        if not all(cells):
            n_skipped += 1
            continue
        moment, absolute = _time(cells[0], f"{path}, line {line}")
        kinds.add(absolute)
        if len(kinds) > 1:
            raise UsageError(f"{path}, line {line}: times are numbers before and ISO times here", "use one of the two")
        samples.append((moment, _power(cells[1], f"{path}, line {line}")))
    if not samples:
        raise UsageError(f"{path} has no row with a time and a power", "record for as long as the machine works")
    return MeterLog(tuple(samples), kinds == {True}, n_skipped)


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder, not a power meter's file", "name a CSV file")
        if path.stat().st_size > _MAX_FILE:
            raise UsageError(f"{path} is larger than {_MAX_FILE >> 20} MiB", "cut out the part that was recorded, too")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "name a power meter's CSV file") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # a degree sign in a header, by an old program
    if "\0" in text:
        raise UsageError(f"{path} is not a text file", "name a power meter's CSV file")
    return text


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that is neither empty nor a comment."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row) and not row[0].lstrip().startswith("#"):
                yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}", "save it as CSV again") from error


def _find_columns(path: Path, text: str, time: str | None, power: str | None) -> tuple[str, list[str], tuple[int, int]]:
    """The delimiter, the header, and where in it time and power are."""
    wanted = (TIME_COLUMNS if time is None else (time,), POWER_COLUMNS if power is None else (power,))
    widest: list[str] = []
    for delimiter in _DELIMITERS:
        _, header = next(_rows(path, text, delimiter), (0, []))
        names = [_plain(cell) for cell in header]
        found = [_place(names, candidates) for candidates in wanted]
        if found[0] is not None and found[1] is not None:
            return delimiter, header, (found[0], found[1])
        widest = max(widest, header, key=len)
    if not widest:
        raise UsageError(f"{path} is empty", "name a power meter's CSV file")
    names = [_plain(cell) for cell in widest]
    option, candidates = ("--time", wanted[0]) if _place(names, wanted[0]) is None else ("--power", wanted[1])
    shown = ", ".join(cell.strip()[:40] for cell in widest[:20])
    raise UsageError(
        f"{path} has no column {' or '.join(candidates)}; its first row is: {shown}",
        f"name the column with {option}",
    )


def _plain(name: str) -> str:
    return name.strip().casefold()


def _place(names: Sequence[str], candidates: Sequence[str]) -> int | None:
    return next((names.index(_plain(c)) for c in candidates if _plain(c) in names), None)


def _number(text: str) -> float | None:
    """`3.5` or `3,5`; None for what is no finite number."""
    if "," in text and "." not in text:
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _time(text: str, where: str) -> tuple[float, bool]:
    """Seconds, and whether they are since 1970."""
    seconds = _number(text)
    if seconds is not None:
        return seconds, False
    moment = _iso(text) if _ISO.match(text) else None
    if moment is None:
        raise UsageError(f"{where}: '{text[:40]}' is no time", "give seconds, or as in 2025-01-31T12:00:00.5")
    return moment, True


def _iso(text: str) -> float | None:
    # Python 3.10 reads neither Z nor fractions of any length
    text = _FRACTION.sub(lambda found: f".{found[1][:6]:0<6}", text).replace("Z", "+00:00")
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _power(text: str, where: str) -> float:
    watts = _number(text)
    if watts is None or watts < 0:
        raise UsageError(f"{where}: '{text[:40]}' is no power in watts", "empty cells are skipped; mend or drop others")
    return watts
