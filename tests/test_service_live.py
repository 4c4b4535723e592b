"""The units as `edge-run service install` writes them, under a real systemd."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.service.unit import SERVICE, SOCKET

from .live_systemd import LOG, UNITS, LiveSystemd, Unavailable, live_systemd
from .serving_helpers import CHAT, NO_END

CONFIG = "/etc/edge-runtime/config.toml"
MODEL = "/srv/tiny.gguf"
STATE = "/var/lib/private/edge-runtime/serve.json"
ENDS = "/run/ends"
TINY = f'[model]\nname = "{MODEL}"\nthreads = 1\n'
# what a test cannot wait for, and where it can look: the log, and how each run ended
DROP_IN = f"""[Service]
RestartSec=100ms
StandardOutput=append:{LOG}
StandardError=append:{LOG}
ExecStopPost=+/bin/sh -c 'echo $SERVICE_RESULT $EXIT_CODE $EXIT_STATUS >> {ENDS}'
"""
# the server, stopped just before it begins
HELD = """[Service]
ExecStart=
ExecStart=/bin/sh -c 'kill -STOP $$$$; exec {command}'
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_path: Callable[..., Path]) -> Iterator[LiveSystemd]:
    folder = tmp_path_factory.mktemp("systemd") / "machine"
    folder.mkdir()
    try:
        with live_systemd(folder) as made:
            shutil.copy(tiny_path(tokenizer=True), made.path(MODEL))
            made.path(MODEL).chmod(0o644)
            made.path(MODEL).parent.chmod(0o755)
            yield made
    except Unavailable as reason:
        pytest.skip(str(reason))


@dataclass
class Installed:
    """The service as installed, and a client of it."""

    machine: LiveSystemd
    key: str = ""

    def __call__(self, config: str, *options: str, drop_in: str = "") -> Installed:
        """Install it, with a configuration and nothing else of ours; it is not started."""
        self.machine.write(CONFIG, config)
        self.machine.edge_run("service", "install", *options)
        self.drop_in("90-test.conf", DROP_IN + drop_in)
        return self

    def drop_in(self, name: str, text: str) -> None:
        self.machine.write(UNITS / f"{SERVICE}.d" / name, text)
        self.machine.systemctl("daemon-reload")

    def start(self) -> Installed:
        """Until it is ready."""
        self.machine.systemctl("start", SERVICE)
        return self

    def states(self) -> list[str]:
        return self.machine.show("ActiveState,SubState").splitlines()

    def ends(self) -> list[str]:
        """How each run ended: systemd's word for it, and the process's code."""
        path = self.machine.path(ENDS)
        return path.read_text().splitlines() if path.exists() else []

    def status(self, path: str, body: Any = None) -> int:
        """Of one request."""
        connection = self.machine.connection()
        try:
            self.send(connection, path, body)
            reply = connection.getresponse()
            reply.read()
            return reply.status
        finally:
            connection.close()

    def chat(self, **fields: Any) -> int:
        return self.status(CHAT, asking(**fields))

    def send(self, connection: HTTPConnection, path: str, body: Any) -> None:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)

    def process(self, name: str) -> str:
        """A line of its main process's /proc/…/status."""
        text = self.machine.path(f"/proc/{self.machine.show('MainPID')}/status").read_text()
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{name}:"))

    def runs_after(self, pid: str) -> bool:
        """Whether another process than `pid` serves."""
        told = self.machine.show("ActiveState,MainPID").splitlines()
        return "active" in told and not {pid, "0"} & set(told)


def asking(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 3, "logit_bias": NO_END, **fields}


