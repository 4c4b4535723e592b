"""Prompts for the demo model's exit pack: built-in questions, and tasks on real texts of the data folder."""

from __future__ import annotations

import gzip
import json
import random
import textwrap
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ..errors import UsageError
from ..exits.pack import ExitPack
from ..exits.prompts import Request, builtin_requests
from ..exits.report import report_lines
from ..native import Model

_SUMMARISE = (
    "Summarize this text in two sentences:\n\n{}",
    "What is this article about?\n\n{}",
    "Give the main points of the following text.\n\n{}",
    "Write a headline and a short summary.\n\n{}",
)
_REWRITE = (
    "Rewrite this text in simpler words:\n\n{}",
    "Rewrite the following text so that it sounds more formal.\n\n{}",
    "Correct any mistakes in this text:\n\n{}",
    "Say this in your own words: {}",
)
_REPORT = (
    "Write a short news report with the title: {}",
    "What could have happened here? {}",
    "Explain this headline: {}",
)
_ASK = ("Read this and answer: who is involved?\n\n{}", "Read this text. What happened, and when?\n\n{}")
_TRANSLATE = ("Translate into French: {}", "How do you say this in French? {}")

# shares of the whole
_MIX = {
    "chat": 0.32,
    "summarize": 0.17,
    "rewrite": 0.16,
    "maths": 0.14,
    "report": 0.10,
    "question": 0.06,
    "translate": 0.05,
}


# texts that requests may be made of come first, the others are only counted
_N_ASKED_NEWS, _N_ASKED_MATHS = 2500, 5000
N_DRAWN = 2560
_WIDTH = 118
N_TRAINING = 2048  # of those drawn: what the bundled pack is made from


def training_requests(data: Path) -> list[Request]:
    """The requests that the bundled pack is made from. Raises as `pack_requests` does."""
    return pack_requests(data, N_DRAWN)[:N_TRAINING]


def other_text(data: Path, model: Model) -> list[list[int]]:
    """Tokens of articles and worked answers that no request is made of: which words such text is made of.

    Raises OSError without the data folder.
    """
    shuffled = _news(data)
    random.Random(0).shuffle(shuffled)
    news = [entry["text"] for entry in shuffled[_N_ASKED_NEWS:]]
    with gzip.open(data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        maths = [json.loads(line)["answer"] for line in islice(file, _N_ASKED_MATHS, None)]
    return [model.tokenize(text, add_special=False, parse_special=False) for text in [*news, *maths]]


def card(pack: ExitPack, n_bytes: int) -> str:
    """The model card of the bundled pack."""
    report = "\n".join(f"    {line}".rstrip() for line in report_lines(pack.report))
    described = textwrap.fill(
        f"Heads behind {_layers(pack)} of {pack.model.n_layer}, {n_bytes / 2**20:.1f} MiB, for the model file with "
        f"SHA-256 {pack.model.sha256} and no other. They are trained by self-distillation: the model answered the "
        "prompts (questions on everyday topics, and tasks on English news, school mathematics and short sentences), "
        f"every second one at temperature {pack.report['text']['temperature']:g}, the others greedily, and the heads "
        "learned its distributions. The trunk is unchanged. Made by `scripts/train_exit_pack`.",
        _WIDTH,
    )
    return f"""# {pack.name}: exit heads for {pack.model.name}

{described}

What it is worth, on prompts held out as a whole; intervals are 95%, resampled by prompt:

{report}

Limits: English text of these kinds; what a certificate says holds for prompts like those it was made from. Times are of
the machine it was made on: `edge-run calibrate` measures yours. Sources of the texts: English Wikinews (CC BY 2.5),
GSM8K (MIT), Tatoeba (CC BY 2.0 FR). The model is Apache-2.0.
"""


def _layers(pack: ExitPack) -> str:
    names = " and ".join(map(str, pack.boundaries))
    return f"layers {names}" if len(pack.boundaries) > 1 else f"layer {names}"


def pack_requests(data: Path, n: int, seed: int = 0) -> list[Request]:
    """`n` requests of many kinds, shuffled; equal seed, equal requests.

    Raises OSError without the data folder, UsageError if it has too little for so many.
    """
    chosen = random.Random(seed)
    news = _news(data)
    with gzip.open(data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        maths = [json.loads(line)["question"] for line in islice(file, _N_ASKED_MATHS)]
    with gzip.open(data / "tatoeba" / "eng-fra.tsv.gz", "rt", encoding="utf-8") as file:
        english = [line.split("\t")[0] for line in islice(file, 100_000)]
    chosen.shuffle(news)
    chosen.shuffle(maths)
    chosen.shuffle(english)
    articles = iter(entry for entry in news if len(entry["text"].split()) > 60)

    def passage(words: int) -> str:
        return " ".join(next(articles)["text"].split()[:words])

    def task(templates: tuple[str, ...], text: str) -> str:
        return chosen.choice(templates).format(text)

    sources: dict[str, Callable[[int], str]] = {
        "summarize": lambda _: task(_SUMMARISE, passage(chosen.randint(60, 130))),
        "rewrite": lambda _: task(_REWRITE, passage(chosen.randint(20, 60))),
        "report": lambda _: task(_REPORT, next(articles)["title"]),
        "question": lambda _: task(_ASK, passage(chosen.randint(60, 110))),
        "maths": lambda i: maths[i],
        "translate": lambda i: task(_TRANSLATE, english[i]),
    }
    counts = {group: round(share * n) for group, share in _MIX.items()}
    del counts["chat"]
    requests = builtin_requests(n - sum(counts.values()), seed)
    try:
        for group, count in counts.items():
            requests += [Request(sources[group](i), group) for i in range(count)]
    except (StopIteration, IndexError):
        raise UsageError(f"{data} has too few texts for {n:,} requests", "ask for fewer") from None
    if len(requests) < n:
        raise UsageError(f"there are too few built-in questions for {n:,} requests", "ask for fewer")
    chosen.shuffle(requests)
    return requests


def _news(data: Path) -> list[dict[str, str]]:
    with gzip.open(data / "wikinews" / "wikinews-5000.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
