"""`edge-run labels eval`: how good and how fast a label pack is on a file of labelled messages."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import display
from .bench.measure import Spread, spread
from .errors import EdgeError, UsageError
from .identity import identify
from .labels.dataset import ReadCounts, read_rows
from .labels.evaluate import (
    DepthTimes,
    EvaluateOptions,
    Evaluation,
    EvaluationSample,
    SweepPoint,
    choose_rows,
    describe,
    evaluate,
    sweep,
)
from .labels.pack import LabelPack
from .labels.packs import find_pack
from .labels_progress import read_notes
from .models import find_model
from .native import Model
from .options import start_library
from .progress import reporting
from .slices import default_threads

PLOT_HINT = "pip install 'edge-runtime[plot]'"
_SEED = 0
_MAX_CONFUSION = 12  # labels in a confusion matrix that is printed
_MAX_NAME = 24  # characters of a label in a table
_ACCURACY, _F1 = "#1b6ca8", "#d95f02"


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What the verb was asked for."""

    pack: str
    data: Path
    text: str
    label: str
    model: str
    max_rows: int = 5000
    png: Path | None = None
    full_depth: bool = True
    json: bool = False
    threads: int = 0
    quiet: bool = False
    verbose: bool = False


def evaluate_labels(request: EvalRequest) -> None:
    """Print tables or JSON, and draw the picture if one is wanted.

    Raises UsageError for data or labels that do not fit the pack, PackError, and what reading and running do.
    """
    if request.png is not None:
        _check_picture(request.png)
    start_library(verbose=request.verbose)
    pack = LabelPack.load(find_pack(request.pack))
    path = find_model(request.model)
    pack.check_model(identify(path))
    sample, counts = _read(request, pack)
    with reporting(quiet=request.quiet) as reporter, Model(str(path)) as model:
        options = EvaluateOptions(full_depth=request.full_depth, n_threads=request.threads, seed=_SEED)
        found = evaluate(pack, model, sample.rows, options, reporter)
    points = sweep(found)
    report = _report(request, sample, counts, found, points)
    if request.json:
        display.write_json(report)
    else:
        for line in summary_lines(report):
            print(display.harmless(line))
    if request.png is not None:
        draw(report, request.png)
        if not request.quiet:
            display.tell(f"the picture is in {request.png}")


def _report(
    request: EvalRequest, sample: EvaluationSample, counts: ReadCounts, found: Evaluation, points: Sequence[SweepPoint]
) -> dict[str, Any]:
    pack = found.pack
    return {
        "pack": pack.name,
        "model": {"file": pack.model.file, "n_layer": pack.model.n_layer},
        "labels": pack.labels,
        "threads": request.threads or default_threads(),
        "data": {
            "file": str(request.data),
            "rows_read": counts.read,
            "unlabelled": counts.unlabelled,
            "empty": counts.empty,
            "malformed": counts.malformed,
            "duplicates_left_out": sample.n_duplicates,
            "conflicting_left_out": sample.n_conflicting,
            "by_label_in_file": sample.totals,
            "labels_missing": [label for label, n in sample.totals.items() if not n],
        },
        **describe(found),
        "full_depth": None if found.depth_times is None else _full_depth(found.depth_times),
        "sweep": [dataclasses.asdict(point) for point in points],
    }


def _full_depth(times: DepthTimes) -> dict[str, Any]:
    """Median and range over chunks of messages."""

    def described(values: Spread) -> dict[str, Any]:
        return {key: round(value, 3) for key, value in dataclasses.asdict(values).items()}

    pairs = list(zip(times.n_messages, times.cascade, times.full, strict=True))
    return {
        "messages": sum(times.n_messages),
        "messages_per_second": described(spread([n / full for n, _, full in pairs])),
        "cascade_messages_per_second": described(spread([n / cascade for n, cascade, _ in pairs])),
        "cascade_times_as_fast": described(spread([full / cascade for _, cascade, full in pairs])),
    }


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(request: EvalRequest, pack: LabelPack) -> tuple[EvaluationSample, ReadCounts]:
    counts = ReadCounts()
    with reporting(quiet=request.quiet) as reporter:
        reporter.say(f"reading {request.data}")
        rows = read_rows(
            request.data,
            request.text,
            request.label,
            counts=counts,
            progress=lambda share: reporter.progress(round(1000 * share), 1000),
        )
        sample = choose_rows(rows, pack.labels, request.max_rows, _SEED)
    if not request.quiet:
        for line in read_notes(counts, sample.n_duplicates, sample.n_conflicting, len(sample.rows), request.max_rows):
            display.tell(line)
        missing = [label for label, n in sample.totals.items() if not n]
        if missing:
            display.tell(display.harmless(f"note: no message has the label {' or '.join(missing)}"))
    return sample, counts


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def summary_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report's main figures for a person."""
    cascade, n_layer = report["cascade"], report["model"]["n_layer"]
    yield f"pack {report['pack']} on {report['messages']:,} messages"
    yield ""
    yield f"{'':<{_MAX_NAME}} {'accuracy':>9} {'macro-F1':>9} {'calib. error':>13} {'left here':>10}"
    for stage in report["stages"]:
        yield f"{_quality_row(stage['name'], stage)} {cascade['left_at'][stage['name']]:>10.1%}"
    yield _quality_row("cascade", cascade)
    yield ""
    yield from _label_table(cascade["labels"])
    if len(report["labels"]) <= _MAX_CONFUSION:
        yield ""
        yield from _confusion_table(report["labels"], cascade["confusion"])
    yield ""
    yield (
        f"mean depth {cascade['mean_layer']:.1f} of {n_layer} layers; "
        f"{cascade['agrees_with_all_stages']:.1%} of the labels are those that all stages give"
    )
    where_sure = cascade["accuracy_where_sure"]
    sure = "" if math.isnan(where_sure) or not cascade["unsure"] else f" (accuracy of the others {where_sure:.3f})"
    yield f"unsure {cascade['unsure']:.1%}{sure}; unlike the training messages {cascade['unfamiliar']:.1%}"
    if cascade["cut"]:
        yield f"{cascade['cut']:,} messages are longer than the pack takes: their ends were not read"
    yield (
        f"{cascade['messages_per_second']:,.1f} messages/s (threads: {report['threads']}); "
        f"{report['all_stages_messages_per_second']:,.1f} if each goes through all stages"
    )
    full = report["full_depth"]
    if full is not None:
        yield (
            f"on {full['messages']:,} of them {_range(full['cascade_times_as_fast'])} times as fast as all {n_layer} "
            "layers of the model,"
        )
        yield (
            f"{_range(full['cascade_messages_per_second'])} messages/s against {_range(full['messages_per_second'])}: "
            "medians and ranges of turns"
        )


