"""Early exits for several conversations: mode exit, batched at the slices they share.

    tokens of all ──► S0 ──► b1: who is sure publishes, and waits there ──► S1 ──► b2: … ──► Sm ──► the rest publishes
                              the others go on, with all that waits of theirs, in one batch

Each sequence has its own pace in each slice (flow.py). Every answer gets a token in each step; prompts go all the way,
and only a prompt's newest token may exit. Who exits depends on the thresholds and on the own text alone, never on the
company or on what the KV cache held: with the edge kernels every request gets the very tokens that `Engine` in mode
exit gives it from an empty cache, with as large batches.

A sequence that is free again holds what all slices hold. What waits is dropped: it is a few tokens at most, and
whether a further turn ever wants them nobody knows. Exits among them stay unaudited.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ..draft import BoundaryView, Guess
from ..errors import EdgeError, UsageError
from ..native import ContextOptions, Model
from ..native.interrupt import interrupt_deferred
from ..types import EngineSettings, Floats, Mode, Thresholds
from .conversations import Conversations, sequence_of
from .flow import Exit, Flow, settled_alone
from .plan import padded, prompt_shares
from .pool import KvSequence
from .request import Request, Token
from .sources import DraftSources


@dataclass(slots=True, eq=False)
class _Going:
    """A request on its way through the slices in one step."""

    request: Request
    flow: Flow
    stop: int  # positions of its text that are to be done
    exits: bool = False  # whether its newest token may leave early
    end: int = 0  # its rows of the latest batch end before this one
    due: list[Exit] = field(default_factory=list)  # exits to be audited in the last slice

    @property
    def number(self) -> int:
        return sequence_of(self.request).number

    def row_of(self, position: int) -> int:
        """Where a position stands in the latest batch."""
        return self.end - self.stop + position

    @property
    def whole(self) -> bool:
        """Whether the text's newest token is among the rows, so that another one follows."""
        return self.stop == len(self.request.tokens)


