"""The languages that can be asked for, by code or English name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True, slots=True)
class Language:
    """A language as commands and as prompts name it."""

    code: str
    name: str
    latin: bool = True  # other scripts take models more tokens


# code, English name, then what is only known to hint at it: the code of three letters and the language's own name
_LATIN = """
af|Afrikaans|afr|
sq|Albanian|sqi|shqip
eu|Basque|eus|euskara
bs|Bosnian|bos|bosanski
pt-BR|Brazilian Portuguese||português brasileiro
ca|Catalan|cat|català
hr|Croatian|hrv|hrvatski
cs|Czech|ces|čeština
da|Danish|dan|dansk
nl|Dutch|nld|nederlands
en|English|eng|
eo|Esperanto|epo|
et|Estonian|est|eesti
fi|Finnish|fin|suomi
fr|French|fra|français
gl|Galician|glg|galego
de|German|deu|deutsch
hu|Hungarian|hun|magyar
is|Icelandic|isl|íslenska
id|Indonesian|ind|bahasa indonesia
ga|Irish|gle|gaeilge
it|Italian|ita|italiano
la|Latin|lat|latina
lv|Latvian|lav|latviešu
lt|Lithuanian|lit|lietuvių
ms|Malay|msa|bahasa melayu
mt|Maltese|mlt|malti
no|Norwegian|nor|norsk
pl|Polish|pol|polski
pt|Portuguese|por|português
ro|Romanian|ron|română
sk|Slovak|slk|slovenčina
sl|Slovenian|slv|slovenščina
es|Spanish|spa|español
sw|Swahili|swa|kiswahili
sv|Swedish|swe|svenska
tl|Tagalog|tgl|filipino
tr|Turkish|tur|türkçe
vi|Vietnamese|vie|tiếng việt
cy|Welsh|cym|cymraeg
"""
_OTHER_SCRIPTS = """
ar|Arabic|ara|العربية
be|Belarusian|bel|беларуская
bn|Bengali|ben|বাংলা
bg|Bulgarian|bul|български
zh|Chinese|zho|中文
zh-TW|Traditional Chinese||繁體中文
el|Greek|ell|ελληνικά
he|Hebrew|heb|עברית
hi|Hindi|hin|हिन्दी
ja|Japanese|jpn|日本語
ko|Korean|kor|한국어
mk|Macedonian|mkd|македонски
fa|Persian|fas|فارسی
ru|Russian|rus|русский
sr|Serbian|srp|српски
ta|Tamil|tam|தமிழ்
th|Thai|tha|ไทย
uk|Ukrainian|ukr|українська
ur|Urdu|urd|اردو
"""


def _read(table: str, *, latin: bool) -> dict[Language, tuple[str, str]]:
    rows = [line.split("|") for line in table.split("\n") if line]
    return {Language(code, name, latin): (short, own) for code, name, short, own in rows}


_HINTS = _read(_LATIN, latin=True) | _read(_OTHER_SCRIPTS, latin=False)
LANGUAGES = tuple(sorted(_HINTS, key=lambda language: language.name))


def find_language(wanted: str) -> Language:
    """The language of a code or an English name, in any case. Raises UsageError with what may have been meant."""
    asked = wanted.strip().casefold().replace("_", "-")
    for language in LANGUAGES:
        if asked in (language.code.casefold(), language.name.casefold()):
            return language
    raise UsageError(f"there is no language '{wanted}'", _hint(asked))


def _hint(asked: str) -> str:
    """What `asked` may have meant: its first part, a code of three letters, the language's own name, a mistyped one."""
    meant: dict[str, Language] = {}
    for language in LANGUAGES:
        short, own = _HINTS[language]
        meant |= dict.fromkeys(filter(None, (short, own, language.name.casefold())), language)
    codes = {language.code.casefold(): language for language in LANGUAGES}
    first = asked.split("-")[0]
    if first in codes:
        near = [codes[first]]
    elif asked in meant:
        near = [meant[asked]]
    else:
        near = [meant[name] for name in difflib.get_close_matches(asked, meant, n=2, cutoff=0.7)]
    if not near:
        return "give a code as en, de or zh, or an English name as French"
    return f"did you mean {' or '.join(dict.fromkeys(f'{one.code} ({one.name})' for one in near))}?"


def find_pair(source: str, target: str) -> tuple[Language, Language]:
    """The languages to translate from and to. Raises UsageError if one is unknown, or both are the same."""
    pair = find_language(source), find_language(target)
    if pair[0] == pair[1]:
        raise UsageError(f"the text is to be translated from {pair[0].name} to {pair[1].name}", "give two languages")
    return pair
