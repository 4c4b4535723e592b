"""Prompts of the benchmark of mode auto: texts on which nothing can be saved, and texts on which something can."""

from __future__ import annotations

import random
import string

from .draft_prompts import PASSAGES, texts

HOSTILE = ("strings", "code", "long chat")  # a good answer copies nothing; a small model's repeats itself all the same
HELPFUL = ("rewrite", "summarize", "chat")
KINDS = (*HOSTILE, *HELPFUL)
_CODE = (
    "Write a Python function that merges two sorted lists without calling sort. Only code, no explanation.",
    "Write a C program that prints the prime numbers up to 100. Only code, no explanation.",
    "Write an SQL schema for a library with books, members and loans. Only SQL, no explanation.",
    "Write a shell script that renames all files of a folder to lower case. Only code, no explanation.",
)
_LONG = (
    "Which of these texts would you read to a child, and why?",
    "What do these texts have in common?",
    "Invent a fifth text that would go well with these.",
    "Which of these texts is the oldest, do you think?",
)
_N_STRINGS, _LENGTH = 12, 16


def user_texts(kind: str, seed: int = 0) -> tuple[str, ...]:
    """Four messages of a user, of one of KINDS; equal seed, equal messages."""
    if kind in HELPFUL:
        return texts(kind)
    if kind == "code":
        return _CODE
    if kind == "strings":
        return tuple(_strings(random.Random(f"{seed} {i}")) for i in range(4))
    # the passages in two orders, as a conversation that has become long
    story = "\n\n".join((*PASSAGES, *reversed(PASSAGES)))
    return tuple(f"{story}\n\n{question}" for question in _LONG)


def _strings(chosen: random.Random) -> str:
    signs = string.ascii_letters + string.digits
    lines = "\n".join("".join(chosen.choices(signs, k=_LENGTH)) for _ in range(_N_STRINGS))
    return f"{lines}\n\nGo on with this list of random strings."
