"""Exit thresholds with a certified risk, from held-out predictions of the boundary heads.

The policies to choose from, and their order, are made from the tune split; what is proven of them comes from the
certify split alone. Units are prompts, as the tokens of one text depend on each other.

Risks, e and x being a prompt's disagreements and exits, n its tokens:

    tokens      mean of e / n: the share of a prompt's tokens that exit and that full depth would have chosen otherwise
    exits       mean of e / n ÷ mean of x / n: the same share, of what exits
    prompts     mean of e / x over prompts with exits: how wrong a prompt's exits are on average
    acceptance  as exits, with Σ (1 - acceptance) in place of e: the share of exited drafts that sampling would refuse

A bound on "exits" asks for the most prompts: one prompt in which everything exits and is wrong undoes what a bound of
2% at a coverage of 10% allows in 500 others, so that 1,500 prompts without any error are the least that prove it.
"tokens" and "prompts" need 150 for the same.

Where the sequence of tests starts decides what can be proven. The safest policies have few exits, and so too little to
show for themselves; a sequence from there fails at once. It starts where the tune split promises the most evidence
per prompt. In simulations with 256 and 1,000 prompts this proved at least as much coverage, at every bound, as
starting at the safest, at four places with delta shared out, or testing only the policy that the tune split thinks
best. The tune split also sets the first bets, whose stakes may be higher than usual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..certify import (
    Certificate,
    betting_p_value,
    conformal_risk_control,
    examples_to_control,
    fixed_sequence,
    messages_needed,
)
from ..errors import UsageError
from ..types import Floats
from .policies import RISKS, Family, Heard, Numbers, Tally, fit_family, ratio, tally

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2)
DELTA = 0.05

_KINDS = {
    ("exits", "ltt"): "disagreement of exits",
    ("prompts", "ltt"): "disagreement of a prompt's exits",
    ("tokens", "ltt"): "disagreement of tokens",
    ("acceptance", "ltt"): "refusal of exits",
    ("tokens", "crc"): "mean disagreement of tokens",
    ("acceptance", "crc"): "mean refusal of tokens",
}
_STAKE = 0.95
_STAKES = np.linspace(0.04, 1.0, 25)


@dataclass(frozen=True, slots=True)
class Rung:
    """Thresholds for one allowed risk, and what is proven of them.

    `method` "ltt" (Learn then Test): with probability at least 1 - `delta` over the prompts used, the risk of these
    thresholds stays at or below `bound`. "crc" (conformal risk control): it does so on average over the prompts that
    might have been used only, with no confidence for those that were; `delta` is 1, and the risk "acceptance" is
    counted per token, not per exit.

    Each rung is proven for itself: of twenty rungs at delta 0.05, one may well break its bound.
    """

    signal: str  # one of types.SIGNALS
    risk: str  # one of RISKS
    bound: float
    delta: float
    thresholds: tuple[float, ...]  # exit at the first boundary with uncertainty below its own; all 0 if nothing holds
    # fields of certify.Certificate, None for NaN; where nothing holds those of the most promising policy
    certificate: dict[str, float | int | str | bool | None] = field(default_factory=dict)
    coverage: float = 0.0  # share of the tokens of a prompt that exit, on average over the certifying prompts
    prompts_needed: int | None = None  # an estimate where nothing holds; None if it holds, or no number would do
    method: str = "ltt"
    prompts_minimum: int = 0  # fewer prove nothing, even without any disagreement

    @property
    def holds(self) -> bool:
        """Whether anything is proven; otherwise the thresholds never exit."""
        return bool(self.certificate.get("holds"))

    def sentence(self) -> str:
        """What is proven, or how many prompts are missing, in words."""
        kind, n, risk = (self.certificate[name] for name in ("kind", "n", "risk"))
        seen = f"{n:,} prompts" if risk is None else f"{risk:.2g} on {n:,} prompts"
        sure = f"with confidence {100 * (1 - self.delta):.12g}%" if self.method == "ltt" else "in expectation"
        text = f"{kind} at most {self.bound:g} {'' if self.holds else 'not certified '}{sure} ({seen})"
        if self.holds:
            return text
        if self.prompts_needed is None:
            return f"{text}: judging by these, no number of prompts would do"
        return f"{text}: about {self.prompts_needed:,} prompts are needed, at least {self.prompts_minimum:,}"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a rung does on other prompts; limits are those of a bootstrap by prompt, at `level`."""

    risk: float  # NaN if nothing exits and the risk is of exits
    risk_low: float
    risk_high: float
    coverage: float
    coverage_low: float
    coverage_high: float
    n_prompts: int
    n_tokens: int
    n_exits: int
    level: float = 0.95


def certify(
    signal: str,
    tune: tuple[Sequence[Heard], Sequence[Floats]],
    held: tuple[Sequence[Heard], Sequence[Floats]],
    *,
    risks: Sequence[str] = RISKS,
    bounds: Sequence[float] = BOUNDS,
    delta: float = DELTA,
    seed: int = 0,
) -> list[Rung]:
    """Rungs for each risk and bound: by Learn then Test, then by conformal risk control where the risk is per token.

    `tune` and `held` are predictions and uncertainties by boundary, of different prompts. Prompts are tested in an
    order drawn with `seed`. Raises UsageError without tokens, for risks that are none and bounds outside 0 … 1.
    """
    family = fit_family(signal, *tune)
    return certify_family(
        family, tally(family.thresholds, *tune), tally(family.thresholds, *held), risks, bounds, delta, seed
    )


