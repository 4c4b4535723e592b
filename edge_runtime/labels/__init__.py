"""Label packs: text classifiers trained and run on a small device, with as few layers as each message needs.

with LabelClassifier(LabelPack.load(find_pack("moderation")), "smollm2-135m") as classifier:
    for decision in classifier.predict(["You are an idiot.", "See you tomorrow."]):
        print(decision.label, decision.confidence, decision.layer)
"""

from __future__ import annotations

from .classifier import ClassifierOptions, LabelClassifier
from .decision import UNSURE, Decision
from .pack import LabelPack
from .packs import find_pack

__all__ = ["UNSURE", "ClassifierOptions", "Decision", "LabelClassifier", "LabelPack", "find_pack"]
