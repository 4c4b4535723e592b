"""One conversation's turn on its way through the batches, and what the engine tells of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from ..draft import BoundaryView
from ..errors import PromptError, UsageError
from ..ngram import NGrams
from ..sampling import Sampler
from ..summary import Clock, Finish
from ..types import Audit, SamplingSettings
from .pool import KvSequence


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for: `tokens` continued by up to `max_tokens` more."""

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    ends: Callable[[int], bool] = lambda _token: False  # whether a token ends the turn; it is published
    stops: Callable[[int], bool] = lambda _token: False  # told each published token that does not; True: enough
    drafts: bool = True  # n-gram drafts, where the engine makes them and they pay
    sampler: Callable[[], Sampler] | None = None  # makes a sampler of its own, which `close`s with the request
    exits: bool = True  # tokens may leave early, where there are boundaries; False: all logits are full depth's

    def check(self, n_ctx: int, n_vocab: int) -> None:
        """Raise PromptError or UsageError for what cannot be answered in a context of `n_ctx` tokens."""
        n = len(self.tokens)
        if not n:
            raise PromptError("the prompt is empty", "give some text")
        if n >= n_ctx:
            raise PromptError(
                f"the prompt is {n} tokens long, a conversation's context holds {n_ctx} and an answer needs room",
                "shorten the prompt, or give a larger context or fewer conversations to share it",
            )
        for token in self.tokens:
            if not 0 <= token < n_vocab:
                raise UsageError(f"{token} is no token: this model has 0 to {n_vocab - 1}")
        if self.max_tokens < 1:
            raise UsageError(f"an answer of {self.max_tokens} tokens is none", "allow 1 or more")


@dataclass(slots=True)
class RequestStats:
    """Counts of one request; the engine adds, readers only read."""

    prompt_tokens: int
    clock: Clock  # from the submission on: the wait for a place is part of the time to the first token
    reused_tokens: int = 0  # of the prompt, held by the KV cache
    started_s: float | None = None  # when it got its place, on the clock's clock
    drafted: int = 0
    accepted: int = 0
    relaxed: int = 0  # … although full depth chose another token
    exits: int = 0  # published tokens that left early
    audited: int = 0  # … compared with full depth later; those that still wait at the end never are
    disagreed: int = 0
    by_depth: dict[int, int] = field(default_factory=dict)  # published tokens by depth in layers

    @property
    def generated_tokens(self) -> int:
        return self.clock.tokens

    @property
    def waited_s(self) -> float | None:
        """Time until it got its place; None as long as it waits."""
        return None if self.started_s is None else self.started_s - self.clock.start


class Request:
    """The handle of what was submitted. Others read `tokens`, `stats` and `ended`; the rest is the engine's."""

    def __init__(self, question: Question, now: float) -> None:
        self.question = question
        self.tokens = list(question.tokens)  # the prompt and what was published
        self.stats = RequestStats(len(question.tokens), Clock(now))
        self.ended = False
        self.sequence: KvSequence | None = None
        self.sampler: Sampler | None = None
        self.source: NGrams | None = None

    @property
    def answer(self) -> list[int]:
        """The tokens published so far."""
        return self.tokens[len(self.question.tokens) :]

    @property
    def n_due(self) -> int:
        """Tokens of the text that are still to be computed: one in an answer, more in a prompt."""
        assert self.sequence is not None
        return len(self.tokens) - len(self.sequence.held)

    def start(self, sequence: KvSequence, n_vocab: int, now: float) -> None:
        """Go on in `sequence`, which holds the beginning of the prompt."""
        question = self.question
        self.sampler = question.sampler() if question.sampler else Sampler(question.sampling, n_vocab)
        self.sampler.rewind(self.tokens)
        self.sequence = sequence
        self.stats.reused_tokens, self.stats.started_s = len(sequence.held), now

    def draft(self, n_ctx: int) -> tuple[list[int], list[float]]:
        """Tokens that may come next, and of each the probability that it is right if those before it are."""
        tokens: list[int] = []
        chances: list[float] = []
        n_text = len(self.tokens)
        left = self.question.max_tokens - self.stats.generated_tokens
        try:
            while self.source is not None and len(tokens) < min(left - 1, n_ctx - 1 - n_text):
                guess = self.source.guess(BoundaryView(0, self.tokens, None, None))
                if guess is None or guess.ids is None:
                    break
                tokens.append(int(guess.ids[0]))
                chances.append(1 - guess.uncertainty)
                self.tokens.append(tokens[-1])
        finally:
            del self.tokens[n_text:]
        return tokens, chances

    def publish(self, token: int, now: float) -> None:
        assert self.sampler is not None
        self.sampler.accept(token)
        self.tokens.append(token)
        self.stats.clock.tick(now)

    def finish_after(self, token: int, n_ctx: int) -> Finish | None:
        """Why the answer ends with `token`, the newest; None if it goes on."""
        if self.question.ends(token):
            return Finish.END_OF_TURN
        if self.question.stops(token):
            return Finish.STOP_STRING
        if len(self.tokens) >= n_ctx:
            return Finish.CONTEXT_FULL
        return Finish.MAX_TOKENS if self.stats.generated_tokens >= self.question.max_tokens else None

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token was published."""

    request: Request
    token: int
    position: int  # in the text: the first of an answer stands right behind the prompt
    depth: int  # layers behind it; all of the model's where full depth chose or confirmed it
    boundary: int | None = None  # layer after which it left early; None: it did not
    relaxed: bool = False  # a draft that full depth put second, and nearly first
    audits: tuple[Audit, ...] = ()  # earlier exits of the request that were compared with full depth now


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer has ended; `interrupted` if it was cancelled."""

    request: Request
    finish: Finish


@dataclass(frozen=True, slots=True)
class Failed:
    """A request could not go on; what it had published stands."""

    request: Request
    error: BaseException


Event: TypeAlias = Token | Finished | Failed
