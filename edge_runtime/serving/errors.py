"""What clients are told when something is wrong: OpenAI's shape of an error, whatever the cause."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..errors import EdgeError, MemoryLimitError, PromptError, UsageError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal or a failure, as the client sees it. Its text holds nothing of a prompt."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def utf8(text: str, param: str) -> bytes:
    """Raises ApiError for halves of characters, which JSON can write and UTF-8 cannot."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise bad_request("the text is not valid Unicode", param) from None


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an answer that failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptError):
        code = "context_length_exceeded" if "tokens long" in error.message else None
        return ApiError(400, error.message, code=code)
    if isinstance(error, UsageError):
        return ApiError(400, error.message)
    if isinstance(error, MemoryLimitError):
        return ApiError(503, error.message, retry_after_s=10)
    if isinstance(error, EdgeError):
        return ApiError(500, error.message)
    return ApiError(500, "the server failed in an unexpected way; its log says how")
