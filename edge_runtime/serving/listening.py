"""The sockets that the server listens on: handed over by systemd, or opened here."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping, Sequence

from ..errors import EdgeError, UsageError
from ..service.sockets import take_listeners

_BACKLOG = 128
_SILENT_MS = 120_000  # a client that takes nothing for so long is given up by the system


def open_listeners(host: str, port: int, environment: MutableMapping[str, str]) -> list[socket.socket]:
    """Those of systemd, if there are any; else one on `host` and `port`. Raises UsageError or EdgeError."""
    listeners = [listener.socket for listener in take_listeners(environment)] or [_bind(host, port)]
    for listener in listeners:
        if listener.family != getattr(socket, "AF_UNIX", None) and hasattr(socket, "TCP_USER_TIMEOUT"):
            # accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MS)
    return listeners


def _bind(host: str, port: int) -> socket.socket:
    try:
        name = "127.0.0.1" if host == "localhost" else host
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"{host} has no address: {error.strerror}", "set server.host to an address") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        hint = "is another server running? choose another with --port" if port else "check the address"
        raise EdgeError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}", hint) from None
    return listener


def is_local(listeners: Sequence[socket.socket]) -> bool:
    """Whether only this machine can reach them."""
    return all(_is_unix(one) or ipaddress.ip_address(one.getsockname()[0]).is_loopback for one in listeners)


def has_unix(listeners: Sequence[socket.socket]) -> bool:
    """Whether one of them is not on the network at all."""
    return any(map(_is_unix, listeners))


def _is_unix(listener: socket.socket) -> bool:
    return hasattr(socket, "AF_UNIX") and listener.family == socket.AF_UNIX


def address_of(listener: socket.socket) -> str:
    """Where to ask it, as a URL."""
    if _is_unix(listener):
        return f"unix:{listener.getsockname() or '(unnamed)'}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
