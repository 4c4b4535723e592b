"""A calibration's report for people: tables of text, and a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError

_BOUNDS = ("0.01", "0.02", "0.05")


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as text, in the order in which one would ask."""
    parts = [
        _text(report),
        _agreement(report),
        _signals(report),
        _asking(report),
        _certificates(report),
        _plans(report),
        _baselines(report),
        _variants(report),
        _notes(report),
    ]
    lines: list[str] = []
    for part in parts:
        found = list(part)
        if found:
            lines += ([""] if lines else []) + found
    return lines


def _figure(figure: Sequence[float]) -> str:
    """value [low, high]"""
    if math.isnan(figure[0]):
        return "-"
    return f"{figure[0]:.3f} [{figure[1]:.3f}, {figure[2]:.3f}]"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return (first[0].ljust(first[1]) + "".join(cell.rjust(width) for cell, width in rest)).rstrip()


def _text(report: dict[str, Any]) -> Iterator[str]:
    text, training = report["text"], report["training"]
    splits = ", ".join(f"{n:,} {name}" for name, n in text["splits"].items() if n)
    groups = ", ".join(f"{name or 'other'}: {n:,}" for name, n in text["groups"].items())
    yield f"{text['prompts']:,} answered prompts ({splits}), {text['read']:,} texts read, {text['targets']:,} tokens"
    if len(text["groups"]) > 1:
        yield f"kinds: {groups}"
    if _is_shared(report):
        yield "exits through the model's own output head: nothing was trained, it can name all tokens"
        return
    kind = "heads trained with PyTorch" if training["trainer"] == "torch" else "linear heads (ridge)"
    yield (
        f"{kind}, {training['labels']} labels, {training['quantisation']}; "
        f"they can name {training['shortlist']:,} tokens in {training['clusters']:,} clusters"
    )


def _is_shared(report: dict[str, Any]) -> bool:
    """Whether the report is of the model's own output head."""
    return bool(report["training"]["trainer"] == "none")


def _agreement(report: dict[str, Any]) -> Iterator[str]:
    if _is_shared(report):
        yield from _shared_agreement(report)
        return
    widths = (7, 24, 24, 24, 14, 14)
    yield "test split, 95% intervals by prompt"
    yield _row(("layer", "agreement", "in shortlist", "acceptance", "before quant.", "head ÷ token"), widths)
    for found in report["quality"]:
        layer = str(found["layer"])
        lost = report["quantisation"][layer]
        share = report["costs"]["head_share"][layer]
        chosen = "*" if found["layer"] in report["boundaries"] else ""
        figures = [_figure(found[key]) for key in ("agreement", "in_shortlist", "acceptance")]
        yield _row((layer + chosen, *figures, f"{lost['before'] - lost['after']:+.3f}", f"{share:.3f}"), widths)
    yield "*: in the pack; before quant.: agreement that quantisation costs, on the tune split"


def _shared_agreement(report: dict[str, Any]) -> Iterator[str]:
    widths = (7, 24, 24, 14)
    yield "test split, 95% intervals by prompt"
    yield _row(("layer", "agreement", "acceptance", "head ÷ token"), widths)
    for found in report["quality"]:
        layer = str(found["layer"])
        chosen = "*" if found["layer"] in report["boundaries"] else ""
        figures = [_figure(found[key]) for key in ("agreement", "acceptance")]
        yield _row((layer + chosen, *figures, f"{report['costs']['head_share'][layer]:.3f}"), widths)
    yield "*: in the pack"


def _signals(report: dict[str, Any]) -> Iterator[str]:
    widths = (18, 24, 10, 24, 12, 12)
    yield f"signals: which tokens a head is right about (the pack uses {report['signal']})"
    yield _row(("layer, signal", "AUROC", "AURC", "coverage at 2%", "at 1%", "at 5%"), widths)
    for found in report["quality"]:
        for name, quality in found["signals"].items():
            at = quality["coverage"]
            yield _row(
                (
                    f"{found['layer']} {name}",
                    _figure(quality["auroc"]),
                    f"{quality['aurc'][0]:.3f}",
                    _figure(at[_BOUNDS[1]]),
                    f"{at[_BOUNDS[0]][0]:.3f}",
                    f"{at[_BOUNDS[2]][0]:.3f}",
                ),
                widths,
            )
    yield "coverage: share of tokens that can exit while that share of the exits is wrong, chosen on the same tokens"
    for bound, found in report["depth"].items():
        yield (
            f"all boundaries at {float(bound):.0%} disagreement: mean depth {_figure(found['depth'])} of "
            f"{report['n_layer']} layers, coverage {_figure(found['coverage'])}"
        )


def _asking(report: dict[str, Any]) -> Iterator[str]:
    for layer, found in report["asking"].items():
        kept = ", ".join(f"{found[f'kept at {bound}']:.0%} at {float(bound):.0%}" for bound in ("0.02", "0.05"))
        yield (
            f"layer {layer}: a look at the state decides where the head is asked: about {found['asked']:.0%} of the "
            f"tokens; of the exits it leaves {kept} disagreement"
        )


