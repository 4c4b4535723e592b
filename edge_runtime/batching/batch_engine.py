"""Several conversations in one model: each step is one batch of a token of every answer and a piece of every prompt.

    submit ──► waiting ──► a sequence of the KV cache ──► step, step, … ──► Token, Token, …, Finished
                              (pool.py)                   (plan.py)

Full depth, lossless: with the edge kernels, whose sums for a token do not depend on the tokens beside it, every request
gets the very tokens that it would get alone. Text is nobody's business here, and neither are queues, their bounds and
threads: one thread owns an engine and calls it.

What a sequence of the KV cache surely holds is noted only after it was computed, and everything behind that is removed
before the next batch. So whatever is interrupted or fails, the next step computes from there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import EdgeError, UsageError
from ..native import ContextOptions, Model
from ..native.interrupt import interrupt_deferred
from ..slices import close_slices, open_slices
from ..summary import Finish
from .plan import CompanyCosts, best_width, bridges, prompt_shares
from .pool import KvSequence, SequencePool
from .request import Event, Failed, Finished, Question, Request, Token


@dataclass(slots=True)
class BatchStats:
    """Counts of all requests since the engine was opened; it adds, readers only read."""

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0  # of requests that got a place
    reused_tokens: int = 0  # … held by the KV cache
    published: int = 0
    drafted: int = 0
    accepted: int = 0
    batches: int = 0
    rows: int = 0  # tokens computed in them
    padding: int = 0  # … for nothing but the shape of the batch
    copied: int = 0  # beginnings copied from another conversation
    evicted: int = 0  # conversations given up for another


@dataclass(frozen=True, slots=True)
class _Part:
    """A sequence's rows of one batch: tokens that follow what it holds."""

    sequence: KvSequence
    tokens: Sequence[int]
    request: Request | None = None  # None: padding
    n_text: int = 0  # the first so many are the request's text; behind them come drafts and padding
    want: range = range(0)  # rows that get logits: the text's last, if it has come to its end, and the drafts'
    drafts: Sequence[int] = ()


