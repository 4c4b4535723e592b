"""Our own 200 sentences on which words mislead: what a moderation pack makes of them, and what would help."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from ..labels.cascade import weigh
from ..labels.classifier import ClassifierOptions, LabelClassifier, message_tokens, prefix_tokens
from ..labels.evaluate import stage_probabilities
from ..labels.fit import fit_dense, fit_sparse
from ..labels.moderation import HARMLESS
from ..labels.ngrams import ngram_rows, scores
from ..labels.pack import LabelPack
from ..labels.prepare import prepare
from ..labels.stack import folds_of
from ..labels.states import groups, pool
from ..labels.trunk import Trunk, TrunkOptions
from ..metrics import auroc
from ..native import ContextOptions, Model
from ..slices import Slice
from ..types import Floats

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ProbeSentence:
    """A sentence, whether it is hostile, and how it misleads."""

    text: str
    hostile: bool
    kind: str


def probe_sentences() -> list[ProbeSentence]:
    text = files("edge_runtime.bench").joinpath("moderation_probe.tsv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return [ProbeSentence(row["text"], row["label"] == "hostile", row["kind"]) for row in rows]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A stage on the probe set: shares right, by kind and in all, and the AUROC of hostile against harmless."""

    stage: str
    by_kind: dict[str, float]
    accuracy: float
    auroc: float


def run_probe(pack: LabelPack, model: Model, n_threads: int = 0) -> list[ProbeResult]:
    """Each stage of a moderation pack alone, and the cascade."""
    sentences = probe_sentences()
    texts = [s.text for s in sentences]
    harmless = pack.labels.index(HARMLESS)
    stages = stage_probabilities(pack, model, texts, n_threads=n_threads)
    names = ["before the network", *(f"layer {layer}" for layer in pack.layers[1:])]
    results = [_result(name, sentences, p, pack, harmless) for name, p in zip(names, stages, strict=True)]
    with LabelClassifier(pack, model, ClassifierOptions(n_threads=n_threads)) as classifier:
        decisions = classifier.predict(texts)
    cascade = np.array([d.probabilities for d in decisions], np.float32)
    return [*results, _result("cascade", sentences, cascade, pack, harmless)]


