"""Which score knows best that an answer is wrong: scores of several answers, of the one answer, and of the prompt.

A score is an uncertainty: the larger, the likelier the answer is wrong. Intervals are bootstrap percentiles of 95% with
questions drawn anew, the same ones for all scores. Halves are every other question: what was chosen on the first half
is to be believed on the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ..exits.quality import Interval, Resamples, interval, risk_coverage
from ..metrics import auroc
from ..semantic import Cluster, Confidence, ConfidenceSettings, Grouping, Sample, estimate
from ..semantic.probe import fit_probe
from ..types import Floats
from .questions import BenchQuestion, Kind, is_right
from .semantic_answers import Answered, Replay

N_FOLDS = 10
N_RESAMPLES = 1000
SHARES = (0.25, 0.5, 0.75, 1.0)  # of questions answered, in the table
BEST_POSSIBLE = "best possible"

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
MakeGrouping = Callable[[BenchQuestion], Grouping]


class Judged(str, Enum):
    """Which answer to a question is right or wrong."""

    GREEDY = "greedy"
    COMMON = "common"  # the one that most samples give, likeliest wording


class Source(str, Enum):
    """What a score is computed from, and so what it costs."""

    SAMPLES = "several answers"
    ANSWER = "the answer"
    PROMPT = "the prompt"


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """An uncertainty of each question's answer, (n,)."""

    name: str
    source: Source
    values: Floats


@dataclass(frozen=True, slots=True)
class ScoreQuality:
    """How well a score tells wrong answers from right ones."""

    name: str
    source: Source
    auroc: Interval  # probability that a wrong answer has the larger score
    halves: tuple[float, float]  # AUROC on every other question
    over_single: Interval  # AUROC minus that of the best score of the answer alone
    accuracy_at: tuple[float, ...]  # where only the surest of SHARES are answered


@dataclass(frozen=True, slots=True)
class KindQuality:
    """One kind of question: AUROC of the scores asked for, NaN where all answers are right or all wrong."""

    kind: str
    n: int
    accuracy: float
    mean_entropy: float  # semantic, nats
    auroc: tuple[float, ...]


# ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def confidences(
    answered: Sequence[Answered],
    grouping: MakeGrouping,
    n_samples: int = 0,
    *,
    stop_early: bool = False,
) -> list[Confidence]:
    """What `estimate` says of kept answers, of the first `n_samples` (0: all) of each.

    `stop_early`: half of them are enough where these all mean the same.
    """
    found = []
    for one in answered:
        n = n_samples or len(one.samples)
        settings = ConfidenceSettings(samples=n, step=n, agree=0)
        if stop_early:
            half = max(1, n // 2)
            settings = replace(settings, step=half, agree=half)
        found.append(estimate(Replay(one.samples), (), settings, grouping(one.question)))
    return found


def judged_answer(answered: Answered, confidence: Confidence, judged: Judged) -> Sample:
    """The answer that is right or wrong."""
    return answered.greedy if judged is Judged.GREEDY else _likeliest(confidence.clusters[0], answered.samples)


def _likeliest(cluster: Cluster, samples: Sequence[Sample]) -> Sample:
    return max((samples[i] for i in cluster.members), key=lambda sample: sample.mean_log_likelihood)


def wrong_answers(answered: Sequence[Answered], answers: Sequence[Sample]) -> Flags:
    """Whether each question's answer is wrong, (n,)."""
    return np.array([not is_right(a.question, s.text) for a, s in zip(answered, answers, strict=True)])


def scores_of_answers(answers: Sequence[Sample]) -> list[Score]:
    """What the tokens of the judged answers say, without any other."""
    columns = {
        "mean token entropy": [sample.mean_entropy for sample in answers],
        "log-likelihood per token": [-sample.mean_log_likelihood for sample in answers],
        "log-likelihood": [-sample.log_likelihood for sample in answers],
    }
    return [Score(name, Source.ANSWER, np.array(values, np.float32)) for name, values in columns.items()]


def scores_of_samples(found: Sequence[Confidence], suffix: str) -> list[Score]:
    """Semantic entropies and self-consistency; `suffix` says how answers were put together."""
    columns = {
        "semantic entropy": [c.entropy for c in found],
        "semantic entropy, by likelihood": [c.likelihood_entropy for c in found],
        "self-consistency": [1 - c.consistency for c in found],
    }
    return [
        Score(f"{name}, {suffix}", Source.SAMPLES, np.array(values, np.float32)) for name, values in columns.items()
    ]


def scores_of_support(
    answered: Sequence[Answered], answers: Sequence[Sample], grouping: MakeGrouping, suffix: str
) -> list[Score]:
    """How large a share of the samples does not mean what the judged answers say."""
    values = []
    for one, answer in zip(answered, answers, strict=True):
        groups = grouping(one.question).groups([answer.text, *(sample.text for sample in one.samples)])
        own = next(group for group in groups if 0 in group)
        values.append(1 - (len(own) - 1) / len(one.samples))
    return [Score(f"samples unlike the answer, {suffix}", Source.SAMPLES, np.array(values, np.float32))]


def held_out_probe(states: Floats, entropies: Floats, layer: int, n_folds: int = N_FOLDS, seed: int = 0) -> Floats:
    """Each prompt's probability (n,) of high entropy by a probe fitted to the other folds' states (n, n_embd).

    Nobody tells it which answers are right. Raises UsageError where there is too little to fit one to.
    """
    n = len(entropies)
    folds = np.random.default_rng(seed).permutation(n) % n_folds
    found = np.empty(n, np.float32)
    for fold in range(n_folds):
        held = folds == fold
        if held.any():
            probe = fit_probe(states[~held], entropies[~held], layer, seed=seed)
            found[held] = probe.predict(states[held])
    return found


# ── how good they are ───────────────────────────────────────────────────────────────────────────────────────────────


def compare(scores: Sequence[Score], wrong: Flags, n_resamples: int = N_RESAMPLES) -> list[ScoreQuality]:
    """All scores on the same questions. At least one is of the answer alone."""
    resamples = Resamples(np.arange(len(wrong), dtype=np.int32), n_resamples)
    columns = {score.name: resampled_aurocs(score.values, wrong, resamples) for score in scores}
    single = [score.name for score in scores if score.source is Source.ANSWER]
    best = max(single, key=lambda name: float(np.nan_to_num(columns[name][0])))
    found = []
    for score in scores:
        curve = rejection_curve(score.values, wrong)
        found.append(
            ScoreQuality(
                score.name,
                score.source,
                interval(columns[score.name]),
                (auroc(wrong[::2], score.values[::2]), auroc(wrong[1::2], score.values[1::2])),
                interval(columns[score.name] - columns[best]),
                tuple(float(curve[max(round(share * len(wrong)), 1) - 1]) for share in SHARES),
            )
        )
    return found


def resampled_aurocs(values: Floats, wrong: Flags, resamples: Resamples) -> Numbers:
    """AUROC on all questions, and then on each resample, (n + 1,)."""
    everyone = np.arange(len(wrong))
    drawn = (np.repeat(everyone, counts.astype(np.int64)) for counts in resamples.counts)
    return np.array([auroc(wrong[rows], values[rows]) for rows in drawn])


def rejection_curve(uncertainty: Floats, wrong: Flags) -> Numbers:
    """Accuracy (n,) where only the surest 1, 2, … n questions are answered; equally sure ones in an order of chance."""
    n = len(wrong)
    coverage, risk = risk_coverage(uncertainty, wrong)
    answered = coverage * n
    errors = np.interp(np.arange(1, n + 1), [0.0, *answered], [0.0, *(risk * answered)])
    accuracy: Numbers = 1 - errors / np.arange(1, n + 1)
    return accuracy


def by_kind(kinds: Sequence[Kind], wrong: Flags, entropies: Floats, scores: Sequence[Score]) -> list[KindQuality]:
    """Each kind for itself, and last the mean over pairs of one kind: what is left where no kind can be told."""
    of = np.array([kind.value for kind in kinds])
    found = []
    for kind in dict.fromkeys(of.tolist()):
        rows = of == kind
        found.append(
            KindQuality(
                kind,
                int(rows.sum()),
                1 - float(wrong[rows].mean()),
                float(entropies[rows].mean()),
                tuple(auroc(wrong[rows], score.values[rows]) for score in scores),
            )
        )
    within = tuple(auroc_within(of, wrong, score.values) for score in scores)
    return [*found, KindQuality("within kinds", len(of), 1 - float(wrong.mean()), float(entropies.mean()), within)]


def auroc_within(groups: NDArray[np.str_], wrong: Flags, values: Floats) -> float:
    """AUROC over pairs of the same group only; NaN without any."""
    above, pairs = 0.0, 0
    for group in np.unique(groups):
        rows = groups == group
        n = int(wrong[rows].sum()) * int((~wrong[rows]).sum())
        if n:
            above += n * auroc(wrong[rows], values[rows])
            pairs += n
    return above / pairs if pairs else float("nan")


def by_number_of_samples(
    answered: Sequence[Answered], wrong: Flags, grouping: MakeGrouping
) -> dict[int, tuple[float, float]]:
    """Samples drawn → AUROC of semantic entropy on all questions, and on the second half."""
    numbers = [n for n in (2, 4, 8, 16, 32, 64) if n <= min(len(a.samples) for a in answered)]
    found = {}
    for n in numbers:
        values = np.array([c.entropy for c in confidences(answered, grouping, n)], np.float32)
        found[n] = (auroc(wrong, values), auroc(wrong[1::2], values[1::2]))
    return found


def curves(scores: Sequence[Score], wrong: Flags) -> dict[str, Numbers]:
    """Rejection curves by score's name, and that of a score that knows all."""
    found = {score.name: rejection_curve(score.values, wrong) for score in scores}
    return {**found, BEST_POSSIBLE: rejection_curve(wrong.astype(np.float32), wrong)}
