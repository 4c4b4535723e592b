"""Several conversations with early exits: each gets what mode exit gives it alone, whatever the others do."""

from __future__ import annotations

import itertools
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.batching import Event, ExitBatchEngine, Finished, OwnSources, Question, Request, Token
from edge_runtime.batching.pool import WORTH_KEEPING
from edge_runtime.draft import BoundaryView, Guess, SharedHead
from edge_runtime.errors import DecodeError, UsageError
from edge_runtime.exits.asking import Asker
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.source import BatchHeads, PackHeads
from edge_runtime.exits.split import split
from edge_runtime.native import ContextOptions, Model, available_kernels
from edge_runtime.summary import Finish
from edge_runtime.types import EngineSettings, Mode, Thresholds

from .batching_helpers import FREE, Alone, AloneWithExits, check_events, check_free, run
from .conftest import TinyMaker
from .exit_fakes import random_pack
from .fakes import Interrupted
from .test_batching_engine import ARRIVALS, PROMPTS, SAMPLED, SAMPLINGS, error_of, finish_of, text

pytestmark = pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor")

N_CTX = 120  # of each conversation
N_BATCH = 32
N_LAYER = 5
BOUNDARIES = (1, 2, 4)
SETTINGS = EngineSettings(Mode.EXIT, cap=4, audit_rate=1.0)
SOME, MANY, NONE = (0.6, 1.0, 1.5), (math.inf,) * 3, (0.0,) * 3


