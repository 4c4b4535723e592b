"""Whether a head is worth asking: a linear look at the hidden state, before the head is run.

Running a head costs several hundredths of a token, and most tokens do not exit. So each boundary has a logistic
regression on the normed hidden state that tells, for a dot product, where an exit is likely; the head is asked there
alone. A head that is not asked still reads the state, later, in a batch. The idea is that of predictors before skipped
work (Schuster et al. 2022, "Confident Adaptive Language Modeling", arXiv 2207.07061, trains such a classifier to decide
the exit itself; here it only saves the asking, and the head decides).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..logistic import logistic_regression
from ..types import Floats

KEPT = 0.95  # share of the exits that are still found
_PENALTY = 30.0
_FEWEST = 20  # exits to learn from
_TINY = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Asker:
    """Ask where weights · h / rms(h) ≥ floor, for a hidden state h (n_embd,)."""

    weights: Floats  # (n_embd,)
    floor: float

    def worth_asking(self, state: Floats) -> bool:
        """Whether to run the head on a state (n_embd,)."""
        return float(self.weights @ state) >= self.floor * math.sqrt(float(state @ state) / len(state))

    def marks(self, states: NDArray[np.floating]) -> NDArray[np.bool_]:
        """As `worth_asking`, for rows (m, n_embd)."""
        x = np.asarray(states, np.float32)
        return np.asarray(x @ self.weights >= np.float32(self.floor) * np.sqrt((x * x).mean(axis=1)))


def likely_exits(uncertainty: Floats, wrong: NDArray[np.bool_], risk: float) -> NDArray[np.bool_]:
    """The surest targets (m,), as many as can exit while at most the share `risk` of them is wrong; NaN never does."""
    order = np.argsort(uncertainty, kind="stable")[: int((~np.isnan(uncertainty)).sum())]
    shares = np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)
    marks = np.zeros(len(uncertainty), np.bool_)
    marks[order[: int(np.max(np.flatnonzero(shares <= risk), initial=-1)) + 1]] = True
    return marks


def ask_always(n_embd: int) -> Asker:
    return Asker(np.zeros(n_embd, np.float32), -1.0)


def fit_asker(states: NDArray[np.floating], exits: NDArray[np.bool_], kept: float = KEPT) -> Asker:
    """Fit to states (m, n_embd) and whether each exits (m,) when asked; the floor keeps the share `kept` of the exits.

    Asks always where there are too few exits to learn from, or nothing but exits. Raises UsageError without states.
    """
    if not len(states):
        raise UsageError("there are no states to learn from", "give more prompts")
    n_exits = int(exits.sum())
    if min(n_exits, len(exits) - n_exits) < _FEWEST:
        return ask_always(states.shape[1])
    x = np.asarray(states, np.float64)
    x /= np.sqrt(np.maximum((x * x).mean(axis=1, keepdims=True), _TINY))
    found = logistic_regression(x, exits.astype(np.float64), _PENALTY)
    weights = found[:-1].astype(np.float32)
    return Asker(weights, float(np.quantile(x[exits] @ weights.astype(np.float64), 1 - kept)))