class BatchEngine:
    """Answers up to `options.n_seq_max` requests at once. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        costs: Sequence[float] = (1.0,),
        *,
        boundaries: tuple[int, ...] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open slices of `model`; the context is shared out evenly among the conversations.

        `costs` c(1), c(2), … of batches in batches of one decide on drafts; a batch with drafts has no more rows than
        these. They are read anew in each step. `options.n_batch` bounds a batch, and so how long a prompt holds up the
        answers beside it. Raises UsageError, MemoryLimitError or LibraryError.
        """
        n = options.n_seq_max
        self.n_ctx = options.n_ctx // n  # of each conversation
        if self.n_ctx < 2:
            raise UsageError(
                f"a context of {options.n_ctx} tokens is too small for {n} conversations",
                "give a larger context, or fewer conversations",
            )
        if min(options.n_batch, options.n_ctx) < n:
            raise UsageError(
                f"a batch of {options.n_batch} has no room for a token of each of {n} conversations",
                f"allow batches of {n} or more",
            )
        if not costs:
            raise UsageError("nothing is known of what a batch costs", "give at least the cost of a batch of one, 1")
        options = replace(options, kv_unified=False)
        self._n_vocab = model.n_vocab
        self.slices = open_slices(model, boundaries, options, n_outputs_max=max(n, min(len(costs), options.n_batch)))
        first, *rest = self.slices
        self._route = first.route_to(rest) if rest else None
        self._n_batch = first.n_batch
        self._costs, self._company = costs, CompanyCosts(costs)
        self._clock = clock
        self.pool = SequencePool(n)
        self.stats = BatchStats()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._events: list[Event] = []

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, question: Question) -> Request:
        """Take in a request; it gets a place in a step, as soon as there is one, first come, first served.

        Raises PromptError or UsageError for what cannot be answered.
        """
        question.check(self.n_ctx, self._n_vocab)
        request = Request(question, self._clock())
        self._waiting.append(request)
        self.stats.submitted += 1
        return request

    def cancel(self, request: Request) -> None:
        """End a request now, wherever it is; the next step tells so. Nothing happens if it has ended."""
        if not request.ended:
            self.stats.cancelled += 1
            self._end(request, Finished(request, Finish.INTERRUPTED))

    @property
    def has_room(self) -> bool:
        """Whether another request would get a place at once."""
        return self.pool.n_free > len(self._waiting)

    @property
    def n_waiting(self) -> int:
        """Requests without a place."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing and tell nothing."""
        return not (self._waiting or self._running or self._events)

    # ── step: plan → decode → publish ───────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[Event]:
        """Compute one batch; what has happened since the step before, in order.

        What fails a request ends that request and no other. An exception that is none's (Ctrl-C) loses nothing: the
        next step tells what was published before it.
        """
        with interrupt_deferred():
            self._start_waiting()
        parts = self._plan()
        if parts:
            self._run(parts)
        events, self._events = self._events, []
        return events

    def _start_waiting(self) -> None:
        """Give places to those who wait, as far as there are any."""
        while self._waiting:
            request = self._waiting[0]
            place = self.pool.find(request.tokens)
            if place is None:
                return
            sequence = place.sequence
            try:
                if place.source is not None:
                    self._copy(place.source, sequence)
                sequence.keep(place.n_shared)
                request.start(sequence, self._n_vocab, self._company, self._clock())
            except Exception as error:
                self._fail(request, error)
                continue
            self._waiting.popleft()
            self.pool.take(sequence)
            self._running.append(request)
            self.stats.prompt_tokens += len(request.tokens)
            self.stats.reused_tokens += place.n_shared
            self.stats.copied += place.source is not None
            self.stats.evicted += place.evicted

    def _copy(self, source: KvSequence, target: KvSequence) -> None:
        """All that the source's sequence has, which may be more than it is known to hold."""
        target.keep(0)
        target.dirty = True
        for piece in self.slices:
            piece.copy_sequence(source.number, target.number)
        target.held = list(source.held)

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
        taken = {_sequence(request).number for request in prompts}
        found = bridges(sorted(_sequence(request).number for request in answers), self._costs)
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
        sequence = _sequence(request)
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
                if part.request is not None and not part.request.ended:
                    try:
                        self._publish(part, part.request, row, now)
                    except BaseException as error:  # the request's own callbacks, or its sampler
                        self._fail(part.request, error)
                        if not isinstance(error, Exception):
                            raise
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

    def _publish(self, part: _Part, request: Request, first_row: int, now: float) -> None:
        """Take what full depth says: the next token, and as many more as confirm drafts."""
        sequence, n_right, finish = part.sequence, part.n_text, None
        for i, row in enumerate(part.want):
            assert request.sampler is not None
            token = request.sampler.sample(self.slices[-1].logits(first_row + row))
            request.publish(token, now)
            self._events.append(Token(request, token, len(request.tokens) - 1))
            self.stats.published += 1
            accepted = i < len(part.drafts) and token == part.drafts[i]
            n_right += accepted
            finish = request.finish_after(token, self.n_ctx)
            if finish or request.ended or not accepted:
                break
        n_held = len(sequence.held)
        sequence.held += request.tokens[n_held : n_held + n_right]
        sequence.dirty = n_right < len(part.tokens)
        for stats in (self.stats, request.stats):
            stats.drafted += len(part.drafts)
            stats.accepted += n_right - part.n_text
        if finish and not request.ended:
            self.stats.finished += 1
            self._end(request, Finished(request, finish))

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, request: Request, error: BaseException) -> None:
        if not request.ended:
            self.stats.failed += 1
            self._end(request, Failed(request, error))

    def _end(self, request: Request, event: Event) -> None:
        """Its sequence is free again, and keeps what it holds."""
        request.ended = True
        request.close()
        if request in self._running:
            self._running.remove(request)
            self.pool.release(_sequence(request))
        else:
            self._waiting.remove(request)
        self._events.append(event)

    def close(self) -> None:
        """Close slices and samplers; requests that have not ended never will."""
        for request in self._running:
            request.close()
        close_slices(self.slices)

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sequence(request: Request) -> KvSequence:
    assert request.sequence is not None
    return request.sequence


def _prompt_part(request: Request, n_rows: int) -> _Part:
    sequence = _sequence(request)
    n_held = len(sequence.held)
    tokens = request.tokens[n_held : n_held + n_rows]
    whole = n_rows == request.n_due
    return _Part(sequence, tokens, request, n_rows, range(n_rows - 1, n_rows) if whole else range(0))
