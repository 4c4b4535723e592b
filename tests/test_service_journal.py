"""The log as the journal takes it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from edge_runtime.service.journal import JournalFormatter, goes_to_journal


@pytest.mark.parametrize(
    ("level", "number"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2), (35, 4)],
)
def test_each_line_has_its_level(level: int, number: int) -> None:
    record = logging.LogRecord("edge_runtime", level, "", 0, "%s failed\n  at a\n", ("it",), None)
    assert JournalFormatter().format(record) == f"<{number}>it failed\n<{number}>  at a\n<{number}>"


def test_a_traceback_is_of_its_messages_level() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        found = (ValueError, error, error.__traceback__)
    lines = JournalFormatter().format(logging.LogRecord("a", logging.ERROR, "", 0, "what", (), found)).splitlines()
    assert lines[:2] == ["<3>what", "<3>Traceback (most recent call last):"]
    assert all(line.startswith("<3>") for line in lines)


def test_only_what_the_manager_connected_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as file:
        found = os.fstat(file.fileno())
        told = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert goes_to_journal(told, file.fileno())
        assert not goes_to_journal({}, file.fileno())
        with (tmp_path / "elsewhere").open("w") as other:
            assert not goes_to_journal(told, other.fileno())
    assert not goes_to_journal(told, 10_000)
    assert not goes_to_journal({"JOURNAL_STREAM": "?"})
