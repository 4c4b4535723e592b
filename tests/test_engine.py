"""The engine against a slow, obvious oracle, on a model of whole numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft import BoundaryView, DraftSource, Guess, SharedHead
from edge_runtime.engine import Engine, WaitingStates
from edge_runtime.errors import PromptError, UsageError
from edge_runtime.sampling import Sampler
from edge_runtime.signals import signals_of
from edge_runtime.slices import Slice
from edge_runtime.types import Audit, EngineSettings, Floats, Mode, Signals, Step, Thresholds

from .fakes import (
    ENGINE_MODES,
    FakeSlice,
    GreedySampler,
    Interrupted,
    fake_slices,
    oracle_logits,
    oracle_states,
)

N_LAYER = 6
PROMPT = [3, 1, 4, 1, 5]
LOSSLESS = (Mode.FULL, Mode.VERIFIED)


def make_engine(
    mode: Mode = Mode.FULL,
    boundaries: Sequence[int] = (2, 4),
    thresholds: Callable[[], Thresholds] | float = math.inf,
    *,
    source: DraftSource | None = None,
    cap: int = 4,
    audit_rate: float = 1.0,
    n_batch: int = 8,
    n_ctx: int | None = None,
    noisy: bool = False,
    last_hidden: bool = False,
    theta: float = 0.9,
) -> tuple[Engine, list[FakeSlice]]:
    slices = fake_slices(boundaries, N_LAYER, n_batch=n_batch, n_outputs_max=cap + 1, last_hidden=last_hidden)
    engine = Engine(
        cast(list[Slice], slices),
        cast(Sampler, GreedySampler(noisy)),
        EngineSettings(mode=mode, cap=cap, audit_rate=audit_rate, theta=theta),
        thresholds if callable(thresholds) else cycling([(thresholds,) * len(boundaries)]),
        source or SharedHead(),
        n_ctx=n_ctx,
    )
    return engine, slices


def full_depth(prompt: Sequence[int], n: int, noisy: bool = False) -> list[int]:
    """n tokens of the model itself."""
    sampler, text = GreedySampler(noisy), list(prompt)
    sampler.history = list(prompt)
    for _ in range(n):
        token = sampler.sample(oracle_logits(text, N_LAYER))
        sampler.accept(token)
        text.append(token)
    return text[len(prompt) :]


def assert_caches_exact(engine: Engine, slices: Sequence[FakeSlice]) -> None:
    """Settled, every slice holds what a fresh full run over the same text would hold."""
    text = list(engine.tokens)
    assert np.array_equal(engine.settle(), oracle_logits(text, N_LAYER))
    assert engine.tokens == text
    for piece in slices:
        assert piece.inputs == oracle_states(text, piece.start)


class Scripted:
    """Drafts given tokens at given boundaries: whatever a head, a feature head or an n-gram might say."""

    wants_logits = wants_states = False

    def __init__(self, boundary: int, tokens: Callable[[Sequence[int]], int | None]) -> None:
        self.boundary, self.tokens = boundary, tokens
        self.views: list[BoundaryView] = []

    def speaks_at(self, boundary: int) -> bool:
        return boundary == self.boundary

    def guess(self, view: BoundaryView) -> Guess | None:
        self.views.append(
            BoundaryView(view.boundary, list(view.tokens), None if view.hidden is None else view.hidden.copy(), None)
        )
        token = self.tokens(view.tokens)
        if token is None:
            return None
        return Guess(np.zeros(1, np.float32), Signals(0.0, 1.0, 1.0), 0.0, np.array([token], np.int32))

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        raise AssertionError("this source follows no states")

    def forget(self, length: int) -> None:
        raise AssertionError("this source follows no states")


# ── mode full ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("boundaries", [(), (3,), (1, 2, 3, 4, 5)])
def test_full_is_the_model_itself(boundaries: tuple[int, ...]) -> None:
    engine, slices = make_engine(boundaries=boundaries)
    engine.extend(PROMPT)
    steps = list(engine.generate(12))
    assert [s.token for s in steps] == full_depth(PROMPT, 12)
    assert [s.position for s in steps] == list(range(5, 17))
    assert {s.depth for s in steps} == {N_LAYER}
    assert engine.stats.published == 12
    assert engine.stats.mean_depth == N_LAYER
    assert_caches_exact(engine, slices)


def test_a_long_prompt_goes_through_in_batches() -> None:
    engine, slices = make_engine(n_batch=4)
    prompt = [i % 13 for i in range(19)]
    engine.extend(prompt)
    assert [s.token for s in engine.generate(3)] == full_depth(prompt, 3)
    assert max(piece.largest_batch for piece in slices) == 4


# ── mode verified ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5, math.inf])
@pytest.mark.parametrize("noisy", [False, True])
def test_verified_publishes_what_full_depth_would(threshold: float, noisy: bool) -> None:
    engine, slices = make_engine(Mode.VERIFIED, thresholds=threshold, noisy=noisy)
    engine.extend(PROMPT)
    assert [s.token for s in engine.generate(40)] == full_depth(PROMPT, 40, noisy)
    assert_caches_exact(engine, slices)


@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_perfect_drafts_are_all_accepted(boundary: int) -> None:
    source = Scripted(boundary, lambda text: full_depth(text, 1)[0])
    engine, slices = make_engine(Mode.VERIFIED, source=source, cap=4)
    engine.extend(PROMPT)
    steps = list(engine.generate(20))
    assert [s.token for s in steps] == full_depth(PROMPT, 20)
    assert engine.stats.acceptance == 1.0
    # after the prompt each settle confirms four drafts and adds one token of its own
    assert [s.accepted for s in steps] == [False, *([True] * 4 + [False]) * 3, *[True] * 4]
    assert {s.boundary for s in steps if s.accepted} == {(0, 2, 4)[boundary]}
    assert {s.depth for s in steps} == {N_LAYER}  # full depth has confirmed every one
    assert_caches_exact(engine, slices)


@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_hopeless_drafts_cost_time_but_change_nothing(boundary: int) -> None:
    source = Scripted(boundary, lambda text: (full_depth(text, 1)[0] + 1) % 13)
    engine, slices = make_engine(Mode.VERIFIED, source=source)
    engine.extend(PROMPT)
    steps = list(engine.generate(10))
    assert [s.token for s in steps] == full_depth(PROMPT, 10)
    assert engine.stats.accepted == 0
    assert all(s.corrected for s in steps[1:])
    assert_caches_exact(engine, slices)


def test_the_wrong_draft_is_where_the_text_is_corrected() -> None:
    right = full_depth(PROMPT, 20)

    def third_is_wrong(text: Sequence[int]) -> int:
        i = len(text) - len(PROMPT)
        return right[i] if i != 3 else (right[i] + 1) % 13

    engine, _ = make_engine(Mode.VERIFIED, source=Scripted(1, third_is_wrong), cap=4)
    engine.extend(PROMPT)
    steps = list(engine.generate(5))
    assert [s.token for s in steps] == right[:5]
    assert [s.accepted for s in steps] == [False, True, True, False, True]
    assert [s.corrected for s in steps] == [False, False, False, True, False]


def test_a_source_before_the_first_slice_sees_the_last_state_of_settled_text_only() -> None:
    source = Scripted(0, lambda text: full_depth(text, 1)[0] if len(text) % 3 else None)
    engine, _ = make_engine(Mode.VERIFIED, source=source, last_hidden=True)
    engine.extend(PROMPT)
    list(engine.generate(12))
    seen = 0
    for view in source.views:
        if view.hidden is not None:
            seen += 1
            assert view.hidden.tolist() == oracle_states(view.tokens[:-1], N_LAYER)[-1]
    assert seen >= 3


# ── mode margin ─────────────────────────────────────────────────────────────────────────────────────────────────────


def ranked(text: Sequence[int]) -> tuple[list[int], list[float]]:
    """Full depth's tokens, likeliest first, and their probabilities."""
    logits = oracle_logits(text, N_LAYER).astype(float)
    shares = np.exp(logits) / np.exp(logits).sum()
    order = [int(i) for i in np.argsort(-shares, kind="stable")]
    return order, [float(shares[i]) for i in order]


