"""Our own 300 short questions with their answers, 40 of them unanswerable, and whether an answer is right."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files

from ..semantic.forms import form, numbers

_REFUSALS = (
    "unknown",
    "not known",
    "I do not know",
    "I don't know",
    "I do not have",
    "I don't have",
    "no way to know",
    "no way of knowing",
    "nobody knows",
    "no one knows",
    "cannot",
    "can not",
    "can't",
    "could not",
    "couldn't",
    "unable",
    "not able",
    "not possible",
    "impossible",
    "unanswerable",
    "not sure",
    "unclear",
    "no information",
    "not enough information",
    "unpredictable",
)
_WORD = re.compile(r"-?\d+(?:\.\d+)?|[^\W\d_]+")
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class Kind(str, Enum):
    """What a question asks for."""

    FACT = "fact"
    ARITHMETIC = "arithmetic"
    YES_NO = "yes_no"
    TRANSLATION = "translation"
    UNANSWERABLE = "unanswerable"


@dataclass(frozen=True, slots=True)
class BenchQuestion:
    """A question and all answers that are right; of an unanswerable one, refusals beside the usual ones."""

    kind: Kind
    text: str
    accepted: tuple[str, ...]


def questions() -> list[BenchQuestion]:
    """All of them, by kind."""
    text = files("edge_runtime.bench").joinpath("questions.tsv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [BenchQuestion(Kind(r["kind"]), r["question"], tuple(filter(None, r["accepted"].split("|")))) for r in rows]


def is_right(question: BenchQuestion, answer: str) -> bool:
    """Whether `answer`, a word or a sentence, is right.

    Facts and translations: an accepted answer stands in it, without "not" in front. Arithmetic: its result, see
    `result_of`, is the accepted number. Yes or no: see `yes_or_no`. Unanswerable: it is a refusal.
    """
    if question.kind is Kind.ARITHMETIC:
        return result_of(answer) in question.accepted
    if question.kind is Kind.YES_NO:
        return yes_or_no(answer) in question.accepted
    if question.kind is Kind.UNANSWERABLE:
        return any(_holds(answer, refusal) for refusal in (*_REFUSALS, *question.accepted))
    return any(_holds(answer, accepted, plainly=True) for accepted in question.accepted)


def result_of(answer: str) -> str | None:
    """The number that an answer gives: behind the last "=", "is" or "equals", else its first; None if there is none."""
    *_, behind = re.split(r"=|\bis\b|\bequals\b", answer)
    found = numbers(form(behind)) or numbers(form(answer))
    return found[0] if found else None


def yes_or_no(answer: str) -> str | None:
    """ "yes" or "no": what the answer begins with, else the only one it holds; None if it holds none or both."""
    words = _words(answer)
    found = [_YES_NO[word] for word in words if word in _YES_NO]
    return found[0] if found and (words[0] in _YES_NO or len(set(found)) == 1) else None


def _holds(answer: str, wanted: str, *, plainly: bool = False) -> bool:
    """Whether the words of `wanted` stand in `answer` one after the other; `plainly`: and never behind "not"."""
    words, sought = _words(answer), _words(wanted)
    places = [i for i in range(len(words)) if words[i : i + len(sought)] == sought]
    return bool(places) and not (plainly and any(i > 0 and words[i - 1] == "not" for i in places))


def _words(text: str) -> list[str]:
    return _WORD.findall(form(text))
