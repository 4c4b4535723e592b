"""What a calibration found, as a table for people and programs: figures of the test split, and what speeds promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import SIGNALS
from .asking import likely_exits
from .baselines import SLERP_WEIGHTS, Baseline, by_signal, cosine_stability, fixed_exits, logit_lens, slerp_lens
from .choose import Choice, Plan
from .corpus import Text
from .costs import Costs
from .evaluate import Predictions
from .head import HeadWeights
from .packed_head import PackedHead
from .quality import (
    Interval,
    Resamples,
    SignalQuality,
    boundary_quality,
    policy_depths,
    risk_coverage,
    signal_quality,
)
from .thresholds import Rung, held_out

if TYPE_CHECKING:
    from .calibrate import _Calibration

_BASELINE_TEXTS = 40  # a plain lens multiplies by the whole output matrix
_CURVE_POINTS = 60
_SHOWN_BOUND = 0.02
_ANY_SIGNAL = "margin"


@dataclass(frozen=True, slots=True)
class Trained:
    """Heads that were trained, by candidate."""

    ridges: Sequence[HeadWeights]
    trained: Sequence[tuple[HeadWeights, dict[str, Any]]]
    packed: Sequence[PackedHead]
    folder: Path  # of their files


@dataclass(frozen=True, slots=True)
class Found:
    """All that the stages found."""

    made: Trained | None  # None for the model's own output head
    tune: Sequence[Predictions]  # of all candidates
    candidates: Sequence[Predictions]  # on test, with stability against the candidate before
    test: Sequence[Predictions]  # of the chosen boundaries, with stability and gate
    met: Sequence[Predictions]  # the same, heads asked where an exit is likely
    rungs: Sequence[Rung]
    costs: Costs
    choice: Choice
    again: Choice
    signal: str
    chosen: tuple[int, ...]


def report_of(run: _Calibration, found: Found) -> dict[str, Any]:
    """The report: plain dicts, lists, texts and numbers."""
    options, made = run.options, found.made
    by_layer = {p.layer: p for p in [*found.candidates, *found.test]}  # the chosen ones have gates
    return {
        "model": str(run.identity),
        "n_layer": run.model.n_layer,
        "candidates": list(run.layers),
        "boundaries": list(found.chosen),
        "head": options.head,
        "signal": found.signal,
        "text": _text(run),
        "training": _training(run, made) if made else {"trainer": run.trainer, "heads": {}},
        "quality": [_quality(by_layer[layer]) for layer in run.layers],
        "quantisation": _quantisation(run, found.tune, made) if made else {},
        "depth": _depth(run, found),
        "asking": {
            str(p.layer): _asking(asked, p, found.signal)
            for asked, p in zip(found.met, found.test, strict=True)
            if made
        },
        "certificates": [_certificate(rung, found) for rung in found.rungs],
        "costs": _costs(found),
        "plans": {
            "exit": _plan(found.again.exit),
            "verified": _plan(found.again.verified),
            "pays": bool(found.choice.boundaries()),
            "considered": [plan.sentence() for plan in found.choice.considered],
        },
        "baselines": _baselines(run, found),
        "variants": _variants(run, found, made) if made and options.compare else [],
        "curves": {str(layer): _curve(by_layer[layer], found.signal) for layer in run.layers},
        "notes": list(run.notes),
    }


def _training(run: _Calibration, made: Trained) -> dict[str, Any]:
    options = run.options
    return {
        "trainer": options.trainer,
        "labels": options.labels,
        "quantisation": options.quantisation,
        "shortlist": len(run.shortlist),
        "clusters": len(run.starts),
        "heads": {str(w.layer): went for w, went in made.trained},
    }


def _text(run: _Calibration) -> dict[str, Any]:
    texts = [text for split in run.splits.values() for text in split]
    return {
        "prompts": len(texts),
        "read": len(run.given),
        "groups": dict(sorted(Counter(run.groups.values()).items())),
        "rows": sum(text.end - text.start for text in [*texts, *run.given]),
        "targets": sum(text.last - text.first for text in [*texts, *run.given]),
        "splits": {name: len(split) for name, split in run.splits.items()},
        "temperature": run.options.temperature,
    }


def _numbers(figure: Interval) -> list[float]:
    return [figure.value, figure.low, figure.high]


def _signal(found: SignalQuality) -> dict[str, Any]:
    return {
        "auroc": _numbers(found.auroc),
        "aurc": _numbers(found.aurc),
        "coverage": {f"{bound:g}": _numbers(figure) for bound, figure in found.coverage.items()},
    }


def _quality(p: Predictions) -> dict[str, Any]:
    found = boundary_quality(p)
    resamples = Resamples(p.prompts)
    groups = {}
    for i, name in enumerate(p.group_names):
        if name and (p.groups == i).any():
            part = p.take(p.groups == i)
            groups[name] = _numbers(Resamples(part.prompts).mean(part.agree))
    return {
        "layer": p.layer,
        "prompts": resamples.n_prompts,
        "tokens": len(p),
        "agreement": _numbers(found.agreement),
        "in_shortlist": _numbers(found.in_shortlist),
        "acceptance": _numbers(found.acceptance),
        "signals": {name: _signal(quality) for name, quality in found.signals.items()},
        "agreement_by_group": groups,
    }


def _quantisation(run: _Calibration, tune: Sequence[Predictions], made: Trained) -> dict[str, Any]:
    """Agreement on the tune split with heads as they were trained, and as the pack holds them."""
    lost = {}
    for (weights, _), now in zip(made.trained, tune, strict=True):
        before = run.predict(PackedHead.of(weights, "F16"), "fine", "tune", made.folder)
        lost[str(weights.layer)] = {"before": float(before.agree.mean()), "after": float(now.agree.mean())}
    return lost


def _depth(run: _Calibration, found: Found) -> dict[str, Any]:
    depths = policy_depths(found.met, found.signal, run.model.n_layer)
    return {f"{b:g}": {"depth": _numbers(d.depth), "coverage": _numbers(d.coverage)} for b, d in depths.items()}


def _asking(asked: Predictions, always: Predictions, signal: str) -> dict[str, float]:
    """What asking heads only where an exit is likely saves and costs, on the test split."""

    def exits(p: Predictions, risk: float) -> int:
        return int(likely_exits(p.uncertainty(signal), ~p.agree, risk).sum())

    found = {f"kept at {risk:g}": exits(asked, risk) / max(1, exits(always, risk)) for risk in (0.02, 0.05)}
    return {"asked": float(asked.guessed.sum() / max(1, always.guessed.sum())), **found}


def _certificate(rung: Rung, found: Found) -> dict[str, Any]:
    described: dict[str, Any] = {
        "signal": rung.signal,
        "risk": rung.risk,
        "kind": rung.certificate["kind"],
        "bound": rung.bound,
        "delta": rung.delta,
        "method": rung.method,
        "holds": rung.holds,
        "coverage": rung.coverage,
        "prompts_needed": rung.prompts_needed,
        "sentence": rung.sentence(),
    }
    if rung.holds and rung.signal == found.signal:
        described["test"] = asdict(held_out(rung, found.met, [p.uncertainty(rung.signal) for p in found.met]))
    return described


def _costs(found: Found) -> dict[str, Any]:
    costs = found.costs
    return {
        "full_ms": costs.full[0],
        "slices_ms": [times[0] for times in costs.slices],
        "heads_ms": {str(layer): times[0] for layer, times in zip(costs.layers, costs.heads, strict=True)},
        "head_share": {
            str(layer): times[0] / costs.full[0] for layer, times in zip(costs.layers, costs.heads, strict=True)
        },
        # what a batch of k costs, as a multiple of one token
        "batch": [k / costs.full[0] for k in costs.full],
    }


def _plan(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "sentence": plan.sentence(),
        "layers": list(plan.layers),
        "thresholds": list(plan.thresholds),
        "disagreement": plan.disagreement,
        "speedup": plan.pace.speedup,
        "pays": plan.pace.pays,
        **asdict(plan.pace),
    }


def _baselines(run: _Calibration, found: Found) -> list[dict[str, Any]]:
    """On the same few texts: the head, and what it is compared with, at each chosen boundary."""
    texts = run.splits["test"][:_BASELINE_TEXTS]
    prompts = {text.prompt for text in texts}
    rows: list[dict[str, Any]] = []
    for p in found.test:
        layer = p.layer
        place = run.layers.index(layer)
        some = p.take(np.isin(p.prompts, list(prompts)))
        compared = [by_signal("head", some, found.signal)]
        ridge = found.made.ridges[place] if found.made else None
        if found.made and ridge and run.trainer != "ridge":
            packed = PackedHead.of(ridge, run.options.quantisation)
            compared.append(by_signal("ridge lens", run.predict(packed, "lens", "baseline", found.made.folder, texts)))
        if ridge:
            lens = logit_lens(texts, layer, run.norm, run.rows, run.shortlist, run.starts)
            compared.append(by_signal("logit lens", lens))
        # against the candidate before, as the first boundary of a pack has none before it
        before = found.candidates[place].take(np.isin(p.prompts, list(prompts)))
        compared += [cosine_stability(before), fixed_exits(some)]
        if ridge:
            own = run.norm, run.rows, run.shortlist, run.starts
            arcs = {weight: slerp_lens(texts, layer, weight, ridge.projection, *own) for weight in SLERP_WEIGHTS}
            compared += [by_signal(f"SLERP {weight:g}", arc) for weight, arc in arcs.items()]
        rows += [_baseline(item) for item in compared]
    return rows


def _baseline(item: Baseline) -> dict[str, Any]:
    resamples = Resamples(item.prompts)
    quality = signal_quality(item.uncertainty, ~item.agree, resamples)
    return {
        "name": item.name,
        "layer": item.layer,
        "agreement": _numbers(resamples.mean(item.agree)),
        "auroc": _numbers(quality.auroc),
        "coverage": _numbers(quality.coverage[_SHOWN_BOUND]),
    }


def _variants(run: _Calibration, found: Found, made: Trained) -> list[dict[str, Any]]:
    """Other ways to distil the deepest chosen head, on the test split."""
    layer = found.chosen[-1]
    ridge = made.ridges[run.layers.index(layer)]
    train = run.splits["train"]
    ways: dict[str, tuple[Sequence[Text], Any]] = {
        "soft labels": ([*train, *run.given], "soft"),
        "hard labels": ([*train, *run.given], "hard"),
    }
    if run.given:
        n = min(len(train), len(run.given))
        ways["plain text alone"] = run.given[:n], "soft"
        ways["answers alone"] = train[:n], "soft"
    rows = []
    for name, (texts, labels) in ways.items():
        weights, went = run.train_variant(ridge, texts, labels, 1)
        packed = PackedHead.of(weights, run.options.quantisation)
        said = run.predict(packed, name.replace(" ", "-"), "test", made.folder)
        quality = boundary_quality(said)
        signal = max(
            (s for s in SIGNALS if s in quality.signals), key=lambda s: quality.signals[s].coverage[_SHOWN_BOUND].value
        )
        rows.append(
            {
                "name": name,
                "layer": layer,
                "texts": len(texts),
                "agreement": _numbers(quality.agreement),
                "auroc": _numbers(quality.signals[signal].auroc),
                "coverage": _numbers(quality.signals[signal].coverage[_SHOWN_BOUND]),
                "stopped": went["stopped"],
            }
        )
    return rows


def _curve(p: Predictions, signal: str) -> dict[str, Any]:
    """Risk by coverage, at some points; by another signal where there is not this one, as gates are of a pack."""
    signal = signal if signal in p.signals else _ANY_SIGNAL
    coverage, risk = risk_coverage(p.uncertainty(signal), ~p.agree)
    at = np.unique(np.linspace(0, max(len(coverage) - 1, 0), _CURVE_POINTS).round().astype(int))[: len(coverage)]
    return {"signal": signal, "coverage": coverage[at].tolist(), "risk": risk[at].tolist()}
