"""From labelled messages to a label pack.

Messages are split three ways: stages are fitted on the training part, thresholds are certified on the calibration
part, and the test part, which nothing else has seen, is what the report is about.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cache import cache_dir
from ..certify import Certificate, betting_p_value, binomial_p_value, fixed_sequence, messages_needed
from ..errors import UsageError
from ..native import Model, library_hash
from ..templates import ChatTemplate, Message
from ..types import Floats, check_boundaries
from .cascade import Outcome, candidates, decision_weights, run, weigh
from .classifier import CONFIDENCE, DISTANCE, message_tokens, prefix_tokens, trunk_options
from .dataset import Sample, split
from .drift import Reference, reference_of
from .metrics import auroc, calibration_error, confusion, macro_f1, precision_recall
from .ngrams import ngram_rows
from .novelty import StateNovelty, fit_state_novelty, fit_word_novelty
from .pack import LabelPack, ModelIdentity, quantise
from .prefix import PrefixStore
from .reporter import Reporter
from .stack import Probe, StackFitter, score_features
from .states import StateCache, collect, message_key
from .trunk import Trunk

Labels = NDArray[np.int64]
Rows = NDArray[np.int64]
Pooled = Callable[[int, str, Rows], Floats]

_DEPTHS = (1 / 15, 2 / 15, 1 / 5, 4 / 15, 2 / 5, 8 / 15)  # candidate boundaries, as shares of the layers
# of harm that exits may do, see `candidates`
LEVELS = (0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05)
_SAFE_LEVEL = 0.001  # of LEVELS, at which abstention is tried first
_ABSTENTION = np.linspace(0.99, 0.0, 34)
_IMBALANCED = 3.0  # the largest label's messages over the smallest's
_MARK = "\x00"
_LEAST = 1e-6  # probability: below, a log-loss would be all that counts
_MAX_TABLE = 800_000  # bytes of n-gram weights in a pack
_MIN_BOUND = 1e-5  # takes hundreds of thousands of messages
_CALIBRATION = 0.15 / 0.7  # messages, per message of the training part


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What thresholds are certified for, with probability 1 - delta.

    'depth': accuracy at most `bound` below that of the whole model, followed by a probe that sees all stages' scores.
    'error': error rate of the labels given at most `bound`, with abstention where that is needed.
    """

    kind: Literal["depth", "error"] = "depth"
    bound: float = 0.01
    delta: float = 0.05

    def __post_init__(self) -> None:
        if not _MIN_BOUND <= self.bound < 1 or not 0 < self.delta < 1:
            raise UsageError(
                f"{self.kind} {self.bound:g} with confidence {1 - self.delta:g} cannot be certified",
                f"give a bound from {_MIN_BOUND:g} to below 1, and a confidence between 0 and 1",
            )


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a pack is trained; None lets the data or the model decide."""

    instruction: str | None = None  # text before each message, special tokens and all
    boundaries: tuple[int, ...] | None = None  # candidates; those that gain too little are dropped
    objective: Literal["accuracy", "macro-f1"] | None = None
    guarantee: Guarantee = field(default_factory=Guarantee)
    max_harm: float = 0.005  # share of exits that may be lost by leaving early, in training; thresholds go no further
    full_depth: bool = True  # also compute all layers: to compare with, and as a last resort if that gains
    max_tokens: int = 256
    n_threads: int = 0
    seed: int = 0
    cache: Path | None = None  # of hidden states


@dataclass(frozen=True, slots=True)
class Setting:
    """A point that thresholds can be set to."""

    thresholds: Floats
    unsure_below: float
    level: float  # of harm per exit in training, NaN without exits


@dataclass(slots=True)
class Evidence:
    """What each stage says of some rows, calibrated; `full` is the whole model's, where it was computed."""

    stages: list[Floats]
    full: Floats | None
    plain_full: Floats | None  # a probe on the last layer that sees no other stage
    held: list[NDArray[np.bool_]]  # per stage: known there to be unlike the training messages
    novelty: Floats | None
    truth: Labels

    def part(self, rows: Rows) -> Evidence:
        def take(values: Floats | None) -> Floats | None:
            return None if values is None else values[rows]

        return Evidence(
            [stage[rows] for stage in self.stages],
            take(self.full),
            take(self.plain_full),
            [mask[rows] for mask in self.held],
            take(self.novelty),
            self.truth[rows],
        )


