"""A service inside the test's own process, with an engine that can be held; and `edge-run serve` as a real process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

from edge_runtime.batch_costs import BatchCosts
from edge_runtime.config import LimitsConfig
from edge_runtime.exits.pack import ExitPack
from edge_runtime.native import ContextOptions
from edge_runtime.resolve import RunOptions, checked_header, resolve
from edge_runtime.sensors.reading import Reading
from edge_runtime.sensors.sampler import Sampler
from edge_runtime.service.watchdog import Watchdog
from edge_runtime.serving.app import Application
from edge_runtime.serving.backend import Backend, Plan
from edge_runtime.serving.guard import Rules
from edge_runtime.serving.metrics import Metrics
from edge_runtime.serving.moderation import Moderation
from edge_runtime.serving.routes import Service
from edge_runtime.serving.worker import EngineThread, Opened
from edge_runtime.types import Mode

from .cli_helpers import environment, program

PATIENCE_S = 60.0
MODEL = "tiny"
CHAT = "/v1/chat/completions"
NO_END = {"2": -100, "4": -100}  # a bias against the tokens that would end an answer
OPEN = Rules(None, 2**20, 60.0, True)
COSTS = BatchCosts((1, 16), (1.0, 1.5), 0.001, invariant=True)  # drafts nearly for nothing
LIMITS = LimitsConfig(max_conversations=2, queue_length=1, max_tokens=200, deadline_s=None)


# ── in this process ─────────────────────────────────────────────────────────────────────────────────────────────────


class Gate:
    """Stands before each step of an engine: open, or letting single steps through."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self._open = True
        self.waiting = threading.Event()  # the engine stands before it
        self.failure: BaseException | None = None  # what the next step raises

    def hold(self) -> None:
        self._steps = threading.Semaphore(0)
        self.waiting.clear()
        self._open = False

    def let(self, n: int = 1) -> None:
        self.waiting.clear()
        self._steps.release(n)

    def release(self) -> None:
        self._open = True
        self._steps.release()

    def wait(self) -> None:
        while not self._open:
            if self._steps.acquire(blocking=False):
                break
            self.waiting.set()
            if self._steps.acquire(timeout=PATIENCE_S):
                break
        if self.failure is not None:
            raise self.failure


class FakeSampler:
    """Stands for a sampler of sensors."""

    def __init__(self) -> None:
        self.latest: Reading | None = Reading(0.0)


class Rig:
    """A service with a tiny model, whose engine stands behind a gate."""

    def __init__(
        self,
        path: Path,
        limits: LimitsConfig = LIMITS,
        rules: Rules = OPEN,
        origins: tuple[str, ...] = (),
        run: RunOptions | None = None,
        pack: ExitPack | None = None,
    ) -> None:
        """`run` with `pack` is resolved here; None: n-gram drafts."""
        self.gate, self.metrics = Gate(), Metrics()
        self._changed = threading.Event()
        watchdog = Watchdog(lambda: None, 60.0)
        self._path, self._limits, self._pack = path, limits, pack
        self._run = run or RunOptions(mode=Mode.VERIFIED)
        self.sampler = FakeSampler()
        self.thread = EngineThread(self._open, watchdog, self.metrics, limits.queue_length, self._changed.set)
        moderation = Moderation(lambda: None, watchdog, self.metrics, 1)
        self.service = Service(self.thread, self.metrics, moderation, limits)
        self.app = Application(self.service, rules, origins, show_document=True)
        self.metrics.load = lambda: self.thread.load
        self.metrics.engine = lambda: self.engine.stats

    def _open(self) -> Opened:
        n = self._limits.max_conversations
        options = ContextOptions(n_ctx=512 * n, n_batch=64, n_threads=1, n_seq_max=n, flash_attention=True)
        asked = replace(self._run, model=str(self._path), n_threads=1, n_batch=64, flash_attention=True)
        header = checked_header(str(self._path))
        plan = Plan(
            header, MODEL, 512, options, resolve(asked, header, 512, self._pack, lambda _text: None), self._pack
        )
        with mock.patch("edge_runtime.serving.backend.kept_batch_costs", return_value=COSTS):
            backend = self.service.backend = Backend(plan, lambda _text: None)
        self.engine = backend.engine
        step = self.engine.step

        def gated() -> Any:
            self.gate.wait()
            return step()

        self.engine.step = gated  # type: ignore[method-assign]
        self.metrics.exits = lambda: backend.exits
        self.metrics.rung = lambda: None if self.thread.pilot is None else self.thread.pilot.rung
        return backend.opened(cast(Sampler, self.sampler))

    def start(self) -> None:
        self.thread.start()
        self.wait_changed()
        assert self.thread.failure is None, self.thread.failure

    def wait_changed(self) -> None:
        assert self._changed.wait(PATIENCE_S)
        self._changed.clear()

    def close(self) -> None:
        self.gate.release()
        self.service.moderation.close()
        self.thread.stop()
        assert self.thread.join(PATIENCE_S)

    def check_free(self) -> None:
        """No request and no sequence is left in use."""
        assert self.thread.n_open == 0
        assert not any(sequence.busy for sequence in self.engine.pool.sequences)


