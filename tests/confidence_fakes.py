"""Stands in for drawing answers, where a test wants to say what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edge_runtime.native import ContextOptions, Model
from edge_runtime.semantic import Sample, SampleSettings
from edge_runtime.types import Floats

Say = Callable[[Sequence[str]], None]


def scripted(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str], *, ended: bool = True) -> list[tuple[int, ...]]:
    """Let answer number i be texts[i], of two tokens; the prompts they are drawn to, in a list that grows."""
    prompts: list[tuple[int, ...]] = []

    class Scripted:
        def __init__(self, model: Model, n_parallel: int, options: ContextOptions) -> None:
            self.n_ctx, self.rows, self.batches = options.n_ctx, 0, 0

        def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
            prompts.append(tuple(prompt))
            self.rows += 2 * len(numbers)
            self.batches += 2
            return [Sample(texts[i], (1, 2), (-1.0, -0.5), 0.5, ended) for i in numbers]

        def next_logits(self, prompt: Sequence[int]) -> Floats:
            self.rows += 1
            self.batches += 1
            return np.zeros(512, np.float32)

        def close(self) -> None:
            pass

    monkeypatch.setattr("edge_runtime.confident.AnswerSampler", Scripted)
    return prompts
