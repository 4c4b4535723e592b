"""N-gram drafts on the real model: mode verified publishes what mode full does, token for token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime import opening
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.templates import Message
from edge_runtime.types import Mode, SamplingSettings

from .prompts import PROMPTS

pytestmark = pytest.mark.model

N_TOKENS = 64
CHOSEN = [PROMPTS[i] for i in (0, 11, 20, 38)]
SAMPLED = SamplingSettings(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, repeat_penalty=1.1, seed=11)


@pytest.fixture
def options(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    """With batches that cost nothing more, so that there are many drafts and long ones."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setattr(opening, "measure_batch_costs", lambda *_: BatchCosts((1, 16), (1.0, 1.01)))
    return RunOptions(str(demo_path), Mode.FULL, n_ctx=1024, n_threads=1)


def answers(options: RunOptions) -> tuple[list[list[int]], int, int]:
    """Tokens of each prompt's answer and, where there is room, of a second turn; drafts made and accepted."""
    found = []
    with Runtime(options) as runtime:
        for text in CHOSEN:
            messages = [Message("user", text)]
            first = list(runtime.stream(runtime.chat_tokens(messages), N_TOKENS))
            messages += [Message("assistant", "".join(c.text for c in first)), Message("user", "Say it again.")]
            again = runtime.stream(runtime.chat_tokens(messages), N_TOKENS // 2)
            found.append([c.step.token for c in [*first, *again]])
        return found, runtime.engine.stats.drafted, runtime.engine.stats.accepted


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_that_of_mode_full(
    options: RunOptions, sampling: SamplingSettings, record_property: Callable[[str, object], None]
) -> None:
    options = dataclasses.replace(options, sampling=sampling)
    full, _, _ = answers(options)
    verified, drafted, accepted = answers(dataclasses.replace(options, mode=Mode.VERIFIED))
    differing = sum(a != b for a, b in zip(full, verified, strict=True))
    record_property(
        "finding", f"n-gram drafts: {accepted} of {drafted} accepted; {differing} of {len(full)} texts differ"
    )
    assert differing == 0
    assert drafted > accepted > 20


def test_mode_margin_with_theta_one_is_mode_full_and_a_low_theta_is_not(options: RunOptions) -> None:
    full, _, _ = answers(options)
    margin = dataclasses.replace(options, mode=Mode.MARGIN)
    assert answers(dataclasses.replace(margin, theta=1.0))[0] == full
    assert answers(dataclasses.replace(margin, theta=0.01))[0] != full
