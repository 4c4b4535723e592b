"""What every engine of several conversations does: places, events, ends, and whose failure is whose.

    submit ──► waiting ──► a sequence of the KV cache ──► step, step, … ──► Token, Token, …, Finished
                              (pool.py)

Text is nobody's business here, and neither are queues, their bounds and threads: one thread owns an engine.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..errors import UsageError
from ..native import ContextOptions, Model
from ..native.interrupt import interrupt_deferred
from ..slices import close_slices, open_slices
from ..summary import Finish
from .pool import KvSequence, SequencePool
from .request import Event, Failed, Finished, Question, Request, Token

_Engine = TypeVar("_Engine", bound="Conversations")


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
    relaxed: int = 0  # … although full depth chose another token
    exits: int = 0  # published tokens that left early
    audited: int = 0  # … compared with full depth later
    disagreed: int = 0
    by_depth: dict[int, int] = field(default_factory=dict)  # published tokens by depth in layers
    batches: int = 0  # calls of llama.cpp: each slice's own, where answers may leave between them
    rows: int = 0  # tokens computed in them
    padding: int = 0  # … for nothing but the shape of the batch
    copied: int = 0  # beginnings copied from another conversation
    evicted: int = 0  # conversations given up for another


class Conversations(ABC):
    """Answers up to `options.n_seq_max` requests at once. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        boundaries: tuple[int, ...],
        n_rows: int,
        n_outputs: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open slices of `model`; the context is shared out evenly among the conversations.

        A batch must have room for `n_rows` of each, and the last slice gives `n_outputs` rows of logits. Raises
        UsageError, MemoryLimitError or LibraryError.
        """
        n = options.n_seq_max
        self.n_ctx = options.n_ctx // n  # of each conversation
        if self.n_ctx < 2:
            raise UsageError(
                f"a context of {options.n_ctx} tokens is too small for {n} conversations",
                "give a larger context, or fewer conversations",
            )
        n_batch = min(options.n_batch, options.n_ctx)
        if n_batch < n * n_rows:
            what = "a token" if n_rows == 1 else f"{n_rows} tokens"
            raise UsageError(
                f"a batch of {n_batch} has no room for {what} of each of {n} conversations",
                f"allow batches of {n * n_rows} or more",
            )
        options = replace(options, kv_unified=False)
        self.slices = open_slices(model, boundaries, options, n_outputs_max=min(n_outputs, n_batch))
        self.pool = SequencePool(n)
        self.stats = BatchStats()
        self._n_vocab, self._n_layer = model.n_vocab, model.n_layer
        self._n_batch = self.slices[0].n_batch
        self._clock = clock
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
    def n_reading(self) -> int:
        """Requests with a place whose prompt is not computed yet."""
        return sum(not request.answer for request in self._running)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing and tell nothing."""
        return not (self._waiting or self._running or self._events)

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from the next step on. Raises UsageError for a number out of range."""
        for piece in self.slices:
            piece.set_threads(n_threads)

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[Event]:
        """Bring all requests a batch further; what has happened since the step before, in order.

        What fails a request ends that request and no other. An exception that is none's (Ctrl-C) loses nothing: the
        next step tells what was published before it.
        """
        with interrupt_deferred():
            self._start_waiting()
        self._advance()
        events, self._events = self._events, []
        return events

    @abstractmethod
    def _advance(self) -> None:
        """Compute, publish, and end what has come to its end."""

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
                self._start(request, sequence)
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
        self._copy_cache(source.number, target.number)
        target.held = list(source.held)

    def _copy_cache(self, source: int, target: int) -> None:
        """Keys and values of one sequence, by number, to another that is known to hold nothing."""
        for piece in self.slices:
            piece.copy_sequence(source, target)

    def _start(self, request: Request, sequence: KvSequence) -> None:
        """Let a request go on in a sequence that holds the beginning of its prompt."""
        request.start(sequence, self._n_vocab, self._clock())

    # ── what comes of it ────────────────────────────────────────────────────────────────────────────────────────────

    def _publish(self, event: Token, now: float) -> Finish | None:
        """Add a token to its request's text; why the answer ends with it, or None."""
        request = event.request
        request.publish(event.token, now)
        self._events.append(event)
        self.stats.published += 1
        for stats in (self.stats, request.stats):
            stats.by_depth[event.depth] = stats.by_depth.get(event.depth, 0) + 1
            stats.exits += event.boundary is not None
            stats.relaxed += event.relaxed
            stats.audited += len(event.audits)
            stats.disagreed += sum(not audit.agreed for audit in event.audits)
        return request.finish_after(event.token, self.n_ctx)

    def _guarded(self, request: Request, publish: Callable[[], None]) -> None:
        """Publish something of a request; what its callbacks or its sampler raise ends it."""
        if request.ended:
            return
        try:
            publish()
        except BaseException as error:
            self._fail(request, error)
            if not isinstance(error, Exception):
                raise

    def _finish(self, request: Request, finish: Finish | None) -> None:
        """End an answer that has come to its end, unless a callback has ended it already."""
        if finish and not request.ended:
            self.stats.finished += 1
            self._end(request, Finished(request, finish))

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
            self.pool.release(sequence_of(request))
        else:
            self._waiting.remove(request)
        self._events.append(event)

    def close(self) -> None:
        """Close slices and samplers; requests that have not ended never will."""
        for request in self._running:
            request.close()
        close_slices(self.slices)

    def __enter__(self: _Engine) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sequence_of(request: Request) -> KvSequence:
    """Of a request that has a place."""
    assert request.sequence is not None
    return request.sequence
