"""Which answers mean the same: by their form, or by how similar any two are. Their order makes no difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..types import Floats
from .forms import beyond, contradict, form

# texts → (n, n) symmetric: how near the meanings of two are, 1 for the same
Similarity: TypeAlias = Callable[[list[str]], Floats]
Encode: TypeAlias = Callable[[list[str]], Floats]  # texts → (n, d) float32, rows of length 1


class Grouping(Protocol):
    """Puts answers of one meaning together; answers of one form always are."""

    @property
    def fixed(self) -> bool:
        """Whether two answers are together or apart whatever other answers there are."""

    def groups(self, answers: Sequence[str]) -> list[list[int]]:
        """Indices of the answers by group, increasing; the largest group first, of equal ones that which came first."""


@dataclass(frozen=True, slots=True)
class ByForm:
    """Answers of the same `form` mean the same."""

    fixed: bool = True

    def groups(self, answers: Sequence[str]) -> list[list[int]]:
        return _ordered(_by_form(answers).values())


@dataclass(frozen=True, slots=True)
class ByMeaning:
    """Answers of the same form mean the same, and so do groups that are similar by `threshold` or more on average.

    The two most similar groups are joined first (average linkage, every answer counting). Groups that contradict each
    other (yes and no, or different numbers) are never joined, nor is an empty answer with another.
    """

    similarity: Similarity
    threshold: float
    fixed: bool = False

    def groups(self, answers: Sequence[str]) -> list[list[int]]:
        by_form = _by_form(answers)
        # in an order of their own, so that neither ties nor sums depend on the order of the answers
        forms = sorted(by_form)
        if len(forms) < 2:
            return _ordered(by_form.values())
        texts = [min(answers[i] for i in by_form[key]) for key in forms]
        near = np.array(self.similarity(texts), np.float64)
        for i, a in enumerate(forms):
            for j, b in enumerate(forms):
                if not (a and b) or contradict(a, b):
                    near[i, j] = -np.inf
        weights = np.array([len(by_form[key]) for key in forms], np.float64)
        linked = average_linkage(near, weights, self.threshold)
        return _ordered([i for item in group for i in by_form[forms[item]]] for group in linked)


def embedding_similarity(encode: Encode, question: str = "") -> Similarity:
    """Cosines of the embeddings of what each two answers to `question` say beyond the words of it that both repeat.

    With these, "The capital of France is Paris" and "The capital of France is Lyon" would be nearly the same.
    """

    def similarity(texts: list[str]) -> Floats:
        asked, forms = form(question), [form(text) for text in texts]
        pairs = {(i, j): beyond(asked, forms[i], forms[j]) for i in range(len(forms)) for j in range(i)}
        distinct = sorted({text for pair in pairs.values() for text in pair})
        rows = dict(zip(distinct, encode(distinct), strict=True)) if distinct else {}
        found = np.eye(len(texts), dtype=np.float32)
        for (i, j), (a, b) in pairs.items():
            found[i, j] = found[j, i] = rows[a] @ rows[b]
        return found

    return similarity


def average_linkage(similarity: NDArray[np.float64], weights: NDArray[np.float64], threshold: float) -> list[list[int]]:
    """Groups of items 0 … n - 1, joined as long as two are similar by `threshold` or more on average.

    `similarity` (n, n) symmetric, -inf for two that must stay apart; an item counts as often as its weight (n,) says.
    Of pairs equally similar the first is joined.
    """
    groups = [[i] for i in range(len(weights))]
    near, weights = similarity.copy(), weights.copy()
    np.fill_diagonal(near, -np.inf)
    while len(groups) > 1:
        a, b = divmod(int(near.argmax()), len(groups))  # a < b: the first of a symmetric pair
        if not near[a, b] >= threshold:
            break
        mean = (weights[a] * near[a] + weights[b] * near[b]) / (weights[a] + weights[b])
        mean[a] = -np.inf
        near[a], near[:, a] = mean, mean
        near = np.delete(np.delete(near, b, 0), b, 1)
        weights[a] += weights[b]
        weights = np.delete(weights, b)
        groups[a] += groups.pop(b)
    return groups


def _by_form(answers: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        found.setdefault(form(answer), []).append(i)
    return found


def _ordered(groups: Iterable[list[int]]) -> list[list[int]]:
    return sorted((sorted(group) for group in groups), key=lambda group: (-len(group), group[0]))
