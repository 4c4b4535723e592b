"""Terms with a fixed translation: read from a file, found in sentences, looked for in translations."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError, UsageError
from ..text import decode_prompt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EXAMPLE = "a line is TERM, a tab and its translation, or TERM alone to keep it as it is"
_TOML_EXAMPLE = 'write keep = ["EdgeRun"], and below [terms] lines as "engine" = "moteur"'
# scripts without spaces between words: Thai, kana, CJK
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_VARIANTS = str.maketrans({"’": "'", "\u00a0": " ", "\u202f": " ", "\u2011": "-"})


@dataclass(frozen=True, slots=True)
class Term:
    """What the source calls something, and what the translation is to call it."""

    term: str
    wanted: str  # the same as `term` if it is kept as it is

    @property
    def kept(self) -> bool:
        return self.term == self.wanted

    def is_in(self, translation: str) -> bool:
        """Whether a translation has what is wanted, inflected at its end or not; what is kept, in the same case."""
        wanted, text = _plain(self.wanted), _plain(translation)
        return wanted in text if self.kept else wanted.casefold() in text.casefold()


class Glossary:
    """Terms, each with its place in sentences: whole words, and those without capitals in any case."""

    def __init__(self, terms: Iterable[Term] = ()) -> None:
        """Raises UsageError for a term with two translations."""
        self.terms: tuple[Term, ...] = tuple(dict.fromkeys(terms))
        seen: dict[str, Term] = {}
        for term in self.terms:
            other = seen.setdefault(_plain(term.term), term)
            if other is not term:
                raise UsageError(
                    f"the glossary translates '{term.term}' in two ways: '{other.wanted}' and '{term.wanted}'",
                    "give one of them",
                )
        # the longest first, and of those that differ in case alone the one with capitals: it is the narrower
        keys = sorted(seen, key=lambda key: (-len(key), key == key.lower()))
        self._found = [seen[key] for key in keys]
        self._pattern = re.compile("|".join(map(_pattern_of, keys))) if keys else None

    @classmethod
    def load(cls, path: Path) -> Glossary:
        """The glossary in a TSV or TOML file. Raises UsageError for what cannot be read or meant."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}", "name a TSV or TOML file") from error
        text = decode_prompt(data, str(path))
        if "\0" in text:
            raise PromptError(f"{path} is no text file", "name a TSV or TOML file")
        try:
            return cls(_toml_terms(text, path) if path.suffix.lower() == ".toml" else _tsv_terms(text, path))
        except UsageError as error:
            if str(path) in error.message:
                raise
            raise UsageError(f"{path}: {error.message}", error.hint) from None

    def terms_in(self, sentence: str) -> tuple[Term, ...]:
        """The terms that occur in a sentence, in their order there; of two at one place, the longer one."""
        if self._pattern is None:
            return ()
        matches = self._pattern.finditer(sentence.translate(_VARIANTS))
        return tuple(dict.fromkeys(self._found[(match.lastindex or 1) - 1] for match in matches))


def violations(terms: Sequence[Term], translation: str) -> tuple[Term, ...]:
    """The terms whose translation is not in `translation`."""
    return tuple(term for term in terms if not term.is_in(translation))


def _plain(text: str) -> str:
    return " ".join(text.translate(_VARIANTS).split())


def _pattern_of(key: str) -> str:
    """A group that matches a term."""
    body = r"\s+".join(map(re.escape, key.split(" ")))
    if key == key.lower():
        body = f"(?i:{body})"
    before = "" if _UNSPACED.match(key[0]) or not _is_word(key[0]) else r"(?<!\w)"
    behind = "" if _UNSPACED.match(key[-1]) or not _is_word(key[-1]) else r"(?!\w)"
    return f"({before}{body}{behind})"


def _is_word(sign: str) -> bool:
    return re.match(r"\w", sign) is not None


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tsv_terms(text: str, path: Path) -> Iterator[Term]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        cells = [cell.strip() for cell in line.rstrip("\r").split("\t")]
        if len(cells) > 2 and any(cells[2:]):
            raise UsageError(f"{path}, line {number}: there are {len(cells)} columns", _EXAMPLE)
        if not cells[0]:
            raise UsageError(f"{path}, line {number}: there is no term before the tab", _EXAMPLE)
        yield Term(cells[0], cells[1] if len(cells) > 1 and cells[1] else cells[0])


def _toml_terms(text: str, path: Path) -> Iterator[Term]:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}", _TOML_EXAMPLE) from None
    unknown = set(table) - {"keep", "terms"}
    if unknown:
        raise UsageError(f"{path}: '{min(unknown)}' means nothing here", _TOML_EXAMPLE)
    keep, terms = table.get("keep", []), table.get("terms", {})
    if not isinstance(keep, list) or not isinstance(terms, dict):
        raise UsageError(f"{path}: 'keep' is to be a list, and 'terms' a table", _TOML_EXAMPLE)
    for term, wanted in [*((term, term) for term in keep), *terms.items()]:
        yield Term(_words(term, path), _words(wanted, path))


def _words(value: Any, path: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{path}: {value!r} is no term", _TOML_EXAMPLE)
    return value.strip()
