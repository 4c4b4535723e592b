"""`edge-run labels run`, `labels show` and `moderate`: every source of messages, both outputs, and every mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import labels_run
from edge_runtime.errors import PackError, UsageError
from edge_runtime.identity import identify
from edge_runtime.labels import packs
from edge_runtime.labels.classifier import CONFIDENCE
from edge_runtime.labels.drift import WINDOW, Reference
from edge_runtime.labels.fit import Linear
from edge_runtime.labels.novelty import WordNovelty, fit_word_novelty
from edge_runtime.labels.pack import LabelPack, NgramStage
from edge_runtime.labels.packs import bundled_packs, find_pack
from edge_runtime.labels.stack import Probe
from edge_runtime.labels_run import MAX_LINE, LineCutter, RunRequest, follow, one_line, run_labels

from .cli_helpers import Result, RunCli, assert_clean, finish, program, runner, start
from .conftest import TinyMaker

LABELS = ("calm", "rude")
BITS = 8
N_EMBD = 64
MAX_TOKENS = 24
ALL_WORDS_KNOWN = WordNovelty(np.full(8, 255, np.uint8), 0.5)
NEVER, ALWAYS = 2.0, 0.0

Saver = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


def make_pack(model: Path, leave: tuple[float, ...] = (NEVER, NEVER, ALWAYS), **changes: Any) -> LabelPack:
    """A pack of random weights with probes after layers 2 and 4; `leave`: confidence from which each stage lets go."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape).astype(np.float32)

    n = len(LABELS)
    probes = tuple(
        Probe(layer, pools, Linear(0.05 * normal(n, len(pools) * N_EMBD + stage * n), normal(n)), 1.5)
        for stage, (layer, pools) in enumerate([(2, ("mean",)), (4, ("mean", "max"))], 1)
    )
    weights = random.integers(-127, 128, (n, 2**BITS)).astype(np.int8)
    pack = LabelPack(
        name="manners",
        labels=LABELS,
        instruction="Is this rude?\n",
        max_tokens=MAX_TOKENS,
        model=identify(model),
        ngrams=NgramStage(BITS, weights, np.full(n, 0.01, np.float32), np.zeros(n, np.float32), 1.0),
        probes=probes,
        weights=np.ones(n, np.float32),
        thresholds=np.repeat(np.array(leave, np.float32)[:, None], n, axis=1),
        unsure_below=0.0,
        words=ALL_WORDS_KNOWN,
        states=None,
        references={},
        report={},
    )
    return dataclasses.replace(pack, **changes)


@pytest.fixture
def save(model_path: Path, tmp_path: Path) -> Saver:
    """save(leave, **changes): the path of a pack for the tiny model."""

    def save(leave: tuple[float, ...] = (NEVER, NEVER, ALWAYS), **changes: Any) -> Path:
        path = tmp_path / "manners.gguf"
        make_pack(model_path, leave, **changes).save(path)
        return path

    return save


@pytest.fixture
def quick(save: Saver, model_path: Path) -> tuple[object, ...]:
    """The verb with a pack that decides by words alone."""
    pack = save((ALWAYS, ALWAYS, ALWAYS))
    return "labels", "run", "--pack", pack, "-m", model_path, "--threads", 1


@pytest.fixture
def deep(save: Saver, model_path: Path) -> tuple[object, ...]:
    """The verb with a pack that sends every message through all its stages."""
    return "labels", "run", "--pack", save(), "-m", model_path, "--threads", 1


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is ended when it hangs, so that reading from it comes to an end, too."""
    with start(program(*arguments)) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()


def table(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.out.splitlines()]


def records(result: Result) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages, summary."""
    *messages, last = [json.loads(line) for line in result.out.splitlines()]
    assert set(last) == {"summary"}
    return messages, last["summary"]


# ── help ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", [("labels",), ("labels", "run"), ("labels", "show"), ("moderate",)])
def test_every_verb_has_help_with_examples(run: RunCli, verb: tuple[str, ...]) -> None:
    result = run(*verb, "--help")
    assert_clean(result, 0)
    assert f"Examples:\n    edge-run {' '.join(verb)} " in result.out


def test_the_help_of_all_verbs_lists_the_new_ones(run: RunCli) -> None:
    words = run("--help").out.split()
    assert {"labels", "moderate"} <= set(words)


def test_help_loads_nothing_heavy() -> None:
    script = "import atexit, sys; atexit.register(lambda: print({'numpy', 'llama_cpp'} & set(sys.modules)))"
    result = finish(start(program("labels", "run", "--help", script=script)))
    assert_clean(result, 0)
    assert result.out.endswith("set()\n")


