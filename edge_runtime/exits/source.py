"""The heads of a pack as a draft source: each follows the text at its boundary and guesses the token after it.

`PackHeads` follow one text; `BatchHeads` follow several, and those that are asked at a boundary go through its head in
one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..draft import BoundaryView, Guess
from ..errors import PackError, UsageError
from ..signals import cosine, signals_of, uncertainty
from ..types import SIGNALS, Floats, TokenIds
from .asking import Asker
from .gate import Gate
from .head import HeadContext

N_BATCH = 32
_TOGETHER = 8  # sequences of a batch at most, each with up to N_BATCH states


class _Follower:
    """A sequence of one head, which has read the states of the first positions; those after them wait here.

    An interruption may come between a decode and its count. What is forgotten then begins at a position that was
    counted, and everything from there on is removed from the head's KV cache, counted or not.
    """

    def __init__(self, head: HeadContext, n_embd: int, n_rows: int, sequence: int = 0) -> None:
        """At most `n_rows` states wait."""
        self._head, self._sequence = head, sequence
        self._rows: Floats = np.empty((n_rows, n_embd), np.float32)
        self._n_waiting = self._n_read = 0
        self.newest: Floats = self._rows[0]  # (n_embd,) state of the newest position; a view

    def push(self, states: Floats) -> None:
        """States (n, n_embd) of the next n positions; at least the newest waits."""
        while (room := len(self._rows) - self._n_waiting) < len(states):
            self._wait(states[:room])
            self._read(())
            states = states[room:]
        self._wait(states)

    def _wait(self, states: Floats) -> None:
        end = self._n_waiting + len(states)
        self._rows[self._n_waiting : end] = states
        self._n_waiting = end
        self.newest = self._rows[end - 1]

    def _read(self, want: Sequence[int]) -> None:
        sequences = [self._sequence] * self._n_waiting if self._sequence else None
        self._head.decode(self.waiting, self._n_read, want, sequences)
        self.count_read()

    @property
    def waiting(self) -> Floats:
        """The states (n, n_embd) that wait; a view."""
        return self._rows[: self._n_waiting]

    @property
    def positions(self) -> range:
        """Where those stand that wait."""
        return range(self._n_read, self._n_read + self._n_waiting)

    def count_read(self) -> None:
        """All that waited has been read."""
        self._n_read += self._n_waiting
        self._n_waiting = 0

    def logits(self) -> Floats | None:
        """Logits (n_rows,) for the newest position, a view; None if it does not wait: it has been asked about."""
        row = self._n_waiting - 1
        if row < 0:
            return None
        self._read((row,))
        return self._head.logits(row)

    def forget(self, length: int) -> None:
        self._n_waiting = max(0, min(self._n_waiting, length - self._n_read))
        self._n_read = min(self._n_read, length)
        self._head.forget(self._n_read, self._sequence)

    def become(self, other: _Follower) -> None:
        """Know what another sequence of the same head knows; this one is empty, or forgets what it knew."""
        self.forget(0)
        self._head.copy(other._sequence, self._sequence)
        self._n_read = other._n_read
        self._wait(other.waiting)


class _Heads:
    """One head per boundary; a head's guess is over the shortlist, and there is none where it expects another token.

    A head sees all states of its boundary at their positions. They wait until it is asked or a batch is full, so a
    long prompt and a settle cost it few calls.
    """

    wants_logits = False
    wants_states = True

    def __init__(
        self,
        paths: Sequence[Path],
        layers: Sequence[int],
        shortlist: TokenIds,
        cluster_starts: TokenIds,
        gates: Sequence[Gate] = (),
        signal: str = "entropy",
        askers: Sequence[Asker] = (),
        *,
        n_embd: int,
        n_ctx: int,
        n_threads: int,
        n_batch: int = N_BATCH,
        kernels: str = "stock",
        n_sequences: int = 1,
    ) -> None:
        """`paths` of head files for the engine's boundaries behind `layers`, in order; see ExitPack for the rest.

        Without `askers`, heads are always asked. Of each sequence, there are `n_ctx` positions and `n_batch` states
        that wait at most.

        Raises UsageError for a signal that is not there, PackError for a head that does not speak the shortlist, and
        what opening a head raises.
        """
        if signal not in SIGNALS:
            raise UsageError(f"there is no signal '{signal}'", f"there are {', '.join(SIGNALS)}")
        if signal == "gate" and len(gates) != len(paths):
            raise UsageError(f"{len(gates)} gates were given for {len(paths)} heads", "choose another --signal")
        self._shortlist, self._starts, self._signal = shortlist, cluster_starts, signal
        if len(askers) not in (0, len(paths)):
            raise UsageError(f"{len(askers)} askers were given for {len(paths)} heads")
        self._gates = gates if signal == "gate" else ()
        self._askers = askers
        self._other = len(shortlist)
        self.n_sequences = n_sequences
        n_rows = min(n_batch, n_ctx)
        self._together = min(n_sequences, _TOGETHER)
        with ExitStack() as opened:
            self._contexts: list[HeadContext] = []
            self._followers: list[list[_Follower]] = []  # by head, then by sequence
            for path, layer in zip(paths, layers, strict=True):
                head = opened.enter_context(
                    HeadContext(
                        path,
                        n_ctx,
                        n_threads,
                        n_rows * self._together,
                        n_outputs_max=self._together,
                        kernels=kernels,
                        n_sequences=n_sequences,
                    )
                )
                if head.n_rows != self._other + 1:
                    raise PackError(
                        f"the head behind layer {layer} has {head.n_rows} rows, a shortlist of {self._other} tokens "
                        f"needs {self._other + 1}",
                        "make the pack again with `edge-run calibrate`",
                    )
                self._contexts.append(head)
                self._followers.append([_Follower(head, n_embd, n_rows, number) for number in range(n_sequences)])
            self._opened = opened.pop_all()

    def speaks_at(self, boundary: int) -> bool:
        return 1 <= boundary <= len(self._contexts)

    def _worth_asking(self, view: BoundaryView) -> bool:
        if not self._askers or view.hidden is None:
            return True
        return self._askers[view.boundary - 1].worth_asking(view.hidden)

    def _guess_of(self, sequence: int, view: BoundaryView, logits: Floats) -> Guess | None:
        """What a head's logits (n_rows,) come to."""
        if int(logits.argmax()) == self._other:
            return None
        index = view.boundary - 1
        signals = signals_of(logits, self._starts, True)
        if index > 0 and view.hidden is not None:
            signals = replace(signals, stability=cosine(self._followers[index - 1][sequence].newest, view.hidden))
        if self._gates:
            signals = replace(signals, gate=self._gates[index].probability(signals))
        return Guess(logits[: self._other], signals, uncertainty(signals, self._signal), self._shortlist)

    def set_threads(self, n_threads: int) -> None:
        for head in self._contexts:
            head.set_threads(n_threads)

    def close(self) -> None:
        self._opened.close()


