"""Is a cascade as accurate as its best rivals? Held-out tweets, with TF-IDF + logistic regression beside it.

scikit-learn is needed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EdgeError
from ..labels.cascade import decision_weights, weigh
from ..labels.dataset import Sample, split
from ..labels.thresholds import Evidence, Guarantee, Setting, apply, certify, left_with
from ..labels.train import Trained
from ..metrics import auroc, macro_f1
from ..types import Floats

Labels = NDArray[np.int64]
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Rival:
    """One way of labelling the test messages: probabilities (n, n_labels), harm scores (n,), and labels (n,)."""

    name: str
    probabilities: Floats
    scores: Floats  # of being anything but harmless
    decided: Labels


@dataclass(frozen=True, slots=True)
class Quality:
    """AUROC of harmful against harmless on a balanced part of the test messages, and macro-F1 of all labels on all."""

    name: str
    auroc: float
    macro_f1: float
    accuracy: float


def rivals_of(trained: Trained, harmless: int) -> list[Rival]:
    """Every stage, the cascade, and the whole model, on the test messages."""
    pack, rows = trained.pack, trained.test

    def rival(name: str, probabilities: Floats) -> Rival:
        return Rival(name, probabilities, 1 - probabilities[:, harmless], weigh(probabilities, pack.weights).argmax(1))

    names = ["stage 0, n-grams", *(f"stage {i}, layer {layer}" for i, layer in enumerate(pack.layers) if i)]
    found = [rival(name, stage) for name, stage in zip(names, rows.stages, strict=True)]
    if rows.plain_full is not None and rows.full is not None:
        found += [rival("full-depth probe", rows.plain_full), rival("full depth, all stages", rows.full)]
    outcome, _ = apply(Setting(pack.thresholds, 0.0, float("nan")), rows, pack.weights)
    left = left_with(outcome, rows.stages)
    return [*found, Rival("cascade", left, 1 - left[:, harmless], outcome.labels)]


def tfidf_rivals(sample: Sample, harmless: int, seed: int) -> list[Rival]:
    """TF-IDF + logistic regression in many variants, fitted on the training part; also on harmful or not alone."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_union
    except ImportError:
        raise EdgeError(
            "this needs scikit-learn, which is not installed", "pip install 'edge-runtime[bench]'"
        ) from None
    inside, calibration, test = split(sample.rows, sample.labels, seed=seed)
    texts = [row.text for row in sample.rows]
    truth = np.array([sample.labels.index(row.label) for row in sample.rows])

    def characters(kind: str) -> Any:
        return TfidfVectorizer(analyzer=kind, ngram_range=(2, 5), sublinear_tf=True, min_df=2)

    def words() -> Any:
        return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)

    features = {
        "words": words(),
        "characters": characters("char_wb"),
        "characters and words": make_union(characters("char"), words()),
    }
    found = []
    for name, vectoriser in features.items():
        fitted = vectoriser.fit_transform([texts[i] for i in inside])
        held, tested = (vectoriser.transform([texts[i] for i in part]) for part in (calibration, test))
        for strength in (1, 4, 16):
            for balance in (None, "balanced"):
                options = {"C": strength, "class_weight": balance, "max_iter": 400}
                model = LogisticRegression(**options).fit(fitted, truth[inside])
                binary = LogisticRegression(**options).fit(fitted, truth[inside] != harmless)
                p = model.predict_proba(tested).astype(np.float32)
                label = f"TF-IDF {name}, C {strength}{', balanced' if balance else ''}"
                found.append(Rival(label, p, 1 - p[:, harmless], p.argmax(1)))
                harm = binary.predict_proba(tested)[:, 1].astype(np.float32)
                weights = decision_weights(model.predict_proba(held).astype(np.float32), truth[calibration], "macro-f1")
                found.append(Rival(f"{label}, tuned", p, harm, weigh(p, weights).argmax(1)))
    return found


def balanced_rows(truth: Labels, harmless: int, seed: int) -> Labels:
    """As many harmful messages as harmless ones, all of the rarer kind."""
    random = np.random.default_rng(seed)
    kinds = [np.flatnonzero(truth == harmless), np.flatnonzero(truth != harmless)]
    size = min(map(len, kinds))
    return np.concatenate([random.choice(kind, size, replace=False) for kind in kinds])


