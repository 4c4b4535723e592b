"""Tokens' bytes → text: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from .errors import PromptError

Item = TypeVar("Item")


def decode_prompt(data: bytes, source: str) -> str:
    """The text of `data`, without a byte order mark and one newline at its end.

    Raises PromptError, naming `source` and the place, if it is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}",
            "convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def check_text(text: str, source: str) -> str:
    """`text` itself. Raises PromptError for bytes that the shell could not decode; they arrive as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        hint = "check the terminal's encoding"
        raise PromptError(f"{source} is not valid UTF-8 at character {error.start}", hint) from None
    return text


class Assembler(Generic[Item]):
    """Turns the bytes of tokens into text, piece by piece, each with the caller's `item` for that token.

    A character spread over several tokens comes whole, with the last of them. What may be the start of a stop string
    is held back until it is known. An unfinished character at the very end is dropped.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string was found; all after it is gone
        self._stop = tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: deque[tuple[Item, str]] = deque()

    def push(self, item: Item, piece: bytes) -> list[tuple[Item, str]]:
        """Take a token's bytes; give the tokens whose text is now certain, in order."""
        self._held.append((item, self._decoder.decode(piece)))
        text = "".join(part for _, part in self._held)
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            self._cut(min(found))
            return self.rest()
        return self._release(len(text) - self._undecided(text))

    def rest(self) -> list[tuple[Item, str]]:
        """All that is still held back."""
        released = list(self._held)
        self._held.clear()
        return released

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        ends = (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop))
        return next(ends, 0)

    def _release(self, certain: int) -> list[tuple[Item, str]]:
        released = []
        while self._held and len(self._held[0][1]) <= certain:
            released.append(self._held.popleft())
            certain -= len(released[-1][1])
        return released

    def _cut(self, length: int) -> None:
        """Keep the first `length` characters; the tokens stay, with less text or none."""
        for _ in range(len(self._held)):
            item, part = self._held.popleft()
            self._held.append((item, part[:length]))
            length -= min(length, len(part))
