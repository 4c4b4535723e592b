"""Labelled messages from CSV, TSV and JSONL files, streamed: read, sampled, and split for training."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import math
import os
import random
import re
import stat
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import EdgeError, UsageError
from .prepare import clean, prepare
from .seen import TextTable, text_hash

Indices: TypeAlias = NDArray[np.int64]

MAX_LABELS = 64
MIN_ROWS_PER_LABEL = 20
MAX_FIELD = 2**20  # characters of one value
MAX_ROW = 2**22  # characters of one row

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_PROGRESS_EVERY = 1000  # rows
# a JSONL file is refused if more lines than both of these cannot be read
_MAX_BAD_LINES = 10
_MAX_BAD_SHARE = 0.01
_SURROGATE = re.compile("[\ud800-\udfff]")  # how Python decodes a byte that is not UTF-8
_SHOWN_CHARACTERS = 40
_SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One message as `prepare` leaves it, and its label."""

    text: str
    label: str


@dataclass(slots=True)
class ReadCounts:
    """What `read_rows` met; it adds to this, readers only read."""

    read: int = 0  # rows, those skipped among them
    unlabelled: int = 0  # skipped: no label
    empty: int = 0  # skipped: no text, or none left by `prepare`
    damaged: int = 0  # readable all the same: bytes that are not UTF-8, read as U+FFFD
    malformed: int = 0  # skipped: too few columns, too long, no JSON object
    first_malformed_line: int | None = None

    @property
    def kept(self) -> int:
        return self.read - self.unlabelled - self.empty - self.malformed


@dataclass(frozen=True, slots=True)
class Sample:
    """Different messages of a file, in its order; made by `sample_rows`."""

    rows: list[Row]
    labels: tuple[str, ...]  # by number if all are numbers, else by alphabet
    totals: dict[str, int]  # different texts of each label in the whole file, in the order of `labels`
    n_duplicates: int  # rows left out: text and label were there before
    n_conflicting: int  # rows left out: the text was there before with another label


class _RowTooLongError(Exception):
    pass


class _Lines:
    """Lines of a text file for a parser, with a bound on what one row may take, and a second try for its lines.

    `start` is the number of the current row's first line, `damaged` whether the row holds bytes that are not UTF-8,
    `cut` whether the file ended in the middle of it.
    """

    def __init__(self, path: Path, stream: io.TextIOWrapper) -> None:
        self.start, self.damaged, self.cut = 1, False, False
        self._path, self._stream = path, stream
        self._number = 0  # of the last line given
        self._row: list[str] = []
        self._row_characters = 0
        self._n_again = 0  # of the lines in _row: those given a second time
        self._again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._n_again += bool(self._again)
        line = self._again.popleft() if self._again else self._read()
        if not line:
            self.cut = bool(self._row)
            raise StopIteration
        self._number += 1
        self._row.append(line)
        self._row_characters += len(line)
        if self._row_characters > MAX_ROW:
            raise _RowTooLongError
        if not line.isascii() and _SURROGATE.search(line):
            self.damaged = True
            line = _SURROGATE.sub("\ufffd", line)
        return line.replace("\0", "")

    def begin_row(self) -> None:
        self.start, self.damaged, self.cut = self._number + 1, False, False
        self._row.clear()
        self._row_characters = self._n_again = 0

    def drop_row(self) -> int:
        """Give up the row's first line, and take its further lines for rows of their own; how many were given up.

        No line is tried a third time, so that the work stays linear.
        """
        n_dropped = max(1, self._n_again)
        rest = self._row[n_dropped:]
        self._again.extendleft(reversed(rest))
        self._number -= len(rest)
        return n_dropped

    def _read(self) -> str:
        try:
            line = self._stream.readline(MAX_ROW + 1)
            end = line
            while len(end) > MAX_ROW and not end.endswith(("\n", "\r")):
                end = self._stream.readline(MAX_ROW + 1)
            return line
        except (EOFError, OSError, zlib.error) as error:
            raise _reading_failed(self._path, error) from None