@dataclass(slots=True)
class Trained:
    """A pack, and what each of its stages says of the calibration and test rows: for certificates and curves."""

    pack: LabelPack
    calibration: Evidence
    test: Evidence
    settings: list[Setting]
    kept_states: Path  # folder of the hidden states, for the next run on the same messages


def default_instruction(model: Model, labels: Sequence[str]) -> str:
    """A question naming the labels, as the model's chat template begins the user's turn with it."""
    listed = ", ".join(labels[:-1]) + f" or {labels[-1]}"
    question = f"Which label fits this message: {listed}?\nMessage: "
    template = ChatTemplate.of(model)
    if template is None:
        return question
    return template.render([Message("user", question + _MARK)]).partition(_MARK)[0]


def candidate_boundaries(n_layer: int) -> tuple[int, ...]:
    """Layers tried as boundaries where none are given: in the lower half, where labels are mostly decided."""
    return tuple(sorted({layer for share in _DEPTHS if 0 < (layer := round(n_layer * share)) < n_layer} or {1}))


def train(
    name: str,
    sample: Sample,
    model: Model,
    identity: ModelIdentity,
    options: TrainOptions,
    reporter: Reporter,
) -> Trained:
    """Train a pack on a sample of labelled messages.

    Hidden states are kept in the cache as they are computed: interrupted, it goes on from there.
    Raises UsageError for data that cannot be trained on, BoundaryError, EdgeError if the disk is full.
    """
    started = time.monotonic()
    if options.guarantee.kind == "depth" and not options.full_depth:
        raise UsageError("a guarantee against full depth needs the whole model computed", "use an error rate instead")
    boundaries = options.boundaries or candidate_boundaries(model.n_layer)
    check_boundaries(boundaries, model.n_layer)
    layers = (*boundaries, model.n_layer) if options.full_depth else boundaries
    parts = split(sample.rows, sample.labels, seed=options.seed)
    instruction = options.instruction
    if instruction is None:
        instruction = default_instruction(model, sample.labels)
    data = _Data(sample, model, identity, instruction, layers, options)
    data.collect(reporter)
    reporter.say("fitting")
    fitted = _fit(data, parts[0], boundaries, options, reporter)
    reporter.say("certifying")
    evidence = [fitted.evidence(data, part) for part in parts[1:]]
    calibration, test = evidence
    objective = options.objective or _objective_for(sample)
    weights = decision_weights(fitted.last_out_of_fold, data.labels[parts[0]], objective)
    settings = _settings(fitted, weights, data.labels[parts[0]], objective, options)
    chosen, certificate = certify(settings, calibration, weights, options.guarantee)
    pack = fitted.pack(name, sample.labels, data, weights, settings[chosen], calibration)
    pack.report.update(
        data=_describe(sample, data, parts),
        objective=objective,
        certificate={"sentence": certificate.sentence(), **_plain(certificate, options.guarantee)},
        level=None if math.isnan(settings[chosen].level) else settings[chosen].level,
        training={"trials": fitted.trials, "out_of_fold_log_loss": fitted.losses},
        test=describe_evidence(pack, test),
        seconds=round(time.monotonic() - started, 1),
    )
    return Trained(pack, calibration, test, settings, data.cache.folder)


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Data:
    """The sample as texts, label numbers and tokens, with its pooled states."""

    def __init__(
        self,
        sample: Sample,
        model: Model,
        identity: ModelIdentity,
        instruction: str,
        layers: tuple[int, ...],
        options: TrainOptions,
    ) -> None:
        self.identity, self.instruction, self.max_tokens = identity, instruction, options.max_tokens
        self.layers, self.n_layer, self.n_embd = layers, model.n_layer, model.n_embd
        self.texts = [row.text for row in sample.rows]
        numbers = {label: number for number, label in enumerate(sample.labels)}
        self.labels = np.array([numbers[row.label] for row in sample.rows], np.int64)
        tokens = [message_tokens(model, text, options.max_tokens) for text in self.texts]
        self.n_cut = sum(n_cut > 0 for _, n_cut in tokens)
        self.tokens = [kept for kept, _ in tokens]
        self.n_tokens = np.array([len(t) for t in self.tokens], np.int64)
        prefix = prefix_tokens(model, instruction)
        if not prefix:
            raise UsageError("the instruction has no tokens", "give some text, or none to have one made of the labels")
        longest = model.n_ctx_train - len(prefix)
        if options.max_tokens > longest:
            raise UsageError(
                f"messages of {options.max_tokens} tokens do not fit behind the instruction's {len(prefix)}: "
                f"the model was trained on {model.n_ctx_train}",
                f"use a --max-tokens of {max(1, longest)} or less, or a shorter --instruction",
            )
        build = library_hash()
        self._keys = [message_key(t) for t in self.tokens]
        folder = (options.cache or cache_dir()) / "states"
        self.cache = StateCache(
            folder, layers, model.n_embd, {"model": identity.sha256, "build": build, "prefix": list(prefix)}
        )
        store = PrefixStore(cache_dir() / "prefixes", identity.sha256, build)
        self._trunk = Trunk(model, layers, prefix, trunk_options(options.max_tokens, options.n_threads), store)

    def collect(self, reporter: Reporter) -> None:
        reporter.say(f"computing hidden states up to layer {self.layers[-1]}")
        try:
            collect(self._trunk, self.tokens, self.cache, reporter.progress)
        finally:
            self._trunk.close()

    def pooled(self, layer: int, kind: str, rows: Rows) -> Floats:
        """(len(rows), n_embd)."""
        return self.cache.read([self._keys[i] for i in rows], layer, kind)


