"""What systemd hears, and which sockets are taken from it."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from edge_runtime.service.notify import Notifier, forget_socket, notifier
from edge_runtime.service.sockets import take_listeners

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")


@pytest.fixture
def heard() -> list[bytes]:
    return []


@pytest.fixture
def speaker(heard: list[bytes]) -> Notifier:
    def send(message: bytes) -> bool:
        heard.append(message)
        return True

    return Notifier(send, clock_ns=lambda: 12_345_678_901)


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_life_of_a_service(speaker: Notifier, heard: list[bytes]) -> None:
    speaker.status("loading smollm2-135m")
    speaker.ready("ready")
    speaker.watchdog()
    speaker.reloading("reading the configuration")
    speaker.ready()
    speaker.stopping()
    assert heard == [
        b"STATUS=loading smollm2-135m",
        b"READY=1\nSTATUS=ready",
        b"WATCHDOG=1",
        b"RELOADING=1\nMONOTONIC_USEC=12345678\nSTATUS=reading the configuration",
        b"READY=1",
        b"STOPPING=1",
    ]


def test_a_status_is_one_line_and_cannot_say_more(speaker: Notifier, heard: list[bytes]) -> None:
    speaker.status("a model\nREADY=1\r\x1b[31m \u2028x\tend\udc80")
    assert heard == [b"STATUS=a model READY=1 [31m x end"]
    speaker.status("é" * 501)
    assert heard[1].decode() == "STATUS=" + "é" * 499 + "…"
    assert not speaker.status("\n")
    assert len(heard) == 2


@pytest.mark.parametrize("address", ["", "@", "/", "vsock:2:1234", "relative/path"])
def test_where_nobody_listens_nothing_is_said(address: str) -> None:
    silent = notifier({"NOTIFY_SOCKET": address} if address else {})
    assert not silent.listening
    assert not silent.ready()
    assert not silent.watchdog()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        own.setblocking(False)
        yield own


def test_a_message_arrives_at_a_path(server: socket.socket, tmp_path: Path) -> None:
    server.bind(str(tmp_path / "notify"))
    assert notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).ready("up")
    assert server.recv(100) == b"READY=1\nSTATUS=up"


@linux_only
def test_a_message_arrives_at_an_abstract_socket(server: socket.socket) -> None:
    name = f"edge-runtime-test-{secrets.token_hex(8)}"
    server.bind("\0" + name)
    assert notifier({"NOTIFY_SOCKET": "@" + name}).watchdog()
    assert server.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_is_gone_or_does_not_read_stops_nobody(server: socket.socket, tmp_path: Path) -> None:
    gone = notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert gone.listening
    assert not gone.ready()
    assert not notifier({"NOTIFY_SOCKET": "/" + "x" * 500}).ready()
    server.bind(str(tmp_path / "notify"))
    full = notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert any(not full.watchdog() for _ in range(10_000))


def test_children_do_not_speak_for_the_service() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "PATH": "/bin"}
    forget_socket(environment)
    forget_socket(environment)
    assert environment == {"PATH": "/bin"}


# ── sockets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def handed(count: int = 1, names: str = "", pid: int = 7) -> dict[str, str]:
    told = {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count), "PATH": "/bin"}
    return {**told, "LISTEN_FDNAMES": names} if names else told


@pytest.fixture
def listening() -> Iterator[int]:
    """The descriptor of a socket that listens."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        yield _copy(own.fileno())


def _copy(descriptor: int) -> int:
    """A copy at a number that is not used otherwise; inherited by children, as systemd's are."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 200)
    os.set_inheritable(copy, True)
    return copy


def test_a_socket_is_taken_once(listening: int) -> None:
    environment = handed(names="http")
    (listener,) = take_listeners(environment, pid=7, first=listening)
    with listener.socket as found:
        assert listener.name == "http"
        assert found.fileno() == listening
        assert not os.get_inheritable(listening)
        assert not found.getblocking()
        assert environment == {"PATH": "/bin"}
        assert take_listeners(environment, pid=7, first=listening) == []
        with socket.create_connection(found.getsockname()):
            pass


def test_the_sockets_of_another_process_are_not_ours(listening: int) -> None:
    environment = handed(pid=8)
    assert take_listeners(environment, pid=7, first=listening) == []
    assert environment == {"PATH": "/bin"}
    os.fstat(listening)
    os.close(listening)


def test_without_activation_there_are_none() -> None:
    assert take_listeners({}) == []


@pytest.mark.parametrize("count", ["-1", "x", "65", "٣"])
def test_a_number_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(UsageError, match="LISTEN_FDS"):
        take_listeners({**handed(), "LISTEN_FDS": count}, pid=7)


def test_names_and_sockets_must_be_as_many() -> None:
    with pytest.raises(UsageError, match="2 names for 1 sockets"):
        take_listeners(handed(names="a:b"), pid=7)


def test_what_is_no_listening_socket_is_refused_and_closed(listening: int) -> None:
    os.close(listening)
    with pytest.raises(UsageError, match="is no socket: Bad file descriptor"):
        take_listeners(handed(), pid=7, first=listening)
    with socket.socket() as silent, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets:
        for own, problem in ((silent, "does not listen"), (packets, "neither a TCP nor a Unix stream socket")):
            copy = _copy(own.fileno())
            with pytest.raises(UsageError, match=problem):
                take_listeners(handed(), pid=7, first=copy)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(copy)
    with open(os.devnull) as file:
        copy = _copy(file.fileno())
        with pytest.raises(UsageError, match="is no socket"):
            take_listeners(handed(), pid=7, first=copy)
        os.close(copy)


def test_a_good_socket_beside_a_bad_one_is_closed_too(listening: int) -> None:
    with pytest.raises(UsageError):
        take_listeners(handed(count=2), pid=7, first=listening)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(listening)
