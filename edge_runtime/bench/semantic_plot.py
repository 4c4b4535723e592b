"""A picture of rejection curves: how often answers are right where only the surest questions are answered."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .semantic_quality import BEST_POSSIBLE, Numbers

_COLOURS = ("#0b6e4f", "#4a7fb5", "#e08e1b", "#7a3e9d", "#c1292e", "#8c564b")
_GREY = "#9a9a9a"
_FEWEST = 0.05  # of the questions: the share of fewer says little


def draw_curves(curves: Mapping[str, Numbers], title: str, path: Path) -> None:
    """Write a PNG of accuracies (n,) where 1, 2, … n questions are answered. Raises UsageError if it cannot be written.

    matplotlib must be there, see `control_plot.need_matplotlib`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    colours = iter(_COLOURS * (1 + len(curves) // len(_COLOURS)))
    for name, accuracy in curves.items():
        n = len(accuracy)
        shares = np.arange(1, n + 1) / n
        shown = shares >= _FEWEST
        if name == BEST_POSSIBLE:
            axis.plot(shares[shown], accuracy[shown], color=_GREY, linestyle="--", linewidth=1.0, label=name)
        else:
            axis.plot(shares[shown], accuracy[shown], color=next(colours), linewidth=1.5, label=name)
    axis.axhline(float(accuracy[-1]), color=_GREY, linestyle=":", linewidth=1.0, label="no rejection")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("share of the questions that are answered, the surest first")
    axis.set_ylabel("share of these answers that are right")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90, metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "name another file with --picture") from error