def certify_family(
    family: Family,
    tuned: Tally,
    held: Tally,
    risks: Sequence[str] = RISKS,
    bounds: Sequence[float] = BOUNDS,
    delta: float = DELTA,
    seed: int = 0,
) -> list[Rung]:
    """As `certify`, from the counts of a family on both splits."""
    for bound in bounds:
        if not 0 < bound < 1:
            raise UsageError(f"bound {bound} is not a share", "allowed: above 0, below 1")
    order = np.random.default_rng(seed).permutation(len(held.prompts))
    rungs = [_learn_then_test(family, tuned, held, order, risk, bound, delta) for risk in risks for bound in bounds]
    averaged = [risk for risk in risks if (risk, "crc") in _KINDS]
    return rungs + [_control(family, held, risk, bound) for risk in averaged for bound in bounds]


def held_out(
    rung: Rung,
    heard: Sequence[Heard],
    uncertainties: Sequence[Floats],
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> HeldOut:
    """Risk and coverage of a rung on another split, with percentile limits of a bootstrap that resamples prompts."""
    found = tally(np.array([rung.thresholds], np.float64), heard, uncertainties)
    above, below = found.parts(rung.risk)
    if rung.method == "crc":
        below = np.ones_like(below)
    share = found.exits / found.tokens[:, None]
    n = len(found.prompts)
    table = np.concatenate([above, below, share], axis=1)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples) @ table / n
    edges = ((1 - level) / 2, (1 + level) / 2)
    resampled = ratio(draws[:, 0], draws[:, 1], axis=None)
    resampled = resampled[~np.isnan(resampled)]
    low, high = np.quantile(resampled, edges) if len(resampled) else (math.nan, math.nan)
    c_low, c_high = np.quantile(draws[:, 2], edges)
    risk, n_exits = float(ratio(above, below)[0]), int(found.exits.sum())
    return HeldOut(
        risk,
        float(low),
        float(high),
        float(share.mean()),
        float(c_low),
        float(c_high),
        n,
        int(found.tokens.sum()),
        n_exits,
        level,
    )


def _learn_then_test(
    family: Family, tuned: Tally, held: Tally, order: NDArray[np.int64], risk: str, bound: float, delta: float
) -> Rung:
    before, tested = tuned.excess(risk, bound), held.excess(risk, bound)[order]
    start = int(_growth(before, bound).argmax())

    def p_value(i: int) -> float:
        return betting_p_value(
            tested[:, start + i], 0.0, -bound, 1 - bound, delta=delta, earlier=before[:, start + i], max_stake=_STAKE
        )

    n_held = fixed_sequence(p_value, len(family.thresholds) - start, delta)
    minimum = messages_needed(bound, delta)
    needed = None
    if not n_held:
        growth = float(_growth(np.concatenate([before, tested]), bound).max())
        if growth > 0:
            needed = max(minimum, len(tested) + 1, math.ceil(-math.log(delta) / growth))
    i = start + max(n_held - 1, 0)
    observed = float(held.risk(risk)[i])
    found = Certificate(
        _KINDS[risk, "ltt"], bound, delta, len(tested), observed, p_value(max(n_held - 1, 0)), n_held > 0
    )
    return _rung(family, risk, found, i, held, needed, minimum, "ltt")


def _control(family: Family, held: Tally, risk: str, bound: float) -> Rung:
    losses = held.parts(risk)[0].T
    n_held = conformal_risk_control(losses, bound)
    i = max(n_held - 1, 0)
    average = float(losses[i].mean())
    needed = None if n_held else examples_to_control(bound, average)
    found = Certificate(_KINDS[risk, "crc"], bound, 1.0, losses.shape[1], average, 1.0, n_held > 0)
    return _rung(family, risk, found, i, held, needed, examples_to_control(bound) or 0, "crc")


def _rung(
    family: Family, risk: str, found: Certificate, i: int, held: Tally, needed: int | None, minimum: int, method: str
) -> Rung:
    """The rung of candidate `i`, or, where nothing holds, of never exiting."""
    plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(found).items()}
    thresholds = family.thresholds[i] if found.holds else np.zeros(family.thresholds.shape[1])
    coverage = float(held.coverage()[i]) if found.holds else 0.0
    limits = tuple(float(t) for t in thresholds)
    return Rung(family.signal, risk, found.bound, found.delta, limits, plain, coverage, needed, method, minimum)


def _growth(excess: Numbers, bound: float) -> Numbers:
    """Log of the capital gained per prompt (C,) by the best fixed bet on losses (n, C) within -bound … 1 - bound."""
    stakes = _STAKES * _STAKE / (1 - bound)
    return np.asarray(np.max([np.log1p(-stake * excess).mean(axis=0) for stake in stakes], axis=0), np.float64)
