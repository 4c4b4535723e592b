"""Requests that come while the model is being loaded wait for it, and nothing else does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.serving.connections import WhileLoading

from .serving_helpers import CHAT, MODEL, NO_END, PATIENCE_S, ServerProcess, ask, begin, chat

NO_SIGNAL = 0
# loading begins when somebody writes to the pipe
HELD = """
from edge_runtime.serving import server
load = server.Backend
def held(*arguments):
    with open({pipe!r}) as pipe:
        pipe.read()
    return load(*arguments)
server.Backend = held
server._LOADING_S = {most_s}
"""


async def answered(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def test_what_needs_the_model_waits_for_it_and_nothing_else() -> None:
    async def go() -> None:
        decided = asyncio.Event()
        app = WhileLoading(answered, decided, PATIENCE_S)
        early = [begin(app, CHAT, chat()), begin(app, "/v1/models", method="GET")]
        for path in ("/health", "/ready", "/metrics"):
            assert (await ask(app, path, method="GET")).status == 200
        assert [one.status for one in early] == [0, 0]
        decided.set()
        assert [(await one.done()).status for one in early] == [200, 200]
        assert (await ask(app, CHAT, chat())).status == 200

    asyncio.run(go())


def test_nobody_waits_for_ever() -> None:
    async def go() -> None:
        found = await ask(WhileLoading(answered, asyncio.Event(), 0.01), CHAT, chat())
        assert found.status == 200

    asyncio.run(go())


# ── a real server ───────────────────────────────────────────────────────────────────────────────────────────────────


class Loading:
    """A server that has not begun to load, and requests that it has seen."""

    def __init__(self, path: Path, folder: Path, most_s: float) -> None:
        self._pipe = folder / "pipe"
        os.mkfifo(self._pipe)
        model = folder / f"{MODEL}.gguf"
        model.symlink_to(path)
        script = HELD.format(pipe=str(self._pipe), most_s=most_s)
        self.process = ServerProcess(folder, "--model", model, script=script)

    def wait_listening(self) -> None:
        self.url = self.process.url

    def load(self) -> None:
        self._pipe.write_text("")

    def get(self, path: str) -> int:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE_S).status_code

    def send(self) -> socket.socket:
        """A request that the server has seen when this returns, for it has answered a later one."""
        host, port = self.url.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        data = json.dumps({**body, "logit_bias": NO_END}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert self.get("/ready") == 503
        return client


def reply(client: socket.socket) -> str:
    """All of it."""
    with client, client.makefile("rb") as file:
        return file.read().decode()


@pytest.fixture
def loading(tiny_path: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    @contextmanager
    def start(most_s: float = PATIENCE_S) -> Iterator[Loading]:
        made = Loading(tiny_path(tokenizer=True), tmp_path, most_s)
        try:
            made.wait_listening()
            yield made
        finally:
            made.process.stop(NO_SIGNAL if made.process.process.poll() is not None else signal.SIGKILL)

    return start


def test_an_early_request_is_answered(loading: Callable[..., Any]) -> None:
    with loading() as server:
        early = [server.send() for _ in range(3)]
        assert server.get("/health") == 200
        server.load()
        for client in early:
            assert reply(client).startswith("HTTP/1.1 200 ")
        assert server.process.stop() == 0


def test_a_model_that_takes_too_long_is_not_waited_for(loading: Callable[..., Any]) -> None:
    with loading(most_s=0.01) as server:
        told = reply(server.send()).lower()
        assert told.startswith("http/1.1 503 ")
        assert "retry-after: " in told


def test_the_end_lets_early_requests_go(loading: Callable[..., Any]) -> None:
    with loading() as server:
        early = server.send()
        server.process.process.send_signal(signal.SIGTERM)
        assert reply(early).startswith("HTTP/1.1 503 ")
        server.load()
        assert server.process.stop(NO_SIGNAL) == 0
        assert "Traceback" not in "".join(server.process.log)
