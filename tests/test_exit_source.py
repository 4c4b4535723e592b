"""A pack's heads follow the text: what they say is what a head says that reads all states afresh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.draft import BoundaryView, Guess
from edge_runtime.engine import Engine
from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.asking import Asker
from edge_runtime.exits.gate import Gate
from edge_runtime.exits.head import HeadContext
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.source import PackHeads
from edge_runtime.exits.split import split
from edge_runtime.native import ContextOptions, Model
from edge_runtime.sampling import Sampler
from edge_runtime.signals import cosine, signals_of
from edge_runtime.slices import Slice, close_slices, open_slices
from edge_runtime.types import EngineSettings, Floats, Mode, SamplingSettings, Signals, Thresholds

from .conftest import TinyMaker
from .exit_fakes import random_pack

N_EMBD = 64
N_CTX = 128
BOUNDARIES = (1, 2, 4)
# On x86 the sums over a batch of 32 at most are those over single states, bit for bit. Where a processor's kernels add
# up in another order, keys and values kept in 16 bits may differ by half a thousandth; logits are about 1.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", n_layer=5)


@pytest.fixture(scope="module")
def pack(model_path: Path) -> ExitPack:
    return random_pack(model_path, BOUNDARIES)


@pytest.fixture(scope="module")
def paths(pack: ExitPack, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ...]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield split(pack, model_path)


def open_heads(paths: Sequence[Path], pack: ExitPack, **changes: Any) -> PackHeads:
    options = {"n_embd": N_EMBD, "n_ctx": N_CTX, "n_threads": 1, **changes}
    return PackHeads(paths, BOUNDARIES[: len(paths)], pack.shortlist, pack.cluster_starts, **options)


class Fresh:
    """The same head, which reads all states anew for every question."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.heads = [HeadContext(path, N_CTX, 1) for path in paths]

    def logits(self, boundary: int, states: Floats) -> Floats:
        head = self.heads[boundary - 1]
        head.forget(0)
        for start in range(0, len(states), head.n_batch):
            part = states[start : start + head.n_batch]
            head.decode(part, start, (len(part) - 1,))
        return head.logits((len(states) - 1) % head.n_batch).copy()

    def close(self) -> None:
        for head in self.heads:
            head.close()


@pytest.fixture(scope="module")
def fresh(paths: tuple[Path, ...]) -> Iterator[Fresh]:
    with closing(Fresh(paths)) as oracle:
        yield oracle


def check_guess(guess: Guess | None, logits: Floats, pack: ExitPack) -> None:
    """The guess is what follows from `logits` (n_rows,)."""
    n = len(pack.shortlist)
    if guess is None:
        assert logits[n] >= logits[:n].max() - TOLERANCE
        return
    assert logits[n] <= logits[:n].max() + TOLERANCE
    assert np.abs(guess.logits - logits[:n]).max() < TOLERANCE
    assert guess.ids is pack.shortlist
    expected = signals_of(logits, pack.cluster_starts, True)
    for name in ("entropy", "top1", "margin", "clusters", "other"):
        assert getattr(guess.signals, name) == pytest.approx(getattr(expected, name), abs=TOLERANCE)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), st.integers(1, 40)),
        st.tuples(st.just("guess"), st.integers(1, 3)),
        st.tuples(st.just("forget"), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, n_batch=st.sampled_from([2, 5, 32]), seed=st.integers(0, 99))
