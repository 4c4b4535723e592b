"""The HTTP interface in this process: answers in both forms, and what is refused and how."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.serving.guard import Rules

from .serving_helpers import CHAT, MODEL, OPEN, Rig, asked, chat, check_error, rig


@pytest.fixture(scope="module")
def path(tiny_path: Callable[..., Path]) -> Path:
    return tiny_path(tokenizer=True)


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[Rig]:
    with rig(path) as made:
        yield made


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_answer(shared: Rig) -> None:
    found = asked(shared, body=chat(max_tokens=5))
    assert found.status == 200
    record = found.json
    assert record["object"] == "chat.completion"
    assert record["model"] == MODEL
    assert record["system_fingerprint"].startswith("edge_runtime-")
    (choice,) = record["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = record["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_a_stream_says_the_same_as_a_whole_answer(shared: Rig) -> None:
    whole = asked(shared, body=chat(max_tokens=40)).json
    found = asked(shared, body=chat(max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.body.endswith(b"data: [DONE]\n\n")
    *parts, last, usage = found.events
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"]["content"] for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in (*parts, last))
    assert len({event["id"] for event in found.events}) == 1


def test_a_stream_without_usage_says_nothing_of_it(shared: Rig) -> None:
    assert all("usage" not in event for event in asked(shared, body=chat(stream=True)).events)


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [10, 11, 12], [[10, 11, 12]]])
def test_a_text_is_continued(shared: Rig, prompt: Any) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "logit_bias": {"2": -100, "4": -100}}
    record = asked(shared, "/v1/completions", body).json
    assert record["object"] == "text_completion"
    assert record["choices"][0]["finish_reason"] == "length"
    events = asked(shared, "/v1/completions", {**body, "stream": True}).events
    assert {event["object"] for event in events} == {"text_completion"}


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(shared: Rig) -> None:
    whole = asked(shared, body=chat(max_tokens=60)).json["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2]
    record = asked(shared, body=chat(max_tokens=60, stop=[middle])).json["choices"][0]
    assert record["message"]["content"] == whole[: whole.index(middle)]
    assert record["finish_reason"] == "stop"


def test_a_seed_makes_answers_alike(shared: Rig) -> None:
    def text(seed: int) -> str:
        body = chat(max_tokens=30, seed=seed, temperature=1.5)
        return str(asked(shared, body=body).json["choices"][0]["message"]["content"])

    assert text(5) == text(5)
    assert len({text(seed) for seed in range(4)}) > 1
    assert text(-1) == text(-1)


def test_a_bias_decides(shared: Rig) -> None:
    body = chat(max_tokens=4, logit_bias={str(5 + ord("x")): 100}, temperature=0)
    assert asked(shared, body=body).json["choices"][0]["message"]["content"] == "xxxx"


def test_penalties_keep_a_token_from_coming_again(shared: Rig) -> None:
    def text(**fields: Any) -> str:
        body = chat(max_tokens=3, logit_bias={str(5 + ord(c)): 60 for c in "xyz"}, temperature=0, **fields)
        return str(asked(shared, body=body).json["choices"][0]["message"]["content"])

    assert len(set(text())) == 1 or len(set(text())) < len(set(text(presence_penalty=2, frequency_penalty=2))) + 1
    assert set(text(presence_penalty=2.0, repeat_penalty=10)) <= set("xyz")


def test_json_is_json_whatever_the_model_says(shared: Rig) -> None:
    schema = {
        "type": "object",
        "properties": {"good": {"type": "boolean"}, "n": {"enum": [1, 22]}},
        "required": ["good", "n"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(5):
        body = chat(max_tokens=200, seed=seed, response_format=form, logit_bias={})
        choice = asked(shared, body=body).json["choices"][0]
        assert choice["finish_reason"] == "stop"
        record = json.loads(choice["message"]["content"])
        assert isinstance(record["good"], bool)
        assert record["n"] in (1, 22)


def test_content_in_parts_is_one_text(shared: Rig) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    one = asked(shared, body=chat()).json
    two = asked(shared, body=chat(messages=[{"role": "user", "content": parts}])).json
    assert one["choices"] == two["choices"]
    assert two["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"n": True}, "n"),
        ({"colour": "red"}, "colour"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 201}, "max_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 7}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"logit_bias": {"seven": 1}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"model": None}, "model"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_is_wrong_is_named(shared: Rig, fields: dict[str, Any], param: str) -> None:
    found = asked(shared, body=chat(**fields))
    assert found.status == 400
    named = found.json["error"]["param"]
    assert named == param or named.startswith(f"{param}.")


@pytest.mark.parametrize("fields", [{"n": 1}, {"tools": []}, {"user": "me"}, {"logprobs": False}, {"stop": None}])
def test_what_asks_for_nothing_is_let_pass(shared: Rig, fields: dict[str, Any]) -> None:
    assert asked(shared, body=chat(max_tokens=1, **fields)).status == 200


def test_a_prompt_longer_than_the_context(shared: Rig) -> None:
    error = check_error(asked(shared, body=chat("word " * 200)), 400, "messages")
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"model": ' + b"9" * 5000 + b"}", b"null"])
def test_bodies_that_are_no_request(shared: Rig, data: bytes) -> None:
    found = asked(shared, pieces=[data])
    assert found.status == 400
    assert found.json["error"]["type"] == "invalid_request_error"


def test_another_model_there_is_not(shared: Rig) -> None:
    assert check_error(asked(shared, body=chat(model="gpt-9")), 404, "model")["code"] == "model_not_found"
    check_error(asked(shared, "/v1/models/gpt-9", method="GET"), 404, "model")
    check_error(asked(shared, "/v1/moderations", {"input": "x", "model": "gpt-9"}), 404, "model")


def test_other_paths_and_methods(shared: Rig) -> None:
    check_error(asked(shared, "/v1/embeddings", {}), 404)
    found = asked(shared, CHAT, method="GET")
    check_error(found, 405)
    assert found.headers["allow"] == "POST"
    check_error(asked(shared, "/docs", method="GET"), 404)


def test_only_json_is_read(shared: Rig) -> None:
    """A web page may send plain text to any server without asking."""
    check_error(asked(shared, body=chat(), headers={"content-type": "text/plain"}), 415)
    check_error(asked(shared, body=chat(), headers={"content-type": ""}), 415)
    assert asked(shared, body=chat(), headers={"content-type": "application/json; charset=utf-8"}).status == 200


def test_the_name_of_a_web_page_is_not_ours(shared: Rig) -> None:
    check_error(asked(shared, body=chat(), headers={"host": "evil.example"}), 403)
    for host in ("127.0.0.1:8080", "[::1]:8080", "LOCALHOST", "[::1]"):
        assert asked(shared, "/v1/models", method="GET", headers={"host": host}).status == 200


def with_rules(rig: Rig, rules: Rules, test: Callable[[], None], origins: tuple[str, ...] = ()) -> None:
    rig.app.set_rules(rules, origins)
    try:
        test()
    finally:
        rig.app.set_rules(OPEN, ())


def test_a_body_that_is_too_large(shared: Rig) -> None:
    def test() -> None:
        whole = json.dumps(chat("x" * 2000)).encode()
        check_error(asked(shared, pieces=[whole], headers={"content-length": str(len(whole))}), 413)
        check_error(asked(shared, pieces=[whole[:600], whole[600:]]), 413)  # it does not say how long it is
        check_error(asked(shared, pieces=[b"{}"], headers={"content-length": "9" * 30}), 413)
        assert asked(shared, body=chat()).status == 200

    with_rules(shared, replace(OPEN, max_body_bytes=1024), test)


def test_a_key(shared: Rig) -> None:
    def test() -> None:
        for given in ("", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer secret2", "Bearer sécret"):
            found = asked(shared, body=chat(), headers={"authorization": given})
            assert check_error(found, 401)["code"] == "invalid_api_key"
            assert found.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer secret", "host": "any.example"}
        assert asked(shared, body=chat(), headers=right).status == 200
        check_error(asked(shared, "/metrics", method="GET"), 401)
        assert asked(shared, "/health", method="GET").status == 200

    with_rules(shared, replace(OPEN, api_key="secret", local_names_only=False), test)


def test_cors_is_off_unless_a_page_is_named(shared: Rig) -> None:
    page = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in asked(shared, CHAT, method="OPTIONS", headers=page).headers

    def test() -> None:
        found = asked(shared, CHAT, method="OPTIONS", headers=page)
        assert found.headers["access-control-allow-origin"] == "https://page.example"
        other = asked(shared, CHAT, method="OPTIONS", headers={**page, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers

    with_rules(shared, OPEN, test, ("https://page.example",))


def test_what_fails_unexpectedly_says_nothing_of_the_prompt(
    shared: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = "the secret words of a prompt"

    def broken(*_: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(shared.service.backend, "chat_tokens", broken)
    with caplog.at_level(logging.DEBUG):
        found = asked(shared, body=chat(words))
    check_error(found, 500)
    assert b"secret" not in found.body
    assert "RuntimeError" in caplog.text
    assert words not in caplog.text


def test_the_log_has_a_line_of_each_request_and_no_text(shared: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        found = asked(shared, body=chat("Say banana", max_tokens=3))
    (line,) = [text for text in caplog.messages if found.headers["x-request-id"] in text]
    assert f"POST {CHAT} 200" in line
    assert "answer=3" in line
    assert "banana" not in caplog.text
