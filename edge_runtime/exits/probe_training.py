"""From prompts to semantic entropy probes: states, sampled answers, a probe per boundary, and what each is worth.

Every third prompt is held out. The probes, their penalties, where high entropy begins and which boundary is best come
from the others; all intervals are of prompts held out. States and answers are kept as they are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..cache import cache_dir
from ..errors import UsageError
from ..identity import ModelIdentity
from ..native import ContextOptions, Model
from ..reporter import Reporter
from ..semantic import AnswerSampler, ByForm, Grouping, SampleSettings
from ..semantic.probe import Probe, best_split, fit_probe
from ..semantic.prompt_states import PromptStates
from ..semantic.scores import entropy
from ..signals import signals_of
from ..types import Floats, check_boundaries
from .calibrate import default_boundaries
from .corpus import Array
from .pack import this_library
from .probe_file import ProbeFile
from .quality import Resamples, signal_quality
from .stages import Stages

FEWEST_PROMPTS = 60
SHARD_PROMPTS = 16
_HELD_OUT = 3  # every third
_N_RESAMPLES = 1000


ByQuestion: TypeAlias = Callable[[str], Grouping]  # what puts answers to a question together


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """A question, and the tokens that ask it."""

    text: str
    tokens: tuple[int, ...]
    group: str = ""  # what kind of prompt this is: a third of each is held out


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """How probes are made; None leaves the boundaries to the model's depth."""

    boundaries: tuple[int, ...] | None = None
    samples: int = 8  # answers to a prompt
    sampling: SampleSettings = field(default_factory=SampleSettings)
    n_threads: int = 0
    seed: int = 0  # of the split and of cross-validation; that of answers is in `sampling`
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """What n prompts led to."""

    states: Floats  # (n, n_boundaries, n_embd) float32 of their last tokens
    first: Floats  # (n,) entropy of the distribution of the answer's first token, nats
    answers: list[list[str]]


@dataclass(frozen=True, slots=True)
class Trained:
    """Probes with their report, and where the answers are kept."""

    file: ProbeFile
    folder: Path


def train_probes(
    name: str,
    model: Model,
    identity: ModelIdentity,
    prompts: Sequence[ProbePrompt],
    options: ProbeOptions,
    reporter: Reporter,
    grouping: ByQuestion = lambda _question: ByForm(),
    grouped_by: str = "form",
    notes: Sequence[str] = (),
) -> Trained:
    """Probes called `name` for all boundaries, from prompts to be answered.

    `grouping` decides which answers mean the same, `grouped_by` says so in the report, which holds `notes`, too.
    Raises UsageError for too few prompts, or answers that are all equally uncertain, and what the parts raise.
    """
    layers = default_boundaries(model.n_layer) if options.boundaries is None else options.boundaries
    check_boundaries(layers, model.n_layer)
    if not layers:
        raise UsageError("no boundary is given", "give one as in --boundaries 16,20")
    if len(prompts) < FEWEST_PROMPTS:
        raise UsageError(
            f"{len(prompts)} prompts are too few to fit a probe and see what it is worth: {FEWEST_PROMPTS} are the "
            "least, and some hundreds are good",
            "give more prompts with --text, or leave out --no-builtin and --prompts",
        )
    depends = {"model": identity.sha256, "build": this_library(), "layers": layers}
    stages = Stages((options.cache or cache_dir()) / "probes", depends)
    found = collect(model, layers, prompts, options, stages, reporter)
    reporter.say("which answers mean the same")
    entropies = _entropies(prompts, found.answers, grouping)
    held = held_out([prompt.group for prompt in prompts], options.seed)
    threshold = best_split(entropies[~held])
    high = entropies > threshold
    _check_kinds(high[held], threshold)
    probes = []
    for i, layer in enumerate(layers):
        reporter.say(f"fitting the probe behind layer {layer}")
        states = found.states[~held, i]
        probes.append(fit_probe(states, entropies[~held], layer, threshold=threshold, seed=options.seed))
    chosen = min(probes, key=lambda probe: probe.loss).layer
    report = {
        "prompts": len(prompts),
        "train": int((~held).sum()),
        "test": int(held.sum()),
        "samples": options.samples,
        "temperature": options.sampling.temperature,
        "max_tokens": options.sampling.max_tokens,
        "grouped_by": grouped_by,
        "threshold": threshold,
        "mean_entropy": float(entropies.mean()),
        "high_train": float(high[~held].mean()),
        "high_test": float(high[held].mean()),
        "chosen": chosen,
        "probes": [_worth(probe, found.states[held, i], high[held], options.seed) for i, probe in enumerate(probes)],
        "first_token": _auroc(found.first[held], high[held], options.seed),
        "kind": _auroc(_shares_by_kind(prompts, high, held)[held], high[held], options.seed),
        "notes": list(notes),
    }
    return Trained(ProbeFile(name, identity, this_library(), chosen, tuple(probes), report), stages.folder)


def _entropies(prompts: Sequence[ProbePrompt], answers: Sequence[list[str]], grouping: ByQuestion) -> Floats:
    """Semantic entropy (n,) of each prompt's answers, nats."""
    groups = [grouping(prompt.text).groups(texts) for prompt, texts in zip(prompts, answers, strict=True)]
    return np.array([entropy([len(group) for group in found]) for found in groups], np.float32)


