"""An answer as a reply: whole, or as a stream of server-sent events.

Whoever goes away ends the answer: the connection is watched from the moment the answer was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..summary import Finish
from .answers import Answer, End, Part, counts, join
from .errors import ApiError, api_error

COUNTS = "edge_runtime.counts"  # in an ASGI scope: tokens of the prompt, of the answer, and reused ones
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Style:
    """How one of the two interfaces writes an answer down."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool
    stream: bool = False
    include_usage: bool = False

    def whole(self, text: str, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        if self.chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [self._choice(choice, finish)], "usage": usage}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def part(self, text: str) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text}, None)

    def last(self, finish: str) -> dict[str, Any]:
        return self._chunk({"delta": {}} if self.chat else {"text": ""}, finish)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, choice: dict[str, Any], finish: str | None) -> dict[str, Any]:
        without = {"usage": None} if self.include_usage else {}
        return {**self._head(self._chunk_kind), "choices": [self._choice(choice, finish)], **without}

    def _choice(self, choice: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **choice, "logprobs": None, "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Reply(Response):
    """Starts an answer, and sends it as it comes."""

    def __init__(
        self,
        answer: Answer,
        style: Style,
        submit: Callable[[Answer], None],
        cancel: Callable[[Answer], None],
        deadline_s: float | None,
    ) -> None:
        super().__init__()
        self._answer, self._style = answer, style
        self._submit, self._cancel, self._deadline_s = submit, cancel, deadline_s
        self._gone = False  # the client is

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, loop = self._answer, asyncio.get_running_loop()
        ended = False
        try:
            self._submit(answer)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        timer = None if self._deadline_s is None else loop.call_later(self._deadline_s, self._cancel, answer)
        watcher = asyncio.create_task(self._watch(receive))
        try:
            part = await answer.next()
            refusal = None if part.end is None else self._refusal(part.end)
            if self._gone:
                pass
            elif refusal is not None:
                await refusal.response()(scope, receive, send)
            elif self._style.stream:
                await self._stream(part, send)
            else:
                await self._whole(part, scope, receive, send)
            ended = True
        except OSError:
            pass  # the client is gone
        finally:
            watcher.cancel()
            if timer is not None:
                timer.cancel()
            if not ended:
                self._cancel(answer)
            scope[COUNTS] = counts(answer)
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel(self._answer)

    def _refusal(self, end: End) -> ApiError | None:
        """Why there is no answer, if nothing of it was sent yet."""
        if end.error is not None:
            return api_error(end.error)
        if end.finish is Finish.INTERRUPTED:
            return ApiError(504, "the answer was not ready in time", code="deadline_exceeded")
        return None

    async def _parts(self, part: Part) -> AsyncIterator[Part]:
        yield part
        while part.end is None:
            part = await self._answer.next()
            yield part

    async def _whole(self, first: Part, scope: Scope, receive: Receive, send: Send) -> None:
        parts = [part async for part in self._parts(first)]
        end = parts[-1].end
        assert end is not None
        error = self._refusal(end)
        if self._gone:
            return
        if error is not None:
            await error.response()(scope, receive, send)
        else:
            body = self._style.whole(join(parts), end.finish.reason, self._usage())
            await Response(_json(body), media_type="application/json")(scope, receive, send)

    async def _stream(self, first: Part, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        begin = self._style.first()
        if begin is not None:
            await _send_event(send, begin)
        async for part in self._parts(first):
            if part.text:
                await _send_event(send, self._style.part(part.text))
            if part.end is not None:
                await self._finish(part.end, send)

    async def _finish(self, end: End, send: Send) -> None:
        if end.error is not None:
            await _send_event(send, api_error(end.error).body)
        else:
            # what was cut off by the deadline is as good as what was cut off by its length
            reason = "length" if end.finish is Finish.INTERRUPTED else end.finish.reason
            await _send_event(send, self._style.last(reason))
            if self._style.include_usage:
                await _send_event(send, self._style.usage(self._usage()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _usage(self) -> dict[str, Any]:
        n_prompt, n_answer, n_reused = counts(self._answer)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": n_reused},
        }


def _send_event(send: Send, record: dict[str, Any]) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": b"data: " + _json(record) + b"\n\n", "more_body": True})


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
