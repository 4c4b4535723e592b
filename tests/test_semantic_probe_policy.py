"""A probe in passing: it sees the prompt's last state as it is, and only ever closes exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.draft import BoundaryView, Guess, SharedHead
from edge_runtime.engine import Engine
from edge_runtime.errors import UsageError
from edge_runtime.exits.probe_file import ProbeFile
from edge_runtime.exits.prompt_policy import FullDepthIfUncertain, PromptPolicy, PromptWatch, watch_prompts
from edge_runtime.identity import ModelIdentity
from edge_runtime.native import ContextOptions, Model
from edge_runtime.sampling import Sampler
from edge_runtime.semantic.probe import Probe
from edge_runtime.semantic.prompt_states import PromptStates
from edge_runtime.slices import close_slices, open_slices
from edge_runtime.types import EngineSettings, Floats, Mode, SamplingSettings, Step, Thresholds

from .conftest import TinyMaker
from .fakes import N_EMBD, Interrupted, oracle_states
from .test_engine import N_LAYER, PROMPT, full_depth, make_engine
from .test_engine_heads import Follower

OPEN = Thresholds((math.inf, math.inf))


class Recorder:
    """A probe that keeps the states it is asked about."""

    layer = 4

    def __init__(self, probability: float = 0.3) -> None:
        self.states: list[Floats] = []
        self.probability = probability

    def predict(self, states: Floats) -> Floats:
        self.states += [row.copy() for row in states]
        return np.full(len(states), self.probability, np.float32)


def watching(
    policy: PromptPolicy, probe: Any = None, source: Any = None, boundary: int = 2, **changes: Any
) -> tuple[Engine, PromptWatch]:
    """An engine of the fake model with every exit open, as far as the policy leaves it so."""
    watch = PromptWatch(source or SharedHead(), probe or Recorder(), boundary, policy)
    engine, _ = make_engine(Mode.EXIT, (2, 4), lambda: watch.scaled(OPEN), source=watch, **changes)
    return engine, watch


def answer(engine: Engine, watch: PromptWatch, prompt: Sequence[int], n: int) -> list[Any]:
    """Steps of an answer, as a caller that keeps what the text shares with the one before."""
    common = next((i for i, (a, b) in enumerate(zip(engine.tokens, prompt, strict=False)) if a != b), None)
    common = min(len(engine.tokens), len(prompt)) if common is None else common
    watch.begin(len(prompt))
    engine.rollback(common)
    engine.extend(prompt[common:])
    return list(engine.generate(n))


# ── what is seen ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("boundary", "layer"), [(1, 2), (2, 4)])
@pytest.mark.parametrize("n_batch", [2, 8])
def test_the_state_is_that_of_the_prompts_last_token(boundary: int, layer: int, n_batch: int) -> None:
    probe = Recorder()
    engine, watch = watching(lambda _p: 1.0, probe, boundary=boundary, n_batch=n_batch)
    second = [*PROMPT, 9, 2]
    for prompt in (PROMPT, PROMPT, second, PROMPT[:3]):
        probe.states.clear()
        steps = answer(engine, watch, prompt, 6)
        assert len(steps) == 6
        expected = oracle_states(prompt, layer)[-1]
        assert [row.tolist() for row in probe.states] == [expected]
        assert watch.probability == pytest.approx(0.3)


def seen_and_read(model: Model, prompt: Sequence[int], boundaries: tuple[int, int]) -> tuple[list[Any], list[Step]]:
    """States of the prompt as watches of both boundaries see them and as they are read alone; the answer's steps."""
    options = ContextOptions(n_ctx=64, n_batch=16, n_threads=1)
    with PromptStates(model, boundaries, options) as reader:
        expected = reader.read(prompt)
    found: list[Any] = []
    with closing(Sampler(SamplingSettings(), model.n_vocab)) as sampler:
        for boundary in (1, 2):
            probe = Recorder()
            watch = PromptWatch(SharedHead(), probe, boundary, lambda _p: 1.0)  # type: ignore[arg-type]
            slices = open_slices(model, boundaries, options, n_outputs_max=5)
            engine = Engine(slices, sampler, EngineSettings(Mode.EXIT, cap=4), lambda w=watch: w.scaled(OPEN), watch)
            watch.begin(len(prompt))
            engine.extend(prompt)
            steps = list(engine.generate(8))
            close_slices(slices)
            found.append(([row.tobytes() for row in probe.states], [expected[boundary - 1].tobytes()]))
    return found, steps