def slow_margin_run(
    prompt: Sequence[int], n: int, draft: Callable[[Sequence[int]], int | None], cap: int, theta: float, noisy: bool
) -> list[tuple[int, bool, bool, bool]]:
    """(token, drafted, accepted, relaxed) of every published token, by the rule as it is written."""
    sampler, text, settled = GreedySampler(noisy), list(prompt), 0
    published: list[tuple[int, bool, bool, bool]] = []
    while len(published) < n:
        drafts: list[int] = []
        while len(text) + len(drafts) - 1 - settled < cap and (token := draft(text + drafts)) is not None:
            drafts.append(token)
        for guess in [*drafts, None]:
            sampler.history = list(text)
            chosen = sampler.sample(oracle_logits(text, N_LAYER))
            (_, second, *_), (p1, p2, *_) = ranked(text)
            relaxed = guess is not None and guess != chosen and guess == second and p2 / p1 > theta
            accepted = guess is not None and (guess == chosen or relaxed)
            text.append(guess if guess is not None and accepted else chosen)
            published.append((text[-1], guess is not None, accepted, relaxed))
            settled = len(text) - 1
            if not accepted:
                break
    return published[:n]


@settings(max_examples=150, deadline=None)
@given(
    boundary=st.integers(0, 2),
    ranks=st.lists(st.sampled_from([0, 0, 1, 1, 2, None]), min_size=1, max_size=9),
    theta=st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0]),
    cap=st.integers(1, 7),
    noisy=st.booleans(),
    n=st.integers(1, 25),
)
def test_margin_publishes_what_the_rule_says(
    boundary: int, ranks: list[int | None], theta: float, cap: int, noisy: bool, n: int
) -> None:
    def draft(text: Sequence[int]) -> int | None:
        rank = ranks[len(text) % len(ranks)]
        return None if rank is None else ranked(text)[0][rank]

    engine, slices = make_engine(Mode.MARGIN, source=Scripted(boundary, draft), cap=cap, noisy=noisy, theta=theta)
    engine.extend(PROMPT)
    steps = list(engine.generate(n))
    expected = slow_margin_run(PROMPT, n, draft, cap, theta, noisy)
    assert [(s.token, s.drafted, s.accepted, s.relaxed) for s in steps] == expected
    assert all(s.corrected == (s.drafted and not s.accepted) for s in steps)
    assert all((s.boundary is not None) == s.accepted for s in steps)
    assert engine.stats.relaxed == sum(s.relaxed for s in steps)
    assert engine.stats.accepted == sum(s.accepted for s in steps)
    assert engine.stats.changed == engine.stats.relaxed / n
    assert_caches_exact(engine, slices)


