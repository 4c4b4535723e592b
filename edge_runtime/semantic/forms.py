"""Short answers in one spelling: case, articles, punctuation and the way a number is written make no difference."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = frozenset(("a", "an", "the"))
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = {word: value for value, word in enumerate(_SMALL.split())} | {
    word: 10 * (i + 2) for i, word in enumerate(_TENS.split())
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000, "billion": 1_000_000_000}
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_NEEDLESS_ZEROS = re.compile(r"(?<=\d)(\.\d*?)0+(?!\d)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# what belongs to a number: its sign, point, stroke or percent
_IN_NUMBER = re.compile(r"(?<![\w.)])-(?=\d)|(?<=\d)[./](?=\d)|(?<=\d)%")
_WITHIN_WORDS = frozenset("'’ʼ`´.")  # don't, U.S.


def form(answer: str) -> str:
    """`answer` as it is compared: "The Twenty-One!" and "21" are the same, and "東京。" is "東京".

    Unicode NFKC and case folded; digits of any script in ASCII, English number words up to billions as digits; without
    punctuation, English articles in front of a word, and needless zeros. Letters of all scripts and symbols stay.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", answer).casefold())
    text = "".join(str(unicodedata.decimal(char)) if unicodedata.category(char) == "Nd" else char for char in text)
    text = text.replace("\N{MINUS SIGN}", "-")
    text = _GROUPED.sub(lambda found: found.group().replace(",", ""), text)
    text = _BARE_POINT.sub("0.", text)
    text = _NEEDLESS_ZEROS.sub(lambda found: found.group(1).rstrip("."), text)
    words = _without_punctuation(text).split()
    words = [word for i, word in enumerate(words) if word not in _ARTICLES or i == len(words) - 1]
    return " ".join(_numbers_as_digits(words))


def beyond(question: str, a: str, b: str) -> tuple[str, str]:
    """Two answers without the words of the question that both repeat, whole if one of them says no more; all forms."""
    repeated = set(question.split()) & set(a.split()) & set(b.split())
    left = [" ".join(word for word in answer.split() if word not in repeated) for answer in (a, b)]
    return (left[0], left[1]) if all(left) else (a, b)


def numbers(answer_form: str) -> tuple[str, ...]:
    """The numbers in a form, in order."""
    return tuple(_NUMBER.findall(answer_form))


def contradict(a: str, b: str) -> bool:
    """Whether two forms cannot mean the same, however alike they look: yes and no, or different numbers.

    Where one names all the numbers of the other and more, as a full date does a year, they may.
    """
    polarity_a, polarity_b = _polarity(a), _polarity(b)
    if polarity_a and polarity_b and polarity_a != polarity_b:
        return True
    numbers_a, numbers_b = set(numbers(a)), set(numbers(b))
    return bool(numbers_a and numbers_b) and not (numbers_a <= numbers_b or numbers_b <= numbers_a)


def _polarity(answer_form: str) -> str:
    """The form's first word if it is yes or no, else ""."""
    first = answer_form.partition(" ")[0]
    return first if first in ("yes", "no") else ""


def _without_punctuation(text: str) -> str:
    """Punctuation as spaces, or as nothing where it stands within a word."""
    kept = {found.start() for found in _IN_NUMBER.finditer(text)}
    return "".join(char if i in kept else _plain(char) for i, char in enumerate(text))


def _plain(char: str) -> str:
    category = unicodedata.category(char)
    if char in _WITHIN_WORDS or category == "Cf":
        return ""
    return " " if category[0] in "PZC" else char


def _numbers_as_digits(words: list[str]) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(words):
        value, end = _number_at(words, at)
        found.append(words[at] if value is None else str(value))
        at = end
    return found


def _number_at(words: list[str], at: int) -> tuple[int | None, int]:
    """The whole number that begins at a word, None if there is none, and where what follows begins."""
    start, total, current = at, 0, 0
    room = 1000  # a smaller number may follow: "twenty one" is one, "twenty twenty" are two
    after_scale = False
    while at < len(words):
        if after_scale and words[at] == "and" and at + 1 < len(words) and words[at + 1] in _UNITS:
            at += 1
        word = words[at]
        after_scale = word in _SCALES
        if word == "hundred":
            current, room = (current or 1) * 100, 100
        elif word in _SCALES:
            total, current = (total or 1) * _SCALES[word] if not current else total + current * _SCALES[word], 0
            room = 1000
        elif word in _UNITS and _UNITS[word] < room:
            current, room = current + _UNITS[word], 10 if _UNITS[word] >= 20 else 0
        elif at == start and word.isdecimal() and word.isascii():
            current, room = int(word), 0
        else:
            break
        at += 1
    return (None, start + 1) if at == start else (total + current, at)
