"""The units: what they say, that systemd takes them, and how little of the machine they leave open."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from edge_runtime.profiles import load_profile, profile_names
from edge_runtime.service.unit import DEVICE_DROP_IN, SERVICE, SOCKET, UNIT_FILES, UnitPlan, exec_word, unit_files

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not there")

PLAN = UnitPlan(
    command=Path("/bin/true"),
    memory_max_mib=512,
    api_key_file=Path("/etc/edge runtime/100%/api-key"),
    environment={"EDGE_RUNTIME_MODELS": '/srv/100% "good" models', "EDGE_RUNTIME_DEVICE": "pi5"},
)
PI = replace(PLAN, profile="pi5", sensors=load_profile("pi5").sensors)
PLANS = {
    "plain": UnitPlan(Path("/bin/true")),
    "system": PLAN,
    "pi": PI,
    "socket": replace(PI, socket=True),
    "home": replace(PLAN, bound=(Path("/home/a b/100%/venv"), Path("/root/venv"))),
    "network": replace(PLAN, host="0.0.0.0", allowed=("192.168.1.0/24",)),
    "open": replace(PLAN, host="::"),
}
USER_PLANS = {
    "user": replace(PLAN, user=True),
    "user-pi": replace(PI, user=True),
    "user-socket": replace(PLAN, user=True, socket=True, host="::1"),
}
# what `systemd-analyze security` may say, which counts from 0 (closed) to 10 (open); its versions differ a little
MOST_EXPOSED = 2.5
MOST_EXPOSED_USER = 7.0  # namespaces are the system's to make


def lines(text: str) -> list[str]:
    return text.splitlines()


def write(folder: Path, plan: UnitPlan) -> list[str]:
    """Writes the units; the paths of those that systemd starts."""
    for name, text in unit_files(plan).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return [str(folder / name) for name in (SERVICE, SOCKET) if (folder / name).exists()]


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, env=environment, timeout=120)


# ── as systemd sees them ────────────────────────────────────────────────────────────────────────────────────────────


@needs_systemd
@pytest.mark.parametrize("name", [*PLANS, *USER_PLANS])
def test_systemd_finds_nothing_to_say_about_them(tmp_path: Path, name: str) -> None:
    manager = ["--user"] if name in USER_PLANS else []
    paths = write(tmp_path, {**PLANS, **USER_PLANS}[name])
    done = analyze(tmp_path, "verify", *manager, *paths)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_systemd_would_find_something(tmp_path: Path) -> None:
    (path,) = write(tmp_path, PLANS["plain"])
    with open(path, "a") as file:
        file.write("[Service]\nProtectEverything=yes\n")
    assert "ProtectEverything" in analyze(tmp_path, "verify", path).stderr


@needs_systemd
@pytest.mark.parametrize("name", [*PLANS, *USER_PLANS])
def test_little_is_exposed(tmp_path: Path, name: str, record_property: Callable[[str, object], None]) -> None:
    done = analyze(tmp_path, "security", "--offline=true", write(tmp_path, {**PLANS, **USER_PLANS}[name])[0])
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    record_property("finding", f"exposure of the unit, {name}: {found[1]} of 10")
    assert float(found[1]) <= (MOST_EXPOSED_USER if name in USER_PLANS else MOST_EXPOSED)


@needs_systemd
@pytest.mark.parametrize("folder", ["with space", "100% %h %%", "semi;colon", "dollar$HOME", "ünï-cödé", "a=b,c:d"])
def test_systemd_finds_a_program_at_an_odd_path(tmp_path: Path, folder: str) -> None:
    command = tmp_path / folder / "edge-run"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    (path,) = write(tmp_path, UnitPlan(command))
    done = analyze(tmp_path, "verify", path)
    assert (done.returncode, done.stderr) == (0, "")
    command.unlink()
    assert str(command) in analyze(tmp_path, "verify", path).stderr


# ── what they say ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reload_is_told_as_the_systems_systemd_understands_it() -> None:
    old, new = (unit_files(replace(PLAN, systemd=version))[SERVICE] for version in (252, 253))
    assert "Type=notify" in lines(old)
    assert "ExecReload=/bin/kill -HUP $MAINPID" in lines(old)
    assert "Type=notify-reload" in lines(new)
    assert "ExecReload" not in new


def test_the_key_is_handed_over_by_systemd() -> None:
    assert "LoadCredential=api-key:/etc/edge runtime/100%%/api-key" in lines(unit_files(PLAN)[SERVICE])
    assert "LoadCredential" not in unit_files(replace(PLAN, api_key_file=None))[SERVICE]
    assert "LoadCredential" not in unit_files(replace(PLAN, user=True))[SERVICE]


def test_variables_are_quoted() -> None:
    text = unit_files(PLAN)[SERVICE]
    assert r'Environment="EDGE_RUNTIME_MODELS=/srv/100%% \"good\" models"' in lines(text)
    assert "Environment=EDGE_RUNTIME_DEVICE=pi5" in lines(text)


def test_memory_is_bounded_where_the_need_is_known() -> None:
    assert "MemoryMax=512M" in lines(unit_files(PLAN)[SERVICE])
    assert "MemoryMax" not in unit_files(replace(PLAN, memory_max_mib=0))[SERVICE]


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", (), ["IPAddressDeny=any", "IPAddressAllow=localhost"]),
        ("0.0.0.0", ("10.0.0.0/8", "fd00::/8"), ["IPAddressDeny=any", "IPAddressAllow=localhost 10.0.0.0/8 fd00::/8"]),
        ("0.0.0.0", (), []),
    ],
)
def test_addresses_are_as_open_as_the_host(host: str, allowed: tuple[str, ...], expected: list[str]) -> None:
    for socket in (False, True):
        files = unit_files(replace(PLAN, host=host, allowed=allowed, socket=socket))
        for text in files.values():
            assert [line for line in lines(text) if line.startswith("IPAddress")] == expected


def test_with_a_socket_the_service_has_no_network() -> None:
    files = unit_files(replace(PLAN, socket=True, port=9090))
    assert list(files) == [SERVICE, SOCKET]
    assert "PrivateNetwork=yes" in lines(files[SERVICE])
    assert "RestrictAddressFamilies=AF_UNIX" in lines(files[SERVICE])
    assert "ListenStream=127.0.0.1:9090" in lines(files[SOCKET])
    assert "PrivateNetwork" not in unit_files(PLAN)[SERVICE]


@pytest.mark.parametrize(("host", "at"), [("localhost", "127.0.0.1:8080"), ("::1", "[::1]:8080"), ("::", "[::]:8080")])
def test_a_socket_listens_where_the_server_would(host: str, at: str) -> None:
    assert f"ListenStream={at}" in lines(unit_files(replace(PLAN, socket=True, host=host))[SOCKET])


@pytest.mark.parametrize(("host", "port", "problem"), [("pi", 8080, "the name 'pi'"), ("127.0.0.1", 0, "a port")])
def test_a_socket_needs_an_address_and_a_port(host: str, port: int, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        unit_files(replace(PLAN, socket=True, host=host, port=port))


def test_a_home_is_hidden_but_for_what_is_needed() -> None:
    assert "ProtectHome=yes" in lines(unit_files(PLAN)[SERVICE])
    text = unit_files(PLANS["home"])[SERVICE]
    assert "ProtectHome=tmpfs" in lines(text)
    assert 'BindReadOnlyPaths="/home/a b/100%%/venv" /root/venv' in lines(text)


@pytest.mark.parametrize("name", profile_names())
def test_only_boards_with_a_device_for_their_sensors_get_a_drop_in(name: str) -> None:
    files = unit_files(replace(PLAN, profile=name, sensors=load_profile(name).sensors))
    assert (DEVICE_DROP_IN in files) == (name in ("pi4", "pi5"))


def test_a_pi_opens_its_firmware_and_nothing_else() -> None:
    assert lines(unit_files(PI)[DEVICE_DROP_IN])[1:] == [
        "[Service]",
        "PrivateDevices=no",
        "DeviceAllow=/dev/vcio rw",
        "SupplementaryGroups=video",
    ]
    assert "DevicePolicy=closed" in lines(unit_files(PI)[SERVICE])
    assert set(unit_files(replace(PI, socket=True))) == set(UNIT_FILES)


@pytest.mark.parametrize("path", ["/a'b", '/a"b', "/a\\b", "/a\nb", "relative", "/a\x1bb", "/a "])
def test_a_program_that_systemd_cannot_start_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        exec_word(Path(path))


def test_a_path_that_a_list_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="without a colon"):
        unit_files(replace(PLAN, bound=(Path("/home/a:b"),)))
