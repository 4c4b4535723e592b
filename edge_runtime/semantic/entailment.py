"""Whether two answers mean the same by a language model's own word: does each follow from the other, yes or no?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import UnsupportedModelError
from ..native import Model
from ..types import Floats
from .grouping import Similarity

_YES = ("Yes", "yes", " Yes", " yes", "YES")
_NO = ("No", "no", " No", " no", "NO")


class Entailment:
    """A model asked about pairs of answers, in one forward pass each: n answers take n·(n - 1) of them."""

    def __init__(
        self,
        model: Model,
        prompt_tokens: Callable[[str], Sequence[int]],
        next_logits: Callable[[Sequence[int]], Floats],
    ) -> None:
        """`prompt_tokens` turns a user's message into the prompt of the model's reply, `next_logits` gives what follows
        a prompt, (n_vocab,); `AnswerSampler.next_logits` does, best that of a sampler beside the one that answers.

        Raises UnsupportedModelError for a vocabulary in which yes and no do not begin with different tokens.
        """
        yes, no = _first_tokens(model, _YES), _first_tokens(model, _NO)
        self._yes, self._no = sorted(yes - no), sorted(no - yes)
        if not (self._yes and self._no):
            raise UnsupportedModelError("in this model's vocabulary yes and no begin with the same token")
        self._prompt_tokens, self._next_logits = prompt_tokens, next_logits

    def follows(self, question: str, given: str, other: str) -> float:
        """The model's probability that answer `other` follows from `given`, of yes against no."""
        logits = self._next_logits(self._prompt_tokens(entailment_prompt(question, given, other)))
        yes, no = (float(np.logaddexp.reduce(logits[ids].astype(np.float64))) for ids in (self._yes, self._no))
        return float(np.exp(yes - np.logaddexp(yes, no)))

    def about(self, question: str) -> Similarity:
        """For `ByMeaning`, with a threshold of 0.5: of two answers to `question`, the smaller of both directions.

        No pair is asked twice, so that further answers cost no more than what is new.
        """
        known: dict[tuple[str, str], float] = {}

        def similarity(texts: list[str]) -> Floats:
            found = np.ones((len(texts), len(texts)), np.float32)
            for i, given in enumerate(texts):
                for j, other in enumerate(texts):
                    if i != j and (given, other) not in known:
                        known[given, other] = self.follows(question, given, other)
                    found[i, j] = known.get((given, other), 1.0)
            return np.minimum(found, found.T)

        return similarity


def entailment_prompt(question: str, given: str, other: str) -> str:
    """The message that asks whether one answer follows from another."""
    return (
        "Two answers to a question are given. If the first answer is right, must the second be right, too?\n"
        f"Question: {question}\nFirst answer: {given}\nSecond answer: {other}\nReply with yes or no."
    )


def _first_tokens(model: Model, words: Sequence[str]) -> set[int]:
    found = (model.tokenize(word, add_special=False, parse_special=False) for word in words)
    return {tokens[0] for tokens in found if tokens}
