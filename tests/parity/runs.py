"""Plain loops over slices, written out, for comparison with stock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.native import ContextOptions, Model
from edge_runtime.slices import Slice, close_slices, open_slices
from edge_runtime.types import Floats


def through(
    slices: Sequence[Slice],
    tokens: Sequence[int],
    first_pos: int,
    want: Sequence[int],
    *,
    positions: Sequence[int] | None = None,
    seq_ids: Sequence[int] | None = None,
) -> Floats:
    """One batch through every slice; logits (len(want), n_vocab)."""
    first, *rest = slices
    first.decode_tokens(tokens, first_pos, () if rest else want, seq_ids, positions)
    for before, piece in zip(slices, rest, strict=False):
        piece.decode_states(before.hidden(len(tokens)), first_pos, want if piece.is_last else (), seq_ids, positions)
    return np.array([slices[-1].logits(row) for row in want])


def greedy(
    model: Model, boundaries: tuple[int, ...], prompt: Sequence[int], n: int, options: ContextOptions
) -> tuple[Floats, list[int], Floats]:
    """Logits of every prompt token, then n greedy tokens and the logits they were chosen from."""
    slices = open_slices(model, boundaries, options, n_outputs_max=len(prompt))
    try:
        prefill = through(slices, prompt, 0, range(len(prompt)))
        for piece in slices:
            piece.remove(0)
        # again with one row of logits only: the head, too, sums differently over several rows
        logits = [through(slices, prompt, 0, [len(prompt) - 1])[0]]
        tokens, position = [int(logits[0].argmax())], len(prompt)
        for _ in range(n - 1):
            logits.append(through(slices, tokens[-1:], position, [0])[0])
            tokens.append(int(logits[-1].argmax()))
            position += 1
        return prefill, tokens, np.array(logits)
    finally:
        close_slices(slices)


def spread(n_slices: int, n_layer: int) -> tuple[int, ...]:
    """Boundaries of n slices, as even as possible."""
    return tuple(round(n_layer * i / n_slices) for i in range(1, n_slices))
