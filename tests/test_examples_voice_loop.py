"""The voice loop: sentences, interruptions, and what the conversation remembers."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from edge_runtime.generate import Message, RunOptions, Runtime
from edge_runtime.types import Mode

from .cli_helpers import assert_clean, finish, start
from .conftest import TinyMaker
from .example_helpers import FakeRuntime, example, load_example

voice_loop = load_example("voice_loop")


class Heard(Queue[str]):
    """Lines that were heard, and /quit instead of waiting for more."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        for line in lines:
            self.put(line)

    def get(self, *_: Any) -> str:
        return "/quit" if self.empty() else super().get()

    def put_before(self, at: int, *lines: str) -> Callable[[int], None]:
        """What speaks up when a runtime is about to make token number `at`."""

        def on_token(n_tokens: int) -> None:
            if n_tokens == at:
                for line in lines:
                    self.put(line)

        return on_token


def converse(runtime: FakeRuntime | Runtime, heard: Heard, *command: str) -> list[tuple[str, str]]:
    """The conversation behind the system message, as (role, text)."""
    history: list[Message] = voice_loop.converse(runtime, heard, voice_loop.Voice(heard, command))
    assert history[0] == voice_loop.SYSTEM
    return [(m.role, m.content) for m in history[1:]]


def test_answers_are_said_by_sentence_and_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    runtime = FakeRuntime("1. It is 3.5 degrees. Take a coat!  And\n\ngloves")
    assert converse(runtime, Heard("Is it cold?")) == [
        ("user", "Is it cold?"),
        ("assistant", "1. It is 3.5 degrees. Take a coat! And gloves"),
    ]
    assert capsys.readouterr().out == "1. It is 3.5 degrees.\nTake a coat!\nAnd\ngloves\n"


def test_a_new_line_stops_the_answer_within_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    heard = Heard("Count sheep.")
    interrupt = heard.put_before(5, "Stop. What is a cat?")
    runtime = FakeRuntime("One sheep. Two sheep. Three sheep. Four", "An animal.", on_token=interrupt)
    history = converse(runtime, heard)
    # the sixth token was being made when the line came; the answer has no seventh
    assert runtime.n_tokens == 6 + 2
    assert runtime.n_closed == 1
    assert capsys.readouterr().out == "One sheep.\nTwo sheep.\nAn animal.\n"
    assert history == [
        ("user", "Count sheep."),
        ("assistant", "One sheep. Two sheep."),
        ("user", "Stop. What is a cat?"),
        ("assistant", "An animal."),
    ]
    assert [(m.role, m.content) for m in runtime.asked[-1][1:]] == history[:-1]


def test_a_question_that_got_no_sentence_is_forgotten() -> None:
    heard = Heard("First?")
    runtime = FakeRuntime("A long beginning", "Yes.", on_token=heard.put_before(1, "Second?"))
    assert converse(runtime, heard) == [("user", "Second?"), ("assistant", "Yes.")]


def test_quit_stops_an_answer() -> None:
    heard = Heard("Talk.")
    runtime = FakeRuntime("Bla. Bla bla. Bla", on_token=heard.put_before(2, "/quit", "never answered"))
    assert converse(runtime, heard) == [("user", "Talk."), ("assistant", "Bla.")]
    assert runtime.n_tokens == 3


def test_the_end_of_the_input_waits_for_the_answer() -> None:
    heard: Queue[str] = Queue()
    thread = threading.Thread(target=voice_loop.listen, args=(["\n", "  Hello  \n"], heard), daemon=True)
    thread.start()
    history = voice_loop.converse(FakeRuntime("Good day. How are you?"), heard, voice_loop.Voice(heard))
    thread.join(60)
    assert not thread.is_alive()
    assert history[-1].content == "Good day. How are you?"


def test_the_oldest_turns_leave_room_for_an_answer() -> None:
    runtime = FakeRuntime("a", "b", "c")
    questions = [letter * 700 for letter in "xyz"]
    heard: Queue[str] = Queue()
    voice = voice_loop.Voice(heard)
    history = [voice_loop.SYSTEM]
    for question in questions:
        history.append(Message("user", question))
        history.append(Message("assistant", " ".join(voice_loop.answer(runtime, history, heard, voice))))
    assert [m.content[0] for m in runtime.asked[-1][1:]] == ["y", "b", "z"]


def test_a_command_speaks_each_sentence(tmp_path: Path) -> None:
    said = tmp_path / "said"
    converse(FakeRuntime("One. Two. Three."), Heard("Go."), "sh", "-c", f"cat >> {shlex.quote(str(said))}")
    assert said.read_text() == "One.\nTwo.\nThree.\n"


def test_a_new_line_silences_the_command_and_what_it_began_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    endless = (sys.executable, "-c", "import signal; signal.pause()")
    heard = Heard("Go.")
    voice = voice_loop.Voice(heard, endless)
    history = [voice_loop.SYSTEM, Message("user", "Go.")]
    heard.get()
    runtime = FakeRuntime("One. Two. Three.", on_token=heard.put_before(2, "Stop."))
    assert voice_loop.answer(runtime, history, heard, voice) == ["One."]
    assert voice._process.returncode == -signal.SIGKILL
    assert capsys.readouterr().out == "One.\n"


def test_a_command_that_does_not_read_is_no_error() -> None:
    assert converse(FakeRuntime("One. Two."), Heard("Go."), "true")[-1] == ("assistant", "One. Two.")


def test_an_interrupted_runtime_goes_on(tiny_path: TinyMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run in which nobody had begun to answer the first question."""
    monkeypatch.setattr(voice_loop, "MAX_TOKENS", 16)
    options = RunOptions(str(tiny_path("llama", tokenizer=True)), Mode.FULL, n_ctx=512, n_threads=1)

    def answers(*lines: str, interrupted: bool) -> list[tuple[str, str]]:
        heard = Heard(*lines)
        interruptions = ["And now?"] if interrupted else []

        class Talk(Runtime):
            def stream(self, *arguments: Any, **others: Any) -> Any:
                with closing(super().stream(*arguments, **others)) as chunks:
                    for n, chunk in enumerate(chunks):
                        if n == 4 and interruptions:
                            heard.put(interruptions.pop())
                        yield chunk

        with Talk(options) as runtime:
            return converse(runtime, heard)

    assert answers("Go.", interrupted=True) == answers("And now?", interrupted=False)


def test_mistakes_end_it_with_a_word(tmp_path: Path) -> None:
    result = finish(start(example("voice_loop", "--model", tmp_path / "none.gguf")))
    assert_clean(result, 1)
    with pytest.raises(SystemExit, match="2"):
        voice_loop.main(["--speak", '"'])


def test_ctrl_c_ends_it_without_a_word(tiny_path: TinyMaker) -> None:
    with start(example("voice_loop", "--model", tiny_path("llama", tokenizer=True))) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hello\n")
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.wait(120)
        result = finish(process)
    assert_clean(result, 130)
    assert result.err == ""


@pytest.mark.model
def test_the_program_answers() -> None:
    with start(example("voice_loop")) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Name a river of France.\n")
        first = process.stdout.readline()
        process.stdin.write(b"And one of Italy?\n")
        result = finish(process)
    assert_clean(result, 0)
    lines = (first.decode() + result.out).splitlines()
    assert len(lines) >= 2
    assert all(line == line.strip() and line for line in lines)
