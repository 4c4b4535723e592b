"""Exit policies in a family of one parameter, and what each does to each prompt of a split.

A policy is one threshold per boundary: a token exits at the first boundary where its uncertainty is below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..types import Floats

RISKS = ("exits", "prompts", "tokens", "acceptance")

_N_CANDIDATES = 60
_LEAST_COVERAGE = 0.003  # of the safest candidate
_LEAST_BIN = 20  # tokens a disagreement is estimated from
_N_BINS = 40
_RAMP = 1e-6  # keeps an estimate that is flat strictly rising

Numbers = NDArray[np.float64]


class Heard(Protocol):
    """What a boundary's head said on m targets. Those of several boundaries are aligned: same targets, same order."""

    @property
    def prompts(self) -> NDArray[np.int32]: ...

    @property
    def agree(self) -> NDArray[np.bool_]: ...

    @property
    def acceptance(self) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Family:
    """Policies from the safest to the boldest: thresholds (candidates, boundaries), rising in each column."""

    signal: str
    thresholds: Numbers


@dataclass(frozen=True, slots=True)
class Tally:
    """What each of C policies does to each of n prompts; the prompts are in ascending order of their numbers."""

    prompts: NDArray[np.int32]  # (n,)
    tokens: NDArray[np.int64]  # (n,)
    exits: Numbers  # (n, C)
    errors: Numbers  # (n, C): exits that full depth disagrees with
    refused: Numbers  # (n, C): sum of 1 - acceptance over exits
    by_boundary: Numbers  # (C, boundaries): exits of all prompts

    def coverage(self) -> Numbers:
        """Share of tokens that exit (C,), on average over prompts."""
        return np.asarray((self.exits / self.tokens[:, None]).mean(axis=0))

    def risk(self, name: str) -> Numbers:
        """Observed risk (C,); NaN where it is of exits and there are none."""
        return np.asarray(ratio(*self.parts(name)))

    def parts(self, name: str) -> tuple[Numbers, Numbers]:
        """Numerator and denominator (n, C) by prompt; the risk is the ratio of their means."""
        if name not in RISKS:
            raise UsageError(f"there is no risk {name}", f"one of {', '.join(RISKS)}")
        if name == "prompts":
            return self.errors / np.maximum(self.exits, 1), (self.exits > 0).astype(np.float64)
        tokens = self.tokens[:, None]
        if name == "tokens":
            return self.errors / tokens, np.ones_like(self.errors)
        return (self.errors if name == "exits" else self.refused) / tokens, self.exits / tokens

    def excess(self, name: str, bound: float) -> Numbers:
        """Losses (n, C) within -bound … 1 - bound, whose mean is at most 0 exactly if the risk is at most `bound`."""
        above, below = self.parts(name)
        return np.clip(above - bound * below, -bound, 1 - bound)


def fit_family(
    signal: str, heard: Sequence[Heard], uncertainties: Sequence[Floats], n_candidates: int = _N_CANDIDATES
) -> Family:
    """A family of policies from the tune split: aligned predictions and uncertainties (m,) of each boundary.

    All thresholds of a policy stand for the same probability of disagreement. The gate's uncertainty is one; that of
    another signal is estimated from its rank, as a rising function (isotonic regression over bins of tokens). The
    candidates are spaced evenly in the logarithm of coverage, up to the policy by which all exit at once. A boundary
    without numbers never exits.

    Raises UsageError without tokens, or if the boundaries do not fit together.
    """
    columns = _columns(heard, uncertainties)
    scales = [_scale(signal, column, ~item.agree) for item, column in zip(heard, columns, strict=True)]
    scores = np.stack([np.interp(np.where(np.isnan(u), np.inf, u), *s) for u, s in zip(columns, scales, strict=True)])
    scores[np.isnan(np.stack(columns))] = np.inf
    surest = scores.min(axis=0)
    surest = surest[np.isfinite(surest)]
    if not len(surest):
        return Family(signal, np.zeros((n_candidates, len(columns))))
    levels = np.quantile(surest, np.geomspace(_LEAST_COVERAGE, 1.0, n_candidates))
    if signal == "gate":
        thresholds = np.repeat(levels[:, None], len(columns), axis=1)
    else:
        thresholds = np.stack([np.interp(levels, risks, knots) for knots, risks in scales], axis=1)
    # everything exits at the boldest, although what exits lies strictly below
    highest = [float(knots[-1]) for knots, _ in scales]
    if signal == "gate":
        highest = [max(highest)] * len(highest)
    thresholds[-1] = [math.nextafter(value, math.inf) if value > 0 else 0.0 for value in highest]
    return Family(signal, np.maximum.accumulate(np.maximum(thresholds, 0.0)))