def read_rows(
    path: Path,
    text: str,
    label: str,
    *,
    counts: ReadCounts,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Row]:
    """Labelled rows of the columns `text` and `label`, one after the other, in bounded memory.

    `path` ends in .csv, .tsv (quoted as CSV is), .jsonl or .ndjson, each also with .gz; whether it is compressed is
    seen from its content. `counts`, fresh for each file, gets what was met. `progress` is now and then called with
    the share of the file's bytes that were read.

    A CSV row that cannot be read costs its first line: if a quotation without end made it span several, the lines
    after the first are read as rows of their own.

    Raised while iterating: UsageError if the file or a column is not there, or no row can be used; EdgeError if the
    file is damaged, which JSONL is if more than 10 lines and more than 1 % are no JSON objects.
    """
    suffix = _format_of(path)
    if text == label:
        raise UsageError(f"column {_show(text)} is given as the text and as the label", "give two columns")
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        with _text_stream(path, file) as stream:
            lines = _Lines(path, stream)
            is_json = suffix in _JSON_SUFFIXES
            records = (
                _json_records(lines, path, text, label)
                if is_json
                else _csv_records(lines, _DELIMITERS[suffix], path, text, label)
            )
            for record in records:
                counts.read += 1
                if progress and counts.read % _PROGRESS_EVERY == 0:
                    progress(min(1.0, file.tell() / size))
                if record is None:
                    counts.malformed += 1
                    counts.first_malformed_line = counts.first_malformed_line or lines.start
                    continue
                counts.damaged += lines.damaged
                if not (row_label := clean(record[1])):
                    counts.unlabelled += 1
                elif not (row_text := prepare(record[0])):
                    counts.empty += 1
                else:
                    yield Row(row_text, row_label)
    _check_counts(counts, path, text, label, is_json)
    if progress:
        progress(1.0)


def sample_rows(rows: Iterable[Row], max_rows: int, seed: int) -> Sample:
    """At most `max_rows` of `rows`, without duplicates, drawn at random within each label.

    Labels keep their shares, except that a rare one keeps `max_rows // (4 * n_labels)` rows, or all it has. Texts
    that differ in case only are duplicates; the first stays, with its label.

    One pass. Memory: a table of 14 to 27 bytes for each different text (64-bit hashes and labels, open addressing;
    among 10 million texts two are mixed up with a chance of 3 in a million), for a moment half as much again while
    it grows, and at most `max_rows` rows of each label (Vitter, "Random sampling with a reservoir", 1985,
    algorithm R).

    Raises UsageError for more than MAX_LABELS labels, fewer than 2, or fewer than MIN_ROWS_PER_LABEL different texts
    of one, and if `max_rows` has no room for that many.
    """
    rng = random.Random(seed)
    seen = TextTable()
    ids: dict[str, int] = {}
    totals: Counter[str] = Counter()
    reservoirs: dict[str, list[tuple[int, Row]]] = {}
    n_duplicates = n_conflicting = 0
    for index, row in enumerate(rows):
        if row.label not in ids:
            if len(ids) == MAX_LABELS:
                examples = ", ".join(_show(label) for label in list(ids)[:3])
                raise UsageError(
                    f"the label column has more than {MAX_LABELS} different labels, for example {examples}",
                    "it is probably not the column with the labels; classes should repeat",
                )
            ids[row.label] = len(ids)
        before = seen.put(text_hash(row.text), ids[row.label])
        if before is not None:
            n_duplicates += before == ids[row.label]
            n_conflicting += before != ids[row.label]
            continue
        totals[row.label] += 1
        reservoir = reservoirs.setdefault(row.label, [])
        if len(reservoir) < max_rows:
            reservoir.append((index, row))
        elif (place := rng.randrange(totals[row.label])) < max_rows:
            reservoir[place] = (index, row)
    labels = _in_natural_order(ids)
    ordered = {label: totals[label] for label in labels}
    _check_totals(ordered, max_rows)
    quotas = _quotas(ordered, max_rows)
    chosen = [item for label in labels for item in rng.sample(reservoirs[label], quotas[label])]
    chosen.sort(key=lambda item: item[0])
    return Sample([row for _, row in chosen], labels, ordered, n_duplicates, n_conflicting)


def split(
    rows: Sequence[Row],
    labels: Sequence[str],
    shares: tuple[float, float, float] = (0.7, 0.15, 0.15),
    *,
    seed: int,
) -> tuple[Indices, Indices, Indices]:
    """Indices into `rows`, ascending, of the parts for training, calibration and test, each label by `shares`.

    Every label has a row in each part at least. Raises UsageError if one has fewer than three rows, or if `shares`
    are not three positive numbers that make 1.
    """
    if len(shares) != 3 or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UsageError(f"{shares} do not split rows into three parts", "give three positive shares that make 1")
    by_label: dict[str, list[int]] = {label: [] for label in labels}
    for index, row in enumerate(rows):
        by_label[row.label].append(index)
    rng = np.random.default_rng(seed)
    parts: tuple[list[Indices], list[Indices], list[Indices]] = ([], [], [])
    for label, members in by_label.items():
        if len(members) < len(parts):
            raise UsageError(
                f"label {_show(label)} has {len(members)} rows, too few to train, calibrate and test with",
                f"give at least {MIN_ROWS_PER_LABEL} rows of each label",
            )
        sizes = _apportion(len(members), shares)
        while min(sizes) == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[sizes.index(0)] += 1
        shuffled = rng.permutation(np.array(members, dtype=np.int64))
        for part, piece in zip(parts, np.split(shuffled, np.cumsum(sizes)[:-1]), strict=True):
            part.append(piece)
    train, calibration, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, calibration, test