def test_moderate_takes_the_options_of_run_but_the_pack(run: RunCli) -> None:
    def options(*verb: str) -> set[str]:
        return {word.rstrip(",") for word in run(*verb, "--help").out.split() if word.startswith("--")}

    listed = options("labels", "run")
    assert {"--pack", "--follow", "--from-start", "--unsure-below", "--no-ngrams", "--json"} <= listed
    # the pack and the model are mentioned in the text about the verb, too
    assert "--pack PACK" not in run("moderate", "--help").out
    assert listed == options("moderate")


def test_labels_without_a_verb(run: RunCli) -> None:
    assert_clean(run("labels"), 2)


# ── sources ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_from_arguments_file_and_stdin_get_the_same(
    run: RunCli, deep: tuple[object, ...], tmp_path: Path
) -> None:
    file = tmp_path / "messages.txt"
    file.write_text("hello\nyou there\r\nlast")
    results = [
        run(*deep, "hello", "you there", "last"),
        run(*deep, "--file", file),
        run(*deep, "--file", "-", stdin=file.read_bytes()),
        run(*deep, "-", stdin=file.read_bytes()),
        run(*deep, stdin=file.read_bytes()),
    ]
    for result in results:
        assert_clean(result, 0)
        assert result.out == results[0].out
    rows = table(results[0])
    assert [row[4] for row in rows] == ["hello", "you there", "last"]
    assert all(row[0] in LABELS and row[2:4] == ["layer 4", "-"] for row in rows)
    assert all(0.5 <= float(row[1]) <= 1 for row in rows)


def test_the_summary_says_where_messages_left(run: RunCli, deep: tuple[object, ...]) -> None:
    result = run(*deep, "hello", "you there")
    assert result.err.startswith("2 messages, ")
    assert "decided: 2 (100%) after layer 4; mean 4.0 of 7 layers\n" in result.err
    assert run(*deep, "--quiet", "hello", "you there") == Result(0, result.out, "")


def test_words_alone_decide_until_told_otherwise(run: RunCli, quick: tuple[object, ...]) -> None:
    result = run(*quick, "hello")
    assert table(result)[0][2] == "layer 0"
    assert "decided: 1 (100%) before the network; mean 0.0" in result.err
    assert table(run(*quick, "--no-ngrams", "hello"))[0][2] == "layer 2"


def test_many_lines_are_decided_in_order(run: RunCli, quick: tuple[object, ...], tmp_path: Path) -> None:
    lines = [f"message {i} {'x' * (i % 50)}" for i in range(3000)]
    file = tmp_path / "many.txt"
    file.write_text("\n".join(lines) + "\n")
    assert file.stat().st_size > labels_run._PIECE
    result = run(*quick, "--file", file)
    assert_clean(result, 0)
    assert [row[4] for row in table(result)] == lines
    assert result.err.startswith("3,000 messages, ")


def test_empty_lines_get_no_decision(run: RunCli, quick: tuple[object, ...]) -> None:
    result = run(*quick, stdin=b"\n  \t \nhello\n\r\n")
    assert [row[4] for row in table(result)] == ["hello"]
    assert "3 empty messages left out" in result.err
    assert run(*quick, stdin=b"") == Result(0, "", "0 messages\n")


def test_bytes_that_are_no_utf8_are_replaced(run: RunCli, quick: tuple[object, ...]) -> None:
    from_pipe = run(*quick, stdin=b"caf\xe9 noir\n")
    assert_clean(from_pipe, 0)
    assert table(from_pipe)[0][4] == "caf\N{REPLACEMENT CHARACTER} noir"
    assert run(*quick, "caf\udce9 noir").out == from_pipe.out


def test_a_line_without_end_is_cut(run: RunCli, quick: tuple[object, ...]) -> None:
    result = run(*quick, "--json", stdin=b"a" * (MAX_LINE + 5) + b"\nhello\n")
    (long, short), summary = records(result)
    assert long["text"] == "a" * MAX_LINE
    assert short["text"] == "hello"
    assert summary["long_lines"] == 1
    in_words = run(*quick, stdin=b"a" * (MAX_LINE + 5))
    assert "1 line was longer than 1 MiB: its end was not read" in in_words.err


