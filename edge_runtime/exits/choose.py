"""Which boundaries pay on this device: measured times of slices and heads, and the policies they make worthwhile.

A token that exits saves nothing by itself: its other layers are computed later, in a batch with those of its
neighbours, and what a batch of k costs more than one token, the device decides. So a policy's time is counted along
real texts, by the engine's own rules for what waits and what runs together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..types import Floats, Mode
from .costs import Costs
from .policies import Heard, Numbers, fit_family, tally

_SETTINGS_TRIED = 10
_MOST_BOUNDARIES = 2


@dataclass(frozen=True, slots=True)
class Pace:
    """What a policy comes to along texts, by measured times."""

    ms_per_token: float
    full_ms: float  # a token at full depth, in one piece
    coverage: float  # share of published tokens that exited, confirmed drafts in mode verified
    tokens_per_settle: float  # published tokens per batch through the last slice
    acceptance: float  # share of drafts that full depth agreed with; NaN without drafts, and in mode exit

    @property
    def speedup(self) -> float:
        return self.full_ms / self.ms_per_token

    @property
    def pays(self) -> bool:
        """Whether it beats full depth at all."""
        return self.ms_per_token < self.full_ms


@dataclass(frozen=True, slots=True)
class Plan:
    """Boundaries and thresholds for one mode, and what they promise."""

    mode: Mode
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    disagreement: float  # the risk asked for, as observed on the tune split; NaN if nothing exits
    pace: Pace

    def sentence(self) -> str:
        """The plan in words, with the numbers that speak for or against it."""
        p = self.pace
        layers = " and ".join(map(str, self.layers))
        verdict = "faster than" if p.pays else "no faster than"
        return (
            f"mode {self.mode.value}, boundaries after layer {layers}: {p.ms_per_token:.2f} ms per token, "
            f"{verdict} full depth with {p.full_ms:.2f} ms ({p.speedup:.2f}×), {p.coverage:.0%} of tokens exit, "
            f"{p.tokens_per_settle:.2f} tokens per settle"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest plan of each mode, whether or not it pays; None where no policy stays within the allowed risk."""

    exit: Plan | None
    verified: Plan | None
    considered: tuple[Plan, ...]  # the fastest of each mode and set of boundaries

    def boundaries(self) -> tuple[int, ...]:
        """Those of the plan that gains most over full depth; () if none does."""
        paying = [plan for plan in (self.exit, self.verified) if plan is not None and plan.pace.pays]
        return min(paying, key=lambda plan: plan.pace.ms_per_token).layers if paying else ()


def exit_places(thresholds: Sequence[float], uncertainties: Sequence[Floats]) -> NDArray[np.int64]:
    """The place (m,) of the first boundary where a token's uncertainty is below; the number of boundaries if none."""
    below = [np.asarray(u, np.float64) < t for u, t in zip(uncertainties, thresholds, strict=True)]
    return np.asarray(np.stack([*below, np.ones_like(below[0])]).argmax(axis=0), np.int64)


def predict_time(
    mode: Mode,
    places: NDArray[np.int64],
    agree: NDArray[np.bool_],
    prompts: NDArray[np.int32],
    costs: Costs,
    cap: int = 8,
) -> Pace:
    """Time per token along texts, in which token i would exit at boundary `places[i]` and `agree[i]` with full depth.

    A text is a run of equal `prompts`. At most `cap` tokens wait. What a later boundary's head must hear of tokens that
    exited before is counted. In mode verified, drafts go on along the real text behind a wrong one, as nobody knows
    what the heads would say of another. What is left waiting at the end of a text is brought to full depth.

    Raises UsageError for a mode without exits, or without tokens.
    """
    if mode is Mode.FULL or not len(places):
        raise UsageError("there are no exits to time", "mode exit or verified, and at least one token")
    table = _Table(costs, cap + 1, mode is Mode.VERIFIED)
    edges = [0, *(np.flatnonzero(np.diff(prompts)) + 1).tolist(), len(places)]
    walk = _walk_verified if mode is Mode.VERIFIED else _walk_exits
    total = _Tally()
    for first, stop in itertools.pairwise(edges):
        walk(places[first:stop].tolist(), agree[first:stop].tolist(), table, cap, total)
    n = len(places)
    return Pace(
        ms_per_token=total.ms / n,
        full_ms=costs.full[0],
        coverage=total.exits / n,
        tokens_per_settle=n / total.settles,
        acceptance=total.exits / total.drafts if total.drafts else math.nan,
    )


@dataclass(slots=True)
class _Tally:
    ms: float = 0.0
    exits: int = 0
    drafts: int = 0
    settles: int = 0


class _Table:
    """Cost of bringing k tokens through slice s and past the head behind it, k from 0 to `most`."""

    def __init__(self, costs: Costs, most: int, verify: bool) -> None:
        slices = [*costs.slices[:-1], costs.verify if verify else costs.slices[-1]]
        self.n_slices = len(slices)
        heads = [*costs.heads, (0.0, 0.0)]
        self._rows = [
            [0.0, *(Costs.at(part, k) + Costs.at(head, k) for k in range(1, most + 1))]
            for part, head in zip(slices, heads, strict=True)
        ]

    def run(self, waiting: list[int], stop: int) -> float:
        """Bring what waits through slices 0 … stop - 1."""
        ms = 0.0
        for s in range(stop):
            ms += self._rows[s][waiting[s]]
            waiting[s] = 0
        return ms


