"""The HTTP interface under load: queues, deadlines, clients that go away or do not read, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from .serving_helpers import (
    CHAT,
    LIMITS,
    Rig,
    ask,
    asked,
    begin,
    chat,
    check_error,
    held,
    rig,
    run,
    standing,
    until,
)


@pytest.fixture(scope="module")
def path(tiny_path: Callable[..., Path]) -> Path:
    return tiny_path(tokenizer=True)


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[Rig]:
    with rig(path) as made:
        yield made


def test_a_full_queue_is_told_when_to_come_again(shared: Rig) -> None:
    async def test(rig: Rig) -> None:
        async with held(rig):
            running = [begin(rig.app, CHAT, chat(max_tokens=2)) for _ in range(3)]
            await until(lambda: rig.thread.n_open == 3)
            refused = await ask(rig.app, CHAT, chat())
            assert check_error(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            text = (await ask(rig.app, "/metrics", method="GET")).body.decode()
            assert "edge_runtime_queue_length 1.0" in text or "edge_runtime_queue_length 3.0" in text
        for one in running:
            assert (await one.done()).status == 200

    run(shared, test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_conversation(shared: Rig, stream: bool) -> None:
    async def test(rig: Rig) -> None:
        cancelled, failed = rig.engine.stats.cancelled, rig.engine.stats.failed
        async with held(rig):
            client = begin(rig.app, CHAT, chat(max_tokens=200, stream=stream))
            await standing(rig)
            rig.gate.let(3)
            await standing(rig)
            if stream:
                await client.until(lambda: bool(client.events))
            client.gone.set()
            if stream:
                await client.until(lambda: True)
            await until(lambda: rig.thread._inbox)  # the cancellation is on its way
            batches = rig.engine.stats.batches
            rig.gate.let(2)
            await client.done()
        assert rig.engine.stats.batches <= batches + 1  # the one that was under way
        assert client.status == (200 if stream else 0)  # nobody is told of a deadline
        assert (rig.engine.stats.cancelled, rig.engine.stats.failed) == (cancelled + 1, failed)
        await until(lambda: rig.thread.n_open == 0)

    run(shared, test)


def test_a_reader_that_does_not_read_holds_nobody_up(shared: Rig) -> None:
    """The answer is computed to its end and frees its place; what is left comes in one part."""

    async def test(rig: Rig) -> None:
        before = rig.engine.stats.submitted
        slow = begin(rig.app, CHAT, chat(max_tokens=150, stream=True))
        slow.may_send.clear()
        await until(lambda: rig.engine.stats.submitted > before and not rig.thread.n_open)
        rig.check_free()
        assert (await ask(rig.app, CHAT, chat())).status == 200
        slow.may_send.set()
        await slow.done()
        assert slow.body.endswith(b"data: [DONE]\n\n")
        assert len(slow.events) <= 4  # role, text, end

    run(shared, test)


def test_a_deadline_ends_an_answer(path: Path) -> None:
    limits = replace(LIMITS, deadline_s=0.1)

    async def test(rig: Rig) -> None:
        async with held(rig):
            whole = begin(rig.app, CHAT, chat(max_tokens=200))
            await standing(rig)
            rig.gate.let(2)
            await until(lambda: rig.thread._inbox)
            rig.gate.let(3)
            assert check_error(await whole.done(), 504)["code"] == "deadline_exceeded"
        async with held(rig):
            stream = begin(rig.app, CHAT, chat(max_tokens=200, stream=True))
            await standing(rig)
            rig.gate.let(3)
            await until(lambda: rig.thread._inbox)
            rig.gate.let(3)
            await stream.done()
            assert stream.status in (200, 504)
            if stream.status == 200:
                assert stream.events[-1]["choices"][0]["finish_reason"] == "length"
                assert stream.body.endswith(b"data: [DONE]\n\n")

    with rig(path, limits=limits) as made:
        run(made, test)


def test_health_and_readiness(path: Path) -> None:
    made = Rig(path)
    assert asked(made, "/health", method="GET").status == 200
    check_error(asked(made, "/ready", method="GET"), 503)
    found = asked(made, body=chat())
    check_error(found, 503)
    assert "retry-after" in found.headers
    made.start()
    assert asked(made, "/ready", method="GET").json == {"status": "ready"}
    made.close()
    check_error(asked(made, "/ready", method="GET"), 503)


def test_metrics_count_what_happened(path: Path) -> None:
    with rig(path) as made:
        for _ in range(2):
            asked(made, body=chat(max_tokens=5))
        asked(made, body=chat(n=2))
        asked(made, "/some/path", method="GET")
        text = asked(made, "/metrics", method="GET").body.decode()
    assert f'edge_runtime_requests_total{{endpoint="{CHAT}",status="200"}} 2.0' in text
    assert f'edge_runtime_requests_total{{endpoint="{CHAT}",status="400"}} 1.0' in text
    assert 'edge_runtime_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "edge_runtime_generated_tokens_total 10.0" in text
    assert "edge_runtime_time_to_first_token_seconds_count 2.0" in text
    assert "edge_runtime_token_seconds_count 8.0" in text
    assert "edge_runtime_state_saved 1.0" in text
    assert "edge_runtime_conversations_held 1.0" in text
