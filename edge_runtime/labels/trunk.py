"""The layers that messages share: hidden states of many short messages behind one instruction.

The instruction (the prefix) is computed once per slice and kept in sequence 0; each message is a sequence of its own
that shares those cells. Tokens of several messages fill batches of 32 rows: so few, because with flash attention
llama.cpp's sums for a row do not depend on the other rows up to that width, which makes a message's states the same
alone and in company, and because wider batches gain nothing (measured: 272 tokens/s in batches of 32, 305 in 128,
through all layers of SmolLM2-135M with two threads).

A slice is opened when the first message gets that far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from ..native import ContextOptions, Model
from ..slices import Slice
from ..types import Floats
from .prefix import PrefixStore

N_BATCH = 32


@dataclass(frozen=True, slots=True)
class TrunkOptions:
    """`n_tokens` and `n_messages` bound what is in flight at once."""

    n_tokens: int = 256
    n_messages: int = 4
    n_threads: int = 0  # 0: all physical cores


class Trunk:
    """Slices of `model` that end at `edges`, behind a common prefix. One group of messages at a time."""

    def __init__(
        self,
        model: Model,
        edges: tuple[int, ...],
        prefix: Sequence[int],
        options: TrunkOptions,
        store: PrefixStore | None = None,
    ) -> None:
        """`edges` are increasing layers, the last may be the model's last; `store` keeps the prefix over restarts."""
        self._model, self.edges, self._options, self._store = model, edges, options, store
        self._prefix = list(prefix)
        self._context = ContextOptions(
            n_ctx=len(prefix) + options.n_tokens + 1,
            n_batch=N_BATCH,
            n_seq_max=options.n_messages + 2,
            n_threads=options.n_threads,
            flash_attention=True,
        )
        self._slices: list[Slice] = []
        self._prefix_states: Floats | None = None  # (len(prefix), n_embd) behind the last open slice

    @property
    def n_open(self) -> int:
        """Slices opened so far."""
        return len(self._slices)

    @property
    def n_embd(self) -> int:
        return self._model.n_embd

    @property
    def options(self) -> TrunkOptions:
        return self._options

    def start(self, messages: Sequence[Sequence[int]]) -> Group:
        """Take in messages, tokens each; they have not been through any layer yet.

        Raises UsageError if they are too many or too long together, or one is empty.
        """
        if len(messages) > self._options.n_messages or sum(map(len, messages)) > self._options.n_tokens:
            limits = f"{self._options.n_messages} messages and {self._options.n_tokens} tokens"
            raise UsageError(f"{len(messages)} messages of {sum(map(len, messages))} tokens exceed {limits}")
        if not all(messages):
            raise UsageError("a message without tokens has no states")
        return Group(self, messages)

    def slice_at(self, index: int) -> Slice:
        """Slice `index`, opened with its prefix if need be."""
        while len(self._slices) <= index:
            self._open_next()
        return self._slices[index]

    def _open_next(self) -> None:
        index = len(self._slices)
        start = self.edges[index - 1] if index else 0
        last = self.edges[index] == self._model.n_layer
        opened = Slice(
            self._model,
            start,
            self.edges[index],
            self._context,
            n_outputs_max=N_BATCH if last else 1,
            want_hidden=last,
        )
        try:
            states = self._store.load(opened, self._prefix) if self._store else None
            if states is None:
                inputs = self._prefix if index == 0 else self._prefix_states
                assert inputs is not None
                states = run_rows(opened, inputs, [0] * len(self._prefix), range(len(self._prefix)))
                if self._store:
                    self._store.save(opened, self._prefix, states)
        except BaseException:
            opened.close()
            raise
        self._slices.append(opened)
        self._prefix_states = states

    @property
    def n_prefix(self) -> int:
        return len(self._prefix)

    def close(self) -> None:
        for item in self._slices:
            item.close()
        self._slices.clear()


class Group:
    """Messages on their way up: at `level` i they have been through the slices before edge i (0: none)."""

    def __init__(self, trunk: Trunk, messages: Sequence[Sequence[int]]) -> None:
        self._trunk = trunk
        self._messages = [list(message) for message in messages]
        self.members = list(range(len(messages)))
        self.level = 0
        self._states: Floats = np.empty((0, trunk.n_embd), np.float32)

    def advance(self) -> None:
        """Take all members through the next slice."""
        piece = self._trunk.slice_at(self.level)
        lengths = [len(self._messages[member]) for member in self.members]
        seq_ids = np.repeat([member + 1 for member in self.members], lengths)
        positions = np.concatenate([np.arange(length) for length in lengths]) + self._trunk.n_prefix
        inputs: Sequence[int] | Floats = self._states
        if self.level == 0:
            inputs = [token for member in self.members for token in self._messages[member]]
        try:
            for member in self.members:
                piece.copy_sequence(0, member + 1)
            if len(positions) == 1:
                # a row alone would be summed in another way: it goes with itself, in the sequence kept for that
                piece.copy_sequence(0, self._trunk.options.n_messages + 1)
                twice = np.repeat(inputs, 2, axis=0)
                both = [int(seq_ids[0]), self._trunk.options.n_messages + 1]
                inputs = twice if self.level else twice.tolist()
                self._states = run_rows(piece, inputs, both, positions.tolist() * 2)[:1]
            else:
                self._states = run_rows(piece, inputs, seq_ids.tolist(), positions.tolist())
        finally:
            # nobody attends to these cells again: what comes next in this slice is other messages
            for member in [*self.members, self._trunk.options.n_messages]:
                piece.remove(0, member + 1)
        self.level += 1

    def keep(self, members: Sequence[int]) -> None:
        """Go on with these members only, in their present order."""
        wanted = set(members)
        rows = np.repeat([m in wanted for m in self.members], [len(self._messages[m]) for m in self.members])
        self._states = np.ascontiguousarray(self._states[rows]) if self.level else self._states
        self.members = [member for member in self.members if member in wanted]

    def states(self) -> list[Floats]:
        """Hidden states (n_tokens, n_embd) of each member at this level, before the final norm."""
        ends = np.cumsum([len(self._messages[member]) for member in self.members])
        return np.split(self._states, ends[:-1])


def run_rows(piece: Slice, inputs: Sequence[int] | Floats, seq_ids: Sequence[int], positions: Sequence[int]) -> Floats:
    """Run tokens, or states (n, n_embd), through a slice in batches; states (n, n_embd) behind it."""
    n = len(inputs)
    outputs = np.empty((n, piece.n_embd), np.float32)
    starts = list(range(0, n, piece.n_batch))
    if n > 1 and n % piece.n_batch == 1:
        starts[-1] -= 1  # no row alone: llama.cpp sums it in another way where weights are not quantised
    for start, end in zip(starts, [*starts[1:], n], strict=False):  # without rows there is an end and no start
        part = slice(start, end)
        rows = part.stop - part.start
        # behind the last layer there are states only for rows that get logits, too
        want = range(rows) if piece.is_last else ()
        if isinstance(inputs, np.ndarray):
            piece.decode_states(inputs[part], 0, want, seq_ids[part], positions[part])
        else:
            piece.decode_tokens(inputs[part], 0, want, seq_ids[part], positions[part])
        outputs[part] = piece.hidden(rows)
    return outputs
