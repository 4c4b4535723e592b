"""The service under a systemd of the tests' own: of the machine, and of a user."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from edge_runtime.service.unit import SERVICE

from .live_systemd import LOG, UNITS, LiveSystemd, program
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


# ── of a user ───────────────────────────────────────────────────────────────────────────────────────────────────────

_NAME, _UID = "tester", 4711
_MANAGER = "tester.service"
# what logind and PAM would start at a login
_MANAGER_UNIT = f"""[Service]
Type=notify
User={_NAME}
Environment=XDG_RUNTIME_DIR=/run/user/{_UID}
ExecStart=/usr/lib/systemd/systemd --user --unit=basic.target
Delegate=yes
KillMode=mixed
"""


class User:
    """Somebody with a home, a systemd of their own and no rights."""

    uid, home = _UID, Path("/home") / _NAME

    def __init__(self, machine: LiveSystemd) -> None:
        self.machine = machine
        with machine.path("/etc/passwd").open("a") as file:
            file.write(f"{_NAME}:x:{_UID}:{_UID}::{self.home}:/bin/sh\n")
        for folder in (self.home, Path(f"/run/user/{_UID}")):
            machine.path(folder).mkdir(parents=True, mode=0o700)
            self.own(folder)
        for folder in (program(), Path(sys.base_prefix)):  # the way to Python may be for root alone
            for part in folder.parents:
                found = machine.path(part)
                found.chmod(found.stat().st_mode | 0o111)
        machine.write(UNITS / _MANAGER, _MANAGER_UNIT)
        machine.systemctl("daemon-reload")
        machine.systemctl("start", _MANAGER)

    def own(self, path: Path) -> None:
        os.chown(self.machine.path(path), _UID, _UID)

    def write(self, path: Path, text: str) -> None:
        """A file of theirs, in folders of theirs."""
        self.machine.write(path, text)
        for part in (path, *path.parents):
            if part.is_relative_to(self.home):
                self.own(part)

    def must(self, *command: object) -> str:
        """What a command of theirs printed; it must succeed."""
        variables = (f"HOME={self.home}", f"XDG_RUNTIME_DIR=/run/user/{_UID}", f"USER={_NAME}")
        rights = (f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups")
        return self.machine.must("setpriv", *rights, "env", *variables, *command)

    def show(self, name: str) -> str:
        """A property of their service."""
        return self.must("systemctl", "--user", "show", SERVICE, f"--property={name}", "--value").strip()

    def leave(self) -> None:
        """End what is theirs."""
        self.machine.run("systemctl", "kill", "--signal=KILL", _MANAGER)
        self.machine.run("systemctl", "stop", _MANAGER)
