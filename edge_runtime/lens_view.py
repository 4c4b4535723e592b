"""The logit lens as a table, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import display
from .completion import read_prompt
from .errors import EdgeError, UsageError
from .lens import Lens, LensRow, Reading, read_lens
from .options import parse_boundaries, start_library

PLOT_HINT = "pip install 'edge-runtime[plot]'"
MAX_PLOT_TOKENS = 256
_COLUMNS = 12  # tokens side by side in a picture
_CELL_WIDTH, _CELL_HEIGHT = 1.05, 0.34  # inches
_CONFUSED = 6.0  # nats at which the colour scale ends


@dataclass(frozen=True, slots=True)
class LensRequest:
    """What the verb was asked for."""

    text: str | None
    file: Path | None
    model: str
    boundaries: str | None
    threads: int
    png: Path | None
    json: bool
    verbose: bool


def show_lens(request: LensRequest) -> None:
    """Print the table or JSON, and draw the picture if one is wanted."""
    if request.png is not None:
        _need_matplotlib()
    text = read_prompt(request.text, request.file)
    start_library(verbose=request.verbose)
    lens = read_lens(request.model, text, parse_boundaries(request.boundaries), n_threads=request.threads)
    if request.png is not None:
        draw(lens, request.png)
        display.tell(f"the picture is in {request.png}")
    if request.json:
        display.write_json(dataclasses.asdict(lens))
    elif request.png is None:
        print_table(lens)


def visible(text: str) -> str:
    """A token's text in which white space and control characters can be seen."""
    signs = {" ": "·", "\n": "⏎", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text) or "(empty)"


# ── table ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_table(lens: Lens) -> None:
    """One line per token; a guess that is also the whole model's carries a =, and is green where colours are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = display.wants_colour(sys.stdout)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    for layer in lens.layers[:-1]:
        table.add_column(f"after {layer}", no_wrap=True)
    table.add_column(f"after {lens.layers[-1]}, all", no_wrap=True)
    for position, row in enumerate(lens.rows):
        cells = [Text(_cell(r, row), style="green" if _agrees(r, row) else "") for r in row.readings]
        table.add_row(str(position), Text(visible(row.text)), *cells)
    # a pipe has no width: nothing must be cut there
    width = None if sys.stdout.isatty() else 24 * (len(lens.layers) + 2)
    console = Console(width=width, color_system="standard" if colour else None, force_terminal=colour, highlight=False)
    console.print(table, soft_wrap=not sys.stdout.isatty())
    display.tell("each cell: the likeliest next token and the entropy in nats; = is what the whole model says too")


def _cell(reading: Reading, row: LensRow) -> str:
    guess = visible(reading.text)
    guess = guess if len(guess) <= 14 else guess[:13] + "…"
    return f"{guess} {reading.entropy:.1f}{' =' if _agrees(reading, row) else ''}"


def _agrees(reading: Reading, row: LensRow) -> bool:
    return reading is not row.final and reading.token == row.final.token


# ── picture ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeError("drawing needs matplotlib, which is not installed", PLOT_HINT) from None


def draw(lens: Lens, path: Path) -> None:
    """Write a PNG: tokens from left to right, depth from bottom to top, colour by entropy.

    Raises UsageError for a text too long to be read as a picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(lens.rows) > MAX_PLOT_TOKENS:
        raise UsageError(
            f"the text has {len(lens.rows)} tokens, a picture shows {MAX_PLOT_TOKENS} at most",
            "shorten it, or use the table",
        )
    parts = [lens.rows[i : i + _COLUMNS] for i in range(0, len(lens.rows), _COLUMNS)]
    columns = len(parts[0])
    panel_height = _CELL_HEIGHT * len(lens.layers) + 0.75
    size = max(7.0, _CELL_WIDTH * columns + 2.2), panel_height * len(parts) + 1.1
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"What each depth of {lens.model} would say next", fontsize=12)
    axes = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axis, rows in zip(axes, parts, strict=True):
        image = _draw_panel(axis, lens.layers, rows, columns)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.025, aspect=16, shrink=min(1.0, 4 / len(parts)), pad=0.015)
    bar.set_label("entropy in nats (dark: sure)")
    figure.supxlabel("the text, token by token; framed: what the whole model says too", fontsize=9)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # a character that the font lacks is drawn as a box, which says enough
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, format="png", dpi=130)


def _draw_panel(axis: Any, layers: Sequence[int], rows: Sequence[LensRow], columns: int) -> Any:
    from matplotlib.patches import Rectangle

    entropies = [[row.readings[depth].entropy for row in rows] for depth in range(len(layers))]
    image = axis.imshow(
        entropies, aspect="auto", origin="lower", cmap="YlGnBu_r", vmin=0, vmax=_CONFUSED, extent=_extent(rows, layers)
    )
    for x, row in enumerate(rows):
        for y, reading in enumerate(row.readings):
            dark = reading.entropy < _CONFUSED / 2
            axis.text(
                x,
                y,
                _short(visible(reading.text)),
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if dark else "black",
                parse_math=False,
            )
            if _agrees(reading, row):
                axis.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fill=False, lw=1.4, ec="#d95f02"))
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_xticks(range(len(rows)), [_short(visible(row.text)) for row in rows], fontsize=9.5, parse_math=False)
    names = [f"after {layer}" for layer in layers[:-1]]
    axis.set_yticks(range(len(layers)), [*names, f"all {layers[-1]}"], fontsize=9)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def _extent(rows: Sequence[LensRow], layers: Sequence[int]) -> tuple[float, float, float, float]:
    return (-0.5, len(rows) - 0.5, -0.5, len(layers) - 0.5)


def _short(text: str, limit: int = 11) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
