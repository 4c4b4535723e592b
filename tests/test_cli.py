"""The program as its users meet it: output, exit codes, signals and pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import __version__, models

from .cli_helpers import Result, RunCli, assert_clean, environment, finish, program, runner, start
from .conftest import TinyMaker

VERBS = ["generate", "chat", "lens", "sensors", "doctor", "models"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What batches cost is kept there, of models that are gone after the test."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_path: TinyMaker) -> tuple[object, ...]:
    """Options that name a tiny model which answers the prompt `hello` at length."""
    return "-m", tiny_path("llama", tokenizer=True), "--threads", 1


# ── help ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_version(run: RunCli) -> None:
    assert run("--version") == Result(0, f"edge-run {__version__}\n", "")


def test_no_verb_shows_the_help(run: RunCli) -> None:
    result = run()
    assert_clean(result, 0)
    assert all(verb in result.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(run: RunCli, verb: str) -> None:
    result = run(verb, "--help")
    assert_clean(result, 0)
    assert f"Examples:\n    edge-run {verb}" in result.out


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    script = "import atexit, sys; atexit.register(lambda: print({'numpy', 'llama_cpp'} & set(sys.modules)))"
    result = finish(start(program("generate", "--help", script=script)))
    assert_clean(result, 0)
    assert result.out.endswith("set()\n")


@pytest.mark.parametrize("arguments", [("nonsense",), ("generate", "--nonsense"), ("generate", "--mode", "fast", "x")])
def test_a_command_line_that_cannot_be_parsed(run: RunCli, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert_clean(result, 2)
    assert result.out == ""
    assert "--help` lists" in result.err
    assert "Value error" not in result.err


# ── generate ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(run: RunCli, model: tuple[object, ...]) -> None:
    result = run("generate", *model, "-n", 9, "--raw", "hello")
    assert_clean(result, 0)
    assert "9 tokens" in result.err
    assert "cut after 9 tokens" in result.err
    assert result.out.endswith("\n")
    quiet = run("generate", *model, "-n", 9, "--raw", "--quiet", "hello")
    assert quiet == Result(0, result.out, "")


def test_a_prompt_from_argument_file_and_pipe_is_the_same(
    run: RunCli, model: tuple[object, ...], tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("hello\n")
    options = ("generate", *model, "-n", 9, "--quiet")
    answers = [
        run(*options, "hello"),
        run(*options, "--file", file),
        run(*options, stdin=b"hello\n"),
        run(*options, "-", stdin=b"hello"),
        run(*options, "--file", "-", stdin=b"hello"),
    ]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].code == 0


@pytest.mark.parametrize("mode", ["auto", "full", "exit", "verified", "margin"])
def test_json_is_one_object_per_token_and_a_summary(run: RunCli, model: tuple[object, ...], mode: str) -> None:
    early = () if mode in ("auto", "full") else ("--threshold", "inf", "--boundaries", "2,5")
    result = run("generate", *model, "-n", 12, "--json", "--mode", mode, *early, "hello")
    assert_clean(result, 0)
    *tokens, last = [json.loads(line) for line in result.out.splitlines()]
    summary = last["summary"]
    assert len(tokens) == summary["generated_tokens"]
    assert summary["mode"] == mode
    assert all(set(t) == set(tokens[0]) for t in tokens)
    assert {"token", "text", "position", "depth", "boundary", "signals", "drafted", "relaxed", "audits"} <= set(
        tokens[0]
    )
    text = run("generate", *model, "-n", 12, "--quiet", "--mode", mode, *early, "hello").out
    assert "".join(t["text"] for t in tokens).rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize("mode", ["exit", "verified", "margin"])
def test_exits_are_shown_with_a_legend(run: RunCli, model: tuple[object, ...], mode: str) -> None:
    early = ("--mode", mode, "--threshold", "inf", "--boundaries", "2,5", "--show-exits")
    result = run("generate", *model, "-n", 12, *early, "hello")
    sign = "⌄" if mode == "exit" else "✗"
    assert sign in result.out
    assert sign in result.err


def test_drafts_of_the_text_so_far(run: RunCli, model: tuple[object, ...]) -> None:
    """The default of mode verified; its note comes once, and not with --quiet."""
    options = ("generate", *model, "-n", 12, "--raw", "one two three one two three one two")
    full = run(*options, "--quiet")
    for arguments in (("--quiet",), (), ("--draft", "ngram")):
        result = run(*options, "--mode", "verified", *arguments)
        assert_clean(result, 0)
        assert result.out == full.out
    assert "warning" not in result.err
    shown = run(*options, "--mode", "margin", "--theta", 0.01, "--show-exits", "--cap", 3)
    assert_clean(shown, 0)
    assert "✓ drafted by the text so far and accepted" in shown.err
    assert "full depth's second choice" in shown.err
    *_, last = [json.loads(line) for line in run(*options, "--mode", "margin", "--json").out.splitlines()]
    summary = last["summary"]
    assert (summary["draft"], summary["theta"], summary["boundaries"]) == ("ngram", 0.9, [])
    assert summary["changed"] == summary["relaxed"] / 12


def test_a_seed_is_reported_so_that_the_run_can_be_repeated(run: RunCli, model: tuple[object, ...]) -> None:
    options = ("generate", *model, "-n", 9, "--temperature", 1.5)
    first = run(*options, "hello")
    seed = first.err.split("seed ")[1].split("\n")[0]
    assert run(*options, "--seed", seed, "hello").out == first.out


def test_a_stop_string_of_the_answer_ends_it(run: RunCli, model: tuple[object, ...]) -> None:
    options = ("generate", *model, "-n", 30, "--quiet", "--raw")
    whole = run(*options, "hello").out
    stop = whole[5:7]
    assert run(*options, "--stop", stop, "hello").out.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")


def test_the_context_can_be_filled_to_its_end(run: RunCli, model: tuple[object, ...]) -> None:
    result = run("generate", *model, "--ctx", 64, "-n", 5000, "--raw", "hello")
    assert_clean(result, 0)
    assert "the context is full: give a larger --ctx" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "full", "--boundaries", "7"), "outside this model's 7 layers"),
        (("--mode", "full", "--boundaries", "0"), "outside this model's 7 layers"),
        (("--mode", "full", "--boundaries", "5,2"), "not in order"),
        (("--mode", "full", "--boundaries", "3,3"), "given twice"),
        (("--boundaries", "3"), "--boundaries means nothing in mode auto"),
        (("--boundaries", "two"), "are not layer numbers"),
        (("--mode", "exit", "--threshold", "nan"), "threshold nan is no bound on uncertainty"),
        (("--mode", "exit", "--threshold", "-1"), "threshold -1.0 is no bound on uncertainty"),
        (("--mode", "exit", "--threshold", "low"), "threshold 'low' is not a number"),
        (("--mode", "exit", "--threshold", "1,2,3"), "3 thresholds were given for 2 boundaries"),
        (("--mode", "full", "--threshold", "1"), "means nothing in mode full"),
        (("--threshold", "1"), "--threshold means nothing in mode auto"),
        (("--max-disagreement", "0.1"), "needs an exit pack"),
        (("--draft", "ngram"), "--draft means nothing in mode auto"),
        (("--mode", "exit", "--draft", "heads"), "--draft means nothing in mode exit"),
        (("--theta", "0.5"), "--theta means nothing in mode auto"),
        (("--mode", "verified", "--theta", "0.5"), "--theta means nothing in mode verified"),
        (("--mode", "margin", "--theta", "0"), "theta 0.0 is no ratio"),
        (("--mode", "margin", "--theta", "nan"), "theta nan is no ratio"),
        (("--mode", "verified", "--draft", "ngram", "--pack", "x"), "--pack means nothing with --draft ngram"),
        (
            ("--mode", "margin", "--draft", "ngram", "--boundaries", "3"),
            "--boundaries means nothing with --draft ngram",
        ),
        (("--audit-rate", "nan"), "--audit-rate"),
        (("--temperature", "nan"), "temperature nan"),
        (("--mode", "full", "--ctx", "16"), "the context holds 16"),
        (("--threads", "100000"), "threads"),
        (("--cap", "1000000000"), "cap"),
        (("--kv-type", "q8_0", "--no-flash-attn"), "needs flash attention"),
        (("--json", "--show-exits"), "exclude each other"),
        (("--raw", "--system", "x"), "--system needs the chat template"),
        (("--file", "x.txt"), "were both given"),
    ],
)
def test_requests_that_cannot_be_met(
    run: RunCli, model: tuple[object, ...], arguments: tuple[str, ...], words: str
) -> None:
    result = run("generate", *model, *arguments, "a prompt of some length")
    assert_clean(result, 2)
    assert words in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        ((), b"", "the prompt is empty"),
        (("",), None, "the prompt is empty"),
        ((), b"caf\xe9", "stdin is not valid UTF-8: byte 0xe9 at offset 3"),
        (("caf\udce9",), None, "the prompt is not valid UTF-8"),
        (("--file", "/no/such/file"), None, "No such file"),
        (("--file", "/"), None, "Is a directory"),
    ],
)
def test_prompts_that_are_none(
    run: RunCli, model: tuple[object, ...], arguments: tuple[str, ...], stdin: bytes | None, words: str
) -> None:
    result = run("generate", *model, *arguments, stdin=stdin)
    assert_clean(result, 2)
    assert words in result.err


def test_more_memory_than_there_is(run: RunCli, model: tuple[object, ...]) -> None:
    result = run("generate", *model, "--quiet", "--ctx", 2**31 - 1, "hello")
    assert_clean(result, 1)
    assert "this machine has" in result.err
    assert "--ctx" in result.err


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_models_are_listed_with_what_is_wrong_with_them(
    run: RunCli, tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_path("llama", tokenizer=True).read_bytes())
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv(models.ENV_MODELS, str(tmp_path))
    text = run("models")
    assert_clean(text, 0)
    assert "llama, 7 layers" in text.out
    assert str(tmp_path) in text.err
    found = json.loads(run("models", "--json").out)
    listed = {m["name"]: m for m in found["models"]}
    assert listed["tiny"]["n_layer"] == 7
    assert "cut short or damaged" in listed["broken"]["problem"]
    assert str(tmp_path) in found["looked_in"]


def test_the_default_model_missing(run: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package")
    result = run("generate", "hello")
    assert_clean(result, 1)
    assert f"hint: {models.DEMO_HINT}" in result.err
    assert models.DEMO_HINT in run("models").err


# ── signals and pipes, with real processes ──────────────────────────────────────────────────────────────────────────

LONG = ("--ctx", 60_000, "-n", 50_000, "--raw")  # so much that it is never done before the test is

INTERRUPT_AT_LOG_LINE = """
import os, signal
from edge_runtime.native import library
write = library.Log.write
def interrupting(self, level, text, user=None):
    if b"{line}" in (text or b""):
        os.kill(os.getpid(), signal.SIGINT)
    write(self, level, text, user)