def second_choice(text: Sequence[int]) -> int:
    return ranked(text)[0][1]


def test_a_second_choice_stands_only_where_it_is_close_and_only_in_mode_margin() -> None:
    changed = {}
    for mode, theta in [(Mode.VERIFIED, 0.01), (Mode.MARGIN, 1.0), (Mode.MARGIN, 0.9), (Mode.MARGIN, 0.01)]:
        engine, slices = make_engine(mode, source=Scripted(1, second_choice), theta=theta)
        engine.extend(PROMPT)
        tokens = [s.token for s in engine.generate(40)]
        changed[mode, theta] = engine.stats.relaxed
        assert (tokens == full_depth(PROMPT, 40)) == (not engine.stats.relaxed)
        assert_caches_exact(engine, slices)
    assert changed[Mode.VERIFIED, 0.01] == changed[Mode.MARGIN, 1.0] == 0
    assert 0 < changed[Mode.MARGIN, 0.9] < changed[Mode.MARGIN, 0.01] <= 40


# ── mode exit ───────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_exit_run(
    prompt: Sequence[int], n: int, boundaries: Sequence[int], limits: Callable[[], Thresholds], cap: int
) -> list[tuple[int, int]]:
    """(token, depth) of every published token, by recomputing everything for each."""
    text, waiting, published = list(prompt), len(prompt) - 1, []
    for _ in range(n):
        allowed = limits().exit_below
        depth = N_LAYER
        for boundary, limit in zip(boundaries, allowed, strict=True):
            if waiting < cap and limit > 0 and signals_of(oracle_logits(text, boundary)).entropy < limit:
                depth = boundary
                break
        waiting = 0 if depth == N_LAYER else waiting + 1
        text.append(int(oracle_logits(text, depth).argmax()))
        published.append((text[-1], depth))
    return published


def cycling(values: Sequence[tuple[float, ...]]) -> Callable[[], Thresholds]:
    """Thresholds that differ from token to token, the same way each time."""
    endless = itertools.cycle(values)
    return lambda: Thresholds(next(endless))


@pytest.mark.parametrize("cap", range(1, 33))
def test_exit_leaves_every_cache_exact(cap: int) -> None:
    values = [(0.0, 2.0), (2.3, 2.5), (math.inf, 0.0), (1.0, math.inf)]
    engine, slices = make_engine(Mode.EXIT, thresholds=cycling(values), cap=cap)
    engine.extend(PROMPT)
    steps = list(engine.generate(45))
    assert [(s.token, s.depth) for s in steps] == slow_exit_run(PROMPT, 45, (2, 4), cycling(values), cap)
    assert slices[-1].largest_batch <= max(cap + 1, len(PROMPT))
    assert engine.stats.exits > 10
    assert_caches_exact(engine, slices)


def test_the_cap_forces_a_settle() -> None:
    engine, slices = make_engine(Mode.EXIT, cap=3)
    engine.extend(PROMPT)
    steps = list(engine.generate(13))
    assert [s.depth for s in steps] == [6, 2, 2, 2, 6, 2, 2, 2, 6, 2, 2, 2, 6]
    assert slices[-1].largest_batch == len(PROMPT)
    assert engine.stats.settled_rows == len(PROMPT) + 12


def test_audits_tell_the_truth_about_every_exit() -> None:
    engine, _ = make_engine(Mode.EXIT, thresholds=2.4, cap=5)
    engine.extend(PROMPT)
    steps = list(engine.generate(60))
    text = PROMPT + [s.token for s in steps]
    audits = [a for s in steps for a in s.audits]
    exits = {s.position: s for s in steps if s.boundary is not None}
    assert len(audits) > 20
    for audit in audits:
        assert audit.layer == exits[audit.position].depth
        truth = int(oracle_logits(text[: audit.position], N_LAYER).argmax())
        assert audit.agreed == (truth == text[audit.position])
    last_settle = max(s.position for s in steps if s.boundary is None)
    assert {a.position for a in audits} == {p for p in exits if p < last_settle}
    assert engine.stats.audited == len(audits)
    assert engine.stats.disagreed == sum(not a.agreed for a in audits)
    assert 0 < engine.stats.disagreement < 1


def test_audits_are_a_sample_of_the_exits() -> None:
    engine, _ = make_engine(Mode.EXIT, cap=6, audit_rate=0.5)
    engine.extend(PROMPT)
    list(engine.generate(60))
    assert 0.2 < engine.stats.audited / engine.stats.exits < 0.8


def test_a_long_prompt_audits_the_exits_before_it() -> None:
    engine, _ = make_engine(Mode.EXIT, cap=4, n_batch=8)
    engine.extend(PROMPT)
    list(engine.generate(5))
    assert (engine.stats.exits, engine.stats.audited) == (4, 0)
    engine.extend([1] * 30)  # settles them on the way, in several batches
    (step,) = engine.generate(1)
    assert [a.position for a in step.audits] == [6, 7, 8, 9]


