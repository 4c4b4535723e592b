"""What the verbs that read labelled messages say while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import display
from .labels.dataset import ReadCounts
from .labels.reporter import Reporter


def read_notes(counts: ReadCounts, n_duplicates: int, n_conflicting: int, n_used: int, max_rows: int) -> Iterator[str]:
    """What was met while reading, in lines: rows left out and why, and how many of the rest are used."""
    skipped = {
        "without a label": counts.unlabelled,
        "without a text": counts.empty,
        "that cannot be read": counts.malformed,
        "seen before": n_duplicates,
        "seen before with another label": n_conflicting,
    }
    listed = ", ".join(f"{n:,} {what}" for what, n in skipped.items() if n)
    yield f"{counts.read:,} rows read{f'; left out: {listed}' if listed else ''}"
    if counts.first_malformed_line is not None:
        yield f"warning: the first row that cannot be read is in line {counts.first_malformed_line}"
    if counts.damaged:
        sign = "\N{REPLACEMENT CHARACTER}"
        yield f"warning: {counts.damaged:,} rows hold bytes that are not UTF-8; they are read as {sign}"
    total = counts.kept - n_duplicates - n_conflicting
    if n_used < total:
        yield f"{n_used:,} of {total:,} different messages are used (--max-rows {max_rows})"


@contextlib.contextmanager
def reporting(*, quiet: bool) -> Iterator[Reporter]:
    """A bar on a terminal, gone when all is done; a line per phase elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Reporter() if quiet else Reporter(display.tell)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bars:
        task = bars.add_task("", total=None)
        yield Reporter(
            lambda text: bars.reset(task, description=text, total=None),
            lambda done, total: bars.update(task, completed=done, total=total),
        )