@pytest.fixture
def install(machine: LiveSystemd) -> Iterator[Installed]:
    """Installs the service; nothing of it is left afterwards."""
    yield Installed(machine)
    machine.run("systemctl", "stop", "--no-block", SOCKET, SERVICE)
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    machine.run("systemctl", "stop", SOCKET, SERVICE)
    machine.run("systemctl", "reset-failed")
    for name in (SERVICE, SOCKET, f"{SERVICE}.d"):
        path = machine.path(UNITS / name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (str(LOG), ENDS, STATE, CONFIG):
        machine.path(name).unlink(missing_ok=True)
    machine.systemctl("daemon-reload")


# ── start and stop ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_start_is_over_when_the_server_is_ready(install: Installed) -> None:
    machine, service = install.machine, install(TINY)
    text = machine.path(UNITS / SERVICE).read_text()
    command = next(line for line in text.splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    service.drop_in("95-held.conf", HELD.format(command=command))
    machine.systemctl("start", "--no-block", SERVICE)
    machine.until(lambda: machine.show("MainPID") != "0" and service.process("State").startswith("T"))
    assert service.states() == ["activating", "start"]
    machine.systemctl("kill", "--signal=CONT", SERVICE)
    machine.systemctl("start", SERVICE)  # joins the one under way
    assert service.status("/ready") == 200
    assert service.status("/health") == 200
    assert service.chat() == 200
    assert service.states() == ["active", "running"]
    assert machine.show("StatusText").startswith("tiny, auto, ")
    told = json.loads(machine.edge_run("service", "status", "--json"))
    assert told["active"]
    assert told["pid"] == int(machine.show("MainPID"))
    assert told["status"].startswith("tiny, auto, ")
    assert told["watchdog_s"] == 180
    assert told["restarts"] == 0


def test_a_stop_lets_answers_come_to_their_end(install: Installed) -> None:
    machine, service = install.machine, install(TINY).start()
    connection = machine.connection()
    try:
        service.send(connection, CHAT, asking(max_tokens=400, stream=True))
        reply = connection.getresponse()
        first = reply.read(1)
        machine.systemctl("stop", "--no-block", SERVICE)
        text = (first + reply.read()).decode()
    finally:
        connection.close()
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    machine.until(lambda: service.states() == ["inactive", "dead"])
    assert service.ends() == ["success exited 0"]
    assert "Traceback" not in machine.log()


def test_a_reload_takes_a_changed_configuration_over(install: Installed) -> None:
    machine, service = install.machine, install(f"{TINY}[limits]\nmax_tokens = 5\n").start()
    pid = machine.show("MainPID")
    assert (service.chat(max_tokens=5), service.chat(max_tokens=6)) == (200, 400)
    machine.write(CONFIG, f"{TINY}[limits]\nmax_tokens = 6\n")
    machine.systemctl("reload", SERVICE)
    machine.until(lambda: "configuration read again, changed: limits.max_tokens" in machine.log())
    assert (service.chat(max_tokens=6), service.chat(max_tokens=7)) == (200, 400)
    machine.write(CONFIG, f"{TINY}[limits]\nmax_tokens = 'many'\n")
    machine.systemctl("reload", SERVICE)
    machine.until(lambda: "the configuration stays as it was" in machine.log())
    machine.until(lambda: service.states() == ["active", "running"])
    assert service.chat(max_tokens=6) == 200
    assert machine.show("MainPID") == pid


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_server_is_started_again(install: Installed) -> None:
    machine, service = install.machine, install(TINY).start()
    pid = machine.show("MainPID")
    machine.systemctl("kill", "--signal=KILL", SERVICE)
    machine.until(lambda: service.runs_after(pid))
    assert service.ends() == ["signal killed KILL"]
    assert machine.show("NRestarts") == "1"
    assert service.chat() == 200


def test_a_server_that_hangs_is_ended_by_the_watchdog(install: Installed) -> None:
    machine, service = install.machine, install(TINY, drop_in="WatchdogSec=3s\n").start()
    heard = machine.show("WatchdogTimestampMonotonic")
    machine.until(lambda: machine.show("WatchdogTimestampMonotonic") != heard)
    assert service.states() == ["active", "running"]
    pid = machine.show("MainPID")
    machine.systemctl("kill", "--signal=STOP", SERVICE)
    machine.until(lambda: service.runs_after(pid))
    assert "watchdog killed ABRT" in service.ends()
    assert service.chat() == 200


def test_a_wrong_configuration_is_not_tried_again(install: Installed) -> None:
    machine, service = install.machine, install(TINY)
    machine.write(CONFIG, f"{TINY}[limits]\nmax_tokens = 'many'\n")
    assert machine.run("systemctl", "start", SERVICE).returncode == 1
    assert service.states() == ["failed", "failed"]
    assert service.ends() == ["exit-code exited 2"]
    assert machine.show("NRestarts") == "0"
    assert "max_tokens in [limits]" in machine.log()


# ── what the service may, and what it is given ──────────────────────────────────────────────────────────────────────


def test_it_runs_as_a_user_of_its_own_that_keeps_what_it_learnt(install: Installed) -> None:
    machine, service = install.machine, install(TINY).start()
    assert service.chat() == 200
    uid = int(machine.show("UID"))
    assert 61184 <= uid <= 65519  # those that systemd makes up
    assert set(service.process("Uid").split()) == {str(uid)}
    assert int(service.process("CapEff"), 16) == 0
    machine.systemctl("stop", SERVICE)
    found = machine.path(STATE).stat()
    assert (found.st_uid, found.st_mode & 0o777) == (uid, 0o600)
    assert machine.path(STATE).parent.stat().st_mode & 0o777 == 0o700
    service.start()
    assert "nothing was learnt before" not in machine.log()
    assert "nothing learnt is saved" not in machine.log()


def test_it_sees_no_home_and_writes_nowhere_else(install: Installed) -> None:
    """A shell in the place of the server."""
    machine, places = install.machine, ("/srv/mine", "/etc/mine", "/usr/mine")
    machine.write("/home/somebody-else/letter", "")
    machine.write("/tmp/of-another", "")
    look = f"export LC_ALL=C; ls /home /tmp /dev; touch {' '.join(places)}; touch /tmp/mine && echo written; exit 0"
    install(TINY, drop_in=f"Type=oneshot\nExecStart=\nExecStart=/bin/sh -c '{look}'\nRestart=no\n").start()
    log = machine.log()
    assert [f"touch: cannot touch '{path}': Read-only file system" in log for path in places] == [True] * 3
    assert "somebody-else" not in log
    assert "of-another" not in log
    assert "\nurandom\n" in log
    assert "\nwritten\n" in log
    assert not machine.path("/tmp/mine").exists()


def test_the_key_comes_as_a_credential(install: Installed) -> None:
    machine = install.machine
    machine.write("/etc/edge-runtime/key", "a-secret-of-ours\n", mode=0o600)
    service = install(f'{TINY}[server]\napi_key_file = "/etc/edge-runtime/key"\n').start()
    assert service.status("/health") == 200
    assert service.chat() == 401
    service.key = "a-secret-of-ours"
    assert service.chat() == 200
    assert "a-secret-of-ours" not in machine.systemctl("show", SERVICE) + machine.log()


def test_systemd_opens_the_port(install: Installed) -> None:
    machine, service = install.machine, install(TINY, "--socket")
    machine.systemctl("start", SOCKET)
    assert service.states() == ["inactive", "dead"]
    assert service.status("/ready") in (200, 503)  # the first client starts it, and may be told to come again
    machine.until(lambda: machine.show("ActiveState") == "active")
    assert service.chat() == 200
    pid = machine.show("MainPID")
    assert os.readlink(machine.path(f"/proc/{pid}/ns/net")) != os.readlink(machine.path("/proc/1/ns/net"))
    machine.systemctl("kill", "--signal=KILL", SERVICE)
    assert service.status("/ready") in (200, 503)  # nobody is turned away meanwhile
    machine.until(lambda: service.runs_after(pid))
    assert service.chat() == 200


# ── install and uninstall ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.model
def test_with_no_model_configured_it_serves_the_demo_model(install: Installed) -> None:
    machine = install.machine
    machine.write(CONFIG, "[model]\nthreads = 1\n")
    printed = machine.edge_run("service", "install", "--now")
    assert printed.split() == [str(UNITS / SERVICE)]
    machine.until(lambda: machine.show("ActiveState") == "active")
    assert machine.systemctl("is-enabled", SERVICE) == "enabled\n"
    assert install.chat(model="smollm2-135m") == 200
    assert machine.edge_run("service", "uninstall").split() == [str(UNITS / SERVICE)]
    assert machine.show("LoadState") == "not-found"
    assert list(machine.path(UNITS).rglob("edge-runtime*")) == []
