"""Plain text → what is to be translated, and how it is laid out again: lines, paragraphs, sentences."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LONGEST = 400  # characters that a model is given at once

_LINE_END = re.compile(r"(\r\n|\n|\r)")
# indentation, and what marks a list, a heading or a quotation
_LEAD = re.compile(r"[\ufeff\s]*(?:(?:[-*+•–—▪◦‣·]|>+|#{1,6}|\[[ xX]\]|\(?\d{1,3}[.)]|\(?[a-z]\))\s+)*")
_OPENERS = "\"'“‘«»„‚([{¿¡–—- \u00a0\u202f"
_SENTENCE_END = re.compile(
    r"(?<![.!?…؟।])[.!?…؟।]+(?:[\"'”’“)\]}]|[ \u00a0\u202f]?»)*(?P<gap>\s+)"
    r"|(?<![。！？])[。！？]+[”」』）]*(?P<none>\s*)"
)
_CLAUSE_END = re.compile(r"[;:,，、；](?:\s+|(?<=[，、；]))")
# words whose full stop ends no sentence; those of one letter are none, either
_ABBREVIATIONS = """
abb abs apr aug av bd betr bspw bzw ca capt cf col dec dept dr dt env etc evtl feb fig fr gen ggf gov hon hr inc inkl
jan jr jul jun lt ltd max min mio mme mlle mr mrs ms mt nov nr oct okt pp prof rev sen sept sgt sog sr st str tel usw
vgl vol vs a.m d.h e.g i.e p.m u.a u.s z.b
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a text that is translated and written as a whole."""

    source: str  # all of it, with its layout
    line: int  # where it begins, from 1
    bodies: tuple[str, ...]  # what is to be translated, without layout
    lay_out: Callable[[Sequence[str]], str]  # the bodies' translations → what takes the place of `source`
    tagged: bool = False  # bodies may hold tags, which translations should hold, too
    problem: str | None = None  # why it is passed through as it is


def passed_through(source: str, line: int, problem: str | None = None) -> Unit:
    """A unit that stays as it is."""
    return Unit(source, line, (), lambda _: source, problem=problem)


def has_words(text: str) -> bool:
    """Whether there is something to translate: letters, and not of an address alone."""
    return any(sign.isalpha() for sign in text) and not _is_address(text)


def _is_address(text: str) -> bool:
    """Whether a text is one address, of the web or of mail."""
    if len(text.split(maxsplit=1)) != 1:
        return False
    name, _, host = text.rpartition("@")
    return text.startswith(("http://", "https://", "www.")) or bool(name and "." in host[1:-1])


# ── lines and paragraphs ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Line:
    """A line's text, and what lays it out before and behind."""

    lead: str
    body: str
    tail: str  # spaces and the line's end

    @classmethod
    def of(cls, text: str, end: str = "") -> Line:
        match = _LEAD.match(text)
        lead = match.group() if match else ""
        body = text[len(lead) :].rstrip()
        return cls(lead, body, text[len(lead) + len(body) :] + end)

    @property
    def text(self) -> str:
        return self.lead + self.body + self.tail

    def unit(self, number: int) -> Unit:
        if not has_words(self.body):
            return passed_through(self.text, number)
        return Unit(self.text, number, (self.body,), lambda bodies: self.lead + bodies[0] + self.tail)


def split_lines(text: str) -> list[tuple[str, str]]:
    """Lines of a text, each with its end: \\n, \\r\\n, \\r, or "" of the last."""
    parts = _LINE_END.split(text)
    lines = list(zip(parts[::2], [*parts[1::2], ""], strict=True))
    return lines[:-1] if lines[-1] == ("", "") else lines


def text_units(text: str, *, wrapped: bool = False) -> Iterator[Unit]:
    """A text's lines; with `wrapped`, the lines of a paragraph are one unit and are filled anew."""
    lines = [Line.of(*line) for line in split_lines(text)]
    if not wrapped:
        yield from (line.unit(number) for number, line in enumerate(lines, 1))
        return
    start = 0
    while start < len(lines):
        end = start + 1
        while lines[start].body and end < len(lines) and _goes_on(lines[end]):
            end += 1
        yield _paragraph(lines[start:end], start + 1)
        start = end


def _goes_on(line: Line) -> bool:
    """Whether a line belongs to the paragraph of the line before."""
    return bool(line.body) and not line.lead.strip()


def _paragraph(lines: Sequence[Line], number: int) -> Unit:
    if len(lines) == 1:
        return lines[0].unit(number)
    first, last = lines[0], lines[-1]
    source = "".join(line.text for line in lines)
    body = " ".join(line.body for line in lines)
    if not has_words(body):
        return passed_through(source, number)
    width = max(len(line.lead) + len(line.body) for line in lines)
    end = first.tail[len(first.tail.rstrip("\r\n")) :]

    def fill(bodies: Sequence[str]) -> str:
        rows = textwrap.wrap(
            bodies[0],
            width,
            initial_indent=first.lead,
            subsequent_indent=lines[1].lead,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return end.join(rows) + last.tail

    return Unit(source, number, (body,), fill)


# ── sentences ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sentences(text: str) -> list[tuple[str, str]]:
    """The sentences of a line, each with the space behind it, of LONGEST characters at most. Joined, they are `text`.

    In doubt, as behind an abbreviation or a number, two stay together.
    """
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if match.end() == len(text) or _ends_sentence(text, match):
            gap = match.group("gap") or match.group("none") or ""
            found += _parts(text[start : match.end() - len(gap)], gap)
            start = match.end()
    return found + (_parts(text[start:], "") if start < len(text) else [])


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if match.group("gap") is None:
        return True
    ahead = text[match.end() : match.end() + 8].lstrip(_OPENERS)
    if ahead[:1].islower():
        return False
    if match.group().rstrip("\"'”’“»)]} \u00a0\u202f" + match.group("gap")) != ".":
        return True
    word = re.split(r"[\s(\[\"'“„«]", text[max(0, match.start() - 24) : match.start()])[-1].casefold()
    return len(word) > 1 and not word.isdigit() and word not in _ABBREVIATIONS.split()


def _parts(sentence: str, gap: str) -> list[tuple[str, str]]:
    """A sentence, cut at clauses or else between words where it is too long."""
    parts, start = [], 0
    while len(sentence) - start > LONGEST:
        last = start + LONGEST
        ends = [match.end() for match in _CLAUSE_END.finditer(sentence, start + LONGEST // 2, last)]
        space = sentence.rfind(" ", start + 1, last)
        at = ends[-1] if ends else space + 1 if space > 0 else last
        whole = sentence[start:at]
        part = whole.rstrip()
        parts.append((part, whole[len(part) :]))
        start = at
    return [*parts, (sentence[start:], gap)]