# --- files ---------------------------------------------------------------------------------------------------------


def _format_of(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix not in _DELIMITERS and suffix not in _JSON_SUFFIXES:
        raise UsageError(
            f"{path} is of an unknown format: its name ends in {_show(suffix or path.name)}",
            "give a .csv, .tsv, .jsonl or .ndjson file, each also with .gz",
        )
    return suffix


def _open(path: Path) -> io.BufferedReader:
    try:
        found = path.stat()  # before opening: a pipe would wait for its other end
        if stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{path} is a directory", "give the file with the data")
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is not a regular file", "save the data as a file first")
        if not found.st_size:
            raise _empty(path)
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no file {path}", "check the path") from None
    except (OSError, ValueError) as error:
        raise _reading_failed(path, error) from None


def _text_stream(path: Path, file: io.BufferedReader) -> io.TextIOWrapper:
    try:
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        data = gzip.GzipFile(fileobj=file) if is_gzip else file
        start = data.peek(2)[:2]
    except (EOFError, OSError, zlib.error) as error:
        raise _reading_failed(path, error) from None
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"{path} is UTF-16", "save it as UTF-8, for example with `iconv -f utf-16 -t utf-8`")
    return io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _reading_failed(path: Path, error: Exception) -> EdgeError:
    if isinstance(error, EOFError):
        return EdgeError(f"{path} is cut short: its gzip stream does not end", "copy or download it again")
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return EdgeError(f"{path} is damaged: {error}", "copy or download it again")
    reason = error.strerror if isinstance(error, OSError) else error
    return UsageError(f"{path} cannot be read: {reason}", "check the path and its permissions")


def _empty(path: Path) -> UsageError:
    return UsageError(f"{path} is empty", "give a file with one message and its label per row")


# --- rows ----------------------------------------------------------------------------------------------------------


def _csv_records(lines: _Lines, delimiter: str, path: Path, text: str, label: str) -> Iterator[tuple[str, str] | None]:
    """(text, label) of each row, None for one that cannot be read."""
    rows = _csv_rows(lines, delimiter)
    header = next(rows, [])
    if header is None:
        raise EdgeError(
            f"line {lines.start} of {path} should name the columns and cannot be read", "check how the file was saved"
        )
    if not header:
        raise _empty(path)
    names = [clean(name) for name in header]
    repeated = [name for name, n in Counter(names).items() if name and n > 1]
    if repeated:
        raise UsageError(f"{path} has several columns {_show(repeated[0])}", "rename all but one")
    hint = "the first line must name the columns"
    if len(names) == 1 and (other := next((d for d in ";\t|," if d != delimiter and d in header[0]), None)):
        hint = f"columns must be separated by {delimiter!r}, not {other!r}: save the file so"
    i_text, i_label = (_find_column(name, names, path, hint) for name in (text, label))
    for row in rows:
        if row and max(i_text, i_label) < len(row):
            yield row[i_text], row[i_label]
        else:
            yield from [None] * lines.drop_row()


def _csv_rows(lines: _Lines, delimiter: str) -> Iterator[list[str] | None]:
    """The fields of each row that is not blank, None for one that cannot be read."""
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        lines.begin_row()
        before = csv.field_size_limit(MAX_FIELD)  # one for all readers of the process
        try:
            row = next(reader)
            readable = not lines.cut
        except StopIteration:
            return
        except (csv.Error, _RowTooLongError):
            readable = False
        finally:
            csv.field_size_limit(before)
        if not readable:
            yield None
        elif row:
            yield row


def _json_records(lines: _Lines, path: Path, text: str, label: str) -> Iterator[tuple[str, str] | None]:
    """(text, label) of each line that is not blank, None for one that cannot be read."""
    checked = False
    for line in _json_lines(lines):
        record = _parse_object(line)
        if record is None:
            yield None
            continue
        if not checked:
            for name in (text, label):
                _find_column(name, list(record), path, "the first line must have all columns")
            checked = True
        values = _scalar(record.get(text)), _scalar(record.get(label))
        if values[0] is None or values[1] is None:
            yield None
            continue
        if any(_SURROGATE.search(value) for value in values if value):  # written as \udXXX
            lines.damaged = True
        yield values[0], values[1]


