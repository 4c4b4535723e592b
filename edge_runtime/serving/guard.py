"""What stands before all endpoints: who may ask and how much, an id for each request, a line of the log, a count."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .streams import COUNTS

logger = logging.getLogger("edge_runtime.serving")

_OPEN_PATHS = ("/health", "/ready")
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/moderations", "/v1/models", "/metrics", *_OPEN_PATHS)
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may ask, and how much."""

    api_key: str | None
    max_body_bytes: int
    body_s: float | None  # within which a body must have come
    local_names_only: bool  # no key protects a server on loopback: not from web pages that call it by a name of theirs


class Guard:
    """The outermost ASGI application. `rules` may be set anew."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.rules = rules
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, id_ = time.perf_counter(), f"req_{secrets.token_hex(12)}"
        told: dict[str, int] = {}

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id_
            await send(message)

        try:
            try:
                receive = await self._admit(scope, receive)
                await self._app(scope, receive, noting)
            except ApiError as error:
                await error.response()(scope, receive, noting)
            except (Exception, RecursionError) as error:
                # a message may quote what was sent
                frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
                logger.error("%s %s\n%s", id_, type(error).__name__, frames)
                if not told:
                    await ApiError(500, "the server failed; its log says how").response()(scope, receive, noting)
        finally:
            status = told.get("status", 499)  # nothing was sent: the client left
            self._metrics.requests.labels(endpoint_of(scope["path"]), str(status)).inc()
            logger.info("%s", _line(id_, scope, status, time.perf_counter() - start))

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Raises ApiError for a request that is not let in; else what the application receives from."""
        rules, headers = self.rules, Headers(scope=scope)
        if rules.local_names_only and not _is_local(headers.get("host", "")):
            raise ApiError(403, "this server is asked as localhost, unless it has an API key")
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if rules.api_key is not None and scope["path"] not in _OPEN_PATHS and not preflight:
            _check_key(headers.get("authorization", ""), rules.api_key)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        try:
            body = await asyncio.wait_for(_read(headers, receive, rules.max_body_bytes), rules.body_s)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
        if body and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, with the header Content-Type: application/json")
        return _replay(body, receive)


def _check_key(given: str, key: str) -> None:
    """Raises ApiError 401. Takes the same time wherever a wrong key begins to differ."""
    kind, _, token = given.partition(" ")
    same = hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())
    if kind.lower() != "bearer" or not same:
        text = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.lower() in _LOCAL_NAMES


async def _read(headers: Headers, receive: Receive, most: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is known to be too large, 400 if the client leaves."""
    told = headers.get("content-length", "")
    if told.isascii() and told.isdigit() and (len(told) > 18 or int(told) > most):
        raise _too_large(most)
    parts, n = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before its request was whole")
        parts.append(message.get("body", b""))
        n += len(parts[-1])
        if n > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body out once; behind it, what else the client does."""
    given: list[bool] = []

    async def again() -> Message:
        if given:
            return await receive()
        given.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def endpoint_of(path: str) -> str:
    """One of few names, whatever clients ask for."""
    return next((known for known in _ENDPOINTS if path == known or path.startswith(f"{known}/")), "other")


def _line(id_: str, scope: Mapping[str, Any], status: int, seconds: float) -> str:
    counts = scope.get(COUNTS)
    tokens = "" if counts is None else f" prompt={counts[0]} answer={counts[1]} reused={counts[2]}"
    return f"{id_} {scope['method']} {endpoint_of(scope['path'])} {status} {seconds * 1e3:.0f}ms{tokens}"
