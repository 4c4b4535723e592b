"""Several conversations in one model, batched: the core under a service, without threads, queues or text."""

from __future__ import annotations

from .batch_engine import BatchEngine, BatchStats
from .request import Event, Failed, Finished, Question, Request, RequestStats, Token

__all__ = [
    "BatchEngine",
    "BatchStats",
    "Event",
    "Failed",
    "Finished",
    "Question",
    "Request",
    "RequestStats",
    "Token",
]
