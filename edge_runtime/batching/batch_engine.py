"""Several conversations in one model: each step is one batch of a token of every answer and a piece of every prompt.

Full depth, lossless: with the edge kernels, whose sums for a token do not depend on the tokens beside it, every request
gets the very tokens that it would get alone. With `theta`, drafts that full depth puts second and nearly first stand,
too (mode margin); then it matters which drafts were made, and that depends on the company.

What a sequence of the KV cache surely holds is noted only after it was computed, and everything behind that is removed
before the next batch. So whatever is interrupted or fails, the next step computes from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import EdgeError, UsageError
from ..native import ContextOptions, Model
from ..native.interrupt import interrupt_deferred
from ..ngram import NGrams
from ..sampling import is_close_second
from ..types import EngineSettings, Floats, Mode
from .conversations import Conversations, sequence_of
from .plan import CompanyCosts, best_width, bridges, prompt_shares
from .pool import KvSequence
from .request import Request, Token


@dataclass(frozen=True, slots=True)
class _Part:
    """A sequence's rows of one batch: tokens that follow what it holds."""

    sequence: KvSequence
    tokens: Sequence[int]
    request: Request | None = None  # None: padding
    n_text: int = 0  # the first so many are the request's text; behind them come drafts and padding
    want: range = range(0)  # rows that get logits: the text's last, if it has come to its end, and the drafts'
    drafts: Sequence[int] = ()


