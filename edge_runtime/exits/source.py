"""The heads of a pack as a draft source: each follows the text at its boundary and guesses the token after it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
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


class _Follower:
    """One head, which has read the states of the first positions; those after them wait here.

    An interruption may come between a decode and its count. What is forgotten then begins at a position that was
    counted, and everything from there on is removed from the head's KV cache, counted or not.
    """

    def __init__(self, head: HeadContext, n_embd: int) -> None:
        self._head = head
        self._rows: Floats = np.empty((head.n_batch, n_embd), np.float32)
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
        self._head.decode(self._rows[: self._n_waiting], self._n_read, want)
        self._n_read += self._n_waiting
        self._n_waiting = 0

    def logits(self) -> Floats | None:
        """Logits (n_rows,) for the newest position, a view; None if it does not wait: it has been asked about."""
        row = self._n_waiting - 1
        if row < 0:
            return None
        self._read((row,))
        return self._head.logits(row)

    def set_threads(self, n_threads: int) -> None:
        self._head.set_threads(n_threads)

    def forget(self, length: int) -> None:
        self._n_waiting = max(0, min(self._n_waiting, length - self._n_read))
        self._n_read = min(self._n_read, length)
        self._head.forget(self._n_read)


class PackHeads:
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
    ) -> None:
        """`paths` of head files for the engine's boundaries behind `layers`, in order; see ExitPack for the rest.

        Without `askers`, heads are always asked.

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
        with ExitStack() as opened:
            self._heads: list[_Follower] = []
            for path, layer in zip(paths, layers, strict=True):
                head = opened.enter_context(HeadContext(path, n_ctx, n_threads, min(n_batch, n_ctx), kernels=kernels))
                if head.n_rows != self._other + 1:
                    raise PackError(
                        f"the head behind layer {layer} has {head.n_rows} rows, a shortlist of {self._other} tokens "
                        f"needs {self._other + 1}",
                        "make the pack again with `edge-run calibrate`",
                    )
                self._heads.append(_Follower(head, n_embd))
            self._opened = opened.pop_all()

    def speaks_at(self, boundary: int) -> bool:
        return 1 <= boundary <= len(self._heads)

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        self._heads[boundary - 1].push(states)

    def forget(self, length: int) -> None:
        for head in self._heads:
            head.forget(length)

    def guess(self, view: BoundaryView) -> Guess | None:
        """As DraftSource; None, too, where an exit is unlikely, or for a position that has been asked about before.

        Raises DecodeError.
        """
        index = view.boundary - 1
        if self._askers and view.hidden is not None and not self._askers[index].worth_asking(view.hidden):
            return None
        logits = self._heads[index].logits()
        if logits is None or int(logits.argmax()) == self._other:
            return None
        signals = signals_of(logits, self._starts, True)
        if index > 0 and view.hidden is not None:
            signals = replace(signals, stability=cosine(self._heads[index - 1].newest, view.hidden))
        if self._gates:
            signals = replace(signals, gate=self._gates[index].probability(signals))
        return Guess(logits[: self._other], signals, uncertainty(signals, self._signal), self._shortlist)

    def set_threads(self, n_threads: int) -> None:
        for head in self._heads:
            head.set_threads(n_threads)

    def close(self) -> None:
        self._opened.close()
