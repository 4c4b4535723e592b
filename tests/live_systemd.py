"""A systemd of the tests' own: in namespaces of its own, on an overlay of this machine's files, gone with the test.

It sees no network, no home of anybody's is written to, and what it mounts, starts and writes ends with its first
process. See namespaces(7), and systemd's "container interface" for what it does not touch then.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.service.unit import SERVICE

from .cli_helpers import ROOT

PATIENCE_S = 60.0
SYSTEMD = Path("/usr/lib/systemd/systemd")
UNITS = Path("/etc/systemd/system")
LOG = Path("/var/log/edge-runtime-test.log")  # where a test lets the service write

_TOOLS = ("setpriv", "unshare", "nsenter", "mount", "umount", "pivot_root", "systemctl")
_CLONE_NEWNET = 0x40000000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# $1: folder to build in, $2: control group, and then folders that must be seen. The second half is PID 1 of the new
# machine. Nothing below /proc/sys can be set, and neither the clock nor the kernel's modules.
_JOIN = """
echo $$ > "$2/cgroup.procs"
exec unshare --cgroup --pid --fork --kill-child sh -euc "$MACHINE" sh "$@"
"""
_MACHINE = """
built=$1; shift 2
mount -t tmpfs -o mode=755 tmpfs "$built"
mkdir "$built/upper" "$built/work" "$built/root" "$built/units"
mount -t overlay -o "lowerdir=/,upperdir=$built/upper,workdir=$built/work" overlay "$built/root"
for folder; do
    if [ "$(stat -c %d "$folder")" != "$(stat -c %d /)" ]; then
        mkdir -p "$built/root$folder"
        mount --bind -o ro "$folder" "$built/root$folder"
    fi
done
cd "$built/root"

mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
[ ! -e proc/sysrq-trigger ] || mount --bind /dev/null proc/sysrq-trigger
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs run

# no unit and no setting of this machine's
for name in basic sockets network multi-user shutdown umount; do
    cp "usr/lib/systemd/system/$name.target" "$built/units"
done
cp usr/lib/systemd/system/systemd-journald.s* "$built/units"  # nothing starts it but a test
echo '[Unit]' > "$built/units/sysinit.target"
mount --bind "$built/units" usr/lib/systemd/system
mount -t tmpfs -o mode=755 tmpfs usr/lib/systemd/system-generators
mount -t tmpfs -o mode=755 tmpfs etc/systemd
mkdir -p etc/systemd/system etc/edge-runtime
mount -t tmpfs -o mode=755 tmpfs etc/edge-runtime
rm -f etc/machine-id

pivot_root . .
umount -l .
mount --make-rshared /  # credentials come by propagation
exec env -i container=test PATH="$PATH" \
    setpriv --bounding-set -sys_time,-sys_module,-sys_boot "$SYSTEMD" --system --unit=multi-user.target
