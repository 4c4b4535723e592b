"""Translations made before, in an SQLite file that several processes may use at once.

It saves time and is never needed: where it cannot be read or written, translating goes on without it, with a note.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..cache import cache_dir
from ..errors import UsageError

_APPLICATION_ID = 0x65746D31
_VERSION = 1
_WAIT_S = 1.0  # for another process that writes
_MAGIC = b"SQLite format 3\0"
_TABLE = """
CREATE TABLE IF NOT EXISTS translations (
    key BLOB PRIMARY KEY, source TEXT NOT NULL, target TEXT NOT NULL, ending TEXT NOT NULL
) WITHOUT ROWID
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Remembered:
    """A translation made before, and how it ended."""

    target: str
    ending: str


def default_memory() -> Path:
    """Where translations are kept if nobody says otherwise."""
    return cache_dir() / "translations.sqlite"


def key_of(parts: Sequence[object]) -> bytes:
    """What decides a translation, as a key (32 bytes)."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()


class TranslationMemory:
    """Key → translation. `note` hears, once each, why translations are not read or not kept."""

    def __init__(self, path: Path, note: Callable[[str], None] = lambda _text: None) -> None:
        """Open or make the file; a damaged one is moved aside.

        Raises UsageError for a file that is something else: a text, or the database of another program.
        """
        self.path, self._note = path, note
        self._writes = True
        self._inode: tuple[int, int] | None = None
        self._connection: sqlite3.Connection | None = None
        self._open()

    def get(self, key: bytes) -> Remembered | None:
        def read(connection: sqlite3.Connection) -> Remembered | None:
            row = connection.execute("SELECT target, ending FROM translations WHERE key = ?", (key,)).fetchone()
            return Remembered(*row) if row else None

        return self._try(read, "read")

    def put(self, key: bytes, source: str, remembered: Remembered) -> None:
        """Keep a translation, if it can be kept."""
        row = (key, source, remembered.target, remembered.ending)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO translations VALUES (?, ?, ?, ?)", row)

        if self._writes:
            self._try(write, "write")

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def __enter__(self) -> TranslationMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── what may fail ───────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if _is_text(self.path):
                raise UsageError(f"{self.path} is a text, no translation memory", "name another file with --memory")
            with _alone(self.path):
                try:
                    self._connection = self._connect()
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError as error:
                    self._set_aside(error)
                    self._connection = self._connect()
        except (OSError, sqlite3.Error) as error:
            self._note(f"the translation memory {self.path} is not used: {_words(error)}")

    def _connect(self) -> sqlite3.Connection:
        """Raises sqlite3.Error, UsageError for another program's database."""
        connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        try:
            status = self.path.stat()
            self._inode = status.st_dev, status.st_ino
            kind, version, n_tables = _nature(connection)
            if n_tables and kind != _APPLICATION_ID:
                raise UsageError(f"{self.path} is another program's database", "name another file with --memory")
            if n_tables and version != _VERSION:
                raise UsageError(
                    f"{self.path} is of another version of the translation memory: {version}, not {_VERSION}",
                    "name another file with --memory, or use --no-memory",
                )
            if not n_tables:
                self._make(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("SELECT target, ending FROM translations LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _make(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute(_TABLE)

    def _try(self, work: Callable[[sqlite3.Connection], T], what: str) -> T | None:
        """What `work` gives; None where it cannot be done, and then the memory is not asked in vain again."""
        if self._connection is None:
            return None
        try:
            return work(self._connection)
        except sqlite3.OperationalError as error:
            if what == "write":
                self._writes = False
                self._note(f"the translation memory {self.path} keeps no more translations: {_words(error)}")
            else:
                self._give_up(error)
        except sqlite3.DatabaseError as error:
            self.close()
            try:
                with _alone(self.path):
                    self._set_aside(error)
                    self._connection = self._connect()
            except (OSError, sqlite3.Error, UsageError) as worse:
                self._give_up(worse)
        return None

    def _give_up(self, error: Exception) -> None:
        self.close()
        self._note(f"the translation memory {self.path} is no longer used: {_words(error)}")

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Move the damaged file aside, unless another process has done so. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            status = self.path.stat()
            if self._inode is not None and self._inode != (status.st_dev, status.st_ino):
                return
        aside = _free_name(self.path)
        # its log first: beside a new file, it would be taken for that one's
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        self._note(f"the translation memory was damaged ({_words(error)}): it is now {aside}, and a new one begins")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let no other process make, or move aside, the memory at `path` meanwhile. Raises OSError."""
    with open(f"{path}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _nature(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Application, version and number of tables, of one moment."""
    with connection:
        connection.execute("BEGIN")
        questions = ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
        n_tables, kind, version = (connection.execute(question).fetchone()[0] for question in questions)
    return kind, version, n_tables


def _is_text(path: Path) -> bool:
    """Whether a file begins as a text does."""
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
    except FileNotFoundError:
        return False
    if not beginning or b"\0" in beginning or beginning.startswith(_MAGIC):
        return False
    # the last character may be cut
    return "\N{REPLACEMENT CHARACTER}" not in beginning.decode("utf-8", "replace")[:-1]


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return free


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return error.message if isinstance(error, UsageError) else str(error)