def test_a_reader_of_a_pipe_gets_answers_while_the_writer_goes_on(quick: tuple[object, ...]) -> None:
    with running(*quick, "--quiet") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in (b"first", b"second"):
            process.stdin.write(text + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().rstrip(b"\n").endswith(text)
        assert_clean(finish(process), 0)


def test_a_reader_that_leaves_ends_the_program_quietly(quick: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("hello you\n" * 100_000)
    with start(program(*quick, "--file", file)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_leaves_the_decisions_alone(
    save: Saver,
    model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "messages.txt"
    file.write_text("hello\nyou\n")
    request = RunRequest(str(save((ALWAYS,) * 3)), str(model_path), file=file, threads=1)
    monkeypatch.setenv("TERM", "xterm")
    for quiet in (False, True):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        run_labels(dataclasses.replace(request, quiet=quiet))
        assert ("labelling" in terminal.getvalue()) is not quiet
        assert [line.split("\t")[4] for line in capsys.readouterr().out.splitlines()] == ["hello", "you"]


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_is_one_object_per_message_and_a_summary(run: RunCli, deep: tuple[object, ...]) -> None:
    result = run(*deep, "--json", "hello", "", "a\tb" * 50)
    assert_clean(result, 0)
    assert result.err == ""
    (first, second), summary = records(result)
    assert set(first) == {
        *("text", "label", "likeliest", "confidence", "probabilities"),
        *("stage", "layer", "novelty", "unfamiliar", "n_cut"),
    }
    assert set(first["probabilities"]) == set(LABELS)
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert first["confidence"] == first["probabilities"][first["label"]]
    assert (first["stage"], first["layer"], first["n_cut"]) == (2, 4, 0)
    assert second["text"] == "a\tb" * 50
    assert second["n_cut"] > 0
    assert summary.pop("messages_per_s") > 0
    assert summary == {
        "messages": 2,
        "unsure": 0,
        "unfamiliar": 0,
        "cut": 1,
        "empty": 1,
        "long_lines": 0,
        "by_layer": {"4": 2},
        "mean_layer": 4.0,
        "drifts": [],
    }


def test_an_unsure_answer_names_the_likeliest_label(run: RunCli, quick: tuple[object, ...]) -> None:
    sure = table(run(*quick, "hello"))[0]
    result = run(*quick, "--unsure-below", 1, "hello")
    assert table(result) == [["unsure", sure[1], "layer 0", f"likeliest {sure[0]}", "hello"]]
    assert "1 unsure, 0 unlike the training messages" in result.err
    (message,), summary = records(run(*quick, "--unsure-below", 1, "--json", "hello"))
    assert (message["label"], message["likeliest"], summary["unsure"]) == ("unsure", sure[0], 1)


def test_the_pack_says_when_to_be_unsure_unless_the_user_does(run: RunCli, save: Saver, model_path: Path) -> None:
    pack = save((ALWAYS, ALWAYS, ALWAYS), unsure_below=1.0)
    verb = ("labels", "run", "--pack", pack, "-m", model_path, "--threads", 1)
    assert table(run(*verb, "hello"))[0][0] == "unsure"
    assert table(run(*verb, "--unsure-below", 0, "hello"))[0][0] in LABELS


def test_unfamiliar_messages_are_marked(run: RunCli, save: Saver, model_path: Path) -> None:
    words = dataclasses.replace(fit_word_novelty(["hello you"])[0], limit=0.5)
    verb = ("labels", "run", "--pack", save((ALWAYS, ALWAYS, ALWAYS), words=words), "-m", model_path, "--threads", 1)
    result = run(*verb, "hello you", "brillig slithy toves")
    assert [row[2:4] for row in table(result)] == [["layer 0", "-"], ["layer 4", "unfamiliar"]]
    assert "0 unsure, 1 unlike the training messages" in result.err
    known, new = table(run(*verb, "--unsure-unfamiliar", "hello you", "brillig slithy toves"))
    assert known[0] in LABELS
    assert new[0] == "unsure"
    assert new[3].endswith(", unfamiliar")


def test_messages_that_were_cut_are_counted(run: RunCli, deep: tuple[object, ...]) -> None:
    assert "1 message was longer than 24 tokens: its end was not read" in run(*deep, "a" * 50, "b").err
    assert "2 messages were longer than 24 tokens: their ends were not read" in run(*deep, "a" * 50, "b" * 50).err


def test_a_drift_is_a_warning_and_in_the_summary(run: RunCli, save: Saver, model_path: Path) -> None:
    never_so_low = Reference(np.array([0.999], np.float32), np.array([0.0], np.float32), 10_000)
    pack = save((ALWAYS, ALWAYS, ALWAYS), references={CONFIDENCE: never_so_low})
    verb = ("labels", "run", "--pack", pack, "-m", model_path, "--threads", 1)
    lines = b"hello\n" * WINDOW
    result = run(*verb, stdin=lines)
    assert_clean(result, 0)
    assert result.err.startswith(f"warning: the messages drift from the training data: 100% of the last {WINDOW} ")
    _, summary = records(run(*verb, "--json", stdin=lines))
    (drift,) = summary["drifts"]
    assert (drift["quantity"], drift["share"], drift["n"]) == (CONFIDENCE, 1, WINDOW)
    assert "warning" not in run(*verb, "--quiet", stdin=lines).err


def test_a_message_cannot_break_its_line_or_command_the_terminal(run: RunCli, quick: tuple[object, ...]) -> None:
    result = run(*quick, "one\ttwo\nthree\r\x1b[2J")
    assert result.out.count("\n") == 1
    assert table(result)[0][4] == "one\\ttwo\\nthree\\r\N{REPLACEMENT CHARACTER}[2J"


def test_a_long_message_is_shown_by_its_beginning(run: RunCli, quick: tuple[object, ...]) -> None:
    shown = table(run(*quick, "y" * 1000))[0][4]
    assert shown.rstrip("….") == "y" * 100
    assert one_line("y" * 100, 100) == "y" * 100


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("hello", "--file", "x.txt"), "more than one way"),
        (("hello", "--follow", "x.log"), "more than one way"),
        (("--file", "x.txt", "--follow", "x.log"), "more than one way"),
        (("--from-start", "hello"), "--from-start means nothing"),
        (("--file", "/no/such/file"), "No such file"),
        (("--file", "/"), "Is a directory"),
        (("--follow", "/"), "is no regular file"),
        (("--unsure-below", "1.5", "hello"), "--unsure-below"),
        (("--unsure-below", "nan", "hello"), "--unsure-below"),
    ],
)
def test_requests_that_cannot_be_met(
    run: RunCli, quick: tuple[object, ...], arguments: tuple[str, ...], words: str
) -> None:
    result = run(*quick, *arguments)
    assert_clean(result, 2)
    assert words in result.err
    assert result.out == ""


def test_no_message_on_a_terminal(
    quick: tuple[object, ...], save: Saver, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = RunRequest(str(save()), str(model_path))
    monkeypatch.setattr(sys, "stdin", Terminal("hello\n"))
    with pytest.raises(UsageError, match="there are no messages"):
        run_labels(request)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="there are no messages"):
        run_labels(request)
    run_labels(dataclasses.replace(request, texts=("hello",), threads=1))


def test_the_pack_is_an_option_that_is_needed(run: RunCli) -> None:
    result = run("labels", "run", "hello")
    assert_clean(result, 2)
    assert "--pack" in result.err


def test_a_pack_that_is_not_there(run: RunCli, model_path: Path, tmp_path: Path) -> None:
    by_path = run("labels", "run", "--pack", tmp_path / "no.gguf", "-m", model_path, "hello")
    assert_clean(by_path, 1)
    assert "no.gguf" in by_path.err
    by_name = run("labels", "run", "--pack", "no-such-pack", "-m", model_path, "hello")
    assert_clean(by_name, 1)
    assert "no pack is named 'no-such-pack'" in by_name.err


def test_a_damaged_pack(run: RunCli, save: Saver, model_path: Path) -> None:
    pack = save()
    data = bytearray(pack.read_bytes())
    data[-100] ^= 1
    pack.write_bytes(data)
    result = run("labels", "run", "--pack", pack, "-m", model_path, "hello")
    assert_clean(result, 1)
    assert "damaged" in result.err
    assert_clean(run("labels", "show", pack), 1)


def test_a_pack_for_another_model_reads_no_message(run: RunCli, save: Saver, tiny_path: TinyMaker) -> None:
    other = tiny_path("llama", tokenizer=True, n_layer=3)
    result = run("labels", "run", "--pack", save(), "-m", other, "--file", "/no/such/file")
    assert_clean(result, 1)
    assert "this is another model" in result.err


def test_ctrl_c_ends_with_the_summary(
    save: Saver, model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            data = super().read1(size)
            if not data:
                raise KeyboardInterrupt
            return data

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Interrupted(b"hello\nyou"), encoding="utf-8"))
    request = RunRequest(str(save((ALWAYS,) * 3)), str(model_path), json=True)
    with pytest.raises(KeyboardInterrupt):
        run_labels(request)
    message, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert message["text"] == "hello"
    assert last["summary"]["messages"] == 1


# ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_are_whole_however_the_bytes_come(size: int) -> None:
    data = "é\n\r\nzwei\r\nlast ü".encode()
    cutter = LineCutter()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert [line for piece in pieces for line in cutter.feed(piece)] == ["é", "", "zwei"]
    assert cutter.end() == ["last ü"]
    assert cutter.end() == []
    assert cutter.n_long == 0


def test_a_line_of_just_the_length_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_run, "MAX_LINE", 4)
    cutter = LineCutter()
    assert cutter.feed(b"abcd\nabcde\nabc") == ["abcd", "abcd"]
    assert cutter.n_long == 1
    assert cutter.feed(b"defg") == []
    assert cutter.end() == ["abcd"]
    assert cutter.n_long == 2


# ── a file that grows ───────────────────────────────────────────────────────────────────────────────────────────────


class Script:
    """Stands in for sleep: each time, the next step happens; after the last, Ctrl-C."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps: Iterator[Callable[[], object]] = iter(steps)

    def __call__(self, seconds: float) -> None:
        assert seconds > 0
        step = next(self._steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()


def append(path: Path, text: str) -> Callable[[], object]:
    def write() -> None:
        with path.open("a") as file:
            file.write(text)

    return write


def rotate(path: Path) -> Callable[[], object]:
    return lambda: path.rename(path.with_suffix(".1"))


def followed(path: Path, *steps: Callable[[], object], from_start: bool = False) -> tuple[list[str], list[str]]:
    """Lines seen until Ctrl-C, notes."""
    lines: list[str] = []
    notes: list[str] = []
    parts = follow(path, LineCutter(), notes.append, Script(*steps), from_start=from_start)
    with pytest.raises(KeyboardInterrupt):
        lines.extend(line for part in parts for line in part)
    return lines, notes


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "chat.log"
    path.write_text("old\n")
    return path


def test_following_starts_at_the_end(log: Path) -> None:
    steps = (append(log, "new"), append(log, "er\nmore\n"), lambda: None, append(log, "unfinished"))
    assert followed(log, *steps) == (["newer", "more"], [])


def test_following_from_the_start(log: Path) -> None:
    assert followed(log, append(log, "new\n"), from_start=True)[0] == ["old", "new"]


def test_following_takes_the_line_being_written_as_a_whole(log: Path) -> None:
    append(log, "begun ")()
    assert followed(log, append(log, "and done\n"))[0] == ["begun and done"]


def test_following_through_a_rotation(log: Path) -> None:
    old = log.with_suffix(".1")
    steps = (
        append(log, "a\n"),
        rotate(log),
        append(old, "b\nc"),  # the writer has the old file still open
        append(log, "d\n"),
        append(log, "e\n"),
    )
    assert followed(log, *steps)[0] == ["a", "b", "c", "d", "e"]


def test_what_is_written_between_two_looks_at_a_rotation_is_not_lost(log: Path) -> None:
    def all_at_once() -> None:
        append(log, "a\n")()
        rotate(log)()
        append(log, "b\n")()

    assert followed(log, all_at_once)[0] == ["a", "b"]


def test_following_through_a_truncation(log: Path) -> None:
    steps = (append(log, "first\nbegun"), lambda: os.truncate(log, 0), append(log, "x\n"), append(log, "y\n"))
    assert followed(log, *steps)[0] == ["first", "x", "y"]


def test_waiting_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "later.log"
    lines, notes = followed(path, lambda: None, append(path, "a\n"), append(path, "b\n"))
    assert lines == ["a", "b"]
    assert notes == [f"note: waiting for {path}, which is not there yet"]


def test_a_followed_file_is_decided_as_it_grows(
    save: Saver, model_path: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = RunRequest(str(save((ALWAYS,) * 3)), str(model_path), follow=log, from_start=True, json=True)
    seen: list[int] = []

    def look() -> None:
        seen.append(len(capsys.readouterr().out.splitlines()))

    with pytest.raises(KeyboardInterrupt):
        run_labels(request, Script(look, append(log, "new\nunfinished"), look))
    assert seen == [1, 1]
    assert json.loads(capsys.readouterr().out)["summary"]["messages"] == 2


def test_following_as_a_program(quick: tuple[object, ...], log: Path) -> None:
    with running(*quick, "--follow", log, "--from-start") as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(b"\told\n")
        append(log, "new\n")()
        assert process.stdout.readline().endswith(b"\tnew\n")
        process.send_signal(signal.SIGINT)
        result = finish(process)
    assert_clean(result, 130)
    assert result.err.startswith("2 messages, ")


# ── packs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bundle(save: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled packs with the moderation pack."""
    folder = tmp_path / "packs"
    folder.mkdir()
    save((ALWAYS,) * 3).rename(folder / "moderation-smollm2-135m.gguf")
    monkeypatch.setattr(packs, "_FOLDER", folder)
    return folder


