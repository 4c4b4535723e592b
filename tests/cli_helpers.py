"""Run `edge-run` inside this process, or as a real program where signals, pipes or exit codes matter."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_runtime import entry

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


RunCli = Callable[..., Result]


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """run(*arguments, stdin=b"…"): the command line in this process."""

    def run(*arguments: object, stdin: bytes | None = None) -> Result:
        stream = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        code = entry.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def program(*arguments: object, script: str | None = None) -> list[str]:
    """The command line of a real `edge-run`; `script` is Python to run first, in the same process."""
    words = [str(a) for a in arguments]
    if script is None:
        return [sys.executable, "-m", "edge_runtime", *words]
    return [sys.executable, "-c", f"{script}\nimport sys\nfrom edge_runtime.entry import main\nmain()", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """A running program with pipes on all three streams, in a process group of its own."""
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
        bufsize=0,  # what `readline` would read ahead, `communicate` would miss
    )


def finish(process: subprocess.Popen[bytes]) -> Result:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()  # or it would slow all the tests after this one
        process.communicate()
        raise
    return Result(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def assert_clean(result: Result, code: int) -> None:
    """The exit code is `code`, and nobody was shown a traceback."""
    assert "Traceback" not in result.err, result.err
    assert "Exception ignored" not in result.err, result.err
    assert result.code == code, result
    if code in (1, 2) and result.err:
        assert result.err.startswith("error: ")
        assert "\nhint: " in result.err
