"""`edge-run serve` as a real process: the official client, signals, the service manager, and rough handling."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from .serving_helpers import NO_END, PATIENCE_S, Notified, ServerProcess

NO_SIGNAL = 0
N_WORKERS = min(32, (os.cpu_count() or 1) + 4)  # of asyncio's own pool
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def path(tiny_path: Callable[..., Path]) -> Path:
    return tiny_path(tokenizer=True)


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all tests that leave it as it was."""
    made = ServerProcess(tmp_path_factory.mktemp("server"), "--model", path, "--max-conversations", 4).ready()
    yield made
    assert made.stop() == 0
    assert "Traceback" not in "".join(made.log)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture(scope="module")
def name(client: openai.OpenAI) -> str:
    """The model's, as a client finds it."""
    return client.models.list().data[0].id


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chat(client: openai.OpenAI, name: str) -> None:
    found = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=5, logit_bias=NO_END, seed=1)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 5
    assert found.id.startswith("chatcmpl-")


def test_a_stream(client: openai.OpenAI, name: str) -> None:
    ask: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": 30, "logit_bias": NO_END, "seed": 7}
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage is not None
    assert whole.usage is not None
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens


def test_json_of_a_schema(client: openai.OpenAI, name: str) -> None:
    found = client.chat.completions.create(model=name, messages=MESSAGES, response_format=FORMAT, max_tokens=200)
    record = json.loads(found.choices[0].message.content or "")
    assert record["kind"] in ("cat", "dog")
    assert isinstance(record["old"], bool)


def test_a_text(client: openai.OpenAI, name: str) -> None:
    found = client.completions.create(model=name, prompt="Once", max_tokens=3, logit_bias=NO_END)
    assert found.choices[0].finish_reason == "length"


def test_errors_have_the_clients_own_classes(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=name, messages=MESSAGES, n=3)
    assert wrong.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=name, input="x")


def test_a_key_is_asked_for(path: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("the-right-one\n")
    key.chmod(0o600)
    made = ServerProcess(tmp_path, "--model", path, "--api-key-file", key).ready()
    try:
        with openai.OpenAI(base_url=f"{made.url}/v1", api_key="another", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="the-right-one").models.list().data
    finally:
        assert made.stop() == 0
    assert "right" not in "".join(made.log)


@pytest.mark.model
def test_the_demo_model_answers_and_moderates(tmp_path: Path) -> None:
    made = ServerProcess(tmp_path, "--max-conversations", 1).ready()
    try:
        with openai.OpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0) as client:
            model = "smollm2-135m"
            found = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=20)
            assert "Hello" in (found.choices[0].message.content or "")
            judged = client.moderations.create(input=["You are a stupid idiot.", "The train leaves at nine."])
            scores: Any = [result.category_scores.model_dump() for result in judged.results]
            assert set(scores[0]) >= {"hate", "offensive"}
            assert judged.results[0].flagged
            assert scores[0]["hate"] + scores[0]["offensive"] > scores[1]["hate"] + scores[1]["offensive"]
    finally:
        assert made.stop() == 0


# ── rough handling ──────────────────────────────────────────────────────────────────────────────────────────────────


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"edge_runtime_{name} ")))


def settled(server: ServerProcess) -> None:
    """Wait until no request is left; each look is a request of its own, so nothing spins."""
    for _ in range(1000):
        if metric(server, "running") == metric(server, "queue_length") == 0:
            return
    raise AssertionError("requests are left")


async def _rough_client(url: str, name: str, n_requests: int, random_: random.Random) -> list[int]:
    """Requests of all kinds, about every second of them given up at some moment; the statuses that came."""
    statuses = []
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        for _ in range(n_requests):
            body = {"model": name, "max_tokens": random_.choice([1, 8, 60]), "logit_bias": NO_END}
            body |= {"messages": [{"role": "user", "content": "word " * random_.choice([1, 20, 60])}]}
            body |= {"stream": random_.random() < 0.7}
            leave_after = random_.choice([None, 0, 1, 5])
            async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                statuses.append(reply.status_code)
                n_read = 0
                async for _ in reply.aiter_bytes():
                    if n_read == leave_after:
                        break
                    n_read += 1
    return statuses


def burst(url: str, name: str, n_clients: int, n_requests: int, seed: int = 0) -> list[int]:
    async def go() -> list[int]:
        clients = [_rough_client(url, name, n_requests, random.Random(seed + i)) for i in range(n_clients)]
        return [status for found in await asyncio.gather(*clients) for status in found]

    return asyncio.run(go())


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts what /proc lists")
def test_a_burst_leaves_nothing_behind(server: ServerProcess, name: str) -> None:
    """$SERVING_SOAK requests of each of 8 clients, each leaving every second of its answers."""
    n = int(os.environ.get("SERVING_SOAK", "4"))
    burst(server.url, name, 8, 2, seed=100)  # threads and pools come into being
    settled(server)
    before = server.n_descriptors(), server.n_threads()
    statuses = burst(server.url, name, 8, n)
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 8
    settled(server)
    assert server.n_threads() <= before[1] + N_WORKERS  # a pool that may grow up to there
    assert server.n_descriptors() <= before[0] + 1  # the connection that asks for metrics
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_connection_that_says_nothing_hinders_nobody(server: ServerProcess, name: str, client: openai.OpenAI) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=1).choices
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_what_is_no_http_is_refused(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as other:
        other.settimeout(PATIENCE_S)
        other.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b"400" in other.recv(1000)


def test_killed_under_load_it_starts_again(path: Path, tmp_path: Path) -> None:
    """$SERVING_KILLS times, each after another number of events of its streams."""
    for round_ in range(int(os.environ.get("SERVING_KILLS", "3"))):
        made = ServerProcess(tmp_path, "--model", path).ready()
        url = made.url
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        under_way, seen = threading.Event(), random.Random(round_).randrange(1, 20)

        def ask(number: int, url: str = url, name: str = name, seen: int = seen, begun: Any = under_way) -> None:
            body = {"model": name, "messages": MESSAGES, "max_tokens": 900, "stream": True, "logit_bias": NO_END}
            try:
                with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as reply:
                    for i, _ in enumerate(reply.iter_bytes()):
                        if i == seen:
                            begun.set()
            except httpx.HTTPError:
                pass

        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask, number) for number in range(3)]
            assert under_way.wait(PATIENCE_S)
            assert made.stop(signal.SIGKILL) == -signal.SIGKILL
            for one in asked:
                one.result(PATIENCE_S)
    made = ServerProcess(tmp_path, "--model", path).ready()
    assert not any("learnt before" in line for line in made.log)  # what was saved is whole
    assert made.stop() == 0


