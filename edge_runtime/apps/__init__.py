"""Programs made of a model: the translator."""

from __future__ import annotations

from .answers import Answer, Answers, Ending
from .glossary import Glossary, Term
from .languages import LANGUAGES, Language
from .memory import TranslationMemory, default_memory
from .translator import Part, Segment, Translation, Translator

__all__ = [
    "LANGUAGES",
    "Answer",
    "Answers",
    "Ending",
    "Glossary",
    "Language",
    "Part",
    "Segment",
    "Term",
    "Translation",
    "TranslationMemory",
    "Translator",
    "default_memory",
]
