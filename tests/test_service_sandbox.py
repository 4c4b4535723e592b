"""What the unit forbids does not get in the way of the library, of numpy, or of an answer."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from edge_runtime.service.unit import SERVICE, UnitPlan, unit_files

from .cli_helpers import environment

SANDBOX = Path(__file__).parent / "service_sandbox.py"
RWX = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
found = libc.mmap(None, ctypes.c_size_t(4096), 7, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
print("refused" if found == ctypes.c_void_p(-1).value else "allowed")
"""
CHROOT = """
import os
try:
    os.chroot("/")
    print("allowed")
except PermissionError:
    print("refused")
"""


@cache
def members(name: str) -> frozenset[str]:
    """The system calls of a group of systemd's."""
    done = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    found: set[str] = set()
    for line in done.stdout.splitlines()[1:]:
        word = line.split("#")[0].strip()
        found |= members(word) if word.startswith("@") else {word} if word else set()
    return frozenset(found)


def allowed_calls(unit: str) -> list[str]:
    """What the lines SystemCallFilter= come to, in their order."""
    found: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        for word in line.removeprefix("~").split():
            calls = members(word) if word.startswith("@") else {word}
            found = found - calls if line.startswith("~") else found | calls
    return sorted(found)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What to write before a command so that it runs under the unit's filters."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there, which knows the groups of system calls")
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not there, which loads the filters")
    calls = tmp_path_factory.mktemp("sandbox") / "allowed.json"
    calls.write_text(json.dumps(allowed_calls(unit_files(UnitPlan(Path("/bin/true")))[SERVICE])))
    return [sys.executable, str(SANDBOX), str(calls)]


def run(sandbox: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*sandbox, *command], capture_output=True, text=True, env=environment(), timeout=900)


@pytest.mark.parametrize("script", [RWX, CHROOT], ids=["writable-code", "privileged"])
def test_the_filters_are_there(sandbox: list[str], script: str) -> None:
    assert run(sandbox, sys.executable, "-c", script).stdout == "refused\n"


def test_callbacks_and_matrices_work_under_them(sandbox: list[str]) -> None:
    script = (
        "import ctypes, numpy; call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: x + 1);"
        "a = numpy.arange(65536.0).reshape(256, 256); numpy.linalg.inv(a @ a.T + numpy.eye(256)); print(call(1))"
    )
    done = run(sandbox, sys.executable, "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


@pytest.mark.model
def test_an_answer_is_the_same_under_them(sandbox: list[str], demo_path: Path) -> None:
    command = [sys.executable, "-m", "edge_runtime", "generate", "--model", str(demo_path), "--max-tokens", "8"]
    command += ["--quiet", "--threads", "1", "--mode", "verified", "Count to five."]
    free = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    bound = run(sandbox, *command)
    assert bound.returncode == 0, bound.stderr
    assert free.stdout.strip()
    assert bound.stdout == free.stdout
