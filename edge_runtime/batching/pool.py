"""Which conversation gets which sequence of the KV cache: what is kept, shared, copied and given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..prefix import common_prefix

# A beginning of so many tokens is sooner copied than computed, and an end of fewer is no loss to anybody
WORTH_KEEPING = 32


@dataclass(slots=True, eq=False)
class KvSequence:
    """One sequence of the KV cache, as far as it is known to be right."""

    number: int
    held: list[int] = field(default_factory=list)  # tokens whose keys and values it surely holds, from position 0
    dirty: bool = False  # it may hold positions behind them, to be removed before it is used
    busy: bool = False
    last_used: int = 0

    def keep(self, length: int) -> None:
        """Know of no more than the first `length` tokens."""
        if length < len(self.held):
            self.dirty = True
            del self.held[length:]


@dataclass(frozen=True, slots=True)
class Place:
    """A sequence for a prompt, of which the first `n_shared` tokens are there: its own, or those of `source`."""

    sequence: KvSequence
    n_shared: int
    source: KvSequence | None = None  # copy from here first
    evicted: bool = False  # another conversation is given up for it


class SequencePool:
    """`n_sequences` sequences; those that are not busy keep the conversation they had."""

    def __init__(self, n_sequences: int) -> None:
        self.sequences = [KvSequence(number) for number in range(n_sequences)]
        self._n_uses = 0

    @property
    def n_free(self) -> int:
        return sum(not s.busy for s in self.sequences)

    def find(self, prompt: Sequence[int]) -> Place | None:
        """The best place for a prompt, nothing changed yet; None if all sequences are busy.

        The sequence that shares the longest beginning with the prompt is used again where it is idle and loses little.
        Else that beginning is copied, to an empty sequence or the idle one that was not used for the longest time. The
        prompt's last token is never shared: its logits come from running it.
        """
        idle = [s for s in self.sequences if not s.busy]
        if not idle:
            return None
        shared = {s.number: common_prefix(s.held, prompt[:-1]) for s in self.sequences}

        def loses(sequence: KvSequence) -> int:
            return len(sequence.held) - shared[sequence.number]

        best = max(self.sequences, key=lambda s: (shared[s.number], not s.busy, -loses(s)))
        n_best = shared[best.number]
        if n_best and not best.busy and loses(best) < min(n_best, WORTH_KEEPING):
            return Place(best, n_best)
        others = [s for s in idle if s is not best or n_best < WORTH_KEEPING]
        target = min(others or idle, key=lambda s: (bool(s.held), s.last_used, s.number))
        n_own = shared[target.number]
        evicted = loses(target) >= WORTH_KEEPING
        if target is not best and n_best - n_own >= WORTH_KEEPING:
            return Place(target, n_best, best, evicted)
        return Place(target, n_own, evicted=evicted)

    def take(self, sequence: KvSequence) -> None:
        sequence.busy = True

    def release(self, sequence: KvSequence) -> None:
        """The sequence is idle from now on, and keeps what it holds."""
        self._n_uses += 1
        sequence.last_used = self._n_uses
        sequence.busy = False
