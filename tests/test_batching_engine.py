"""Several conversations at once: each gets what it would get alone, whatever the others do and whatever fails."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.batching import BatchEngine, Event, Failed, Finished, Question, Request, Token
from edge_runtime.batching.pool import WORTH_KEEPING
from edge_runtime.engine import Engine
from edge_runtime.errors import DecodeError, PromptError, UsageError
from edge_runtime.native import ContextOptions, KvType, Model, available_kernels
from edge_runtime.ngram import NGrams
from edge_runtime.sampling import Sampler, is_close_second
from edge_runtime.slices import Slice
from edge_runtime.summary import Finish
from edge_runtime.types import EngineSettings, Mode, SamplingSettings, Thresholds

from .batching_helpers import FREE, Alone, check_events, check_free, run
from .conftest import TinyMaker
from .fakes import Interrupted

pytestmark = pytest.mark.skipif(not available_kernels(), reason="no edge kernels run on this processor")

N_CTX = 120  # of each conversation
N_BATCH = 32
GREEDY = SamplingSettings()
SAMPLED = SamplingSettings(temperature=0.9, top_k=40, repeat_penalty=1.2, repeat_last_n=16, seed=3)
SAMPLINGS = (GREEDY, SAMPLED, SamplingSettings(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=9))


@pytest.fixture(scope="module")
def model(tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path("llama", n_layer=2, n_vocab=96, weights="Q8_0")), kernels="edge") as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(model: Model) -> Iterator[Alone]:
    oracle = Alone(model, N_CTX, N_BATCH)
    yield oracle
    oracle.close()


def opened(model: Model, n: int = 3, costs: Sequence[float] = FREE, **changes: Any) -> BatchEngine:
    clock = itertools.count().__next__
    boundaries, theta = changes.pop("boundaries", ()), changes.pop("theta", None)
    asked = {"n_ctx": n * N_CTX, "n_batch": N_BATCH, "n_threads": 1, "flash_attention": True} | changes
    options = ContextOptions(n_seq_max=n, **asked)
    return BatchEngine(model, options, costs, boundaries=boundaries, theta=theta, clock=lambda: float(clock()))


def text(*blocks: int) -> tuple[int, ...]:
    """Blocks of twelve tokens each; equal numbers give equal blocks."""
    return tuple((block * 17 + i * i * (block + 3)) % 90 + 5 for block in blocks for i in range(12))


def finish_of(events: Sequence[Event], request: Request) -> Finish:
    (found,) = [e.finish for e in events if isinstance(e, Finished) and e.request is request]
    return found


def error_of(events: Sequence[Event], request: Request) -> BaseException:
    (found,) = [e.error for e in events if isinstance(e, Failed) and e.request is request]
    return found


# ── the same tokens as alone ────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [(7,), text(1), text(1, 2, 1, 2), text(1, 2, 3, 1, 2, 3), text(4, 4, 4), text(5)[:5], text(1, 2, 3, 4)]


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("costs", [FREE, (1.0,)], ids=["drafts", "none"])
def test_every_request_gets_what_it_gets_alone(model: Model, alone: Alone, n: int, costs: tuple[float, ...]) -> None:
    questions = [Question(p, 40, s) for p, s in zip(PROMPTS, itertools.cycle(SAMPLINGS), strict=False)]
    with opened(model, n, costs) as engine:
        requests = [engine.submit(question) for question in questions]
        events = run(engine)
        check_events(events, requests)
        check_free(engine)
    for request in requests:
        assert request.answer == alone.answer(request.question)
        assert finish_of(events, request) is Finish.MAX_TOKENS
    drafted = sum(request.stats.drafted for request in requests)
    assert (drafted > 0) == (costs == FREE)
    assert engine.stats.published == 40 * len(requests)


def test_drafts_are_right_where_a_text_repeats_itself(model: Model, alone: Alone) -> None:
    questions = [Question(prompt, 60) for prompt in PROMPTS[:3]]
    with opened(model) as engine:
        requests = [engine.submit(question) for question in questions]
        run(engine)
        assert engine.stats.accepted == sum(request.stats.accepted for request in requests) > 20
        assert engine.stats.drafted == sum(request.stats.drafted for request in requests)
        assert engine.stats.batches < 150
    assert [request.answer for request in requests] == [alone.answer(question) for question in questions]


@pytest.mark.parametrize("changes", [{"boundaries": (1,)}, {"kv_type": KvType.Q8_0}, {"flash_attention": False}])
def test_in_slices_and_with_other_caches(tiny_path: TinyMaker, changes: dict[str, Any]) -> None:
    """Against one conversation at a time in an engine of the same options."""
    path = tiny_path("llama", n_layer=2, n_embd=128, n_vocab=96, weights="Q8_0")
    answers = []
    with Model(str(path), kernels="edge") as model:
        for n in (1, 3):
            with opened(model, n, **changes) as engine:
                requests = [engine.submit(Question(prompt, 30, SAMPLED)) for prompt in PROMPTS[:5]]
                run(engine)
                check_free(engine)
                answers.append([request.answer for request in requests])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_other_architectures(tiny_path: TinyMaker, architecture: str) -> None:
    path = tiny_path(architecture, n_layer=7, n_vocab=96, weights="Q8_0")
    with Model(str(path), kernels="edge") as model:
        oracle = Alone(model, N_CTX, N_BATCH)
        with opened(model) as engine:
            requests = [engine.submit(Question(prompt, 30)) for prompt in PROMPTS]
            run(engine)
        assert [request.answer for request in requests] == [oracle.answer(r.question) for r in requests]
        oracle.close()


def test_with_stock_kernels_all_get_their_answers(tiny_path: TinyMaker) -> None:
    """Not always the same tokens: stock's sums depend on the company."""
    with Model(str(tiny_path("llama", n_layer=2, n_vocab=96)), kernels="stock") as model, opened(model) as engine:
        requests = [engine.submit(Question(prompt, 20, SAMPLED)) for prompt in PROMPTS]
        check_events(run(engine), requests)
        check_free(engine)
        assert all(len(request.answer) == 20 for request in requests)