def _range(values: dict[str, Any]) -> str:
    return Spread(**values).text(1)


def _quality_row(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name:<{_MAX_NAME}} {found['accuracy']:>9.3f} {found['macro_f1']:>9.3f} {found['calibration_error']:>13.3f}"
    )


def _label_table(labels: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield f"{'cascade, by label':<{_MAX_NAME}} {'messages':>9} {'precision':>9} {'recall':>9} {'F1':>9} {'AUROC':>9}"
    for label, found in labels.items():
        figures = (_figure(found[key]) for key in ("precision", "recall", "f1", "auroc"))
        yield f"{_short(label):<{_MAX_NAME}} {found['messages']:>9,} {' '.join(figures)}"


def _confusion_table(labels: Sequence[str], table: Sequence[Sequence[int]]) -> Iterator[str]:
    names = [_short(label, 12) for label in labels]
    widths = [max(9, len(name)) for name in names]
    heads = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    yield f"{'true, and decided:':<{_MAX_NAME}} {heads}"
    for label, counts in zip(labels, table, strict=True):
        cells = " ".join(f"{n:>{width},}" for n, width in zip(counts, widths, strict=True))
        yield f"{_short(label):<{_MAX_NAME}} {cells}"


def _figure(value: float) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.3f}':>9}"


def _short(label: str, limit: int = _MAX_NAME) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


# ── picture ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_picture(path: Path) -> None:
    """Before anything is computed: whether a picture can be drawn, and into this file."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeError("drawing needs matplotlib, which is not installed", PLOT_HINT) from None
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"a picture cannot be written to {path}", "name a file in a folder that exists with --png")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: quality against depth on the left, quality against speed on the right.

    `report` is what the verb gives as JSON. Raises UsageError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    n, accuracy = report["messages"], report["cascade"]["accuracy"]
    margin = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    figure.suptitle(
        display.harmless(
            f"Label pack {_short(report['pack'], 60)} on {n:,} messages (chance moves accuracy by ±{margin:.1f} points)"
        ),
        fontsize=13,
        parse_math=False,
    )
    left, right = figure.subplots(1, 2)
    _draw_depth(left, report)
    _draw_speed(figure, right, report)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "name another file with --png") from error


def _draw_depth(axis: Any, report: dict[str, Any]) -> None:
    cascade, stages = report["cascade"], report["stages"]
    layers = [stage["layer"] for stage in stages]
    for key, name, colour in (("accuracy", "accuracy", _ACCURACY), ("macro_f1", "macro-F1", _F1)):
        axis.plot(
            layers,
            [100 * stage[key] for stage in stages],
            marker="o",
            color=colour,
            label=f"{name} of each stage alone",
        )
        axis.plot(
            cascade["mean_layer"],
            100 * cascade[key],
            marker="*",
            markersize=17,
            linestyle="none",
            color=colour,
            markeredgecolor="black",
            zorder=3,
            label=f"{name} of the cascade",
        )
    axis.set_title("Quality by depth")
    axis.set_xlabel(f"layers computed, of {report['model']['n_layer']} (0: before the network; cascade: mean)")
    axis.set_ylabel("accuracy, macro-F1 in %")
    axis.set_xticks(layers)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def _draw_speed(figure: Any, axis: Any, report: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points, cascade, full = report["sweep"], report["cascade"], report["full_depth"]
    speeds = [point["messages_per_second"] for point in points]
    accuracies = [100 * point["accuracy"] for point in points]
    axis.plot(speeds, accuracies, color="0.6", linewidth=1, zorder=1)
    dots = axis.scatter(
        speeds,
        accuracies,
        c=[point["mean_layer"] for point in points],
        cmap="viridis_r",
        s=28,
        zorder=2,
        label="other thresholds, estimated from the time of each stage",
    )
    axis.plot(
        cascade["messages_per_second"],
        100 * cascade["accuracy"],
        marker="*",
        markersize=17,
        linestyle="none",
        color=_ACCURACY,
        markeredgecolor="black",
        zorder=3,
        label="the pack's thresholds, measured",
    )
    for point in points:
        if point["boldness"] == 0:
            axis.plot(
                point["messages_per_second"],
                100 * point["accuracy"],
                marker="o",
                markersize=13,
                linestyle="none",
                color="none",
                markeredgecolor="black",
                label="the pack's thresholds, estimated",
            )
    if full is not None:
        axis.axvline(
            full["messages_per_second"]["median"],
            color="0.3",
            linestyle="--",
            label=f"speed of all {report['model']['n_layer']} layers, measured on {full['messages']:,} messages",
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title("Accuracy by speed")
    axis.set_xlabel("messages per second")
    axis.set_ylabel("accuracy of the cascade in %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.colorbar(dots, ax=axis, label="mean layers computed")