library.Log.write = interrupting
"""

INTERRUPT_AT_PREFILL = """
import os, signal
from edge_runtime.slices import Slice
decode = Slice.decode_tokens
def interrupting(self, *args, **options):
    decode(self, *args, **options)
    os.kill(os.getpid(), signal.SIGINT)
Slice.decode_tokens = interrupting
"""

INTERRUPT_AT_IMPORT = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(INTERRUPT_AT_IMPORT, id="imports"),
        pytest.param(INTERRUPT_AT_LOG_LINE.format(line="load_tensors"), id="loading"),
        pytest.param(INTERRUPT_AT_LOG_LINE.format(line="llama_context"), id="opening"),
        pytest.param(INTERRUPT_AT_PREFILL, id="prefill"),
    ],
)
def test_ctrl_c_before_the_first_token(model: tuple[object, ...], script: str) -> None:
    result = finish(start(program("generate", *model, *LONG, "hello", script=script)))
    assert_clean(result, 130)
    assert result.out.strip() == ""


@pytest.mark.parametrize("mode", ["auto", "full", "exit", "verified", "margin"])
def test_ctrl_c_during_an_answer_keeps_what_there_is(model: tuple[object, ...], mode: str) -> None:
    process = start(program("generate", *model, *LONG, "--mode", mode, "hello"))
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert first
    assert_clean(result, 130)
    assert "the answer was interrupted" in result.err


def test_ctrl_c_leaves_valid_json(model: tuple[object, ...]) -> None:
    process = start(program("generate", *model, *LONG, "--json", "hello"))
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert_clean(result, 130)
    *_, last = [json.loads(line) for line in (first.decode() + result.out).splitlines()]
    assert last["summary"]["finish_reason"] == "interrupted"


def test_a_reader_that_leaves_ends_the_program_quietly(model: tuple[object, ...]) -> None:
    with start(program("generate", *model, *LONG, "--quiet", "hello")) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_do_no_harm(model: tuple[object, ...], redirection: str) -> None:
    command = program("generate", *model, "-n", 5, "hello")
    assert_clean(finish(start(["sh", "-c", f'"$@" {redirection}', "sh", *command])), 0)


def test_a_full_disk_is_an_error(model: tuple[object, ...]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    command = ["sh", "-c", '"$@" >/dev/full', "sh", *program("generate", *model, "-n", 5, "-q", "hello")]
    result = finish(start(command))
    assert result.code == 1
    assert result.err == "error: No space left on device\n"


def test_a_terminal_without_unicode_gets_what_it_can_show(
    model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    early = ("--mode", "exit", "--threshold", "inf", "--show-exits")
    result = finish(start(program("generate", *model, "-n", 5, *early, "hello")))
    assert_clean(result, 0)
    assert (result.out + result.err).isascii()


def test_two_programs_at_once_do_not_disturb_each_other(model: tuple[object, ...]) -> None:
    command = program("generate", *model, "-n", 50, "--quiet", "hello")
    results = [finish(process) for process in [start(command), start(command)]]
    assert results[0] == results[1]
    assert results[0].code == 0


@pytest.mark.model
def test_the_demo_model_by_its_name(run: RunCli) -> None:
    result = run(
        "generate", "--quiet", "--threads", 1, "-n", 12, "What is the capital of France? Answer with one word."
    )
    assert_clean(result, 0)
    assert "Paris" in result.out


def test_python_dash_m_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert done.stdout == f"edge-run {__version__}\n"