class Lab:
    """A tiny model with a random pack, engines for several conversations, and the oracle of one."""

    def __init__(self, model: Model, pack: ExitPack, paths: Sequence[Path]) -> None:
        self.model, self.pack, self.paths = model, pack, paths
        self._stack = ExitStack()
        self._oracles: dict[tuple[tuple[float, ...], int], AloneWithExits] = {}

    def _arguments(self) -> tuple[Any, ...]:
        pack = self.pack
        return self.paths, BOUNDARIES, pack.shortlist, pack.cluster_starts, pack.gates, "entropy", pack.askers

    def alone(self, limits: tuple[float, ...] = SOME, cap: int = SETTINGS.cap) -> AloneWithExits:
        if (limits, cap) not in self._oracles:
            options: dict[str, Any] = {"n_embd": self.pack.model.n_embd, "n_ctx": N_CTX, "n_threads": 1}
            heads = PackHeads(*self._arguments(), **options, kernels=self.model.kernels)
            self._stack.callback(heads.close)
            chosen = replace(SETTINGS, cap=cap)
            oracle = AloneWithExits(self.model, BOUNDARIES, heads, Thresholds(limits), chosen, N_CTX, N_BATCH)
            self._stack.callback(oracle.close)
            self._oracles[limits, cap] = oracle
        return self._oracles[limits, cap]

    @contextmanager
    def opened(
        self,
        n: int = 3,
        limits: tuple[float, ...] | Callable[[], Thresholds] = SOME,
        costs: Sequence[float] = FREE,
        **changes: Any,
    ) -> Iterator[ExitBatchEngine]:
        asked = {"cap": SETTINGS.cap, "audit_rate": 1.0, "n_batch": N_BATCH, "n_ctx": N_CTX} | changes
        options: dict[str, Any] = {"n_embd": self.pack.model.n_embd, "n_ctx": asked["n_ctx"], "n_threads": 1}
        heads = BatchHeads(*self._arguments(), **options, kernels=self.model.kernels, n_sequences=n)
        contexts = ContextOptions(n * asked["n_ctx"], asked["n_batch"], n, n_threads=1, flash_attention=True)
        chosen = EngineSettings(Mode.EXIT, asked["cap"], asked["audit_rate"])
        thresholds = limits if callable(limits) else lambda: Thresholds(limits)
        clock = itertools.count().__next__
        try:
            with ExitBatchEngine(
                self.model,
                contexts,
                BOUNDARIES,
                thresholds,
                heads,
                chosen,
                costs=costs,
                clock=lambda: float(clock()),
            ) as engine:
                yield engine
        finally:
            heads.close()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def lab(tiny_path: TinyMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Heads are asked for about two thirds of the tokens, so that at others their states wait."""
    path = tiny_path("llama", n_layer=N_LAYER, n_vocab=96, weights="Q8_0")
    pack = random_pack(path, BOUNDARIES, n_rows=65)
    pack = replace(pack, askers=tuple(Asker(asker.weights, -4.0) for asker in pack.askers))
    with pytest.MonkeyPatch.context() as patch, Model(str(path), kernels="edge") as model:
        patch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Lab(model, pack, split(pack, path))
        yield made
        made.close()


def check_steps(lab: Lab, events: Sequence[Event], requests: Sequence[Request], limits: tuple[float, ...]) -> None:
    """Tokens, depths and audits are those of mode exit alone."""
    for request in requests:
        told = [event for event in events if isinstance(event, Token) and event.request is request]
        steps = lab.alone(limits).steps(request.question)
        assert [(e.token, e.position, e.depth, e.boundary, e.audits) for e in told] == [
            (step.token, step.position, step.depth, step.boundary, step.audits) for step in steps
        ]
        assert request.stats.by_depth == Counter(step.depth for step in steps)
        assert request.stats.exits == sum(step.boundary is not None for step in steps)
        assert request.stats.audited == sum(len(step.audits) for step in steps)


# ── the same tokens as alone ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("limits", [SOME, MANY, (0.0, 1.2, 0.0), NONE])
@pytest.mark.parametrize("costs", [FREE, (1.0,)], ids=["padded", "bare"])
def test_every_request_gets_what_it_gets_alone(
    lab: Lab, n: int, limits: tuple[float, ...], costs: tuple[float, ...]
) -> None:
    questions = [Question(p, 40, s) for p, s in zip(PROMPTS, itertools.cycle(SAMPLINGS), strict=False)]
    with lab.opened(n, limits, costs) as engine:
        requests = [engine.submit(question) for question in questions]
        events = run(engine)
        check_events(events, requests)
        check_free(engine)
        stats = engine.stats
    check_steps(lab, events, requests, limits)
    assert stats.published == 40 * len(requests)
    assert stats.exits == sum(request.stats.exits for request in requests)
    assert (stats.exits > 60) == (limits != NONE)
    assert stats.audited == sum(request.stats.audited for request in requests)
    assert 0 <= stats.disagreed <= stats.audited
    if costs != FREE or n == 1:
        assert stats.padding == 0


def test_without_thresholds_it_is_full_depth(lab: Lab) -> None:
    oracle = Alone(lab.model, N_CTX, N_BATCH)
    with lab.opened(3, NONE) as engine:
        requests = [engine.submit(Question(prompt, 30, SAMPLED)) for prompt in PROMPTS]
        run(engine)
        assert engine.stats.by_depth == {N_LAYER: 30 * len(PROMPTS)}
    assert [request.answer for request in requests] == [oracle.answer(request.question) for request in requests]
    oracle.close()


def test_tokens_leave_at_every_boundary(lab: Lab) -> None:
    with lab.opened(4) as engine:
        for prompt in PROMPTS:
            engine.submit(Question(prompt, 40))
        run(engine)
        assert set(engine.stats.by_depth) == {*BOUNDARIES, N_LAYER}
        assert 0 < engine.stats.disagreed < engine.stats.audited


@pytest.mark.parametrize("n_prompt", [1, 3, 4, 5, 32, 33, 34, 36, 37, 64, 65, 70])
def test_a_prompts_newest_token_exits_where_it_does_alone(lab: Lab, n_prompt: int) -> None:
    """Whatever the company leaves of a batch, and whatever the KV cache holds."""
    question = Question(text(1, 2, 3, 4, 5, 6)[:n_prompt], 12)
    with lab.opened(3, MANY) as engine:
        engine.submit(Question(text(7, 8), 9))
        engine.step()
        requests = [engine.submit(question), engine.submit(Question(text(9, 9, 9, 9, 9), 12))]
        events = run(engine)
        requests.append(engine.submit(question))
        events += run(engine)
        assert requests[-1].stats.reused_tokens == n_prompt - 1 or n_prompt <= 5
    check_steps(lab, events, requests, MANY)
    assert (requests[0].stats.by_depth.get(1, 0) > 0) or n_prompt == 1


@pytest.mark.parametrize("cap", [1, 2, 7])
def test_the_cap_forces_a_settle_of_each_sequence(lab: Lab, cap: int) -> None:
    with lab.opened(3, (math.inf, 0.0, 0.0), cap=cap, n_batch=24) as engine:
        requests = [engine.submit(Question(prompt, 30)) for prompt in PROMPTS[:5]]
        longest = 0
        while not engine.idle:
            engine.step()
            for flow in engine._flows:
                if not flow.moving:
                    longest = max(longest, flow.n_done[0] - flow.n_done[-1])
        check_free(engine)
        assert longest == cap
    with lab.opened(1, (math.inf, 0.0, 0.0), cap=cap, n_batch=24) as engine:
        for request in requests:
            again = engine.submit(request.question)
            run(engine)
            assert again.answer == request.answer


def test_thresholds_are_read_once_per_step_and_may_change(lab: Lab) -> None:
    """With nothing that draws, a text depends on its own depths alone: so all go deep again when the bounds fall."""
    values = itertools.cycle([MANY, NONE])
    n_read = itertools.count()

    def thresholds() -> Thresholds:
        next(n_read)
        return Thresholds(next(values))

    with lab.opened(3, thresholds) as engine:
        next(n_read)
        for prompt in PROMPTS[2:5]:
            engine.submit(Question(prompt, 20))
        n_steps = 0
        while not engine.idle:
            events = engine.step()
            n_steps += 1
            # the first reading was the constructor's
            deep = n_steps % 2 == 1
            assert not deep or all(e.depth == N_LAYER for e in events if isinstance(e, Token))
        assert next(n_read) == n_steps + 2
        assert engine.stats.exits > 15


def test_the_models_own_head_guesses_for_many(lab: Lab) -> None:
    """The plain logit lens, by entropy and by stability, which needs the states of the boundary before."""
    n, layers = 3, (2, 4)
    contexts = ContextOptions(n * N_CTX, N_BATCH, n, n_threads=1, flash_attention=True)
    for name, bounds in (("entropy", (1.1, 1.0)), ("stability", (1.0, 0.3))):
        limits = Thresholds(bounds)
        oracle = AloneWithExits(lab.model, layers, SharedHead(name), limits, SETTINGS, N_CTX, N_BATCH)
        sources = OwnSources(partial(SharedHead, name), n)
        with ExitBatchEngine(lab.model, contexts, layers, lambda limits=limits: limits, sources, SETTINGS) as engine:
            requests = [engine.submit(Question(p, 30, s)) for p, s in zip(PROMPTS, SAMPLINGS * 3, strict=False)]
            run(engine)
            check_free(engine)
            assert 20 < engine.stats.exits < 160
        assert [request.answer for request in requests] == [oracle.answer(r.question) for r in requests]
        oracle.close()


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_other_architectures(
    tiny_path: TinyMaker, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    path = tiny_path(architecture, n_layer=N_LAYER + 2, n_vocab=96, weights="Q8_0")
    pack = random_pack(path, BOUNDARIES, n_rows=65)
    with Model(str(path), kernels="edge") as model:
        lab = Lab(model, pack, split(pack, path))
        with lab.opened(3) as engine:
            requests = [engine.submit(Question(prompt, 20)) for prompt in PROMPTS]
            events = run(engine)
            assert engine.stats.exits > 10
        check_steps(lab, events, requests, SOME)
        lab.close()


def test_with_stock_kernels_all_get_their_answers(tiny_path: TinyMaker, lab: Lab) -> None:
    """Not always the same tokens: stock's sums depend on the company."""
    path = tiny_path("llama", n_layer=N_LAYER, n_vocab=96, weights="Q8_0")
    with Model(str(path), kernels="stock") as model:
        stock = Lab(model, lab.pack, lab.paths)
        with stock.opened(3) as engine:
            requests = [engine.submit(Question(prompt, 20, SAMPLED)) for prompt in PROMPTS]
            check_events(run(engine), requests)
            check_free(engine)
            assert all(len(request.answer) == 20 for request in requests)
            assert engine.stats.exits > 0


# ── arrivals, cancels, failures, interruptions ──────────────────────────────────────────────────────────────────────


class Unruly:
    """Stands before what an engine computes with, slices and heads, and raises in the middle of things when told to."""

    def __init__(self, engine: ExitBatchEngine) -> None:
        self.raises: BaseException | None = None
        self.after = 0  # calls until then
        self.late = False  # only when everything was computed
        first, *rest = engine.slices
        first.decode_tokens = self._guard(first.decode_tokens)  # type: ignore[method-assign]
        for piece in rest:
            piece.decode_states = self._guard(piece.decode_states)  # type: ignore[method-assign]
        sources: Any = engine._sources
        for name in ("guesses", "observe"):
            setattr(sources, name, self._guard(getattr(sources, name)))

    def _guard(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            due, self.after = self.raises if self.after <= 0 else None, self.after - 1
            found = real(*arguments) if due is None or self.late else None
            if due is not None:
                self.raises = None
                raise due
            return found

        return call


@settings(max_examples=100, deadline=None)
@given(
    actions=ARRIVALS,
    n=st.integers(1, 4),
    limits=st.sampled_from([SOME, SOME, MANY]),
    costs=st.sampled_from([FREE, (1.0,)]),
    after=st.integers(0, 30),
)
def test_any_arrivals_cancels_failures_and_interruptions(
    lab: Lab,
    actions: list[tuple[Any, ...]],
    n: int,
    limits: tuple[float, ...],
    costs: tuple[float, ...],
    after: int,
) -> None:
    events: list[Event] = []
    requests: list[Request] = []
    with lab.opened(n, limits, costs) as engine:
        unruly = Unruly(engine)

        def step() -> None:
            due = {request: len(request.answer) for request in engine._running if request.answer}
            failing = unruly.raises is not None
            try:
                events.extend(engine.step())
            except Interrupted:
                return
            if not failing:
                assert all(len(request.answer) == n + 1 for request, n in due.items())

        for kind, *values in actions:
            if kind == "submit":
                blocks, cut, count, which, _ = values
                prompt = text(*blocks)[cut:] if cut < 6 else text(*blocks)
                requests.append(engine.submit(Question(prompt, count, SAMPLINGS[which])))
            elif kind == "follow" and requests:
                prompt = (*requests[values[0] % len(requests)].tokens, *text(0)[: values[2]])
                if len(prompt) < N_CTX:
                    requests.append(engine.submit(Question(prompt, values[1])))
            elif kind == "cancel" and requests:
                engine.cancel(requests[values[0] % len(requests)])
            elif kind == "step":
                for _ in range(values[0]):
                    step()
            elif kind in ("fail", "interrupt"):
                unruly.raises = DecodeError("no luck") if kind == "fail" else Interrupted()
                unruly.after, unruly.late = values[0] * 5 + after % 5, values[1]
        while not engine.idle:
            step()
        check_events(events, requests)
        check_free(engine)
    ends = {id(e.request): e for e in events if not isinstance(e, Token)}
    oracle = lab.alone(limits)
    for request in requests:
        full, end = oracle.answer(request.question), ends[id(request)]
        if isinstance(end, Finished) and end.finish is not Finish.INTERRUPTED:
            assert request.answer == full
        else:
            assert request.answer == full[: len(request.answer)]


@pytest.mark.parametrize("late", [False, True])
def test_an_interruption_at_any_call_loses_nothing(lab: Lab, late: bool) -> None:
    """Each call of a slice or a head in turn is the one that is interrupted; audits are all made nevertheless."""
    questions = [Question(p, 14, s) for p, s in zip(PROMPTS[1:4], SAMPLINGS, strict=True)]
    for after in itertools.count(0, 7):
        with lab.opened(3) as engine:
            unruly = Unruly(engine)
            unruly.raises, unruly.after, unruly.late = Interrupted(), after, late
            requests = [engine.submit(question) for question in questions]
            events: list[Event] = []
            n_interrupted = 0
            while not engine.idle:
                try:
                    events += engine.step()
                except Interrupted:
                    n_interrupted += 1
            check_events(events, requests)
            check_free(engine)
        check_steps(lab, events, requests, SOME)
        if not n_interrupted:
            assert after > 100
            return


def test_a_request_that_cannot_be_computed_fails_alone(lab: Lab) -> None:
    with lab.opened() as engine:
        decode = engine.slices[0].decode_tokens

        def refuses(tokens: Sequence[int], *others: Any) -> None:
            if 4 in tokens:
                raise DecodeError("four is not to be had")
            decode(tokens, *others)

        engine.slices[0].decode_tokens = refuses  # type: ignore[method-assign, assignment]
        good = [engine.submit(Question(text(i), 20)) for i in (1, 2)]
        bad = engine.submit(Question((5, 4, 3), 20))
        events = run(engine)
        check_events(events, [*good, bad])
        check_free(engine)
        assert str(error_of(events, bad)) == "four is not to be had"
    check_steps(lab, events, good, SOME)


def test_a_slice_that_fails_for_one_fails_for_no_other(lab: Lab) -> None:
    """Behind a boundary, where some have been published already and the others share a batch."""
    with lab.opened(4) as engine:
        requests = [engine.submit(Question(text(i), 30, SAMPLED)) for i in range(4)]
        events = engine.step()
        decode = engine.slices[2].decode_states

        def refuses(states: Any, first: int, want: Any, numbers: Sequence[int], *others: Any) -> None:
            if 2 in numbers and len(requests[2].answer) > 10:
                raise DecodeError("not for two")
            decode(states, first, want, numbers, *others)

        engine.slices[2].decode_states = refuses  # type: ignore[method-assign, assignment]
        events += run(engine)
        check_events(events, requests)
        check_free(engine)
        bad = requests.pop(2)
        assert str(error_of(events, bad)) == "not for two"
    assert 10 < len(bad.answer) < 30
    assert bad.answer == lab.alone().answer(bad.question)[: len(bad.answer)]
    check_steps(lab, events, requests, SOME)


def test_callbacks_and_samplers_that_fail_are_their_requests_affair(lab: Lab) -> None:
    def fails(_token: int) -> bool:
        raise RuntimeError("not today")

    class Forgetful:
        """A sampler that works for a while."""

        def __init__(self) -> None:
            self.left = 6

        def sample(self, logits: Any, ids: Any = None) -> int:
            self.left -= 1
            if self.left < 0:
                raise ValueError("I forgot")
            best = int(logits.argmax())
            return best if ids is None else int(ids[best])

        def accept(self, token: int) -> None: ...

        def rewind(self, tokens: Sequence[int]) -> None: ...

        def close(self) -> None: ...

    with lab.opened() as engine:
        good = [engine.submit(Question(text(i), 20, SAMPLED)) for i in (1, 4)]
        bad = engine.submit(Question(text(2), 20, stops=fails))
        worse = engine.submit(Question(text(3), 20, sampler=Forgetful))  # type: ignore[arg-type]
        events = run(engine)
        check_events(events, [*good, bad, worse])
        check_free(engine)
        assert str(error_of(events, bad)) == "not today"
        assert str(error_of(events, worse)) == "I forgot"
        assert worse.answer == lab.alone().answer(Question(text(3), 20))[:6]
    check_steps(lab, events, good, SOME)


def test_a_callback_that_ends_the_program_ends_its_request_first(lab: Lab) -> None:
    def leaves(_token: int) -> bool:
        raise SystemExit(3)

    with lab.opened() as engine:
        good = [engine.submit(Question(text(i), 20, SAMPLED)) for i in (1, 3)]
        bad = engine.submit(Question(text(2), 20, stops=leaves))
        events = engine.step()
        with pytest.raises(SystemExit):
            engine.step()
        events += run(engine)
        check_events(events, [*good, bad])
        check_free(engine)
        assert isinstance(error_of(events, bad), SystemExit)
    check_steps(lab, events, good, SOME)


def test_callbacks_may_cancel_those_who_still_go_on(lab: Lab) -> None:
    requests: list[Request] = []

    with lab.opened(3, MANY) as engine:

        def stops(_token: int) -> bool:
            if len(requests[0].answer) == 5:
                engine.cancel(requests[1])
                engine.cancel(requests[2])
            return False

        requests += [engine.submit(Question(text(i), 20, stops=stops if i == 0 else lambda _: False)) for i in range(3)]
        events = run(engine)
        check_events(events, requests)
        check_free(engine)
    assert finish_of(events, requests[1]) is finish_of(events, requests[2]) is Finish.INTERRUPTED
    for request in requests:
        assert request.answer == lab.alone(MANY).answer(request.question)[: len(request.answer)]
    assert len(requests[0].answer) == 20


class ForFirstOnly(OwnSources):
    """Guesses for sequence 0 and for no other."""

    def guesses(self, asked: Sequence[tuple[int, BoundaryView]]) -> list[Guess | None]:
        return [
            guess if sequence == 0 else None for (sequence, _), guess in zip(asked, super().guesses(asked), strict=True)
        ]


def test_what_a_callback_cancels_goes_no_deeper(lab: Lab) -> None:
    contexts = ContextOptions(2 * N_CTX, N_BATCH, 2, n_threads=1, flash_attention=True)
    always, requests = Thresholds((math.inf,)), list[Request]()
    with ExitBatchEngine(lab.model, contexts, (2,), lambda: always, ForFirstOnly(SharedHead, 2), SETTINGS) as engine:
        decode = engine.slices[1].decode_states

        def watched(states: Any, first: int, want: Any, numbers: Sequence[int], *others: Any) -> None:
            assert not (1 in numbers and requests[1].ended)
            decode(states, first, want, numbers, *others)

        engine.slices[1].decode_states = watched  # type: ignore[method-assign, assignment]

        def stops(_token: int) -> bool:
            if len(requests[0].answer) == 4:
                assert requests[0].stats.exits == 3
                engine.cancel(requests[1])
            return False

        requests += [engine.submit(Question(text(1), 20, stops=stops)), engine.submit(Question(text(2), 20))]
        events = run(engine)
        check_events(events, requests)
        check_free(engine)
    assert len(requests[1].answer) == 3
    assert requests[1].stats.by_depth == {N_LAYER: 3}


def test_ctrl_c_loses_no_token(lab: Lab) -> None:
    def interrupts(_token: int) -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    with lab.opened() as engine:
        requests = [
            engine.submit(Question(text(1), 12, SAMPLED, stops=interrupts)),
            engine.submit(Question(text(2), 12)),
        ]
        events: list[Event] = []
        n_interrupted = 0
        while not engine.idle:
            try:
                events += engine.step()
            except KeyboardInterrupt:
                n_interrupted += 1
        check_events(events, requests)
        check_free(engine)
    assert n_interrupted == 12
    check_steps(lab, events, requests, SOME)


# ── sequences: kept, shared, copied, given up ───────────────────────────────────────────────────────────────────────


def test_a_further_turn_computes_only_what_is_new(lab: Lab) -> None:
    with lab.opened() as engine:
        first = engine.submit(Question(text(1, 2), 30))
        engine.submit(Question(text(3, 4), 12))
        run(engine)
        second = engine.submit(Question((*first.tokens, *text(5)), 20))
        events = run(engine)
        check_free(engine)
        # what waited at the end has been dropped
        assert len(first.tokens) - 1 - SETTINGS.cap <= second.stats.reused_tokens < len(first.tokens)
        assert (engine.stats.copied, engine.stats.evicted) == (0, 0)
    check_steps(lab, events, [second], SOME)


@pytest.mark.parametrize("ended", [True, False], ids=["idle", "busy"])
def test_a_shared_beginning_is_copied_to_slices_and_heads(lab: Lab, ended: bool) -> None:
    system = text(1, 2, 3)
    assert len(system) >= WORTH_KEEPING
    with lab.opened() as engine:
        first = engine.submit(Question((*system, *text(4, 5, 6)), 25))
        events = [event for _ in range(6) for event in engine.step()]
        if ended:
            events += run(engine)
        others = [engine.submit(Question((*system, *text(block)), 20, SAMPLED)) for block in (7, 8)]
        events += run(engine)
        check_free(engine)
        assert engine.stats.copied == 2
        assert all(request.stats.reused_tokens == len(system) for request in others)
        again = engine.submit(Question((*first.tokens, *text(2)), 10))
        events += run(engine)
        assert again.stats.reused_tokens >= len(first.tokens) - 1 - SETTINGS.cap  # it has lost nothing
    check_steps(lab, events, [first, *others, again], SOME)


def test_states_that_heads_have_not_read_yet_are_copied_too(lab: Lab) -> None:
    system = text(1, 2, 3, 4)[:42]
    with lab.opened() as engine:
        first = engine.submit(Question(system, 25))
        events = engine.step() + engine.step()
        assert [len(f[0].positions) for f in engine._sources._followers] == [10] * 3  # type: ignore[attr-defined]
        second = engine.submit(Question((*system, *text(7)), 25, SAMPLED))
        events += run(engine)
        assert engine.stats.copied == 1
        assert second.stats.reused_tokens == len(system)
    check_steps(lab, events, [first, second], SOME)


def test_a_copy_that_fails_halfway_fails_its_request(lab: Lab) -> None:
    system = text(1, 2, 3)
    with lab.opened(2) as engine:
        given_up = engine.submit(Question(text(6, 6, 6), 20))
        first = engine.submit(Question((*system, 4), 40))
        events = run(engine)
        sources: Any = engine._sources
        copy = sources.copy

        def fails(source: int, target: int) -> None:
            raise DecodeError("no copy today")

        sources.copy = fails
        bad = engine.submit(Question((*system, *text(7)), 9))
        events += run(engine)
        check_free(engine)
        assert str(error_of(events, bad)) == "no copy today"
        sources.copy = copy
        requests = [engine.submit(Question((*system, *text(block)), 15)) for block in (7, 8, 9)]
        events += run(engine)
        check_free(engine)
    check_steps(lab, events, [given_up, first, *requests], SOME)


def test_an_interrupted_conversation_may_be_copied_and_given_up(lab: Lab) -> None:
    system = text(1, 2, 3)
    with lab.opened(2) as engine:
        first = engine.submit(Question((*system, *text(4, 4)), 30))
        events = [event for _ in range(9) for event in engine.step()]
        unruly = Unruly(engine)
        unruly.raises, unruly.after, unruly.late = Interrupted(), 4, True
        second = engine.submit(Question((*system, 9), 5))
        with pytest.raises(Interrupted):
            engine.step()
        assert second.stats.reused_tokens == len(system)
        engine.cancel(second)
        third = engine.submit(Question((*system, 9, 9), 9))
        events += run(engine)
        fourth = engine.submit(Question(text(8, 8, 8, 8), 9))
        events += run(engine)
        assert engine.stats.evicted == 1
        check_free(engine)
    check_steps(lab, events, [first, third, fourth], SOME)


def test_the_context_ends_an_answer(lab: Lab) -> None:
    with lab.opened(2, MANY) as engine:
        requests = [engine.submit(Question(text(*range(9)), 50)), engine.submit(Question(text(3), 60))]
        events = run(engine)
        check_free(engine)
        assert finish_of(events, requests[0]) is Finish.CONTEXT_FULL
        assert len(requests[0].tokens) == N_CTX
    check_steps(lab, events, requests, MANY)


# ── audits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_audits_are_a_sample_by_the_rate_in_force_when_full_depth_runs(lab: Lab) -> None:
    with lab.opened(4, MANY, audit_rate=0.0) as engine:
        requests = [engine.submit(Question(prompt, 60)) for prompt in PROMPTS[:4]]
        while len(requests[3].answer) < 20:
            engine.step()
        assert engine.stats.audited == 0
        exits = engine.stats.exits
        engine.audit_rate = 0.5
        run(engine)
        assert 0.3 < engine.stats.audited / (engine.stats.exits - exits) < 0.7
        assert [request.answer for request in requests] == [lab.alone(MANY).answer(r.question) for r in requests]
        with pytest.raises(UsageError, match=r"audit rate 1\.5 is not a share"):
            engine.audit_rate = 1.5
        assert engine.audit_rate == 0.5


def test_exits_that_wait_at_the_end_are_unaudited(lab: Lab) -> None:
    with lab.opened(2, MANY) as engine:
        requests = [engine.submit(Question(text(i), 1 + SETTINGS.cap)) for i in (1, 2)]
        run(engine)
        assert [request.stats.exits for request in requests] == [SETTINGS.cap] * 2
        assert engine.stats.audited == 0


# ── what is refused, and what can be set ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("n", "changes", "words"),
    [
        (3, {"limits": (1.0, 1.0)}, "2 thresholds were given for 3 boundaries"),
        (3, {"cap": 0}, "cap 0 is too small"),
        (3, {"audit_rate": -0.1}, "audit rate -0.1 is not a share"),
        (3, {"n_batch": 14}, "a batch of 14 has no room for 5 tokens of each of 3 conversations"),
        (3, {"n_ctx": 1}, "a context of 3 tokens is too small for 3 conversations"),
        (3, {"costs": ()}, "nothing is known of what a batch costs"),
    ],
)
def test_an_engine_that_could_not_work_is_not_opened(lab: Lab, n: int, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words), lab.opened(n, **changes):
        pass


def test_other_modes_and_too_few_sources_are_refused(lab: Lab) -> None:
    contexts = ContextOptions(2 * N_CTX, N_BATCH, 2, n_threads=1)

    def opened(settings: EngineSettings, n_sources: int) -> ExitBatchEngine:
        sources = OwnSources(SharedHead, n_sources)
        return ExitBatchEngine(lab.model, contexts, (2,), lambda: Thresholds((0.0,)), sources, settings)

    with pytest.raises(UsageError, match="runs mode exit, not verified"):
        opened(replace(SETTINGS, mode=Mode.VERIFIED), 2)
    with pytest.raises(UsageError, match="what guesses is for 1 conversations, there are to be 2"):
        opened(SETTINGS, 1)


def test_wrong_thresholds_in_a_step_lose_nothing(lab: Lab) -> None:
    limits: list[tuple[float, ...]] = [SOME]
    with lab.opened(2, lambda: Thresholds(limits[0])) as engine:
        requests = [engine.submit(Question(text(i), 12)) for i in (1, 2)]
        events = engine.step()
        limits[0] = (1.0,)
        with pytest.raises(UsageError, match="1 thresholds were given for 3 boundaries"):
            engine.step()
        limits[0] = SOME
        events += run(engine)
        check_events(events, requests)
    check_steps(lab, events, requests, SOME)


def test_threads_change_no_bit(lab: Lab) -> None:
    with lab.opened(3) as engine:
        requests = [engine.submit(Question(prompt, 20)) for prompt in PROMPTS]
        events = engine.step()
        engine.set_threads(2)
        events += run(engine)
        with pytest.raises(UsageError, match="0 threads cannot be used"):
            engine.set_threads(0)
    check_steps(lab, events, requests, SOME)