def tally(thresholds: Numbers, heard: Sequence[Heard], uncertainties: Sequence[Floats]) -> Tally:
    """Count what policies (C, boundaries), thresholds rising in each column, do on aligned predictions.

    Every token enters and leaves a boundary's exits once along the candidates: one pass over the tokens serves all.
    Raises UsageError without tokens, or if the boundaries do not fit together.
    """
    columns = _columns(heard, uncertainties)
    prompts, place = np.unique(heard[0].prompts, return_inverse=True)
    n, n_candidates = len(prompts), len(thresholds)
    exits, errors = (np.zeros((n, n_candidates)) for _ in range(2))
    refused: Numbers = np.zeros((n, n_candidates))
    by_boundary = np.zeros((n_candidates, len(columns)))
    taken = np.full(len(place), n_candidates)  # the first candidate by which an earlier boundary takes the token
    for b, (item, column) in enumerate(zip(heard, columns, strict=True)):
        # the first candidate with uncertainty < threshold; NaN sorts behind all
        first = np.searchsorted(thresholds[:, b], column, side="right")
        mine = first < taken
        doubt = 1.0 - np.clip(np.nan_to_num(item.acceptance.astype(np.float64), nan=0.0), 0.0, 1.0)
        for table, weights in ((exits, None), (errors, ~item.agree), (refused, doubt)):
            change = np.zeros(n * (n_candidates + 1))
            for edge, sign in ((first, 1), (taken, -1)):
                share = None if weights is None else weights[mine].astype(np.float64)
                change += sign * np.bincount(place[mine] * (n_candidates + 1) + edge[mine], share, len(change))
            found = change.reshape(n, n_candidates + 1)[:, :-1].cumsum(axis=1)
            table += found
            if weights is None:
                by_boundary[:, b] = found.sum(axis=0)
        taken = np.minimum(taken, first)
    # sums of fractions leave rounding behind where they cancel
    refused = np.clip(refused, 0.0, exits)
    return Tally(prompts, np.bincount(place, minlength=n), exits, errors, refused, by_boundary)


def _columns(heard: Sequence[Heard], uncertainties: Sequence[Floats]) -> list[Numbers]:
    """Uncertainties (m,) as the engine compares them; in 32 bits a threshold would be rounded."""
    if not heard or not len(heard[0].prompts):
        raise UsageError("there are no predictions to set thresholds from", "give more prompts")
    m = len(heard[0].prompts)
    fits = len(heard) == len(uncertainties) and all(len(u) == m for u in uncertainties)
    if not fits or any(not np.array_equal(item.prompts, heard[0].prompts) for item in heard):
        raise UsageError("predictions of several boundaries must be of the same tokens")
    return [np.asarray(u, np.float64) for u in uncertainties]


def _scale(signal: str, column: Numbers, wrong: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Uncertainties and the disagreement they stand for, both strictly rising from 0; all 0 without a number."""
    known = np.isfinite(column)
    order = np.argsort(column[known], kind="stable")
    values, mistakes = column[known][order], wrong[known][order]
    if not len(values) or values[-1] <= 0:
        return np.zeros(1), np.zeros(1)
    if signal == "gate":
        knots = np.array([0.0, values[-1]])
        return knots, knots
    # bins grow with the rank: what exits first is told apart most finely
    edges = np.unique(np.round(np.geomspace(min(_LEAST_BIN, len(values)), len(values), _N_BINS)).astype(int))
    edges = edges[np.append(values[edges[:-1] - 1] < values[edges[1:] - 1], True)]  # equal values share a bin
    edges = edges[values[edges - 1] > 0]
    sizes = np.diff(edges, prepend=0)
    rates = _rising(np.diff(np.cumsum(mistakes)[edges - 1], prepend=0) / sizes, sizes)
    ramp = _RAMP * np.arange(1, len(rates) + 1) / len(rates)
    return np.append(0.0, values[edges - 1]), np.append(0.0, rates + ramp)


def _rising(rates: Numbers, weights: NDArray[np.int64]) -> Numbers:
    """The nearest rising row in weighted squares: neighbours that fall are pooled (isotonic regression)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for rate, weight in zip(rates.tolist(), weights.tolist(), strict=True):
        block = (rate, float(weight), 1)
        while blocks and blocks[-1][0] >= block[0]:
            mean, more, length = blocks.pop()
            total = more + block[1]
            block = ((mean * more + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


def ratio(above: Numbers, below: Numbers, axis: int | None = 0) -> Numbers:
    """Mean ÷ mean along `axis`, or element by element; NaN where there is nothing below."""
    top, bottom = (above, below) if axis is None else (above.mean(axis=axis), below.mean(axis=axis))
    found: Numbers = np.full(np.shape(top), np.nan)
    np.divide(top, bottom, out=found, where=bottom > 0)
    return found
