"""What a model is asked for a translation, and what of its answer is one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..templates import Message
from .glossary import Term
from .languages import Language

VERSION = 1  # goes up when prompts change, or what is made of answers: then nothing remembered counts any more

_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "'": "'", "‘": "’", "”": "”", "「": "」"}
_ANY_QUOTE = re.compile("[\"“”„«»'‘’「」]")
# tokens of a translation at most, for each of its source's and besides
_RATIO = {True: 3, False: 8}
_BESIDES = 24


def question(
    sentence: str, source: Language, target: Language, terms: Sequence[Term] = (), *, insist: bool = False
) -> list[Message]:
    """A conversation that asks for the translation of one sentence. Its beginning is the same for all sentences."""
    parts = [f"Translate the following text from {source.name} to {target.name}. Answer with the translation only."]
    if terms:
        must = "It must contain these words, exactly as they are written here" if insist else "Use these words"
        parts.append(f"{must}:\n" + "\n".join(map(_rule, terms)))
    return [Message("user", "\n\n".join([*parts, sentence]))]


def _rule(term: Term) -> str:
    return f"- {term.term}: keep it as it is" if term.kept else f"- {term.term}: {term.wanted}"


def max_answer(n_tokens: int, target: Language) -> int:
    """Tokens that the translation of a sentence of `n_tokens` may have."""
    return _RATIO[target.latin] * n_tokens + _BESIDES


def clean(answer: str, sentence: str, source: Language, target: Language) -> str:
    """The translation in an answer: its first line, without words or quotes around it that the sentence has not."""
    text = answer.strip()
    heading = _heading(source, target)
    if not heading.match(sentence):
        while match := heading.match(text):
            text = text[match.end() :].lstrip()
    text = text.split("\n", 1)[0].strip()
    closing = _QUOTES.get(text[:1])
    inner = text[1:-1].strip()
    if closing and len(text) > 2 and text.endswith(closing) and not _ANY_QUOTE.match(sentence) and _own(inner, closing):
        return inner
    return text


def _own(inner: str, closing: str) -> bool:
    """Whether quotes stand around the whole of `inner`: there are no more of them, apostrophes inside words aside."""
    if closing in "'’":
        inner = re.sub(r"\w['’]\w", "", inner)
    return closing not in inner


def _heading(source: Language, target: Language) -> re.Pattern[str]:
    """What models write before a translation."""
    names = "|".join(re.escape(name) for name in (source.name, target.name))
    return re.compile(
        rf"[*_\s]*(?:(?:sure|certainly|of course)\b[^\n:]{{0,80}}|here(?:'s|’s| is)\b[^\n:]{{0,80}}"
        rf"|(?:the )?(?:(?:{names}) )?(?:translation|translated text)\b[^\n:]{{0,40}}|(?:{names}))[*_]*:[*_]*\s*",
        re.IGNORECASE,
    )


def is_enough(answer: str, sentence: str, source: Language, target: Language) -> bool:
    """Whether an answer that goes on already has a whole line of translation."""
    whole, newline, _ = answer.lstrip().rpartition("\n")
    return bool(newline) and bool(clean(whole, sentence, source, target))
