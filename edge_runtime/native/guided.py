"""A chain of llama.cpp's samplers for requests that want more than a distribution cut and cooled: a grammar, biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DecodeError, UsageError
from ..types import Floats, SamplingSettings, TokenIds
from .library import load
from .model import Model
from .sampler import Candidates, Chain

_ROOT = b"root"


@dataclass(frozen=True, slots=True)
class Guidance:
    """What an answer must or should be, beyond its sampling settings."""

    grammar: str | None = None  # GBNF; its rule `root` is the answer
    frequency_penalty: float = 0.0  # of tokens of the answer, for each time they came
    presence_penalty: float = 0.0  # … if they came at all
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalises(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0


def check_grammar(grammar: str, model: Model) -> None:
    """Raises UsageError for what llama.cpp cannot read as a grammar."""
    load().c.llama_sampler_free(_grammar_sampler(grammar, model))


def _grammar_sampler(grammar: str, model: Model) -> Any:
    api = load()
    with api.log.fresh() as log:
        handle = api.c.llama_sampler_init_grammar(model._vocab, grammar.encode(), _ROOT)
        reason = log.reason()
    if not handle:
        raise UsageError(f"the grammar cannot be used: {reason or 'llama.cpp gave no reason'}")
    return handle


class GuidedChain(Chain):
    """bias → penalties → top-k → top-p → min-p → temperature → draw; greedy at temperature 0.

    With a grammar, what was chosen stands if the grammar allows it. Else the grammar goes through the whole vocabulary,
    which takes longer than a small model's layers, and the choice is made among what it leaves.
    """

    def __init__(self, settings: SamplingSettings, guidance: Guidance, model: Model, n_answer: int) -> None:
        """For answers of up to `n_answer` tokens. Raises UsageError for a grammar that is none."""
        self._grammar = None if guidance.grammar is None else _grammar_sampler(guidance.grammar, model)
        super().__init__(settings, model.n_vocab)
        c = self._c
        self._one = Candidates(1)
        if guidance.logit_bias:
            entries = (c.llama_logit_bias * len(guidance.logit_bias))(*guidance.logit_bias)
            self._add(c.llama_sampler_init_logit_bias(model.n_vocab, len(entries), entries))
        self._add_repeat_penalty()
        if guidance.penalises:
            penalties = guidance.frequency_penalty, guidance.presence_penalty
            self._add(c.llama_sampler_init_penalties(model.n_vocab, n_answer, 1.0, *penalties))
        self._add_choice()

    def choose(self, candidates: Candidates, logits: Floats, ids: TokenIds | None = None) -> int:
        """The token chosen from logits (n,), with room in `candidates`; it does not yet count as seen.

        Raises DecodeError if the grammar allows none.
        """
        candidates.fill(logits, ids)
        self._c.llama_sampler_apply(self._handle, candidates.reference)
        token = candidates.selected
        if self._grammar is None or self._allows(token):
            return token
        candidates.fill(logits, ids)
        self._c.llama_sampler_apply(self._grammar, candidates.reference)
        self._c.llama_sampler_apply(self._handle, candidates.reference)
        array = candidates.array
        # a token that the grammar forbids must not be counted: llama.cpp would end the process
        if array.selected < 0 or not np.isfinite(array.data[array.selected].logit):
            raise DecodeError("no token of the vocabulary goes on with what the grammar allows")
        return candidates.selected

    def _allows(self, token: int) -> bool:
        self._one.fill(np.zeros(1, np.float32), np.array([token], np.int32))
        self._c.llama_sampler_apply(self._grammar, self._one.reference)
        return bool(np.isfinite(self._one.array.data[0].logit))

    def accept(self, token: int) -> None:
        """Count a published token."""
        self._c.llama_sampler_accept(self._handle, token)
        if self._grammar is not None:
            self._c.llama_sampler_accept(self._grammar, token)

    def close(self) -> None:
        if self._grammar is not None:
            self._c.llama_sampler_free(self._grammar)
            self._grammar = None
        super().close()
