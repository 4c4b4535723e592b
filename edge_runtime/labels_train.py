"""`edge-run labels train`: from a file of labelled messages to a pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import display
from .errors import UsageError
from .identity import identify
from .labels.dataset import ReadCounts, Sample, read_rows, sample_rows
from .labels.thresholds import Guarantee
from .labels.train import TrainOptions, train
from .labels_progress import read_notes
from .models import find_model
from .native import Model
from .options import parse_boundaries, start_library
from .progress import reporting


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What the verb was asked for."""

    data: Path
    text: str
    label: str
    model: str
    out: Path | None
    instruction: str | None
    boundaries: str | None
    objective: Literal["accuracy", "macro-f1"] | None
    max_loss: float | None
    max_error: float | None
    confidence: float
    max_harm: float
    full_depth: bool
    max_rows: int
    max_tokens: int
    seed: int
    cache: Path | None
    threads: int
    json: bool
    quiet: bool
    verbose: bool


def train_labels(request: TrainRequest) -> None:
    """Train, write the pack, and print what it is worth."""
    guarantee = _guarantee(request)
    out = request.out or Path(f"{_stem(request.data)}.labels.gguf")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"a pack cannot be written to {out}", "name a file in a folder that exists with --out")
    _check_overwrites(out, request.data)
    boundaries = parse_boundaries(request.boundaries)
    start_library(verbose=request.verbose)
    path = find_model(request.model)
    _check_overwrites(out, path)
    identity = identify(path)
    sample = _read(request)
    try:
        with reporting(quiet=request.quiet) as reporter, Model(str(path)) as model:
            options = TrainOptions(
                instruction=request.instruction,
                boundaries=boundaries,
                objective=request.objective,
                guarantee=guarantee,
                max_harm=request.max_harm,
                full_depth=request.full_depth,
                max_tokens=request.max_tokens,
                n_threads=request.threads,
                seed=request.seed,
                cache=request.cache,
            )
            name = out.name.removesuffix(".gguf").removesuffix(".labels")
            trained = train(name, sample, model, identity, options, reporter)
    except KeyboardInterrupt:
        display.tell("hidden states computed so far are kept: the same command goes on from there")
        raise
    size = trained.pack.save(out)
    if request.json:
        display.write_json({"pack": str(out), "bytes": size, **trained.pack.report})
        return
    for line in summary_lines(trained.pack.report):
        print(line)
    display.tell(f"hidden states are kept in {trained.kept_states} for another run; they may be deleted")
    display.tell(f"the pack is in {out} ({size / 1024:.0f} KiB); use it with: edge-run labels run --pack {out}")


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report's main figures, a line per stage."""
    data, cascade = report["data"], report["test"]["cascade"]
    lines = [
        f"{data['messages']:,} messages ({', '.join(f'{k}: {v:,}' for k, v in data['by_label'].items())}); "
        f"tested on {data['test']:,} of them never seen in training",
        f"{'':<24} {'accuracy':>9} {'macro-F1':>9} {'left here':>10}",
    ]
    for name, found in report["test"].items():
        left = cascade["left_at"].get(name)
        share = "" if left is None else f"{left:.1%}"
        lines.append(f"{name:<24} {found['accuracy']:>9.3f} {found['macro_f1']:>9.3f} {share:>10}")
    if data["longer_than_max_tokens"]:
        lines.append(f"{data['longer_than_max_tokens']:,} messages were too long and cut at their end (--max-tokens)")
    holds = "certified" if report["certificate"]["holds"] else "NOT certified"
    lines.append(f"{holds}: {report['certificate']['sentence']}")
    if not report["certificate"]["holds"]:
        needed = report["certificate"]["messages_needed"]
        if data["calibration"] < needed:
            lines.append(f"the calibration part has {data['calibration']:,} messages; at least {needed:,} are needed")
        else:
            lines.append("too much goes wrong for the messages there are: allow more of it, or give more messages")
    lines.append(f"mean depth {cascade['mean_layer']:.1f} layers, unsure {cascade['unsure']:.1%}")
    return lines


def _guarantee(request: TrainRequest) -> Guarantee:
    if request.max_loss is not None and request.max_error is not None:
        raise UsageError("--max-loss and --max-error exclude each other", "give one of them")
    delta = round(1 - request.confidence, 12)
    if request.max_error is not None:
        return Guarantee("error", request.max_error, delta)
    if not request.full_depth:
        if request.max_loss is not None:
            raise UsageError("--max-loss compares with full depth", "drop --no-full-depth, or use --max-error")
        return Guarantee("error", 0.1, delta)
    return Guarantee("depth", 0.01 if request.max_loss is None else request.max_loss, delta)


def _check_overwrites(out: Path, source: Path) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"the pack would take the place of {source}", "name another file with --out")


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] or "pack"


def _read(request: TrainRequest) -> Sample:
    counts = ReadCounts()
    with reporting(quiet=request.quiet) as reporter:
        reporter.say(f"reading {request.data}")
        rows = read_rows(
            request.data,
            request.text,
            request.label,
            counts=counts,
            progress=lambda share: reporter.progress(round(1000 * share), 1000),
        )
        sample = sample_rows(rows, request.max_rows, request.seed)
    if not request.quiet:
        for line in read_notes(counts, sample.n_duplicates, sample.n_conflicting, len(sample.rows), request.max_rows):
            display.tell(line)
    return sample
