"""How far a sequence has come in each slice, and what waits of it between them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine import WaitingStates
from ..slices import Slice
from ..types import Audit, Floats


@dataclass(frozen=True, slots=True)
class Exit:
    """A token that was published early."""

    position: int
    layer: int
    top: int  # the guess's likeliest token, what an audit compares
    draw: float  # from 0 to 1: audited if below the rate that is in force when full depth is known

    def audit(self, logits: Floats) -> Audit:
        """Compare it with full depth's logits (n_vocab,) for its position."""
        return Audit(self.position, self.layer, int(logits.argmax()) == self.top)


class Flow:
    """One sequence: slice i surely holds its first `n_done[i]` positions, and n_done[0] ≥ n_done[1] ≥ ….

    States of positions that slice i - 1 has done and slice i has not wait at boundary i, as in `Engine`.
    """

    def __init__(self, slices: Sequence[Slice], capacity: int) -> None:
        """At most `capacity` states wait at a boundary."""
        self.n_done = [0] * len(slices)
        self.dirty = [False] * len(slices)  # slice i may hold positions behind n_done[i], to be removed before a batch
        self.waiting = [WaitingStates(capacity, piece.n_embd) for piece in slices]  # the first stays empty
        self.moving = False  # a batch with it is under way, or was interrupted: there may be more than is known
        self.begin(0, 0, 0)

    def go_back(self, length: int) -> None:
        """Know of no more than the first `length` positions, which every slice holds."""
        for b, waiting in enumerate(self.waiting):
            self.n_done[b] = length
            self.dirty[b] = True
            waiting.drop_newest(len(waiting))
        self.moving = False

    def begin(self, length: int, settled: int, seed: int) -> None:
        """A request begins with the first `length` positions; what `settled` means, see there."""
        self.go_back(length)
        # alone in an Engine with an empty cache, so many positions would be at full depth: what the cap counts from
        self.settled = settled
        self.exits: list[Exit] = []  # not yet audited
        self.random = random.Random(seed)


def settled_alone(n_prompt: int, n_batch: int) -> int:
    """Positions that an Engine brings to full depth before a prompt's last batch, whose newest token may exit."""
    return (n_prompt - 1) // n_batch * n_batch
