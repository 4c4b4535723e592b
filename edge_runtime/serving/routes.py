"""The endpoints: each checks what it is asked, and lets others do it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .. import __version__
from ..config import LimitsConfig
from .answers import Answer, Wanted
from .asking import refuse_unknown, wanted_chat, wanted_completion
from .backend import Backend
from .errors import ApiError, utf8
from .metrics import CONTENT_TYPE, Metrics
from .moderation import Moderation
from .streams import Reply, Style
from .wire import (
    ChatReply,
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    HealthReply,
    ModelCard,
    ModelList,
    ModerationReply,
    ModerationRequest,
    Sampled,
    TextReply,
)
from .worker import EngineThread

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in (
        (400, "The request cannot be met."),
        (401, "The API key is missing or wrong."),
        (403, "The server is not asked by this name."),
        (404, "There is no such model."),
        (413, "The body is too large."),
        (415, "The body is not JSON."),
        (429, "Too many requests wait."),
        (503, "Nothing can be answered now."),
        (504, "The answer was not ready in time."),
    )
}
_STREAM: dict[str, Any] = {"text/event-stream": {}}  # the document cannot say what an event is


class Service:
    """What the endpoints work with."""

    def __init__(self, thread: EngineThread, metrics: Metrics, moderation: Moderation, limits: LimitsConfig) -> None:
        """`limits` may be set anew."""
        self.thread, self.metrics, self.moderation, self.limits = thread, metrics, moderation, limits
        self.backend: Backend | None = None  # set once it is loaded
        self.created = int(time.time())
        self.fingerprint = f"edge_runtime-{__version__}"

    def opened(self, model: str | None) -> Backend:
        """Raises ApiError 503 while the model is being loaded, 404 for a name that is not its."""
        backend = self.backend
        if backend is None:
            raise ApiError(503, "the model is being loaded", retry_after_s=5)
        if model is not None and model != backend.plan.name:
            text = f"there is no model {model[:80]!r}; this server has {backend.plan.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return backend

    @property
    def models(self) -> list[dict[str, Any]]:
        names = [] if self.backend is None else [self.backend.plan.name]
        card = {"object": "model", "created": self.created, "owned_by": "edge_runtime"}
        return [{"id": name, **card} for name in [*names, self.moderation.pack.name]]


def make_router(service: Service) -> APIRouter:
    """The endpoints of `service`."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_class=Response,
        responses={200: {"model": ChatReply, "content": _STREAM, "description": "The answer."}, **_ERRORS},
    )
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _reply(service, body, wanted_chat, "chatcmpl")

    @router.post(
        "/v1/completions",
        response_class=Response,
        responses={200: {"model": TextReply, "content": _STREAM, "description": "The text."}, **_ERRORS},
    )
    async def completions(body: CompletionRequest) -> Response:
        """Continue a text."""
        return await _reply(service, body, wanted_completion, "cmpl")

    @router.post("/v1/moderations", response_class=Response, responses={200: {"model": ModerationReply}, **_ERRORS})
    async def moderations(body: ModerationRequest) -> Response:
        """Say whether texts insult, demean or attack somebody."""
        refuse_unknown(body.model_extra)
        service.moderation.check_model(body.model)
        for text in body.texts:
            utf8(text, "input")
        return _json(await service.moderation.judge(body.texts, service.limits.deadline_s))

    @router.get("/v1/models", response_class=Response, responses={200: {"model": ModelList}, **_ERRORS})
    async def models() -> Response:
        """List what can be asked for."""
        return _json({"object": "list", "data": service.models})

    @router.get("/v1/models/{name:path}", response_class=Response, responses={200: {"model": ModelCard}, **_ERRORS})
    async def model(name: str) -> Response:
        """Look a model up."""
        found = next((card for card in service.models if card["id"] == name), None)
        if found is None:
            raise ApiError(404, f"there is no model {name[:80]!r}", param="model", code="model_not_found")
        return _json(found)

    @router.get("/health", response_class=Response, responses={200: {"model": HealthReply}, **_ERRORS})
    async def health() -> Response:
        """Whether the process lives."""
        return _json({"status": "ok"})

    @router.get("/ready", response_class=Response, responses={200: {"model": HealthReply}, **_ERRORS})
    async def ready() -> Response:
        """Whether the model is loaded, and requests get on."""
        if service.backend is None or not service.thread.ready:
            raise ApiError(503, "the server is not ready", retry_after_s=5)
        return _json({"status": "ready"})

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
    async def metrics() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return router


async def _reply(
    service: Service, body: Any, wanted_of: Callable[[Any, Backend, LimitsConfig], Wanted], prefix: str
) -> Response:
    refuse_unknown(body.model_extra)
    backend = service.opened(body.model)
    # a long text takes a while, and others want to be heard meanwhile
    wanted = await asyncio.to_thread(wanted_of, body, backend, service.limits)
    style = Style(
        f"{prefix}-{secrets.token_hex(12)}",
        int(time.time()),
        backend.plan.name,
        service.fingerprint,
        chat=prefix == "chatcmpl",
        stream=bool(body.stream),
        include_usage=_wants_usage(body),
    )
    answer = Answer(wanted, backend.vocabulary)
    return Reply(answer, style, service.thread.submit, service.thread.cancel, service.limits.deadline_s)


def _wants_usage(body: Sampled) -> bool:
    return bool(body.stream and body.stream_options is not None and body.stream_options.include_usage)


def _json(record: Any) -> Response:
    return Response(json.dumps(record), media_type="application/json")


async def refused(_request: Request, error: Exception) -> Response:
    """An ApiError as a reply."""
    assert isinstance(error, ApiError)
    return error.response()