ARRIVALS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.lists(st.integers(0, 3), min_size=1, max_size=7),
            st.integers(0, 11),
            st.integers(1, 25),
            st.integers(0, 2),
            st.booleans(),
        ),
        st.tuples(st.just("follow"), st.integers(0, 9), st.integers(1, 20), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("fail"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("interrupt"), st.integers(0, 3), st.booleans()),
    ),
    max_size=14,
)


class Unruly:
    """Stands before a slice's `decode_tokens`, and raises in the middle of things when told to."""

    def __init__(self, engine: BatchEngine) -> None:
        self._decode = engine.slices[0].decode_tokens
        self.raises: BaseException | None = None
        self.after = 0  # decodes until then
        self.late = False  # only when everything was computed
        engine.slices[0].decode_tokens = self  # type: ignore[method-assign, assignment]

    def __call__(self, *arguments: Any) -> None:
        due, self.after = self.raises if self.after <= 0 else None, self.after - 1
        if due is None or self.late:
            self._decode(*arguments)
        if due is not None:
            self.raises = None
            raise due


@settings(max_examples=120, deadline=None)
@given(actions=ARRIVALS, n=st.integers(1, 4), drafts=st.booleans())
def test_any_arrivals_cancels_failures_and_interruptions(
    model: Model, alone: Alone, actions: list[tuple[Any, ...]], n: int, drafts: bool
) -> None:
    events: list[Event] = []
    requests: list[Request] = []
    with opened(model, n, FREE if drafts else (1.0, 1.1)) as engine:
        unruly = Unruly(engine)

        def step() -> None:
            due = {request: len(request.answer) for request in engine._running if request.n_due == 1}
            failing = unruly.raises is not None
            try:
                events.extend(engine.step())
            except Interrupted:
                return
            if not failing:
                assert all(len(request.answer) > n for request, n in due.items())

        for kind, *values in actions:
            if kind == "submit":
                blocks, cut, count, which, wants_drafts = values
                prompt = text(*blocks)[cut:] if cut < 6 else text(*blocks)
                requests.append(engine.submit(Question(prompt, count, SAMPLINGS[which], drafts=wants_drafts)))
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
                unruly.after, unruly.late = values
        while not engine.idle:
            step()
        check_events(events, requests)
        check_free(engine)
    ends = {id(e.request): e for e in events if not isinstance(e, Token)}
    for request in requests:
        full, end = alone.answer(request.question), ends[id(request)]
        if isinstance(end, Finished) and end.finish is not Finish.INTERRUPTED:
            assert request.answer == full
        else:
            assert request.answer == full[: len(request.answer)]


