"""Subtitles in SubRip's format (.srt): cues → what is to be translated, numbers, times and tags apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .segments import Line, Unit, has_words, passed_through, split_lines

_TIME = r"\d{1,3}:\d\d:\d\d(?:[,.]\d{1,3})?"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_NUMBER = re.compile(r"[\ufeff\s]*\d+\s*")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|\{\\[^{}]*\}")
_BEFORE = re.compile(rf"(?:\s|{_TAG.pattern})*")
_PLACES = re.compile(r"(?:\s|\{\\[^{}]*\})*")
# a tag that ends with a line and begins again with the next
_RESUMED = re.compile(r"</(?P<name>\w+)>\s*<(?P=name)>")
_SPEAKER = re.compile(r"[-–—‐]")


def tags(text: str) -> list[str]:
    """The tags in a text, sorted."""
    return sorted(_TAG.findall(text))


def without_tags(text: str) -> str:
    return " ".join(_TAG.sub("", text).split())


def srt_units(text: str) -> Iterator[Unit]:
    """The cues, and what is between them. What is no cue gives a unit with its problem, and stays as it is."""
    block: list[tuple[str, str]] = []
    start = 1
    for number, line in enumerate(split_lines(text), 1):
        if line[0].strip("\ufeff \t"):
            if not block:
                start = number
            block.append(line)
            continue
        if block:
            yield _cue(block, start)
            block = []
        yield passed_through("".join(line), number)
    if block:
        yield _cue(block, start)


def _cue(lines: Sequence[tuple[str, str]], number: int) -> Unit:
    source = "".join(text + end for text, end in lines)
    problem = _problem(lines)
    if problem:
        return passed_through(source, number, f"{problem}; it is left as it is")
    head = "".join(text + end for text, end in lines[:2])
    rows = lines[2:]
    if not rows:
        return passed_through(source, number)
    end, last_end = rows[0][1], rows[-1][1]
    texts = [text for text, _ in rows]
    # each line of a dialogue is a speaker's own
    spoken = len(texts) > 1 and all(_SPEAKER.match(_TAG.sub("", text).lstrip()) for text in texts)
    groups = [_Words([text]) for text in texts] if spoken else [_Words(texts)]
    wanted = [group for group in groups if group.wanted]

    def lay_out(bodies: Sequence[str]) -> str:
        translated = iter(bodies)
        shown = [row for group in groups for row in group.rows(next(translated) if group.wanted else None)]
        return head + end.join(shown) + last_end

    return Unit(source, number, tuple(group.body for group in wanted), lay_out, tagged=True)


def _problem(lines: Sequence[tuple[str, str]]) -> str | None:
    if not _NUMBER.fullmatch(lines[0][0]):
        return "a cue has no number" if _TIMES.fullmatch(lines[0][0]) else "this is no cue"
    if len(lines) < 2 or not _TIMES.fullmatch(lines[1][0]):
        return "a cue has no times as in 00:00:01,000 --> 00:00:02,500"
    return None


class _Words:
    """One speaker's lines in a cue, as one text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        joined = _RESUMED.sub(" ", " ".join(text.strip() for text in texts)) if len(texts) > 1 else texts[0]
        self._lead, body, self._tail = _within_tags(joined)
        if _TAG.search(body):  # then the outer tags may belong to parts, and only {\an8} and the like stand for all
            places = _PLACES.match(joined)
            self._lead, self._tail = places.group() if places else "", ""
            body = joined[len(self._lead) :]
        line = Line.of(body)
        self._lead, self.body, self._tail = self._lead + line.lead, line.body, line.tail + self._tail
        self.wanted = has_words(without_tags(self.body))

    def rows(self, translated: str | None) -> list[str]:
        """The translation on as many lines as there were, if it has the words; without one, the lines as they are."""
        if translated is None:
            return list(self._texts)
        return spread(self._lead + translated + self._tail, len(self._texts))


def _within_tags(text: str) -> tuple[str, str, str]:
    """The tags and spaces before the words, the words, and the tags and spaces behind them."""
    before = _BEFORE.match(text)
    start = before.end() if before else 0
    end = len(text.rstrip())
    for tag in reversed(list(_TAG.finditer(text, start))):
        if tag.end() != end:
            break
        end = start + len(text[start : tag.start()].rstrip())
    end = max(start, end)
    return text[:start], text[start:end], text[end:]


def spread(text: str, n: int) -> list[str]:
    """`text` on `n` lines of about the same length, cut at spaces outside of tags; on fewer if it has not so many."""
    rows = []
    while n > 1:
        inside = {i for match in _TAG.finditer(text) for i in range(match.start(), match.end())}
        spaces = [i for i, sign in enumerate(text) if sign == " " and i not in inside]
        if not spaces:
            break
        at = min(spaces, key=lambda i: abs(i - len(text) / n))
        rows.append(text[:at])
        text = text[at + 1 :]
        n -= 1
    return [*rows, text]
