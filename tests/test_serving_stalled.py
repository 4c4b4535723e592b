"""Clients that do not read, or say nothing: given up after a while, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from edge_runtime.serving.connections import Connection, Http

from .serving_helpers import CHAT, NO_END, PATIENCE_S, ServerProcess

STALL_S = 20.0
SMALL = 4096  # bytes that the system keeps for a connection, or few more
TIMES = "server._GRACE_S = server._LEAVE_S = 1"
ENDLESS = 90_000  # tokens, which take longer than any test


# ── one connection, with a clock of its own ─────────────────────────────────────────────────────────────────────────


async def nothing(_scope: Any, _receive: Any, _send: Any) -> None:
    """An application that is never asked."""


class Watched:
    """A connection whose transport and event loop are tables of numbers."""

    def __init__(self) -> None:
        self.patience_s: float | None = STALL_S
        self.transport = mock.Mock(**{"get_extra_info.return_value": None, "get_write_buffer_size.return_value": 0})
        self.loop = mock.Mock(**{"time.return_value": 0.0})
        http = Http(nothing, asyncio.Event(), lambda: self.patience_s)
        http.config.load()
        self.connection: Any = Connection(http.config, http.server_state, {}, self.loop)  # type: ignore[arg-type]
        self.connection.connection_made(self.transport)

    def asks(self) -> None:
        self.connection.cycle = mock.Mock(response_complete=False)

    def answered(self) -> None:
        self.connection.cycle.response_complete = True

    def left_to_take(self, n_bytes: int) -> None:
        self.transport.get_write_buffer_size.return_value = n_bytes

    def pass_time(self, n: int = 1) -> None:
        """As far as the connection's next look, `n` times."""
        for _ in range(n):
            (after_s, look), _ = self.loop.call_later.call_args
            self.loop.time.return_value += after_s
            look()

    @property
    def given_up(self) -> bool:
        return bool(self.transport.abort.called)


@pytest.fixture
def client() -> Watched:
    return Watched()


def test_no_bytes_are_kept_that_can_wait_as_text(client: Watched) -> None:
    client.transport.set_write_buffer_limits.assert_called_once_with(high=0)


def test_who_takes_nothing_is_given_up(client: Watched, caplog: pytest.LogCaptureFixture) -> None:
    client.asks()
    client.left_to_take(500)
    client.pass_time()
    assert not client.given_up
    n_looks = client.loop.call_later.call_count
    client.pass_time()
    assert client.given_up
    assert client.loop.call_later.call_count == n_looks
    assert "took nothing of its answer for 20 s" in caplog.text


def test_who_takes_little_is_waited_for(client: Watched) -> None:
    client.asks()
    for n_bytes in (500, 499, 498):
        client.left_to_take(n_bytes)
        client.pass_time()
    for _ in range(3):
        client.connection.resume_writing()  # all was taken, and as much has come since
        client.pass_time()
    assert not client.given_up
    client.pass_time()
    assert client.given_up


def test_who_waits_for_an_answer_is_not_silent(client: Watched) -> None:
    client.asks()
    client.pass_time(100)
    client.answered()
    client.pass_time()
    assert not client.given_up
    client.pass_time(3)
    assert client.given_up


def test_who_asks_for_nothing_is_given_up(client: Watched) -> None:
    client.pass_time(2)
    client.asks()
    client.answered()
    client.pass_time(2)
    assert not client.given_up  # each request begins a new time
    client.pass_time(2)
    assert client.given_up


def test_what_is_written_to_its_end_must_be_taken_too(client: Watched) -> None:
    client.asks()
    client.answered()
    for n_bytes in range(900, 0, -100):
        client.left_to_take(n_bytes)
        client.pass_time()
    assert not client.given_up
    client.pass_time()
    assert client.given_up


def test_without_a_limit_an_answer_may_be_left_for_ever(client: Watched) -> None:
    client.patience_s = None
    client.asks()
    client.left_to_take(500)
    client.pass_time(100)
    assert not client.given_up
    client.patience_s = STALL_S  # as a reload sets it
    client.pass_time()
    assert client.given_up


# ── a real server ───────────────────────────────────────────────────────────────────────────────────────────────────


