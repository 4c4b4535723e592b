"""How sure a model is of an answer: several short answers to one question, and whether they mean the same.

    question ──► N samples ──► clusters of one meaning ──► entropy over the clusters ──► Confidence
               (sampler.py)       (grouping.py)                 (scores.py)           (confidence.py)

Semantic entropy: Kuhn, Gal, Farquhar 2023, arXiv 2302.09664; Farquhar et al. 2024, Nature 630.
"""

from __future__ import annotations

from .confidence import Cluster, Confidence, ConfidenceSettings, Cost, Stopped, estimate
from .entailment import Entailment
from .forms import form
from .grouping import ByForm, ByMeaning, Grouping, embedding_similarity
from .sampler import AnswerSampler, AnswerSource, Sample, SampleSettings

__all__ = [
    "AnswerSampler",
    "AnswerSource",
    "ByForm",
    "ByMeaning",
    "Cluster",
    "Confidence",
    "ConfidenceSettings",
    "Cost",
    "Entailment",
    "Grouping",
    "Sample",
    "SampleSettings",
    "Stopped",
    "embedding_similarity",
    "estimate",
    "form",
]
