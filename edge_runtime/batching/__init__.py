"""Several conversations in one model, batched: the core under a service, without threads, queues or text."""

from __future__ import annotations

from .batch_engine import BatchEngine
from .conversations import BatchStats, Conversations
from .exit_engine import ExitBatchEngine
from .request import Event, Failed, Finished, Question, Request, RequestStats, Token
from .sources import DraftSources, OwnSources

__all__ = [
    "BatchEngine",
    "BatchStats",
    "Conversations",
    "DraftSources",
    "Event",
    "ExitBatchEngine",
    "Failed",
    "Finished",
    "OwnSources",
    "Question",
    "Request",
    "RequestStats",
    "Token",
]
