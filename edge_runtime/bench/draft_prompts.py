"""Prompts of the benchmark of drafts, written for it: four of each kind, and any number of combinations.

For "rewrite" one wording was chosen among seven, the one with which SmolLM2-135M-Instruct copies most of these texts:
it is the case that n-gram drafts are for. A model that obeys less, or a text with more to change, gains less.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..exits.prompts import builtin_requests

KINDS = ("rewrite", "summarize", "chat", "random")
PASSAGES = (
    "The town council met on Tuesday evening to discuss the plans for the new clinic. The building will stand beside "
    "the old post office and have twelve rooms for patients. Work is expected to begin in march and to last about "
    "fourteen months. The mayor said that the money for the project comes from a regional fund and from private "
    "donations. Some residents worry about the noise, while others is glad that they will no longer have to travel to "
    "the next city to see a doctor.",
    "My grandmother keeps a small garden behind her house. Every spring she plants tomatoes, beans and sunflowers "
    "along the wooden fence. In the morning she waters the beds before the sun gets to hot, and in the evening she "
    "pulls out the weeds. Last summer the tomatoes was so many that she gave baskets of them to all the neighbours. "
    "She says that a garden teaches patience, because nothing in it can be hurried.",
    "Dear Mrs. Carter, thank you for your letter of 3 May about the delayed delivery of your order. We have checked "
    "with the warehouse and found that the parcel was send to the wrong address. A new parcel has left our warehouse "
    "this morning and should reach you within three working days. We will also refund the costs of shipping. We are "
    "sorry for the trouble and hope that you will continue to order from our shop.",
    "The river begins as a small spring high in the mountains. It flows north through a narrow valley, where it is "
    "joined by two smaller streams, and then turns east across the plain. In winter the upper part of the river "
    "freeze, and children from the villages skate on it. In spring the melting snow makes the water rise quickly, and "
    "the farmers move there animals to higher ground. Many birds nest in the reeds along its banks.",
)
_REWRITE = "Repeat the following text word for word, but fix the grammar:\n\n{}"
_SUMMARISE = "Summarize this text in two sentences:\n\n{}"
_CHAT = (
    "What should I think about before I adopt a dog?",
    "Explain to a child why the sky is blue.",
    "Give me a plan for a weekend in the mountains with friends.",
    "What is the difference between weather and climate?",
)
_OTHERS = (
    "Copy this text and correct its mistakes:\n\n{}",
    "What is this text about?\n\n{}",
    "List the most important facts of this text:\n\n{}",
    "Rewrite this text in simpler words:\n\n{}",
    "Translate this text into French:\n\n{}",
)
_N_RANDOM = 64  # tokens


def texts(kind: str) -> tuple[str, ...]:
    """What the user says, of every kind but "random"."""
    if kind == "chat":
        return _CHAT
    form = {"rewrite": _REWRITE, "summarize": _SUMMARISE}[kind]
    return tuple(form.format(passage) for passage in PASSAGES)


def random_tokens(n_vocab: int, is_end: Callable[[int], bool], count: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of random tokens, without a template; equal seed, equal prompts."""
    chosen = random.Random(seed)
    usable: Sequence[int] = [token for token in range(n_vocab) if not is_end(token)]
    return [chosen.choices(usable, k=_N_RANDOM) for _ in range(count)]


def many_texts(count: int, seed: int = 0) -> list[str]:
    """`count` requests: half of them at most tasks on the passages, which are copied from, then built-in questions."""
    tasks = [form.format(passage) for form in (_REWRITE, _SUMMARISE, *_OTHERS) for passage in PASSAGES]
    tasks = tasks[: (count + 1) // 2]
    return [*tasks, *(request.text for request in builtin_requests(count - len(tasks), seed))]