def test_thresholds_are_read_once_per_token() -> None:
    calls = itertools.count()

    def thresholds() -> Thresholds:
        next(calls)
        return Thresholds((0.0, 0.0))

    engine, _ = make_engine(Mode.EXIT, thresholds=thresholds)
    engine.extend(PROMPT)
    list(engine.generate(7))
    assert next(calls) == 7


# ── stopping, resuming, forgetting ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ENGINE_MODES)
def test_the_context_ends_the_text(mode: Mode) -> None:
    engine, slices = make_engine(mode, n_ctx=20)
    engine.extend(PROMPT)
    assert len(list(engine.generate(100))) == 15
    assert len(engine.tokens) == 20
    assert list(engine.generate(5)) == []
    assert_caches_exact(engine, slices)


def test_a_prompt_that_does_not_fit_says_both_numbers() -> None:
    engine, _ = make_engine(n_ctx=4)
    with pytest.raises(PromptError, match=r"5 tokens long.*holds 4"):
        engine.extend(PROMPT)
    assert engine.tokens == []


def test_no_text_no_tokens() -> None:
    engine, _ = make_engine()
    with pytest.raises(PromptError, match="no text"):
        next(engine.generate(1))
    with pytest.raises(PromptError, match="no text"):
        engine.settle()


def test_thresholds_must_fit_the_boundaries() -> None:
    engine, _ = make_engine(Mode.EXIT, thresholds=lambda: Thresholds((1.0,)))
    engine.extend(PROMPT)
    with pytest.raises(UsageError, match="1 thresholds were given for 2 boundaries"):
        next(engine.generate(1))


def test_the_last_slice_must_give_enough_rows() -> None:
    slices = cast(list[Slice], fake_slices((3,), N_LAYER, n_outputs_max=4))
    with pytest.raises(UsageError, match="a cap of 4 needs 5"):
        Engine(slices, cast(Sampler, GreedySampler()), EngineSettings(Mode.EXIT, cap=4), lambda: Thresholds((0.0,)))


def test_reset_starts_from_nothing() -> None:
    engine, slices = make_engine(Mode.EXIT, thresholds=2.4)
    engine.extend(PROMPT)
    first = list(engine.generate(15))
    engine.reset()
    assert engine.tokens == []
    assert all(piece.inputs == [] for piece in slices)
    engine.extend(PROMPT)
    assert list(engine.generate(15)) == first


def apply_actions(engine: Engine, slices: list[FakeSlice], actions: Sequence[tuple[Any, ...]]) -> None:
    """Do to the engine what a careless caller would; after each the text must be what was handed out."""
    for action in actions:
        text = list(engine.tokens)
        match action:
            case ("generate", n, taken):
                seen = [s.token for s in itertools.islice(engine.generate(n), taken)] if text else []
                assert engine.tokens == text + seen
            case ("extend", tokens):
                engine.extend(tokens)
            case ("rollback", share):
                engine.rollback(int(len(text) * share))
            case ("settle",):
                if text:
                    assert np.array_equal(engine.settle(), oracle_logits(text, N_LAYER))
            case ("interrupt", which, after, n):
                slices[which % len(slices)].interrupt_in = after
                seen = []
                try:
                    for step in engine.generate(n) if text else ():
                        seen.append(step.token)
                except Interrupted:
                    pass
                slices[which % len(slices)].interrupt_in = None
                assert engine.tokens == text + seen


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("generate"), st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.just("extend"), st.lists(st.integers(0, 12), min_size=1, max_size=14)),
        st.tuples(st.just("rollback"), st.floats(0, 1)),
        st.tuples(st.just("settle")),
        st.tuples(st.just("interrupt"), st.integers(0, 4), st.integers(0, 6), st.integers(1, 8)),
    ),
    max_size=8,
)
LIMITS = st.sampled_from([0.0, 1.0, 2.0, 2.4, 2.55, math.inf])


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from(ENGINE_MODES),
    boundaries=st.lists(st.integers(1, N_LAYER - 1), unique=True, max_size=4).map(sorted),
    data=st.data(),
    cap=st.integers(1, 7),
    n_batch=st.integers(2, 9),
    actions=ACTIONS,
)
def test_whatever_is_done_to_it_the_caches_stay_exact(
    mode: Mode, boundaries: list[int], data: st.DataObject, cap: int, n_batch: int, actions: list[tuple[Any, ...]]
) -> None:
    values = data.draw(st.lists(st.tuples(*[LIMITS for _ in boundaries]), min_size=1, max_size=5))
    engine, slices = make_engine(mode, boundaries, cycling(values), cap=cap, n_batch=n_batch, audit_rate=0.7)
    engine.extend(PROMPT)
    apply_actions(engine, slices, actions)
    assert len(engine.tokens) - 1 - len(slices[-1].inputs) <= max(cap, len(engine.tokens))
    if engine.tokens:
        assert_caches_exact(engine, slices)
        assert cast(GreedySampler, engine.sampler).history == engine.tokens
        if mode in LOSSLESS:
            text = list(engine.tokens)
            assert [s.token for s in engine.generate(6)] == full_depth(text, 6)