def qualities(rivals: Sequence[Rival], truth: Labels, harmless: int, seed: int) -> list[Quality]:
    rows, n_labels = balanced_rows(truth, harmless, seed), int(truth.max()) + 1
    return [
        Quality(
            rival.name,
            auroc(truth[rows] != harmless, rival.scores[rows]),
            macro_f1(truth, rival.decided, n_labels),
            float((rival.decided == truth).mean()),
        )
        for rival in rivals
    ]


def difference(ours: Rival, theirs: Rival, truth: Labels, harmless: int, seed: int) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals (95%) of ours minus theirs, paired by message: AUROC and macro-F1."""
    random, n_labels = np.random.default_rng(seed), int(truth.max()) + 1
    gains = []
    for _ in range(_RESAMPLES):
        rows = random.integers(0, len(truth), len(truth))
        harmful = truth[rows] != harmless
        gains.append(
            (
                auroc(harmful, ours.scores[rows]) - auroc(harmful, theirs.scores[rows]),
                macro_f1(truth[rows], ours.decided[rows], n_labels)
                - macro_f1(truth[rows], theirs.decided[rows], n_labels),
            )
        )
    low, high = np.quantile(np.array(gains), [0.025, 0.975], axis=0)
    return {"auroc": (float(low[0]), float(high[0])), "macro_f1": (float(low[1]), float(high[1]))}


@dataclass(frozen=True, slots=True)
class Splits:
    """How often a certified bound was broken over random calibration sets."""

    guarantee: Guarantee
    n_splits: int
    certified: int
    broken_in_pool: int  # true risk, of all messages, above the bound; calibration drawn from them with replacement
    broken_on_rest: int  # risk on the other half of the messages above the bound, their own noise not allowed for


def certification(
    trained: Trained, guarantee: Guarantee, settings: Sequence[Setting], n_splits: int, seed: int
) -> Splits:
    """Certify on random halves of the held-out messages, and look at the bound elsewhere.

    The settings stay as training made them. A bound is about the source of the messages: with all the held-out ones as
    that source, drawing from them with replacement, the true risk is known exactly. On the other half, which is itself
    a small sample, a bound that holds is exceeded by chance as well.
    """
    pool = _joined(trained.calibration, trained.test)
    n = len(pool.truth)
    random = np.random.default_rng(seed)
    weights = trained.pack.weights
    true_risks = [_risk(setting, pool, weights, guarantee) for setting in settings]
    certified = in_pool = on_rest = 0
    for _ in range(n_splits):
        drawn = random.integers(0, n, n // 2)
        chosen, certificate = certify(settings, pool.part(drawn), weights, guarantee)
        certified += certificate.holds
        in_pool += certificate.holds and true_risks[chosen] > guarantee.bound
        order = random.permutation(n)
        chosen, certificate = certify(settings, pool.part(order[: n // 2]), weights, guarantee)
        rest = _risk(settings[chosen], pool.part(order[n // 2 :]), weights, guarantee)
        on_rest += certificate.holds and rest > guarantee.bound
    return Splits(guarantee, n_splits, certified, in_pool, on_rest)


def _risk(setting: Setting, rows: Evidence, weights: Floats, guarantee: Guarantee) -> float:
    outcome, answered = apply(setting, rows, weights)
    wrong = outcome.labels != rows.truth
    if guarantee.kind == "error":
        return float((wrong & answered).sum() / max(1, answered.sum()))
    assert rows.full is not None
    return float(wrong.mean() - (weigh(rows.full, weights).argmax(1) != rows.truth).mean())


def _joined(first: Evidence, second: Evidence) -> Evidence:
    def both(a: Any, b: Any) -> Any:
        return None if a is None or b is None else np.concatenate([a, b])

    return Evidence(
        [both(a, b) for a, b in zip(first.stages, second.stages, strict=True)],
        both(first.full, second.full),
        both(first.plain_full, second.plain_full),
        [both(a, b) for a, b in zip(first.held, second.held, strict=True)],
        both(first.novelty, second.novelty),
        both(first.truth, second.truth),
    )