@pytest.mark.parametrize("n_tokens", [1, 16, 40])
def test_on_a_real_model_it_is_the_slices_state_bit_for_bit(tiny_path: TinyMaker, n_tokens: int) -> None:
    with Model(str(tiny_path("llama"))) as model:
        found, steps = seen_and_read(model, [5 + (i * 7) % 60 for i in range(n_tokens)], (2, 5))
    assert all(seen == expected for seen, expected in found)
    assert any(step.boundary for step in steps)


@pytest.mark.model
def test_on_the_demo_model_too(demo_model: Model) -> None:
    tokens = demo_model.tokenize("What is the capital of France? " * 5, add_special=True, parse_special=False)
    found, _ = seen_and_read(demo_model, tokens, (12, 24))
    assert all(seen == expected for seen, expected in found)


def test_a_source_that_follows_the_text_sees_all_it_saw_without() -> None:
    """The follower checks for itself that nothing is missing, twice or out of order."""
    follower = Follower((1,))
    engine, watch = watching(lambda p: float(p < 0.5), source=follower)
    follower.slices = engine.slices  # type: ignore[assignment]
    for prompt in (PROMPT, [*PROMPT, 7], PROMPT[:2]):
        answer(engine, watch, prompt, 7)
        follower.check()
    assert follower.asked


def test_a_source_that_follows_nothing_is_left_alone() -> None:
    class Silent(SharedHead):
        def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
            raise AssertionError("this source follows no states")

        forget = observe  # type: ignore[assignment]

    engine, watch = watching(lambda _p: 1.0, source=Silent())
    assert any(step.boundary for step in answer(engine, watch, PROMPT, 6))


def test_a_boundary_at_which_the_source_is_silent_can_be_watched() -> None:
    class First(SharedHead):
        def speaks_at(self, boundary: int) -> bool:
            return boundary == 1

        def guess(self, view: BoundaryView) -> Guess | None:
            assert view.boundary == 1
            return super().guess(view)

    watch = PromptWatch(First(), Recorder(), 2, lambda _p: 1.0)  # type: ignore[arg-type]
    bounds = Thresholds((1.0, math.inf))  # at the first not all exit
    engine, _ = make_engine(Mode.EXIT, (2, 4), lambda: watch.scaled(bounds), source=watch)
    steps = answer(engine, watch, PROMPT, 20)
    assert {step.boundary for step in steps} == {2, None}
    assert sum(step.boundary is None for step in steps) > 1
    assert watch.probability is not None


def test_an_interrupted_prompt_is_looked_at_when_it_comes_again() -> None:
    probe = Recorder()
    engine, watch = watching(FullDepthIfUncertain(), probe)
    engine.slices[1].interrupt_in = 0  # type: ignore[attr-defined]
    watch.begin(len(PROMPT))
    engine.extend(PROMPT)
    with pytest.raises(Interrupted):
        list(engine.generate(4))
    assert watch.probability is None
    assert any(step.boundary for step in engine.generate(6))
    assert len(probe.states) == 1


# ── what it does ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_uncertain_prompts_are_answered_at_full_depth_and_sure_ones_as_before() -> None:
    for probability, leaves in ((0.49, True), (0.5, False), (0.9, False), (math.nan, False)):
        engine, watch = watching(FullDepthIfUncertain(0.5), Recorder(probability))
        steps = answer(engine, watch, PROMPT, 12)
        assert any(step.boundary for step in steps) is leaves, probability
        assert steps[0].boundary is None, "nothing is known yet"
        if not leaves:
            assert [step.token for step in steps] == full_depth(PROMPT, 12)


def test_each_prompt_is_decided_anew() -> None:
    probe = Recorder(0.9)
    engine, watch = watching(FullDepthIfUncertain(), probe)
    assert not any(step.boundary for step in answer(engine, watch, PROMPT, 6))
    probe.probability = 0.1
    assert any(step.boundary for step in answer(engine, watch, PROMPT, 6))
    probe.probability = 0.9
    assert not any(step.boundary for step in answer(engine, watch, [*PROMPT, 3], 6))