def test_heads_say_what_a_fresh_head_says(
    paths: tuple[Path, ...], pack: ExitPack, fresh: Fresh, steps: list[tuple[str, Any]], n_batch: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    known = [np.empty((0, N_EMBD), np.float32) for _ in BOUNDARIES]

    def observe(boundary: int, n: int) -> None:
        rows = random.standard_normal((min(n, N_CTX - len(known[boundary - 1])), N_EMBD)).astype(np.float32)
        if len(rows):
            view = rows.copy()
            heads.observe(boundary, len(known[boundary - 1]), view)
            view[:] = np.nan  # as llama.cpp's buffers do not outlive the call
            known[boundary - 1] = np.concatenate([known[boundary - 1], rows])

    with closing(open_heads(paths, pack, n_batch=n_batch)) as heads:
        for action, value in steps:
            if action == "observe":
                # slices of an engine come along at their own pace, a later one never before
                length = len(known[0]) + value
                observe(1, value)
                for boundary in (2, 3):
                    if random.random() < 0.5:
                        observe(boundary, min(length, N_CTX) - len(known[boundary - 1]))
            elif action == "forget":
                length = int(len(known[0]) * value)
                heads.forget(length)
                known = [states[:length] for states in known]
            else:
                length = len(known[0]) + 1
                if length > N_CTX:
                    continue
                for boundary in range(1, value + 1):
                    observe(boundary, length - len(known[boundary - 1]))
                view = BoundaryView(value, range(length), known[value - 1][-1], None)
                guess = heads.guess(view)
                check_guess(guess, fresh.logits(value, known[value - 1]), pack)
                if guess is not None and value > 1:
                    expected = cosine(known[value - 2][-1], known[value - 1][-1])
                    assert guess.signals.stability == pytest.approx(expected, abs=1e-6)
                elif guess is not None:
                    assert math.isnan(guess.signals.stability)


@dataclasses.dataclass(frozen=True)
class Script:
    """Stands for Gate: what it was asked, and a probability of its own."""

    value: float
    asked: list[Signals] = dataclasses.field(default_factory=list)

    def probability(self, signals: Signals) -> float:
        self.asked.append(signals)
        return self.value


def guess_at(heads: PackHeads, boundary: int, states: Sequence[Floats]) -> Guess | None:
    """The guess at a boundary after one state (1, n_embd) at each up to it."""
    for b in range(1, boundary + 1):
        heads.observe(b, 0, states[b - 1])
    return heads.guess(BoundaryView(boundary, [7], states[boundary - 1][0], None))


@pytest.fixture
def states() -> list[Floats]:
    random = np.random.default_rng(3)
    return [random.standard_normal((1, N_EMBD)).astype(np.float32) for _ in BOUNDARIES]


@pytest.mark.parametrize("signal", ["entropy", "top1", "margin", "clusters", "stability", "gate"])
def test_the_signal_that_was_chosen_decides(
    paths: tuple[Path, ...], pack: ExitPack, states: list[Floats], signal: str
) -> None:
    gates = [Script(0.1 * b) for b in (1, 2, 3)]
    with closing(open_heads(paths, pack, signal=signal, gates=cast(list[Gate], gates))) as heads:
        guess = guess_at(heads, 2, states)
    assert guess is not None
    s = guess.signals
    expected = {
        "entropy": s.entropy,
        "top1": 1 - s.top1,
        "margin": 1 - s.margin,
        "clusters": s.clusters,
        "stability": 1 - cosine(states[0][0], states[1][0]),
        "gate": 0.2,
    }
    assert guess.uncertainty == pytest.approx(expected[signal])
    if signal == "gate":
        (asked,) = gates[1].asked
        assert dataclasses.replace(s, gate=math.nan).top1 == asked.top1
        assert asked.stability == pytest.approx(cosine(states[0][0], states[1][0]))
    assert not gates[0].asked
    assert not gates[2].asked


def test_a_position_is_asked_about_once(paths: tuple[Path, ...], pack: ExitPack, states: list[Floats]) -> None:
    with closing(open_heads(paths, pack)) as heads:
        view = BoundaryView(1, [7], states[0][0], None)
        assert heads.guess(view) is None  # nothing was shown
        assert guess_at(heads, 1, states) is not None
        assert heads.guess(view) is None
        heads.forget(0)
        assert guess_at(heads, 1, states) is not None


def test_a_head_that_expects_another_token_has_no_guess(tiny_path: TinyMaker, tmp_path: Path) -> None:
    """Its last row stands for all tokens outside the shortlist."""
    path = tiny_path("llama", n_layer=5)
    pack = random_pack(path, (2,), seed=1)
    head = pack.heads[0]
    loud = dataclasses.replace(head, tensors={**head.tensors, "other": 8 * cast(Floats, head.tensors["other"])})
    pack = dataclasses.replace(pack, heads=(loud,))
    found = {True: 0, False: 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
        files = split(pack, path)
    rows = np.random.default_rng(0).standard_normal((300, 1, N_EMBD)).astype(np.float32)
    with closing(open_heads(files, pack)) as heads, closing(Fresh(files)) as oracle:
        for row in rows:
            heads.forget(0)
            heads.observe(1, 0, row)
            guess = heads.guess(BoundaryView(1, [7], row[0], None))
            logits = oracle.logits(1, row)
            check_guess(guess, logits, pack)
            found[guess is None] += 1
    assert min(found.values()) > 0


def test_what_does_not_fit_together_is_refused(paths: tuple[Path, ...], pack: ExitPack) -> None:
    with pytest.raises(UsageError, match="no signal 'mood'"):
        open_heads(paths, pack, signal="mood")
    with pytest.raises(UsageError, match="0 gates were given for 3 heads"):
        open_heads(paths, pack, signal="gate")
    with pytest.raises(PackError, match="behind layer 1 has 65 rows, a shortlist of 63 tokens needs 64"):
        PackHeads(paths, BOUNDARIES, pack.shortlist[:-1], pack.cluster_starts, n_embd=N_EMBD, n_ctx=32, n_threads=1)


# ── with the engine ─────────────────────────────────────────────────────────────────────────────────────────────────


class Checked(PackHeads):
    """Compares every guess with one from nothing: fresh heads on all states, which are those of fresh slices."""

    def attach(self, model: Model, fresh: Fresh, pack: ExitPack) -> None:
        options = ContextOptions(n_ctx=N_CTX, n_batch=32, n_threads=1)
        self.whole = [Slice(model, 0, layer, options) for layer in BOUNDARIES]
        self.seen = [np.empty((0, N_EMBD), np.float32) for _ in BOUNDARIES]
        self.fresh, self.pack, self.checked, self.farthest = fresh, pack, 0, 0.0

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        super().observe(boundary, first_pos, states)
        assert first_pos == len(self.seen[boundary - 1])
        self.seen[boundary - 1] = np.concatenate([self.seen[boundary - 1], states])

    def forget(self, length: int) -> None:
        super().forget(length)
        self.seen = [states[:length] for states in self.seen]

    def guess(self, view: BoundaryView) -> Guess | None:
        found = super().guess(view)
        piece, tokens, seen = self.whole[view.boundary - 1], list(view.tokens), self.seen[view.boundary - 1]
        check_guess(found, self.fresh.logits(view.boundary, seen), self.pack)
        piece.remove(0)
        states = []
        for start in range(0, len(tokens), 32):
            part = tokens[start : start + 32]
            piece.decode_tokens(part, start)
            states.append(piece.hidden(len(part)).copy())
        whole = np.concatenate(states)
        assert whole.shape == seen.shape
        self.farthest = max(self.farthest, float(np.abs(whole - seen).max() / np.abs(whole).max()))
        self.checked += 1
        return found


@pytest.mark.parametrize("mode", [Mode.EXIT, Mode.VERIFIED])
def test_heads_in_the_engine_follow_the_text(
    mode: Mode, model_path: Path, paths: tuple[Path, ...], pack: ExitPack, fresh: Fresh
) -> None:
    """Prompts in several batches, exits at all boundaries, settles, refused drafts, a rollback, an early stop."""
    random = np.random.default_rng(0)
    options = ContextOptions(n_ctx=N_CTX, n_batch=16, n_threads=1)
    layer_of_exit: set[int | None] = set()
    with Model(str(model_path)) as model:
        heads = Checked(paths, BOUNDARIES, pack.shortlist, pack.cluster_starts, n_embd=N_EMBD, n_ctx=N_CTX, n_threads=1)
        heads.attach(model, fresh, pack)
        slices = open_slices(model, BOUNDARIES, options, n_outputs_max=5)
        sampler = Sampler(SamplingSettings(), model.n_vocab)
        limits = (0.0, 1e-9, 3.0, math.inf)
        engine = Engine(
            slices,
            sampler,
            EngineSettings(mode, cap=4),
            lambda: Thresholds(tuple(float(random.choice(limits)) for _ in BOUNDARIES)),
            heads,
        )
        engine.extend([int(t) for t in random.integers(0, 500, 37)])
        for n, kept in ((20, 45), (9, 41), (30, 60)):
            layer_of_exit |= {step.boundary for step in engine.generate(n)}
            engine.rollback(kept)
            engine.extend([3, 4])
        engine.settle()
        list(engine.generate(5))
        text, drafted = list(engine.tokens), engine.stats.drafted
        if mode is Mode.EXIT:
            assert layer_of_exit == {None, *BOUNDARIES}
        else:
            assert drafted > 10
            close_slices(slices)
            slices = open_slices(model, BOUNDARIES, options)
            full = Engine(slices, sampler, EngineSettings(), lambda: Thresholds((0.0,) * 3))
            full.extend(text[:-5])
            assert [step.token for step in full.generate(5)] == text[-5:]
        assert heads.checked > 40
        # the engine's batches are others than the oracle's, and keys and values are of 16 bits
        assert heads.farthest < 5e-3
        heads.close()
        close_slices([*slices, *heads.whole])
        sampler.close()


def test_a_head_that_is_not_asked_still_hears_all(paths: tuple[Path, ...], pack: ExitPack, fresh: Fresh) -> None:
    """The asker decides by the state alone; what it passed over is in the context of later guesses."""
    random = np.random.default_rng(5)
    states = random.standard_normal((20, N_EMBD)).astype(np.float32)
    weights = random.standard_normal(N_EMBD).astype(np.float32)
    asker = Asker(weights, 0.0)
    with closing(open_heads(paths[:1], pack, askers=[asker])) as heads:
        n_asked = 0
        for position, state in enumerate(states):
            heads.observe(1, position, state[None])
            guess = heads.guess(BoundaryView(1, range(position + 1), state, None))
            if state @ weights < 0:
                assert guess is None
            else:
                n_asked += 1
                check_guess(guess, fresh.logits(1, states[: position + 1]), pack)
        assert 0 < n_asked < 20
    with pytest.raises(UsageError, match="askers"):
        open_heads(paths, pack, askers=[asker])
