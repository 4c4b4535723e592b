"""What guesses at the boundaries of several conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..draft import BoundaryView, DraftSource, Guess
from ..types import Floats


class DraftSources(Protocol):
    """As DraftSource, for the sequences of a KV cache. `exits.source.BatchHeads` is one."""

    n_sequences: int

    wants_logits: bool
    """True: the slice before a boundary runs the model's output head on the newest tokens."""

    wants_states: bool
    """True: `observe`, `forget` and `copy` are called; decided once."""

    def speaks_at(self, boundary: int) -> bool:
        """Whether `guesses` is worth calling at a boundary; decided once."""

    def guesses(self, asked: Sequence[tuple[int, BoundaryView]]) -> Sequence[Guess | None]:
        """For each (sequence, view), all at one boundary and in order of the sequences, a guess or None."""

    def observe(self, sequence: int, boundary: int, first_pos: int, states: Floats) -> None:
        """As of a DraftSource; positions are those of the sequence."""

    def forget(self, sequence: int, length: int) -> None:
        """Positions `length` and later of a sequence are gone, at every boundary."""

    def copy(self, source: int, target: int) -> None:
        """A sequence has got all that another one holds."""

    def set_threads(self, n_threads: int) -> None: ...


class OwnSources:
    """A draft source of its own for each sequence, of a kind whose guess needs no state but the newest token's: the
    plain logit lens does not, and a head with a KV cache does."""

    def __init__(self, make: Callable[[], DraftSource], n_sequences: int) -> None:
        self.n_sequences = n_sequences
        self._sources = [make() for _ in range(n_sequences)]
        self.wants_logits, self.wants_states = self._sources[0].wants_logits, self._sources[0].wants_states

    def speaks_at(self, boundary: int) -> bool:
        return self._sources[0].speaks_at(boundary)

    def guesses(self, asked: Sequence[tuple[int, BoundaryView]]) -> list[Guess | None]:
        return [self._sources[sequence].guess(view) for sequence, view in asked]

    def observe(self, sequence: int, boundary: int, first_pos: int, states: Floats) -> None:
        self._sources[sequence].observe(boundary, first_pos, states)

    def forget(self, sequence: int, length: int) -> None:
        self._sources[sequence].forget(length)

    def copy(self, source: int, target: int) -> None:
        pass

    def set_threads(self, n_threads: int) -> None:
        pass
