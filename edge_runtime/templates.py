"""A model's own chat template: conversation → the text that the model was trained to continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ModelError
from .native import Model


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatTemplate:
    """The Jinja template in a GGUF, run in llama-cpp-python's sandbox."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        """Raises ModelError if the template cannot be parsed."""
        # it comes with llama-cpp-python's whole Python side, which loading the library has already imported
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            self._formatter: Any = Jinja2ChatFormatter(template=source, bos_token=bos, eos_token=eos)
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            raise ModelError(f"the model's chat template is broken: {error}", "use --raw to do without it") from error

    @classmethod
    def of(cls, model: Model) -> ChatTemplate | None:
        """The model's template, None if it has none."""
        source = model.meta("tokenizer.chat_template")
        return cls(source, model.special_text("bos"), model.special_text("eos")) if source else None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant's next turn begins.

        Raises ModelError if the template refuses the conversation, as some do a system message, or fails.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._formatter(messages=turns).prompt)
        except Exception as error:
            hint = "drop --system, or use --raw" if any(m.role == "system" for m in messages) else "use --raw"
            raise ModelError(f"the model's chat template refused the conversation: {error}", hint) from error
