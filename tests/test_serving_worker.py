"""The engine's thread and the answers that it gives: places, the queue, giving up, failing, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.serving.answers import Answer, Part, Wanted, counts
from edge_runtime.serving.errors import ApiError
from edge_runtime.summary import Finish
from edge_runtime.types import SamplingSettings

from .serving_helpers import PATIENCE_S, Rig, held, rig, standing

PROMPT = tuple(range(10, 30))


@pytest.fixture
def path(tiny_path: Callable[..., Path]) -> Path:
    return tiny_path(tokenizer=True)


def wanted(max_tokens: int = 4, tokens: tuple[int, ...] = PROMPT) -> Wanted:
    return Wanted(tokens, max_tokens, SamplingSettings(temperature=1.0, seed=3))


def submit(rig: Rig, ask: Wanted) -> Answer:
    assert rig.service.backend is not None
    answer = Answer(ask, rig.service.backend.vocabulary)
    rig.thread.submit(answer)
    return answer


async def finish(answer: Answer) -> Part:
    """The last part."""
    while True:
        part = await asyncio.wait_for(answer.next(), PATIENCE_S)
        if part.end is not None:
            return part


def run(path: Path, test: Callable[[Rig], object]) -> None:
    with rig(path) as made:
        asyncio.run(test(made))  # type: ignore[arg-type]
        if made.thread.failure is None:
            made.check_free()


def test_an_answer_comes_to_its_end_and_frees_its_place(path: Path) -> None:
    async def test(rig: Rig) -> None:
        answer = submit(rig, wanted(6))
        part = await finish(answer)
        assert part.end is not None
        assert part.end.error is None
        assert part.end.finish in (Finish.MAX_TOKENS, Finish.END_OF_TURN)
        n_prompt, n_answer, _ = counts(answer)
        assert n_prompt == len(PROMPT)
        assert 1 <= n_answer <= 6

    run(path, test)


def test_more_than_places_and_queue_are_refused_with_a_time_to_wait(path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            answers = [submit(rig, wanted()) for _ in range(3)]  # two places, and one waits
            with pytest.raises(ApiError) as refused:
                submit(rig, wanted())
            assert refused.value.status == 429
            assert int(refused.value.headers["Retry-After"]) >= 1
        for answer in answers:
            await finish(answer)
        await finish(submit(rig, wanted()))

    run(path, test)


def test_a_cancelled_answer_ends_with_the_batch_under_way(path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            answer = submit(rig, wanted(100))
            await standing(rig)
            rig.gate.let(4)  # a prompt and tokens
            await standing(rig)
            before = rig.engine.stats.batches
            rig.thread.cancel(answer)
            rig.gate.let(2)  # the batch that was under way, and one that tells of the end
            part = await finish(answer)
            assert part.end is not None
            assert part.end.finish is Finish.INTERRUPTED
            assert rig.engine.stats.batches <= before + 1

    run(path, test)


def test_a_request_that_waits_can_be_given_up(path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            answers = [submit(rig, wanted()) for _ in range(3)]
            await standing(rig)
            rig.thread.cancel(answers[2])
            rig.gate.let(2)
            part = await finish(answers[2])
            assert part.end is not None
            assert part.end.finish is Finish.INTERRUPTED
            assert counts(answers[2]) == (len(PROMPT), 0, 0)
        for answer in answers[:2]:
            await finish(answer)

    run(path, test)


def test_a_request_that_cannot_be_answered_fails_alone(path: Path) -> None:
    async def test(rig: Rig) -> None:
        good, bad = submit(rig, wanted()), submit(rig, wanted(tokens=(10**6,)))
        part = await finish(bad)
        assert part.end is not None
        assert part.end.error is not None
        part = await finish(good)
        assert part.end is not None
        assert part.end.error is None

    run(path, test)


def test_a_sampler_that_raises_fails_its_request_alone(path: Path) -> None:
    def broken() -> object:
        raise RuntimeError("secret words")

    async def test(rig: Rig) -> None:
        bad = submit(rig, Wanted(PROMPT, 4, SamplingSettings(), sampler=broken))  # type: ignore[arg-type]
        part = await finish(bad)
        assert part.end is not None
        assert isinstance(part.end.error, RuntimeError)
        await finish(submit(rig, wanted()))

    run(path, test)


def test_an_engine_that_fails_ends_everything(path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            answer = submit(rig, wanted())
            await standing(rig)
            rig.gate.failure = RuntimeError("broken")
            rig.gate.let()
            part = await finish(answer)
            assert part.end is not None
            assert isinstance(part.end.error, ApiError)
        await asyncio.to_thread(rig.wait_changed)
        assert isinstance(rig.thread.failure, RuntimeError)
        assert not rig.thread.ready
        with pytest.raises(ApiError) as refused:
            submit(rig, wanted())
        assert refused.value.status == 503
        assert rig.thread.n_open == 0

    run(path, test)


def test_stopping_ends_what_is_under_way(path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            answers = [submit(rig, wanted(100)) for _ in range(3)]
            await standing(rig)
            rig.thread.stop()
            rig.gate.let()
            for answer in answers:
                part = await finish(answer)
                assert part.end is not None
                assert isinstance(part.end.error, ApiError)
                assert part.end.error.status == 503

    run(path, test)


def test_draining_refuses_new_requests_and_finishes_others(path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            answer = submit(rig, wanted())
            rig.thread.draining = True
            with pytest.raises(ApiError) as refused:
                submit(rig, wanted())
            assert refused.value.status == 503
        part = await finish(answer)
        assert part.end is not None
        assert part.end.error is None

    run(path, test)


def test_an_idle_thread_sleeps(path: Path) -> None:
    """Between requests it makes no step, however long that takes."""

    async def test(rig: Rig) -> None:
        await finish(submit(rig, wanted()))
        batches = rig.engine.stats.batches
        rig.gate.hold()
        rig.gate.waiting.clear()
        await finish_nothing(rig)
        assert rig.engine.stats.batches == batches
        assert not rig.gate.waiting.is_set()

    async def finish_nothing(rig: Rig) -> None:
        """A command that gives it nothing to do: it wakes up, and goes to sleep again."""
        assert rig.service.backend is not None
        rig.thread.cancel(Answer(wanted(), rig.service.backend.vocabulary))

    run(path, test)


def test_a_second_turn_uses_what_the_first_has_computed(path: Path) -> None:
    async def test(rig: Rig) -> None:
        first = submit(rig, wanted())
        await finish(first)
        assert first.request is not None
        second = submit(rig, wanted(tokens=(*first.request.tokens, 20, 21)))
        await finish(second)
        assert counts(second)[2] >= len(PROMPT)

    run(path, test)
