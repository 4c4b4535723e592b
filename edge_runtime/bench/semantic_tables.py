"""The benchmark's results as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from .semantic_costs import ONE, SEVERAL, CostResult, EncoderCost
from .semantic_quality import SHARES, KindQuality, ScoreQuality, Source
from .semantic_run import QualityResult

LEAST_AUROC = 0.7
MOST_OVER_ONE = 3.0
MOST_ENCODER_MS = 5.0


def quality_report(found: QualityResult) -> list[str]:
    """All tables of the quality part."""
    lines = []
    for each in found.judged:
        lines += [
            f"## Which score knows that the {each.judged.value} answer is wrong?",
            "",
            f"{each.accuracy:.1%} of {found.questions} answers are right, {each.n_cut} were cut; the last columns "
            "say how many are right where only the surest are given",
            "",
            *quality_lines(each.scores),
            "",
            *quality_verdicts(each.scores, found.main),
            "",
            *kind_lines(each.kinds, each.kind_scores),
            "",
            *number_lines(each.numbers),
            "",
        ]
    lines.append(
        f"a sample has {found.tokens_per_sample:.1f} tokens on average; stopping early draws "
        f"{found.drawn_when_stopping:.1f} on average"
    )
    return lines


def quality_lines(found: Sequence[ScoreQuality]) -> list[str]:
    """A row for each score."""
    shares = [f"right of {share:.0%}" for share in SHARES]
    columns = ["score", "of", "AUROC [95%]", "first half", "second half", "minus best of one answer [95%]", *shares]
    rows = (
        [
            each.name,
            each.source.value,
            str(each.auroc),
            *(_figure(half) for half in each.halves),
            str(each.over_single),
            *(f"{accuracy:.0%}" for accuracy in each.accuracy_at),
        ]
        for each in found
    )
    return table(columns, rows)


def kind_lines(found: Sequence[KindQuality], names: Sequence[str]) -> list[str]:
    """A row for each kind of question; `names` are of the scores whose AUROCs they have."""
    columns = ["kind", "questions", "right", "semantic entropy, nats", *(f"AUROC, {name}" for name in names)]
    rows = (
        [k.kind, str(k.n), f"{k.accuracy:.0%}", f"{k.mean_entropy:.2f}", *(_figure(value) for value in k.auroc)]
        for k in found
    )
    return table(columns, rows)


def number_lines(found: Mapping[int, tuple[float, float]]) -> list[str]:
    """AUROC of semantic entropy by the number of samples."""
    rows = ([str(n), _figure(all_), _figure(second)] for n, (all_, second) in found.items())
    return table(["samples", "AUROC", "second half"], rows)


def quality_verdicts(found: Sequence[ScoreQuality], name: str) -> list[str]:
    """Whether a score of several answers is as good as wanted."""
    ours = next(each for each in found if each.name == name)
    best = max((e for e in found if e.source is Source.ANSWER), key=lambda e: e.auroc.value)
    return [
        f"{name}: {_figure(ours.auroc.value)}, wanted ≥ {LEAST_AUROC}: {_met(ours.auroc.value >= LEAST_AUROC)}",
        f"{name} against {best.name}, the best score of one answer: {_figure(ours.auroc.value)} against "
        f"{_figure(best.auroc.value)}, wanted ≥: {_met(ours.auroc.value >= best.auroc.value)}",
    ]


def cost_lines(found: Mapping[str, CostResult]) -> list[str]:
    """A row for each side of each comparison."""
    columns = ["", "prompt tokens", "side", "ms", "tokens", "÷ one answer", "joules"]
    rows = (
        [
            name,
            str(result.prompt_tokens),
            side,
            ms.text(0),
            f"{result.tokens[side]:.0f}",
            result.over_one[side].text() if side in result.over_one else "1",
            _joules(result.energy_j[side]),
        ]
        for name, result in found.items()
        for side, ms in result.ms.items()
    )
    return table(columns, rows)


def cost_verdicts(found: Mapping[str, CostResult]) -> list[str]:
    """Whether several answers cost as little as wanted."""
    lines = []
    for name, result in found.items():
        ratio = result.over_one[SEVERAL].median
        lines.append(f"{name}: {SEVERAL} ÷ {ONE} {ratio:.2f}, wanted ≤ {MOST_OVER_ONE}: {_met(ratio <= MOST_OVER_ONE)}")
    return lines


def encoder_lines(found: EncoderCost) -> list[str]:
    """What the encoder takes, and whether that is as little as wanted."""
    loaded = "LOADED although nobody asked for it" if found.loaded_before else "not loaded before it is asked for"
    return [
        f"{found.encoder}, {found.texts} answers one by one on one core: {found.ms.text()} ms each, "
        f"wanted ≤ {MOST_ENCODER_MS:g}: {_met(found.ms.median <= MOST_ENCODER_MS)}",
        f"a process grows by {found.rss_bytes / 2**20:.0f} MiB, and opens it in {found.open_ms:.0f} ms; "
        f"onnxruntime is {loaded}",
    ]


def plain(found: Any) -> Any:
    """Results as JSON takes them: None for what is not defined."""
    if is_dataclass(found) and not isinstance(found, type):
        return {field.name: plain(getattr(found, field.name)) for field in fields(found)}
    if isinstance(found, Mapping):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _joules(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"
