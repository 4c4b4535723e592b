"""`edge-run calibrate --probe`: from a model, and prompts if there are any, to a semantic entropy probe."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from . import display
from .bench.questions import questions
from .calibrate_run import check_place, fitting
from .confident import MEANING_THRESHOLD
from .errors import UsageError
from .exits.probe_file import SUFFIX
from .exits.probe_training import ByQuestion, ProbeOptions, ProbePrompt, report_lines, train_probes
from .exits.prompts import Request, read_requests
from .identity import identify
from .models import find_model
from .native import Model
from .options import parse_boundaries, start_library
from .progress import reporting
from .semantic import ByForm, ByMeaning, SampleSettings, embedding_similarity

MAX_PROMPTS = 2000
_BRIEFLY = "Answer in a few words."
_SATURATED = 0.85  # share of prompts of high entropy, from which on it tells little apart


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What the verb was asked for; None leaves a choice to `SampleSettings`."""

    model: str
    texts: tuple[Path, ...]
    builtin: bool
    out: Path | None
    boundaries: str | None
    prompts: int | None
    max_tokens: int | None
    temperature: float | None
    encoder: str | None
    cache: Path | None
    seed: int
    threads: int
    json: bool
    quiet: bool
    verbose: bool


def calibrate_probe(request: ProbeRequest) -> None:
    """Make the probe and print what it is worth. All that can be refused is refused before the work."""
    path = find_model(request.model)
    out = request.out or Path(f"{path.stem}{SUFFIX}")
    check_place(out, "a probe", "--out")
    for source in (path, *request.texts):
        if out.exists() and source.exists() and out.samefile(source):
            raise UsageError(f"the probe would take the place of {source}", "name another file with --out")
    options = _options(request)
    requests, notes = _requests(request)
    grouping, grouped_by = _grouping(request.encoder)
    start_library(verbose=request.verbose)
    identity = identify(path)
    tell = (lambda _text: None) if request.quiet else display.tell
    try:
        with Model(str(path)) as model:
            kept, more = fitting(model, requests, options.sampling.max_tokens)
            prompts = [ProbePrompt(entry.text, tokens, entry.group) for entry, tokens in kept]
            notes += more
            for note in notes:
                tell(f"note: {note}")
            name = out.name.removesuffix(SUFFIX)
            with reporting(quiet=request.quiet) as reporter:
                made = train_probes(name, model, identity, prompts, options, reporter, grouping, grouped_by, notes)
    except KeyboardInterrupt:
        display.tell("answers so far are kept: the same command goes on from there")
        raise
    size = made.file.save(out)
    report = made.file.report
    if request.json:
        display.write_json({"probe": str(out), "bytes": size, **report})
        return
    for line in report_lines(report):
        print(line)
    if report["high_test"] > _SATURATED and request.encoder is None:
        tell(
            "note: nearly all answers differ in their wording: group them by meaning with --encoder, or give questions "
            "that are answered in a few words"
        )
    tell(f"what was collected is kept in {made.folder} for another run; it may be deleted")
    tell(f"the probe is in {out} ({size / 2**10:.0f} KiB)")


def _options(request: ProbeRequest) -> ProbeOptions:
    sampling = SampleSettings(seed=request.seed)
    if request.temperature is not None:
        sampling = replace(sampling, temperature=request.temperature)
    if request.max_tokens is not None:
        sampling = replace(sampling, max_tokens=request.max_tokens)
    return ProbeOptions(
        boundaries=parse_boundaries(request.boundaries),
        sampling=sampling,
        n_threads=request.threads,
        seed=request.seed,
        cache=request.cache,
    )


def _requests(request: ProbeRequest) -> tuple[list[Request], list[str]]:
    """The user's own prompts first, so that they are all used; and notes on what was left out."""
    shuffle = random.Random(request.seed).shuffle
    own = list(dict.fromkeys(entry for path in request.texts for entry in read_requests(path)))
    asked = [entry for entry in own if not entry.given]
    notes = ["texts to be read are left out: a probe learns from prompts"] if len(asked) < len(own) else []
    shuffle(asked)
    if request.builtin:
        builtin = [Request(f"{question.text} {_BRIEFLY}", question.kind.value) for question in questions()]
        shuffle(builtin)
        asked += builtin
    if not asked:
        raise UsageError("there are no prompts", "give some with --text, or leave out --no-builtin")
    n_used = min(request.prompts or len(asked), MAX_PROMPTS)
    if n_used == MAX_PROMPTS < len(asked):
        notes.append(f"the first {MAX_PROMPTS:,} prompts are used, of {len(asked):,}")
    return asked[:n_used], notes


def _grouping(encoder: str | None) -> tuple[ByQuestion, str]:
    """What puts answers of one meaning together, by question, and its name. Raises as the encoder does."""
    if encoder is None:
        return (lambda _question: ByForm()), "form"
    from .encoder import SentenceEncoder

    found = SentenceEncoder(encoder)
    name = f"meaning ({found.path.parent.name})"
    return (lambda question: ByMeaning(embedding_similarity(found.encode, question), MEANING_THRESHOLD)), name
