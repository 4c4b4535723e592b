"""A pack's heads for several texts: what they say of each is what heads of its own would say, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft import BoundaryView, Guess
from edge_runtime.errors import DecodeError, UsageError
from edge_runtime.exits.asking import Asker
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.source import BatchHeads, PackHeads
from edge_runtime.exits.split import split
from edge_runtime.native import available_kernels
from edge_runtime.types import Floats

from .conftest import TinyMaker
from .exit_fakes import random_pack

pytestmark = pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor")

N_EMBD, N_CTX = 64, 96
BOUNDARIES = (1, 3)


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


class Texts:
    """Heads for several texts beside heads of one for each, shown and asked the same."""

    def __init__(self, paths: Sequence[Path], pack: ExitPack, n: int, opened: ExitStack) -> None:
        askers = [Asker(asker.weights, 0.0) for asker in pack.askers]
        arguments = paths, BOUNDARIES, pack.shortlist, pack.cluster_starts, pack.gates, "gate", askers
        options: dict[str, Any] = {"n_embd": N_EMBD, "n_ctx": N_CTX, "n_threads": 1, "kernels": "edge"}
        self.together = BatchHeads(*arguments, **options, n_sequences=n)
        opened.callback(self.together.close)
        self.alone = [PackHeads(*arguments, **options) for _ in range(n)]
        for heads in self.alone:
            opened.callback(heads.close)
        self.known = [[np.empty((0, N_EMBD), np.float32) for _ in BOUNDARIES] for _ in range(n)]

    def observe(self, sequence: int, boundary: int, states: Floats) -> None:
        known = self.known[sequence][boundary - 1]
        view = states.copy()
        self.together.observe(sequence, boundary, len(known), view)
        view[:] = np.nan
        self.alone[sequence].observe(boundary, len(known), states)
        self.known[sequence][boundary - 1] = np.concatenate([known, states])

    def forget(self, sequence: int, length: int) -> None:
        self.together.forget(sequence, length)
        self.alone[sequence].forget(length)
        self.known[sequence] = [states[:length] for states in self.known[sequence]]

    def copy(self, source: int, target: int) -> None:
        self.together.copy(source, target)
        self.alone[target].forget(0)
        for boundary, states in enumerate(self.known[source], start=1):
            if len(states):
                self.alone[target].observe(boundary, 0, states)
        self.known[target] = list(self.known[source])

    def ask(self, boundary: int, sequences: Sequence[int]) -> int:
        """How many guesses there were; asked once for each, as an engine does."""
        views = [
            BoundaryView(boundary, range(len(self.known[s][boundary - 1])), self.known[s][boundary - 1][-1], None)
            for s in sequences
        ]
        found = self.together.guesses(list(zip(sequences, views, strict=True)))
        for sequence, view, guess in zip(sequences, views, found, strict=True):
            expected = self.alone[sequence].guess(view)
            assert (guess is None) == (expected is None)
            if guess is not None and expected is not None:
                check_same(guess, expected)
        return sum(guess is not None for guess in found)


def check_same(guess: Guess, expected: Guess) -> None:
    assert np.array_equal(guess.logits, expected.logits)
    assert guess.ids is expected.ids
    assert np.array_equal(guess.uncertainty, expected.uncertainty)
    for name in ("entropy", "top1", "margin", "clusters", "stability", "other", "gate"):
        assert np.array_equal(getattr(guess.signals, name), getattr(expected.signals, name), equal_nan=True)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sets(st.integers(0, 9), min_size=1), st.integers(1, 30)),
        st.tuples(st.just("forget"), st.integers(0, 9), st.floats(0, 1)),
        st.tuples(st.just("copy"), st.integers(0, 9), st.integers(0, 9), st.floats(0, 1)),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, n=st.sampled_from([1, 2, 4, 10]), seed=st.integers(0, 99))
def test_guesses_are_those_of_heads_for_each_text(
    paths: tuple[Path, ...], pack: ExitPack, steps: list[tuple[Any, ...]], n: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    with ExitStack() as opened:
        texts = Texts(paths, pack, n, opened)
        for kind, *values in steps:
            if kind == "ask":
                chosen, count = values
                asked = sorted({s % n for s in chosen if len(texts.known[s % n][0]) + count <= N_CTX})
                for boundary in (1, 2):
                    for s in asked:
                        due = (
                            len(texts.known[s][0]) + (count if boundary == 1 else 0) - len(texts.known[s][boundary - 1])
                        )
                        if due:
                            texts.observe(s, boundary, random.standard_normal((due, N_EMBD)).astype(np.float32))
                    if asked:
                        texts.ask(boundary, asked)
                    asked = [s for s in asked if random.random() < 0.7]  # the others left
            elif kind == "forget":
                sequence, share = values
                texts.forget(sequence % n, int(share * len(texts.known[sequence % n][-1])))
            elif values[0] % n != values[1] % n:
                source, target, share = values[0] % n, values[1] % n, values[2]
                texts.copy(source, target)
                # a copy goes on from what all boundaries have seen
                texts.forget(target, int(share * len(texts.known[source][-1])))


def test_guesses_there_are(paths: tuple[Path, ...], pack: ExitPack) -> None:
    random, found = np.random.default_rng(1), 0
    with ExitStack() as opened:
        texts = Texts(paths, pack, 10, opened)
        for _ in range(20):
            for s in range(10):
                texts.observe(s, 1, random.standard_normal((1 + s % 3, N_EMBD)).astype(np.float32))
            found += texts.ask(1, range(10))
    assert 50 < found < 200


def test_a_failure_leaves_heads_that_can_go_back(paths: tuple[Path, ...], pack: ExitPack) -> None:
    """Of what was computed and not counted, nothing stays after the engine's way back."""
    random = np.random.default_rng(2)
    with ExitStack() as opened:
        texts = Texts(paths, pack, 2, opened)
        shown = [random.standard_normal((9, N_EMBD)).astype(np.float32) for _ in range(2)]
        for s in range(2):
            texts.observe(s, 1, shown[s])
        head: Any = texts.together._contexts[0]
        decode = head.decode

        def fails(*arguments: Any) -> None:
            decode(*arguments)
            raise DecodeError("too late")

        head.decode = fails
        views = [(s, BoundaryView(1, range(9), None, None)) for s in range(2)]
        with pytest.raises(DecodeError):
            texts.together.guesses(views)
        head.decode = decode
        for s in range(2):
            texts.forget(s, 4)
            texts.observe(s, 1, shown[s][4:])
        texts.ask(1, (0, 1))


def test_threads_are_those_of_all_heads(paths: tuple[Path, ...], pack: ExitPack) -> None:
    with closing(
        BatchHeads(
            paths,
            BOUNDARIES,
            pack.shortlist,
            pack.cluster_starts,
            n_embd=N_EMBD,
            n_ctx=N_CTX,
            n_threads=1,
            n_sequences=3,
        )
    ) as heads:
        heads.set_threads(2)
        with pytest.raises(UsageError, match="0 threads"):
            heads.set_threads(0)
