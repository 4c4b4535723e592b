"""Several conversations with early exits on the real model and the bundled pack: each text is mode exit's alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.batching import ExitBatchEngine, Question, Token
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.packs import find_exit_pack
from edge_runtime.exits.settings import exit_settings
from edge_runtime.exits.source import BatchHeads, PackHeads
from edge_runtime.exits.split import split
from edge_runtime.native import ContextOptions, Model, available_kernels
from edge_runtime.templates import ChatTemplate, Message
from edge_runtime.types import EngineSettings, Mode, SamplingSettings, Thresholds

from ..batching_helpers import FREE, AloneWithExits, check_events, check_free, run
from .prompts import PROMPTS

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor"),
]

N_CTX = 512
N_BATCH = 64
N_TOKENS = 32
CHOSEN = [PROMPTS[i] for i in (0, 11, 20, 3, 7, 38)]
SAMPLED = SamplingSettings(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, repeat_penalty=1.1, seed=11)
SETTINGS = EngineSettings(Mode.EXIT, cap=8, audit_rate=1.0)


@pytest.mark.parametrize(("sampling", "factor"), [(SamplingSettings(), 1.0), (SAMPLED, 2.0)], ids=["greedy", "sampled"])
def test_texts_depths_and_audits_are_those_of_mode_exit_alone(
    demo_path: Path, sampling: SamplingSettings, factor: float, record_property: Callable[[str, object], None]
) -> None:
    """Six conversations at four places, arriving one step after the other, and a further turn of each.

    By the certified thresholds, and by `factor` times these, where more tokens leave.
    """
    pack = ExitPack.load(find_exit_pack("smollm2-135m"))
    found = exit_settings(pack, Mode.EXIT)
    limits = Thresholds(tuple(factor * limit for limit in found.thresholds))
    paths = split(pack, demo_path)
    arguments = paths, pack.boundaries, pack.shortlist, pack.cluster_starts, pack.gates, found.signal, pack.askers
    with ExitStack() as opened:
        model = opened.enter_context(Model(str(demo_path), kernels="edge"))
        given: dict[str, Any] = {"n_embd": model.n_embd, "n_ctx": N_CTX, "n_threads": 1, "kernels": "edge"}
        heads = BatchHeads(*arguments, **given, n_sequences=4)
        opened.callback(heads.close)
        alone = PackHeads(*arguments, **given)
        opened.callback(alone.close)
        template = ChatTemplate.of(model)
        assert template is not None

        def tokens(*messages: Message) -> tuple[int, ...]:
            assert template is not None
            return tuple(model.tokenize(template.render(messages), add_special=False, parse_special=True))

        contexts = ContextOptions(4 * N_CTX, N_BATCH, 4, n_threads=1, flash_attention=True)
        with ExitBatchEngine(model, contexts, pack.boundaries, lambda: limits, heads, SETTINGS, costs=FREE) as engine:
            requests, events = [], []
            for prompt in CHOSEN:
                requests.append(engine.submit(Question(tokens(Message("user", prompt)), N_TOKENS, sampling)))
                events += engine.step()
            events += run(engine)
            for request in list(requests):
                further = model.tokenize(" And then?", add_special=False, parse_special=True)
                requests.append(engine.submit(Question((*request.tokens, *further), N_TOKENS, sampling)))
            events += run(engine)
            check_events(events, requests)
            check_free(engine)
            stats = engine.stats
        oracle = AloneWithExits(model, pack.boundaries, alone, limits, SETTINGS, N_CTX, N_BATCH)
        opened.callback(oracle.close)
        differing = 0
        for request in requests:
            told = [e for e in events if isinstance(e, Token) and e.request is request]
            steps = oracle.steps(request.question)
            differing += [(e.token, e.depth, e.audits) for e in told] != [(s.token, s.depth, s.audits) for s in steps]
    record_property(
        "finding",
        f"exits side by side: {differing} of {len(requests)} texts differ; {stats.exits} of {stats.published} tokens "
        f"left early, {stats.disagreed} of {stats.audited} audited disagreed; {stats.reused_tokens} of "
        f"{stats.prompt_tokens} prompt tokens reused",
    )
    assert differing == 0
    assert stats.exits > 5
    assert stats.audited > 0
    assert stats.reused_tokens > 0