class BatchEngine(Conversations):
    """Full depth, with n-gram drafts where they pay."""

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        costs: Sequence[float] = (1.0,),
        *,
        boundaries: tuple[int, ...] = (),
        theta: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open slices of `model`; the context is shared out evenly among the conversations.

        `costs` c(1), c(2), … of batches in batches of one decide on drafts; a batch with drafts has no more rows than
        these. They are read anew in each step. `options.n_batch` bounds a batch, and so how long a prompt holds up the
        answers beside it. `theta` makes it mode margin: a draft that is full depth's second choice and more than
        `theta` times as likely as its first is taken. Raises UsageError, MemoryLimitError or LibraryError.
        """
        if not costs:
            raise UsageError("nothing is known of what a batch costs", "give at least the cost of a batch of one, 1")
        self._theta = None if theta is None else EngineSettings(Mode.MARGIN, theta=theta).theta
        n_outputs = max(options.n_seq_max, min(len(costs), options.n_batch))
        super().__init__(model, options, boundaries, 1, n_outputs, clock)
        first, *rest = self.slices
        self._route = first.route_to(rest) if rest else None
        self._costs, self._company = costs, CompanyCosts(costs)

    def _start(self, request: Request, sequence: KvSequence) -> None:
        super()._start(request, sequence)
        if request.question.drafts and len(self._company) > 1:
            request.source = NGrams(self._company)

    # ── plan → decode → publish ─────────────────────────────────────────────────────────────────────────────────────

    def _advance(self) -> None:
        parts = self._plan()
        if parts:
            self._run(parts)

    def _plan(self) -> list[_Part]:
        """The next batch, in the order of the sequences' numbers; empty if nobody has a place."""
        answers = [request for request in self._running if request.n_due == 1]
        prompts = [request for request in self._running if request.n_due > 1]
        bridging = self._bridges(answers, prompts)
        width, drafts = 1, [list[int]() for _ in answers]
        if answers and not prompts:  # beside a prompt's rows, drafts would be a pass of their own
            width, drafts = self._drafts(answers, len(answers) + len(bridging))
        parts = [self._answer_part(request, width, of_it) for request, of_it in zip(answers, drafts, strict=True)]
        parts += [_Part(sequence, self._padding(sequence, width)) for sequence in bridging]
        shares = prompt_shares([request.n_due for request in prompts], self._n_batch - len(parts))
        parts += [_prompt_part(request, share) for request, share in zip(prompts, shares, strict=True)]
        return sorted(parts, key=lambda part: part.sequence.number)

    def _bridges(self, answers: Sequence[Request], prompts: Sequence[Request]) -> list[KvSequence]:
        """Idle sequences that get a row for nothing, so that the answers go through the weights together."""
        taken = {sequence_of(request).number for request in prompts}
        found = bridges(sorted(sequence_of(request).number for request in answers), self._costs)
        idle = [self.pool.sequences[number] for number in found if number not in taken]
        return [sequence for sequence in idle if len(sequence.held) < self.n_ctx]

    def _drafts(self, answers: Sequence[Request], n_sequences: int) -> tuple[int, list[list[int]]]:
        """Rows of each sequence, and of each answer the drafts in them."""
        self._company.n_sequences = n_sequences
        found = [request.draft(self.n_ctx) for request in answers]
        widest = min(len(self._costs), self._n_batch) // n_sequences
        width = best_width([chances for _, chances in found], n_sequences, self._costs, widest)
        return width, [tokens[: width - 1] for tokens, _ in found]

    def _answer_part(self, request: Request, width: int, drafts: Sequence[int]) -> _Part:
        sequence = sequence_of(request)
        tokens = [request.tokens[-1], *drafts]
        padding = self._padding(sequence, width)[len(tokens) :]
        return _Part(sequence, tokens + padding, request, 1, range(len(tokens)), drafts)

    def _padding(self, sequence: KvSequence, width: int) -> list[int]:
        """Tokens of no meaning, as many as `width` and the sequence have room for."""
        return [0] * min(width, self.n_ctx - len(sequence.held))

    def _run(self, parts: Sequence[_Part]) -> None:
        """Compute a batch and publish what comes of it; if it fails, each request alone, to see whose fault it is."""
        try:
            self._decode(parts)
        except EdgeError as error:
            asked = [part for part in parts if part.request is not None]
            for part in asked:
                if len(parts) > 1:
                    self._run([part])
                elif part.request is not None:
                    self._fail(part.request, error)
            return
        now, row = self._clock(), 0
        with interrupt_deferred():
            for part in parts:
                if part.request is not None:
                    self._guarded(part.request, partial(self._take, part, part.request, row, now))
                row += len(part.tokens)

    def _decode(self, parts: Sequence[_Part]) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        numbers: list[int] = []
        want: list[int] = []
        for part in parts:
            sequence, n_held, n = part.sequence, len(part.sequence.held), len(part.tokens)
            if sequence.dirty:
                for piece in self.slices:
                    piece.remove(n_held, sequence.number)
            sequence.dirty = True
            want += [len(tokens) + row for row in part.want]
            tokens += part.tokens
            positions += range(n_held, n_held + n)
            numbers += [sequence.number] * n
        self.slices[0].decode_tokens(tokens, 0, want, numbers, positions, self._route)
        self.stats.batches += 1
        self.stats.rows += len(tokens)
        self.stats.padding += sum(len(p.tokens) - p.n_text - len(p.drafts) for p in parts)

    def _take(self, part: _Part, request: Request, first_row: int, now: float) -> None:
        """Take what full depth says: the next token, and as many more as confirm drafts."""
        sequence, n_right, finish = part.sequence, part.n_text, None
        for i, row in enumerate(part.want):
            assert request.sampler is not None
            logits = self.slices[-1].logits(first_row + row)
            token = request.sampler.sample(logits)
            draft = part.drafts[i] if i < len(part.drafts) else None
            relaxed = draft is not None and draft != token and self._is_undecided(logits, draft)
            if draft is not None and relaxed:
                token = draft
            accepted = token == draft
            n_right += accepted
            finish = self._publish(Token(request, token, len(request.tokens), self._n_layer, relaxed=relaxed), now)
            if finish or request.ended or not accepted:
                break
        n_held = len(sequence.held)
        sequence.held += request.tokens[n_held : n_held + n_right]
        sequence.dirty = n_right < len(part.tokens)
        for stats in (self.stats, request.stats):
            stats.drafted += len(part.drafts)
            stats.accepted += n_right - part.n_text
        self._finish(request, finish)

    def _is_undecided(self, logits: Floats, draft: int) -> bool:
        return self._theta is not None and is_close_second(logits, draft, self._theta)


def _prompt_part(request: Request, n_rows: int) -> _Part:
    sequence = sequence_of(request)
    n_held = len(sequence.held)
    tokens = request.tokens[n_held : n_held + n_rows]
    whole = n_rows == request.n_due
    return _Part(sequence, tokens, request, n_rows, range(n_rows - 1, n_rows) if whole else range(0))
