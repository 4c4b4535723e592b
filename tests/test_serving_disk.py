"""A running server whose disk becomes full or read-only: it serves on and says so, until that is over."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from edge_runtime.service.state import StateFile

from .serving_helpers import CHAT, NO_END, PATIENCE_S, Notified, ServerProcess

# a small disk at {path!r}, of this process alone
DISK = """
import ctypes, os
libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
def must(code):
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def write(name, text):
    with open("/proc/self/" + name, "w") as file:
        file.write(text)
NEW_MOUNTS, NEW_USERS, PRIVATE = 0x20000, 0x10000000, 0x44000
must(libc.unshare(NEW_MOUNTS | (NEW_USERS if uid else 0)))
if uid:
    write("setgroups", "deny")
    write("uid_map", f"0 {{uid}} 1")
    write("gid_map", f"0 {{gid}} 1")
must(libc.mount(b"none", b"/", None, PRIVATE, None))
must(libc.mount(b"tmpfs", {path!r}, b"tmpfs", 0, b"size=64k,mode=700"))
"""
# what a test does not wait minutes for
HURRIED = """
from edge_runtime.serving import server
server._STATUS_S = 0.05
"""
SOON = "server._SAVE_S = 0.05\n"
SOON_AGAIN = "server._SAVE_AGAIN_S = 0.05\n"
FULL = """
with open({path!r} + b"/ballast", "wb", buffering=0) as ballast:
    try:
        while ballast.write(bytes(4096)):
            pass
    except OSError:
        pass
"""
TOLD, AGAIN = "nothing learnt is saved: ", "what was learnt is saved again"


class Disk:
    """The disk of a running server, as the test reaches it."""

    def __init__(self, folder: Path, pid: int) -> None:
        self._folder, self._pid = folder, pid
        self.path = Path(f"/proc/{pid}/root{folder}")  # as the server sees it

    def fill(self) -> None:
        ballast = os.open(self.path / "ballast", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while os.write(ballast, bytes(4096)):
                pass
        os.close(ballast)

    def empty(self) -> None:
        (self.path / "ballast").unlink()

    def set_read_only(self) -> None:
        self._remount("ro")

    def set_writable(self) -> None:
        self._remount("rw")

    def _remount(self, option: str) -> None:
        spaces = ["--mount", *([] if os.geteuid() == 0 else ["--user", "--preserve-credentials"])]
        command = [
            "nsenter",
            f"--target={self._pid}",
            *spaces,
            "mount",
            "-o",
            f"remount,bind,{option}",
            str(self._folder),
        ]
        subprocess.run(command, check=True, timeout=PATIENCE_S)


class Running:
    """A server with its state on a small disk, under a service manager."""

    def __init__(self, path: Path, folder: Path, script: str) -> None:
        mounted = folder / "state"
        mounted.mkdir()
        disk = DISK.format(path=os.fsencode(mounted))
        _try(disk)
        script = script.format(path=os.fsencode(mounted))
        self.manager = Notified(folder)
        variables = {"NOTIFY_SOCKET": str(self.manager.path)}
        self.process = ServerProcess(folder, "--model", path, variables=variables, script=disk + HURRIED + script)
        self.disk = Disk(mounted, self.process.process.pid)

    def wait_ready(self) -> None:
        self.url = self.process.ready().url
        self.model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def chat(self) -> int:
        """The status of a request, from which costs of batches are learnt."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
        asked = httpx.post(f"{self.url}{CHAT}", json={**body, "logit_bias": NO_END}, timeout=PATIENCE_S)
        return asked.status_code

    def saved(self) -> bool:
        """As the metrics have it."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        line = next(line for line in text.splitlines() if line.startswith("edge_runtime_state_saved "))
        return float(line.split()[1]) == 1

    def until_saved(self, wanted: bool, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Each look is a request of its own, so nothing spins."""
        for _ in range(10_000):
            if self.saved() == wanted:
                return
            meanwhile()
        raise AssertionError("".join(self.process.log))

    def until_status(self, words: str, *, there: bool) -> str:
        """The next status that has `words` in it, or has not."""
        while True:
            status = self.manager.until("STATUS=")
            if (words in status) == there:
                return status

    def n_said(self, words: str) -> int:
        """Lines of the log with `words` in them."""
        return sum(words in line for line in self.process.log)

    def close(self) -> None:
        assert self.process.stop() == 0
        self.manager.close()
        assert "Traceback" not in "".join(self.process.log)


def _try(disk: str) -> None:
    """Skips the test where there can be no such disk."""
    missing = [tool for tool in ("nsenter", "mount") if shutil.which(tool) is None]
    if missing or not sys.platform.startswith("linux"):
        pytest.skip(f"a disk of a process's own needs Linux and {', '.join(missing) or 'its tools'}")
    done = subprocess.run([sys.executable, "-c", disk], capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode != 0:
        pytest.skip(f"no disk can be mounted for one process here: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def running(path: Path, folder: Path, script: str) -> Iterator[Running]:
    made = Running(path, folder, script)
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("begin", "end", "why"),
    [
        (Disk.fill, Disk.empty, os.strerror(errno.ENOSPC)),
        (Disk.set_read_only, Disk.set_writable, os.strerror(errno.EROFS)),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_refuses_is_told_and_served_on_until_it_takes_again(
    tiny_path: Callable[..., Path],
    tmp_path: Path,
    begin: Callable[[Disk], None],
    end: Callable[[Disk], None],
    why: str,
) -> None:
    with running(tiny_path(tokenizer=True), tmp_path, SOON) as server:
        assert server.saved()
        begin(server.disk)
        server.until_saved(False, server.chat)  # there is something new to save after each answer
        assert server.until_status(TOLD, there=True).strip().endswith(f"serve.json cannot be written: {why}")
        assert server.chat() == 200
        assert httpx.get(f"{server.url}/ready").status_code == 200
        end(server.disk)
        server.until_saved(True)
        server.until_status(TOLD, there=False)
        server.process.until(AGAIN)
        assert [server.n_said(words) for words in (TOLD, AGAIN)] == [1, 1]
        assert server.chat() == 200
        (file,) = server.disk.path.rglob("serve.json")
        assert StateFile(file, "serve").load().value is not None
        assert [path.name for path in file.parent.iterdir()] == ["serve.json"]


def test_a_save_that_failed_is_tried_again_soon(tiny_path: Callable[..., Path], tmp_path: Path) -> None:
    with running(tiny_path(tokenizer=True), tmp_path, SOON_AGAIN + FULL) as server:
        server.until_status(TOLD, there=True)
        assert not server.saved()
        server.disk.empty()
        server.until_saved(True)
        assert server.n_said(TOLD) == 1