@settings(max_examples=150, deadline=None)
@given(
    boundaries=st.lists(st.integers(1, N_LAYER - 1), unique=True, min_size=1, max_size=4).map(sorted),
    data=st.data(),
    cap=st.integers(1, 7),
    n=st.integers(1, 40),
)
def test_exits_are_those_of_the_slow_run(boundaries: list[int], data: st.DataObject, cap: int, n: int) -> None:
    values = data.draw(st.lists(st.tuples(*[LIMITS for _ in boundaries]), min_size=1, max_size=5))
    engine, slices = make_engine(Mode.EXIT, boundaries, cycling(values), cap=cap)
    engine.extend(PROMPT)
    seen = [(s.token, s.depth) for s in engine.generate(n)]
    assert seen == slow_exit_run(PROMPT, n, boundaries, cycling(values), cap)
    assert_caches_exact(engine, slices)


def test_steps_are_plain_data() -> None:
    step = Step(1, 2, 3, audits=(Audit(1, 2, True),))
    with pytest.raises(AttributeError):
        step.token = 5  # type: ignore[misc]


# ── what a careful reader would check ───────────────────────────────────────────────────────────────────────────────


class AllKnowing:
    """Guesses at boundary 1 with full depth's own logits, of the whole vocabulary or of its even tokens."""

    wants_logits = wants_states = False

    def __init__(self, uncertainty: float = 0.0, shortlist: bool = False) -> None:
        self.uncertainty, self.shortlist = uncertainty, shortlist

    def speaks_at(self, boundary: int) -> bool:
        return boundary == 1

    def guess(self, view: BoundaryView) -> Guess | None:
        logits, signals = oracle_logits(view.tokens, N_LAYER), Signals(0.0, 1.0, 1.0)
        if not self.shortlist:
            return Guess(logits, signals, self.uncertainty)
        ids = np.arange(0, len(logits), 2, dtype=np.int32)
        return Guess(logits[ids], signals, self.uncertainty, ids)

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        raise AssertionError("this source follows no states")

    def forget(self, length: int) -> None:
        raise AssertionError("this source follows no states")


def positions_held(slices: Sequence[FakeSlice]) -> list[int]:
    return [len(piece.inputs) for piece in slices]


def test_drafts_are_drawn_with_the_random_numbers_of_their_positions() -> None:
    """Full depth's logits as drafts, sampled: every one must be the very token that full depth samples."""
    engine, _ = make_engine(Mode.VERIFIED, source=AllKnowing(), noisy=True)
    engine.extend(PROMPT)
    assert [s.token for s in engine.generate(30)] == full_depth(PROMPT, 30, noisy=True)
    assert engine.stats.acceptance == 1.0


def test_an_audit_compares_likeliest_tokens_not_sampled_ones() -> None:
    engine, _ = make_engine(Mode.EXIT, source=AllKnowing(), noisy=True)
    engine.extend(PROMPT)
    steps = list(engine.generate(40))
    exits = [s for s in steps if s.boundary is not None]
    tops = [int(oracle_logits((PROMPT + [s.token for s in steps])[: s.position], N_LAYER).argmax()) for s in exits]
    assert any(s.token != top for s, top in zip(exits, tops, strict=True))
    assert engine.stats.audited > 20
    assert engine.stats.disagreed == 0


def test_an_audit_of_a_shortlist_speaks_of_tokens_of_the_vocabulary() -> None:
    engine, _ = make_engine(Mode.EXIT, source=AllKnowing(shortlist=True))
    engine.extend(PROMPT)
    steps = list(engine.generate(60))
    text = PROMPT + [s.token for s in steps]
    audits = [a for s in steps for a in s.audits]
    assert {a.agreed for a in audits} == {True, False}
    for audit in audits:
        assert audit.agreed == (int(oracle_logits(text[: audit.position], N_LAYER).argmax()) % 2 == 0)


@pytest.mark.parametrize(
    ("uncertainty", "threshold", "exits"),
    [(1.0, 1.0, 0), (1.0, 1.0001, 4), (math.nan, 1.0, 0), (math.nan, math.inf, 0)],
)
def test_an_exit_is_below_its_threshold_not_at_it(uncertainty: float, threshold: float, exits: int) -> None:
    """What decides is the guess's uncertainty, whatever its signals say; NaN is never sure enough."""
    engine, _ = make_engine(Mode.EXIT, (2,), threshold, source=AllKnowing(uncertainty))
    engine.extend(PROMPT)
    list(engine.generate(5))
    assert engine.stats.exits == exits


def test_a_guess_before_the_first_slice_is_never_published_unverified() -> None:
    source = Scripted(0, lambda text: 0)
    engine, _ = make_engine(Mode.EXIT, source=source)
    engine.extend(PROMPT)
    assert [s.token for s in engine.generate(10)] == full_depth(PROMPT, 10)
    assert source.views == []


def test_in_mode_full_no_source_is_asked() -> None:
    source = Scripted(1, lambda text: 0)
    engine, _ = make_engine(Mode.FULL, source=source)
    engine.extend(PROMPT)
    assert [s.token for s in engine.generate(10)] == full_depth(PROMPT, 10)
    assert source.views == []