def test_a_pack_is_found_by_path_name_or_short_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = bundle / "moderation-smollm2-135m.gguf"
    assert find_pack("moderation") == find_pack("moderation-smollm2-135m") == bundled
    assert bundled_packs() == {"moderation": bundled, "moderation-smollm2-135m": bundled}
    assert find_pack("./x") == Path("x")
    assert find_pack("x.gguf") == Path("x.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").touch()
    assert find_pack("local") == Path("local")


def test_an_unknown_name_gets_those_near_to_it(bundle: Path) -> None:
    with pytest.raises(PackError) as caught:
        find_pack("moderatoin")
    assert caught.value.hint.startswith("did you mean moderation")
    with pytest.raises(PackError) as caught:
        find_pack("qqq")
    assert "moderation-smollm2-135m" in caught.value.hint


def test_moderate_is_run_with_the_moderation_pack(run: RunCli, bundle: Path, model_path: Path) -> None:
    options = ("-m", model_path, "--threads", 1, "--quiet", "--unsure-below", 0.9, "--no-ngrams")
    result = run("moderate", *options, "hello", "you")
    assert_clean(result, 0)
    assert result == run("labels", "run", "--pack", "moderation", *options, "hello", "you")
    assert len(table(result)) == 2


def test_moderate_without_its_pack(run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_FOLDER", tmp_path)
    result = run("moderate", "hello")
    assert_clean(result, 1)
    assert "no pack is named 'moderation'" in result.err


REPORT = {
    "certificate": {"sentence": "error rate at most 0.1 with confidence 95%", "holds": True},
    "data": {"messages": 12345, "by_label": {"calm": 1, "rude": None}},
    "test": {"cascade": {"accuracy": 0.98765432}},
    "boundaries": [2, 4],
    "tried": [{"layer": 2}, {"layer": 4}],
    "none": [],
}


def test_show_says_what_a_pack_is(run: RunCli, save: Saver, model_path: Path) -> None:
    references = {CONFIDENCE: Reference(*np.zeros((2, 9), np.float32), 100)}
    pack = save((0.75, NEVER, ALWAYS), report=REPORT, references=references, unsure_below=0.6)
    result = run("labels", "show", pack)
    assert_clean(result, 0)
    lines = result.out.splitlines()
    for line in (
        "name         manners",
        "labels       calm, rude",
        f"model        {identify(model_path)}",
        'instruction  "Is this rude?\\n"',
        "messages     up to 24 tokens, the rest is cut",
        "unsure       below probability 0.600",
        f"watched      {CONFIDENCE}",
        "  before the network, n-grams in 256 buckets: calm 0.750, rude 0.750",
        "  after layer 2, pooled by mean: calm never, rude never",
        "  after layer 4, pooled by mean and max: all that are left",
        "    sentence: error rate at most 0.1 with confidence 95%",
        "    holds: yes",
        "    messages: 12,345",
        "      rude: -",
        "      accuracy: 0.9877",
        "  boundaries: 2, 4",
        "      layer: 4",
        "  none: -",
    ):
        assert line in lines


def test_show_as_json(run: RunCli, save: Saver, model_path: Path) -> None:
    pack = save((0.75, NEVER, ALWAYS), report=REPORT, weights=np.array([1, 2.5], np.float32))
    record = json.loads(run("labels", "show", pack, "--json").out)
    assert record["labels"] == list(LABELS)
    assert record["report"] == REPORT
    assert record["bytes"] == pack.stat().st_size
    assert record["model"]["sha256"] == identify(model_path).sha256
    assert record["weights"] == {"calm": 1, "rude": 2.5}
    assert record["stages"] == [
        {"layer": 0, "pools": [], "thresholds": {"calm": 0.75, "rude": 0.75}},
        {"layer": 2, "pools": ["mean"], "thresholds": {"calm": None, "rude": None}},
        {"layer": 4, "pools": ["mean", "max"], "thresholds": {"calm": 0, "rude": 0}},
    ]
    assert "weights      calm 1, rude 2.5" in run("labels", "show", pack).out