def _objective_for(sample: Sample) -> Literal["accuracy", "macro-f1"]:
    counts = _counts(sample)
    return "macro-f1" if max(counts.values()) > _IMBALANCED * min(counts.values()) else "accuracy"


def _counts(sample: Sample) -> dict[str, int]:
    counts = dict.fromkeys(sample.labels, 0)
    for row in sample.rows:
        counts[row.label] += 1
    return counts


def _describe(sample: Sample, data: _Data, parts: Sequence[Rows]) -> dict[str, Any]:
    return {
        "messages": len(sample.rows),
        "by_label": _counts(sample),
        "by_label_in_file": sample.totals,
        "duplicates_left_out": sample.n_duplicates,
        "conflicting_left_out": sample.n_conflicting,
        "longer_than_max_tokens": data.n_cut,
        "mean_tokens": round(float(data.n_tokens.mean()), 1),
        "training": len(parts[0]),
        "calibration": len(parts[1]),
        "test": len(parts[2]),
    }


# ── fitting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Fitted:
    """All that was fitted on the training rows."""

    ngrams: Any
    probes: list[Probe]
    full: Probe | None  # sees all stages; also the last of `probes` where it gains
    plain_full: Probe | None
    words: Any
    states: StateNovelty | None
    out_of_fold: list[Floats]  # calibrated probabilities of each stage
    losses: dict[str, float]
    trials: list[dict[str, Any]]

    @property
    def last_out_of_fold(self) -> Floats:
        return self.out_of_fold[-1]

    def evidence(self, data: _Data, rows: Rows) -> Evidence:
        """What the stages say of other rows."""
        texts = [data.texts[i] for i in rows]
        raw = [self.ngrams.scores(texts)]
        stages = [self.ngrams.probabilities(raw[0])]
        full: Floats | None = None

        def ask(probe: Probe, earlier: list[Floats]) -> Floats:
            pooled = np.concatenate([data.pooled(probe.layer, kind, rows) for kind in probe.pools], axis=1)
            return probe.scores(pooled, [score_features(scores) for scores in earlier])

        for probe in self.probes:
            raw.append(ask(probe, raw))
            stages.append(probe.probabilities(raw[-1]))
        if self.full is not None:
            full = stages[-1] if self.probes and self.probes[-1] is self.full else None
            full = self.full.probabilities(ask(self.full, raw)) if full is None else full
        plain = None if self.plain_full is None else self.plain_full.probabilities(ask(self.plain_full, []))
        new_shares = self.words.new_shares(texts)
        held = [self.words.unfamiliar(new_shares)]
        novelty = None
        if self.states is not None:
            means = data.pooled(self.probes[0].layer, "mean", rows)
            novelty = self.states.scores(means, data.n_tokens[rows], new_shares)
            held += [held[0] | (novelty > 1)] * len(self.probes)
        return Evidence(stages, full, plain, held, novelty, data.labels[rows])

    def pack(
        self,
        name: str,
        labels: tuple[str, ...],
        data: _Data,
        weights: Floats,
        setting: Setting,
        calibration: Evidence,
    ) -> LabelPack:
        return LabelPack(
            name=name,
            labels=labels,
            instruction=data.instruction,
            max_tokens=data.max_tokens,
            model=data.identity,
            ngrams=self.ngrams,
            probes=tuple(self.probes),
            weights=weights,
            thresholds=setting.thresholds,
            unsure_below=setting.unsure_below,
            words=self.words,
            states=self.states,
            references=_references(calibration, weights, setting),
            report={},
        )


