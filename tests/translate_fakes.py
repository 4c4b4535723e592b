"""Answers without a model: every word of the text in capitals, or what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_runtime.apps import Answer, Ending
from edge_runtime.templates import Message

Reply = Callable[[str], str]


def capitals(question: str) -> str:
    """Translates: the last paragraph of the question in capitals, tags as they are."""
    return sentence_of(question).upper().replace("<I>", "<i>").replace("</I>", "</i>")


def sentence_of(question: str) -> str:
    return question.rsplit("\n\n", 1)[1]


class FakeAnswers:
    """Replies word by word; each takes `s_per_word` on its own clock."""

    def __init__(self, reply: Reply = capitals, s_per_word: float = 0.0, identity: str = "fake") -> None:
        self.reply, self.s_per_word, self.identity = reply, s_per_word, identity
        self.questions: list[str] = []
        self.limits: list[int] = []
        self.n_closed = 0
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def count(self, text: str) -> int:
        return len(text.split())

    def has_control_tokens(self, text: str) -> bool:
        return "<|end|>" in text

    def answer(
        self, messages: Sequence[Message], max_tokens: int, deadline: float | None, enough: Callable[[str], bool]
    ) -> Answer:
        (message,) = messages
        self.questions.append(message.content)
        self.limits.append(max_tokens)
        text, n = "", 0
        for word in self.reply(message.content).split(" "):
            text += (" " if n else "") + word
            n += 1
            self._now += self.s_per_word
            if n >= max_tokens:
                return Answer(text, n, Ending.MAX_TOKENS)
            if enough(text):
                break
            if deadline is not None and self._now >= deadline:
                return Answer(text, n, Ending.DEADLINE)
        return Answer(text, n, Ending.COMPLETE)

    def close(self) -> None:
        self.n_closed += 1
