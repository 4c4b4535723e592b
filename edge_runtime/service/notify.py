"""What a service tells systemd: sd_notify(3), spoken directly, and nothing where nobody listens.

No method raises or waits: a server does not stop because its manager cannot be told something.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping

SOCKET_ENV = "NOTIFY_SOCKET"
_MAX_STATUS = 500  # characters, which leaves room for a path and what is wrong with it

Send = Callable[[bytes], bool]  # one message; whether it was taken


class Notifier:
    """Messages to the service manager; each method says whether the message was handed over."""

    def __init__(self, send: Send | None, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """`send` None: nobody listens. `clock_ns` is CLOCK_MONOTONIC."""
        self._send, self._clock_ns = send, clock_ns
        self.listening = send is not None

    def ready(self, status: str = "") -> bool:
        """Started, or reloaded."""
        return self._say("READY=1", *_status(status))

    def status(self, text: str) -> bool:
        """One line for people, as `systemctl status` shows it."""
        return self._say(*_status(text))

    def reloading(self, status: str = "") -> bool:
        """The configuration is being read again; `ready` ends that, whether the new one was good or not."""
        return self._say("RELOADING=1", f"MONOTONIC_USEC={self._clock_ns() // 1000}", *_status(status))

    def stopping(self, status: str = "") -> bool:
        """The end has begun."""
        return self._say("STOPPING=1", *_status(status))

    def watchdog(self) -> bool:
        """Still alive; see service.watchdog for who may say so."""
        return self._say("WATCHDOG=1")

    def _say(self, *lines: str) -> bool:
        if self._send is None or not lines:
            return False
        return self._send("\n".join(lines).encode("utf-8", "replace"))


def _status(text: str) -> tuple[str, ...]:
    """A status is one line: a newline in it would begin another message."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > _MAX_STATUS:
        line = line[: _MAX_STATUS - 1] + "…"
    return (f"STATUS={line}",) if line else ()


def notifier(environment: Mapping[str, str]) -> Notifier:
    """A notifier for $NOTIFY_SOCKET: a path, or the name of an abstract socket after an @."""
    address = environment.get(SOCKET_ENV, "")
    if not address.startswith(("/", "@")) or len(address) < 2 or not hasattr(socket, "AF_UNIX"):
        return Notifier(None)  # not set, or a kind of socket that only virtual machines have
    name = os.fsencode("\0" + address[1:] if address.startswith("@") else address)
    return Notifier(lambda message: _send(name, message))


def _send(address: bytes, message: bytes) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setblocking(False)  # a full queue loses a message rather than a token
        client.sendto(message, address)
        return True
    return False


def forget_socket(environment: MutableMapping[str, str]) -> None:
    """Keep commands that this process starts from speaking for it."""
    environment.pop(SOCKET_ENV, None)