@contextmanager
def rig(path: Path, **changes: Any) -> Iterator[Rig]:
    made = Rig(path, **changes)
    made.start()
    try:
        yield made
    finally:
        made.close()


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    """The body of a request that ends only at `max_tokens`."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "logit_bias": NO_END}
    return {**body, "seed": 1, **fields}


@dataclass
class Exchange:
    """One request to an ASGI application, and what has come of it so far."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    may_send: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: a client that does not read
    task: asyncio.Task[None] | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What a stream said, `[DONE]` left out."""
        texts = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [json.loads(text) for text in texts if text != "[DONE]"]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.wait_for(self.grown.wait(), PATIENCE_S)
            self.grown.clear()

    async def done(self) -> Exchange:
        assert self.task is not None
        await asyncio.wait_for(self.task, PATIENCE_S)
        return self


def begin(
    app: Any,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    pieces: list[bytes] | None = None,
) -> Exchange:
    """Send a request; `pieces` instead of a JSON body. Must be called in an event loop."""
    found = Exchange()
    found.may_send.set()
    data = [json.dumps(body).encode()] if pieces is None else list(pieces)
    sent = {"host": "localhost:8080", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin1")) for name, value in sent.items() if value],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }

    async def receive() -> dict[str, Any]:
        if data:
            return {"type": "http.request", "body": data.pop(0), "more_body": bool(data)}
        await found.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await found.may_send.wait()
        if message["type"] == "http.response.start":
            found.status = message["status"]
            found.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            found.body += message.get("body", b"")
        found.grown.set()

    found.task = asyncio.create_task(app(scope, receive, send))
    return found


async def ask(app: Any, path: str, body: Any = None, **options: Any) -> Exchange:
    return await begin(app, path, body, **options).done()


@asynccontextmanager
async def held(rig: Rig) -> AsyncIterator[None]:
    """While inside, the engine makes no step by itself."""
    rig.gate.hold()
    try:
        yield
    finally:
        rig.gate.release()


async def until(condition: Callable[[], object]) -> None:
    """Let others work until something is so that nobody tells of."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.to_thread(os.sched_yield)


async def standing(rig: Rig) -> None:
    """Wait until the engine stands before the gate, with something to do."""
    assert await asyncio.to_thread(rig.gate.waiting.wait, PATIENCE_S)


def run(rig: Rig, test: Callable[[Rig], Awaitable[None]]) -> None:
    async def go() -> None:
        await test(rig)

    asyncio.run(go())
    rig.check_free()


def asked(rig: Rig, path: str = CHAT, body: Any = None, **options: Any) -> Any:
    async def go() -> Any:
        return await ask(rig.app, path, body, **options)

    return asyncio.run(go())


def check_error(found: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert found.status == status, found.body
    assert found.headers["content-type"] == "application/json"
    assert found.headers["x-request-id"].startswith("req_")
    error = found.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    return dict(error)


# ── a process of its own ────────────────────────────────────────────────────────────────────────────────────────────


class Notified:
    """A service manager's socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(PATIENCE_S)

    def until(self, word: str) -> str:
        """The next message with `word` in it."""
        while True:
            text = self._socket.recv(4096).decode()
            if word in text:
                return text

    def close(self) -> None:
        self._socket.close()


class ServerProcess:
    """`edge-run serve` on a port of its own; its log is read as it comes."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        variables: dict[str, str] | None = None,
        script: str = "",
        **options: Any,
    ) -> None:
        own = {
            "EDGE_RUNTIME_CACHE": str(folder / "cache"),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        self.log: list[str] = []
        self._grown = threading.Condition()
        self.process = subprocess.Popen(
            program("serve", "--port", 0, "--threads", 1, *arguments, script=script),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**environment(), **own, **(variables or {})},
            start_new_session=True,
            text=True,
            **options,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grown:
                self.log.append(line)
                self._grown.notify_all()
        with self._grown:
            self.log.append("(closed)\n")
            self._grown.notify_all()

    def until(self, word: str) -> str:
        """The first line of the log with `word` in it."""

        def found() -> str | None:
            line = next((line for line in self.log if word in line), None)
            return line or ("(closed)" if "(closed)\n" in self.log else None)

        with self._grown:
            assert self._grown.wait_for(found, PATIENCE_S), f"no {word!r} in {self.log}"
            line = found()
        assert line is not None
        assert line != "(closed)" or word == "(closed)", "".join(self.log)
        return line

    @property
    def url(self) -> str:
        return self.until("listening on ").split("listening on ")[1].strip()

    def ready(self) -> ServerProcess:
        self.until("ready: ")
        return self

    def n_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def n_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            code = self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self._reader.join(PATIENCE_S)
            if self.process.stderr is not None:
                self.process.stderr.close()
        return code
