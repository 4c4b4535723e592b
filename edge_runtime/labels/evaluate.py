"""How good and how fast a label pack is on labelled messages: its cascade, each of its stages alone, and all layers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import cache_dir
from ..errors import UsageError
from ..metrics import auroc, calibration_error, confusion, precision_recall
from ..native import Model, library_hash
from ..reporter import Reporter
from ..types import Floats
from .cascade import NEVER, weigh
from .classifier import ClassifierOptions, LabelClassifier, message_tokens, prefix_tokens, trunk_options
from .dataset import Row
from .decision import Decision
from .pack import LabelPack
from .prefix import PrefixStore
from .prepare import prepare
from .seen import TextTable, text_hash
from .stack import score_features
from .states import groups, pool
from .thresholds import Evidence, Labels, Rows, Setting, apply
from .trunk import Trunk

FULL_DEPTH_ROWS = 200  # messages timed through all layers, which is slow
FULL_DEPTH_CHUNKS = 8
BOLDNESS = tuple(i / 25 for i in range(-25, 26))
_BATCH = 64  # messages at once, as `LabelClassifier.stream` takes them
_MAX_UNKNOWN = 5  # labels named in an error
_SHOWN_CHARACTERS = 40


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """Different messages of a file, in its order; made by `choose_rows`."""

    rows: list[Row]
    totals: dict[str, int]  # different texts of each of the pack's labels in the whole file, 0 for a label without
    n_duplicates: int  # rows left out: text and label were there before
    n_conflicting: int  # rows left out: the text was there before with another label


def choose_rows(rows: Iterable[Row], labels: Sequence[str], max_rows: int, seed: int) -> EvaluationSample:
    """At most `max_rows` of `rows`, without duplicates, all equally likely, so that labels keep their shares.

    One pass and bounded memory, as in `sample_rows`, by the same reservoir (Vitter 1985, algorithm R). Unlike there,
    few rows and a single label will do: nothing is learned from them. Texts that differ in case only are duplicates;
    the first stays, with its label.

    Raises UsageError for labels that are not among `labels`, and if there are no rows.
    """
    rng = random.Random(seed)
    numbers = {label: number for number, label in enumerate(labels)}
    seen = TextTable()
    totals = dict.fromkeys(labels, 0)
    reservoir: list[tuple[int, Row]] = []
    unknown: dict[str, None] = {}
    n_duplicates = n_conflicting = n_different = 0
    for index, row in enumerate(rows):
        number = numbers.get(row.label)
        if number is None:
            unknown[row.label] = None
            if len(unknown) > _MAX_UNKNOWN:
                break
            continue
        before = seen.put(text_hash(row.text), number)
        if before is not None:
            n_duplicates += before == number
            n_conflicting += before != number
            continue
        totals[row.label] += 1
        n_different += 1
        if len(reservoir) < max_rows:
            reservoir.append((index, row))
        elif (place := rng.randrange(n_different)) < max_rows:
            reservoir[place] = (index, row)
    if unknown:
        raise _unknown_labels(list(unknown), labels)
    if not reservoir:
        raise UsageError("there are no labelled rows", "give a file with labelled rows")
    reservoir.sort(key=lambda item: item[0])
    return EvaluationSample([row for _, row in reservoir], totals, n_duplicates, n_conflicting)


def _unknown_labels(unknown: list[str], labels: Sequence[str]) -> UsageError:
    more = ", …" if len(unknown) > _MAX_UNKNOWN else ""
    named = ", ".join(_quoted(label) for label in unknown[:_MAX_UNKNOWN]) + more
    return UsageError(
        f"the file has labels that the pack does not know: {named}; the pack has {', '.join(map(_quoted, labels))}",
        "give the column with the pack's labels, spelt as in the pack, or leave out rows with other labels",
    )


def _quoted(label: str) -> str:
    return f"'{label}'" if len(label) <= _SHOWN_CHARACTERS else f"'{label[: _SHOWN_CHARACTERS - 1]}…'"


# ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What each stage takes, measured with every message going through all of them; slices were open already."""

    seconds: Floats  # (n_stages,), of all messages
    n_tokens: NDArray[np.int64]  # (n,), of each message; all zero for a pack without probes

    def seconds_for(self, left_at: Labels) -> float:
        """Estimate for messages that leave at the stages `left_at` (n,): by messages at stage 0, by tokens later."""
        n_tokens = max(1, int(self.n_tokens.sum()))
        total = float(self.seconds[0])
        for stage in range(1, len(self.seconds)):
            total += float(self.seconds[stage]) * int(self.n_tokens[left_at >= stage].sum()) / n_tokens
        return total


