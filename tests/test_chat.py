"""Conversations: commands, what is kept, and what is dropped when the context is full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edge_runtime import chat, opening
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.chat import ChatSession, Conversation
from edge_runtime.errors import PromptError, UsageError
from edge_runtime.generate import Runtime
from edge_runtime.options import RunArguments, run_options
from edge_runtime.templates import Message
from edge_runtime.text import check_text

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What batches cost is kept there, of models that are gone after the test."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def session(tiny_path: TinyMaker) -> Iterator[ChatSession]:
    model = str(tiny_path("llama", tokenizer=True))
    arguments = RunArguments(model=model, mode="full", ctx=256, threads=1, max_tokens=8)
    said: list[str] = []
    with Runtime(run_options(arguments)) as runtime:
        session = ChatSession(runtime, arguments, said.append)
        session.said = said  # type: ignore[attr-defined]
        yield session


def said(session: ChatSession) -> str:
    return "\n".join(session.said)  # type: ignore[attr-defined]


def one_token_per_letter(messages: Sequence[Message]) -> list[int]:
    return [0] * sum(len(m.content) for m in messages)


def turns(*texts: str) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(("room", "left"), [(15, 5), (14, 3), (10, 3), (9, 3), (8, 1), (1, 1)])
def test_the_oldest_questions_go_with_their_answers(room: int, left: int) -> None:
    conversation = Conversation(None, turns("aaa", "bbb", "ccc", "ddd", "eee"))
    tokens, dropped = conversation.fit(one_token_per_letter, room)
    assert [m.content for m in conversation.turns] == ["aaa", "bbb", "ccc", "ddd", "eee"][-left:]
    assert dropped == 5 - left
    assert len(tokens) == 3 * left


def test_the_system_message_stays() -> None:
    conversation = Conversation("sys", turns("aaa", "bbb", "ccc"))
    conversation.fit(one_token_per_letter, 6)
    assert [m.content for m in conversation.messages()] == ["sys", "ccc"]


def test_turns_reuse_what_was_computed(session: ChatSession) -> None:
    session.take("Hello")
    session.take("And then?")
    assert [m.role for m in session.conversation.turns] == ["user", "assistant", "user", "assistant"]
    assert session.runtime.summary.reused_tokens > len("Hello")


def test_a_conversation_that_outgrows_the_context_goes_on_and_says_so(session: ChatSession) -> None:
    for _ in range(6):
        session.take("A question of some length, to fill it up.")
    assert "outgrew the context of 256 tokens" in said(session)
    assert "/reset" in said(session)
    assert session.conversation.turns[-1].role == "assistant"


def test_a_message_too_long_for_the_context_is_refused_and_forgotten(session: ChatSession) -> None:
    with pytest.raises(PromptError, match="the context holds 256"):
        session.take("x" * 300)
    assert session.conversation.turns == []
    session.take("short")
    assert len(session.conversation.turns) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))

    def piece(_token: int, *, special: bool = False) -> bytes:
        if not special and next(count) == 3:
            raise KeyboardInterrupt
        return b"a"

    monkeypatch.setattr(session.runtime.model, "piece", piece)
    assert session.take("Hello")
    assert session.conversation.turns[-1] == Message("assistant", "aaa")
    assert "[stopped]" in said(session)
    assert session.take("Go on")


def test_ctrl_c_before_an_answer_forgets_the_question(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session.runtime.engine.slices[0], "decode_tokens", interrupt)
        session.take("Hello")
    assert session.conversation.turns == []
    session.take("Hello")
    assert len(session.conversation.turns) == 2


def test_commands(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.take("/help")
    assert "/reset" in capsys.readouterr().err
    session.take("Hello")
    session.take("/stats")
    assert "generated tokens: 8" in capsys.readouterr().err
    session.take("/system Be brief.")
    assert session.conversation.messages()[0] == Message("system", "Be brief.")
    session.take("/mode verified")
    session.take("/reset")
    assert session.conversation.turns == []
    assert session.runtime.options.mode.value == "verified"
    assert session.take("")
    assert not session.take("/quit")


def test_modes_with_drafts_of_the_text_so_far(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "measure_batch_costs", lambda *_: BatchCosts((1, 16), (1.0, 1.0)))
    question = "one two three one two three one two"
    answers = []
    for mode in ("full", "verified", "margin"):
        session.take(f"/mode {mode}")
        session.take(question)
        session.take(question)
        answers.append([m.content for m in session.conversation.turns])
        session.take("/stats")
        session.take("/reset")
    assert answers[0] == answers[1]
    assert "drafts accepted" in capsys.readouterr().err
    session.take("/mode exit")  # heads at their usual places
    assert len(session.runtime.options.boundaries or ()) == 2


@pytest.mark.parametrize("line", ["/nonsense", "/mode", "/mode fast"])
def test_commands_that_do_not_exist(session: ChatSession, line: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        session.take(line)


def test_a_message_may_begin_with_a_slash_after_a_space(session: ChatSession) -> None:
    session.take(" /etc is what?")
    assert session.conversation.turns[0].content == "/etc is what?"


def test_every_line_of_a_pipe_is_a_turn(run: RunCli, tiny_path: TinyMaker) -> None:
    options = ("-m", tiny_path("llama", tokenizer=True), "--threads", 1, "-n", 5)
    result = run("chat", *options, stdin=b"Hello\nAgain\n/stats\n")
    assert_clean(result, 0)
    assert result.err.count("[5 tokens") == 2
    assert "messages: 4" in result.err


def test_a_broken_line_in_a_pipe_fails(run: RunCli, tiny_path: TinyMaker) -> None:
    options = ("-m", tiny_path("llama", tokenizer=True), "--threads", 1, "--quiet")
    assert_clean(run("chat", *options, stdin=b"caf\xe9\n"), 2)
    assert_clean(run("chat", *options, stdin=b"/nonsense\n"), 2)


def test_a_terminal_session_goes_on_after_an_error(
    run: RunCli, tiny_path: TinyMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/nonsense", "a\udcff", "Hello"])

    def reader() -> object:
        def read() -> str | None:
            line = next(lines, None)
            return None if line is None else check_text(line, "the message")

        return read

    monkeypatch.setattr(chat, "_terminal_reader", reader)
    monkeypatch.setattr(chat, "_on_terminal", lambda: True)
    result = run("chat", "-m", tiny_path("llama", tokenizer=True), "--threads", 1, "-n", 5)
    assert result.code == 0
    assert result.err.count("error: ") == 2
    assert "5 tokens" in result.err
