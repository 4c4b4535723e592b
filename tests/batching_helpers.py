"""The slow oracle of several conversations: each request alone, in an engine of one conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from edge_runtime.batching import (
    BatchEngine,
    Conversations,
    Event,
    ExitBatchEngine,
    Failed,
    Finished,
    Question,
    Request,
    Token,
)
from edge_runtime.draft import DraftSource
from edge_runtime.engine import Engine
from edge_runtime.native import ContextOptions, Model
from edge_runtime.sampling import Sampler
from edge_runtime.slices import Slice, close_slices, open_slices
from edge_runtime.types import EngineSettings, SamplingSettings, Step, Thresholds

FREE = tuple(1 + 0.001 * k for k in range(16))  # rows cost nearly nothing: many drafts, and long ones


class Alone:
    """What full depth answers, one request after the other, each from an empty cache."""

    def __init__(self, model: Model, n_ctx: int, n_batch: int) -> None:
        options = ContextOptions(n_ctx=n_ctx, n_batch=n_batch, n_threads=1, flash_attention=True)
        self._slice = Slice(model, 0, model.n_layer, options)
        self._n_vocab, self._n_ctx = model.n_vocab, n_ctx
        self._known: dict[tuple[tuple[int, ...], SamplingSettings, int], list[int]] = {}

    def answer(self, question: Question) -> list[int]:
        """All tokens, callbacks ignored."""
        key = question.tokens, question.sampling, question.max_tokens
        if key not in self._known:
            self._slice.remove(0)
            with closing(Sampler(question.sampling, self._n_vocab)) as sampler:
                engine = Engine([self._slice], sampler, EngineSettings(), lambda: Thresholds(()), n_ctx=self._n_ctx)
                engine.extend(question.tokens)
                self._known[key] = [step.token for step in engine.generate(question.max_tokens)]
        return self._known[key]

    def close(self) -> None:
        self._slice.close()


class AloneWithExits:
    """What mode exit answers, one request after the other, each from an empty cache."""

    def __init__(
        self,
        model: Model,
        boundaries: tuple[int, ...],
        source: DraftSource,
        thresholds: Thresholds,
        settings: EngineSettings,
        n_ctx: int,
        n_batch: int,
    ) -> None:
        options = ContextOptions(n_ctx=n_ctx, n_batch=n_batch, n_threads=1, flash_attention=True)
        self._slices = open_slices(model, boundaries, options, n_outputs_max=settings.cap + 1)
        self._source, self._thresholds, self._settings = source, thresholds, settings
        self._n_vocab, self._n_ctx = model.n_vocab, n_ctx
        self._known: dict[tuple[tuple[int, ...], SamplingSettings, int], list[Step]] = {}

    def steps(self, question: Question) -> list[Step]:
        """All steps, callbacks ignored."""
        key = question.tokens, question.sampling, question.max_tokens
        if key not in self._known:
            with closing(Sampler(question.sampling, self._n_vocab)) as sampler:
                engine = Engine(
                    self._slices, sampler, self._settings, lambda: self._thresholds, self._source, n_ctx=self._n_ctx
                )
                for piece in self._slices:
                    piece.remove(0)
                if self._source.wants_states:
                    self._source.forget(0)
                engine.extend(question.tokens)
                self._known[key] = list(engine.generate(question.max_tokens))
        return self._known[key]

    def answer(self, question: Question) -> list[int]:
        return [step.token for step in self.steps(question)]

    def close(self) -> None:
        close_slices(self._slices)


def run(engine: Conversations, each: Callable[[list[Event]], None] = lambda _events: None) -> list[Event]:
    """Step until there is nothing to do; all events, which are also shown to `each` step by step."""
    found: list[Event] = []
    while not engine.idle:
        events = engine.step()
        each(events)
        found += events
    return found


def check_events(events: Sequence[Event], requests: Sequence[Request]) -> None:
    """Every published token was told once, in order, and each end once, behind them."""
    for request in requests:
        own = [event for event in events if event.request is request]
        assert [event.token for event in own if isinstance(event, Token)] == request.answer
        positions = [event.position for event in own if isinstance(event, Token)]
        assert positions == list(range(len(request.question.tokens), len(request.tokens)))
        assert [isinstance(event, (Finished, Failed)) for event in own] == [False] * len(request.answer) + [True]
        assert request.ended


def check_free(engine: BatchEngine | ExitBatchEngine) -> None:
    """Nothing is left behind: every sequence is free, and holds what it is said to hold."""
    assert engine.idle
    assert engine.has_room
    assert engine.n_waiting == 0
    assert engine.pool.n_free == len(engine.pool.sequences)
    for sequence in engine.pool.sequences:
        n_done, dirty = [len(sequence.held)] * len(engine.slices), [sequence.dirty] * len(engine.slices)
        if isinstance(engine, ExitBatchEngine):
            flow = engine._flows[sequence.number]
            n_done, dirty = flow.n_done, flow.dirty
            assert min(n_done) >= len(sequence.held) or flow.moving
        for piece, n, may_be_more in zip(engine.slices, n_done, dirty, strict=True):
            last = piece.last_position(sequence.number)
            assert last >= n - 1 if may_be_more else last == n - 1
    stats = engine.stats
    assert stats.submitted == stats.finished + stats.failed + stats.cancelled
    assert stats.published == sum(stats.by_depth.values())