class ExitBatchEngine(Conversations):
    """Mode exit: who is sure enough at a boundary is published there, and settled later."""

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        boundaries: tuple[int, ...],
        thresholds: Callable[[], Thresholds],
        sources: DraftSources,
        settings: EngineSettings,
        *,
        costs: Sequence[float] = (1.0,),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open slices of `model` between `boundaries`; the context is shared out evenly among the conversations.

        `thresholds` is called once per step and gives one bound per boundary. `sources` guess for as many sequences as
        there are conversations, and are the caller's to close. Of `settings`, cap, audit_rate and audit_seed count.
        `costs` c(1), c(2), … of batches in batches of one decide on padding; they are read anew in each step. Raises
        UsageError, MemoryLimitError or LibraryError.
        """
        if settings.mode is not Mode.EXIT:
            raise UsageError(f"this engine runs mode exit, not {settings.mode.value}", "use BatchEngine for the others")
        if not costs:
            raise UsageError("nothing is known of what a batch costs", "give at least the cost of a batch of one, 1")
        self._settings, self._thresholds, self._costs = settings, thresholds, costs
        self._sources = sources
        n, n_rows = options.n_seq_max, settings.cap + 1
        if sources.n_sequences < n:
            raise UsageError(f"what guesses is for {sources.n_sequences} conversations, there are to be {n}")
        self._speaks = [b > 0 and sources.speaks_at(b) for b in range(len(boundaries) + 1)]
        self._limits()
        super().__init__(model, options, boundaries, n_rows, n * n_rows, clock)
        self._last = len(self.slices) - 1
        self._following = sources.wants_states and any(self._speaks)
        self._flows = [Flow(self.slices, min(self._n_batch, self.n_ctx)) for _ in range(n)]
        self._states: Floats = np.zeros((self._n_batch, self.slices[0].n_embd), np.float32)
        self._random = random.Random(settings.audit_seed)

    @property
    def audit_rate(self) -> float:
        """Share of exits compared with full depth; may be changed between steps, for exits that still wait, too.

        Raises UsageError, when set, for what is no share.
        """
        return self._settings.audit_rate

    @audit_rate.setter
    def audit_rate(self, rate: float) -> None:
        self._settings = replace(self._settings, audit_rate=rate)

    def set_threads(self, n_threads: int) -> None:
        super().set_threads(n_threads)
        self._sources.set_threads(n_threads)

    # ── a place for a request ───────────────────────────────────────────────────────────────────────────────────────

    def _copy_cache(self, source: int, target: int) -> None:
        self._flows[target].go_back(0)
        super()._copy_cache(source, target)
        if self._following:
            self._sources.copy(source, target)

    def _start(self, request: Request, sequence: KvSequence) -> None:
        length, settled = len(sequence.held), settled_alone(len(request.tokens), self._n_batch)
        self._flows[sequence.number].begin(length, settled, self._random.getrandbits(64))
        self._forget(sequence.number, length)
        super()._start(request, sequence)

    def _forget(self, number: int, length: int) -> None:
        if self._following:
            self._sources.forget(number, length)

    # ── slice by slice: decode → exit or go on → publish ────────────────────────────────────────────────────────────

    def _advance(self) -> None:
        limits = self._limits()
        self._run(self._plan(), limits)

    def _limits(self) -> list[float]:
        """The uncertainty below which a token may exit, by boundary; 0 where none must."""
        exit_below = self._thresholds().exit_below
        if len(exit_below) != len(self._speaks) - 1:
            raise UsageError(f"{len(exit_below)} thresholds were given for {len(self._speaks) - 1} boundaries")
        return [limit if speaks else 0.0 for limit, speaks in zip((0.0, *exit_below), self._speaks, strict=True)]

    def _plan(self) -> list[_Going]:
        """Who goes how far in this step, in the order of the sequences' numbers."""
        answers = [request for request in self._running if request.answer]
        prompts = [request for request in self._running if not request.answer]
        going = [self._going(request) for request in answers]
        room = self._n_batch - sum(request.n_due for request in answers)  # all that may wait of them comes along
        goals = [self._going(request) for request in prompts]
        shares = prompt_shares([g.stop - len(sequence_of(g.request).held) for g in goals], room)
        for g, share in zip(goals, shares, strict=True):
            g.stop = len(sequence_of(g.request).held) + share
        return sorted(going + goals, key=lambda g: g.number)

    def _going(self, request: Request) -> _Going:
        """All of a text; of a prompt whose newest token may exit, what comes before its last batch, while there is."""
        sequence = sequence_of(request)
        flow, n_text = self._flows[sequence.number], len(request.tokens)
        exits = request.question.exits and n_text - 1 - flow.settled < self._settings.cap
        stop = flow.settled if exits and len(sequence.held) < flow.settled else n_text
        return _Going(request, flow, stop, exits)

    def _run(self, going: list[_Going], limits: Sequence[float]) -> None:
        """Bring all of `going` on; if that fails, each that has not arrived alone, to see whose fault it is."""
        try:
            self._descend(going, limits)
        except EdgeError as error:
            if len(going) == 1:
                self._fail(going[0].request, error)
                return
            for g in going:
                self._run([g], limits)

    def _descend(self, going: list[_Going], limits: Sequence[float]) -> None:
        """Through all slices; who has arrived is taken out of `going`."""
        for g in going:
            if g.flow.moving:
                self._recover(g)
            g.flow.moving = True
        for b in range(self._last + 1):
            going[:] = [g for g in going if not g.request.ended]  # a callback of another may cancel it
            if not going:
                return
            self._decode(b, going, limits)
            if b < self._last:
                self._let_exit(b + 1, going, limits[b + 1])
        now = self._clock()
        with interrupt_deferred():
            while going:
                g = going.pop(0)
                self._guarded(g.request, partial(self._arrive, g, now))

    def _recover(self, g: _Going) -> None:
        """After an interruption or a failure: back to what every slice holds."""
        length = len(sequence_of(g.request).held)
        g.flow.go_back(length)
        self._forget(g.number, length)

    def _decode(self, b: int, going: Sequence[_Going], limits: Sequence[float]) -> None:
        """One batch through slice b: all that waits of those who are `going`, and padding where it saves a pass."""
        piece, by_number = self.slices[b], {g.number: g for g in going}
        shape = self._shape(b, going)
        tokens: list[int] = []
        positions: list[int] = []
        numbers: list[int] = []
        want: list[int] = []
        for number, width in shape.items():
            flow, g, row = self._flows[number], by_number.get(number), len(numbers)
            start = flow.n_done[b]
            if flow.dirty[b]:
                piece.remove(start, number)
            flow.dirty[b] = True
            if g is not None:
                g.end = row + g.stop - start
                want += self._wanted(b, g, limits)
                if b > 0:
                    self._states[row : g.end] = flow.waiting[b].oldest(g.stop - start)
            if b == 0:
                text = g.request.tokens[start : g.stop] if g is not None else []
                tokens += text + [0] * (width - len(text))
            positions += range(start, start + width)
            numbers += [number] * width
        if b == 0:
            piece.decode_tokens(tokens, 0, want, numbers, positions)
        else:
            piece.decode_states(self._states[: len(numbers)], 0, want, numbers, positions)
        self.stats.batches += 1
        self.stats.rows += len(numbers)
        self.stats.padding += len(numbers) - sum(g.stop - g.flow.n_done[b] for g in going)
        for g in going:
            self._count(b, g, shape[g.number])

    def _shape(self, b: int, going: Sequence[_Going]) -> dict[int, int]:
        """Rows of each sequence in a batch of slice b, in the order of their numbers."""
        rows = {g.number: g.stop - g.flow.n_done[b] for g in going}
        width = max((rows[g.number] for g in going if g.request.answer), default=1)

        def fits(number: int, n: int) -> bool:
            return self._flows[number].n_done[b] + n <= self.n_ctx

        return padded(rows, width, self._n_batch, self._costs, fits)

    def _wanted(self, b: int, g: _Going, limits: Sequence[float]) -> list[int]:
        """Rows of the batch that get logits: where a guess, an audit or a token comes from."""
        if b < self._last:
            asked = self._sources.wants_logits and g.exits and g.whole and limits[b + 1] > 0
            return [g.end - 1] if asked else []
        if not g.whole:
            return []
        g.due = [e for e in g.flow.exits if e.draw < self.audit_rate]
        return [*(g.row_of(e.position - 1) for e in g.due), g.end - 1]

    def _count(self, b: int, g: _Going, width: int) -> None:
        """The batch is computed: note it, and let its states wait at the next boundary."""
        flow, start = g.flow, g.flow.n_done[b]
        n = g.stop - start
        flow.n_done[b] = g.stop
        flow.dirty[b] = width > n
        if b > 0:
            flow.waiting[b].drop_oldest(n)
        if b < self._last:
            states = self.slices[b].hidden(g.end)[g.end - n :]
            flow.waiting[b + 1].push(states)
            if self._following and self._speaks[b + 1]:
                self._sources.observe(g.number, b + 1, start, states)

    def _let_exit(self, b: int, going: list[_Going], limit: float) -> None:
        """Ask about the newest tokens at boundary b; who is sure enough publishes, and waits."""
        asked = [g for g in going if g.exits and g.whole] if limit > 0 else []
        if not asked:
            return
        guesses = self._sources.guesses([(g.number, self._view(b, g)) for g in asked])
        now = self._clock()
        with interrupt_deferred():
            for g, guess in zip(asked, guesses, strict=True):
                if guess is not None and guess.uncertainty < limit:
                    going.remove(g)
                    self._guarded(g.request, partial(self._exit, g, b, guess, now))

    def _view(self, b: int, g: _Going) -> BoundaryView:
        logits = self.slices[b - 1].logits(g.row_of(g.stop - 1)) if self._sources.wants_logits else None
        return BoundaryView(b, g.request.tokens, g.flow.waiting[b].newest(), logits)

    def _exit(self, g: _Going, b: int, guess: Guess, now: float) -> None:
        request, layer, best = g.request, self.slices[b].start, int(guess.logits.argmax())
        assert request.sampler is not None
        token, position = request.sampler.sample(guess.logits, guess.ids), len(request.tokens)
        top = best if guess.ids is None else int(guess.ids[best])
        g.flow.exits.append(Exit(position, layer, top, g.flow.random.random()))
        g.flow.moving = False
        self._finish(request, self._publish(Token(request, token, position, layer, layer), now))

    def _arrive(self, g: _Going, now: float) -> None:
        """All of it is at full depth: note it, and publish what follows a whole text."""
        request, flow, held, last = g.request, g.flow, sequence_of(g.request).held, self.slices[-1]
        held += request.tokens[len(held) : g.stop]
        flow.moving = False
        if not g.whole:
            return
        flow.settled = g.stop
        audits = tuple(e.audit(last.logits(g.row_of(e.position - 1))) for e in g.due)
        flow.exits.clear()
        assert request.sampler is not None
        token = request.sampler.sample(last.logits(g.row_of(g.stop - 1)))
        event = Token(request, token, g.stop, self._n_layer, audits=audits)
        self._finish(request, self._publish(event, now))
