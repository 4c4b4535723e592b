"""`edge-run calibrate`: from a model, and prompts if there are any, to an exit pack."""

from __future__ import annotations

import math
import os
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from . import display
from .errors import EdgeError, PromptError, UnsupportedModelError, UsageError
from .exits.calibrate import CalibrateOptions, calibrate
from .exits.collect import Prompt
from .exits.languages import language_shares
from .exits.prompts import Request, builtin_requests, read_requests
from .exits.report import draw, report_lines
from .exits.thresholds import BOUNDS
from .exits.trainer import torch_problem
from .identity import identify
from .models import find_model
from .native import Model
from .options import parse_boundaries, start_library
from .progress import reporting
from .templates import ChatTemplate, Message

PLOT_HINT = "pip install 'edge-runtime[plot]'"
DEFAULT_PROMPTS = 1500
MAX_PROMPT_TOKENS = 512
MAX_REQUESTS = 20_000
_ANSWERED_PER_READ = 2  # texts to be read are at most a third
_ONE_LANGUAGE = 0.97
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_RIDGE_NOTE = (
    "heads are linear (ridge regression), which agree with full depth far less often than trained ones: "
    "0.38 instead of 0.65 behind layer 20 of SmolLM2-135M, and a fifth of the exits at equal risk"
)


@dataclass(frozen=True, slots=True)
class CalibrateRequest:
    """What the verb was asked for."""

    model: str
    texts: tuple[Path, ...]
    builtin: bool
    out: Path | None
    boundaries: str | None
    budget: str | None
    prompts: int | None
    max_tokens: int
    temperature: float
    head: Literal["trained", "shared"]
    trainer: Literal["torch", "ridge"] | None
    labels: Literal["soft", "hard"]
    epochs: int
    compare: bool
    pack_all: bool
    quantisation: Literal["q4_0", "q8_0"]
    shortlist: int
    max_disagreement: tuple[float, ...]
    confidence: float
    cache: Path | None
    device: Literal["cpu", "cuda"]
    png: Path | None
    seed: int
    threads: int
    json: bool
    quiet: bool
    verbose: bool


def calibrate_model(request: CalibrateRequest) -> None:
    """Make the pack and print what it is worth. All that can be refused is refused before the work."""
    path = find_model(request.model)
    out = request.out or Path(f"{path.stem}.exits.gguf")
    options, notes = _options(request)
    check_place(out, "a pack", "--out")
    if request.png is not None:
        _check_picture(request.png)
    for source in (path, *request.texts, *([request.png] if request.png else [])):
        if out.exists() and source.exists() and out.samefile(source):
            raise UsageError(f"the pack would take the place of {source}", "name another file with --out")
    requests = _requests(request)
    if request.head == "shared" and any(entry.given for entry in requests):
        notes.append("texts to be read are left out: there is no head that could learn from them")
        requests = [entry for entry in requests if not entry.given]
    notes += _language_notes(requests[: request.prompts or DEFAULT_PROMPTS])
    start_library(verbose=request.verbose)
    identity = identify(path)
    tell = (lambda _text: None) if request.quiet else display.tell
    try:
        with Model(str(path)) as model:
            prompts, more = tokenised(model, requests, request.temperature, request.max_tokens)
            notes += more
            for note in notes:
                tell(f"note: {note}")
            name = out.name.removesuffix(".gguf").removesuffix(".exits")
            with reporting(quiet=request.quiet) as reporter:
                made = calibrate(name, model, identity, prompts, options, reporter, notes)
    except KeyboardInterrupt:
        display.tell("answers, training and results so far are kept: the same command goes on from there")
        raise
    size = made.pack.save(out)
    if request.png is not None:
        draw(made.pack.report, request.png)
    if request.json:
        display.write_json({"pack": str(out), "bytes": size, **made.pack.report})
        return
    for line in report_lines(made.pack.report):
        print(line)
    tell(f"what was collected is kept in {made.folder} for another run; it may be deleted")
    kind = ": certificates for the model's own output head, no heads" if made.pack.shared else ""
    tell(f"the pack is in {out} ({size / 2**20:.1f} MiB){kind}")


