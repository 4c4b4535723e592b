"""The hidden state of a prompt's last token at boundaries, as the engine's slices compute it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import BoundaryError, PromptError
from ..native import ContextOptions, Model
from ..slices import Slice, close_slices
from ..types import Floats, check_boundaries


class PromptStates:
    """The layers of a model up to the last boundary, which prompts go through one by one. Not thread-safe."""

    def __init__(self, model: Model, boundaries: tuple[int, ...], options: ContextOptions | None = None) -> None:
        """Close it, or use it in a `with`. Raises BoundaryError, MemoryLimitError or LibraryError."""
        check_boundaries(boundaries, model.n_layer)
        if not boundaries:
            raise BoundaryError("no boundary is given to read states at", "give one as in --boundaries 16,20")
        options = options or ContextOptions()
        self.n_ctx = options.n_ctx
        self._slices: list[Slice] = []
        try:
            for start, end in zip((0, *boundaries), boundaries, strict=False):
                self._slices.append(Slice(model, start, end, options))
        except BaseException:
            self.close()
            raise

    def read(self, prompt: Sequence[int]) -> Floats:
        """States (n_boundaries, n_embd) float32 of the last of the prompt's tokens.

        Raises PromptError for a prompt that is empty or does not fit, DecodeError if llama.cpp fails.
        """
        if not prompt:
            raise PromptError("the prompt is empty", "give some text")
        if len(prompt) > self.n_ctx:
            raise PromptError(
                f"the prompt is {len(prompt)} tokens long, the context holds {self.n_ctx}",
                "shorten it, or give a larger --ctx",
            )
        first, *others = self._slices
        for piece in self._slices:
            piece.remove(0)
        for start in range(0, len(prompt), first.n_batch):
            batch = prompt[start : start + first.n_batch]
            first.decode_tokens(batch, start)
            states = first.hidden(len(batch))
            found = [states[-1].copy()]
            for piece in others:
                piece.decode_states(states, start)
                states = piece.hidden(len(batch))
                found.append(states[-1].copy())
        return np.stack(found)

    def close(self) -> None:
        close_slices(self._slices)

    def __enter__(self) -> PromptStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prompt_states(
    model: Model,
    prompts: Sequence[Sequence[int]],
    boundaries: tuple[int, ...],
    options: ContextOptions | None = None,
) -> Floats:
    """States (n_prompts, n_boundaries, n_embd) float32 of the prompts' last tokens. Raises as `PromptStates` does."""
    with PromptStates(model, boundaries, options) as reader:
        rows = [reader.read(prompt) for prompt in prompts]
    return np.stack(rows) if rows else np.empty((0, len(boundaries), model.n_embd), np.float32)
