"""Draft sources: whatever can guess the next token before the model's last layer has spoken.

A source is asked at boundaries. Boundary 0 stands before the first slice: there it knows the text so far and, if the
engine was given it, the last layer's state of the token before (n-gram look-up, a feature head). Boundary i ≥ 1
stands after slice i - 1: there it knows the newest token's hidden state, and, if it wants them, the logits of the
model's own output head on it (the plain logit lens). One loop, the engine's, verifies or publishes every guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import UsageError
from .signals import cosine, signals_of, uncertainty
from .types import Floats, Signals, TokenIds


@dataclass(frozen=True, slots=True)
class BoundaryView:
    """What a source may look at; arrays are views that do not outlive the call."""

    boundary: int  # 0: before the first slice; i: after slice i - 1
    tokens: Sequence[int]  # the text so far, drafts included; the guess is for the token after these
    hidden: Floats | None  # (n_embd,) float32; at boundary 0 the last layer's state of the token before the newest
    logits: Floats | None  # (n_vocab,) float32 of the shared output head, if the source wants them


@dataclass(frozen=True, slots=True)
class Guess:
    """A next-token distribution and how sure it is."""

    logits: Floats  # (n,) float32
    signals: Signals
    uncertainty: float  # by the signal that decides: lower is surer, NaN never sure enough
    ids: TokenIds | None = None  # (n,) int32: the tokens the logits are of; None: the whole vocabulary


class DraftSource(Protocol):
    """The one interface behind which boundary heads, feature heads and n-grams stand."""

    wants_logits: bool
    """True: the slice before a boundary runs the model's output head on the newest token."""

    wants_states: bool
    """True: `observe` and `forget` are called; decided once."""

    def speaks_at(self, boundary: int) -> bool:
        """Whether `guess` is worth calling at a boundary; decided once."""

    def guess(self, view: BoundaryView) -> Guess | None:
        """A guess for the token after `view.tokens`, or None."""

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        """States (n, n_embd) of positions first_pos… have come to a boundary ≥ 1 at which this source speaks.

        All that pass are shown, a prompt's too, each once and in order of position, the newest before `guess` is asked
        about it; positions follow on those shown before at that boundary and not forgotten. Views: they do not outlive
        the call.
        """

    def forget(self, length: int) -> None:
        """Positions `length` and later are gone, at every boundary."""


class SharedHead:
    """The plain logit lens: the model's own final norm and output head on a boundary's hidden state.

    Useless on most stock models, right for checkpoints trained for it (LayerSkip, arXiv 2404.16710). It costs a full
    output head per boundary.
    """

    wants_logits = True

    def __init__(self, signal: str = "entropy", gates: Sequence[Callable[[Signals], float]] = ()) -> None:
        """`signal` decides; `gates` give, for boundaries 1, 2, …, the probability that full depth disagrees.

        Raises UsageError for a signal that is not there.
        """
        if signal == "clusters" or (signal == "gate" and not gates):
            raise UsageError(
                f"the signal '{signal}' needs an exit pack's heads"
                + (", or one made with `edge-run calibrate --head shared`" if signal == "gate" else ""),
                "give a pack with --pack, or another --signal: entropy, top1, margin or stability",
            )
        self._signal = signal
        self._gates = gates if signal == "gate" else ()
        self.wants_states = signal in ("stability", "gate")
        self._newest: dict[int, tuple[int, Floats]] = {}  # boundary → (position, state) of the newest that passed

    def speaks_at(self, boundary: int) -> bool:
        return boundary >= 1

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        self._newest[boundary] = first_pos + len(states) - 1, states[-1].copy()

    def forget(self, length: int) -> None:
        pass  # a position's state is shown again before it is asked about

    def guess(self, view: BoundaryView) -> Guess | None:
        if view.logits is None:
            return None
        signals = signals_of(view.logits)
        before = self._newest.get(view.boundary - 1)
        if before is not None and view.hidden is not None and before[0] == len(view.tokens) - 1:
            signals = replace(signals, stability=cosine(before[1], view.hidden))
        if self._gates:
            signals = replace(signals, gate=self._gates[view.boundary - 1](signals))
        return Guess(view.logits, signals, uncertainty(signals, self._signal))
