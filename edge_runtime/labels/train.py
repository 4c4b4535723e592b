"""From labelled messages to a label pack.

Messages are split three ways: stages are fitted on the training part, thresholds are certified on the calibration
part, and the test part, which nothing else has seen, is what the report is about.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..cache import cache_dir
from ..errors import UsageError
from ..identity import ModelIdentity
from ..native import Model, library_hash
from ..reporter import Reporter
from ..templates import ChatTemplate, Message
from ..types import Floats, check_boundaries
from .cascade import decision_weights
from .classifier import message_tokens, prefix_tokens, trunk_options
from .dataset import Sample, split
from .ngrams import ngram_rows
from .novelty import StateNovelty, WordNovelty, fit_state_novelty, fit_word_novelty
from .pack import LabelPack, NgramStage, quantise
from .prefix import PrefixStore
from .report import certificate_record, describe_evidence
from .stack import Probe, StackFitter, score_features
from .states import StateCache, collect, message_key
from .thresholds import Evidence, Guarantee, Rows, Setting, certify, references_of, settings_of
from .trunk import Trunk

_DEPTHS = (1 / 15, 2 / 15, 1 / 5, 4 / 15, 2 / 5, 8 / 15)  # candidate boundaries, as shares of the layers
_IMBALANCED = 3.0  # the largest label's messages over the smallest's
_MARK = "\x00"
_MAX_TABLE = 800_000  # bytes of n-gram weights in a pack


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
    settings = settings_of(
        fitted.out_of_fold, weights, data.labels[parts[0]], objective, options.guarantee, options.max_harm
    )
    chosen, certificate = certify(settings, calibration, weights, options.guarantee)
    pack = fitted.pack(name, sample.labels, data, weights, settings[chosen], calibration)
    pack.report.update(
        data=_describe(sample, data, parts),
        objective=objective,
        certificate={"sentence": certificate.sentence(), **certificate_record(certificate, options.guarantee)},
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

    ngrams: NgramStage
    probes: list[Probe]
    full: Probe | None  # sees all stages; also the last of `probes` where it gains
    plain_full: Probe | None
    words: WordNovelty
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
            references=references_of(calibration, weights, setting),
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