def _json_lines(lines: _Lines) -> Iterator[str]:
    """Each line that is not blank, "" for one that is too long."""
    while True:
        lines.begin_row()
        try:
            line = next(lines)
        except StopIteration:
            return
        except _RowTooLongError:
            yield ""
            continue
        if line.strip():
            yield line


def _parse_object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _scalar(value: object) -> str | None:
    """A JSON value as text, "" for a missing one, None for what cannot be a text or label."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str):
        return value if len(value) <= MAX_FIELD else None
    return str(value) if isinstance(value, bool | int | float) else None


def _find_column(wanted: str, names: list[str], path: Path, hint: str) -> int:
    if wanted in names:
        return names.index(wanted)
    shown = {_cut(name).lower(): _show(name) for name in reversed(names[:200])}
    near = difflib.get_close_matches(_cut(wanted).lower(), shown, n=1)
    listed = ", ".join(_show(name) for name in names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
    raise UsageError(
        f"{path} has no column {_show(wanted)}; it has {listed or 'none'}",
        f"did you mean {shown[near[0]]}?" if near else hint,
    )


def _check_counts(counts: ReadCounts, path: Path, text: str, label: str, is_json: bool) -> None:
    first = f"the first is line {counts.first_malformed_line}"
    if counts.malformed and counts.malformed == counts.read:
        what = "JSON object" if is_json else "row with all columns"
        raise EdgeError(f"{path} has no {what}", "check how the file was saved: one message per row")
    if is_json and counts.malformed > max(_MAX_BAD_LINES, _MAX_BAD_SHARE * counts.read):
        raise EdgeError(
            f"{counts.malformed} of {counts.read} lines of {path} are no JSON objects with plain values; {first}",
            "write one object per line",
        )
    if not counts.read:
        raise UsageError(f"{path} is empty: it has a header and no rows", "give a file with labelled rows")
    if not counts.kept and counts.unlabelled:
        raise UsageError(
            f"all {counts.unlabelled} rows of {path} are unlabelled: column {_show(label)} is empty",
            "label some rows first, or give another column",
        )
    if not counts.kept:
        raise UsageError(f"column {_show(text)} of {path} has no text in any row", "give another column")


def _cut(text: str) -> str:
    text = clean(text[: 4 * _SHOWN_CHARACTERS])
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _show(text: str) -> str:
    return f"'{_cut(text)}'"


# --- sampling ------------------------------------------------------------------------------------------------------


def _in_natural_order(labels: Iterable[str]) -> tuple[str, ...]:
    names = sorted(labels)
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return tuple(names)
    are_finite = all(map(math.isfinite, numbers.values()))
    return tuple(sorted(names, key=lambda name: numbers[name]) if are_finite else names)


def _check_totals(totals: dict[str, int], max_rows: int) -> None:
    if not totals:
        raise UsageError("there are no labelled rows", "give a file with labelled rows")
    if len(totals) == 1:
        (only,) = totals
        raise UsageError(
            f"all {totals[only]} rows have the same label, {_show(only)}", "two labels at least must be told apart"
        )
    if min(totals.values()) < MIN_ROWS_PER_LABEL:
        listed = ", ".join(f"{_show(label)} {n}" for label, n in totals.items())
        raise UsageError(
            f"each label needs at least {MIN_ROWS_PER_LABEL} rows with different texts; there are {listed}",
            "add rows of the rare labels, or remove these labels",
        )
    if max_rows < len(totals) * MIN_ROWS_PER_LABEL:
        raise UsageError(
            f"{max_rows} rows are too few for {len(totals)} labels",
            f"at least {MIN_ROWS_PER_LABEL} for each label, here {len(totals) * MIN_ROWS_PER_LABEL}",
        )


def _quotas(totals: dict[str, int], max_rows: int) -> dict[str, int]:
    """Rows to keep of each label: `max_rows` by shares, none below its floor, see `sample_rows`."""
    if sum(totals.values()) <= max_rows:
        return totals
    floors = {label: min(n, max_rows // (4 * len(totals))) for label, n in totals.items()}
    quotas: dict[str, int] = {}
    while True:
        shared = {label: n for label, n in totals.items() if label not in quotas}
        budget = max_rows - sum(quotas.values())
        n_shared = sum(shared.values())
        rare = [label for label, n in shared.items() if n * budget < floors[label] * n_shared]
        if not rare:
            return quotas | dict(zip(shared, _apportion(budget, list(shared.values())), strict=True))
        quotas |= {label: floors[label] for label in rare}


def _apportion(n: int, weights: Sequence[float]) -> list[int]:
    """`n` in whole parts by `weights`: the largest remainders are rounded up."""
    exact = [n * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: n - sum(parts)]:
        parts[i] += 1
    return parts