def test_before_a_prompt_is_known_exits_are_closed() -> None:
    probe = Recorder()
    _, watch = watching(lambda _p: 1.0, probe)
    assert watch.scaled(OPEN) == Thresholds((0.0, 0.0))
    watch.begin(3)
    watch.observe(2, 0, np.zeros((2, N_EMBD), np.float32))
    assert watch.scaled(OPEN) == Thresholds((0.0, 0.0)), "the prompt has one token more"
    watch.observe(1, 2, np.zeros((1, N_EMBD), np.float32))
    assert watch.scaled(OPEN) == Thresholds((0.0, 0.0)), "another boundary"
    watch.observe(2, 1, np.ones((3, 1), np.float32) * [[1], [2], [3]])
    assert watch.scaled(OPEN) == OPEN
    assert [row.tolist() for row in probe.states] == [[2]], "tokens of the answer may come in the same batch"
    watch.begin(3)
    assert watch.scaled(OPEN) == Thresholds((0.0, 0.0))


@given(
    scale=st.floats(allow_nan=True, allow_infinity=True),
    below=st.lists(st.floats(min_value=0, allow_infinity=True, allow_nan=False), max_size=4),
)
def test_no_policy_raises_a_threshold(scale: float, below: list[float]) -> None:
    watch = PromptWatch(SharedHead(), Recorder(), 1, lambda _p: scale)  # type: ignore[arg-type]
    watch.begin(1)
    watch.observe(1, 0, np.zeros((1, 3), np.float32))
    given_ = Thresholds(tuple(below))
    found = watch.scaled(given_).exit_below
    assert len(found) == len(below)
    assert all(0 <= now <= before for now, before in zip(found, below, strict=True))
    if scale >= 1:
        assert found == given_.exit_below


@pytest.mark.parametrize("policy", [lambda p: 0.4, lambda p: 0.0, FullDepthIfUncertain()])
def test_of_one_text_no_token_exits_that_would_not_have(policy: Callable[[float], float]) -> None:
    """The next token of many texts, with and without a probe."""
    bounds = Thresholds((1.5, 1.5))
    n_fewer = 0
    for first in range(13):
        text = [first, *PROMPT]
        plain, _ = make_engine(Mode.EXIT, (2, 4), lambda: bounds)
        watch = PromptWatch(SharedHead(), Recorder(first / 13), 2, policy)  # type: ignore[arg-type]
        watched, _ = make_engine(Mode.EXIT, (2, 4), lambda watch=watch: watch.scaled(bounds), source=watch)
        for engine in (plain, watched):
            watch.begin(len(text))
            engine.extend(text)
            list(engine.generate(1))
            engine.rollback(len(text))
            engine.extend([first])
        found = [next(iter(engine.generate(1))) for engine in (plain, watched)]
        if found[1].boundary is not None:
            assert found[0].boundary is not None
            assert found[0].boundary <= found[1].boundary
        n_fewer += found[0].boundary is not None and found[1].boundary is None
    assert n_fewer


def test_a_limit_is_a_probability() -> None:
    for limit in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="no limit"):
            FullDepthIfUncertain(limit)
    assert FullDepthIfUncertain(0.0)(0.0) == 0.0
    assert FullDepthIfUncertain(1.0)(0.99) == 1.0


def fitted(layer: int, loss: float) -> Probe:
    sizes = {"weights": 1.0, "mean": 2e4, "scale": 4e4}  # whole numbers up to 65,521 are far from certain then
    vectors = {name: np.full(N_EMBD, size, np.float32) for name, size in sizes.items()}
    numbers = {"threshold": 1.0, "penalty": 1.0, "n_prompts": 30, "n_high": 9, "auroc": 0.7}
    return Probe(layer=layer, bias=0.0, loss=loss, **vectors, **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(("chosen", "boundaries", "layer"), [(4, (2, 4), 4), (2, (2, 4), 2), (5, (2, 4), 4)])
def test_a_file_of_probes_is_watched_where_the_model_is_cut(
    chosen: int, boundaries: tuple[int, ...], layer: int
) -> None:
    model = ModelIdentity("0" * 64, "a.gguf", "a", "llama", N_LAYER, N_EMBD, 1)
    probes = ProbeFile("a", model, "", chosen, (fitted(2, 0.6), fitted(4, 0.5), fitted(5, 0.4)), {})
    watch = watch_prompts(SharedHead(), probes, boundaries)
    engine, _ = make_engine(Mode.EXIT, boundaries, lambda: watch.scaled(OPEN), source=watch)
    answer(engine, watch, PROMPT, 2)
    expected = fitted(layer, 0).predict(np.array([oracle_states(PROMPT, layer)[-1]], np.float32))[0]
    assert watch.probability == pytest.approx(float(expected))
    with pytest.raises(UsageError, match="the model is cut behind 3"):
        watch_prompts(SharedHead(), probes, (3,))
