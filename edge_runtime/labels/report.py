"""What a training has brought, as plain values for a pack's report."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from ..certify import Certificate, betting_p_value, messages_needed
from ..metrics import auroc, calibration_error, confusion, macro_f1, precision_recall
from ..types import Floats
from .cascade import weigh
from .pack import LabelPack
from .thresholds import Evidence, Guarantee, Labels, Setting, apply, left_with


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


def certificate_record(certificate: Certificate, guarantee: Guarantee) -> dict[str, Any]:
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