def parse_budget(text: str | None) -> float | None:
    """`90s`, `10m`, `1.5h` → seconds; None stays. Raises UsageError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower(), re.ASCII)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"budget '{text}' is no time", "give it as in --budget 10m, 1.5h or 90s")
    return seconds


def _options(request: CalibrateRequest) -> tuple[CalibrateOptions, list[str]]:
    notes: list[str] = []
    budget = parse_budget(request.budget)
    if not 0 <= request.temperature <= 1:
        raise UsageError(f"temperature {request.temperature} is out of range", "allowed: from 0 to 1")
    if not 0 < request.confidence < 1:
        raise UsageError(f"confidence {request.confidence} is not a probability", "0.95 is usual")
    bounds = tuple(sorted(set(request.max_disagreement))) or BOUNDS
    for bound in bounds:
        if not 0 < bound < 1:
            raise UsageError(f"disagreement {bound} is not a share", "give it as in --max-disagreement 0.02")
    trainer: Literal["torch", "ridge"] = "ridge"
    if request.head == "shared":
        _check_nothing_to_train(request)
    else:
        trainer = _trainer(request, notes)
    options = CalibrateOptions(
        head=request.head,
        boundaries=parse_boundaries(request.boundaries),
        n_prompts=request.prompts or (DEFAULT_PROMPTS if budget is None else None),
        max_tokens=request.max_tokens,
        budget=budget,
        trainer=trainer,
        labels=request.labels,
        epochs=request.epochs,
        device=request.device,
        quantisation=request.quantisation.upper(),
        n_shortlist=request.shortlist,
        bounds=bounds,
        delta=round(1 - request.confidence, 12),
        temperature=request.temperature,
        compare=request.compare,
        pack_all=request.pack_all,
        n_threads=request.threads,
        seed=request.seed,
        cache=request.cache,
    )
    return options, notes


def _trainer(request: CalibrateRequest, notes: list[str]) -> Literal["torch", "ridge"]:
    """What trains the heads; notes what a linear one loses. Raises UsageError if it cannot do what was asked for."""
    problem = None if request.trainer == "ridge" else torch_problem()  # finding out takes seconds
    trainer = request.trainer or ("ridge" if problem else "torch")
    if trainer == "torch" and problem:
        raise UsageError(problem, "pip install 'edge-runtime[train]', or use --trainer ridge")
    if trainer == "ridge":
        if request.compare or request.device != "cpu":
            what = "--compare" if request.compare else "--device"
            raise UsageError(f"{what} is for trained heads", "use --trainer torch")
        notes.append(f"{problem}: {_RIDGE_NOTE}" if problem else _RIDGE_NOTE)
    elif request.device == "cuda":
        _check_cuda()
    return trainer


def _check_nothing_to_train(request: CalibrateRequest) -> None:
    """Raise UsageError for options of heads where the model's own is used."""
    usual = CalibrateOptions()
    given = {
        "--trainer": request.trainer is not None,
        "--labels": request.labels != usual.labels,
        "--epochs": request.epochs != usual.epochs,
        "--compare": request.compare,
        "--quantisation": request.quantisation.upper() != usual.quantisation,
        "--shortlist": request.shortlist != usual.n_shortlist,
        "--device": request.device != usual.device,
    }
    for option, is_given in given.items():
        if is_given:
            raise UsageError(f"{option} is for heads that are trained", f"leave out {option}, or --head shared")


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("PyTorch finds no CUDA device", "use --device cpu")


def check_place(path: Path, what: str, option: str) -> None:
    """Raise UsageError unless a file can be written at `path`."""
    hint = f"name a file in a folder that exists with {option}"
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{what} cannot be written to {path}", hint)
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".edge-run-"):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UsageError(f"{what} cannot be written to {path}: {error.strerror}", hint) from error