@pytest.mark.parametrize(("threshold", "most"), [(0.0, 0), (1e-9, 1)])
def test_the_output_head_runs_at_a_boundary_only_where_it_may_matter(threshold: float, most: int) -> None:
    engine, slices = make_engine(Mode.EXIT, (2,), threshold, cap=20)
    asked: list[int] = []
    real = slices[0].decode_tokens

    def decode(tokens: Sequence[int], first_pos: int, want: Sequence[int] = (), route: Any = None) -> None:
        if route is None:  # as far as the boundary only
            asked.append(len(want))
        real(tokens, first_pos, want, route)

    slices[0].decode_tokens = decode  # type: ignore[method-assign]
    engine.extend(list(range(13)))
    list(engine.generate(4))
    # the first batch of the prompt, and every token that cannot exit, go all the way at once
    assert asked == [1] * 4 * most


def test_steps_carry_the_signals_of_every_boundary_asked() -> None:
    engine, _ = make_engine(Mode.EXIT, thresholds=cycling([(1e-9, 1e-9), (1e-9, math.inf), (0.0, 1e-9)]), cap=9)
    engine.extend(PROMPT)
    text = list(PROMPT)
    for step, layers in zip(engine.generate(6), [(2, 4), (2, 4), (4,)] * 2, strict=True):
        expected = tuple((layer, signals_of(oracle_logits(text, layer))) for layer in layers)
        assert step.signals == expected
        assert step.boundary == (4 if step.position % 3 == 0 else None)
        text.append(step.token)


@pytest.mark.parametrize("right", [True, False])
def test_steps_of_a_verification_tell_their_own_story(right: bool) -> None:
    def draft(text: Sequence[int]) -> int:
        token = full_depth(text, 1)[0]
        return token if right else (token + 1) % 13

    engine, _ = make_engine(Mode.VERIFIED, (2,), source=Scripted(1, draft), cap=2)
    engine.extend(PROMPT)
    steps = list(engine.generate(7))
    assert [s.position for s in steps] == list(range(5, 12))
    drafted = [False, True, True, False, True, True, False] if right else [False, *[True] * 6]
    assert [s.drafted for s in steps] == drafted
    assert [s.accepted for s in steps] == [d and right for d in drafted]
    assert [s.corrected for s in steps] == [d and not right for d in drafted]
    assert [s.boundary for s in steps] == [2 if d and right else None for d in drafted]
    assert {s.depth for s in steps} == {N_LAYER}  # confirmed by all layers
    seen = ((2, Signals(0.0, 1.0, 1.0)),)
    assert [s.signals for s in steps] == [seen if d else () for d in drafted]
    assert engine.stats.exits == sum(s.accepted for s in steps)


def test_a_guess_before_the_first_slice_counts_as_an_exit() -> None:
    engine, _ = make_engine(Mode.VERIFIED, source=Scripted(0, lambda text: full_depth(text, 1)[0]), cap=3)
    engine.extend(PROMPT)
    steps = list(engine.generate(9))
    assert engine.stats.exits == sum(s.boundary == 0 for s in steps) == 6


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_text_added_after_a_corrected_draft(n: int, boundary: int) -> None:
    """The draft that stood in the corrected token's place is gone from every cache."""
    wrong_now_and_then = Scripted(boundary, lambda text: (full_depth(text, 1)[0] + (len(text) % 3 == 0)) % 13)
    engine, slices = make_engine(Mode.VERIFIED, source=wrong_now_and_then)
    engine.extend(PROMPT)
    list(engine.generate(n))
    engine.extend([7, 8])
    assert_caches_exact(engine, slices)


@pytest.mark.parametrize("kept", range(1, 14))
def test_a_rollback_into_what_waits(kept: int) -> None:
    engine, slices = make_engine(Mode.EXIT, (2, 4), cycling([(0.0, math.inf), (math.inf, 0.0), (0.0, 2.4)]), cap=9)
    engine.extend(PROMPT)
    list(engine.generate(9))
    assert len(set(positions_held(slices))) > 1  # some wait
    engine.rollback(kept)
    assert all(held <= kept for held in positions_held(slices))
    assert_caches_exact(engine, slices)


def test_a_rollback_forgets_the_audits_of_what_is_gone() -> None:
    engine, _ = make_engine(Mode.EXIT, cap=4)
    engine.extend(PROMPT)
    list(engine.generate(5))  # positions 6 to 9 left early
    engine.rollback(8)
    engine.extend([1, 2, 3, 4, 5])
    engine.settle()
    (step,) = engine.generate(1)
    assert [a.position for a in step.audits] == [6, 7]


def test_audits_of_a_settle_come_with_the_next_step_whatever_it_is() -> None:
    engine, _ = make_engine(Mode.EXIT, cap=4)
    engine.extend(PROMPT)
    list(engine.generate(4))
    engine.settle()
    (step,) = engine.generate(1)
    assert step.boundary is not None
    assert [a.position for a in step.audits] == [6, 7, 8]


