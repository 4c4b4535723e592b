"""How good a boundary is, with intervals: agreement, coverage of the shortlist, and what each signal knows.

Intervals are bootstrap percentiles of 95% with whole prompts drawn anew, since the tokens of one answer are not
independent. All figures here are measured on the targets they are told of; `certify` proves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..types import Floats
from .evaluate import Predictions
from .policies import Family, fit_family

RISKS = (0.01, 0.02, 0.05)
N_RESAMPLES = 300
_PERCENTILES = (2.5, 97.5)
_VALUES_AT_ONCE = 2**21
_POLICIES = 200

Weights = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95% interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class SignalQuality:
    """How well a signal tells disagreement from agreement."""

    auroc: Interval  # probability that a disagreement is the less certain of two
    aurc: Interval  # area under the risk–coverage curve: mean disagreement among exits over all coverages
    coverage: dict[float, Interval]  # bound on disagreement among exits → largest share of tokens that can exit


@dataclass(frozen=True, slots=True)
class BoundaryQuality:
    """One boundary on held-out targets."""

    layer: int
    n_prompts: int
    n_targets: int
    agreement: Interval
    in_shortlist: Interval
    acceptance: Interval
    signals: dict[str, SignalQuality]


@dataclass(frozen=True, slots=True)
class DepthQuality:
    """A policy over all boundaries, at one bound on the disagreement among exits."""

    depth: Interval  # mean layers behind a token; all of the model's where it does not exit
    coverage: Interval  # share of tokens that exit


class Resamples:
    """Prompts drawn with replacement, and so how often each target counts in a resample. Equal seed, equal draws."""

    def __init__(self, prompts: NDArray[np.int32], n: int = N_RESAMPLES, seed: int = 0) -> None:
        _, number = np.unique(prompts, return_inverse=True)
        self.number = number  # (m,) of each target's prompt
        self.n_prompts = int(number.max()) + 1 if len(number) else 0
        draws = np.random.default_rng(seed).integers(0, max(self.n_prompts, 1), (n, self.n_prompts))
        self.counts = np.zeros((n + 1, self.n_prompts), np.float32)  # (n + 1, prompts); the first is all, once
        self.counts[0] = 1.0
        for row, drawn in zip(self.counts[1:], draws, strict=True):
            row += np.bincount(drawn, minlength=self.n_prompts)

    def per_prompt(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """Sums over each prompt's targets, (prompts,), of values (m,)."""
        return np.bincount(self.number, values.astype(np.float64), self.n_prompts).astype(np.float64)

    def mean(self, values: NDArray[np.generic]) -> Interval:
        """Mean of values (m,) over targets."""
        n = self.counts @ self.per_prompt(np.ones(len(values)))
        return interval(_quotient(self.counts @ self.per_prompt(values), n))

    def weights(self, order: NDArray[np.int64]) -> Iterator[Weights]:
        """Counts (resamples, m) of targets in `order`, some resamples at a time."""
        step = max(1, _VALUES_AT_ONCE // max(len(order), 1))
        number = self.number[order]
        for start in range(0, len(self.counts), step):
            yield self.counts[start : start + step, number]


def interval(figures: NDArray[np.floating]) -> Interval:
    """Of a figure of all targets, and then of each resample (n + 1,); those where it is not defined are left out."""
    rest = figures[1:][np.isfinite(figures[1:])]
    low, high = np.percentile(rest, _PERCENTILES) if len(rest) else (math.nan, math.nan)
    return Interval(float(figures[0]), float(low), float(high))


def boundary_quality(
    predictions: Predictions, risks: Sequence[float] = RISKS, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> BoundaryQuality:
    """All figures of one boundary; only signals that it has. Raises UsageError without targets."""
    if not len(predictions):
        raise UsageError("there are no held-out tokens to measure on", "give more prompts")
    resamples = Resamples(predictions.prompts, n_resamples, seed)
    wrong = ~predictions.agree
    return BoundaryQuality(
        predictions.layer,
        resamples.n_prompts,
        len(predictions),
        resamples.mean(predictions.agree),
        resamples.mean(predictions.in_shortlist),
        resamples.mean(predictions.acceptance),
        {s: signal_quality(predictions.uncertainty(s), wrong, resamples, risks) for s in predictions.signals},
    )


def signal_quality(
    uncertainty: Floats, wrong: Flags, resamples: Resamples, risks: Sequence[float] = RISKS
) -> SignalQuality:
    """AUROC, AURC and coverages of an uncertainty (m,) against disagreement (m,).

    The coverage at a bound is the largest whose empirical disagreement stays within it, chosen on the same tokens: more
    than can be certified. Tokens of equal uncertainty exit together, those whose uncertainty is NaN never do, and last
    in the two areas.
    """
    order, ends, n_finite = _ranking(uncertainty)
    is_wrong = wrong[order].astype(np.float32)
    columns: dict[object, list[NDArray[np.float64]]] = {"auroc": [], "aurc": [], **{risk: [] for risk in risks}}
    for weights in resamples.weights(order):
        n, errors = _cumulative(weights, is_wrong, ends)
        found = _figures(n, errors, n_finite, risks)
        for name, column in found.items():
            columns[name].append(column)
    done = {name: interval(np.concatenate(parts)) for name, parts in columns.items()}
    return SignalQuality(done["auroc"], done["aurc"], {risk: done[risk] for risk in risks})


def risk_coverage(uncertainty: Floats, wrong: Flags) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coverages and the disagreement among exits at each, for every threshold that can be told apart."""
    order, ends, n_finite = _ranking(uncertainty)
    n, errors = _cumulative(np.ones((1, len(order)), np.float32), wrong[order].astype(np.float32), ends)
    return n[0, :n_finite] / len(order), _quotient(errors[0, :n_finite], n[0, :n_finite])


def _ranking(uncertainty: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Targets (m,), surest first; the last place of each run of equal ones; and how many of these runs may exit."""
    values = np.where(np.isnan(uncertainty), np.inf, uncertainty)
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, np.int64)
    return order, ends, int(np.isfinite(ranked[ends]).sum())


def _cumulative(
    weights: Weights, is_wrong: Floats, ends: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Targets and disagreements up to the end of each run, (resamples, runs); counts are exact in float32."""
    n = np.cumsum(weights, axis=1)[:, ends]
    errors = np.cumsum(weights * is_wrong, axis=1)[:, ends]
    return n.astype(np.float64), errors.astype(np.float64)


def _figures(
    n: NDArray[np.float64], errors: NDArray[np.float64], n_finite: int, risks: Sequence[float]
) -> dict[object, NDArray[np.float64]]:
    """AUROC, AURC and the coverage at each bound, (resamples,) each, from counts up to each threshold."""
    total, n_wrong = n[:, -1], errors[:, -1]
    new = np.diff(n, axis=1, prepend=0.0)
    new_wrong = np.diff(errors, axis=1, prepend=0.0)
    new_right = new - new_wrong
    right = n - errors
    below = (new_wrong * (right - new_right / 2)).sum(axis=1)
    risk = _quotient(errors, n)
    found: dict[object, NDArray[np.float64]] = {
        "auroc": _quotient(below, n_wrong * (total - n_wrong)),
        "aurc": _quotient((new * np.nan_to_num(risk)).sum(axis=1), total),
    }
    for bound in risks:
        allowed = (risk <= bound)[:, :n_finite]  # NaN, no exits, is not
        found[bound] = (n[:, :n_finite] * allowed).max(axis=1, initial=0.0) / total
    return found


def policy_depths(
    boundaries: Sequence[Predictions],
    signal: str,
    n_layer: int,
    risks: Sequence[float] = RISKS,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    family: Family | None = None,
) -> dict[float, DepthQuality]:
    """Mean depth where a token exits at the first boundary that is sure enough, at each bound on disagreement.

    Of the policies in `family`, by default the one fitted to these targets, that of the smallest mean depth within the
    bound counts, chosen on the same targets: better than can be certified. Raises UsageError without targets.
    """
    if not boundaries or not len(boundaries[0]):
        raise UsageError("there are no held-out tokens to measure on", "give more prompts")
    resamples = Resamples(boundaries[0].prompts, n_resamples, seed)
    uncertain = [b.uncertainty(signal) for b in boundaries]
    family = family or fit_family(signal, boundaries, uncertain, _POLICIES)
    tables = []  # per policy: exits, disagreements and layers saved, (3, prompts)
    for limits in family.thresholds:
        outcomes = exit_outcomes(boundaries, uncertain, limits.tolist(), n_layer)
        tables.append([resamples.per_prompt(column) for column in outcomes])
    counts = resamples.counts.astype(np.float64)
    exits, errors, saved = np.einsum("rp,scp->crs", counts, np.asarray(tables), optimize=True)
    n = counts @ resamples.per_prompt(np.ones(len(boundaries[0])))
    risk = _quotient(errors, exits)
    found = {}
    for bound in risks:
        gain = np.where(risk <= bound, saved, 0.0)  # NaN, no exits, gains nothing
        best = gain.argmax(axis=1)[:, None]
        layers = np.take_along_axis(gain, best, 1)[:, 0]
        share = np.where(layers > 0, np.take_along_axis(exits, best, 1)[:, 0], 0.0)
        found[bound] = DepthQuality(interval(n_layer - layers / n), interval(share / n))
    return found


def exit_outcomes(
    boundaries: Sequence[Predictions], uncertain: Sequence[Floats], limits: Sequence[float], n_layer: int
) -> tuple[Flags, Flags, NDArray[np.int32]]:
    """Per target (m,): whether it exits, whether it exits with a token that full depth disagrees with, layers saved."""
    n = len(boundaries[0])
    left, wrong, saved = np.zeros(n, np.bool_), np.zeros(n, np.bool_), np.zeros(n, np.int32)
    for boundary, values, limit in zip(boundaries, uncertain, limits, strict=True):
        now = (values < limit) & ~left
        left |= now
        wrong |= now & ~boundary.agree
        saved[now] = n_layer - boundary.layer
    return left, wrong, saved


def _quotient(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0), np.float64)
