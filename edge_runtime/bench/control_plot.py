"""A picture of one simulated run: temperature, power, time per token and disagreement, over time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EdgeError, UsageError
from .simulator import Numbers, Trace

PLOT_HINT = "pip install 'edge-runtime[plot]'"
_COLOURS = 128
_OURS, _ALONE, _TARGET = "#0b6e4f", "#9a9a9a", "#c1292e"


def need_matplotlib() -> None:
    """Raises EdgeError if pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeError("drawing needs matplotlib, which is not installed", PLOT_HINT) from None


def draw(trace: Trace, alone: Trace, path: Path) -> None:
    """Write a PNG of a run and, in grey, of full depth alone. Raises UsageError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    scenario, targets = trace.scenario, trace.scenario.targets
    time_s = trace.column("time_s")
    _panel(axes[0], time_s, trace.column("temp_c"), alone.column("temp_c"), targets.ceiling_c, "chip, °C")
    axes[0].plot(time_s, trace.column("ambient_c"), color="#4a7fb5", linewidth=0.9, label="ambient")
    _panel(axes[1], time_s, trace.column("power_w"), alone.column("power_w"), targets.power_cap_w, "power, W")
    tokens_ms = trace.column("time_per_token_ms"), alone.column("time_per_token_ms")
    _panel(axes[2], time_s, *tokens_ms, targets.time_per_token_ms, "ms per token")
    if tokens_ms[0].max() > 5 * np.median(tokens_ms[0]):
        axes[2].set_yscale("log")
    published = np.maximum(1, np.cumsum(trace.column("tokens")))
    share = 100 * np.cumsum(trace.column("wrong")) / published
    _panel(axes[3], time_s, share, None, 100 * targets.budget or None, "disagreeing tokens\nso far, %")
    _mark_changes(axes, trace)
    for axis in axes:
        for _, start, end in scenario.dead:
            axis.axvspan(start, end, color="0.92", zorder=0)
    axes[3].set_xlabel("seconds (dotted: the rung changes; shaded: a sensor is dead)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4)
    figure.suptitle(f"{scenario.machine.name}: {scenario.kind}, seed {scenario.seed}", fontsize=12)
    FigureCanvasAgg(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(figure))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "name another folder with --png") from error


def _png(figure: Any) -> bytes:
    """In few colours, as there are many pictures; the same bytes for the same run."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=80, metadata={"Software": None})
    Image.open(full).convert("RGB").quantize(_COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()


def _panel(axis: Any, time_s: Numbers, ours: Numbers, alone: Numbers | None, target: float | None, label: str) -> None:
    if alone is not None:
        axis.plot(time_s, alone, color=_ALONE, linewidth=0.9, label="full depth alone")
    axis.plot(time_s, ours, color=_OURS, linewidth=1.2, label="controlled")
    if target is not None:
        axis.axhline(target, color=_TARGET, linewidth=0.9, linestyle="--", label="target")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _mark_changes(axes: Any, trace: Trace) -> None:
    """A dotted line at each change, with the rung's name where there is room for it."""
    room_s = trace.scenario.duration_s / 30
    written_s = -room_s
    for event in trace.events:
        if not event.is_change:
            continue
        for axis in axes:
            axis.axvline(event.time_s, color="0.6", linewidth=0.7, linestyle=":")
        if event.time_s - written_s >= room_s:
            written_s = event.time_s
            axes[1].annotate(
                event.new,
                (event.time_s, 0.03),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=7,
                va="bottom",
            )
