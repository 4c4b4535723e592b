"""The whole of the quality part: kept or new answers → every score of them → how good each is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from ..semantic import Confidence, Entailment
from ..semantic.grouping import Encode
from ..types import Floats
from .semantic_answers import Answered
from .semantic_quality import (
    Judged,
    KindQuality,
    MakeGrouping,
    Numbers,
    Score,
    ScoreQuality,
    Source,
    by_kind,
    by_number_of_samples,
    compare,
    confidences,
    curves,
    held_out_probe,
    judged_answer,
    scores_of_answers,
    scores_of_samples,
    scores_of_support,
    wrong_answers,
)


@dataclass(frozen=True, slots=True)
class JudgedResult:
    """All scores against one kind of answer."""

    judged: Judged
    accuracy: float
    n_cut: int  # answers that were cut at the most tokens
    scores: list[ScoreQuality]
    kinds: list[KindQuality]
    kind_scores: tuple[str, ...]  # the scores that `kinds` has
    numbers: dict[int, tuple[float, float]]  # of samples → AUROC on all, on the second half


@dataclass(frozen=True, slots=True)
class QualityResult:
    """What the questions say."""

    questions: int
    main: str  # the semantic entropy that verdicts are about
    tokens_per_sample: float
    drawn_when_stopping: float  # mean number of samples where half of them may be enough
    judged: list[JudgedResult]


def judge_all(
    answered: Sequence[Answered],
    groupings: Mapping[str, MakeGrouping],
    main: str,
    states: Mapping[int, Floats],
    judged: Sequence[Judged] = tuple(Judged),
    *,
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[QualityResult, dict[str, Numbers]]:
    """Every score of the answers, and the rejection curves of some against the first kind of judged answer.

    `main` is the one of `groupings` that verdicts are about, `states` by layer (n, n_embd) are of the prompts' last
    tokens. Raises UsageError if all answers are right, or all wrong.
    """
    found: dict[str, list[Confidence]] = {}
    for name, grouping in groupings.items():
        say(f"answers that mean the same, by {name}")
        found[name] = confidences(answered, grouping)
    stopped = confidences(answered, groupings[main], stop_early=True)
    of_samples = [score for name in groupings for score in scores_of_samples(found[name], f"by {name}")]
    entropies = np.array([c.entropy for c in found[main]], np.float32)
    early = np.array([c.entropy for c in stopped], np.float32)
    of_samples.append(Score(f"semantic entropy, by {main}, stopping early", Source.SAMPLES, early))
    of_prompts = _probe_scores(states, entropies, say)
    results: list[JudgedResult] = []
    drawn: dict[str, Numbers] = {}
    for which in judged:
        say(f"scores of the {which.value} answers")
        answers = [judged_answer(a, c, which) for a, c in zip(answered, found[main], strict=True)]
        wrong = wrong_answers(answered, answers)
        if wrong.all() or not wrong.any():
            raise UsageError(f"{'no' if wrong.all() else 'every'} answer is right", "ask more questions")
        of_answers = scores_of_answers(answers)
        support = [s for n, g in groupings.items() for s in scores_of_support(answered, answers, g, f"by {n}")]
        scores = [*of_samples, *support, *of_answers, *of_prompts]
        qualities = compare(scores, wrong)
        name = main_score(main)
        in_kinds = [next(s for s in of_samples if s.name == name), *of_answers[:2]]
        kinds = [a.question.kind for a in answered]
        results.append(
            JudgedResult(
                which,
                1 - float(wrong.mean()),
                sum(not answer.ended for answer in answers),
                qualities,
                by_kind(kinds, wrong, entropies, in_kinds),
                tuple(score.name for score in in_kinds),
                by_number_of_samples(answered, wrong, groupings[main]),
            )
        )
        if not drawn:
            by_form = [s for s in of_samples if s.name == main_score("form") and main != "form"]
            drawn = curves([*in_kinds[:1], *by_form, *of_answers[:2], *of_prompts[-1:]], wrong)
    tokens = [len(sample.tokens) for a in answered for sample in a.samples]
    n_drawn = float(np.mean([len(c.samples) for c in stopped]))
    return QualityResult(len(answered), main_score(main), float(np.mean(tokens)), n_drawn, results), drawn


def remembered(encode: Encode) -> Encode:
    """The same encoder, which computes no text twice."""
    known: dict[str, Floats] = {}

    def encode_new(texts: list[str]) -> Floats:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, encode(new) if new else (), strict=True))
        return np.stack([known[text] for text in texts])

    return encode_new


class RememberedEntailment(Entailment):
    """Asks about no pair of answers twice."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._known: dict[tuple[str, str, str], float] = {}

    def follows(self, question: str, given: str, other: str) -> float:
        key = question, given, other
        if key not in self._known:
            self._known[key] = super().follows(*key)
        return self._known[key]


def main_score(grouping: str) -> str:
    """The name of a grouping's discrete semantic entropy, which `Confidence.score` is made of."""
    return f"semantic entropy, by {grouping}"


def _probe_scores(states: Mapping[int, Floats], entropies: Floats, say: Callable[[str], None]) -> list[Score]:
    """A probe's at each layer; none where there is too little to fit one to."""
    found = []
    for layer, rows in states.items():
        say(f"probe behind layer {layer}")
        try:
            values = held_out_probe(rows, entropies, layer)
        except UsageError as error:
            say(f"the probe behind layer {layer} is left out: {error.message}")
            continue
        found.append(Score(f"probe of semantic entropy, layer {layer}", Source.PROMPT, values))
    return found
