"""From what a client sent to what the engine is asked: defaults, limits, and refusals that name the field."""

from __future__ import annotations

import secrets
from typing import Any

from ..config import LimitsConfig
from ..errors import EdgeError, UsageError
from ..native.guided import Guidance, check_grammar
from ..templates import Message
from ..types import SamplingSettings
from .answers import Wanted
from .backend import Backend
from .errors import ApiError, bad_request
from .json_grammar import JSON_OBJECT, SchemaError, grammar_of
from .sampling import GuidedSampler
from .wire import IGNORED, NEUTRAL, ChatRequest, CompletionRequest, ResponseFormat, Sampled

_SEEDS = 2**32 - 1  # the largest of 32 bits stands for "another each time"
_COMPLETION_TOKENS = 16  # OpenAI's default


def refuse_unknown(extra: dict[str, Any] | None) -> None:
    """Raises ApiError for a field that is not supported and asks for something, or is no field at all."""
    for name, value in (extra or {}).items():
        if name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            raise bad_request(f"unknown field {name[:80]!r}", name[:80], "unknown_parameter")
        if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
            raise bad_request(f"{name} is not supported", name, "unsupported_parameter")


def wanted_chat(body: ChatRequest, backend: Backend, limits: LimitsConfig) -> Wanted:
    """What a conversation asks for; takes as long as tokenizing it does. Raises ApiError."""
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = _checked_max(getattr(body, name), limits.max_tokens, name, limits)
    roles = {"developer": "system"}
    messages = [Message(roles.get(m.role, m.role), m.text) for m in body.messages]  # type: ignore[arg-type]
    return _wanted(body, backend.chat_tokens(messages), max_tokens, backend)


def wanted_completion(body: CompletionRequest, backend: Backend, limits: LimitsConfig) -> Wanted:
    """What a text to be continued asks for. Raises ApiError."""
    max_tokens = _checked_max(body.max_tokens, min(_COMPLETION_TOKENS, limits.max_tokens), "max_tokens", limits)
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise bad_request("one prompt at a time is supported", "prompt")
        prompt = prompt[0]
    tokens = backend.text_tokens(prompt) if isinstance(prompt, str) else backend.check_tokens(prompt, "prompt")
    return _wanted(body, tokens, max_tokens, backend)


def _checked_max(given: int | None, default: int, name: str, limits: LimitsConfig) -> int:
    if given is None:
        return default
    if given > limits.max_tokens:
        raise bad_request(f"{name} is {given}, and this server allows {limits.max_tokens}", name)
    return given


def _wanted(body: Sampled, tokens: list[int], max_tokens: int, backend: Backend) -> Wanted:
    settings = _settings(body)
    guidance = Guidance(
        _grammar(body.response_format, backend),
        body.frequency_penalty or 0.0,
        body.presence_penalty or 0.0,
        _bias(body.logit_bias or {}, backend.model.n_vocab),
    )
    make = None
    if guidance != Guidance():
        make = lambda: GuidedSampler(settings, guidance, backend.model, max_tokens)  # noqa: E731
    return Wanted(tuple(tokens), max_tokens, settings, body.stops, backend.drafts, make)


def _settings(body: Sampled) -> SamplingSettings:
    """OpenAI's defaults for what is OpenAI's, this project's for the rest."""
    given: dict[str, Any] = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "seed": secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS,
    }
    own = {name: getattr(body, name) for name in ("top_k", "min_p", "repeat_penalty")}
    try:
        return SamplingSettings(**given, **{name: value for name, value in own.items() if value is not None})
    except UsageError as error:
        raise ApiError(400, error.message) from None


def _bias(given: dict[str, float], n_vocab: int) -> tuple[tuple[int, float], ...]:
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < n_vocab):
            raise bad_request(f"{name[:40]!r} is no token of this model", "logit_bias")
    return tuple((int(name), value) for name, value in given.items())


def _grammar(wanted: ResponseFormat | None, backend: Backend) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return JSON_OBJECT
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request("a schema is missing", "response_format.json_schema.schema")
    try:
        grammar = grammar_of(wanted.json_schema.schema_, strict=bool(wanted.json_schema.strict))
        check_grammar(grammar, backend.model)
    except (SchemaError, UnicodeEncodeError, RecursionError) as error:
        text = str(error) if isinstance(error, SchemaError) else "the schema cannot be read"
        raise bad_request(text, "response_format.json_schema.schema") from None
    except EdgeError as error:
        raise bad_request(error.message, "response_format.json_schema.schema") from None
    return grammar
