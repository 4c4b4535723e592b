"""One request on both sides of the border: the engine's thread writes its text, an event loop reads it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..batching import Question, Request
from ..sampling import Sampler
from ..summary import Finish
from ..text import Assembler
from ..types import SamplingSettings


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of the model."""

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...] = ()
    drafts: bool = True
    sampler: Callable[[], Sampler] | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What turns tokens into text."""

    is_end: Callable[[int], bool]
    piece: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class End:
    """How an answer came to its end: `error` if it failed."""

    finish: Finish
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Text that is certain, and the end if it is the last."""

    text: str
    end: End | None = None


class Answer:
    """An answer that is being given. Made, read and given up by one event loop."""

    def __init__(self, wanted: Wanted, vocabulary: Vocabulary) -> None:
        self.wanted = wanted
        self.request: Request | None = None  # the engine's handle, once its thread has taken the request in
        self._vocabulary = vocabulary
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._text: list[str] = []  # certain, and not yet read
        self._end: End | None = None
        self._assembler = Assembler[None](wanted.stop)
        self._ready: list[str] = []  # certain since the last `publish`

    # ── the engine's thread ─────────────────────────────────────────────────────────────────────────────────────────

    def question(self) -> Question:
        """The request as the engine wants it."""
        wanted = self.wanted
        return Question(
            wanted.tokens,
            wanted.max_tokens,
            wanted.sampling,
            self._vocabulary.is_end,
            self._stops,
            wanted.drafts,
            wanted.sampler,
            exits=wanted.sampler is None,  # a grammar may want what no head has heard of
        )

    def _stops(self, token: int) -> bool:
        self._ready += [text for _, text in self._assembler.push(None, self._vocabulary.piece(token))]
        return self._assembler.stopped

    def publish(self, end: End | None = None) -> None:
        """Hand over what has become certain."""
        if end is not None:
            self._ready += [text for _, text in self._assembler.rest()]
        text, self._ready = "".join(self._ready), []
        if text or end is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._take, text, end)

    # ── the event loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, text: str, end: End | None) -> None:
        if text:
            self._text.append(text)
        self._end = end or self._end
        self._news.set()

    async def next(self) -> Part:
        """All the text there is that was not read before, as soon as there is some, or the end.

        A slow reader gets larger parts; what waits for it is never more than the answer.
        """
        await self._news.wait()
        self._news.clear()
        text, self._text = "".join(self._text), []
        return Part(text, self._end)


def counts(answer: Answer) -> tuple[int, int, int]:
    """Tokens of the prompt, of the answer so far, and those of the prompt that needed no computing."""
    request = answer.request
    if request is None:
        return len(answer.wanted.tokens), 0, 0
    stats = request.stats
    return stats.prompt_tokens, stats.generated_tokens, stats.reused_tokens


def join(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)
