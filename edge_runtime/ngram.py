"""N-gram drafts: the text so far proposes its own continuation, and drafts only as much as pays.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), as in llama.cpp's `lookup`: where
the last few tokens have stood before, what followed there is drafted here. Worth much where an answer repeats its
prompt (rewriting, code, extracts), little in free text. Which of the two a text is, the source sees for itself: it
compares what it drafted, or would have drafted, with the text that came, so that finding out costs no batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from .draft import BoundaryView, Guess
from .prefix import common_prefix
from .types import Floats, Signals

SIZES = (4, 3, 2)  # tokens of the n-grams that are looked up, the longest first
LEVELS = (2, 3, 4, 8, 16)  # lengths of a match; from one to the next, acceptance is counted together
GAIN = 0.05  # a draft must promise this much more than none: costs are measured no better than that

# What is expected of a match of each level before any was seen, as if it had come from so many tokens
_EXPECTED = (0.3, 0.4, 0.5, 0.7, 0.8)
_EXPECTED_WEIGHT = 1.5
_MEMORY = 0.97  # each token seen leaves this much of the weight of those before it: about the latest thirty count
_N_CANDIDATES = 4  # of the latest places where the n-gram stood, the one that agrees furthest back is followed
_TAIL = 8  # tokens by which a text that grew by a few is recognised as the one that is known
_ONE: Floats = np.zeros(1, np.float32)


def draft_length(chances: Sequence[float], costs: Sequence[float], gain: float = GAIN) -> int:
    """How many tokens to draft so that most are published in a time; 0 where no draft promises `gain` more than none.

    `chances[i]` is the probability that draft i is right if those before it are, `costs[k - 1]` what a batch of k
    tokens costs, in batches of one. Verifying k drafts costs c(k + 1) and publishes the right ones and one token of
    full depth's: 1 + q₁ + q₁q₂ + …, for equal chances (1 − qᵏ⁺¹) ÷ (1 − q) (Leviathan et al. 2023, arXiv 2211.17192).
    """
    best, best_rate = 0, (1 + gain) / costs[0]
    expected = survival = 1.0
    for k, (chance, cost) in enumerate(zip(chances, costs[1:], strict=False), start=1):
        survival *= chance
        expected += survival
        if expected / cost > best_rate:
            best, best_rate = k, expected / cost
    return best


class Acceptance:
    """How often the token after a match was right, by the length of the match; older ones count for less."""

    def __init__(self) -> None:
        self._right = [_EXPECTED_WEIGHT * share for share in _EXPECTED]
        self._seen = [_EXPECTED_WEIGHT] * len(LEVELS)

    def chance(self, length: int) -> float:
        """Estimated probability that the token after a match of `length` ≥ 2 tokens is right."""
        level = bisect_right(LEVELS, length) - 1
        return self._right[level] / self._seen[level]

    def count(self, length: int, right: bool) -> None:
        """Count one token that followed a match of `length` tokens."""
        level = bisect_right(LEVELS, length) - 1
        # what was expected beforehand never fades, so that no level is ever given up for good, or trusted blindly
        right_before = _EXPECTED_WEIGHT * _EXPECTED[level]
        self._right[level] = right_before + (self._right[level] - right_before) * _MEMORY + right
        self._seen[level] = _EXPECTED_WEIGHT + (self._seen[level] - _EXPECTED_WEIGHT) * _MEMORY + 1


class NGramIndex:
    """Where the n-grams of a text stood. To grow and to shorten cost the same per token, whatever the text's length.

    A place is the position of the token that followed. Places of the same n-gram are chained, latest first, so that the
    last one can be taken back: after a rollback the index is exactly that of the shorter text.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._whole = True
        self._latest: dict[tuple[int, ...], int] = {}
        # by size: for each position, the place before it of the n-gram that ends there; 0: none
        self._before: dict[int, list[int]] = {size: [] for size in SIZES}

    def follow(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the text. What it shares with the text before is looked at only if it can have changed."""
        if not self._whole:  # a change was interrupted
            self.text.clear()
            self._latest.clear()
            for before in self._before.values():
                before.clear()
        self._whole = False
        known = len(self.text)
        grown = len(tokens) - known
        if not 0 <= grown <= 2 * _TAIL or list(tokens[max(0, known - _TAIL) : known]) != self.text[-_TAIL:]:
            self._shorten(common_prefix(self.text, tokens))
        for token in tokens[len(self.text) :]:
            self._append(token)
        self._whole = True

    def find(self) -> tuple[int, int] | None:
        """(place, length of the match) of the longest match with the end of the text, or None."""
        text = self.text
        for size in SIZES:
            place = self._latest.get(tuple(text[-size:])) if len(text) > size else None
            if place is None:
                continue
            before, best, best_length = self._before[size], 0, 0
            for _ in range(_N_CANDIDATES):
                length = self._agree(place, size)
                if length > best_length:
                    best, best_length = place, length
                place = before[place]
                if not place or best_length >= LEVELS[-1]:
                    break
            return best, best_length
        return None

    def _agree(self, place: int, size: int) -> int:
        """How many tokens before `place` are those at the end of the text; counted up to the last level."""
        text, end = self.text, len(self.text)
        length, most = size, min(place, LEVELS[-1])
        while length < most and text[place - 1 - length] == text[end - 1 - length]:
            length += 1
        return length

    def _append(self, token: int) -> None:
        text, place = self.text, len(self.text)
        for size, before in self._before.items():
            if place < size:
                before.append(0)
                continue
            gram = tuple(text[-size:])
            before.append(self._latest.get(gram, 0))
            self._latest[gram] = place
        text.append(token)

    def _shorten(self, length: int) -> None:
        text = self.text
        while len(text) > length:
            text.pop()
            for size, chain in self._before.items():
                before = chain.pop()
                if len(text) < size:
                    continue
                gram = tuple(text[-size:])
                if before:
                    self._latest[gram] = before
                else:
                    del self._latest[gram]


class NGrams:
    """The draft source before the first slice that copies from the text.

    A draft follows one match to its end, and beyond the end of the text goes on with what it drafted itself, which
    continues a repetition. It knows no probabilities: with sampling, too, a draft stands only if full depth samples it.
    """

    wants_logits = wants_states = False

    def __init__(self, costs: Sequence[float]) -> None:
        """`costs` of batches of 1, 2, … tokens, in batches of one; the longest draft is one token less than these.

        They are read at each look-up, so they may change.
        """
        self._costs = costs
        self._index = NGramIndex()
        self._acceptance = Acceptance()
        self._start = 0  # length of the text that the latest look-up was made for
        self._length = 0  # of the match that was found then; 0: none
        self._expected: list[int] = []  # the tokens that followed it, as many as were to be drafted, at least one
        self._n_draft = self._n_given = 0  # how many of them were to be drafted, and were

    def speaks_at(self, boundary: int) -> bool:
        return boundary == 0

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        pass  # it wants none

    def forget(self, length: int) -> None:
        pass  # it sees by itself what became of the text

    def guess(self, view: BoundaryView) -> Guess | None:
        """The next token of the draft under way, or of a new one; None at its end, or where none is worth it."""
        tokens = view.tokens
        if not self._under_way(tokens):
            self._judge(tokens)
            self._look_up(tokens)
        if self._n_given == self._n_draft:
            return None
        token, length = self._expected[self._n_given], self._length + self._n_given
        self._n_given += 1
        doubt = 1 - self._acceptance.chance(length)
        signals = Signals(entropy=0.0, top1=1.0, margin=1.0, gate=doubt)
        return Guess(_ONE, signals, doubt, np.array([token], np.int32))

    def _under_way(self, tokens: Sequence[int]) -> bool:
        """Whether the text ends with the draft so far: it has been neither verified nor given up."""
        n = self._n_given
        return n > 0 and len(tokens) == self._start + n and tokens[-1] == self._expected[n - 1]

    def _judge(self, tokens: Sequence[int]) -> None:
        """Count which of the expected tokens came; where none was drafted, the first: then all was looked up anew."""
        start, n_judged = self._start, max(1, self._n_given)
        if not self._length or not start < len(tokens) <= start + n_judged + 1:
            return  # nothing was expected, or somebody else has added to the text
        if list(tokens[start - 2 : start]) != self._index.text[-2:]:
            return
        for i, (expected, came) in enumerate(zip(self._expected[:n_judged], tokens[start:], strict=False)):
            self._acceptance.count(self._length + i, expected == came)
            if expected != came:
                return

    def _look_up(self, tokens: Sequence[int]) -> None:
        self._start, self._length, self._n_draft, self._n_given = len(tokens), 0, 0, 0
        self._index.follow(tokens)
        found = self._index.find()
        if found is None:
            return
        place, length = found
        if list(tokens[place - length : place]) != list(tokens[-length:]):
            self._index.follow(())  # the text was changed in a way that nobody could see: read all of it again
            return
        self._length = length
        chances = [self._acceptance.chance(self._length + i) for i in range(len(self._costs) - 1)]
        self._n_draft = draft_length(chances, self._costs)
        self._expected = _copied(tokens, place, max(1, self._n_draft))


def _copied(tokens: Sequence[int], place: int, count: int) -> list[int]:
    """`count` tokens from `place` on; behind the end of the text come those that were copied first."""
    copied: list[int] = []
    for i in range(place, place + count):
        copied.append(tokens[i] if i < len(tokens) else copied[i - len(tokens)])
    return copied
