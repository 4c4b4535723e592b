"""The loop: draft → settle → publish or verify. Tokens inside, text outside.

    tokens ──► S0 ──h──► S1 ──h──► … ──► Sm ──► logits
          │         │         │
          b0        b1        b2        boundaries, where a draft source may guess the next token

Slice i has processed the first `n_done[i]` positions, and n_done[0] ≥ n_done[1] ≥ …: what slice i has not seen yet
waits at boundary i, as tokens at boundary 0 and as hidden states at the others. A token that exits at a boundary
simply stays waiting there. The next token that needs depth takes all waiting states with it, one batch per slice, so
that every KV cache is exact for the text so far.

A source that follows the text (a head with a KV cache of its own) is shown every state that passes a boundary at which
it speaks: those of the first n_done[i - 1] positions at boundary i, each once, in order, and told which are gone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .draft import BoundaryView, DraftSource, Guess
from .errors import PromptError, UsageError
from .sampling import Sampler, is_close_second
from .slices import Slice
from .types import Audit, EngineSettings, EngineStats, Floats, Mode, Signals, Step, Thresholds


@dataclass(frozen=True, slots=True)
class _Exit:
    """A guess that was taken: its token is the one at `position`."""

    position: int
    token: int
    layer: int
    top: int  # the head's likeliest token, what an audit compares
    signals: tuple[tuple[int, Signals], ...]
    draw: float  # from 0 to 1: audited if below the rate that is in force when full depth is known


class WaitingStates:
    """Hidden states of consecutive positions, first in, first out."""

    def __init__(self, capacity: int, n_embd: int) -> None:
        self._rows: Floats = np.empty((capacity, n_embd), np.float32)
        self._first = self._end = 0

    def __len__(self) -> int:
        return self._end - self._first

    def push(self, rows: Floats) -> None:
        if self._first == self._end:
            self._first = self._end = 0
        self._rows[self._end : self._end + len(rows)] = rows
        self._end += len(rows)

    def oldest(self, count: int) -> Floats:
        """The oldest `count` states (count, n_embd), contiguous; a view."""
        return self._rows[self._first : self._first + count]

    def newest(self) -> Floats:
        """The newest state (n_embd,); a view."""
        state: Floats = self._rows[self._end - 1]
        return state

    def drop_oldest(self, count: int) -> None:
        self._first += count

    def drop_newest(self, count: int) -> None:
        self._end -= count


class Engine:
    """Runs one sequence through `slices`. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        slices: Sequence[Slice],
        sampler: Sampler,
        settings: EngineSettings,
        thresholds: Callable[[], Thresholds],
        source: DraftSource | None = None,
        *,
        n_ctx: int | None = None,
    ) -> None:
        """`thresholds` is called once per token and gives one bound per boundary between the slices.

        Raises UsageError unless the last slice gives `settings.cap + 1` rows of logits, as verifying and auditing need.
        """
        self.slices = list(slices)
        self.sampler = sampler
        self.settings = settings
        self.stats = EngineStats()
        self.tokens: list[int] = []  # prompt and published tokens; read only, see extend and rollback
        self.n_ctx = min(n_ctx or self.slices[0].n_ctx, self.slices[0].n_ctx)
        self._source = source
        self._wants_logits = source is not None and source.wants_logits
        self._thresholds = thresholds
        self._last = len(self.slices) - 1
        self._n_layer = self.slices[-1].end
        self._n_batch = self.slices[0].n_batch
        n = len(self.slices)
        self._routes = {
            (b, stop): self.slices[b].route_to(self.slices[b + 1 : stop])
            for b in range(n)
            for stop in range(b + 2, n + 1)
        }
        self._n_done = [0] * n
        # [0] stays empty: what waits there are tokens
        self._waiting = [WaitingStates(self._n_batch + settings.cap + 1, s.n_embd) for s in self.slices]
        self._asked: tuple[tuple[int, Signals], ...] = ()  # signals seen on the newest token's way down
        self._unaudited: list[_Exit] = []
        self._audits: list[Audit] = []
        self._last_state: tuple[int, Floats] | None = None  # the last layer's state of the newest settled position
        self._audit_rate = settings.audit_rate
        self._random = random.Random(settings.audit_seed)
        self._speaks = [source is not None and settings.mode is not Mode.FULL and source.speaks_at(b) for b in range(n)]
        self._follower = source if source is not None and source.wants_states and any(self._speaks[1:]) else None
        self._followed = [*(self._follower is not None and speaks for speaks in self._speaks), False]
        if settings.mode is not Mode.FULL and self.slices[-1].n_outputs_max <= settings.cap:
            raise UsageError(
                f"the last slice gives {self.slices[-1].n_outputs_max} rows of logits, "
                f"a cap of {settings.cap} needs {settings.cap + 1}"
            )

    # ── the text ────────────────────────────────────────────────────────────────────────────────────────────────────

    def extend(self, tokens: Sequence[int]) -> None:
        """Add prompt tokens; the next step computes them. Raises PromptError if they do not fit the context."""
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise PromptError(
                f"the prompt makes the text {len(self.tokens) + len(tokens)} tokens long, "
                f"the context holds {self.n_ctx}",
                "shorten it, or give a larger --ctx",
            )
        self.tokens.extend(tokens)
        for token in tokens:
            self.sampler.accept(token)

    def adopt(self, other: Engine) -> None:
        """Go on where another engine with the same sampler stopped; the next step computes all of its text."""
        self.tokens, self.stats, self._audits = list(other.tokens), other.stats, other._audits
        self.sampler.rewind(self.tokens)

    def restore(self, tokens: Sequence[int]) -> None:
        """Take `tokens` for the text of an empty engine whose slices were given their states from outside."""
        self.extend(tokens)
        self._n_done = [len(tokens)] * len(self.slices)
        for piece in self.slices:
            piece.remove(len(tokens))  # what was computed behind the text

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens, in every slice. Raises UsageError if it is negative."""
        if length < 0:
            raise UsageError(f"a text cannot be rolled back to {length} tokens")
        if length < len(self.tokens):
            del self.tokens[length:]
            self.sampler.rewind(self.tokens)
        self._forget(length)
        self._unaudited = [e for e in self._unaudited if e.position < length]
        self._last_state = None

    @property
    def audit_rate(self) -> float:
        """Share of exits compared with full depth; may be changed between tokens, for exits that still wait, too.

        Raises UsageError, when set, for what is no share.
        """
        return self._audit_rate

    @audit_rate.setter
    def audit_rate(self, rate: float) -> None:
        self._audit_rate = replace(self.settings, audit_rate=rate).audit_rate

    @property
    def n_computed(self) -> int:
        """How many tokens of the text have been through the first slice: what a longer text need not run again."""
        return self._n_done[0]

    def reset(self) -> None:
        """Start over: no text, fresh counts, random numbers from the seed."""
        self.rollback(0)
        self._audits.clear()
        self._random.seed(self.settings.audit_seed)
        self.sampler.reset()
        self.stats = EngineStats()

    def settle(self) -> Floats:
        """Bring every token of the text to full depth; the logits (n_vocab,) that follow it, valid until the next step.

        Raises PromptError without a text.
        """
        self._need_text()
        try:
            self._recompute_newest()
            self._compute_long_prompt()
            return self._settled_logits()
        except BaseException:
            self._recover(len(self.tokens))
            raise

    def generate(self, max_tokens: int) -> Generator[Step, None, None]:
        """Publish up to `max_tokens` tokens, fewer if the context is full.

        Wherever the caller stops iterating, and whatever interrupts it, the text ends with the last token handed out
        and can be continued. Raises PromptError without a text, DecodeError if llama.cpp fails.
        """
        self._need_text()
        n_text = len(self.tokens)
        stop = min(n_text + max_tokens, self.n_ctx)
        consistent = True
        try:
            while n_text < stop:
                consistent = False
                for step in self._next_steps():
                    n_text += 1
                    self._count(step)
                    consistent = True
                    yield step
                    if n_text == stop:
                        return
                    consistent = False
        finally:
            if consistent:
                self._forget(n_text)
            else:
                self._recover(n_text)

    # ── draft → settle → publish | verify ───────────────────────────────────────────────────────────────────────────

    def _next_steps(self) -> Iterator[Step]:
        """Publish one token or, where drafts are verified, all that one settle confirms."""
        self._recompute_newest()
        self._compute_long_prompt()
        if self.settings.mode.verifies:
            yield from self._verify(self._draft())
            return
        exit_ = self._descend()
        yield self._publish_exit(exit_) if exit_ else self._publish_full(self._settled_logits())

    def _draft(self) -> list[_Exit]:
        """Draft until a token needs depth; the drafts are the last tokens of the text for as long as this lasts."""
        drafts: list[_Exit] = []
        self.sampler.begin_draft()
        while (exit_ := self._descend()) is not None:
            drafts.append(exit_)
            self.tokens.append(exit_.token)
        return drafts

    def _descend(self) -> _Exit | None:
        """Take the newest token from boundary to boundary until it exits; None if it goes all the way."""
        limits = self._limits()
        asked: list[tuple[int, Signals]] = []
        for b, limit in enumerate(limits):
            if limit > 0:
                guess = self._ask(b)
                if guess is not None:
                    asked.append((self.slices[b].start, guess.signals))
                    if guess.uncertainty < limit:
                        return self._take(b, guess, tuple(asked))
        self._asked = tuple(asked)
        return None

    def _limits(self) -> list[float]:
        """The uncertainty below which the newest token may exit, by boundary; 0 where it must not."""
        limits = [0.0] * len(self.slices)
        if self.settings.mode is Mode.FULL:
            return limits
        exit_below = self._thresholds().exit_below
        if len(exit_below) != self._last:
            raise UsageError(f"{len(exit_below)} thresholds were given for {self._last} boundaries")
        n_waiting = len(self.tokens) - 1 - self._n_done[-1]
        if n_waiting >= self.settings.cap or len(self.tokens) >= self.n_ctx:
            return limits  # a forced settle
        # before the first slice only verification makes a guess safe
        limits[0] = math.inf if self._speaks[0] and self.settings.mode.verifies else 0.0
        for b, limit in enumerate(exit_below, start=1):
            limits[b] = limit if self._speaks[b] else 0.0
        return limits

    def _ask(self, b: int) -> Guess | None:
        """Bring the newest token to boundary b; the source's guess, made there, for the token after it."""
        assert self._source is not None
        hidden, logits = None, None
        if b > 0:
            rows = self._run(0, b, (len(self.tokens) - 1,) if self._wants_logits else ())
            logits = rows[0][0] if rows else None
            hidden = self._waiting[b].newest()
        elif self._last_state is not None and self._last_state[0] == len(self.tokens) - 2:
            hidden = self._last_state[1]  # there is none where the token before is itself a draft
        return self._source.guess(BoundaryView(b, self.tokens, hidden, logits))

    def _take(self, b: int, guess: Guess, asked: tuple[tuple[int, Signals], ...]) -> _Exit:
        choose = self.sampler.draft if self.settings.mode.verifies else self.sampler.sample
        best = int(guess.logits.argmax())
        return _Exit(
            position=len(self.tokens),
            token=choose(guess.logits, guess.ids),
            layer=self.slices[b].start,
            top=best if guess.ids is None else int(guess.ids[best]),
            signals=asked,
            draw=self._random.random(),
        )

    def _publish_exit(self, exit_: _Exit) -> Step:
        self._publish(exit_.token)
        self._unaudited.append(exit_)
        return Step(exit_.token, exit_.position, exit_.layer, exit_.layer, exit_.signals, audits=self._new_audits())

    def _publish_full(self, logits: Floats) -> Step:
        position = len(self.tokens)
        token = self.sampler.sample(logits)
        self._publish(token)
        return Step(token, position, self._n_layer, signals=self._asked, audits=self._new_audits())

    def _verify(self, drafts: Sequence[_Exit]) -> Iterator[Step]:
        """Settle the newest published token and its drafts; publish what full depth agrees with, and its own next.

        In mode margin it also agrees where it is undecided between its own choice and the draft.
        """
        n_published = len(self.tokens) - len(drafts)
        rows = self._run(0, len(self.slices), range(n_published - 1, len(self.tokens)))
        del self.tokens[n_published:]
        for i, (logits, state) in enumerate(rows):
            self._last_state = None if state is None else (n_published - 1 + i, state)
            token = self.sampler.sample(logits)
            draft = drafts[i] if i < len(drafts) else None
            relaxed = draft is not None and draft.token != token and self._is_undecided(logits, draft.token)
            accepted = draft is not None and (relaxed or draft.token == token)
            if draft is not None and relaxed:
                token = draft.token
            if not accepted:
                self._forget(n_published + i)
                self.stats.drafted += max(0, len(drafts) - i - 1)  # drafted behind a refused draft, in vain
            self._publish(token)
            yield Step(
                token=token,
                position=n_published + i,
                depth=self._n_layer,
                boundary=draft.layer if draft is not None and accepted else None,
                signals=self._asked if draft is None else draft.signals,
                drafted=draft is not None,
                accepted=accepted,
                relaxed=relaxed,
                corrected=draft is not None and not accepted,
                audits=self._new_audits(),
            )
            if not accepted:
                return

    def _is_undecided(self, logits: Floats, draft: int) -> bool:
        return self.settings.mode is Mode.MARGIN and is_close_second(logits, draft, self.settings.theta)

    # ── slices, and what waits between them ─────────────────────────────────────────────────────────────────────────

    def _run(self, b: int, stop: int, positions: Sequence[int]) -> list[tuple[Floats, Floats | None]]:
        """Run all that waits at boundaries b … stop - 1 through the slices between, up to boundary `stop`.

        Returns (logits, last layer's state if the last slice gives it) of slice stop - 1 for `positions`, in order;
        they live until that slice's next decode.
        """
        for c in range(b + 1, stop):
            if len(self._waiting[c]):  # these come first, so the states that arrive must queue behind them
                self._run(b, c, ())
                return self._run(c, stop, positions)
        final = self.slices[stop - 1]
        found: list[tuple[Floats, Floats | None]] = []
        for start, count, newest in self._batches(b):
            rows = [p - start for p in positions if start <= p < start + count]
            self._decode(b, stop, start, count, rows)
            states = None
            if stop <= self._last:
                self._waiting[stop].push(final.hidden(count))
            else:
                self.stats.settles += 1
                self.stats.settled_rows += count
                states = final.hidden(len(rows)).copy() if final.has_hidden else None
            for i, row in enumerate(rows):
                logits = final.logits(row) if newest else final.logits(row).copy()
                found.append((logits, None if states is None else states[i]))
        return found

    def _batches(self, b: int) -> Iterator[tuple[int, int, bool]]:
        """Cut what waits at boundary b into batches: (first position, count, whether it holds the newest token)."""
        stop = len(self.tokens) if b == 0 else self._n_done[b - 1]
        while (start := self._n_done[b]) < stop:
            count = min(self._n_batch, stop - start)
            yield start, count, start + count == stop

    def _decode(self, b: int, stop: int, start: int, count: int, want: Sequence[int]) -> None:
        """One batch through slices b … stop - 1."""
        route = self._routes.get((b, stop))
        if b == 0:
            self.slices[0].decode_tokens(self.tokens[start : start + count], start, want, route=route)
        else:
            self.slices[b].decode_states(self._waiting[b].oldest(count), start, want, route=route)
            self._waiting[b].drop_oldest(count)
        for c in range(b, stop):
            self._n_done[c] += count
            if self._followed[c + 1]:
                assert self._follower is not None
                # a batch that went through several slices has left each one's states there
                self._follower.observe(c + 1, start, self.slices[c].hidden(count))

    def _settled_logits(self) -> Floats:
        """Bring all to full depth: the logits after the newest token; exits due for an audit are judged on the way."""
        newest = len(self.tokens) - 1
        # the row that predicts position p is that of the token before it; the newest token's comes last
        due = self._due()
        positions = [e.position - 1 for e in due] + [newest]
        rows = self._run(0, len(self.slices), positions)
        self._audit(due, [logits for logits, _ in rows])
        logits, state = rows[-1]
        self._last_state = None if state is None else (newest, state)
        return logits

    def _due(self) -> list[_Exit]:
        """The exits to audit now that full depth runs: which ones was drawn before anything was known of them."""
        return [e for e in self._unaudited if e.draw < self._audit_rate]

    def _audit(self, due: Sequence[_Exit], logits: Sequence[Floats]) -> None:
        """Compare the exits `due` with full depth's `logits`, those of the tokens before them, in order."""
        for e, row in zip(due, logits, strict=False):
            self._audits.append(Audit(e.position, e.layer, int(row.argmax()) == e.top))
        self._unaudited.clear()

    def _compute_long_prompt(self) -> None:
        """Bring all but the last batch of a long prompt to full depth, batch by batch, so that few states ever wait."""
        text = self.tokens
        while len(text) - self._n_done[0] > self._n_batch:
            self.tokens = text[: self._n_done[0] + self._n_batch]
            try:
                due = self._due()
                rows = self._run(0, len(self.slices), [e.position - 1 for e in due])
                self._audit(due, [logits for logits, _ in rows])
            finally:
                self.tokens = text

    # ── bookkeeping ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _publish(self, token: int) -> None:
        self.sampler.accept(token)
        self.tokens.append(token)

    def _new_audits(self) -> tuple[Audit, ...]:
        audits = tuple(self._audits)
        self._audits.clear()
        return audits

    def _need_text(self) -> None:
        if not self.tokens:
            raise PromptError("there is no text to continue", "give at least one token")

    def _recompute_newest(self) -> None:
        """The newest token's logits come from running it: forget it where it was run before."""
        if self._n_done[0] >= len(self.tokens):
            self._forget(len(self.tokens) - 1)

    def _forget(self, length: int) -> None:
        """Keep at most the first `length` positions in every slice and waiting list."""
        if self._follower is not None and self._n_done[0] > length:
            self._follower.forget(length)
        for b, piece in enumerate(self.slices):
            if self._n_done[b] > length:
                piece.remove(length)
            self._n_done[b] = min(self._n_done[b], length)
            if b > 0:
                kept = self._n_done[b - 1] - self._n_done[b]
                self._waiting[b].drop_newest(len(self._waiting[b]) - kept)

    def _recover(self, length: int) -> None:
        """After an interruption anywhere: back to what every slice surely holds of the first `length` tokens."""
        del self.tokens[length:]
        self.sampler.rewind(self.tokens)
        settled = min(self._n_done[-1], length)
        if self._follower is not None:
            self._follower.forget(settled)
        for b, piece in enumerate(self.slices):
            piece.remove(settled)
            self._n_done[b] = settled
            self._waiting[b].drop_newest(len(self._waiting[b]))
        self._unaudited.clear()

    def _count(self, step: Step) -> None:
        stats = self.stats
        stats.published += 1
        stats.exits += step.boundary is not None
        stats.by_depth[step.depth] = stats.by_depth.get(step.depth, 0) + 1
        stats.drafted += step.drafted
        stats.accepted += step.accepted
        stats.relaxed += step.relaxed
        stats.audited += len(step.audits)
        stats.disagreed += sum(not a.agreed for a in step.audits)
