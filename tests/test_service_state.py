"""Learnt state is the old one or the new one, whatever happens, and never an exception."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.service import state
from edge_runtime.service.state import LoadedState, StateFile

from .cli_helpers import environment

OLD = {"audits": 10, "by_depth": {"8": 3}}
NEW = {"audits": 11, "by_depth": {"8": 3, "16": 1}}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def file(tmp_path: Path) -> StateFile:
    return StateFile(tmp_path / "state" / "learnt.json", "audits")


def again(file: StateFile) -> LoadedState:
    """What another process would load."""
    return StateFile(file.path, file.kind, file.version).load()


def test_nothing_saved_is_no_reason_to_worry(file: StateFile) -> None:
    assert file.load() == LoadedState(None, "")


def test_what_is_saved_is_loaded(file: StateFile) -> None:
    assert file.save(OLD) == ""
    assert file.save(NEW) == ""
    assert again(file) == LoadedState(NEW)
    assert os.listdir(file.path.parent) == [file.path.name]


@settings(max_examples=25, deadline=None)  # each is synced to the disk
@given(value=st.dictionaries(st.text(), JSON))
def test_every_json_object_comes_back(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    own = StateFile(tmp_path_factory.getbasetemp() / "any.json", "any")
    assert own.save(value) == ""
    assert again(own).value == value


def test_the_same_state_is_written_once(file: StateFile) -> None:
    file.save(OLD)
    inode = file.path.stat().st_ino
    keeps = file.path.open()  # or the number could be given to another file
    with keeps:
        assert file.save(dict(reversed(OLD.items()))) == ""
        assert file.path.stat().st_ino == inode
        assert file.save(NEW) == ""
        assert file.path.stat().st_ino != inode
    file.path.unlink()
    assert file.save(NEW) == ""
    assert again(file).value == NEW


@pytest.mark.parametrize("value", [{"a": float("nan")}, {1: 2}, {"a": (1, 2)}, {"a": object()}, {"a": b""}])
def test_what_json_cannot_keep_is_a_reason(file: StateFile, value: dict[Any, Any]) -> None:
    file.save(OLD)
    assert file.save(value).startswith("state audits cannot be saved: ")
    assert again(file).value == OLD


def test_a_loop_or_a_flood_is_a_reason(file: StateFile) -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    assert "cannot be saved" in file.save(loop)
    assert "more than" in file.save({"text": "x" * 2**21})
    assert not file.path.exists()


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_beginning_of_a_file_is_known_to_be_one(file: StateFile) -> None:
    file.save(OLD)
    whole = file.path.read_bytes()
    for length in range(len(whole)):
        file.path.write_bytes(whole[:length])
        found = again(file)
        assert found.value is None
        assert found.reason == f"{file.path} is damaged", length


def test_every_changed_byte_is_noticed(file: StateFile) -> None:
    file.save(OLD)
    whole = file.path.read_bytes()
    for place in range(len(whole)):
        file.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = again(file)
        assert found.value in (None, OLD), place  # a space that became an exclamation mark is damage, too
        assert bool(found.reason) == (found.value is None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x00" * 400, "is damaged"),
        (b"[" * 100_000 + b"\n{}\n", "is damaged"),
        (b"[]\n{}\n", "is not a state of this program"),
        (b'{"format": "other"}\n{}\n', "is not a state of this program"),
        (b"x" * (2**20 + 1), "is larger than 1048576 bytes"),
    ],
)
def test_what_another_wrote_is_a_reason(file: StateFile, data: bytes, reason: str) -> None:
    file.path.parent.mkdir()
    file.path.write_bytes(data)
    assert again(file) == LoadedState(None, f"{file.path} {reason}")
    assert file.save(NEW) == ""
    assert again(file).value == NEW


def test_other_kinds_and_versions_are_not_mixed_up(file: StateFile) -> None:
    file.save(OLD)
    assert StateFile(file.path, "audits", 2).load().reason.endswith("is of version 1, this program knows 2")
    assert StateFile(file.path, "costs").load().reason.endswith("is of kind 'audits', not 'costs'")


def test_a_list_with_a_right_checksum_is_no_state(file: StateFile) -> None:
    file.path.parent.mkdir()
    head = {"format": "edge-runtime-state", "kind": "audits", "version": 1, "sha256": state._checksum("[]")}
    file.path.write_text(f"{json.dumps(head)}\n[]\n")
    assert again(file).reason.endswith("is not an object")


def test_a_pipe_or_a_folder_in_its_place_is_a_reason(file: StateFile, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert StateFile(tmp_path / "pipe", "x").load().reason.endswith("is not a file")
    own = StateFile(tmp_path, "x")
    assert own.load().reason
    assert own.save(OLD).startswith(f"{tmp_path} cannot be written: ")


# ── disks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["mkstemp", "fsync", "replace"])
def test_a_disk_that_refuses_is_a_reason(
    file: StateFile, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    file.save(OLD)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr({"mkstemp": "tempfile.mkstemp"}.get(where, f"os.{where}"), refuse)
        assert file.save(NEW) == f"{file.path} cannot be written: {os.strerror(number)}"
    assert os.listdir(file.path.parent) == [file.path.name]
    assert again(file).value == OLD
    assert file.save(NEW) == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_place_that_cannot_hold_a_folder_is_a_reason(tmp_path: Path) -> None:
    own = StateFile(Path("/dev/full/state/learnt.json"), "x")
    assert "cannot be read: Not a directory" in own.load().reason
    assert "cannot be written: Not a directory" in own.save(OLD)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_reason(file: StateFile) -> None:
    file.save(OLD)
    file.path.parent.chmod(0o500)
    try:
        assert "Permission denied" in file.save(NEW)
        assert again(file).value == OLD
    finally:
        file.path.parent.chmod(0o700)


# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# Kills a process at its n-th executed line of saving, for each n until one gets through; prints what each left.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from edge_runtime import cache
from edge_runtime.service import state

path, old, new = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
ours = {cache.__file__, state.__file__, os.__file__, sys.modules["tempfile"].__file__}

def save_and_die(at):
    lines = 0
    def trace(frame, event, _arg):
        nonlocal lines
        if frame.f_code.co_filename not in ours:
            return None
        lines += event == "line"
        if lines == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    own.save(new)
    sys.settrace(None)
    os._exit(0)

for at in range(1, 1000):
    own = state.StateFile(path, "audits")
    own.load()
    own.save(old)
    child = os.fork()
    if child == 0:
        save_and_die(at)
    _, status = os.waitpid(child, 0)
    left = sorted(os.listdir(path.parent))
    found = state.StateFile(path, "audits").load()
    print(json.dumps({"value": found.value, "reason": found.reason, "left": len(left),
                      "after": os.listdir(path.parent), "killed": os.WIFSIGNALED(status)}))
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    path = tmp_path / "state" / "learnt.json"
    command = [sys.executable, "-c", KILLED, str(path), json.dumps(OLD), json.dumps(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) > 20
    assert not ends[-1]["killed"]
    assert all(end["killed"] for end in ends[:-1])
    assert all(end["value"] in (OLD, NEW) and end["reason"] == "" for end in ends)
    values = [end["value"] for end in ends]
    assert values == sorted(values, key=lambda value: value == NEW)  # from some moment on, it is the new one
    assert OLD in values
    assert NEW in values
    assert any(end["left"] == 2 for end in ends)  # some were killed with a file half written
    assert all(end["after"] == [path.name] for end in ends)  # which the next start removes