@dataclass(frozen=True, slots=True)
class DepthTimes:
    """The cascade against all layers of the model, on the same messages in turn; an entry per chunk of messages."""

    n_messages: tuple[int, ...]
    cascade: tuple[float, ...]  # seconds
    full: tuple[float, ...]  # seconds


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found; `describe` and `sweep` make figures of it."""

    pack: LabelPack
    truth: Labels
    decisions: list[Decision]  # of the cascade, with the pack's own thresholds
    seconds: float  # the cascade took for all messages
    evidence: Evidence  # every stage's word on every message
    stage_times: StageTimes
    depth_times: DepthTimes | None


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What is run, and how."""

    full_depth: bool = True  # also time all layers of the model
    n_threads: int = 0  # 0: all physical cores
    keep_prefix: bool = True  # in a file, over restarts
    seed: int = 0  # of the choice of messages timed through all layers


def evaluate(
    pack: LabelPack, model: Model, rows: Sequence[Row], options: EvaluateOptions, reporter: Reporter
) -> Evaluation:
    """Run a pack over labelled rows whose labels are all the pack's.

    Raises PackError if `model` is not the pack's, and what running it does.
    """
    numbers = {label: number for number, label in enumerate(pack.labels)}
    texts = [row.text for row in rows]
    truth = np.array([numbers[row.label] for row in rows], np.int64)
    classifier_options = ClassifierOptions(n_threads=options.n_threads, keep_prefix=options.keep_prefix)
    with LabelClassifier(pack, model, classifier_options) as classifier:
        reporter.say("asking all stages about all messages")
        answers = _ask_all_stages(pack, model, texts, options, reporter)
        reporter.say("running the cascade")
        decisions: list[Decision] = []
        seconds = 0.0
        for start in range(0, len(texts), _BATCH):
            part = texts[start : start + _BATCH]
            decided, took = _run_cascade(classifier, part)
            decisions += decided
            seconds += took
            reporter.progress(len(decisions), len(texts))
        depth_times = None
        if options.full_depth:
            reporter.say(f"timing all {model.n_layer} layers")
            depth_times = _time_depths(classifier, model, texts, options, reporter)
    evidence = Evidence(answers.probabilities, None, None, answers.held, answers.novelty, truth)
    return Evaluation(pack, truth, decisions, seconds, evidence, answers.times, depth_times)


def _run_cascade(classifier: LabelClassifier, texts: Sequence[str]) -> tuple[list[Decision], float]:
    """Decisions and seconds. What opens a slice is run and timed again: opening belongs to no message."""
    while True:
        n_open = classifier.n_open_slices
        start = time.perf_counter()
        decisions = classifier.predict(texts)
        took = time.perf_counter() - start
        if classifier.n_open_slices == n_open:
            return decisions, took


def _open_trunk(pack: LabelPack, model: Model, edges: tuple[int, ...], options: EvaluateOptions) -> Trunk:
    store = None
    if options.keep_prefix:
        store = PrefixStore(cache_dir() / "prefixes", pack.model.sha256, library_hash())
    prefix = prefix_tokens(model, pack.instruction)
    return Trunk(model, edges, prefix, trunk_options(pack.max_tokens, options.n_threads), store)


