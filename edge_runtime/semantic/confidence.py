"""A question's answers, drawn a few at a time, until it is clear how sure the model is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ..errors import UsageError
from .forms import form
from .grouping import ByForm, Grouping
from .sampler import AnswerSource, Sample, SampleSettings
from .scores import entropy, entropy_bounds, entropy_of_shares, likelihood_shares, normalised

_FORMS = ByForm()


@dataclass(frozen=True, slots=True)
class ConfidenceSettings:
    """How many answers are drawn at most, and when fewer do.

    `step` answers are drawn at once: with the edge kernels, one batch of eight is cheaper than two of four even where
    half of the questions need no second one. After each step there are two reasons to draw no more:

    - all answers so far, `agree` or more, mean the same. This is a guess about the others: where half of all answers
      would be the commonest one, four agree by chance in one of 16 cases. 0: never.
    - with a `threshold` on the score, nothing that is left to draw can change on which side of it the score of all
      `samples` comes to be (see `entropy_bounds`). This is exact, and the score of the answers drawn is on that side.
    """

    samples: int = 8
    step: int = 8
    agree: int = 4
    threshold: float | None = None
    sampling: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.step < 1 or self.agree < 0:
            raise UsageError(
                f"{self.samples} samples, {self.step} at once, {self.agree} that agree: these cannot be drawn",
                "give 1 or more samples and 1 or more at once; 0 that agree: draw on",
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"{self.threshold} is no threshold of confidence", "allowed: from 0 to 1")


class Stopped(str, Enum):
    """Why no more answers were drawn."""

    ALL = "all"  # as many as were planned
    AGREED = "agreed"  # all so far mean the same
    SETTLED = "settled"  # the others cannot change on which side of the threshold the score is


@dataclass(frozen=True, slots=True)
class Cluster:
    """Answers that mean the same."""

    answer: str  # the likeliest of them per token
    members: tuple[int, ...]  # indices of the samples
    share: float  # of the samples
    likelihood: float  # share of the samples' length-normalised likelihoods


@dataclass(frozen=True, slots=True)
class Cost:
    """What a confidence took."""

    prompt_tokens: int
    generated_tokens: int
    rows: int  # tokens computed: the prompt's that were not held, and the answers'
    ms: float  # grouping included
    joules: float | None = None  # gross; this and what follows None where no power is known
    energy_source: str | None = None  # measured, calibrated or estimated
    energy_covered: float | None = None  # share of the time that readings of the power were near enough to


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure a model is of its answer to one question. Entropies in nats."""

    score: float  # 1 - entropy ÷ log(samples planned): 1 if all answers mean the same, 0 if no two do
    entropy: float  # of the clusters' shares: discrete semantic entropy
    likelihood_entropy: float  # of the clusters' likelihoods: semantic entropy, Rao–Blackwellised
    consistency: float  # share of the largest cluster
    clusters: tuple[Cluster, ...]  # largest first
    samples: tuple[Sample, ...]
    planned: int  # samples, had there been no reason to stop
    stopped: Stopped
    cost: Cost

    @property
    def answer(self) -> str:
        """What most of the samples say; "" if most are empty."""
        return self.clusters[0].answer

    @property
    def empty(self) -> bool:
        """Whether more than half of the samples say nothing: no letter, digit or symbol."""
        return self.consistency > 0.5 and not form(self.answer)

    @property
    def normalised_entropy(self) -> float:
        """0 to 1, of the most that as many samples as planned can have."""
        return normalised(self.entropy, self.planned)

    @property
    def normalised_likelihood_entropy(self) -> float:
        """0 to 1, of the most that as many samples as planned can have."""
        return normalised(self.likelihood_entropy, self.planned)

    def sure(self, threshold: float) -> bool:
        """Whether the score is `threshold` or more."""
        return self.score >= threshold


def estimate(
    source: AnswerSource,
    prompt: Sequence[int],
    settings: ConfidenceSettings | None = None,
    grouping: Grouping = _FORMS,
    clock: Callable[[], float] = time.perf_counter,
) -> Confidence:
    """Draw answers to a prompt from `source` and see whether they mean the same. Raises as the two parts do."""
    settings = settings or ConfidenceSettings()
    start, rows_before = clock(), source.rows
    samples: list[Sample] = []
    groups: list[list[int]] = []
    stopped = None
    while stopped is None:
        end = min(len(samples) + settings.step, settings.samples)
        samples += source.draw(prompt, range(len(samples), end), settings.sampling)
        texts = [sample.text for sample in samples]
        groups = grouping.groups(texts)
        stopped = reason_to_stop(texts, groups, settings, fixed=grouping.fixed)
    likelihoods = likelihood_shares([[samples[i].mean_log_likelihood for i in group] for group in groups])
    clusters = tuple(
        _cluster(samples, group, likelihood) for group, likelihood in zip(groups, likelihoods, strict=True)
    )
    found = entropy([len(group) for group in groups])
    n_generated = sum(len(sample.tokens) for sample in samples)
    return Confidence(
        score=score_of(found, settings.samples),
        entropy=found,
        likelihood_entropy=entropy_of_shares(likelihoods),
        consistency=clusters[0].share,
        clusters=clusters,
        samples=tuple(samples),
        planned=settings.samples,
        stopped=stopped,
        cost=Cost(len(prompt), n_generated, source.rows - rows_before, (clock() - start) * 1e3),
    )


def score_of(semantic_entropy: float, n_samples: int) -> float:
    """From 0, no two of `n_samples` answers mean the same, to 1, all do."""
    return 1.0 - normalised(semantic_entropy, n_samples)


def reason_to_stop(
    texts: Sequence[str], groups: Sequence[Sequence[int]], settings: ConfidenceSettings, *, fixed: bool
) -> Stopped | None:
    """Why answers so far, in these groups, are enough; None if they are not. `fixed` as `Grouping` has it."""
    n_left = settings.samples - len(texts)
    if n_left <= 0:
        return Stopped.ALL
    if settings.agree and len(texts) >= settings.agree and len(groups) == 1:
        return Stopped.AGREED
    if settings.threshold is None:
        return None
    # groups that are not fixed may be split by further answers, but never two answers of one form
    lasting = groups if fixed else _FORMS.groups(texts)
    least, most = entropy_bounds([len(group) for group in lasting], n_left, fixed=fixed)
    highest, lowest = score_of(least, settings.samples), score_of(most, settings.samples)
    return Stopped.SETTLED if lowest >= settings.threshold or highest < settings.threshold else None


def _cluster(samples: Sequence[Sample], group: Sequence[int], likelihood: float) -> Cluster:
    best = max(group, key=lambda i: samples[i].mean_log_likelihood)
    return Cluster(samples[best].text, tuple(group), len(group) / len(samples), likelihood)