def _check_picture(path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeError("drawing needs matplotlib, which is not installed", PLOT_HINT) from None
    check_place(path, "a picture", "--png")


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _requests(request: CalibrateRequest) -> list[Request]:
    """The user's own first, so that they are all used; texts to be read lie between prompts to be answered."""
    shuffle = random.Random(request.seed).shuffle
    own = list(dict.fromkeys(entry for path in request.texts for entry in read_requests(path)))
    if not own and not request.builtin:
        raise UsageError("there are no prompts", "give some with --text, or leave out --no-builtin")
    asked, given = ([entry for entry in own if entry.given is kind] for kind in (False, True))
    shuffle(asked)
    shuffle(given)
    if request.builtin:
        known = {entry.text for entry in asked}
        asked += [entry for entry in builtin_requests(10**6, request.seed) if entry.text not in known]
    pairs = [asked[i : i + _ANSWERED_PER_READ] for i in range(0, len(asked), _ANSWERED_PER_READ)]
    mixed = [[*pair, *([text] if text else [])] for pair, text in zip_longest(pairs, given[: len(pairs)], fillvalue=())]
    return [entry for group in mixed for entry in group if isinstance(entry, Request)][:MAX_REQUESTS]


def _language_notes(requests: Sequence[Request]) -> list[str]:
    shares = language_shares(entry.text for entry in requests)
    for language, share in shares.items():
        if share >= _ONE_LANGUAGE:
            return [
                f"nearly all of the text is in one language ({language}): nothing is learned or certified for others; "
                "give prompts in those you use with --text"
            ]
    return []


def tokenised(
    model: Model, requests: Sequence[Request], temperature: float, max_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """Requests as tokens, numbered, every second one sampled; and notes on what was left out. Raises as `fitting`."""
    kept, notes = fitting(model, requests, max_tokens)
    prompts = [
        Prompt(number, tokens, temperature if number % 2 else 0.0, answered=entry.given, group=entry.group)
        for number, (entry, tokens) in enumerate(kept)
    ]
    return prompts, notes


def fitting(
    model: Model, requests: Sequence[Request], max_tokens: int
) -> tuple[list[tuple[Request, tuple[int, ...]]], list[str]]:
    """Requests with their tokens, texts to be read cut off; and notes on those that were left out as too long.

    Raises UsageError if answers of `max_tokens` do not fit the model's context, PromptError if nothing is left,
    UnsupportedModelError without a tokenizer.
    """
    notes = []
    if not model.has_tokenizer:
        raise UnsupportedModelError(
            f"{model.path} has no tokenizer, so it cannot answer prompts", "use a GGUF file that has one"
        )
    template = ChatTemplate.of(model)
    if template is None:
        notes.append("the model has no chat template: it continues prompts as they stand")
    longest = min(MAX_PROMPT_TOKENS, model.n_ctx_train - max_tokens if model.n_ctx_train else MAX_PROMPT_TOKENS)
    if longest < 1:
        raise UsageError(
            f"answers of {max_tokens} tokens do not fit the model's context of {model.n_ctx_train}",
            "use a smaller --max-tokens",
        )
    bos = model.special_text("bos") if model.adds_bos else ""
    kept: list[tuple[Request, tuple[int, ...]]] = []
    n_long = 0
    for entry in requests:
        if entry.given or template is None:
            tokens = model.tokenize(entry.text, add_special=True, parse_special=False)
        else:
            text = template.render([Message("user", entry.text)])
            # tokenising adds it again
            text = text.removeprefix(bos) if bos else text
            tokens = model.tokenize(text, add_special=True, parse_special=True)
        if entry.given:
            tokens = tokens[:longest]
        elif len(tokens) > longest:
            n_long += 1
            continue
        if tokens:
            kept.append((entry, tuple(tokens)))
    if n_long:
        notes.append(f"{n_long:,} prompts of more than {longest:,} tokens are left out")
    if not kept:
        raise PromptError("no prompt is left", f"prompts must be of {longest:,} tokens at most")
    return kept, notes
