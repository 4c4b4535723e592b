"""Translates texts with a model on this machine: sentences, documents, subtitles, and lines as they are spoken.

with Translator("en", "fr", model="./model.gguf", glossary=Path("terms.tsv")) as translator:
    print(translator.translate("The engine is warm.").target)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..generate import RunOptions
from ..models import DEMO_MODEL
from ..text import check_text
from .answers import Answer, Answers, Ending, open_answers
from .glossary import Glossary, Term, violations
from .languages import find_pair
from .memory import Remembered, TranslationMemory, key_of
from .prompt import VERSION, clean, is_enough, max_answer, question
from .segments import Line, Unit, has_words, sentences, split_lines, text_units
from .srt import srt_units, tags, without_tags

CUT_MARK = " …"
# these endings come again when the same is asked again
_REPEATABLE = (Ending.COMPLETE, Ending.MAX_TOKENS, Ending.EMPTY)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sentence and its translation."""

    source: str
    target: str  # the source itself where there is no translation
    ending: Ending
    from_memory: bool
    retried: bool  # asked a second time, because of the glossary
    violations: tuple[Term, ...]  # terms whose translation is not in `target`
    tokens: int  # generated for it
    ms: float

    @property
    def problem(self) -> str | None:
        """What is wrong with it, in words."""
        words = {
            Ending.MAX_TOKENS: "the translation ran on and was cut",
            Ending.CONTEXT_FULL: "the translation was cut because the context is full",
            Ending.EMPTY: "the model gave no translation; the source stands in its place",
            Ending.TOO_LONG: "it is too long for the context; the source stands in its place",
            Ending.CONTROL: "it holds the name of a control token of the model; the source stands in its place",
        }
        parts = [words[self.ending]] if self.ending in words else []
        if self.violations and self.ending is not Ending.DEADLINE:
            missing = ", ".join(
                f"'{term.term}' as it is" if term.kept else f"'{term.wanted}' for '{term.term}'"
                for term in self.violations
            )
            parts.append(f"the translation lacks what the glossary wants: {missing}")
        return "; ".join(parts) or None


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a text that is done: a line, a paragraph or a cue, with its layout."""

    source: str
    target: str
    line: int  # where it begins in the text, from 1
    segments: tuple[Segment, ...] = ()
    missed: bool = False  # its time was over before it was done
    problem: str | None = None  # of the piece as a whole

    @property
    def problems(self) -> list[str]:
        found = [self.problem, *(segment.problem for segment in self.segments)]
        if self.missed:
            cut = any(segment.ending is Ending.DEADLINE for segment in self.segments)
            none = "there was no time; the source stands in its place"
            found.append(
                "late" if not cut else none if self.target == self.source else "cut, because its time was over"
            )
        return [text for text in found if text]


@dataclass(frozen=True, slots=True)
class Translation:
    """A whole text and its translation."""

    source: str
    target: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Translation:
        parts = tuple(parts)
        return cls("".join(part.source for part in parts), "".join(part.target for part in parts), parts)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(segment for part in self.parts for segment in part.segments)

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, with the lines of the source."""
        return [f"line {part.line}: {text}" for part in self.parts for text in part.problems]