"""


class Unavailable(Exception):
    """Why there can be no such systemd here."""


class LiveSystemd:
    """The running manager, seen from outside. `root` is its machine's /, for reading and writing."""

    def __init__(self, pid: int) -> None:
        self._pid = pid  # of its first process, as this machine numbers it
        self.root = Path(f"/proc/{pid}/root")

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """A command inside, to its end."""
        spaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        words = ["nsenter", f"--target={self._pid}", *spaces, *map(str, command)]
        own = {"PATH": _PATH, "LC_ALL": "C.UTF-8", "HOME": "/root"}
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=own, timeout=120)

    def must(self, *command: object) -> str:
        """What it printed; it must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.log())
        return done.stdout

    def edge_run(self, *arguments: object) -> str:
        return self.must(program(), *arguments)

    def systemctl(self, *arguments: object) -> str:
        return self.must("systemctl", *arguments)

    def show(self, name: str, unit: str = SERVICE) -> str:
        """A property of a unit; of several, a line each."""
        return self.systemctl("show", unit, f"--property={name}", "--value").strip()

    def until(self, condition: Callable[[], object]) -> None:
        """Ask again and again; each question is a process, so nothing spins."""
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            state = self.run("systemctl", "status", "--no-pager", SERVICE).stdout
            assert time.monotonic() < end_s, f"{state}\n{self.log()}"

    def write(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def path(self, path: str | Path) -> Path:
        """A file inside, as it is reached from outside; links to whole paths would lead out."""
        return self.root / Path(path).relative_to("/")

    def log(self) -> str:
        """What the service wrote."""
        with contextlib.suppress(OSError):
            return self.path(LOG).read_text()
        return ""

    def connection(self, port: int = 8080) -> http.client.HTTPConnection:
        """To a port inside."""
        made = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        with ThreadPoolExecutor(1) as pool:  # a thread that ends in the other network
            made.sock = pool.submit(self._connect, port).result()
        return made

    def _connect(self, port: int) -> socket.socket:
        with open(f"/proc/{self._pid}/ns/net", "rb") as network:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(network.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def program() -> Path:
    """edge-run of this environment."""
    return Path(sys.prefix) / "bin" / "edge-run"


@contextmanager
def live_systemd(folder: Path) -> Iterator[LiveSystemd]:
    """Boot one, built in the empty `folder`. Raises Unavailable, with the reason."""
    _check()
    own = _own_group()
    for left in own.glob("edge-runtime-test-*"):
        if not Path(f"/proc/{left.name.rpartition('-')[2]}").exists():  # of tests that were killed
            _remove(left)
    group = own / f"edge-runtime-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"no control group can be made: {error}") from None
    try:
        with open(folder.with_suffix(".log"), "w+") as said:
            first = _start(folder, group, said.fileno())
            try:
                yield _booted(first, Path(said.name))
            finally:
                first.kill()  # and with it all that it started
                first.wait()
    finally:
        _remove(group)


def _check() -> None:
    """Raises Unavailable for what is known to be missing before anything is tried."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise Unavailable("only root on Linux can boot a systemd")
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if not SYSTEMD.exists():
        missing.append(str(SYSTEMD))
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)}")
    if not program().exists():
        raise Unavailable(f"the package is not installed: there is no {program()}")
    private = [str(path) for path in _needed() if path.is_relative_to("/tmp") or path.is_relative_to("/var/tmp")]
    if private:
        raise Unavailable(f"a service has a /tmp of its own, and does not see {', '.join(private)}")


def _needed() -> list[Path]:
    """The folders that this package and its Python are in."""
    return list(dict.fromkeys([ROOT.resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]))


def _own_group() -> Path:
    """This process's control group, in the hierarchy that has them all. Raises Unavailable."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    top = next((words[1] for words in mounts if words[2] == "cgroup2"), None)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if top is None or own is None or not (Path(top) / own).is_dir():
        raise Unavailable("there is no control group of version 2 to work in")
    return Path(top) / own


def _start(folder: Path, group: Path, log: int) -> subprocess.Popen[bytes]:
    """The process in front of the new machine, which ends with this one."""
    spaces = ("--mount", "--net", "--uts", "--ipc")
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "sh", "-euc", _JOIN, "sh", folder, group, *_needed()],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={"PATH": _PATH, "LC_ALL": "C.UTF-8", "MACHINE": _MACHINE, "SYSTEMD": str(SYSTEMD)},
        start_new_session=True,
    )


def _booted(first: subprocess.Popen[bytes], said: Path) -> LiveSystemd:
    """Raises Unavailable if it does not come up."""
    end_s = time.monotonic() + PATIENCE_S
    state = ""
    while time.monotonic() < end_s and first.poll() is None:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                live = LiveSystemd(int(children[0]))
                state = live.run("systemctl", "is-system-running").stdout.strip()
                if state in ("running", "degraded"):
                    return live
        os.sched_yield()
    why = said.read_text().strip() or state or ("it is not up in time" if first.poll() is None else "it ended")
    raise Unavailable(f"systemd does not boot in namespaces here: {why}")


def _remove(group: Path) -> None:
    """End what is left in a control group, and remove it with those below."""
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
    end_s = time.monotonic() + PATIENCE_S
    while "populated 1" in (group / "cgroup.events").read_text():
        assert time.monotonic() < end_s, f"processes are left in {group}"
        os.sched_yield()
    for path, _, _ in os.walk(group, topdown=False):
        os.rmdir(path)
