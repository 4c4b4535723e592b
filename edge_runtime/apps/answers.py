"""Questions → answers: what the translator needs of a model, and how a Runtime gives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from ..cache import model_hash
from ..errors import ModelError, PromptError
from ..generate import RunOptions, Runtime
from ..models import demo_model_path
from ..summary import Finish
from ..templates import Message

Clock = Callable[[], float]


class Ending(str, Enum):
    """How the translation of a sentence ended."""

    COMPLETE = "complete"
    MAX_TOKENS = "max-tokens"  # cut: much longer than its source
    CONTEXT_FULL = "context-full"  # cut
    DEADLINE = "deadline"  # cut, or not begun, because its time was over
    EMPTY = "empty"  # the model gave nothing
    TOO_LONG = "too-long"  # with the question, it does not fit the context
    CONTROL = "control-tokens"  # the text holds what the model takes for control tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote."""

    text: str
    tokens: int
    ending: Ending


class Answers(Protocol):
    """A model that answers questions, one at a time."""

    @property
    def identity(self) -> str:
        """What decides its answers: the model, and settings that change them."""

    @property
    def clock(self) -> Clock:
        """Seconds, for deadlines."""

    def count(self, text: str) -> int:
        """Tokens of a text."""

    def has_control_tokens(self, text: str) -> bool:
        """Whether a text holds the names of special tokens, which would not be read as text."""

    def answer(
        self, messages: Sequence[Message], max_tokens: int, deadline: float | None, enough: Callable[[str], bool]
    ) -> Answer:
        """The answer, up to where `enough` holds for it or the clock has come to `deadline`."""

    def close(self) -> None: ...


class RuntimeAnswers:
    """Answers of a GGUF model. What prompts have in common stays in its KV cache."""

    def __init__(self, runtime: Runtime, clock: Clock = time.perf_counter) -> None:
        """Takes over `runtime`. Raises ModelError for a model without a chat template."""
        if runtime.template is None:
            raise ModelError(
                f"{runtime.header.path} has no chat template, so it cannot be asked to translate",
                "give an instruct model with --model",
            )
        self.runtime, self.clock = runtime, clock
        self.identity = _identity(runtime)

    def count(self, text: str) -> int:
        return len(self.runtime.model.tokenize(text, add_special=False, parse_special=False))

    def has_control_tokens(self, text: str) -> bool:
        tokenize = self.runtime.model.tokenize
        return tokenize(text, add_special=False, parse_special=True) != tokenize(
            text, add_special=False, parse_special=False
        )

    def answer(
        self, messages: Sequence[Message], max_tokens: int, deadline: float | None, enough: Callable[[str], bool]
    ) -> Answer:
        text, n = "", 0
        try:
            with closing(self.runtime.stream(self.runtime.chat_tokens(messages), max_tokens)) as chunks:
                for chunk in chunks:
                    text += chunk.text
                    n += 1
                    if chunk.finish is not None:
                        return Answer(text, n, _ending_of(chunk.finish))
                    if "\n" in chunk.text and enough(text):
                        break
                    if deadline is not None and self.clock() >= deadline:
                        return Answer(text, n, Ending.DEADLINE)
        except PromptError:
            return Answer("", 0, Ending.TOO_LONG)
        return Answer(text, n, Ending.COMPLETE)

    def close(self) -> None:
        self.runtime.close()


def _ending_of(finish: Finish) -> Ending:
    return {Finish.MAX_TOKENS: Ending.MAX_TOKENS, Finish.CONTEXT_FULL: Ending.CONTEXT_FULL}.get(finish, Ending.COMPLETE)


def _identity(runtime: Runtime) -> str:
    """The model file; in modes that change answers, how early tokens may leave, too."""
    options, sha256 = runtime.options, model_hash(Path(runtime.header.path))
    if runtime.asked.lossless and options.sampling.temperature == 0:
        return sha256
    early = (options.mode.value, options.theta, options.boundaries, options.thresholds, options.pack, options.head)
    return f"{sha256} {early} {options.signal} {options.sampling}"


def open_answers(
    options: RunOptions,
    note: Callable[[str], None] = lambda _text: None,
    say: Callable[[str], None] = lambda _text: None,
) -> RuntimeAnswers:
    """Load a model. `note` gets warnings, `say` what takes a while. Raises as Runtime and RuntimeAnswers do."""
    runtime = Runtime(options, note, say)
    try:
        demo = demo_model_path()
        if demo is not None and demo.resolve() == Path(runtime.header.path).resolve():
            note("the demo model has 135 million parameters and translates badly: give a larger one with --model")
        return RuntimeAnswers(runtime)
    except BaseException:
        runtime.close()
        raise