def _fit(data: _Data, rows: Rows, boundaries: tuple[int, ...], options: TrainOptions, reporter: Reporter) -> _Fitted:
    labels, texts = data.labels[rows], [data.texts[i] for i in rows]
    n_labels = int(data.labels.max()) + 1
    n_models = 6 + 11 * len(data.layers) + (11 if options.full_depth else 0)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        reporter.progress(min(done, n_models), n_models)

    bits = 17
    while bits > 10 and n_labels * 2**bits > _MAX_TABLE:
        bits -= 1
    fitter = StackFitter(labels, n_labels, step, options.seed)
    linear, temperature = fitter.fit_ngrams(ngram_rows(texts, bits), 2**bits)
    ngrams = quantise(linear, bits, temperature)
    losses = {"before the network": fitter.loss_of(fitter.stages[-1])}

    def fit_layer(fitter: StackFitter, layer: int) -> Probe:
        held: dict[str, Floats] = {}

        def pooled(kind: str) -> Floats:
            if kind not in held:
                held[kind] = data.pooled(layer, kind, rows)
            return held[kind]

        return fitter.fit_probe(fitter.choose_pools(layer, pooled), pooled)

    probes: list[Probe] = []

    def keep_if_worth(probe: Probe) -> None:
        before = probes[-1].layer if probes else 0
        if fitter.drop_unless_worth((probe.layer - before) / data.n_layer):
            probes.append(probe)
            losses[f"layer {probe.layer}"] = fitter.loss_of(fitter.stages[-1])

    for layer in boundaries:
        keep_if_worth(fit_layer(fitter, layer))
    full = plain = None
    if options.full_depth:
        full = fit_layer(fitter, data.n_layer)
        losses["full depth, all stages"] = fitter.loss_of(fitter.stages[-1])
        keep_if_worth(full)
        alone = StackFitter(labels, n_labels, step, options.seed)
        plain = fit_layer(alone, data.n_layer)
        losses["full depth alone"] = alone.loss_of(alone.stages[-1])
    kept = [stage.probabilities for stage in fitter.stages]
    words, new_shares = fit_word_novelty(texts)
    states = None
    if probes:
        states = fit_state_novelty(data.pooled(probes[0].layer, "mean", rows), data.n_tokens[rows], new_shares)
    return _Fitted(
        ngrams=ngrams,
        probes=probes,
        full=full,
        plain_full=plain,
        words=words,
        states=states,
        out_of_fold=kept,
        losses={key: round(loss, 4) for key, loss in losses.items()},
        trials=[{"layer": t.layer, "pools": t.pools, "log_loss": round(t.loss, 4)} for t in fitter.trials],
    )