class PackHeads(_Heads):
    """Heads that follow one text."""

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        self._followers[boundary - 1][0].push(states)

    def forget(self, length: int) -> None:
        for followers in self._followers:
            followers[0].forget(length)

    def guess(self, view: BoundaryView) -> Guess | None:
        """As DraftSource; None, too, where an exit is unlikely, or for a position that has been asked about before.

        Raises DecodeError.
        """
        if not self._worth_asking(view):
            return None
        logits = self._followers[view.boundary - 1][0].logits()
        return None if logits is None else self._guess_of(0, view, logits)


class BatchHeads(_Heads):
    """Heads that follow `n_sequences` texts. With the edge kernels, guesses are those of PackHeads, bit for bit."""

    def observe(self, sequence: int, boundary: int, first_pos: int, states: Floats) -> None:
        """As DraftSource, of one sequence."""
        self._followers[boundary - 1][sequence].push(states)

    def forget(self, sequence: int, length: int) -> None:
        """Positions `length` and later of a sequence are gone, at every boundary."""
        for followers in self._followers:
            followers[sequence].forget(length)

    def copy(self, source: int, target: int) -> None:
        """Let a sequence know what another one does."""
        for followers in self._followers:
            followers[target].become(followers[source])

    def guesses(self, asked: Sequence[tuple[int, BoundaryView]]) -> list[Guess | None]:
        """For each (sequence, view), all at one boundary and in order of the sequences, what PackHeads would guess.

        Raises DecodeError.
        """
        found: list[Guess | None] = [None] * len(asked)
        due = []
        for i, (sequence, view) in enumerate(asked):
            follower = self._followers[view.boundary - 1][sequence]
            if len(follower.positions) and self._worth_asking(view):
                due.append((i, follower))
        for first in range(0, len(due), self._together):
            group = due[first : first + self._together]
            logits = self._read(asked[0][1].boundary - 1, [asked[i][0] for i, _ in group])
            for (i, _), row in zip(group, logits, strict=True):
                found[i] = self._guess_of(*asked[i], row)
        return found

    def _read(self, index: int, sequences: Sequence[int]) -> list[Floats]:
        """Let a head read all that waits of some sequences; copies of the logits (n_rows,) of each one's newest."""
        followers = [self._followers[index][sequence] for sequence in sequences]
        states = np.concatenate([follower.waiting for follower in followers])
        positions = [position for follower in followers for position in follower.positions]
        counts = [len(follower.positions) for follower in followers]
        want = [end - 1 for end in accumulate(counts)]
        rows = [sequence for sequence, count in zip(sequences, counts, strict=True) for _ in range(count)]
        head = self._contexts[index]
        head.decode(states, 0, want, rows, positions)
        for follower in followers:
            follower.count_read()
        return [head.logits(row).copy() for row in want]
