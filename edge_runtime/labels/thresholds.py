"""Thresholds: what they are certified for, the settings to choose from, and the certified choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..certify import Certificate, betting_p_value, binomial_p_value, fixed_sequence
from ..errors import UsageError
from ..types import Floats
from .cascade import Outcome, candidates, run, weigh
from .classifier import CONFIDENCE, DISTANCE
from .drift import Reference, reference_of

Labels: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.int64]

# of harm that exits may do, see `candidates`
LEVELS = (0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05)
_SAFE_LEVEL = 0.001  # of LEVELS, at which abstention is tried first
_ABSTENTION = np.linspace(0.99, 0.0, 34)
_LEAST = 1e-6  # probability: below, a log-loss would be all that counts
_MIN_BOUND = 1e-5  # takes hundreds of thousands of messages
_CALIBRATION = 0.15 / 0.7  # messages, per message of the training part


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What thresholds are certified for, with probability 1 - delta.

    'depth': accuracy at most `bound` below that of the whole model, followed by a probe that sees all stages' scores.
    'error': error rate of the labels given at most `bound`, with abstention where that is needed.
    """

    kind: Literal["depth", "error"] = "depth"
    bound: float = 0.01
    delta: float = 0.05

    def __post_init__(self) -> None:
        if not _MIN_BOUND <= self.bound < 1 or not 0 < self.delta < 1:
            raise UsageError(
                f"{self.kind} {self.bound:g} with confidence {1 - self.delta:g} cannot be certified",
                f"give a bound from {_MIN_BOUND:g} to below 1, and a confidence between 0 and 1",
            )


@dataclass(frozen=True, slots=True)
class Setting:
    """A point that thresholds can be set to."""

    thresholds: Floats
    unsure_below: float
    level: float  # of harm per exit in training, NaN without exits


@dataclass(slots=True)
class Evidence:
    """What each stage says of some rows, calibrated; `full` is the whole model's, where it was computed."""

    stages: list[Floats]
    full: Floats | None
    plain_full: Floats | None  # a probe on the last layer that sees no other stage
    held: list[NDArray[np.bool_]]  # per stage: known there to be unlike the training messages
    novelty: Floats | None
    truth: Labels

    def part(self, rows: Rows) -> Evidence:
        def take(values: Floats | None) -> Floats | None:
            return None if values is None else values[rows]

        return Evidence(
            [stage[rows] for stage in self.stages],
            take(self.full),
            take(self.plain_full),
            [mask[rows] for mask in self.held],
            take(self.novelty),
            self.truth[rows],
        )


def settings_of(
    out_of_fold: Sequence[Floats], weights: Floats, truth: Labels, objective: str, guarantee: Guarantee, max_harm: float
) -> list[Setting]:
    """Settings from the safest to the boldest, made from training rows only: each stage's out-of-fold probabilities."""
    weighed = [weigh(p, weights) for p in out_of_fold]
    counts = np.bincount(truth, minlength=len(weights))
    row_weights: Floats = np.ones(len(truth), np.float32)
    if objective == "macro-f1":
        row_weights = (len(truth) / (len(counts) * np.maximum(counts, 1)))[truth].astype(np.float32)
    losses = [-np.log(np.maximum(p[np.arange(len(truth)), truth], _LEAST)) for p in out_of_fold]
    levels = [level for level in LEVELS if level <= max_harm]
    excess = [loss - losses[-1] for loss in losses]
    thresholds = candidates(weighed, truth, levels, row_weights, excess)
    plain = [Setting(t, 0.0, level) for t, level in zip(thresholds, (float("nan"), *levels), strict=True)]
    if guarantee.kind == "depth":
        return plain
    safe = sum(level <= _SAFE_LEVEL for level in levels)
    abstaining = [Setting(thresholds[safe], float(u), plain[safe].level) for u in _ABSTENTION]
    first = _surest(abstaining, weighed, out_of_fold, truth, guarantee.bound)
    return abstaining[first:] + plain[safe + 1 :]


def _surest(
    settings: Sequence[Setting], weighed: Sequence[Floats], stages: Sequence[Floats], truth: Labels, bound: float
) -> int:
    """Which of settings that abstain less and less is the likeliest to be certified, by the training rows.

    It need not be the first: one that answers few messages cannot be certified, however right it is.
    """
    outcome = run(weighed, settings[0].thresholds)
    confidence = left_with(outcome, stages)[np.arange(len(truth)), outcome.labels]
    p_values = []
    for setting in settings:
        answered = confidence >= setting.unsure_below
        n = round(_CALIBRATION * int(answered.sum()))
        errors = round(_CALIBRATION * int((answered & (outcome.labels != truth)).sum()))
        p_values.append(binomial_p_value(min(errors, n), n, bound))
    return int(np.argmin(p_values))


def certify(
    settings: Sequence[Setting], rows: Evidence, weights: Floats, guarantee: Guarantee
) -> tuple[int, Certificate]:
    """The boldest setting that is certified on `rows`, and its certificate; the safest, not certified, if none is."""
    # bets are made on one message after the other: in a file sorted by label, the first would decide for all
    rows = rows.part(np.random.default_rng(0).permutation(len(rows.truth)))
    full_right = None
    if guarantee.kind == "depth":
        assert rows.full is not None
        full_right = weigh(rows.full, weights).argmax(axis=1) == rows.truth

    def test(index: int) -> tuple[float, float, int]:
        """P-value, risk, and messages it was seen on."""
        outcome, answered = apply(settings[index], rows, weights)
        wrong = outcome.labels != rows.truth
        if full_right is not None:
            loss = wrong.astype(np.float64) - ~full_right
            return (
                betting_p_value(loss, guarantee.bound, -1.0, 1.0, delta=guarantee.delta),
                float(loss.mean()),
                len(loss),
            )
        errors, n = int((wrong & answered).sum()), int(answered.sum())
        return binomial_p_value(errors, n, guarantee.bound), errors / max(1, n), n

    count = fixed_sequence(lambda index: test(index)[0], len(settings), guarantee.delta)
    chosen = max(0, count - 1)
    p_value, risk, n = test(chosen)
    kind = "loss of accuracy against full depth" if guarantee.kind == "depth" else "error rate"
    return chosen, Certificate(kind, guarantee.bound, guarantee.delta, n, risk, p_value, count > 0)


def apply(setting: Setting, rows: Evidence, weights: Floats) -> tuple[Outcome, NDArray[np.bool_]]:
    """Send rows through the stages: where each leaves with which label, and whether it is answered (not UNSURE)."""
    outcome = run([weigh(stage, weights) for stage in rows.stages], setting.thresholds, rows.held)
    probabilities = left_with(outcome, rows.stages)
    answered = probabilities[np.arange(len(rows.truth)), outcome.labels] >= setting.unsure_below
    return outcome, answered


def left_with(outcome: Outcome, stages: Sequence[Floats]) -> Floats:
    """Probabilities (n, n_labels) of the stage at which each message left."""
    taken: Floats = np.stack(stages)[outcome.stages, np.arange(len(outcome.stages))]
    return taken


def references_of(rows: Evidence, weights: Floats, setting: Setting) -> dict[str, Reference]:
    found = {CONFIDENCE: reference_of(weigh(rows.stages[0], weights).max(axis=1))}
    if rows.novelty is not None:
        outcome, _ = apply(setting, rows, weights)
        arrived = outcome.stages > 0
        if arrived.any():
            found[DISTANCE] = reference_of(rows.novelty[arrived])
    return found
