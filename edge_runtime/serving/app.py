"""The ASGI application: endpoints behind CORS behind the guard, every error in one shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from .errors import ApiError, api_error, bad_request
from .guard import Guard, Rules
from .routes import Service, make_router, refused

_WORDS = {404: "there is no such endpoint", 405: "this endpoint takes another method", 400: "the body is not JSON"}
_FORM = re.compile(r"str|int|constrained-\w+|(list|dict)\[.*\]|TextPart")  # names that pydantic gives to alternatives


class Application:
    """What the server runs. `set_rules` puts a new configuration into force for the requests to come."""

    def __init__(self, service: Service, rules: Rules, origins: Sequence[str], *, show_document: bool) -> None:
        """`show_document`: the OpenAPI document may be read, which tells strangers what there is to try."""
        self.service = service
        self.api = FastAPI(
            title="edge_runtime",
            version=__version__,
            openapi_url="/openapi.json" if show_document else None,
            docs_url=None,
            redoc_url=None,
        )
        self.api.include_router(make_router(service))
        self.api.add_exception_handler(ApiError, refused)
        self.api.add_exception_handler(RequestValidationError, _invalid)
        self.api.add_exception_handler(HTTPException, _http)
        self.api.add_exception_handler(Exception, _unexpected)
        self._inner: ASGIApp = self.api
        self._guard = Guard(self._route, rules, service.metrics)
        self.set_rules(rules, origins)

    def set_rules(self, rules: Rules, origins: Sequence[str]) -> None:
        self._guard.rules = rules
        if origins:
            self._inner = CORSMiddleware(
                self.api,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        else:
            self._inner = self.api

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._inner(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)


async def _invalid(_request: Request, error: Exception) -> Response:
    """A field that is not what it should be, never its value; where there are forms to choose from, the nearest."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = max(error.errors(), key=lambda found: len(found.get("loc", ())), default={})
    place = [str(part)[:80] for part in first.get("loc", ())[1:] if not _FORM.fullmatch(str(part))]
    if first.get("type") == "json_invalid":
        return bad_request("the body is not JSON", None).response()
    param = ".".join(place) or None
    message = first.get("msg", "this is not what it should be")
    if first.get("type") == "extra_forbidden":
        message = "unknown field"
    return bad_request(f"{param}: {message}" if param else message, param).response()


async def _unexpected(_request: Request, error: Exception) -> Response:
    """The guard, which hears of it afterwards, writes it into the log."""
    return api_error(error).response()


async def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = _WORDS.get(error.status_code, "the request cannot be met")
    return ApiError(error.status_code, text, headers=error.headers).response()