def _tokenize(pack: LabelPack, model: Model, texts: Sequence[str]) -> list[list[int]]:
    return [message_tokens(model, text, pack.max_tokens)[0] for text in texts]


def stage_probabilities(pack: LabelPack, model: Model, texts: Sequence[str], *, n_threads: int = 0) -> list[Floats]:
    """Calibrated probabilities (n, n_labels) that each of the pack's stages gives every text, none leaving early.

    `model` must be the pack's.
    """
    return _ask_all_stages(pack, model, texts, EvaluateOptions(n_threads=n_threads), Reporter()).probabilities


@dataclass(frozen=True, slots=True)
class _Answers:
    """What all stages said of n messages."""

    probabilities: list[Floats]  # of each stage: (n, n_labels), calibrated
    held: list[NDArray[np.bool_]]  # of each stage: (n,), must not leave there
    novelty: Floats | None
    times: StageTimes


def _ask_all_stages(
    pack: LabelPack, model: Model, texts: Sequence[str], options: EvaluateOptions, reporter: Reporter
) -> _Answers:
    n, n_stages = len(texts), len(pack.layers)
    raw: list[Floats] = [np.empty((n, len(pack.labels)), np.float32) for _ in range(n_stages)]
    new_shares = np.empty(n, np.float32)
    novelty = None if pack.states is None else np.empty(n, np.float32)
    n_tokens = np.zeros(n, np.int64)
    seconds = np.zeros(n_stages, np.float32)
    trunk = _open_trunk(pack, model, pack.layers[1:], options)
    try:
        if pack.probes:
            trunk.slice_at(len(pack.probes) - 1)
        for start in range(0, n, _BATCH):
            watch = _Watch()
            part = [prepare(text) for text in texts[start : start + _BATCH]]
            raw[0][start : start + len(part)] = pack.ngrams.scores(part)
            new_shares[start : start + len(part)] = pack.words.new_shares(part)
            seconds[0] += watch.lap()
            if not pack.probes:
                reporter.progress(start + len(part), n)
                continue
            tokens = _tokenize(pack, model, part)
            n_tokens[start : start + len(part)] = [len(t) for t in tokens]
            seconds[1] += watch.lap()
            first = start
            for members in groups(tokens, trunk):
                rows = np.arange(first, first + len(members))
                _climb(pack, trunk, members, rows, raw, novelty, new_shares, seconds)
                first += len(members)
                reporter.progress(first, n)
    finally:
        trunk.close()
    probabilities = [pack.ngrams.probabilities(raw[0])]
    probabilities += [probe.probabilities(scores) for probe, scores in zip(pack.probes, raw[1:], strict=True)]
    new_words = pack.words.unfamiliar(new_shares)
    unfamiliar = new_words if novelty is None else new_words | (novelty > 1)
    held = [new_words, *[unfamiliar] * len(pack.probes)]
    return _Answers(probabilities, held, novelty, StageTimes(seconds, n_tokens))


def _climb(
    pack: LabelPack,
    trunk: Trunk,
    tokens: Sequence[Sequence[int]],
    rows: Rows,
    raw: list[Floats],
    novelty: Floats | None,
    new_shares: Floats,
    seconds: Floats,
) -> None:
    """Take messages through all boundaries, filling the `rows` of `raw` and `novelty`, and adding up the time."""
    watch = _Watch()
    group = trunk.start(tokens)
    for stage, probe in enumerate(pack.probes, 1):
        group.advance()
        states = group.states()
        if stage == 1 and novelty is not None:
            assert pack.states is not None
            means = np.stack([pool(s, "mean") for s in states])
            novelty[rows] = pack.states.scores(means, np.array([len(s) for s in states]), new_shares[rows])
        pooled = np.stack([np.concatenate([pool(s, kind) for kind in probe.pools]) for s in states])
        raw[stage][rows] = probe.scores(pooled, [score_features(raw[i][rows]) for i in range(stage)])
        seconds[stage] += watch.lap()