# ── thresholds ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(fitted: _Fitted, weights: Floats, truth: Labels, objective: str, options: TrainOptions) -> list[Setting]:
    """Settings from the safest to the boldest, made from training rows only."""
    weighed = [weigh(p, weights) for p in fitted.out_of_fold]
    counts = np.bincount(truth, minlength=len(weights))
    row_weights = np.ones(len(truth), np.float32)
    if objective == "macro-f1":
        row_weights = (len(truth) / (len(counts) * np.maximum(counts, 1)))[truth].astype(np.float32)
    losses = [-np.log(np.maximum(p[np.arange(len(truth)), truth], _LEAST)) for p in fitted.out_of_fold]
    levels = [level for level in LEVELS if level <= options.max_harm]
    excess = [loss - losses[-1] for loss in losses]
    thresholds = candidates(weighed, truth, levels, row_weights, excess)
    plain = [Setting(t, 0.0, level) for t, level in zip(thresholds, (float("nan"), *levels), strict=True)]
    if options.guarantee.kind == "depth":
        return plain
    safe = sum(level <= _SAFE_LEVEL for level in levels)
    abstaining = [Setting(thresholds[safe], float(u), plain[safe].level) for u in _ABSTENTION]
    first = _surest(abstaining, weighed, fitted.out_of_fold, truth, options.guarantee.bound)
    return abstaining[first:] + plain[safe + 1 :]


def _surest(
    settings: Sequence[Setting], weighed: Sequence[Floats], stages: Sequence[Floats], truth: Labels, bound: float
) -> int:
    """Which of settings that abstain less and less is the likeliest to be certified, by the training rows.

    It need not be the first: one that answers few messages cannot be certified, however right it is.
    """
    outcome = run(weighed, settings[0].thresholds)
    confidence = left_with(outcome, stages)[np.arange(len(truth)), outcome.labels]
    p_values = []
    for setting in settings:
        answered = confidence >= setting.unsure_below
        n = round(_CALIBRATION * int(answered.sum()))
        errors = round(_CALIBRATION * int((answered & (outcome.labels != truth)).sum()))
        p_values.append(binomial_p_value(min(errors, n), n, bound))
    return int(np.argmin(p_values))


def certify(
    settings: Sequence[Setting], rows: Evidence, weights: Floats, guarantee: Guarantee
) -> tuple[int, Certificate]:
    """The boldest setting that is certified on `rows`, and its certificate; the safest, not certified, if none is."""
    # bets are made on one message after the other: in a file sorted by label, the first would decide for all
    rows = rows.part(np.random.default_rng(0).permutation(len(rows.truth)))
    full_right = None
    if guarantee.kind == "depth":
        assert rows.full is not None
        full_right = weigh(rows.full, weights).argmax(axis=1) == rows.truth

    def test(index: int) -> tuple[float, float, int]:
        """P-value, risk, and messages it was seen on."""
        outcome, answered = apply(settings[index], rows, weights)
        wrong = outcome.labels != rows.truth
        if full_right is not None:
            loss = wrong.astype(np.float64) - ~full_right
            return (
                betting_p_value(loss, guarantee.bound, -1.0, 1.0, delta=guarantee.delta),
                float(loss.mean()),
                len(loss),
            )
        errors, n = int((wrong & answered).sum()), int(answered.sum())
        return binomial_p_value(errors, n, guarantee.bound), errors / max(1, n), n

    count = fixed_sequence(lambda index: test(index)[0], len(settings), guarantee.delta)
    chosen = max(0, count - 1)
    p_value, risk, n = test(chosen)
    kind = "loss of accuracy against full depth" if guarantee.kind == "depth" else "error rate"
    return chosen, Certificate(kind, guarantee.bound, guarantee.delta, n, risk, p_value, count > 0)


def apply(setting: Setting, rows: Evidence, weights: Floats) -> tuple[Outcome, NDArray[np.bool_]]:
    """Send rows through the stages: where each leaves with which label, and whether it is answered (not UNSURE)."""
    outcome = run([weigh(stage, weights) for stage in rows.stages], setting.thresholds, rows.held)
    probabilities = left_with(outcome, rows.stages)
    answered = probabilities[np.arange(len(rows.truth)), outcome.labels] >= setting.unsure_below
    return outcome, answered