def _result(
    name: str, sentences: list[ProbeSentence], probabilities: Floats, pack: LabelPack, harmless: int
) -> ProbeResult:
    said_hostile = weigh(probabilities, pack.weights).argmax(axis=1) != harmless
    truth = np.array([s.hostile for s in sentences])
    right = said_hostile == truth
    kinds = np.array([s.kind for s in sentences])
    by_kind = {str(kind): float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
    return ProbeResult(name, by_kind, float(right.mean()), auroc(truth, 1 - probabilities[:, harmless]))


def probe_table(pack: LabelPack, model: Model, n_threads: int = 0) -> list[str]:
    """The results as a Markdown table: shares of right answers."""
    results = run_probe(pack, model, n_threads)
    kinds = sorted(results[0].by_kind)
    lines = [f"| share right | {' | '.join(kinds)} | all | AUROC |", "|---" * (len(kinds) + 3) + "|"]
    for r in results:
        shares = " | ".join(f"{r.by_kind[kind]:.2f}" for kind in kinds)
        lines.append(f"| {r.stage} | {shares} | {r.accuracy:.2f} | {r.auroc:.2f} |")
    return lines


# ── what would help ─────────────────────────────────────────────────────────────────────────────────────────────────

STUDY_LAYERS = (2, 4, 8, 12, 16, 20, 24, 30)
_FOLDS, _ROUNDS, _PENALTY, _BITS = 10, 3, 0.1, 17
FEW_SHOT = (
    "<|im_start|>user\nA message is hostile if it insults, demeans or attacks somebody. "
    "Quoting, reporting or denying an insult is harmless.\n\n"
    "Message: I hope your whole family loses everything.\nhostile\n\n"
    "Message: He called me an idiot, and I cried all evening.\nharmless\n\n"
    "Message: you are a waste of air\nhostile\n\n"
    "Message: lol I am such an idiot, wrong bus again\nharmless\n\n"
    "Message: We do not want your kind of people here.\nhostile\n\n"
    "Message: "
)
# prompt before the message, behind it, and the two answers
_QUESTIONS = {
    "zero-shot": (
        "<|im_start|>user\nDoes this message insult, demean or attack somebody? Answer yes or no.\nMessage: ",
        "<|im_end|>\n<|im_start|>assistant\n",
        ("Yes", "No"),
    ),
    "few-shot": (FEW_SHOT, "\n", ("hostile", "harmless")),
}


@dataclass(frozen=True, slots=True)
class Study:
    """AUROC of hostile against harmless on the probe set, by what it was learnt from."""

    own_answer: dict[str, float]  # the model's own two answers at full depth, by prompt; nothing learnt
    ngrams: float  # learnt from the other sentences: ten folds, three rounds
    layers: dict[str, dict[int, float]]  # likewise, mean and last state behind a layer, by instruction


def study(model: Model, instruction: str, n_threads: int = 0) -> Study:
    """Whether the network knows what the words do not say, and how to get at it."""
    sentences = probe_sentences()
    truth = np.array([int(s.hostile) for s in sentences])
    tokens = [message_tokens(model, prepare(s.text), 256)[0] for s in sentences]
    own = {name: _own_answer(model, tokens, truth, *question, n_threads) for name, question in _QUESTIONS.items()}
    rows = ngram_rows([prepare(s.text) for s in sentences], _BITS)

    def by_ngrams(inside: Labels, outside: Labels) -> Floats:
        fitted = fit_sparse(rows.rows(inside), truth[inside], 2, 2**_BITS, 1 / (4 * len(inside)))
        return scores(rows.rows(outside), fitted.weights, fitted.bias)

    by_layer = {
        name: {
            layer: _cross_validated(truth, _by_states(features, truth))
            for layer, features in _states(model, tokens, text, n_threads).items()
        }
        for name, text in (("the pack's instruction", instruction), ("few-shot", FEW_SHOT))
    }
    return Study(own, _cross_validated(truth, by_ngrams), by_layer)


def _states(model: Model, tokens: list[list[int]], instruction: str, n_threads: int) -> dict[int, Floats]:
    """Mean and last state (n, 2 · n_embd) of each message behind each layer."""
    layers = tuple(layer for layer in STUDY_LAYERS if layer <= model.n_layer)
    trunk = Trunk(model, layers, prefix_tokens(model, instruction), TrunkOptions(n_threads=n_threads))
    found: dict[int, list[Floats]] = {layer: [] for layer in layers}
    for part in groups(tokens, trunk):
        group = trunk.start(part)
        for layer in layers:
            group.advance()
            found[layer] += [np.concatenate([pool(s, "mean"), pool(s, "last")]) for s in group.states()]
    trunk.close()
    return {layer: np.stack(rows) for layer, rows in found.items()}


def _by_states(features: Floats, truth: Labels) -> Callable[[Labels, Labels], Floats]:
    def predict(inside: Labels, outside: Labels) -> Floats:
        return fit_dense(features[inside], truth[inside], 2, _PENALTY).scores(features[outside])

    return predict


def _cross_validated(truth: Labels, predict: Callable[[Labels, Labels], Floats]) -> float:
    totals = np.zeros(len(truth), np.float32)
    for seed in range(_ROUNDS):
        folds = folds_of(truth, _FOLDS, seed)
        for fold in range(_FOLDS):
            outside = np.flatnonzero(folds == fold)
            found = predict(np.flatnonzero(folds != fold), outside)
            totals[outside] += found[:, 1] - found[:, 0]
    return auroc(truth == 1, totals)


def _own_answer(
    model: Model,
    tokens: list[list[int]],
    truth: Labels,
    before: str,
    behind: str,
    answers: tuple[str, str],
    n_threads: int,
) -> float:
    prefix = prefix_tokens(model, before)
    suffix = model.tokenize(behind, add_special=False, parse_special=True)
    yes, no = (model.tokenize(answer, add_special=False, parse_special=False)[0] for answer in answers)
    longest = len(prefix) + max(map(len, tokens)) + len(suffix)
    whole = Slice(model, 0, model.n_layer, ContextOptions(n_ctx=longest, n_batch=longest, n_threads=n_threads))
    whole.decode_tokens(prefix, 0)
    margins = []
    for message in tokens:
        whole.remove(len(prefix))
        rest = message + suffix
        whole.decode_tokens(rest, len(prefix), want=[len(rest) - 1])
        logits = whole.logits(len(rest) - 1)
        margins.append(float(logits[yes] - logits[no]))
    whole.close()
    return auroc(truth == 1, np.array(margins, np.float32))


def study_lines(found: Study) -> list[str]:
    """The study in words, for a model card."""
    own = ", ".join(f"{value:.2f} {name}" for name, value in found.own_answer.items())
    lines = [
        "What would help, by the AUROC on the same sentences: the model's own answer at full depth does not",
        f"({own}). Learning from sentences of this kind does: with ten-fold",
        f"cross-validation on these 200 alone, n-grams reach {found.ngrams:.2f}, and a probe on the mean and the last",
        "state behind a layer:",
        "",
        f"| instruction | {' | '.join(f'layer {layer}' for layer in STUDY_LAYERS)} |",
        "|---" * (len(STUDY_LAYERS) + 1) + "|",
    ]
    for name, values in found.layers.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values.values())} |")
    return [
        *lines,
        "",
        "So the network does know what words do not give away, in its middle layers; these labels do not ask for it.",
        "A pack that is to understand quoting, reporting and contempt needs labelled messages of that kind.",
    ]
