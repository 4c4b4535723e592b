"""Logits → token, through llama.cpp's samplers; and whether another token would nearly have been it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .native import Candidates, SamplerChain
from .types import Floats, SamplingSettings, TokenIds


class Sampler:
    """Chooses tokens and remembers the published ones for the repeat penalty.

    `draft()` gives a second chain in the same random state: a draft is drawn with the very random number that full
    depth will use for that position. So a verified run publishes, token for token, what full depth alone would have
    published, sampled or greedy, and drafts agree as often as the two distributions are alike (drafter-invariant
    speculative decoding; Daliri, Musco, Suresh 2024, arXiv 2408.07978).
    """

    def __init__(self, settings: SamplingSettings, n_vocab: int) -> None:
        self.settings = settings
        self._n_vocab = n_vocab
        self._candidates = Candidates(n_vocab)
        self._chain = SamplerChain(settings, n_vocab)
        self._draft_chain: SamplerChain | None = None
        # greedy without a penalty needs no candidate list
        self._plain_greedy = settings.temperature == 0 and (
            settings.repeat_penalty == 1.0 or settings.repeat_last_n == 0
        )

    def sample(self, logits: Floats, ids: TokenIds | None = None) -> int:
        """Choose from logits (n,) of tokens `ids` (n,), or of the whole vocabulary."""
        return self._choose(self._chain, logits, ids)

    def accept(self, token: int) -> None:
        """Count a published or prompt token."""
        if not self._plain_greedy:
            self._chain.accept(token)

    def rewind(self, text: Sequence[int]) -> None:
        """Let the repeat penalty know of `text` and nothing else. The random numbers go on."""
        self._chain.set_history(text)

    def begin_draft(self) -> None:
        """Start drafting from the state that the next published token will be chosen in."""
        if self._plain_greedy:
            return
        if self._draft_chain is None:
            self._draft_chain = SamplerChain(self.settings, self._n_vocab)
        self._draft_chain.copy_from(self._chain)

    def draft(self, logits: Floats, ids: TokenIds | None = None) -> int:
        """Choose a draft and count it, without touching the state of `sample`."""
        if self._draft_chain is None:
            return self._choose(self._chain, logits, ids)
        token = self._choose(self._draft_chain, logits, ids)
        self._draft_chain.accept(token)
        return token

    def _choose(self, chain: SamplerChain, logits: Floats, ids: TokenIds | None) -> int:
        if self._plain_greedy:
            best = int(logits.argmax())
            return best if ids is None else int(ids[best])
        self._candidates.fill(logits, ids)
        return chain.choose(self._candidates)

    def reset(self) -> None:
        """Forget history and start the random numbers again from the seed."""
        self._chain.reset()

    def close(self) -> None:
        self._chain.close()
        if self._draft_chain is not None:
            self._draft_chain.close()


def is_close_second(logits: Floats, token: int, theta: float) -> bool:
    """Whether `token` is the second choice by `logits` (n_vocab,) and more than `theta` times as likely as the first.

    The rule of MARS (arXiv 2601.15498), by the ratio of probabilities, exp(l₂ − l₁). The paper's ratio of raw logits
    is not shift-invariant: a constant added to all logits leaves the distribution as it is and changes that ratio, and
    where logits are negative the order turns around. With sampling, too, these are full depth's own logits, before
    temperature, penalties and cuts: a draft that they put second is accepted, whichever other token was drawn. Two
    first choices of the same logit have the ratio 1, and theta 1 accepts none.
    """
    best = int(logits.argmax())
    if token == best or not math.exp(float(logits[token]) - float(logits[best])) > theta:
        return False
    return int(np.count_nonzero(logits > logits[token])) <= 1
