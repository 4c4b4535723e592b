"""Risk certificates: what a setting of early exits is proven to stay below, from held-out examples.

Every p-value here is of the hypothesis that the true risk exceeds the bound, and is valid for any number of examples,
not only for many. A setting is certified at level `delta` when its p-value is at most `delta`; `fixed_sequence` tests
many settings on the same examples. The examples must be drawn independently from what the setting will meet later, and
must have played no part in making the candidates or their order.

Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control", arXiv 2110.01052.

`conformal_risk_control` is the weaker promise that needs fewer examples: its bound holds on average over the examples
that might have been drawn, not with a confidence for those that were.

Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", arXiv 2208.02814.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UsageError

# a larger share of the capital would gain faster while there are no losses, and be ruined by the first of them
_MAX_STAKE = 0.75
_MIN_BOUND = 1e-9  # takes billions of examples
_LEAST_VARIANCE = 1e-12  # of losses within 0 … 1; bets are limited long before
_ROUNDING = 1e-12
_TAIL_WIDTH = 10.0  # terms further out than this are below e^-50 of the largest


@dataclass(frozen=True, slots=True)
class Certificate:
    """The outcome of certifying the risk of one setting, or of failing to."""

    kind: str  # the risk, as a noun: "error rate"
    bound: float  # what the true risk was to stay at or below
    delta: float  # allowed probability that a certified setting breaks the bound
    n: int  # examples it was tested on
    risk: float  # mean loss of the setting on them; NaN without any
    p_value: float  # of the hypothesis that the true risk exceeds the bound
    holds: bool  # False: no setting could be certified

    def sentence(self, unit: str = "messages") -> str:
        """The certificate in words, examples counted in `unit`: "error rate at most 0.05 with confidence 95% (…)"."""
        verdict = "" if self.holds else "not certified "
        seen = f"{self.risk:.2g} on {self.n:,} {unit}" if self.n else f"no {unit}"
        return f"{self.kind} at most {self.bound:g} {verdict}with confidence {100 * (1 - self.delta):.12g}% ({seen})"


def binomial_p_value(errors: int, n: int, bound: float) -> float:
    """P(Binomial(n, bound) ≤ errors): the exact p-value of "the error rate exceeds `bound`".

    At most `delta` exactly when the one-sided Clopper–Pearson upper limit at confidence 1 - `delta` is at most `bound`
    (Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934).
    1 without examples or for a bound of 0, which no number of examples can prove; 0 for a bound of 1 or more, which
    nothing can exceed. Relative error below 1e-7 up to a million examples.

    Raises UsageError if `bound` is negative or NaN, ValueError unless 0 ≤ `errors` ≤ `n`.
    """
    if not 0 <= errors <= n:
        raise ValueError(f"{errors} errors in {n} examples")
    if not bound >= 0:
        raise UsageError(f"bound {bound} is not a share", "allowed: above 0, below 1")
    if n == 0 or bound == 0:
        return 1.0
    if bound >= 1:
        return 0.0
    if errors == n:
        return 1.0
    # the tail on the far side of the mean is summed, so that its terms only fall and 1 - tail loses no digits
    if errors <= n * bound:
        return _lower_tail(errors, n, bound, 1 - bound)
    return 1.0 - _lower_tail(n - errors - 1, n, 1 - bound, bound)


def betting_p_value(
    losses: ArrayLike,
    bound: float,
    low: float = 0.0,
    high: float = 1.0,
    *,
    delta: float = 0.05,
    earlier: ArrayLike = (),
    max_stake: float = _MAX_STAKE,
) -> float:
    """P-value of "the mean loss exceeds `bound`" for losses (n,) within `low` … `high`.

    A gambler who starts with a capital of 1 bets on each loss being below `bound`. If its mean is not, the capital is
    a supermartingale and exceeds 1/p at any time with probability at most p (Ville), so p is 1 / the largest capital.
    Each bet is set by the variance of the losses before it, which makes losses that are mostly equal, such as the
    difference of two classifiers, cheap to certify.

    `delta` is the level that the bets aim for; the p-value is valid at all levels, as long as `delta`, the number of
    losses and their order are fixed without looking at them. 1 without losses or for a bound of `low` or less, 0
    for a bound of `high` or more.

    `earlier` losses, of examples that are not among those tested, set the first bets, which otherwise are as small as
    losses that vary widely need. `max_stake`, above 0 and below 1, bounds the share of the capital that one largest
    possible loss takes: more of it pays where examples are hardly enough and losses far below the largest. It, too,
    must be fixed without looking at the losses.

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024), the
    predictable plug-in bets; as a p-value in Learn then Test.

    Raises UsageError if `bound` is NaN or `delta` not within 0 … 1; ValueError if `losses` has not one dimension,
    one is outside its limits, or the limits are equal, swapped or infinite, or the stake is none.
    """
    values, before = np.asarray(losses, np.float64), np.asarray(earlier, np.float64)
    width = high - low
    if not 0 < width < math.inf:
        raise ValueError(f"losses cannot lie between {low} and {high}")
    for row in (values, before):
        # written so that NaN fails, too
        if row.ndim != 1 or not ((row >= low) & (row <= high)).all():
            raise ValueError(f"losses must be one row of numbers from {low} to {high}")
    if not 0 < max_stake < 1:
        raise ValueError(f"a stake of {max_stake} is not a share of the capital")
    if math.isnan(bound):
        raise UsageError("the bound is not a number", f"allowed: above {low:g}, below {high:g}")
    _check_delta(delta)
    n = len(values)
    if n == 0 or bound <= low:
        return 1.0
    if bound >= high:
        return 0.0
    scaled = (values - low) / width
    if len(before):
        known = (before - low) / width
        n_known, total, squares = len(known), float(known.sum()), float(((known - known.mean()) ** 2).sum())
    else:  # as if one loss with mean 1/2 and variance 1/4 had come first
        n_known, total, squares = 1, 0.5, 0.25
    counts = np.arange(n_known + 1, n_known + n + 1)
    means = (total + np.cumsum(scaled)) / counts
    variances = (squares + np.cumsum((scaled - means) ** 2)) / counts
    expected = np.maximum(np.concatenate(([squares / n_known], variances[:-1])), _LEAST_VARIANCE)
    bets = np.minimum(np.sqrt(-2 * math.log(delta) / (n * expected)), max_stake * width / (high - bound))
    log_capital = np.cumsum(np.log1p(bets * (bound - values) / width))
    return math.exp(-max(0.0, float(log_capital.max())))


def fixed_sequence(
    p_values: Sequence[float] | NDArray[np.float64] | Callable[[int], float], n_candidates: int, delta: float
) -> int:
    """How many of `n_candidates`, ordered from the safest to the boldest, are certified: the first ones; 0 is none.

    Candidates are tested in order, each at the full level `delta`, up to the first that fails. With probability at
    least 1 - `delta` none of the certified ones exceeds its bound, so that any of them may be chosen, whatever the
    reason. The order must not depend on the examples; it decides only how many are certified, not whether that holds.

    `p_values` holds one p-value per candidate, or gives that of candidate 0, 1, … when called; it is not asked past
    the first failure.

    Fixed-sequence testing in Learn then Test. Raises UsageError if `delta` is not within 0 … 1.
    """
    _check_delta(delta)
    p_value_of = p_values if callable(p_values) else p_values.__getitem__
    for i in range(n_candidates):
        if not p_value_of(i) <= delta:  # NaN fails
            return i
    return n_candidates


def conformal_risk_control(losses: ArrayLike, bound: float, high: float = 1.0) -> int:
    """How many candidates, ordered from the safest to the boldest, keep the expected loss of a new example in bound.

    `losses` (candidates, n) lie within 0 … `high`. The last candidate allowed is the boldest with
    n / (n + 1) · mean loss + high / (n + 1) ≤ `bound`; 0 is none. The promise is that the loss of the candidate so
    chosen, on one more example drawn like these, is at most `bound` in expectation over all n + 1 of them. For the
    examples that were drawn, the risk may be above the bound, about every second time.

    It takes losses that only grow from candidate to candidate. Where an example's do not, its largest so far counts,
    which is at least as much. The order must not depend on the examples.

    Conformal risk control, see above. Raises UsageError if `bound` is negative or NaN, ValueError if `losses` is no
    table or one is outside its limits.
    """
    values = np.asarray(losses, np.float64)
    if values.ndim != 2 or not ((values >= 0) & (values <= high)).all():
        raise ValueError(f"losses must be a table (candidates, n) of numbers from 0 to {high}")
    if not bound >= 0:
        raise UsageError(f"bound {bound} is not a share", "allowed: above 0, below 1")
    totals = np.maximum.accumulate(values, axis=0).sum(axis=1) + high
    allowed = bound * (values.shape[1] + 1) * (1 + _ROUNDING)
    return int(np.searchsorted(totals, allowed, side="right"))


def examples_to_control(bound: float, risk: float = 0.0, high: float = 1.0) -> int | None:
    """Smallest n for which `conformal_risk_control` allows a candidate whose mean loss is `risk`; None if none does.

    The smallest n with (n · risk + high) / (n + 1) ≤ bound.
    """
    if bound >= high:
        return 0
    if not bound > risk:
        return None
    return max(0, math.ceil((high - bound) / (bound - risk) * (1 - _ROUNDING)))


def messages_needed(bound: float, delta: float) -> int:
    """Smallest number of examples that, all without error, certify an error rate of at most `bound` at level `delta`.

    The smallest n with (1 - bound)^n ≤ delta, about ln(1/delta) / bound. Raises UsageError if `delta` is not within
    0 … 1, or if `bound` is below 1e-9.
    """
    _check_delta(delta)
    if not bound >= _MIN_BOUND:
        raise UsageError(f"an error rate of {bound} cannot be certified", f"at least {_MIN_BOUND}, for example 0.05")
    if bound >= 1:
        return 1
    n = max(1, math.ceil(math.log(delta) / math.log1p(-bound)))
    # rounding of the quotient may put it one off
    if binomial_p_value(0, n - 1, bound) <= delta:
        return n - 1
    return n if binomial_p_value(0, n, bound) <= delta else n + 1


def _lower_tail(k: int, n: int, p: float, q: float) -> float:
    """P(Binomial(n, p) ≤ k) for k ≤ n·p; q is 1 - p, given because 1 minus a rounded 1 - p is not p."""
    log_p, log_q = (math.log(p), math.log1p(-p)) if p < q else (math.log1p(-q), math.log(q))
    log_largest = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q
    # each term down from k is the one before times (k - i)·q / ((n - k + i + 1)·p), at most 1 - i / (n·p)
    i = np.arange(min(k, math.ceil(_TAIL_WIDTH * math.sqrt(n * p))))
    ratios = (k - i) * q / ((n - k + i + 1) * p)
    return min(1.0, math.exp(log_largest) * (1.0 + float(np.cumprod(ratios).sum())))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"delta {delta} is not a probability to test at", "allowed: above 0, below 1; 0.05 is usual")