# ── mode margin ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampling", [GREEDY, SamplingSettings(temperature=0.3, seed=3)], ids=["greedy", "sampled"])
def test_a_relaxed_token_is_a_draft_that_full_depth_nearly_chose(model: Model, sampling: SamplingSettings) -> None:
    """Full depth is asked about every text anew: what it puts first stands, or what it puts second and nearly first."""
    theta = 0.3
    whole = Slice(model, 0, model.n_layer, ContextOptions(n_ctx=N_CTX, n_batch=N_CTX, n_threads=1))
    with opened(model, theta=theta) as engine:
        requests = [engine.submit(Question(prompt, 60, sampling)) for prompt in PROMPTS]
        events = run(engine)
        check_events(events, requests)
        check_free(engine)
        stats = engine.stats
    relaxed = [event for event in events if isinstance(event, Token) and event.relaxed]
    assert stats.relaxed == len(relaxed) == sum(request.stats.relaxed for request in requests) > 5
    assert stats.accepted > stats.relaxed
    for event in events:
        if isinstance(event, Token) and (event.relaxed or sampling == GREEDY):
            whole.remove(0)
            text_before = event.request.tokens[: event.position]
            whole.decode_tokens(text_before, 0, (len(text_before) - 1,))
            logits = whole.logits(len(text_before) - 1)
            if event.relaxed:
                assert is_close_second(logits, event.token, theta)
            else:
                assert event.token == int(logits.argmax())
    whole.close()


def test_margin_alone_is_what_the_engine_publishes(model: Model) -> None:
    """One conversation, drafts of one token: both engines draft where one more row pays, and so the same."""
    costs, theta = FREE[:2], 0.3
    question = Question(text(1, 2, 3, 1, 2, 3), 60)
    with opened(model, 1, costs, theta=theta) as engine:
        request = engine.submit(question)
        run(engine)
    settings_ = EngineSettings(Mode.MARGIN, cap=1, theta=theta)
    options = ContextOptions(n_ctx=N_CTX, n_batch=N_BATCH, n_threads=1, flash_attention=True)
    whole = Slice(model, 0, model.n_layer, options, n_outputs_max=2)
    with closing(Sampler(GREEDY, model.n_vocab)) as sampler:
        alone = Engine([whole], sampler, settings_, lambda: Thresholds(()), NGrams(costs), n_ctx=N_CTX)
        alone.extend(question.tokens)
        assert [step.token for step in alone.generate(60)] == request.answer
        assert alone.stats.relaxed == request.stats.relaxed > 0
    whole.close()


def test_without_theta_or_with_one_of_1_nothing_is_relaxed(model: Model, alone: Alone) -> None:
    for theta in (None, 1.0):
        with opened(model, theta=theta) as engine:
            requests = [engine.submit(Question(prompt, 40)) for prompt in PROMPTS]
            events = run(engine)
            assert engine.stats.relaxed == engine.stats.exits == 0
            assert engine.stats.by_depth == {2: 40 * len(PROMPTS)}
        assert all(e.depth == 2 and e.boundary is None and not e.audits for e in events if isinstance(e, Token))
        assert [request.answer for request in requests] == [alone.answer(r.question) for r in requests]


