"""The units as `edge-run service install` writes them, under a real systemd."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.service.unit import SERVICE, SOCKET
from edge_runtime.service_cli import NOT_ACTIVE

from .live_systemd import LOG, UNITS, LiveSystemd, Unavailable, live_systemd, program
from .service_live import CONFIG, ENDS, HELD, MODEL, STATE, TINY, Installed, User, asking
from .serving_helpers import CHAT

WRONG = f"{TINY}[limits]\nmax_tokens = 'many'\n"


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


@pytest.fixture
def install(machine: LiveSystemd) -> Iterator[Installed]:
    """Installs the service; nothing of it is left afterwards."""
    yield Installed(machine)
    machine.run("systemctl", "stop", "--no-block", SOCKET, SERVICE)
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    machine.run("systemctl", "stop", SOCKET, SERVICE)
    machine.run("systemctl", "reset-failed")
    machine.run("systemctl", "disable", SOCKET, SERVICE)
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
    machine.write(CONFIG, WRONG)
    assert machine.run("systemctl", "start", SERVICE).returncode == 1
    assert service.states() == ["failed", "failed"]
    assert service.ends() == ["exit-code exited 2"]
    assert machine.show("NRestarts") == "0"
    assert "max_tokens in [limits]" in machine.log()
    shown = machine.run(program(), "service", "status")
    assert shown.returncode == NOT_ACTIVE
    told = shown.stdout.splitlines()
    assert told[0] == "state: failed (failed), disabled"
    assert "last end: exit-code, exit code 2; restarted 0 times" in told
    machine.write(CONFIG, TINY)
    machine.must("sh", "-c", told[-1].removeprefix("once that is mended: ").replace("sudo ", ""))
    assert service.chat() == 200


def test_after_too_many_failures_an_install_starts_it_again(install: Installed) -> None:
    """The first client wakes it, and so does each try that follows, until systemd has enough of it."""
    machine, service = install.machine, install(TINY, "--socket", drop_in="[Unit]\nStartLimitBurst=2\n")
    machine.write(CONFIG, WRONG)
    machine.systemctl("start", SOCKET)
    client = machine.connection()
    machine.until(lambda: machine.show("ActiveState", SOCKET) == "failed")
    client.close()
    machine.write(CONFIG, TINY)
    assert machine.run("systemctl", "start", SERVICE).returncode == 1
    machine.edge_run("service", "install", "--socket", "--now")
    machine.until(lambda: machine.show("ActiveState") == "active")
    assert service.chat() == 200


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
    assert service.chat() == 200  # the first client starts it, and is answered once the model is loaded
    pid = machine.show("MainPID")
    assert os.readlink(machine.path(f"/proc/{pid}/ns/net")) != os.readlink(machine.path("/proc/1/ns/net"))
    machine.systemctl("kill", "--signal=KILL", SERVICE)
    assert service.chat() == 200  # nobody is turned away meanwhile
    machine.until(lambda: service.runs_after(pid))


# ── its log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_journal_has_levels_and_no_prompts(install: Installed) -> None:
    machine, secret = install.machine, "xylophone"
    machine.systemctl("start", "systemd-journald.service")
    config = f'{TINY}ctx = 4096\n[service]\nlog_level = "debug"\n'
    service = install(config, drop_in="StandardOutput=journal\nStandardError=journal\n").start()
    messages = [{"role": "user", "content": secret}]
    assert service.chat(messages=messages) == 200
    for wrong in ({"messages": secret}, {"messages": messages, secret: 1}, {"model": secret, "messages": messages}):
        assert service.chat(**wrong) in (400, 404)
    assert service.status(f"/{secret}?{secret}=1") == 404
    machine.write(CONFIG, WRONG)
    machine.systemctl("reload", SERVICE)

    def entries() -> list[dict[str, str]]:
        lines = machine.must("journalctl", f"--unit={SERVICE}", "--output=json", "_TRANSPORT=stdout").splitlines()
        return [json.loads(line) for line in lines]

    def levels(words: str) -> list[str]:
        return [entry["PRIORITY"] for entry in entries() if words in entry["MESSAGE"]]

    machine.until(lambda: levels("the configuration stays as it was"))
    assert levels("the configuration stays as it was") == ["3"]
    assert levels("a context of 4096 tokens is more than ") == ["4"]
    assert levels(f"POST {CHAT} 200 ") == ["6"]
    machine.run("systemctl", "restart", SERVICE)
    machine.until(lambda: levels("error: "))
    assert set(levels("error: ") + levels("hint: ")) == {"3"}  # the last words of a start that failed
    assert {entry["SYSLOG_IDENTIFIER"] for entry in entries()} == {"edge-run"}
    texts = [entry["MESSAGE"] for entry in entries()]
    assert not any(text.startswith("<") for text in texts)
    assert secret not in "\n".join(texts)
    machine.systemctl("stop", "systemd-journald.socket", "systemd-journald.service")


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
    peak_kib, _unit = install.process("VmHWM").split()
    assert int(peak_kib) * 1024 < int(machine.show("MemoryMax"))
    assert machine.edge_run("service", "uninstall").split() == [str(UNITS / SERVICE)]
    assert machine.show("LoadState") == "not-found"
    assert list(machine.path(UNITS).rglob("edge-runtime*")) == []


def test_status_is_of_what_runs_now(install: Installed) -> None:
    machine = install.machine
    missing = machine.run(program(), "service", "status")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "edge-runtime.service is not installed" in missing.stderr
    service = install(TINY)
    stopped = machine.run(program(), "service", "status")
    assert stopped.returncode == NOT_ACTIVE
    assert stopped.stdout.startswith("state: inactive (dead), disabled\n")
    service.start()
    told = dict(line.split(": ", 1) for line in machine.edge_run("service", "status").splitlines())
    assert told["state"].startswith("active (running) since ")
    assert told["says"].startswith("tiny, auto, ")
    assert told["process"] == machine.show("MainPID")
    pid = machine.show("MainPID")
    machine.systemctl("kill", "--signal=KILL", SERVICE)
    machine.until(lambda: service.runs_after(pid))
    assert "restarted 1 times" in machine.edge_run("service", "status")


# ── of a user ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def user(machine: LiveSystemd) -> Iterator[User]:
    made = User(machine)
    yield made
    made.leave()


def test_a_user_has_a_service_of_their_own(machine: LiveSystemd, user: User) -> None:
    """Under a `systemd --user`, started as logind would start it; there is no login, no PAM and no bus."""
    units, config = user.home / ".config/systemd/user", user.home / ".config/edge-runtime/config.toml"
    user.write(config, TINY)
    user.write(units / f"{SERVICE}.d/90-test.conf", "[Service]\nRestartSec=100ms\n")
    assert user.must(program(), "service", "install", "--user", "--now").split() == [str(units / SERVICE)]
    machine.until(lambda: user.show("ActiveState") == "active")
    service = Installed(machine)
    assert service.chat() == 200
    told = json.loads(user.must(program(), "service", "status", "--json"))
    assert (told["active"], told["enabled"], told["restarts"]) == (True, "enabled", 0)
    assert told["status"].startswith("tiny, auto, ")
    process = machine.path(f"/proc/{told['pid']}")
    assert process.stat().st_uid == user.uid
    user.must("systemctl", "--user", "kill", "--signal=KILL", SERVICE)
    machine.until(lambda: {"active", "1"} == set(user.show("ActiveState,NRestarts").split()))
    assert service.chat() == 200
    user.must("systemctl", "--user", "reload", SERVICE)
    user.must("systemctl", "--user", "stop", SERVICE)
    (saved,) = machine.path(user.home).rglob("serve.json")
    assert (saved.stat().st_uid, stat.S_IMODE(saved.stat().st_mode)) == (user.uid, 0o600)
    printed = user.must(program(), "service", "uninstall", "--user")
    assert printed.split() == [str(units / SERVICE)]
    assert user.show("LoadState") == "not-found"
