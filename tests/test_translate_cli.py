"""`edge-run translate`: files, pipes and subtitles, both outputs, Ctrl-C, and every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from edge_runtime import cli, translate_run
from edge_runtime.errors import EdgeError, PromptError
from edge_runtime.translate_cli import TRANSLATE_EPILOG, translate
from edge_runtime.translate_run import MAX_LINE, TranslateRequest, decode, translate_text

from .cli_helpers import Result, RunCli, assert_clean, finish, program, runner, start
from .translate_fakes import FakeAnswers

FROM_TO = ("translate", "--from", "en", "--to", "fr")
# in a process of its own: the verb, with answers that are not a model's, and Ctrl-C at a certain sentence
SCRIPT = """
import typer
from edge_runtime import cli, translate_run
from edge_runtime.translate_cli import translate
from tests.translate_fakes import FakeAnswers, capitals
app = typer.Typer()
app.callback()(lambda: None)
app.command("translate")(translate)
cli.app_command = lambda: typer.main.get_command(app)
def reply(question):
    if "stop here" in question:
        import signal, os
        os.kill(os.getpid(), signal.SIGINT)
    return capitals(question)
translate_run.open_answers = lambda *_: FakeAnswers(reply)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> FakeAnswers:
    fake = FakeAnswers()
    monkeypatch.setattr(translate_run, "open_answers", lambda *_: fake)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answers: FakeAnswers) -> RunCli:
    """The verb as the command line runs it, with answers that are not a model's."""
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command(epilog=TRANSLATE_EPILOG)(translate)
    monkeypatch.setattr(cli, "app_command", lambda: typer.main.get_command(app))
    return runner(capsys, monkeypatch)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"One. Two.\r\n\r\n  - three")
    return path


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


# ── what is translated ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file(run: RunCli, text: Path, answers: FakeAnswers) -> None:
    result = run(*FROM_TO, text)
    assert_clean(result, 0)
    assert result.out == "ONE. TWO.\r\n\r\n  - THREE"
    assert "3 sentences" in result.err
    assert "3 tokens" in result.err
    assert answers.n_closed == 1