class Stalling:
    """A server at two ports: the system keeps much for the clients of one, and hardly anything for those of the other.

    At the first, whole answers never wait for a client to take them, so none of its clients can be given up.
    """

    def __init__(self, path: Path, folder: Path, *arguments: object, stall_s: str, times: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as usual, socket.create_server(("127.0.0.1", 0)) as narrow:
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            handed = [os.dup(usual.fileno()), os.dup(narrow.fileno())]  # above those of the standard streams
            self._narrow = narrow.getsockname()
            script = (
                "import fcntl, os\n"
                f"high = [fcntl.fcntl(number, fcntl.F_DUPFD, 50) for number in {handed}]\n"
                "os.dup2(high[0], 3), os.dup2(high[1], 4)\n"
                "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='usual:narrow')\n"
                f"from edge_runtime.serving import server; {times}"
            )
            words = ("--model", path, "--ctx", ENDLESS + 1000, "--max-tokens", ENDLESS, *arguments)
            self.process = ServerProcess(
                folder, *words, script=script, pass_fds=handed, variables={"EDGE_RUNTIME_STALL_S": stall_s}
            )
            for number in handed:
                os.close(number)

    def wait_ready(self) -> None:
        self.url = self.process.ready().url
        self.model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def body(self, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Hello"}]
        return {"model": self.model, "messages": messages, "logit_bias": NO_END, "seed": 3, **fields}

    def stall(self) -> socket.socket:
        """A client that asks for an endless stream and takes none of it."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.settimeout(PATIENCE_S)
        client.connect(self._narrow)
        data = json.dumps(self.body(max_tokens=ENDLESS, stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return client

    def stream(self, max_tokens: int) -> str:
        """The text of a stream that is read to its end."""
        asked = self.body(max_tokens=max_tokens, stream=True)
        reply = httpx.post(f"{self.url}{CHAT}", json=asked, timeout=PATIENCE_S).raise_for_status()
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"edge_runtime_{name} ")))

    def until(self, name: str, least: float) -> None:
        """Until a metric is `least` or more; each look is a request of its own, so nothing spins."""
        for _ in range(10_000):
            if self.metric(name) >= least:
                return
        raise AssertionError("".join(self.process.log))


@contextmanager
def stalling(path: Path, folder: Path, *arguments: object, stall_s: str = "0.1", times: str = "") -> Iterator[Stalling]:
    made = Stalling(path, folder, *arguments, stall_s=stall_s, times=times)
    try:
        made.wait_ready()
        yield made
    finally:
        assert made.process.stop() == 0
        assert "Traceback" not in "".join(made.process.log)


def rest_of(client: socket.socket) -> bytes:
    """All that still comes before the connection's end, however that comes."""
    parts = []
    with client, contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def path(tiny_path: Callable[..., Path]) -> Path:
    return tiny_path(tokenizer=True)


def test_a_client_that_does_not_read_is_given_up_and_frees_its_place(path: Path, tmp_path: Path) -> None:
    with stalling(path, tmp_path, "--max-conversations", 1) as server:
        client = server.stall()
        server.process.until("a client is given up")
        server.until("cancelled_requests_total", 1)
        assert len(server.stream(5)) > 0  # there is one place only
        assert b"[DONE]" not in rest_of(client)
        assert server.metric("running") == 0
        assert server.metric("generated_tokens_total") < ENDLESS


def test_others_do_not_notice(path: Path, tmp_path: Path) -> None:
    """Eight clients at once, two of which do not read."""
    n_rounds = int(os.environ.get("SERVING_SOAK", "2"))
    with stalling(path, tmp_path, "--max-conversations", 4) as server:
        alone = server.stream(60)
        before = server.process.n_descriptors()
        for round_ in range(1, n_rounds + 1):
            stalled = [server.stall() for _ in range(2)]
            with ThreadPoolExecutor(6) as pool:
                texts = list(pool.map(server.stream, [60] * 6))
            assert texts == [alone] * 6
            server.until("cancelled_requests_total", 2 * round_)
            for client in stalled:
                assert b"[DONE]" not in rest_of(client)
        assert server.metric("running") == server.metric("queue_length") == 0
        assert server.process.n_descriptors() <= before + 1  # the connection that asks for metrics


def test_the_end_does_not_wait_for_a_client_that_does_not_read(path: Path, tmp_path: Path) -> None:
    """Nor for what is left of its answer."""
    with stalling(path, tmp_path, stall_s="0", times=TIMES) as server, server.stall() as client:
        server.until("generated_tokens_total", 500)  # many times what the system takes of them
        assert server.process.stop() == 0
        assert b"[DONE]" not in rest_of(client)
