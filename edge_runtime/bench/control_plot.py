"""Pictures of simulated runs over time: one of a single run, and one of what all boards do in the same scenario."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EdgeError, UsageError
from .scenarios import Course, Scenario
from .simulator import Numbers, Trace

PLOT_HINT = "pip install 'edge-runtime[plot]'"
_COLOURS = 128
_OURS, _ALONE, _TARGET, _AMBIENT = "#0b6e4f", "#9a9a9a", "#c1292e", "#4a7fb5"
_THROTTLE, _DEAD, _OTHERS, _HARD, _SHIFT = "#e08e1b", "#d9d9d9", "#cfe0f1", "#f6e3cc", "#7a3e9d"
_LOW = "#8c564b"
_TALLEST = 1.12  # of an axis ÷ of what is drawn on it


def need_matplotlib() -> None:
    """Raises EdgeError if pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeError("drawing needs matplotlib, which is not installed", PLOT_HINT) from None


def draw(trace: Trace, alone: Trace, path: Path) -> None:
    """Write a PNG of a run and, in grey, of full depth alone. Raises UsageError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    scenario, targets = trace.scenario, trace.scenario.targets
    time_s = trace.column("time_s")
    _panel(axes[0], time_s, trace.column("temp_c"), alone.column("temp_c"), targets.ceiling_c, "chip, °C")
    axes[0].plot(time_s, trace.column("ambient_c"), color=_AMBIENT, linewidth=0.9, label="ambient")
    _panel(axes[1], time_s, trace.column("power_w"), alone.column("power_w"), targets.power_cap_w, "power, W")
    tokens_ms = trace.column("time_per_token_ms"), alone.column("time_per_token_ms")
    _panel(axes[2], time_s, *tokens_ms, targets.time_per_token_ms, "ms per token")
    if tokens_ms[0].max() > 5 * np.median(tokens_ms[0]):
        axes[2].set_yscale("log")
    _panel(axes[3], time_s, _disagreement(trace), None, 100 * targets.budget or None, "disagreeing tokens\nso far, %")
    _mark_changes(axes, trace)
    for axis in axes:
        for _, start, end in scenario.dead:
            axis.axvspan(start, end, color="0.92", zorder=0)
    axes[3].set_xlabel("seconds (dotted: the rung changes; shaded: a sensor is dead)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4)
    figure.suptitle(f"{scenario.machine.name}: {scenario.kind}, seed {scenario.seed}", fontsize=12)
    _write(figure, path, "--png")


def _write(figure: Any, path: Path, option: str) -> None:
    """In few colours, as there are many pictures; the same bytes for the same runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    FigureCanvasAgg(figure)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=80, metadata={"Software": None})
    Image.open(full).convert("RGB").quantize(_COLOURS).save(small, format="png", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", f"name another folder with {option}") from error


def _disagreement(trace: Trace) -> Numbers:
    """Percent of the tokens so far that full depth would have chosen otherwise (n,)."""
    share: Numbers = np.cumsum(trace.column("wrong")) / np.maximum(1, np.cumsum(trace.column("tokens")))
    return 100 * share


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


# ── all boards in one picture ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Column:
    """What is drawn of each board in one column: a quantity of its run, and what that is to hold."""

    title: str
    values: Callable[[Trace], Numbers]
    target: Callable[[Scenario], float | None]
    alone: bool = True  # whether full depth alone has it, too


_TEMPERATURE = _Column("chip, °C", lambda t: t.column("temp_c"), lambda s: s.targets.ceiling_c)
_SPEED = _Column("tokens per second", lambda t: 1e3 / t.column("time_per_token_ms"), lambda s: _wanted_speed(s))
_POWER = _Column("power, W", lambda t: t.column("power_w"), lambda s: s.targets.power_cap_w)
_BATTERY = _Column("battery, %", lambda t: t.column("battery_percent"), lambda s: None)
_WRONG = _Column("disagreeing tokens so far, %", _disagreement, lambda s: 100 * s.targets.budget or None, alone=False)


def _wanted_speed(scenario: Scenario) -> float | None:
    wanted_ms = scenario.targets.time_per_token_ms
    return None if wanted_ms is None else 1e3 / wanted_ms


def draw_boards(runs: Sequence[tuple[Trace, Trace]], path: Path) -> None:
    """Write a PNG of the same scenario on several boards, a row each: controlled and, in grey, full depth alone.

    Raises UsageError if it cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    scenarios = [trace.scenario for trace, _ in runs]
    columns = [_TEMPERATURE, _POWER, _SPEED]
    columns += [_BATTERY] if any(s.battery_j for s in scenarios) else []
    columns += [_WRONG] if any(s.targets.budget for s in scenarios) else []
    layout = ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.04, hspace=0.01, wspace=0.01)
    figure = Figure(figsize=(3 * len(columns) + 1.5, 1.45 * len(runs) + 1.1), layout=layout)
    widths = [1.4 if column is _TEMPERATURE else 1.0 for column in columns]
    axes = figure.subplots(len(runs), len(columns), sharex=True, squeeze=False, width_ratios=widths)
    for row, (trace, alone) in zip(axes, runs, strict=True):
        for axis, column in zip(row, columns, strict=True):
            _small_panel(axis, column, trace, alone)
        _mark_outside(dict(zip(columns, row, strict=True)), trace.scenario)
        row[0].set_ylabel(trace.scenario.machine.name, fontsize=8.5, fontweight="bold")
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column.title, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("minutes", fontsize=8)
    known = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", fontsize=9, ncols=len(known), frameon=False)
    figure.suptitle(
        f"Scenario {scenarios[0].title}: target “{scenarios[0].target}” of each board's profile", fontsize=12
    )
    _write(figure, path, "--pictures")


def _small_panel(axis: Any, column: _Column, trace: Trace, alone: Trace) -> None:
    minutes, scenario = trace.column("time_s") / 60, trace.scenario
    if column.alone:
        axis.plot(minutes, column.values(alone), color=_ALONE, linewidth=0.7, label="full depth alone")
    axis.plot(minutes, column.values(trace), color=_OURS, linewidth=1.3, label="controlled")
    target = column.target(scenario)
    if target is not None:
        axis.axhline(target, color=_TARGET, linewidth=1.0, linestyle="--", label="ceiling, cap, speed, budget")
    if column is _TEMPERATURE:
        axis.plot(minutes, trace.column("ambient_c"), color=_AMBIENT, linewidth=0.8, label="air")
        axis.axhline(scenario.machine.throttle_c, color=_THROTTLE, linewidth=1.0, linestyle=":", label="throttles at")
    else:
        highest = max(float(line.get_ydata().max()) for line in axis.get_lines() if len(line.get_ydata()) > 2)
        axis.set_ylim(0, _TALLEST * max(highest, target or 0.0, 0.1))
    axis.set_xlim(0, scenario.duration_s / 60)
    axis.locator_params(axis="y", nbins=4)
    axis.tick_params(labelsize=7.5, length=2)
    axis.grid(alpha=0.25, linewidth=0.5)


def _mark_outside(axes: dict[_Column, Any], scenario: Scenario) -> None:
    """Shade and mark what comes from outside, where it shows."""
    for sensor, start, end in scenario.dead:
        axis = axes[_TEMPERATURE if sensor == "temp" else _POWER]
        axis.axvspan(start / 60, end / 60, color=_DEAD, zorder=0, linewidth=0, label="sensor is dead")
    for start, end in _spans(scenario.background, scenario.duration_s):
        axes[_POWER].axvspan(start / 60, end / 60, color=_OTHERS, zorder=0, linewidth=0, label="other programs")
    for start, end in _spans(scenario.hard, scenario.duration_s) if len(scenario.hard.points) > 1 else ():
        axes[_SPEED].axvspan(start / 60, end / 60, color=_HARD, zorder=0, linewidth=0, label="hard text")
    if _BATTERY in axes and scenario.targets.battery is not None:
        for percent in (scenario.targets.battery.save_below, scenario.targets.battery.critical_below):
            axes[_BATTERY].axhline(percent, color=_LOW, linewidth=1.0, linestyle=":", label="battery low, critical")
    if _WRONG in axes:
        for start, _ in scenario.wrong.points[1:]:
            axes[_WRONG].axvline(
                start / 60, color=_SHIFT, linewidth=1.2, linestyle="-.", label="exits begin to go wrong"
            )


def _spans(course: Course, duration_s: float) -> list[tuple[float, float]]:
    """From … to, in seconds, where a course in steps is above 0."""
    ends = [time_s for time_s, _ in course.points[1:]] + [duration_s]
    return [(start, end) for (start, value), end in zip(course.points, ends, strict=True) if value > 0]
