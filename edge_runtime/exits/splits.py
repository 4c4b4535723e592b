"""Which prompts are learned from, chosen by, certified on and tested on, and how many it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..certify import messages_needed
from ..errors import UsageError
from .collect import Prompt

SPLITS = ("train", "tune", "certify", "test")
FEWEST_PROMPTS = 40  # to be answered
_SHARES = (0.70, 0.08, 0.12, 0.10)
_GOLDEN = 0.6180339887498949


def split_prompts(groups: Sequence[str], seed: int) -> list[str]:
    """The split of each prompt, by a hash of its number: the same shares of every group, as near as can be."""

    def digest(i: int) -> bytes:
        return hashlib.sha256(f"{seed} {i}".encode()).digest()

    order = sorted(range(len(groups)), key=lambda i: (groups[i], digest(i)))
    edges = np.cumsum(_SHARES)[:-1]
    found = [""] * len(groups)
    offset = int.from_bytes(digest(-1)[:4], "big") / 2**32
    for rank, i in enumerate(order):
        # neighbours in this sequence are far from each other, so that any run of it is spread over all splits
        found[i] = SPLITS[int(np.searchsorted(edges, (offset + rank * _GOLDEN) % 1, side="right"))]
    return found


def prompts_for(bound: float, delta: float, *, trained: bool = True) -> int:
    """Prompts to be answered of which enough go into the certify split to prove `bound`, if nothing goes wrong.

    Where nothing is `trained`, the prompts for it certify, too.
    """
    share = _SHARES[SPLITS.index("certify")] + (0.0 if trained else _SHARES[SPLITS.index("train")])
    return round(messages_needed(bound, delta) / share + 0.5)


def check_enough(prompts: Sequence[Prompt], delta: float, *, trained: bool = True) -> None:
    """Raise UsageError, saying how many are needed, for too few prompts to be answered."""
    n = sum(not prompt.answered for prompt in prompts)
    if n < FEWEST_PROMPTS:
        raise UsageError(
            f"{n} prompts to be answered are too few: {FEWEST_PROMPTS} are the least, and to certify exits, nothing "
            f"going wrong, {prompts_for(0.1, delta, trained=trained):,} for a disagreement of 10%, "
            f"{prompts_for(0.02, delta, trained=trained):,} for 2%",
            "give more prompts with --text, or leave out --no-builtin and --prompts",
        )