class _Watch:
    """Seconds since the last look."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took


def _time_depths(
    classifier: LabelClassifier, model: Model, texts: Sequence[str], options: EvaluateOptions, reporter: Reporter
) -> DepthTimes:
    """Chunks of the same messages through the cascade and through all layers, swapping who goes first."""
    chosen = random.Random(options.seed).sample(texts, min(FULL_DEPTH_ROWS, len(texts)))
    n_chunks = min(FULL_DEPTH_CHUNKS, len(chosen))
    chunks = [chosen[i::n_chunks] for i in range(n_chunks)]
    pack = classifier.pack
    trunk = _open_trunk(pack, model, (model.n_layer,), options)

    def run_full(part: Sequence[str]) -> float:
        watch = _Watch()
        for group in groups(_tokenize(pack, model, [prepare(text) for text in part]), trunk):
            trunk.start(group).advance()
        return watch.lap()

    try:
        trunk.slice_at(0)
        run_full(chunks[0][:1])  # buffers are made by the first batch
        cascade, full = [], []
        done = 0
        for i, part in enumerate(chunks):
            if i % 2:
                full.append(run_full(part))
            cascade.append(_run_cascade(classifier, part)[1])
            if not i % 2:
                full.append(run_full(part))
            done += len(part)
            reporter.progress(done, len(chosen))
    finally:
        trunk.close()
    return DepthTimes(tuple(map(len, chunks)), tuple(cascade), tuple(full))


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(found: Evaluation) -> dict[str, Any]:
    """'stages', each alone, and 'cascade'; shares and probabilities are from 0 to 1, speeds in messages per second."""
    pack, truth = found.pack, found.truth
    n = len(truth)
    stages = []
    for name, layer, probabilities in zip(stage_names(pack), pack.layers, found.evidence.stages, strict=True):
        decided = weigh(probabilities, pack.weights).argmax(axis=1)
        stages.append({"name": name, "layer": layer, **judge(pack.labels, probabilities, decided, truth)})
    numbers = {label: number for number, label in enumerate(pack.labels)}
    decided = np.array([numbers[d.likeliest] for d in found.decisions], np.int64)
    probabilities = np.array([d.probabilities for d in found.decisions], np.float32)
    left_at = np.array([d.stage for d in found.decisions], np.int64)
    answered = np.array([not d.unsure for d in found.decisions])
    right = decided == truth
    all_stages = weigh(found.evidence.stages[-1], pack.weights).argmax(axis=1)
    shares = np.bincount(left_at, minlength=len(pack.layers)) / n
    cascade = {
        **judge(pack.labels, probabilities, decided, truth),
        "confusion": confusion(truth, decided, len(pack.labels)).tolist(),
        "left_at": {name: round(float(share), 4) for name, share in zip(stage_names(pack), shares, strict=True)},
        "mean_layer": round(float(np.mean([d.layer for d in found.decisions])), 3),
        "agrees_with_all_stages": round(float((decided == all_stages).mean()), 4),
        "unsure": round(1 - float(answered.mean()), 4),
        "accuracy_where_sure": round(float(right[answered].mean()), 4) if answered.any() else float("nan"),
        "unfamiliar": round(float(np.mean([d.unfamiliar for d in found.decisions])), 4),
        "cut": sum(d.n_cut > 0 for d in found.decisions),
        "messages_per_second": round(n / max(found.seconds, 1e-9), 2),
    }
    all_seconds = max(float(found.stage_times.seconds.sum()), 1e-9)
    return {
        "messages": n,
        "stages": stages,
        "cascade": cascade,
        "all_stages_messages_per_second": round(n / all_seconds, 2),
        "stage_ms_per_message": [round(1000 * float(s) / n, 4) for s in found.stage_times.seconds],
    }


def judge(labels: Sequence[str], probabilities: Floats, decided: Labels, truth: Labels) -> dict[str, Any]:
    """Accuracy, macro-F1, calibration error, and per label precision, recall, F1 and AUROC (label against the rest).

    Macro-F1 is the mean over labels that some message has. NaN: the precision of a label never decided, the recall
    of one that no message has, an AUROC without messages on both sides.
    """
    table = confusion(truth, decided, len(labels))
    precision, recall = precision_recall(table)
    n_true, n_decided = table.sum(axis=1), table.sum(axis=0)
    f1 = _f1(table)
    right = decided == truth
    return {
        "accuracy": round(float(right.mean()), 4),
        "macro_f1": round(float(f1[n_true > 0].mean()), 4),
        "calibration_error": round(calibration_error(probabilities[np.arange(len(truth)), decided], right), 4),
        "labels": {
            label: {
                "messages": int(n_true[k]),
                "precision": round(float(precision[k]), 4) if n_decided[k] else float("nan"),
                "recall": round(float(recall[k]), 4) if n_true[k] else float("nan"),
                "f1": round(float(f1[k]), 4) if n_true[k] else float("nan"),
                "auroc": round(auroc(truth == k, probabilities[:, k]), 4),
            }
            for k, label in enumerate(labels)
        },
    }


def _f1(table: NDArray[np.int64]) -> Floats:
    return np.asarray(2 * np.diag(table) / np.maximum(table.sum(axis=0) + table.sum(axis=1), 1), np.float32)


def stage_names(pack: LabelPack) -> list[str]:
    """A name for each stage, in their order."""
    return ["before the network", *(f"layer {layer}" for layer in pack.layers[1:])]


# ── other thresholds ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """The cascade with other thresholds, put together from what all stages said and took."""

    boldness: float  # see `thresholds_at`
    accuracy: float
    macro_f1: float
    mean_layer: float
    messages_per_second: float


def thresholds_at(thresholds: Floats, boldness: float, n_labels: int) -> Floats:
    """Thresholds moved towards no exits (boldness -1), as they are (0), or towards all leaving at once (1).

    Below 0 the doubt 1 - t that is allowed shrinks in proportion, and what never left never leaves. Above 0,
    thresholds sink in proportion to 1 / n_labels, which every confidence reaches, those never reached from 1.
    """
    if boldness <= 0:
        moved = 1 - (1 + boldness) * (1 - thresholds)
        return np.asarray(np.where((thresholds > 1) | (boldness == -1), NEVER, moved), np.float32)
    reachable = np.minimum(thresholds, 1)
    moved = (1 - boldness) * reachable + boldness / n_labels
    # rounding must not put the last step above the confidence of a message that is torn evenly
    return np.asarray(np.minimum(reachable, moved - 1e-6 * boldness), np.float32)


def sweep(found: Evaluation, steps: Sequence[float] = BOLDNESS) -> list[SweepPoint]:
    """The cascade at each boldness of `steps`; messages held back for being unfamiliar stay held back."""
    pack, n = found.pack, len(found.truth)
    layers = np.array(pack.layers)
    points = []
    for boldness in steps:
        setting = Setting(thresholds_at(pack.thresholds, boldness, len(pack.labels)), 0.0, float("nan"))
        outcome, _ = apply(setting, found.evidence, pack.weights)
        table = confusion(found.truth, outcome.labels, len(pack.labels))
        seconds = max(found.stage_times.seconds_for(outcome.stages), 1e-9)
        points.append(
            SweepPoint(
                boldness=boldness,
                accuracy=round(float((outcome.labels == found.truth).mean()), 4),
                macro_f1=round(float(_f1(table)[table.sum(axis=1) > 0].mean()), 4),
                mean_layer=round(float(layers[outcome.stages].mean()), 3),
                messages_per_second=round(n / seconds, 2),
            )
        )
    return points