def test_a_theta_that_is_no_ratio_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="theta 0 is no ratio"):
        opened(model, theta=0)


def test_threads_change_no_bit(model: Model, alone: Alone) -> None:
    with opened(model) as engine:
        requests = [engine.submit(Question(prompt, 20)) for prompt in PROMPTS]
        engine.step()
        engine.set_threads(2)
        run(engine)
        with pytest.raises(UsageError, match="0 threads cannot be used"):
            engine.set_threads(0)
    assert [request.answer for request in requests] == [alone.answer(r.question) for r in requests]


# ── prompts and answers side by side ────────────────────────────────────────────────────────────────────────────────


def test_answers_flow_while_a_long_prompt_is_computed(model: Model) -> None:
    with opened(model, 3, n_ctx=3 * 500) as engine:
        answering = [engine.submit(Question(text(i), 100, drafts=False)) for i in (1, 2)]
        engine.step()
        long = engine.submit(Question(text(*range(30)), 5))
        n_steps = 0
        while not long.answer:
            before = [len(request.answer) for request in answering]
            engine.step()
            n_steps += 1
            assert [len(request.answer) for request in answering] == [n + 1 for n in before]
        assert n_steps == -(-360 // (N_BATCH - 2))


def test_a_short_prompt_overtakes_long_ones(model: Model) -> None:
    with opened(model, 3, n_ctx=3 * 500) as engine:
        long = [engine.submit(Question(text(*range(30)), 5)), engine.submit(Question(text(*range(29, -1, -1)), 5))]
        engine.step()
        short = engine.submit(Question(text(1)[:10], 5))
        engine.step()
        assert len(short.answer) == 1
        assert not any(request.answer for request in long)


def test_a_batch_is_never_larger_than_allowed(model: Model) -> None:
    with opened(model, 4, n_batch=4) as engine:
        requests = [engine.submit(Question(prompt, 12)) for prompt in PROMPTS]
        run(engine)
        check_free(engine)
        assert all(len(request.answer) == 12 for request in requests)


def test_logits_are_computed_only_where_a_token_follows(model: Model) -> None:
    with opened(model, 2, (1.0,)) as engine:
        wanted: list[list[int]] = []
        decode = engine.slices[0].decode_tokens

        def watched(tokens: Any, first: int, want: list[int], *others: Any) -> None:
            wanted.append(want)
            decode(tokens, first, want, *others)

        engine.slices[0].decode_tokens = watched  # type: ignore[method-assign, assignment]
        engine.submit(Question(text(1, 2, 3, 4), 2))
        engine.submit(Question((5,), 3))
        run(engine)
    assert wanted == [[N_BATCH - 1], [16, 17], [0, 1]]


# ── sequences: kept, shared, copied, given up ───────────────────────────────────────────────────────────────────────


def follow_up(request: Request, *blocks: int) -> Question:
    return Question((*request.tokens, *text(*blocks)), 10)


def test_a_further_turn_computes_only_what_is_new(model: Model, alone: Alone) -> None:
    with opened(model) as engine:
        first = engine.submit(Question(text(1, 2), 12))
        other = engine.submit(Question(text(3, 4), 12))
        run(engine)
        second = engine.submit(follow_up(first, 5))
        run(engine)
        assert first.stats.reused_tokens == other.stats.reused_tokens == 0
        # of an answer, the last token has not been computed
        assert second.stats.reused_tokens >= 24 + 11
        assert engine.stats.reused_tokens == second.stats.reused_tokens
        assert (engine.stats.copied, engine.stats.evicted) == (0, 0)
    assert second.answer == alone.answer(second.question)


@pytest.mark.parametrize("ended", [True, False], ids=["idle", "busy"])
@pytest.mark.parametrize("boundaries", [(), (1,)], ids=["whole", "slices"])
def test_a_shared_beginning_is_copied_bit_for_bit(
    model: Model, alone: Alone, ended: bool, boundaries: tuple[int, ...]
) -> None:
    system = text(1, 2, 3)
    assert len(system) >= WORTH_KEEPING
    with opened(model, boundaries=boundaries) as engine:
        first = engine.submit(Question((*system, *text(4, 5, 6)), 25))
        for _ in range(6):
            engine.step()
        if ended:
            run(engine)
        others = [engine.submit(Question((*system, *text(block)), 20, SAMPLED)) for block in (7, 8)]
        run(engine)
        check_free(engine)
        assert engine.stats.copied == 2
        assert all(request.stats.reused_tokens == len(system) for request in others)
        again = engine.submit(follow_up(first, 2))
        run(engine)
        assert again.stats.reused_tokens >= len(first.tokens) - 1  # it has lost nothing
    for request in (first, *others, again):
        assert request.answer == alone.answer(request.question)


def test_a_cancelled_copy_leaves_both_sides_right(model: Model, alone: Alone) -> None:
    system = text(1, 2, 3)
    with opened(model, 2) as engine:
        first = engine.submit(Question((*system, *text(4, 4)), 30))
        engine.step()
        engine.step()
        unruly = Unruly(engine)
        unruly.raises = Interrupted()
        second = engine.submit(Question((*system, 9), 5))
        with pytest.raises(Interrupted):
            engine.step()
        assert second.stats.reused_tokens == len(system)  # copied, and nothing computed since
        engine.cancel(second)
        run(engine)
        third = engine.submit(Question((*system, 9, 9), 5))
        run(engine)
        assert third.stats.reused_tokens == len(system)
        check_free(engine)
    assert first.answer == alone.answer(first.question)
    assert third.answer == alone.answer(third.question)


def test_a_copy_has_nothing_of_drafts_that_were_refused(model: Model, alone: Alone) -> None:
    with opened(model) as engine:
        first = engine.submit(Question(text(1, 2, 3, 1, 2, 3), 40))
        while not (first.answer and first.sequence is not None and first.sequence.dirty):
            engine.step()
        beginning = tuple(first.sequence.held)
        second = engine.submit(Question((*beginning, 9), 10))
        run(engine)
        check_free(engine)
        assert second.stats.reused_tokens == len(beginning)
        assert engine.stats.copied == 1
    assert first.answer == alone.answer(first.question)
    assert second.answer == alone.answer(second.question)


def test_with_no_place_a_request_waits_and_comes_in_order(model: Model) -> None:
    with opened(model, 2) as engine:
        assert engine.has_room
        requests = [engine.submit(Question(text(i), 5, drafts=False)) for i in range(5)]
        assert not engine.has_room
        assert engine.n_waiting == 5
        engine.step()
        assert engine.n_waiting == 3
        ends = [event.request for event in run(engine) if isinstance(event, Finished)]
        assert ends == requests
        check_free(engine)


def test_a_gap_between_answers_is_bridged_and_the_idle_text_survives(model: Model, alone: Alone) -> None:
    with opened(model, 3) as engine:
        requests = [engine.submit(Question(text(i), n)) for i, n in ((1, 60), (2, 8), (3, 60))]
        run(engine)
        assert engine.stats.padding > 20
        further = engine.submit(follow_up(requests[1], 4))
        run(engine)
        assert further.stats.reused_tokens >= len(requests[1].tokens) - 1
    for request in (*requests, further):
        assert request.answer == alone.answer(request.question)


def test_a_full_conversation_bridges_nothing(model: Model, alone: Alone) -> None:
    with opened(model, 3) as engine:
        middle = Question(text(*range(9))[: N_CTX - 6], 50)
        requests = [engine.submit(q) for q in (Question(text(1), 60), middle, Question(text(3), 60))]
        events = run(engine)
        check_free(engine)
        assert finish_of(events, requests[1]) is Finish.CONTEXT_FULL
        assert len(requests[1].tokens) == N_CTX
    for request in requests:
        assert request.answer == alone.answer(request.question)


def test_drafts_end_where_the_context_does(model: Model) -> None:
    oracle = Alone(model, 256, N_BATCH)  # llama.cpp rounds up to this: not one cell more
    questions = [Question(text(*[i, 7] * 9), 300) for i in (1, 2)]
    with opened(model, 2, n_ctx=2 * 256) as engine:
        requests = [engine.submit(question) for question in questions]
        events = run(engine)
        check_free(engine)
        assert engine.stats.accepted > 0
    assert {finish_of(events, request) for request in requests} == {Finish.CONTEXT_FULL}
    assert [request.answer for request in requests] == [oracle.answer(question) for question in questions]
    oracle.close()


# ── how an answer ends ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_ends_by_its_end_token_its_caller_or_its_length(model: Model, alone: Alone) -> None:
    question = Question(text(1, 2), 30, SAMPLED)
    full = alone.answer(question)
    last = next(token for i, token in enumerate(full) if i > 4 and token not in full[:i])
    n = full.index(last) + 1
    told: list[int] = []

    def stops(token: int) -> bool:
        told.append(token)
        return token == last

    with opened(model) as engine:
        by_token = engine.submit(Question(question.tokens, 30, SAMPLED, ends=lambda token: token == last))
        by_caller = engine.submit(Question(question.tokens, 30, SAMPLED, stops=stops))
        by_length = engine.submit(Question(question.tokens, n, SAMPLED))
        events = run(engine)
        check_events(events, [by_token, by_caller, by_length])
        check_free(engine)
    assert by_token.answer == by_caller.answer == by_length.answer == told == full[:n]
    assert finish_of(events, by_token) is Finish.END_OF_TURN
    assert finish_of(events, by_caller) is Finish.STOP_STRING
    assert finish_of(events, by_length) is Finish.MAX_TOKENS


@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_a_cancelled_request_is_gone_at_once(model: Model, n_steps: int) -> None:
    with opened(model, 1) as engine:
        first, second = (engine.submit(Question(text(1, 2, 3, 4), 40, drafts=False)) for _ in range(2))
        events = [event for _ in range(n_steps) for event in engine.step()]
        engine.cancel(first)
        engine.cancel(first)
        n_answered = len(first.answer)
        events += engine.step()
        assert len(first.answer) == n_answered
        assert second.sequence is not None
        events += run(engine)
        engine.cancel(second)  # it has ended
        check_events(events, [first, second])
        check_free(engine)
        assert finish_of(events, first) is Finish.INTERRUPTED
        assert (engine.stats.cancelled, engine.stats.finished) == (1, 1)


def test_callbacks_may_cancel(model: Model, alone: Alone) -> None:
    with opened(model) as engine:
        requests: list[Request] = []

        def cancels(which: int) -> Callable[[int], bool]:
            def stops(_token: int) -> bool:
                if len(requests[0].answer) == 5:
                    engine.cancel(requests[which])
                return False

            return stops

        requests.append(engine.submit(Question(text(1), 20, stops=cancels(2))))
        requests.append(engine.submit(Question(text(2), 20)))
        requests.append(engine.submit(Question(text(3), 20)))
        requests.append(engine.submit(Question(text(4), 20, stops=lambda _: bool(engine.cancel(requests[3])))))
        events = run(engine)
        check_events(events, requests)
        check_free(engine)
    assert finish_of(events, requests[2]) is finish_of(events, requests[3]) is Finish.INTERRUPTED
    assert len(requests[3].answer) == 1
    for request in requests:
        assert request.answer == alone.answer(request.question)[: len(request.answer)]
    assert len(requests[0].answer) == len(requests[1].answer) == 20


# ── what fails ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_that_cannot_be_computed_fails_alone(model: Model, alone: Alone) -> None:
    with opened(model) as engine:
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
    assert [request.answer for request in good] == [alone.answer(request.question) for request in good]


def test_a_callback_that_fails_is_its_own_requests_affair(model: Model, alone: Alone) -> None:
    def fails(_token: int) -> bool:
        raise RuntimeError("not today")

    with opened(model) as engine:
        good = engine.submit(Question(text(1), 20, SAMPLED))
        bad = [engine.submit(Question(text(2), 20, stops=fails)), engine.submit(Question(text(3), 20, ends=fails))]
        events = run(engine)
        check_events(events, [good, *bad])
        check_free(engine)
        assert [str(error_of(events, request)) for request in bad] == ["not today"] * 2
    assert good.answer == alone.answer(good.question)


def test_a_callback_that_ends_the_program_ends_its_request_first(model: Model, alone: Alone) -> None:
    def leaves(_token: int) -> bool:
        raise SystemExit(3)

    with opened(model) as engine:
        good = [engine.submit(Question(text(i), 20, SAMPLED)) for i in (1, 3)]
        bad = engine.submit(Question(text(2), 20, stops=leaves))
        events = engine.step()  # not all of the prompts yet
        with pytest.raises(SystemExit):
            engine.step()
        events += run(engine)
        check_events(events, [*good, bad])
        check_free(engine)
        assert isinstance(error_of(events, bad), SystemExit)
    assert [request.answer for request in good] == [alone.answer(request.question) for request in good]


def test_a_sampler_that_cannot_be_made_fails_its_request(
    model: Model, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(model) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(
                "edge_runtime.batching.request.Sampler", lambda *_: (_ for _ in ()).throw(MemoryError("none"))
            )
            bad = engine.submit(Question(text(1), 20))
            events = engine.step()
        assert isinstance(error_of(events, bad), MemoryError)
        good = engine.submit(Question(text(2), 20))
        run(engine)
        check_free(engine)
    assert good.answer == alone.answer(good.question)


def test_ctrl_c_loses_no_token(model: Model, alone: Alone) -> None:
    def interrupts(_token: int) -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    with opened(model) as engine:
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
    assert [request.answer for request in requests] == [alone.answer(request.question) for request in requests]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("question", "error", "words"),
    [
        (Question((), 5), PromptError, "the prompt is empty"),
        (Question((1,) * N_CTX, 5), PromptError, f"the prompt is {N_CTX} tokens long"),
        (Question((1, 96), 5), UsageError, "96 is no token: this model has 0 to 95"),
        (Question((-1, 2), 5), UsageError, "-1 is no token"),
        (Question((1,), 0), UsageError, "an answer of 0 tokens is none"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    model: Model, question: Question, error: type[Exception], words: str
) -> None:
    with opened(model) as engine:
        with pytest.raises(error, match=words):
            engine.submit(question)
        assert engine.idle
        assert engine.stats.submitted == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_ctx": 5}, "a context of 5 tokens is too small for 3 conversations"),
        ({"n_batch": 2}, "a batch of 2 has no room for a token of each of 3 conversations"),
        ({"costs": ()}, "nothing is known of what a batch costs"),
    ],
)
def test_an_engine_that_could_not_work_is_not_opened(model: Model, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        opened(model, **changes)


# ── what is counted ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_times_and_counts_of_a_request(model: Model) -> None:
    with opened(model, 1) as engine:
        first, second = (engine.submit(Question(text(1, 2), n, drafts=False)) for n in (3, 2))
        assert second.stats.waited_s is None
        run(engine)
    for request, n in ((first, 3), (second, 2)):
        stats = request.stats
        assert (stats.prompt_tokens, stats.generated_tokens, stats.drafted) == (24, n, 0)
        assert stats.waited_s is not None
        assert stats.clock.first_token_s is not None
        assert 0 < stats.waited_s < stats.clock.first_token_s
    assert second.stats.reused_tokens == 23
    total = engine.stats
    assert (total.prompt_tokens, total.reused_tokens, total.published) == (48, 23, 5)
    assert total.rows == 24 + 2 + 1 + 1
    assert total.batches == 5