def _shares_by_kind(prompts: Sequence[ProbePrompt], high: NDArray[np.bool_], held: NDArray[np.bool_]) -> Floats:
    """Of each prompt (n,), the share of high entropies among those of its group that are not held out."""
    groups = np.array([prompt.group for prompt in prompts])
    shares = {group: high[(groups == group) & ~held] for group in set(groups.tolist())}
    known = {group: float(found.mean()) if len(found) else 0.5 for group, found in shares.items()}
    return np.array([known[group] for group in groups.tolist()], np.float32)


def _check_kinds(high: NDArray[np.bool_], threshold: float) -> None:
    if not high.any() or high.all():
        raise UsageError(
            f"semantic entropy is {'above' if high.all() else 'not above'} {threshold:.2f} nats for all prompts held "
            "out: what a probe is worth cannot be said",
            "give more prompts, some easy for the model and some not",
        )


def collect(
    model: Model,
    layers: tuple[int, ...],
    prompts: Sequence[ProbePrompt],
    options: ProbeOptions,
    stages: Stages,
    reporter: Reporter,
) -> Collected:
    """States at `layers` and sampled answers of prompts; those that `stages` keep are not computed again."""
    reporter.say(f"the model answers {len(prompts):,} prompts, each {options.samples} times")
    arrays, answers = [], []
    for start in range(0, len(prompts), SHARD_PROMPTS):
        part = prompts[start : start + SHARD_PROMPTS]

        def make(part: Sequence[ProbePrompt] = part, start: int = start) -> tuple[dict[str, Array], Any]:
            return _answered(model, layers, part, options, lambda n: reporter.progress(start + n, len(prompts)))

        depends = {
            "prompts": hashlib.sha256(repr([prompt.tokens for prompt in part]).encode()).hexdigest(),
            "samples": options.samples,
            **asdict(options.sampling),
        }
        found, texts = stages.arrays("answers", depends, make)
        arrays.append(found)
        answers += texts
        reporter.progress(start + len(part), len(prompts))
    states, first = (np.concatenate([part[name] for part in arrays]) for name in ("states", "first"))
    return Collected(states, first, answers)


def _answered(
    model: Model, layers: tuple[int, ...], prompts: Sequence[ProbePrompt], options: ProbeOptions, advance: Any
) -> tuple[dict[str, Array], list[list[str]]]:
    """Some prompts' states, first tokens' entropies and answers, in contexts of their own: the same in any order."""
    longest, n = max(len(prompt.tokens) for prompt in prompts), options.samples
    room = ContextOptions(n_ctx=longest + n * options.sampling.max_tokens, n_threads=options.n_threads)
    states, first, answers = [], [], []
    with PromptStates(model, layers, room) as reader, AnswerSampler(model, n, room) as sampler:
        for i, prompt in enumerate(prompts, 1):
            states.append(reader.read(prompt.tokens))
            first.append(signals_of(sampler.next_logits(prompt.tokens)).entropy)
            answers.append([sample.text for sample in sampler.draw(prompt.tokens, range(n), options.sampling)])
            advance(i)
    return {"states": np.stack(states), "first": np.array(first, np.float32)}, answers


def held_out(groups: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Which prompts (n,) are held out: every third of each group, by a hash of their numbers."""

    def digest(i: int) -> bytes:
        return hashlib.sha256(f"{seed} {i}".encode()).digest()

    order = sorted(range(len(groups)), key=lambda i: (groups[i], digest(i)))
    found = np.zeros(len(groups), np.bool_)
    found[order[_HELD_OUT - 1 :: _HELD_OUT]] = True
    return found


def _worth(probe: Probe, states: Floats, high: NDArray[np.bool_], seed: int) -> dict[str, Any]:
    return {
        "layer": probe.layer,
        "auroc": _auroc(probe.predict(states), high, seed),
        "auroc_cross_validated": probe.auroc,
        "loss_cross_validated": probe.loss,
        "penalty": probe.penalty,
    }


def _auroc(scores: Floats, high: NDArray[np.bool_], seed: int) -> list[float]:
    """AUROC of high entropy and its 95% interval over resampled prompts."""
    resamples = Resamples(np.arange(len(high), dtype=np.int32), _N_RESAMPLES, seed)
    found = signal_quality(scores, high, resamples, risks=()).auroc
    return [found.value, found.low, found.high]


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    lines = [
        f"{report['prompts']:,} prompts ({report['train']:,} train, {report['test']:,} test), each answered "
        f"{report['samples']} times at temperature {report['temperature']:g}, grouped by {report['grouped_by']}",
        f"semantic entropy: {report['mean_entropy']:.2f} nats on average, high above {report['threshold']:.2f}: "
        f"{report['high_test']:.0%} of the test prompts",
        "",
        "layer           AUROC, test prompts    cross-validated",
    ]
    for found in report["probes"]:
        layer = f"{found['layer']}{'*' if found['layer'] == report['chosen'] else ''}"
        lines.append(f"{layer:<10}{_figure(found['auroc']):>25}{found['auroc_cross_validated']:>19.3f}")
    lines += [
        f"{'':<10}{_figure(report['first_token']):>25}  no probe: the first token's entropy, at full depth",
        f"{'':<10}{_figure(report['kind']):>25}  no probe: what kind of prompt it is",
        "95% intervals by prompt; *: chosen by cross-validation on the training prompts",
    ]
    return [*lines, *(f"note: {note}" for note in report["notes"])]


def _figure(figure: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*figure)