def test_a_file_into_a_file(run: RunCli, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    result = run(*FROM_TO, text, "--out", out, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert out.read_bytes() == b"ONE. TWO.\r\n\r\n  - THREE"


def test_subtitles_by_name_and_by_option(run: RunCli, tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf1\n00:00:01,000 --> 00:00:02,000\nHello\n\n2\nno times\n"
    path = tmp_path / "film.SRT"
    path.write_bytes(data)
    by_name = run(*FROM_TO, path)
    by_option = run(*FROM_TO, "--format", "srt", stdin=data)
    assert by_name.out.encode() == by_option.out.encode() == data.replace(b"Hello", b"HELLO")
    assert "warning: line 5: a cue has no times" in by_name.err
    assert run(*FROM_TO, path, "--format", "text").out.encode() == data.replace(b"Hello", b"HELLO").replace(
        b"no times", b"NO TIMES"
    )


def test_lines_from_a_pipe(run: RunCli) -> None:
    for arguments in ((), ("-",)):
        result = run(*FROM_TO, *arguments, stdin=b"One\n\ntwo\r\nthree")
        assert_clean(result, 0)
        assert result.out == "ONE\n\nTWO\r\nTHREE"


def test_a_wrapped_text_from_a_pipe(run: RunCli, answers: FakeAnswers) -> None:
    result = run(*FROM_TO, "--wrapped", "-", stdin=b"one two\nthree four\n")
    assert result.out == "ONE TWO\nTHREE FOUR\n"
    assert len(answers.questions) == 1


def test_nothing(run: RunCli) -> None:
    result = run(*FROM_TO, stdin=b"")
    assert_clean(result, 0)
    assert (result.out, result.err) == ("", "0 sentences\n")


def test_records(run: RunCli, text: Path, tmp_path: Path) -> None:
    glossary = tmp_path / "terms.tsv"
    glossary.write_text("two\tdeux\n")
    out = tmp_path / "out.txt"
    result = run(*FROM_TO, text, "--json", "--glossary", glossary, "--out", out)
    *segments, last = records(result)
    assert [(s["line"], s["source"], s["target"]) for s in segments] == [
        (1, "One.", "ONE."),
        (1, "Two.", "TWO."),
        (3, "three", "THREE"),
    ]
    assert segments[1]["violations"] == [{"term": "two", "wanted": "deux"}]
    assert (segments[1]["retried"], segments[1]["from_memory"], segments[1]["finish"]) == (True, False, "complete")
    assert out.read_bytes() == b"ONE. TWO.\r\n\r\n  - THREE"
    assert "warning: line 1: the translation lacks what the glossary wants: 'deux' for 'two'" in result.err
    summary = last["summary"]
    assert (summary["segments"], summary["violations"], summary["retried"], summary["missed"]) == (3, 1, 1, 0)


def test_the_memory_is_used_and_counted(run: RunCli, text: Path, tmp_path: Path, answers: FakeAnswers) -> None:
    run(*FROM_TO, text)
    assert "3 of them from memory" in run(*FROM_TO, text).err
    assert len(answers.questions) == 3
    run(*FROM_TO, text, "--no-memory")
    assert len(answers.questions) == 6
    run(*FROM_TO, text, "--memory", tmp_path / "other.sqlite")
    assert len(answers.questions) == 9
    assert (tmp_path / "other.sqlite").exists()


def test_lines_that_miss_their_time_are_counted(run: RunCli, answers: FakeAnswers) -> None:
    answers.s_per_word = 0.1
    result = run(*FROM_TO, "--latency", 250, stdin=b"a b c d e\na b\n")
    assert result.out == "A B …\nA B\n"
    assert "warning: line 1: cut, because its time was over" in result.err
    assert "lines not in time: 1, problems: 1" in result.err


def test_a_damaged_memory_and_one_that_cannot_be_made(run: RunCli, text: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "memory.sqlite"
    damaged.write_bytes(b"\0" * 5000)
    result = run(*FROM_TO, text, "--memory", damaged)
    assert_clean(result, 0)
    assert "warning: the translation memory was damaged" in result.err
    result = run(*FROM_TO, text, "--memory", text / "memory.sqlite")
    assert_clean(result, 0)
    assert "is not used" in result.err


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("translate", "--from", "eng", "--to", "fr", "FILE"), "did you mean en (English)?"),
        (("translate", "--from", "en", "--to", "en", "FILE"), "from English to English"),
        (("translate", "--from", "en", "FILE"), "--to"),
        ((*FROM_TO, "missing.txt"), "No such file"),
        ((*FROM_TO, "."), "cannot be read"),
        ((*FROM_TO, "FILE", "--out", "FILE"), "is the text itself"),
        ((*FROM_TO, "FILE", "--out", "missing/out.txt"), "cannot be written"),
        ((*FROM_TO, "FILE", "--latency", "5"), "for lines from a pipe"),
        ((*FROM_TO, "--latency", "0"), "0 ms is no time"),
        ((*FROM_TO, "--latency", "nan"), "is no time"),
        ((*FROM_TO, "FILE", "--memory", "FILE"), "is a text, no translation memory"),
        ((*FROM_TO, "FILE", "--memory", "m", "--no-memory"), "exclude each other"),
        ((*FROM_TO, "FILE", "--wrapped", "--format", "srt"), "means nothing for subtitles"),
        ((*FROM_TO, "FILE", "--glossary", "missing.tsv"), "No such file"),
        ((*FROM_TO, "FILE", "--mode", "fast"), "fast"),
    ],
)
def test_mistakes(run: RunCli, text: Path, arguments: tuple[str, ...], message: str, answers: FakeAnswers) -> None:
    result = run(*(str(text) if word == "FILE" else word for word in arguments), stdin=b"Hello\n")
    assert_clean(result, 2)
    assert message in result.err
    assert result.out == ""
    assert answers.questions == []
    assert text.read_bytes() == b"One. Two.\r\n\r\n  - three"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ntwo \xff\n", "byte 0xff in line 2"),
        (b"one\n\0\n", "line 2 holds a zero byte"),
        ("one".encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_no_text(run: RunCli, tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    for result in (run(*FROM_TO, path), run(*FROM_TO, stdin=data)):
        assert_clean(result, 2)
        assert message in result.err


def test_an_endless_line(run: RunCli) -> None:
    result = run(*FROM_TO, stdin=b"x" * (MAX_LINE + 1))
    assert_clean(result, 2)
    assert "longer than 1 MiB" in result.err
    with pytest.raises(PromptError, match="longer than"):
        decode(b"x" * 2**21, "it", limit=2**20)


def test_no_input(run: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate_run.sys, "stdin", None)
    with pytest.raises(EdgeError, match="there is no text"):
        translate_text(TranslateRequest("en", "fr", "m"))


def test_a_full_disk(run: RunCli, text: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    result = run(*FROM_TO, text, "--out", "/dev/full", "--quiet")
    assert_clean(result, 1)
    assert "/dev/full cannot be written: No space left" in result.err


def test_help(run: RunCli) -> None:
    result = run("translate", "--help")
    assert result.code == 0
    assert "135 million parameters" in result.out


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def live() -> Iterator[subprocess.Popen[bytes]]:
    process = start(program(*FROM_TO, "--no-memory", script=SCRIPT))
    yield process
    process.kill()
    process.communicate()


def test_a_line_is_answered_when_it_comes(live: subprocess.Popen[bytes]) -> None:
    assert live.stdin is not None
    assert live.stdout is not None
    for word in (b"one", b"two"):
        live.stdin.write(word + b"\n")
        assert live.stdout.readline() == word.upper() + b"\n"
    live.stdin.write(b"three")  # without an end, which comes with the pipe's
    result = finish(live)
    assert_clean(result, 0)
    assert result.out == "THREE"
    assert "3 sentences" in result.err


def test_ctrl_c_between_lines(live: subprocess.Popen[bytes]) -> None:
    assert live.stdin is not None
    assert live.stdout is not None
    live.stdin.write(b"one\n")
    assert live.stdout.readline() == b"ONE\n"
    live.send_signal(signal.SIGINT)
    result = finish(live)
    assert_clean(result, 130)
    assert "1 sentence," in result.err


def test_ctrl_c_leaves_whole_lines_and_the_next_run_goes_on(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.txt"
    text.write_text("One. Two.\nThree.\nFour. Now stop here.\nFive.\n")
    result = finish(start(program(*FROM_TO, text, "--out", out, script=SCRIPT)))
    assert_clean(result, 130)
    assert out.read_text() == "ONE. TWO.\nTHREE.\n"
    assert "the same command goes on where it was" in result.err
    text.write_text(text.read_text().replace(" Now stop here.", ""))
    result = finish(start(program(*FROM_TO, text, "--out", out, script=SCRIPT)))
    assert_clean(result, 0)
    assert out.read_text() == "ONE. TWO.\nTHREE.\nFOUR.\nFIVE.\n"
    assert "5 sentences, 4 of them from memory" in result.err


def test_a_reader_that_leaves_is_no_failure(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word\n" * 50_000)
    process = start(program(*FROM_TO, text, "--quiet", script=SCRIPT))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"WORD\n"
    process.stdout.close()
    with process.stdin, process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 1


@pytest.mark.model
def test_the_bench_measures(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "bench_translate"
    command = [sys.executable, str(script), "--only", "quality", "--sentences", "2", "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["quality"]
    assert (found["sentences"], found["hit_rate"], found["same"]) == (2, 1.0, True)
