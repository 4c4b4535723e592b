"""Several answers to one prompt as sequences of one batch: the prompt is computed once, and all share its KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..errors import PromptError, UsageError
from ..native import ContextOptions, Model
from ..slices import Slice
from ..types import Floats
from .draw import draw_token


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How answers are drawn: from the whole distribution, at a temperature, one line each."""

    temperature: float = 0.5  # best for this of those that Kuhn et al. 2023 tried
    max_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(
                f"answers cannot be drawn at temperature {self.temperature}",
                "give one above 0; without chance all answers would be the same",
            )
        if self.max_tokens < 1:
            raise UsageError(f"an answer of {self.max_tokens} tokens is none", "allow 1 or more")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is out of range", "allowed: 0 or more")


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. Likelihoods are the model's own, at temperature 1, whatever it was drawn at."""

    text: str  # up to the end of its line, without spaces around it
    tokens: tuple[int, ...]  # with the one that ended it
    log_likelihoods: tuple[float, ...]  # of each token, nats
    mean_entropy: float  # of the distributions they were drawn from, nats
    ended: bool  # False: cut at the most tokens

    @property
    def log_likelihood(self) -> float:
        """Of the whole answer, nats."""
        return math.fsum(self.log_likelihoods)

    @property
    def mean_log_likelihood(self) -> float:
        """Length-normalised: per token, nats; 0 for an answer without tokens."""
        return self.log_likelihood / len(self.log_likelihoods) if self.log_likelihoods else 0.0


class AnswerSource(Protocol):
    """What draws answers to a prompt."""

    @property
    def rows(self) -> int:
        """Tokens computed so far, prompts included."""

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        """The answers of these numbers; seed and number decide on an answer's random numbers, and nothing else does."""


class AnswerSampler:
    """Draws up to `n_parallel` answers at once from a model, in a context of its own. Not thread-safe.

    What a prompt has in common with the one before is not computed again.
    """

    def __init__(self, model: Model, n_parallel: int = 8, options: ContextOptions | None = None) -> None:
        """`options.n_ctx` holds the prompt and all answers drawn at once. Close it, or use it in a `with`.

        Raises UsageError, MemoryLimitError or LibraryError.
        """
        options = replace(options or ContextOptions(), n_seq_max=n_parallel, kv_unified=True)
        if min(options.n_batch, options.n_ctx) < n_parallel:
            raise UsageError(
                f"a batch of {options.n_batch} has no room for a token of each of {n_parallel} answers",
                f"allow batches of {n_parallel} or more",
            )
        self.n_parallel, self.n_ctx = n_parallel, options.n_ctx
        self.rows = self.batches = 0  # computed so far
        self._model = model
        self._slice = Slice(model, 0, model.n_layer, options, n_outputs_max=n_parallel)
        self._held: list[int] = []  # of the prompt, in the KV cache of every sequence
        self._first: Floats | None = None  # logits behind the prompt, once it is computed

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        """One answer to `prompt` for each of `numbers`, which with the seed decide on its random numbers.

        Raises PromptError for a prompt that is empty or leaves no room for the answers, UsageError for more answers
        than there are places, DecodeError if llama.cpp fails.
        """
        self._check(prompt, len(numbers), settings.max_tokens)
        logits = self.next_logits(prompt)
        answers = [_Answer(np.random.default_rng((settings.seed, number))) for number in numbers]
        for answer in answers:
            self._take(answer, logits, settings)
        for number in range(len(answers)):
            self._slice.remove(len(prompt), number)
        while going := [i for i, answer in enumerate(answers) if not answer.done]:
            positions = [len(prompt) + len(answers[i].tokens) - 1 for i in going]
            self._decode([answers[i].tokens[-1] for i in going], positions, range(len(going)), going)
            for row, i in enumerate(going):
                self._take(answers[i], self._slice.logits(row), settings)
        return [answer.sample() for answer in answers]

    def next_logits(self, prompt: Sequence[int]) -> Floats:
        """Logits (n_vocab,) of what follows a prompt; computed unless it is the one before.

        Raises PromptError for a prompt that is empty or does not fit, DecodeError if llama.cpp fails.
        """
        self._check(prompt, 1, 1)
        if self._first is None or self._held != list(prompt):
            self._compute(list(prompt))
        assert self._first is not None
        return self._first

    def _compute(self, prompt: list[int]) -> None:
        """Compute a prompt in sequence 0 and let the others share it."""
        n_kept = 0  # the last token is always computed, for its logits
        while n_kept < min(len(self._held), len(prompt) - 1) and self._held[n_kept] == prompt[n_kept]:
            n_kept += 1
        self._held, self._first = self._held[:n_kept], None
        for number in range(1, self.n_parallel):
            self._slice.remove(0, number)
        self._slice.remove(n_kept)
        for start in range(n_kept, len(prompt), self._slice.n_batch):
            piece = prompt[start : start + self._slice.n_batch]
            is_last = start + len(piece) == len(prompt)
            want = range(len(piece) - 1, len(piece)) if is_last else range(0)
            self._decode(piece, range(start, start + len(piece)), want, [0] * len(piece))
            self._held += piece
        first = self._slice.logits(len(piece) - 1).copy()
        for number in range(1, self.n_parallel):
            self._slice.copy_sequence(0, number)
        self._first = first

    def _decode(self, tokens: list[int], positions: Sequence[int], want: Sequence[int], numbers: list[int]) -> None:
        self._slice.decode_tokens(tokens, 0, want, numbers, positions)
        self.rows += len(tokens)
        self.batches += 1

    def _take(self, answer: _Answer, logits: Floats, settings: SampleSettings) -> None:
        """Let an answer go on with a token drawn from `logits`."""
        drawn = draw_token(logits, settings.temperature, float(answer.random.random()))
        answer.tokens.append(drawn.token)
        answer.log_likelihoods.append(drawn.log_likelihood)
        answer.entropies.append(drawn.entropy)
        if self._model.is_end(drawn.token):
            answer.ended = True
        else:
            answer.data += self._model.piece(drawn.token)
            answer.ended = b"\n" in answer.data.lstrip()
        answer.done = answer.ended or len(answer.tokens) == settings.max_tokens

    def _check(self, prompt: Sequence[int], n_answers: int, max_tokens: int) -> None:
        if not prompt:
            raise PromptError("the prompt is empty", "give some text")
        if n_answers > self.n_parallel:
            raise UsageError(
                f"{n_answers} answers at once are more than the {self.n_parallel} there is room for",
                "draw fewer at once, or open the sampler for more",
            )
        needed = len(prompt) + n_answers * (max_tokens - 1)  # an answer's last token is not computed
        if needed > self.n_ctx:
            raise PromptError(
                f"the question is {len(prompt)} tokens long; with {n_answers} answers of {max_tokens} it needs a "
                f"context of {needed}, and this one holds {self.n_ctx}",
                "shorten the question, or give a larger --ctx",
            )

    def close(self) -> None:
        self._slice.close()

    def __enter__(self) -> AnswerSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Answer:
    """An answer on its way."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.tokens: list[int] = []
        self.log_likelihoods: list[float] = []
        self.entropies: list[float] = []
        self.data = b""
        self.ended = self.done = False

    def sample(self) -> Sample:
        lines = self.data.decode("utf-8", "ignore").strip().splitlines()
        mean_entropy = math.fsum(self.entropies) / len(self.entropies)
        text = lines[0].strip() if lines else ""
        return Sample(text, tuple(self.tokens), tuple(self.log_likelihoods), mean_entropy, self.ended)
