"""How far long work is, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import display
from .reporter import Reporter


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