class Translator:
    """Translates from one language to another, greedily, one sentence at a time. Not thread-safe."""

    def __init__(
        self,
        source: str,
        target: str,
        model: str | RunOptions | Answers = DEMO_MODEL,
        glossary: Glossary | Path | None = None,
        memory: TranslationMemory | Path | None = None,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Languages by code or name; `model` by name or path, in mode verified, or what answers; `note` gets warnings.

        What comes open, answers or a memory, is not closed. Raises UsageError for languages or a glossary that cannot
        be meant, and as Runtime does.
        """
        self.source, self.target = find_pair(source, target)
        self.glossary = Glossary.load(glossary) if isinstance(glossary, Path) else glossary or Glossary()
        self._closing: list[Answers | TranslationMemory] = []
        if isinstance(model, str):
            model = RunOptions(model=model)
        if isinstance(model, RunOptions):
            model = open_answers(model, note)
            self._closing.append(model)
        if isinstance(memory, Path):
            memory = TranslationMemory(memory, note)
            self._closing.append(memory)
        self._answers, self._memory = model, memory

    def translate(self, text: str) -> Translation:
        """A text's translation: its lines stay lines, and keep their layout. Raises DecodeError if llama.cpp fails."""
        return self.translate_document(text)

    def translate_document(self, text: str, *, wrapped: bool = False) -> Translation:
        """The same; with `wrapped`, the lines of a paragraph are translated together and filled to the same width."""
        return Translation.of(self.document_parts(text, wrapped=wrapped))

    def translate_srt(self, text: str) -> Translation:
        """Subtitles' translation: numbers, times and tags stay."""
        return Translation.of(self.srt_parts(text))

    def document_parts(self, text: str, *, wrapped: bool = False) -> Iterator[Part]:
        """A text's lines or paragraphs, one after the other as they are done."""
        units = text_units(check_text(text, "the text"), wrapped=wrapped)
        return (self._translate(unit) for unit in units)

    def srt_parts(self, text: str) -> Iterator[Part]:
        """A file's cues, and what is between them, one after the other as they are done."""
        return (self._translate(unit) for unit in srt_units(check_text(text, "the text")))

    def stream(self, lines: Iterable[str], latency_ms: float | None = None) -> Iterator[Part]:
        """Lines, each translated when it comes. After `latency_ms` what there is of a line is cut at a word's end."""
        number = 0
        for text in lines:
            deadline = None if latency_ms is None else self._answers.clock() + latency_ms / 1e3
            for body, end in split_lines(check_text(text, "the line")) or [("", "")]:
                number += 1
                yield self._translate(Line.of(body, end).unit(number), deadline)

    def close(self) -> None:
        while self._closing:
            self._closing.pop().close()

    def __enter__(self) -> Translator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── units ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _translate(self, unit: Unit, deadline: float | None = None) -> Part:
        if not unit.bodies:
            return Part(unit.source, unit.lay_out(()), unit.line, problem=unit.problem)
        bodies, segments, problem = [], [], unit.problem
        for body in unit.bodies:
            target, found = self._translate_body(body, deadline)
            if unit.tagged and tags(target) != tags(body):
                target, again = self._translate_body(without_tags(body), deadline)
                found += again
                problem = "the tags inside the text are lost"
            bodies.append(target)
            segments += found
        target = unit.lay_out(bodies) if all(bodies) else unit.source
        missed = deadline is not None and self._answers.clock() >= deadline
        return Part(unit.source, target, unit.line, tuple(segments), missed, problem)

    def _translate_body(self, body: str, deadline: float | None) -> tuple[str, list[Segment]]:
        """The translation of a body, sentence by sentence; what there was no time for is not in it."""
        text, segments = "", []
        for sentence, gap in sentences(body):
            if not has_words(sentence):
                text += sentence + gap
                continue
            segment = self._segment(sentence, deadline)
            segments.append(segment)
            if segment.ending is Ending.DEADLINE:
                return (text + segment.target).rstrip() + CUT_MARK if text or segment.target else "", segments
            text += segment.target + gap
        return text, segments

    # ── sentences ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _segment(self, sentence: str, deadline: float | None) -> Segment:
        clock = self._answers.clock
        start = clock()
        terms = self.glossary.terms_in(sentence)
        key = self._key(sentence, terms)
        known = self._memory.get(key) if self._memory else None
        if known is not None:
            ms = (clock() - start) * 1e3
            missing = violations(terms, known.target)
            return Segment(sentence, known.target, Ending(known.ending), True, False, missing, 0, ms)
        answer = self._ask(sentence, terms, deadline)
        missing, tokens, retried = violations(terms, answer.text), answer.tokens, False
        if missing and answer.ending in _REPEATABLE:
            again = self._ask(sentence, terms, deadline, insist=True)
            tokens, retried = tokens + again.tokens, True
            if again.ending in _REPEATABLE and len(violations(terms, again.text)) < len(missing):
                answer, missing = again, violations(terms, again.text)
            complete = again.ending in _REPEATABLE
        else:
            complete = answer.ending in _REPEATABLE
        if complete and self._memory:
            self._memory.put(key, sentence, Remembered(answer.text, answer.ending.value))
        return Segment(sentence, answer.text, answer.ending, False, retried, missing, tokens, (clock() - start) * 1e3)

    def _key(self, sentence: str, terms: Sequence[Term]) -> bytes:
        pairs = [(term.term, term.wanted) for term in terms]
        return key_of([self._answers.identity, VERSION, self.source.code, self.target.code, pairs, sentence])

    def _ask(self, sentence: str, terms: Sequence[Term], deadline: float | None, *, insist: bool = False) -> Answer:
        """The translation of a sentence; the sentence itself where there is none, and "" where there is no time."""
        answers = self._answers
        if deadline is not None and answers.clock() >= deadline:
            return Answer("", 0, Ending.DEADLINE)
        messages = question(sentence, self.source, self.target, terms, insist=insist)
        if any(answers.has_control_tokens(message.content) for message in messages):
            return Answer(sentence, 0, Ending.CONTROL)
        pair = self.source, self.target
        answer = answers.answer(
            messages,
            max_answer(answers.count(sentence), self.target),
            deadline,
            lambda text: is_enough(text, sentence, *pair),
        )
        text = clean(answer.text, sentence, *pair)
        if answer.ending is Ending.DEADLINE:
            return Answer(whole_words(text), answer.tokens, answer.ending)
        if answer.ending is Ending.TOO_LONG:
            return Answer(sentence, answer.tokens, answer.ending)
        return Answer(text, answer.tokens, answer.ending) if text else Answer(sentence, answer.tokens, Ending.EMPTY)


def whole_words(text: str) -> str:
    """`text` without its last word, which may be unfinished; all of it in scripts without spaces."""
    head, space, _ = text.rpartition(" ")
    return head.rstrip() if space or text.isascii() else text
