"""Evidence that disagreement exceeds its budget, valid at whatever moment it is looked at.

A gambler bets against "each audit disagrees with probability at most β, whatever came before". With a share f of the
capital on each bet, an agreement costs f of it and a disagreement pays f·(1 - β)/β, which is not in the gambler's
favour as long as β holds. So the capital is a supermartingale that ever exceeds 1/δ with probability at most δ (Ville).
This is the capital process of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 86 (2024), with their mixture over a grid of bets.

Disagreement that begins late would find a gambler ruined by all the agreements before. Therefore the capital is spread
over the moments to begin at, too, as in Shin, Ramdas and Rinaldo, "E-detectors" (2023), but by weights that sum to 1:
so the chance of a false alarm is bounded for the whole run, and not only its frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_STAKES = (0.01, 0.03, 0.08, 0.2, 0.5)
_START = 100.0  # half of the capital begins to play within so many audits; later starts get less


@dataclass(frozen=True, slots=True)
class Evidence:
    """The gambler's capital. Audits must be chosen without looking at their outcome."""

    log_capitals: tuple[float, ...] = (-math.inf,) * len(_STAKES)  # of what has begun to play, by stake
    n: float = 0.0  # audits

    @property
    def e_value(self) -> float:
        """1 at the start; at most 1 on average, at any time, as long as the budget is kept."""
        played = sum(math.exp(min(c, 600.0)) for c in self.log_capitals) / len(_STAKES)
        return played + _not_yet(self.n)


def add_audits(evidence: Evidence, audited: float, disagreed: int, budget: float) -> Evidence:
    """After `audited` more audits, of which `disagreed`; `budget` is β, above 0 and below 1, the same in all calls.

    A token that cannot disagree, audited with probability a, may count as a agreements: (1 - f)^a ≤ 1 - a·f.

    Raises ValueError unless 0 ≤ `disagreed` ≤ `audited` and 0 < `budget` < 1.
    """
    if not 0 <= disagreed <= audited or not 0 < budget < 1:
        raise ValueError(f"{disagreed} of {audited} audits at a budget of {budget}")
    if not audited:
        return evidence
    beginning = math.log(_not_yet(evidence.n) - _not_yet(evidence.n + audited))
    capitals = tuple(
        _log_sum(capital, beginning)
        + disagreed * math.log1p(stake * (1 - budget) / budget)
        + (audited - disagreed) * math.log1p(-stake)
        for stake, capital in zip(_STAKES, evidence.log_capitals, strict=True)
    )
    return Evidence(capitals, evidence.n + audited)


def _not_yet(n: float) -> float:
    """Share of the capital that waits beyond audit `n`: 1 at the start, 1/2 after `_START`."""
    return _START / (_START + n)


def _log_sum(a: float, b: float) -> float:
    high, low = (a, b) if a > b else (b, a)
    return high + math.log1p(math.exp(low - high))