@pytest.mark.parametrize("mode", [Mode.EXIT, Mode.VERIFIED, Mode.MARGIN])
def test_more_may_wait_than_goes_through_at_once(mode: Mode) -> None:
    source = AllKnowing()
    engine, slices = make_engine(mode, (2,), source=source, cap=10, n_batch=3)
    engine.extend(PROMPT)
    steps = list(engine.generate(40))
    assert [s.token for s in steps] == full_depth(PROMPT, 40)
    assert slices[-1].largest_batch == 3
    if mode is Mode.EXIT:
        assert engine.stats.audited > 25
        assert engine.stats.disagreed == 0
    else:
        assert not any(s.corrected for s in steps)
        assert engine.stats.accepted > 30
    assert_caches_exact(engine, slices)


def assert_hidden_is_of_the_token_before(source: Scripted) -> int:
    """How often the source saw a state; each must be the last layer's of the token before the newest."""
    seen = 0
    for view in source.views:
        if view.hidden is not None:
            seen += 1
            assert view.hidden.tolist() == oracle_states(view.tokens[:-1], N_LAYER)[-1]
    return seen


def test_last_states_are_right_over_several_batches() -> None:
    source = Scripted(0, lambda text: (full_depth(text, 1)[0] + (len(text) % 5 == 0)) % 13 if len(text) % 7 else None)
    engine, _ = make_engine(Mode.VERIFIED, (2,), source=source, cap=9, n_batch=2, last_hidden=True)
    engine.extend(PROMPT)
    assert [s.token for s in engine.generate(30)] == full_depth(PROMPT, 30)
    assert assert_hidden_is_of_the_token_before(source) > 3


@pytest.mark.parametrize("then", ["generate", "extend 1", "extend 2", "rollback", "settle"])
@pytest.mark.parametrize("first", ["settle", "generate", "generate and settle"])
def test_last_states_are_right_whatever_came_before(first: str, then: str) -> None:
    source = Scripted(0, lambda text: full_depth(text, 1)[0])
    engine, slices = make_engine(Mode.VERIFIED, (2,), source=source, last_hidden=True)
    engine.extend(PROMPT)
    if "generate" in first:
        list(engine.generate(3))
    if "settle" in first:
        engine.settle()
    if then.startswith("extend"):
        engine.extend([1, 2][: int(then[-1])])
    elif then == "rollback":
        engine.rollback(4)
    elif then == "settle":
        engine.settle()
    text = list(engine.tokens)
    assert [s.token for s in engine.generate(4)] == full_depth(text, 4)
    seen = assert_hidden_is_of_the_token_before(source)
    if then == "extend 1" and "settle" in first:
        assert seen > 0  # the state that the settle left is that of the token before
    assert_caches_exact(engine, slices)


@pytest.mark.parametrize("mode", ENGINE_MODES)
@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_no_slice_is_ever_given_more_than_the_context_holds(mode: Mode, boundary: int) -> None:
    source = Scripted(boundary, lambda text: full_depth(text, 1)[0])
    engine, slices = make_engine(mode, source=source, n_ctx=16, cap=8)
    most: list[int] = []
    for piece in slices:
        real = piece._decode

        def decode(rows: list[list[int]], first_pos: int, want: Sequence[int] = (), real: Any = real) -> None:
            most.append(first_pos + len(rows))
            real(rows, first_pos, want)

        piece._decode = decode  # type: ignore[method-assign]
    engine.extend(PROMPT)
    assert len(list(engine.generate(50))) == 11
    assert max(most) <= 16
    assert_caches_exact(engine, slices)


def test_the_context_is_the_smaller_of_what_is_asked_and_what_there_is() -> None:
    engine, slices = make_engine(n_ctx=10**6)
    assert engine.n_ctx == slices[0].n_ctx
    assert make_engine(n_ctx=12)[0].n_ctx == 12
    exactly, _ = make_engine(n_ctx=len(PROMPT))
    exactly.extend(PROMPT)
    assert list(exactly.generate(3)) == []


def test_settles_and_their_rows_are_counted() -> None:
    engine, _ = make_engine(Mode.EXIT, cap=3, n_batch=4)
    engine.extend([1] * 10)
    list(engine.generate(9))
    # two batches of the prompt; its other two tokens with the first two exits; one token with the next three exits
    assert (engine.stats.settles, engine.stats.settled_rows) == (4, 16)


def test_a_reset_is_as_new() -> None:
    engine, _ = make_engine(Mode.EXIT, cap=6, audit_rate=0.5, noisy=True, thresholds=2.4)
    runs = []
    for _ in range(2):
        engine.reset()
        engine.extend(PROMPT)
        runs.append((list(engine.generate(31)), engine.stats))
        engine.settle()  # leaves audits that nobody fetches
    assert runs[0] == runs[1]
    assert runs[0][1] is not runs[1][1]


def test_a_reset_starts_the_samplers_random_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    resets: list[None] = []
    monkeypatch.setattr(engine.sampler, "reset", lambda: resets.append(None))
    engine.reset()
    assert len(resets) == 1


@pytest.mark.parametrize("mode", ENGINE_MODES)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_settle_can_be_repeated(mode: Mode, which: int, after: int) -> None:
    engine, slices = make_engine(mode, n_batch=4)
    engine.extend([i % 13 for i in range(15)])
    slices[which].interrupt_in = after
    with pytest.raises(Interrupted):
        engine.settle()
    assert len(engine.tokens) == 15
    assert_caches_exact(engine, slices)
    if mode in LOSSLESS:
        assert [s.token for s in engine.generate(3)] == full_depth(engine.tokens[:15], 3)


