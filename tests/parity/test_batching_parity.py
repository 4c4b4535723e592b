"""Several conversations on the real model: each one's text is that of mode full alone, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.batching import BatchEngine, Question, Request
from edge_runtime.native import ContextOptions, Model, available_kernels
from edge_runtime.templates import ChatTemplate, Message
from edge_runtime.types import SamplingSettings

from ..batching_helpers import FREE, Alone, check_events, check_free, run
from .prompts import PROMPTS

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor"),
]

N_CTX = 512
N_BATCH = 64
N_TOKENS = 48
SYSTEM = (
    "You are the assistant of a small library in the mountains. You answer briefly, politely and in whole sentences, "
    "you never mention prices, and you ask the visitor to come again."
)
SAMPLED = SamplingSettings(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, repeat_penalty=1.1, seed=11)
CHOSEN = [PROMPTS[i] for i in (0, 11, 20, 3, 7, 38)]


@pytest.fixture(scope="module")
def model(demo_path: Path) -> Iterator[Model]:
    with Model(str(demo_path), kernels="edge") as opened:
        yield opened


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_the_texts_are_those_of_mode_full_alone(
    model: Model, sampling: SamplingSettings, record_property: Callable[[str, object], None]
) -> None:
    """Six visitors with one system prompt at four places, two turns each, arriving one batch after the other."""
    template = ChatTemplate.of(model)
    assert template is not None

    def tokens(*messages: Message) -> tuple[int, ...]:
        assert template is not None
        rendered = template.render([Message("system", SYSTEM), *messages])
        return tuple(model.tokenize(rendered, add_special=False, parse_special=True))

    def text(request: Request) -> str:
        return b"".join(model.piece(t) for t in request.answer if not model.is_end(t)).decode(errors="replace")

    options = ContextOptions(n_ctx=4 * N_CTX, n_batch=N_BATCH, n_seq_max=4, n_threads=1, flash_attention=True)
    with BatchEngine(model, options, FREE) as engine:
        first: list[Request] = []
        events = []
        for prompt in CHOSEN:
            question = Question(tokens(Message("user", prompt)), N_TOKENS, sampling, ends=model.is_end)
            first.append(engine.submit(question))
            events += engine.step()
        events += run(engine)
        second: list[Request] = []
        for prompt, request in zip(CHOSEN, first, strict=True):
            turns = Message("user", prompt), Message("assistant", text(request)), Message("user", "Say it again.")
            second.append(engine.submit(Question(tokens(*turns), N_TOKENS, sampling, ends=model.is_end)))
        events += run(engine)
        check_events(events, [*first, *second])
        check_free(engine)
        stats = engine.stats
    oracle = Alone(model, N_CTX, N_BATCH)
    full = [oracle.answer(request.question) for request in (*first, *second)]
    oracle.close()
    answers = [request.answer for request in (*first, *second)]
    differing = sum(a != b[: len(a)] for a, b in zip(answers, full, strict=True))
    record_property(
        "finding",
        f"conversations side by side: {differing} of {len(answers)} texts differ; {stats.reused_tokens} of "
        f"{stats.prompt_tokens} prompt tokens reused, {stats.accepted} of {stats.drafted} drafts accepted",
    )
    assert differing == 0
    assert all(len(a) == N_TOKENS or model.is_end(a[-1]) for a in answers)
    assert stats.accepted > 0
    assert stats.copied > 0
    assert stats.reused_tokens > stats.prompt_tokens // 5
