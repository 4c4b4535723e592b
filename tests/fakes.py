"""A model of numbers small enough to follow by hand, and slices of it that are strict about their contract.

Every "layer" turns the states of all positions so far into the next state of each position, with whole numbers that
float32 holds exactly. So a wrong row, position, order or stale cache entry anywhere changes the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.errors import UsageError
from edge_runtime.types import Floats, Mode, TokenIds

N_VOCAB = 13
N_EMBD = 3
ENGINE_MODES = [mode for mode in Mode if mode is not Mode.AUTO]
_PRIME = 65_521  # products of two such numbers and a sum of some fit 2^53, states fit float32


def embed(token: int) -> list[int]:
    return [(token * 31 + 7 * k + 1) % _PRIME for k in range(N_EMBD)]


def layer(index: int, states: Sequence[Sequence[int]]) -> list[int]:
    """The state after layer `index` of the last of `states`, which attends to all of them."""
    result = list(states[-1])
    for position, state in enumerate(states):
        for k in range(N_EMBD):
            result[k] = (result[k] * 3 + state[(k + index) % N_EMBD] * (position + 2) + index + 1) % _PRIME
    return result


def head(state: Sequence[int]) -> Floats:
    """Logits (N_VOCAB,) of a state: distinct, and peaked by different amounts."""
    key = sum((k + 1) * v for k, v in enumerate(state)) % _PRIME
    order = np.random.default_rng(key).permutation(N_VOCAB)
    return (order * (0.1 + (key % 7) * 0.3)).astype(np.float32)


def oracle_states(tokens: Sequence[int], n_layer: int) -> list[list[int]]:
    """States of every position after `n_layer` layers, the obvious way."""
    states = [embed(t) for t in tokens]
    for index in range(n_layer):
        states = [layer(index, states[: p + 1]) for p in range(len(states))]
    return states


def oracle_logits(tokens: Sequence[int], n_layer: int) -> Floats:
    """Logits of the head after `n_layer` layers, for the token after `tokens`."""
    return head(oracle_states(tokens, n_layer)[-1])


class Interrupted(BaseException):
    """Stands for Ctrl-C at an awkward moment."""


class FakeSlice:
    """Stands for `edge_runtime.slices.Slice`; checks what the engine promises and poisons views that have expired."""

    def __init__(
        self, start: int, end: int, n_layer: int, *, n_batch: int, n_outputs_max: int, has_hidden: bool
    ) -> None:
        self.start, self.end = start, end
        self.is_last = end == n_layer
        self.n_embd = N_EMBD
        self.n_batch = n_batch
        self.n_ctx = 10_000
        self.n_outputs_max = n_outputs_max
        self.has_hidden = has_hidden or not self.is_last
        self.inputs: list[list[int]] = []  # the KV cache: this slice's input state of each position
        self.interrupt_in: int | None = None  # decodes until one is interrupted
        self.largest_batch = 0
        self._hidden = np.empty((0, N_EMBD), np.float32)
        self._logits: dict[int, Floats] = {}

    def route_to(self, others: Sequence[FakeSlice]) -> list[FakeSlice]:
        return [self, *others]

    def decode_tokens(
        self,
        tokens: Sequence[int],
        first_pos: int,
        want: Sequence[int] = (),
        route: Sequence[FakeSlice] | None = None,
    ) -> None:
        assert self.start == 0, "only the first slice takes tokens"
        self._decode([embed(t) for t in tokens], first_pos, () if route else want)
        self._go_on(route, len(tokens), first_pos, want)

    def _go_on(self, route: Sequence[FakeSlice] | None, n: int, first_pos: int, want: Sequence[int]) -> None:
        for before, piece in zip(route or (), (route or ())[1:], strict=False):
            # past a test's own stand-in for the method: to the engine this is one call
            FakeSlice.decode_states(piece, before.hidden(n), first_pos, want if piece is (route or ())[-1] else ())

    def decode_states(
        self, states: Floats, first_pos: int, want: Sequence[int] = (), route: Sequence[FakeSlice] | None = None
    ) -> None:
        assert self.start > 0, "the first slice takes tokens"
        assert states.flags.c_contiguous
        assert not np.isnan(states).any(), "these states are views that have expired"
        self._decode([[int(v) for v in row] for row in states], first_pos, () if route else want)
        self._go_on(route, len(states), first_pos, want)

    def _decode(self, rows: list[list[int]], first_pos: int, want: Sequence[int]) -> None:
        self._hidden[:] = np.nan
        for logits in self._logits.values():
            logits[:] = np.nan
        if not 1 <= len(rows) <= self.n_batch or len(want) > self.n_outputs_max:
            raise UsageError("batch or outputs too large")
        assert first_pos == len(self.inputs), f"position {first_pos} after {len(self.inputs)} positions"
        self.largest_batch = max(self.largest_batch, len(rows))
        interrupt = self.interrupt_in is not None and self.interrupt_in <= 0
        if self.interrupt_in is not None:
            self.interrupt_in -= 1
        if interrupt:
            self.interrupt_in = None
            self.inputs += rows[: len(rows) // 2]  # as if killed half-way, then noticed too late
            raise Interrupted
        out = []
        for row in rows:
            self.inputs.append(row)
            states = self.inputs
            for index in range(self.start, self.end):
                states = [layer(index, states[: p + 1]) for p in range(len(states))]
            out.append(states[-1])
        kept = [out[i] for i in want] if self.is_last else out
        self._hidden = np.array(kept, np.float32).reshape(-1, N_EMBD)
        self._logits = {row: head(out[row]) for row in want}

    def hidden(self, n_rows: int) -> Floats:
        assert self.has_hidden
        return self._hidden[:n_rows]

    def logits(self, row: int) -> Floats:
        return self._logits[row]

    def remove(self, from_pos: int, seq_id: int = 0) -> None:
        del self.inputs[from_pos:]


def fake_slices(
    boundaries: Sequence[int], n_layer: int, *, n_batch: int = 8, n_outputs_max: int = 64, last_hidden: bool = False
) -> list[FakeSlice]:
    edges = [0, *boundaries, n_layer]
    return [
        FakeSlice(a, b, n_layer, n_batch=n_batch, n_outputs_max=n_outputs_max, has_hidden=last_hidden)
        for a, b in zip(edges, edges[1:], strict=False)
    ]


class GreedySampler:
    """Stands for `edge_runtime.sampling.Sampler` without llama.cpp; draws by the published text if `noisy`."""

    def __init__(self, noisy: bool = False) -> None:
        self.noisy = noisy
        self.history: list[int] = []
        self._draft: list[int] = []

    def sample(self, logits: Floats, ids: TokenIds | None = None) -> int:
        return self._choose(logits, ids, self.history)

    def accept(self, token: int) -> None:
        self.history.append(token)

    def rewind(self, text: Sequence[int]) -> None:
        self.history = list(text)

    def begin_draft(self) -> None:
        self._draft = list(self.history)

    def draft(self, logits: Floats, ids: TokenIds | None = None) -> int:
        token = self._choose(logits, ids, self._draft)
        self._draft.append(token)
        return token

    def reset(self) -> None:
        self.history.clear()

    def _choose(self, logits: Floats, ids: TokenIds | None, history: Sequence[int]) -> int:
        """With noise: a draw whose random number depends on the position alone, as a seeded sampler's does."""
        noise = np.random.default_rng(len(history)).gumbel(size=len(logits)) if self.noisy else 0.0
        best = int((logits + noise).argmax())
        return best if ids is None else int(ids[best])