def left_with(outcome: Outcome, stages: Sequence[Floats]) -> Floats:
    """Probabilities (n, n_labels) of the stage at which each message left."""
    return np.stack(stages)[outcome.stages, np.arange(len(outcome.stages))]


def _references(rows: Evidence, weights: Floats, setting: Setting) -> dict[str, Reference]:
    found = {CONFIDENCE: reference_of(weigh(rows.stages[0], weights).max(axis=1))}
    if rows.novelty is not None:
        outcome, _ = apply(setting, rows, weights)
        arrived = outcome.stages > 0
        if arrived.any():
            found[DISTANCE] = reference_of(rows.novelty[arrived])
    return found


# ── report ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_evidence(pack: LabelPack, rows: Evidence) -> dict[str, Any]:
    """Each stage alone, the cascade, and full depth, on held-out rows."""
    setting = Setting(pack.thresholds, pack.unsure_below, float("nan"))
    outcome, answered = apply(setting, rows, pack.weights)
    n_stages = len(rows.stages)
    shares = np.bincount(outcome.stages, minlength=n_stages) / max(1, len(rows.truth))
    names = ["before the network", *(f"layer {layer}" for layer in pack.layers[1:])]
    found: dict[str, Any] = {
        name: quality(pack, stage, weigh(stage, pack.weights).argmax(axis=1), rows.truth)
        for name, stage in zip(names, rows.stages, strict=True)
    }
    if rows.plain_full is not None:
        decided = weigh(rows.plain_full, pack.weights).argmax(axis=1)
        found["full depth alone"] = quality(pack, rows.plain_full, decided, rows.truth)
    if rows.full is not None:
        found["full depth, all stages"] = quality(
            pack, rows.full, weigh(rows.full, pack.weights).argmax(axis=1), rows.truth
        )
    found["cascade"] = {
        **quality(pack, left_with(outcome, rows.stages), outcome.labels, rows.truth),
        "left_at": {name: round(float(share), 4) for name, share in zip(names, shares, strict=True)},
        "mean_layer": round(float(shares @ np.array(pack.layers)), 2),
        "unsure": round(1 - float(answered.mean()), 4),
        "unfamiliar": round(float(rows.held[-1].mean()), 4),
    }
    return found


def quality(pack: LabelPack, probabilities: Floats, decided: Labels, truth: Labels) -> dict[str, Any]:
    """Accuracy, macro-F1, calibration error, and per label precision, recall and AUROC (label against the rest)."""
    n_labels = len(pack.labels)
    table = confusion(truth, decided, n_labels)
    precision, recall = precision_recall(table)
    confidence = probabilities[np.arange(len(truth)), decided]
    right = decided == truth
    return {
        "accuracy": round(float(right.mean()), 4),
        "macro_f1": round(macro_f1(truth, decided, n_labels), 4),
        "calibration_error": round(calibration_error(confidence, right), 4),
        "labels": {
            label: {
                "precision": round(float(precision[k]), 4),
                "recall": round(float(recall[k]), 4),
                "auroc": round(auroc(truth == k, probabilities[:, k]), 4),
            }
            for k, label in enumerate(pack.labels)
        },
    }


def _messages_needed(guarantee: Guarantee) -> int:
    """Smallest number of calibration messages that, all without loss, would certify it."""
    bound, delta = guarantee.bound, guarantee.delta
    enough = messages_needed(bound, delta)
    if guarantee.kind == "error":
        return enough

    def certifies(n: int) -> bool:
        return betting_p_value(np.zeros(n), bound, -1.0, 1.0, delta=delta) <= delta

    while not certifies(enough):
        enough *= 2
    return bisect_left(range(enough), True, key=certifies)


def _plain(certificate: Certificate, guarantee: Guarantee) -> dict[str, Any]:
    return {
        "kind": certificate.kind,
        "bound": certificate.bound,
        "delta": certificate.delta,
        "messages": certificate.n,
        "risk": round(certificate.risk, 5),
        "p_value": round(certificate.p_value, 6),
        "holds": certificate.holds,
        "messages_needed": _messages_needed(guarantee),
    }