def _certificates(report: dict[str, Any]) -> Iterator[str]:
    certify = report["text"]["splits"]["certify"]
    yield f"certificates by {report['signal']}, from {certify:,} prompts; coverage on them, and the risk on test"
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in report["certificates"]:
        if found["signal"] == report["signal"]:
            by_kind.setdefault((found["kind"], found["method"]), []).append(found)
    for (kind, method), entries in by_kind.items():
        held = [found for found in entries if found["holds"]]
        sure = f"confidence {1 - entries[0]['delta']:.3g}" if method == "ltt" else "in expectation"
        yield f"  {kind}, {sure}{'' if held else ': nothing certified'}"
        for found in held:
            test = found["test"]
            yield (
                f"    at most {found['bound']:g}: coverage {found['coverage']:.3f}, "
                f"on test {_figure([test['risk'], test['risk_low'], test['risk_high']])}"
            )
        missing = [found for found in entries if not found["holds"]]
        if missing:
            needs = ", ".join(f"{found['bound']:g} ({_needs(found)})" for found in missing)
            yield f"    not certified: {needs}"
    others = {c["signal"] for c in report["certificates"] if c["holds"]} - {report["signal"]}
    if others:
        yield f"certified by other signals, too: {', '.join(sorted(others))}"


def _needs(found: dict[str, Any]) -> str:
    """How many prompts the certify split lacks."""
    if found["prompts_needed"] is None:
        return "no number of prompts would do"
    return f"about {found['prompts_needed']:,} prompts"


def _plans(report: dict[str, Any]) -> Iterator[str]:
    costs = report["costs"]
    batch = ", ".join(f"{factor:.2f}" for factor in costs["batch"][1::2])
    full = f"{costs['full_ms']:.2f} ms"
    yield f"on this device: a token takes {full} at full depth; 2, 4, 6, 8 at once {batch} times that"
    for mode in ("exit", "verified"):
        plan = report["plans"][mode]
        yield plan["sentence"] if plan else f"mode {mode}: no policy stays within the allowed disagreement"
    if not report["plans"]["pays"]:
        yield "early exits do not pay here: no plan is faster than full depth"


def _compared(title: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    widths = (26, 24, 24, 24)
    yield title
    yield _row(("", "agreement", "AUROC", "coverage at 2%"), widths)
    for row in rows:
        figures = [_figure(row[key]) for key in ("agreement", "auroc", "coverage")]
        yield _row((f"{row['layer']} {row['name']}", *figures), widths)


def _baselines(report: dict[str, Any]) -> Iterator[str]:
    if report["baselines"]:
        yield from _compared("compared with (some texts of the test split)", report["baselines"])


def _variants(report: dict[str, Any]) -> Iterator[str]:
    if report["variants"]:
        yield from _compared("ways to train", report["variants"])


def _notes(report: dict[str, Any]) -> Iterator[str]:
    for layer, went in report["training"]["heads"].items():
        if "kept" in went["stopped"]:
            yield f"warning: the head behind layer {layer}: {went['stopped']}"
    for note in report["notes"]:
        yield f"note: {note}"


# ── picture ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: agreement by depth, and disagreement by coverage. Raises UsageError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_depth(left, report)
    _draw_curves(right, report)
    text = report["text"]
    figure.suptitle(f"{report['model']}\n{text['splits']['test']:,} prompts held out", fontsize=11, parse_math=False)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "name another file with --png") from error


def _draw_depth(axis: Any, report: dict[str, Any]) -> None:
    layers = [found["layer"] for found in report["quality"]]
    keys = ["agreement", "acceptance"] + ([] if _is_shared(report) else ["in_shortlist"])
    for key in keys:
        figures = [found[key] for found in report["quality"]]
        middle = [f[0] for f in figures]
        spread = [[f[0] - f[1] for f in figures], [f[2] - f[0] for f in figures]]
        axis.errorbar(layers, middle, yerr=spread, marker="o", capsize=3, label=key.replace("_", " "))
    for layer in report["boundaries"]:
        axis.axvline(layer, color="0.7", linestyle=":", zorder=0)
    axis.set_title("Agreement with full depth (dotted: in the pack)")
    axis.set_xlabel(f"layers computed, of {report['n_layer']}")
    axis.set_xticks(layers)
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_curves(axis: Any, report: dict[str, Any]) -> None:
    for layer, curve in report["curves"].items():
        axis.plot(curve["coverage"], curve["risk"], label=f"layer {layer}, by {curve['signal']}")
    for bound in _BOUNDS:
        axis.axhline(float(bound), color="0.7", linestyle=":", zorder=0)
    axis.set_title("Disagreement by coverage, each boundary alone")
    axis.set_xlabel("coverage: share of tokens that exit")
    axis.set_ylabel("disagreement among them")
    axis.grid(alpha=0.3)
    axis.legend()
