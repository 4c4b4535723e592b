"""What the engine shows a source that follows the text: every state that passes a boundary, once and in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft import BoundaryView, Guess
from edge_runtime.engine import Engine
from edge_runtime.signals import signals_of
from edge_runtime.types import Floats, Mode

from .fakes import FakeSlice, Interrupted, head, oracle_states
from .test_engine import ACTIONS, LIMITS, N_LAYER, PROMPT, apply_actions, cycling, full_depth, make_engine


class Follower:
    """Keeps what it is shown, as a head's KV cache would, and checks it whenever it is asked."""

    wants_logits = False

    def __init__(self, boundaries: Collection[int], *, wants_states: bool = True, silent_every: int = 0) -> None:
        self.wants_states = wants_states
        self.boundaries, self.silent_every = boundaries, silent_every
        self.states: dict[int, list[list[int]]] = {b: [] for b in boundaries}
        self.slices: list[FakeSlice] = []
        self.asked = self.shown = 0
        self.interrupt_in: int | None = None  # calls of observe until one is interrupted

    def speaks_at(self, boundary: int) -> bool:
        return boundary in self.boundaries

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        assert self.wants_states
        known = self.states[boundary]
        assert first_pos == len(known), f"position {first_pos} at boundary {boundary} after {len(known)}"
        rows = [[int(v) for v in row] for row in states]
        if self.interrupt_in is not None:
            self.interrupt_in -= 1
            if self.interrupt_in < 0:
                self.interrupt_in = None
                known += rows[: len(rows) // 2]
                raise Interrupted
        known += rows
        self.shown += len(rows)

    def forget(self, length: int) -> None:
        assert self.wants_states
        for known in self.states.values():
            del known[length:]

    def check(self) -> None:
        """What is known at boundary i is what slice i - 1 has done."""
        for boundary, known in self.states.items():
            assert len(known) == len(self.slices[boundary - 1].inputs)

    def guess(self, view: BoundaryView) -> Guess | None:
        self.asked += 1
        assert view.hidden is not None
        if self.wants_states:
            self.check()
            assert len(self.states[view.boundary]) == len(view.tokens)
            for boundary, known in self.states.items():
                assert known == oracle_states(view.tokens, self.slices[boundary - 1].end)[: len(known)]
            assert view.hidden.tolist() == self.states[view.boundary][-1]
        if self.silent_every and self.asked % self.silent_every == 0:
            return None
        logits = head([int(v) for v in view.hidden])
        signals = signals_of(logits)
        return Guess(logits, signals, signals.entropy)


def follow(mode: Mode, source: Follower, **options: Any) -> tuple[Engine, list[FakeSlice]]:
    engine, slices = make_engine(mode, source=source, **options)
    source.slices = slices
    return engine, slices


def interrupt_source(engine: Engine, source: Follower, after: int, n: int) -> None:
    """Ctrl-C while the source looks at states."""
    text, seen = list(engine.tokens), []
    source.interrupt_in = after
    try:
        for step in engine.generate(n) if text else ():
            seen.append(step.token)
    except Interrupted:
        pass
    source.interrupt_in = None
    assert engine.tokens == text + seen


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from([Mode.EXIT, Mode.VERIFIED]),
    boundaries=st.lists(st.integers(1, N_LAYER - 1), unique=True, min_size=1, max_size=4).map(sorted),
    data=st.data(),
    cap=st.integers(1, 7),
    n_batch=st.integers(2, 9),
    silent_every=st.integers(0, 4),
    actions=st.lists(
        st.one_of(
            ACTIONS, st.tuples(st.just("interrupt source"), st.integers(0, 9), st.integers(1, 8)).map(lambda a: [a])
        ),
        max_size=4,
    ),
)
def test_whatever_is_done_to_the_engine_the_source_knows_the_states_of_the_text(
    mode: Mode,
    boundaries: list[int],
    data: st.DataObject,
    cap: int,
    n_batch: int,
    silent_every: int,
    actions: list[list[tuple[Any, ...]]],
) -> None:
    values = data.draw(st.lists(st.tuples(*[LIMITS for _ in boundaries]), min_size=1, max_size=5))
    spoken = data.draw(st.sets(st.integers(1, len(boundaries)), min_size=1))
    source = Follower(spoken, silent_every=silent_every)
    engine, slices = follow(
        mode, source, boundaries=boundaries, thresholds=cycling(values), cap=cap, n_batch=n_batch, audit_rate=0.7
    )
    engine.extend(PROMPT)
    for action in itertools.chain(*actions):
        if action[0] == "interrupt source":
            interrupt_source(engine, source, *action[1:])
        else:
            apply_actions(engine, slices, [action])
        source.check()
    if engine.tokens:
        text = list(engine.tokens)
        engine.settle()
        source.check()
        assert all(known == oracle_states(text, slices[b - 1].end) for b, known in source.states.items())
        if mode is Mode.VERIFIED:
            assert [s.token for s in engine.generate(6)] == full_depth(text, 6)
        else:
            list(engine.generate(6))
        source.check()


def test_a_prompt_is_shown_before_the_first_guess() -> None:
    source = Follower({1, 2})
    engine, _ = follow(Mode.EXIT, source, thresholds=lambda: _limits(0.0, math.inf), n_batch=4)
    engine.extend([i % 13 for i in range(19)])
    list(engine.generate(1))
    assert [len(known) for known in source.states.values()] == [19, 19]
    assert source.asked == 1


@pytest.mark.parametrize("limits", [(0.0, 0.0), (math.inf, math.inf)])
def test_each_position_is_shown_once(limits: tuple[float, float]) -> None:
    source = Follower({1, 2})
    engine, slices = follow(Mode.EXIT, source, thresholds=lambda: _limits(*limits))
    engine.extend(PROMPT)
    list(engine.generate(30))
    engine.settle()
    assert source.shown == sum(len(piece.inputs) for piece in slices[:2])


@pytest.mark.parametrize("mode", [Mode.EXIT, Mode.VERIFIED])
def test_a_source_that_follows_nothing_is_shown_nothing(mode: Mode) -> None:
    source = Follower({1, 2}, wants_states=False)  # fails where it is shown or told anything
    engine, _ = follow(mode, source)
    engine.extend(PROMPT)
    list(engine.generate(20))
    engine.rollback(3)
    engine.settle()
    assert source.asked > 0


def test_in_mode_full_no_state_is_shown() -> None:
    source = Follower({1, 2})
    engine, _ = follow(Mode.FULL, source)
    engine.extend(PROMPT)
    assert [s.token for s in engine.generate(10)] == full_depth(PROMPT, 10)
    assert source.shown == 0


def _limits(*values: float) -> Any:
    return cycling([values])()