def test_the_sampler_hears_of_every_token_once_and_of_no_draft() -> None:
    for mode in ENGINE_MODES:
        engine, _ = make_engine(mode, noisy=True, thresholds=2.4)
        engine.extend(PROMPT)
        list(engine.generate(20))
        engine.extend([1, 2])
        list(engine.generate(5))
        assert cast(GreedySampler, engine.sampler).history == engine.tokens


def test_an_interruption_between_the_batches_of_a_settle_costs_its_audits_only() -> None:
    engine, slices = make_engine(Mode.EXIT, (2,), source=AllKnowing(), cap=10, n_batch=3)
    engine.extend(PROMPT)
    list(engine.generate(7))
    waiting = len(engine.tokens) - len(slices[-1].inputs)
    assert waiting > 3
    slices[-1].interrupt_in = 1
    with pytest.raises(Interrupted):
        engine.settle()
    assert 3 < len(slices[-1].inputs) < len(engine.tokens)  # what was settled before is not computed again
    assert_caches_exact(engine, slices)
    text = list(engine.tokens)
    steps = list(engine.generate(30))
    assert [s.token for s in steps] == full_depth(text, 30)
    assert all(a.agreed and a.position >= len(text) for s in steps for a in s.audits)


class InterruptedSampler(GreedySampler):
    """Ctrl-C right after a token was counted, before it is handed out."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def accept(self, token: int) -> None:
        super().accept(token)
        self.after -= 1
        if self.after == 0:
            raise Interrupted


@pytest.mark.parametrize("mode", ENGINE_MODES)
@pytest.mark.parametrize("after", range(1, 9))
def test_a_token_that_was_never_handed_out_never_was(mode: Mode, after: int) -> None:
    engine, slices = make_engine(mode, (2,), source=AllKnowing())
    engine.sampler = cast(Sampler, InterruptedSampler(len(PROMPT) + after))
    engine.extend(PROMPT)
    seen: list[int] = []
    with pytest.raises(Interrupted):
        seen.extend(step.token for step in engine.generate(20))
    assert len(seen) in (0, after - 1)  # extend() takes over all or nothing
    text = list(engine.tokens)
    assert text == PROMPT + full_depth(PROMPT, after - 1)
    assert cast(GreedySampler, engine.sampler).history == text
    assert [s.token for s in engine.generate(5)] == full_depth(text, 5)
    assert_caches_exact(engine, slices)


@pytest.mark.parametrize("seed", range(20))
def test_waiting_states_keep_their_order(seed: int) -> None:
    """Pushed when empty or while all that came before still waits, as the engine does; taken from either end."""
    random = np.random.default_rng(seed)
    capacity = int(random.integers(3, 9))
    waiting, made = WaitingStates(capacity, 2), 0
    expected: list[int] = []
    untouched = True  # nothing was taken from the front since it was last empty
    for _ in range(200):
        count = int(random.integers(0, capacity + 1))
        untouched = untouched or not expected
        match int(random.integers(3)):
            case 0 if len(expected) + count <= capacity and untouched:
                expected += list(range(made, made + count))
                waiting.push(np.array([[v, -v] for v in range(made, made + count)], np.float32).reshape(-1, 2))
                made += count
            case 1:
                waiting.drop_oldest(min(count, len(expected)))
                untouched = untouched and not count
                del expected[:count]
            case 2:
                waiting.drop_newest(min(count, len(expected)))
                del expected[len(expected) - min(count, len(expected)) :]
        assert len(waiting) == len(expected)
        rows = waiting.oldest(len(expected))
        assert rows.flags.c_contiguous
        assert rows.tolist() == [[v, -v] for v in expected]
        if expected:
            assert waiting.newest().tolist() == [expected[-1], -expected[-1]]
    assert made > 3 * capacity


def test_a_text_cannot_be_shorter_than_nothing() -> None:
    engine, slices = make_engine()
    engine.extend(PROMPT)
    list(engine.generate(2))
    with pytest.raises(UsageError, match="rolled back to -1"):
        engine.rollback(-1)
    assert_caches_exact(engine, slices)


def test_where_nothing_waits_a_batch_takes_one_way_through_all_slices() -> None:
    engine, slices = make_engine(Mode.EXIT, (1, 2, 4), cycling([(0.0, 0.0, 0.0), (0.0, math.inf, 0.0)]), cap=9)
    ways: list[tuple[int, int]] = []
    for piece in slices:
        real = piece.decode_tokens if piece.start == 0 else piece.decode_states

        def decode(*batch: Any, piece: FakeSlice = piece, real: Any = real, route: Any = None) -> None:
            ways.append((piece.start, route[-1].end if route else piece.end))
            real(*batch, route=route)

        setattr(piece, real.__name__, decode)
    engine.extend(PROMPT)
    list(engine.generate(1))
    assert ways == [(0, 6)]
    list(engine.generate(1))  # exits at 2, and waits there
    assert ways[1:] == [(0, 2)]
    ways.clear()
    list(engine.generate(1))  # needs depth: to where the other waits, and on together
    assert ways[-2:] == [(0, 2), (2, 6)]
    assert_caches_exact(engine, slices)
