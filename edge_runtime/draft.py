"""Draft sources: whatever can guess the next token before the model's last layer has spoken.

A source is asked at boundaries. Boundary 0 stands before the first slice: there it knows the text so far and, if the
engine was given it, the last layer's state of the token before (n-gram look-up, a feature head). Boundary i ≥ 1
stands after slice i - 1: there it knows the newest token's hidden state, and, if it wants them, the logits of the
model's own output head on it (the plain logit lens). One loop, the engine's, verifies or publishes every guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .signals import signals_of
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
    ids: TokenIds | None = None  # (n,) int32: the tokens the logits are of; None: the whole vocabulary


class DraftSource(Protocol):
    """The one interface behind which boundary heads, feature heads and n-grams stand."""

    wants_logits: bool
    """True: the slice before a boundary runs the model's output head on the newest token."""

    def speaks_at(self, boundary: int) -> bool:
        """Whether `guess` is worth calling at a boundary; decided once."""

    def guess(self, view: BoundaryView) -> Guess | None:
        """A guess for the token after `view.tokens`, or None."""


class SharedHead:
    """The plain logit lens: the model's own final norm and output head on a boundary's hidden state.

    Useless on most stock models, right for checkpoints trained for it (LayerSkip, arXiv 2404.16710). It costs a full
    output head per boundary.
    """

    wants_logits = True

    def speaks_at(self, boundary: int) -> bool:
        return boundary >= 1

    def guess(self, view: BoundaryView) -> Guess | None:
        if view.logits is None:
            return None
        return Guess(view.logits, signals_of(view.logits))
