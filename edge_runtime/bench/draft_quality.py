"""That verified drafts change no token, and what mode margin costs on school mathematics."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..draft import BoundaryView, DraftSource, Guess
from ..errors import UsageError
from ..exits.quality import Interval, Resamples
from ..ngram import NGrams
from ..resolve import NGRAM_CAP
from ..types import Floats, Mode, Signals
from .draft_costs import DraftRig
from .turns import Countdown

_FREE = tuple(1 + 0.001 * i for i in range(NGRAM_CAP + 1))  # batches that cost next to nothing more: many long drafts
_FORM = "{}\n\nThink step by step, and end with the answer as a number."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


# ── mode verified = mode full ───────────────────────────────────────────────────────────────────────────────────────


class RandomDrafts:
    """Drafts the text that is to come, with mistakes and ends in random places."""

    wants_logits = wants_states = False

    def __init__(
        self, text: Sequence[int], n_vocab: int, chosen: random.Random, right: float = 0.8, go_on: float = 0.9
    ) -> None:
        """`text` is the prompt and its answer, `right` the share of drafts that follow it."""
        self._text, self._n_vocab, self._random = text, n_vocab, chosen
        self._right, self._go_on = right, go_on

    def speaks_at(self, boundary: int) -> bool:
        return boundary == 0

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        pass  # it wants none

    def forget(self, length: int) -> None:
        pass

    def guess(self, view: BoundaryView) -> Guess | None:
        if self._random.random() > self._go_on:
            return None
        at = len(view.tokens)
        known = at < len(self._text) and self._random.random() < self._right
        token = self._text[at] if known else self._random.randrange(self._n_vocab)
        signals = Signals(entropy=0.0, top1=1.0, margin=1.0)
        return Guess(np.zeros(1, np.float32), signals, 0.0, np.array([token], np.int32))


@dataclass(frozen=True, slots=True)
class Flip:
    """A text of mode verified that is not mode full's."""

    prompt: int  # its number
    source: str
    cap: int
    position: int  # of the first other token in the answer


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared; flips must be none."""

    n_prompts: int
    n_tokens: int  # of mode full
    drafted: dict[str, int]  # by source
    accepted: dict[str, int]
    flips: tuple[Flip, ...]


def check_parity(
    rig: DraftRig, prompts: Sequence[Sequence[int]], max_tokens: int, say: Callable[[str], None], seed: int = 0
) -> Parity:
    """Answer each prompt in mode full, then verified with n-grams whose drafts cost nothing, and with random drafts.

    The most tokens that may wait are drawn anew for each text. Equal seed, equal drafts.
    """
    chosen = random.Random(seed)
    countdown = Countdown(len(prompts), say, every=5)
    drafted, accepted = {"ngram": 0, "random": 0}, {"ngram": 0, "random": 0}
    flips: list[Flip] = []
    n_tokens = 0
    for number, prompt in enumerate(prompts):
        full = rig.answer(Mode.FULL, prompt, max_tokens).tokens
        n_tokens += len(full)
        caps = {name: chosen.randint(1, NGRAM_CAP) for name in drafted}
        sources: dict[str, DraftSource] = {
            "ngram": NGrams(_FREE[: caps["ngram"] + 1]),
            "random": RandomDrafts([*prompt, *full], rig.model.n_vocab, chosen),
        }
        for name, source in sources.items():
            ours = rig.answer(Mode.VERIFIED, prompt, max_tokens, source=source, cap=caps[name])
            drafted[name] += ours.drafted
            accepted[name] += ours.accepted
            position = first_difference(full, ours.tokens)
            if position is not None:
                flips.append(Flip(number, name, caps[name], position))
        countdown.step()
    return Parity(len(prompts), n_tokens, drafted, accepted, tuple(flips))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two texts differ, the end of the shorter one among them; None if they are equal."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, None if len(a) == len(b) else min(len(a), len(b)))


# ── mode margin on mathematics ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MathsResult:
    """Accuracies with 95% intervals, questions drawn anew; the difference is of pairs."""

    n_questions: int
    full: Interval
    margin: Interval
    difference: Interval  # margin − full
    gained: int  # questions that mode margin alone has right, and …
    lost: int  # … mode full alone
    changed: float  # share of mode margin's tokens that full depth would have chosen otherwise
    same_texts: int
    drafted: int
    accepted: int


def measure_maths(
    rig: DraftRig, questions: Sequence[tuple[str, float]], max_tokens: int, say: Callable[[str], None]
) -> MathsResult:
    """Questions with their answers, in modes full and margin. An answer is the last number of a text (GSM8K's rule)."""
    right: dict[Mode, list[float]] = {Mode.FULL: [], Mode.MARGIN: []}
    countdown = Countdown(len(questions), say, every=5)
    same = relaxed = n_tokens = drafted = accepted = 0
    for question, expected in questions:
        prompt = rig.chat(_FORM.format(question))
        full, margin = (rig.answer(mode, prompt, max_tokens) for mode in right)
        for mode, found in ((Mode.FULL, full), (Mode.MARGIN, margin)):
            right[mode].append(float(last_number(rig.model.detokenize(found.tokens)) == expected))
        same += full.tokens == margin.tokens
        relaxed, n_tokens = relaxed + margin.relaxed, n_tokens + len(margin.tokens)
        drafted, accepted = drafted + margin.drafted, accepted + margin.accepted
        countdown.step()
    a, b = (np.asarray(right[mode], np.float64) for mode in right)
    resamples = Resamples(np.arange(len(questions), dtype=np.int32))
    return MathsResult(
        n_questions=len(questions),
        full=resamples.mean(a),
        margin=resamples.mean(b),
        difference=resamples.mean(b - a),
        gained=int((b > a).sum()),
        lost=int((a > b).sum()),
        changed=relaxed / n_tokens,
        same_texts=same,
        drafted=drafted,
        accepted=accepted,
    )


def read_questions(folder: Path, count: int, seed: int = 0) -> list[tuple[str, float]]:
    """`count` questions of GSM8K (Cobbe et al. 2021, arXiv 2110.14168), drawn at random, and their answers.

    Of test.jsonl, else of train.jsonl, either may be gzipped. Raises UsageError if the folder has neither, or too few.
    """
    files = [folder / f"{part}.jsonl{end}" for part in ("test", "train") for end in ("", ".gz")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(f"{folder} has no test.jsonl or train.jsonl of GSM8K", "give the folder that holds it")
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [json.loads(line) for line in data.decode("utf-8").splitlines() if line]
    found = [(row["question"], last_number(row["answer"].rpartition("####")[2])) for row in rows]
    answered = [(question, number) for question, number in found if number is not None]
    if count > len(answered):
        raise UsageError(f"{file} has {len(answered):,} questions, not {count:,}", "ask for fewer")
    return random.Random(seed).sample(answered, count)


def last_number(text: str) -> float | None:
    """The last number in a text; commas between its digits do not count."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
