"""Which languages texts are in, roughly: by script, and in Latin script by the commonest words.

It is for a warning, no more: what is learned and certified on one language says nothing about others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# (first, last) of the blocks that hold a script's letters
_SCRIPTS = {
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "Greek script": ((0x370, 0x3FF),),
    "Cyrillic script": ((0x400, 0x52F),),
    "Hebrew script": ((0x590, 0x5FF),),
    "Arabic script": ((0x600, 0x6FF), (0x750, 0x77F)),
    "Devanagari script": ((0x900, 0x97F),),
    "Thai": ((0xE00, 0xE7F),),
    "Korean": ((0x1100, 0x11FF), (0xAC00, 0xD7AF)),
    "Japanese": ((0x3040, 0x30FF),),
    "Chinese": ((0x4E00, 0x9FFF),),
}
# words that are common in one language and rare in the others
_COMMON = {
    "English": "the and of to is are was what how why that with for you your from have this which write about explain",
    "French": "le les des et est une pour que qui dans où pourquoi comment avec sur vous quelle quel du au pas elle",
    "German": "der das und ist nicht ein eine einen einer von mit wie warum auf für sich dem den zu auch zwischen",
    "Spanish": "el los las y es por qué cómo cuál para con del una como más está su al son",
    "Portuguese": "o os um uma não é por como qual para com do da em mais são você ao seu",
    "Italian": "il gli di che è perché come qual per con una della del sono non più nel alla",
    "Dutch": "het een van en is niet waarom hoe wat voor met op zijn aan dat ook deze bij",
    "Polish": "i w na nie jest się że jak dlaczego co z do dla przez od jako są",
}
_OF_WORD: dict[str, list[str]] = {}
for _language, _words in _COMMON.items():
    for _word in _words.split():
        _OF_WORD.setdefault(_word, []).append(_language)
_SOME_SHARE = 0.05  # of letters, for a script to be that of a text


def language_shares(texts: Iterable[str]) -> dict[str, float]:
    """Share of texts in each language or script, the largest first; texts too short to tell are left out."""
    counts = Counter(language for text in texts if (language := _language_of(text)) is not None)
    total = sum(counts.values())
    return {language: count / total for language, count in counts.most_common()}


def _language_of(text: str) -> str | None:
    scripts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        code = ord(character)
        for script, blocks in _SCRIPTS.items():
            if any(first <= code <= last for first, last in blocks):
                scripts[script] += count
    if not scripts:
        return None
    # Japanese is written with Chinese characters between its own
    if scripts["Japanese"] > _SOME_SHARE * scripts.total():
        return "Japanese"
    script = scripts.most_common(1)[0][0]
    if script != "Latin":
        return script
    votes: Counter[str] = Counter()
    for word in re.findall(r"\w+", text.lower()):
        for language in _OF_WORD.get(word, ()):
            votes[language] += 1
    (best, n), *others = [*votes.most_common(2), ("", 0)]
    return best if n > (others[0][1] if others else 0) else None
