"""The translation memory: kept between runs and processes, moved aside when damaged, done without when it must be."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.apps import TranslationMemory, default_memory
from edge_runtime.apps.memory import Remembered, key_of
from edge_runtime.errors import UsageError

from .cli_helpers import environment

KEY = key_of(["fake", 1, "en", "fr", [], "Hello."])
BONJOUR = Remembered("Bonjour.", "complete")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "memory.sqlite"


def fill(path: Path, n: int = 500) -> None:
    with TranslationMemory(path) as memory:
        for i in range(n):
            memory.put(key_of([i]), f"source {i}", Remembered(f"target {i} " * 20, "complete"))


def test_what_was_put_is_found_by_the_next_process(path: Path) -> None:
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as memory:
        assert memory.get(KEY) is None
        memory.put(KEY, "Hello.", BONJOUR)
    with TranslationMemory(path, notes.append) as memory:
        assert memory.get(KEY) == BONJOUR
        memory.put(KEY, "Hello.", Remembered("Salut.", "complete"))
        assert memory.get(KEY) == Remembered("Salut.", "complete")
    assert notes == []


def test_every_part_of_a_key_counts() -> None:
    parts = ["fake", 1, "en", "fr", [("a", "b")], "Hello."]
    changed = [[*parts[:i], "other", *parts[i + 1 :]] for i in range(len(parts))]
    assert len({key_of(each) for each in [parts, *changed]}) == len(parts) + 1


def test_the_default_memory_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    assert default_memory().parent == tmp_path


def test_two_open_memories_see_each_other(path: Path) -> None:
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as one, TranslationMemory(path, notes.append) as other:
        for i in range(50):
            (one, other)[i % 2].put(key_of([i]), "a", Remembered(str(i), "complete"))
        assert [(other, one)[i % 2].get(key_of([i])) for i in range(50)] == [
            Remembered(str(i), "complete") for i in range(50)
        ]
    assert notes == []


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_begin_at_once_lose_nothing(path: Path, damaged: bool) -> None:
    path.parent.mkdir()
    if damaged:
        path.write_bytes(b"\0" * 5000)
    script = """
import sys
from pathlib import Path
from edge_runtime.apps.memory import Remembered, TranslationMemory, key_of
print("ready", flush=True)
sys.stdin.readline()
with TranslationMemory(Path(sys.argv[1]), lambda note: print(note, flush=True)) as memory:
    for i in range(40):
        memory.put(key_of([sys.argv[2], i]), "a", Remembered("b", "complete"))
"""
    command = [sys.executable, "-c", script, str(path)]
    started = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
        for i in range(4)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    notes = b"".join(process.communicate(timeout=120)[0] for process in started)
    assert notes.count(b"damaged (") == damaged == len(notes.splitlines())
    with TranslationMemory(path) as memory:
        assert all(memory.get(key_of([str(n), i])) for n in range(4) for i in range(40))


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [b"\0" * 5000, b"\x93\xfa\0" * 3000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_moved_aside(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as memory:
        memory.put(KEY, "Hello.", BONJOUR)
        assert memory.get(KEY) == BONJOUR
    (note,) = notes
    assert "damaged" in note
    assert path.with_name("memory.sqlite.damaged-1").read_bytes() == data


def test_damage_that_shows_only_later_is_moved_aside_too(path: Path) -> None:
    fill(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as memory:
        found = [memory.get(key_of([i])) for i in range(500)]
        memory.put(KEY, "Hello.", BONJOUR)
        assert memory.get(KEY) == BONJOUR
    assert None in found
    assert len([note for note in notes if "damaged" in note]) == 1
    assert path.with_name("memory.sqlite.damaged-1").exists()


def test_a_second_process_does_not_move_the_new_file_aside(path: Path) -> None:
    fill(path)
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as one, TranslationMemory(path, notes.append) as other:
        for memory in (one, other):
            memory._set_aside(sqlite3.DatabaseError("malformed"))
            memory.close()
            memory._connection = memory._connect()
            memory.put(KEY, "Hello.", BONJOUR)
    assert len(notes) == 1
    with TranslationMemory(path) as memory:
        assert memory.get(KEY) == BONJOUR


def test_another_damaged_file_gets_another_name(path: Path) -> None:
    path.parent.mkdir()
    for n in (1, 2):
        path.write_bytes(b"\0" * 5000 * n)
        TranslationMemory(path).close()
        assert path.with_name(f"memory.sqlite.damaged-{n}").read_bytes() == b"\0" * 5000 * n


# ── files of others ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("Once upon a time é", encoding="utf-8")
    with pytest.raises(UsageError, match="is a text"):
        TranslationMemory(path)
    assert path.read_text(encoding="utf-8") == "Once upon a time é"


def test_a_foreign_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmarks (name TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(UsageError, match="another program"):
        TranslationMemory(path)
    assert path.read_bytes() == before


def test_another_version_is_left_alone(path: Path) -> None:
    fill(path, 1)
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    with pytest.raises(UsageError, match="another version of the translation memory: 7"):
        TranslationMemory(path)


# ── without ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes: list[str] = []
    with TranslationMemory(tmp_path / "file" / "memory.sqlite", notes.append) as memory:
        memory.put(KEY, "Hello.", BONJOUR)
        assert memory.get(KEY) is None
    (note,) = notes
    assert "is not used" in note


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    notes: list[str] = []
    with TranslationMemory(tmp_path, notes.append) as memory:
        assert memory.get(KEY) is None
    assert len(notes) == 1


def test_a_full_disk(path: Path) -> None:
    fill(path, 1)
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as memory:
        assert memory._connection is not None
        pages = memory._connection.execute("PRAGMA page_count").fetchone()[0]
        memory._connection.execute(f"PRAGMA max_page_count = {pages}")
        for i in range(5):
            memory.put(key_of(["large", i]), "x" * 100_000, BONJOUR)
        assert memory.get(key_of([0])) is not None
        assert memory.get(key_of(["large", 0])) is None
    (note,) = notes
    assert "keeps no more translations" in note


def test_a_read_only_file_is_read(path: Path) -> None:
    fill(path, 3)
    notes: list[str] = []
    with TranslationMemory(path, notes.append) as memory:
        assert memory._connection is not None
        memory._connection.execute("PRAGMA query_only = 1")
        memory.put(KEY, "Hello.", BONJOUR)
        memory.put(KEY, "Hello.", BONJOUR)
        assert memory.get(key_of([2])) is not None
    (note,) = notes
    assert "readonly" in note
