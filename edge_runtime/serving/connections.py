"""Connections as uvicorn keeps them, and for how long the server waits for a client, and a client for the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

logger = logging.getLogger("edge_runtime.serving")

_MOST_CONNECTIONS = 512
_SILENT_S = 60.0  # that a connection may be there without a request
_OF_THE_MODEL = "/v1/"  # paths that nothing can be said of before the model is loaded


class WhileLoading:
    """An ASGI application that lets requests wait until the model is loaded, or cannot be; then they go on to `app`.

    Nothing of them is read meanwhile. Health, readiness and metrics do not wait.
    """

    def __init__(self, app: ASGIApp, decided: asyncio.Event, most_s: float) -> None:
        """After `most_s` a request goes on anyway, and is told to come again."""
        self._app, self._decided, self._most_s = app, decided, most_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_OF_THE_MODEL):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._decided.wait(), self._most_s)
        await self._app(scope, receive, send)


class _Config(uvicorn.Config):
    patience: Callable[[], float | None]  # seconds


class Connection(H11Protocol):
    """One that is given up when its client takes nothing of an answer for a while, or sends no request.

    A client that is only slow is waited for. Of an answer only the part that the system did not take at once is kept
    here; the rest waits as text, and is never more than the answer.
    """

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._patience = config.patience
        self._n_taken = 0  # times that all there was to write was taken
        self._seen: tuple[object, ...] = ()
        self._since_s = 0.0  # when what was seen last was seen first
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._n_taken += 1
        super().resume_writing()

    def _look(self) -> None:
        """See whether anything has changed, and come again."""
        n_bytes, now_s, patience_s = self.transport.get_write_buffer_size(), self.loop.time(), self._patience()
        asks = self.cycle is not None and not self.cycle.response_complete
        seen = (self.cycle, asks, n_bytes, self._n_taken)
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        most_s = patience_s if n_bytes else None if asks else _SILENT_S
        if most_s is not None and now_s - self._since_s >= most_s:
            if n_bytes:
                logger.warning("a client is given up: it took nothing of its answer for %g s", most_s)
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(min(patience_s or _SILENT_S, _SILENT_S), self._look)


class Http(uvicorn.Server):
    """uvicorn without its signals and its clock: the event loop sleeps while nothing happens."""

    def __init__(self, app: ASGIApp, over: asyncio.Event, patience: Callable[[], float | None]) -> None:
        """Runs until `over`, and then until no client is left. `patience`: seconds, None for ever; it may change."""
        config = _Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            loop="asyncio",
            http=Connection,
            ws="none",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
        )
        config.patience = patience
        super().__init__(config)
        self._over = over

    def abandon(self) -> None:
        """Give up all clients that are still there; what answers them hears that they are gone."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self._over.wait()
