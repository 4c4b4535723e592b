"""Sockets that systemd opened for the service: sd_listen_fds(3), with each descriptor looked at before it is used."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from ..errors import UsageError

FIRST_DESCRIPTOR = 3  # after standard input, output and errors
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_MOST = 64
_HINT = "compare the .socket unit with what `edge-run service install --socket --dry-run` prints"


@dataclass(frozen=True, slots=True)
class Listener:
    """A stream socket that accepts, and the name its unit gave it."""

    name: str
    socket: socket.socket


def take_listeners(
    environment: MutableMapping[str, str], pid: int | None = None, first: int = FIRST_DESCRIPTOR
) -> list[Listener]:
    """The sockets handed to process `pid` (this one), none if there are none.

    They are closed by commands that this process starts, and the variables are removed, so that no child takes them for
    its own. Raises UsageError if what was handed over is not what it should be.
    """
    told = {name: environment.pop(name, "") for name in _VARIABLES}
    if not told["LISTEN_FDS"] or told["LISTEN_PID"] != str(os.getpid() if pid is None else pid):
        return []
    text = told["LISTEN_FDS"]
    if not (text.isascii() and text.isdigit()) or int(text) > _MOST:
        raise UsageError(f"$LISTEN_FDS is {text[:20]!r}, which is no number of sockets up to {_MOST}", _HINT)
    count = int(text)
    names = told["LISTEN_FDNAMES"].split(":") if told["LISTEN_FDNAMES"] else [""] * count
    if len(names) != count:
        raise UsageError(f"$LISTEN_FDNAMES has {len(names)} names for {count} sockets", _HINT)
    found: list[Listener] = []
    try:
        for offset, name in enumerate(names):
            found.append(Listener(name, _listener(first + offset)))
    except UsageError:
        for listener in found:
            listener.socket.close()
        raise
    return found


def _listener(descriptor: int) -> socket.socket:
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFD)
        fcntl.fcntl(descriptor, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise UsageError(f"descriptor {descriptor} is no socket: {error.strerror}", _HINT) from None
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if found.family not in families or found.type != socket.SOCK_STREAM:
        problem = f"socket {descriptor} is neither a TCP nor a Unix stream socket"
    elif not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        problem = f"socket {descriptor} does not listen: Accept=yes hands over connections, which is not supported"
    else:
        found.setblocking(False)
        return found
    found.close()
    raise UsageError(problem, _HINT)
