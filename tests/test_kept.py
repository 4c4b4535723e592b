"""Measurements that are kept: read as they were written, and never of anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.kept import Kept

KEPT = Kept("figures", 3, {"model": "ab", "sizes": (1, 2), "machine": None})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plain(payload: Any) -> Any:
    return payload


def test_a_payload_comes_back(own_cache: Path) -> None:
    assert KEPT.read(plain) is None
    KEPT.write([1, 2.5, {"three": None}])
    assert KEPT.read(plain) == [1, 2.5, {"three": None}]
    assert KEPT.path.parent == own_cache / "figures"
    assert list(KEPT.path.parent.iterdir()) == [KEPT.path]


@pytest.mark.parametrize(
    "other",
    [
        Kept("other", 3, KEPT.key),
        Kept("figures", 4, KEPT.key),
        Kept("figures", 3, {**KEPT.key, "model": "cd"}),
        Kept("figures", 3, {**KEPT.key, "more": 0}),
        Kept("figures", 3, {}),
    ],
    ids=str,
)
def test_something_else_is_not_read(other: Kept) -> None:
    KEPT.write([1])
    assert other.read(plain) is None
    other.path.parent.mkdir(exist_ok=True)
    other.path.write_bytes(KEPT.path.read_bytes())  # even under its name
    assert other.read(plain) is None


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, IndexError])
def test_a_payload_that_is_none_is_not_there(error: type[Exception]) -> None:
    def parse(_payload: Any) -> Any:
        raise error

    KEPT.write([1])
    assert KEPT.read(parse) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\x00", b"[]", b"3", b"null", b"{}", b"[" * 100_000, b'{"format": 3, "key": []}'],
    ids=lambda data: repr(data[:12]),
)
def test_a_damaged_file_is_not_there_and_is_written_anew(data: bytes) -> None:
    KEPT.path.parent.mkdir(parents=True)
    KEPT.path.write_bytes(data)
    assert KEPT.read(plain) is None
    KEPT.write([1])
    assert KEPT.read(plain) == [1]


def test_a_file_cut_short_is_not_there() -> None:
    KEPT.write(list(range(100)))
    whole = KEPT.path.read_bytes()
    assert json.loads(whole)["payload"] == list(range(100))
    KEPT.path.write_bytes(whole[:-20])
    assert KEPT.read(plain) is None


def test_a_cache_that_cannot_be_written_costs_only_the_time(own_cache: Path) -> None:
    own_cache.write_text("a file where a folder should be")
    KEPT.write([1])
    assert KEPT.read(plain) is None