def _walk_exits(places: list[int], _agree: list[bool], table: _Table, cap: int, total: _Tally) -> None:
    """Mode exit: a token that goes all the way takes those that wait with it."""
    n = table.n_slices
    waiting = [0] * n
    for place in places:
        stop = n if waiting[-1] >= cap else place + 1
        waiting = [count + 1 for count in waiting]
        total.ms += table.run(waiting, stop)
        total.exits += stop < n
        total.settles += stop == n
    if waiting[-1]:
        total.ms += table.run(waiting, n)
        total.settles += 1


def _walk_verified(places: list[int], agree: list[bool], table: _Table, cap: int, total: _Tally) -> None:
    """Mode verified: draft while tokens exit, then settle all; what full depth agrees with counts, and one more."""
    n, i = table.n_slices, 0
    while i < len(places):
        waiting, drafts = [1] * n, 0
        while drafts < cap and i + drafts < len(places) and places[i + drafts] < n - 1:
            total.ms += table.run(waiting, places[i + drafts] + 1)
            waiting = [count + 1 for count in waiting]
            drafts += 1
        total.ms += table.run(waiting, n)
        total.settles += 1
        row = agree[i : i + drafts]
        accepted = row.index(False) if False in row else drafts
        total.drafts += drafts
        total.exits += accepted
        i += accepted + 1


def choose(
    costs: Costs,
    heard: Sequence[Heard],
    uncertainties: Sequence[Floats],
    allowed: float,
    *,
    signal: str = "gate",
    risk: str = "tokens",
    cap: int = 8,
    sampling: bool = False,
    most_tokens: int = 4000,
    seed: int = 0,
) -> Choice:
    """The fastest one or two of the candidate boundaries, and their thresholds, for both modes.

    `heard` and `uncertainties` are of the tune split, one of each per boundary of `costs`. In mode exit only policies
    count whose observed `risk` is at most `allowed`. With `sampling`, drafts are accepted with the probability that the
    predictions give, else where both agree. Times are counted on up to about `most_tokens` tokens of whole prompts.

    Raises UsageError if the boundaries do not fit together, without tokens, or for an unknown risk.
    """
    if len(heard) != len(costs.layers):
        raise UsageError(f"there are costs of {len(costs.layers)} boundaries and predictions of {len(heard)}")
    random = np.random.default_rng(seed)
    draws = random.random(len(heard[0].prompts))
    some = _some_prompts(heard[0].prompts, most_tokens, random)
    considered: list[Plan] = []
    for size in range(1, _MOST_BOUNDARIES + 1):
        for chosen in itertools.combinations(range(len(heard)), size):
            part, columns = [heard[i] for i in chosen], [uncertainties[i] for i in chosen]
            kept = costs.keep(chosen)
            family = fit_family(signal, part, columns)
            observed = tally(family.thresholds, part, columns).risk(risk)
            known = [item.acceptance > draws if sampling else item.agree for item in part]
            outcome = np.stack([*known, np.ones(len(draws), np.bool_)])
            for mode in (Mode.EXIT, Mode.VERIFIED):
                # NaN: nothing exits, which is no policy of exits
                usable = np.flatnonzero(observed <= allowed) if mode is Mode.EXIT else np.arange(len(observed))
                plans = [
                    _plan(mode, kept, family.thresholds[i], float(observed[i]), columns, outcome, heard[0], some, cap)
                    for i in _spread(usable)
                ]
                if plans:
                    considered.append(min(plans, key=lambda plan: plan.pace.ms_per_token))
    best = {
        mode: min((p for p in considered if p.mode is mode), key=lambda p: p.pace.ms_per_token, default=None)
        for mode in (Mode.EXIT, Mode.VERIFIED)
    }
    return Choice(best[Mode.EXIT], best[Mode.VERIFIED], tuple(considered))


def _plan(
    mode: Mode,
    costs: Costs,
    thresholds: Numbers,
    observed: float,
    columns: Sequence[Floats],
    outcome: NDArray[np.bool_],
    heard: Heard,
    some: NDArray[np.int64],
    cap: int,
) -> Plan:
    places = exit_places(thresholds.tolist(), [column[some] for column in columns])
    agree = outcome[places, some]
    pace = predict_time(mode, places, agree, heard.prompts[some], costs, cap)
    return Plan(mode, costs.layers, tuple(thresholds.tolist()), observed, pace)


def _spread(usable: NDArray[np.int64]) -> list[int]:
    """Some of the candidates, evenly, the boldest among them."""
    if not len(usable):
        return []
    return sorted({int(i) for i in usable[np.linspace(0, len(usable) - 1, _SETTINGS_TRIED).round().astype(int)]})


def _some_prompts(prompts: NDArray[np.int32], most: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Tokens of prompts drawn at random, up to about `most`, in their own order."""
    names, sizes = np.unique(prompts, return_counts=True)
    order = random.permutation(len(names))
    n = int(np.searchsorted(np.cumsum(sizes[order]), most)) + 1
    return np.flatnonzero(np.isin(prompts, names[order[:n]]))