# ── the service manager ─────────────────────────────────────────────────────────────────────────────────────────────


def test_ready_reload_and_stop_are_told(path: Path, tmp_path: Path) -> None:
    manager, file = Notified(tmp_path), tmp_path / "own.toml"
    file.write_text("[limits]\nmax_tokens = 50\n")
    variables = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "2000000"}
    made = ServerProcess(tmp_path, "--model", path, "--config", file, variables=variables)
    try:
        assert "STATUS=" in manager.until("READY=1")
        manager.until("WATCHDOG=1")
        name = httpx.get(f"{made.url}/v1/models").json()["data"][0]["id"]

        def status(max_tokens: int) -> int:
            body = {"model": name, "messages": MESSAGES, "max_tokens": max_tokens}
            return httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=PATIENCE_S).status_code

        assert (status(50), status(51)) == (200, 400)
        file.write_text("[limits]\nmax_tokens = 60\nmax_conversations = 2\n")
        made.process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in manager.until("RELOADING=1")
        manager.until("READY=1")
        made.until("only a restart puts into force: limits.max_conversations")
        assert (status(60), status(61)) == (200, 400)
        file.write_text("[limits]\nmax_tokens = 'many'\n")
        made.process.send_signal(signal.SIGHUP)
        manager.until("READY=1")
        made.until("the configuration stays as it was")
        assert status(60) == 200
    finally:
        code = made.stop()
    assert code == 0
    manager.until("STOPPING=1")
    manager.close()


def test_a_port_that_systemd_opened(path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script = (
            "import os\n"
            f"os.dup2({listener.fileno()}, 3)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='http')"
        )
        made = ServerProcess(tmp_path, "--model", path, script=script, pass_fds=(listener.fileno(),))
        try:
            made.ready()
            assert made.url == f"http://127.0.0.1:{port}"
            assert httpx.get(f"{made.url}/ready").status_code == 200
        finally:
            assert made.stop() == 0


def test_answers_under_way_come_to_their_end(path: Path, tmp_path: Path) -> None:
    made = ServerProcess(tmp_path, "--model", path).ready()
    name = httpx.get(f"{made.url}/v1/models").json()["data"][0]["id"]
    body = {"model": name, "messages": MESSAGES, "max_tokens": 400, "stream": True, "logit_bias": NO_END}
    with httpx.stream("POST", f"{made.url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as reply:
        parts = reply.iter_bytes()
        next(parts)
        made.process.send_signal(signal.SIGTERM)
        text = b"".join(parts).decode()
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert made.stop(NO_SIGNAL) == 0


def test_a_second_signal_ends_it_at_once(path: Path, tmp_path: Path) -> None:
    made = ServerProcess(tmp_path, "--model", path, "--ctx", 100_000, "--max-tokens", 90_000).ready()
    name = httpx.get(f"{made.url}/v1/models").json()["data"][0]["id"]
    body = {"model": name, "messages": MESSAGES, "max_tokens": 90_000, "stream": True, "logit_bias": NO_END}
    with httpx.stream("POST", f"{made.url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as reply:
        pieces = reply.iter_bytes()  # dropped, it would close the connection
        next(pieces)
        made.process.send_signal(signal.SIGTERM)
        made.until("stopping, answers under way: 1")
        assert made.stop(signal.SIGINT) == 128 + signal.SIGINT


def test_a_state_that_cannot_be_saved_is_told_and_served_on(path: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    manager = Notified(tmp_path)
    made = ServerProcess(tmp_path, "--model", path, variables={"NOTIFY_SOCKET": str(manager.path)})
    try:
        assert "nothing learnt is saved" in manager.until("READY=1")
        assert metric(made, "state_saved") == 0
    finally:
        assert made.stop() == 0
        manager.close()


# ── what cannot be served ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "there is no API key"),
        (("--model", "/no/such.gguf"), "/no/such.gguf"),
        (("--config", "/no/such.toml"), "there is no file"),
        (("--deadline", "-1"), "is not allowed"),
    ],
)
def test_wrong_configurations_end_at_once(path: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    made = ServerProcess(tmp_path, *(("--model", path) if "--model" not in arguments else ()), *arguments)
    made.until("(closed)")
    assert made.stop() in (1, 2)
    text = "".join(made.log)
    assert words in text
    assert "hint: " in text
    assert "Traceback" not in text


def test_a_port_that_is_taken(path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = ServerProcess(tmp_path, "--model", path, "--port", listener.getsockname()[1])
        made.until("cannot listen on")
        made.until("(closed)")
        assert made.stop() == 1
