"""The stated rule by which every message is normalised before n-grams and tokens are made of it."""

from __future__ import annotations

import html
import re
import unicodedata

LINK = "http"
MENTION = "@user"

# scraped messages are escaped twice at times; more than a few rounds is an attack
_MAX_ROUNDS = 4
# html.unescape makes an int of all the digits, which Python refuses, or takes quadratic time for
_ENDLESS_REFERENCE = re.compile(r"&#(?:[0-9]{10,}|[xX][0-9a-fA-F]{10,});?")
# control characters that are no white space, soft hyphen, zero-width characters but for the joiners that emoji and
# many scripts need, direction marks, lone surrogates
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
# normalising sorts the marks on one letter in quadratic time; Unicode's stream-safe format (UAX 15) allows 30
_MAX_MARKS = 30
_MANY_MARKS = re.compile(f"[^\x00-\u02ff]{{{_MAX_MARKS + 1},}}")
_STARTS_WITH_MARK = "\u0f73\u0f75\u0f81"  # no marks themselves, but decomposed into nothing else
_SPACE = re.compile(r"\s+")
# links and names end at the first character outside ASCII: in Chinese or Japanese the sentence goes on without a blank
_LINK = re.compile(r"(?:https?://|(?<![A-Za-z0-9_])www\.(?=[A-Za-z0-9]))[!#-;=?-~]*", re.IGNORECASE)
# a name right before the @ makes it an e-mail address
_MENTION = re.compile(r"(?<![A-Za-z0-9_])@[A-Za-z0-9_]+")


def prepare(text: str) -> str:
    """`text` by the rule below; prepare(prepare(x)) == prepare(x). Takes time linear in the length of `text`.

    1. HTML entities become characters, those revealed by it too. Where four rounds do not settle it, each "&" left
       becomes a blank.
    2. `clean`.
    3. Links (http://…, https://…, www.…) become "http", mentions (@name, but no e-mail addresses) become "@user".
    """
    for _ in range(_MAX_ROUNDS):
        # what is dropped, composed or put in place can complete another entity: hence all steps in each round
        text = _prepare_plain(_unescape(text))
        if _unescape(text) == text:
            return text
    return _prepare_plain(text.replace("&", " "))


def clean(text: str) -> str:
    """`text` without control and invisible characters, in Unicode NFC, each run of white space as one blank, stripped.

    Of the invisible characters, the joiners (U+200C, U+200D) stay. Of the marks on one letter, the first 30 stay.
    """
    text = _INVISIBLE.sub("", text)
    if not text.isascii():
        text = _MANY_MARKS.sub(_limit_marks, text)
        text = unicodedata.normalize("NFC", text)
        text = _MANY_MARKS.sub(_limit_marks, text)  # decomposing may have added some
    return _SPACE.sub(" ", text).strip()


def _limit_marks(match: re.Match[str]) -> str:
    kept = []
    n_marks = 0
    for character in match[0]:
        is_mark = unicodedata.combining(character) or character in _STARTS_WITH_MARK
        n_marks = n_marks + 1 if is_mark else 0
        if n_marks <= _MAX_MARKS:
            kept.append(character)
    return "".join(kept)


def _unescape(text: str) -> str:
    return html.unescape(_ENDLESS_REFERENCE.sub("\ufffd", text)) if "&" in text else text


def _prepare_plain(text: str) -> str:
    text = _LINK.sub(_link, clean(text))
    return _MENTION.sub(_mention, text)


def _link(match: re.Match[str]) -> str:
    return LINK + _gap(match)


def _mention(match: re.Match[str]) -> str:
    return MENTION + _gap(match)


def _gap(match: re.Match[str]) -> str:
    """A blank where an accent follows, which would otherwise combine with the last letter put in place."""
    after = match.string[match.end() : match.end() + 1]
    return " " if after and unicodedata.combining(after) else ""
