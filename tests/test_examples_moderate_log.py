"""The moderation filter: what it writes for each line, and how it ends."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edge_runtime.labels import UNSURE, Decision

from .cli_helpers import assert_clean, finish, start
from .example_helpers import example, load_example

moderate_log = load_example("moderate_log")
LINES = {"hello": "neither", "fool": "offensive", "go away, all of you": "hate", "hm": UNSURE}


class FakeClassifier:
    """Stands for `LabelClassifier`: knows LINES by heart."""

    def predict(self, texts: Sequence[str]) -> list[Decision]:
        return [
            Decision(LINES[t], "hate" if LINES[t] == UNSURE else LINES[t], 0.876, (), 0, 0, None, False) for t in texts
        ]


def moderated(capsys: pytest.CaptureFixture[str], *, hide: bool) -> tuple[list[str], Counter[str]]:
    seen: Counter[str] = Counter()
    lines = [line + "\n" for line in (*LINES, "", "  ", "hello")]
    moderate_log.moderate(lines, FakeClassifier(), hide=hide, seen=seen)
    return capsys.readouterr().out.splitlines(), seen


def test_each_line_gets_a_label_and_a_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    rows, seen = moderated(capsys, hide=False)
    assert rows == [
        "neither\t0.88\thello",
        "offensive\t0.88\tfool",
        "hate\t0.88\tgo away, all of you",
        "unsure\t0.88\t[for a human: hate?] hm",
        "neither\t0.88\thello",
    ]
    assert seen == {"neither": 2, "offensive": 1, "hate": 1, UNSURE: 1}


def test_hidden_are_harmful_lines_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = moderated(capsys, hide=False)
    hidden, _ = moderated(capsys, hide=True)
    assert [a == b for a, b in zip(plain, hidden, strict=True)] == [True, False, False, True, True]
    assert hidden[1:3] == ["offensive\t0.88\t[hidden]", "hate\t0.88\t[hidden]"]


def test_a_row_is_written_before_the_next_line_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    def lines() -> Iterator[str]:
        yield "hello\n"
        assert capsys.readouterr().out == "neither\t0.88\thello\n"
        yield "hm\n"

    moderate_log.moderate(lines(), FakeClassifier(), hide=False, seen=Counter())
    assert capsys.readouterr().out.startswith("unsure")


def test_mistakes_end_it_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moderate_log.main([str(tmp_path / "none.log")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert moderate_log.main(["--unsure-below", "2"]) == 2
    assert capsys.readouterr().err == "error: 2.0 is not a probability\nhint: allowed: from 0 to 1\n"


@pytest.mark.model
def test_the_program_labels_a_log_and_says_whether_it_saw_harm(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(b"Thanks for the birthday wishes everyone\nwhat a dumbass\ncaf\xe9 r\xe9union\n")
    result = finish(start(example("moderate_log", "--hide", log)))
    assert_clean(result, 3)
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert [row[0] for row in rows] == ["neither", "offensive", "unsure"]
    assert all(0 <= float(row[1]) <= 1 for row in rows)
    assert [row[2] for row in rows[:2]] == ["Thanks for the birthday wishes everyone", "[hidden]"]
    assert "1 offensive" in result.err


@pytest.mark.model
def test_ctrl_c_ends_a_followed_log_with_the_counts() -> None:
    with start(example("moderate_log")) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Thanks for the birthday wishes everyone\n")
        row = process.stdout.readline()  # though the writer goes on
        process.send_signal(signal.SIGINT)
        process.wait(120)
        result = finish(process)
    assert row.startswith(b"neither\t0.")
    assert_clean(result, 130)
    assert result.err == "1 neither\n"


@pytest.mark.model
def test_a_harmless_log_ends_well_and_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_text("Thanks for the birthday wishes everyone\n" * 2000)
    with start(example("moderate_log", log)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == -signal.SIGPIPE
        assert process.stderr.read() == b""
    log.write_text("Thanks for the birthday wishes everyone\n")
    assert_clean(finish(start(example("moderate_log", log))), 0)
