"""Moderation: texts judged by the bundled label pack, one after the other on a thread of their own."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import EdgeError
from ..labels import Decision, LabelClassifier, LabelPack, find_pack
from ..labels.moderation import HARMLESS
from ..labels.packs import MODERATION
from ..models import DEMO_MODEL
from ..native import Model
from ..service.watchdog import Watchdog
from .errors import ApiError
from .metrics import Metrics

_MOST_WAITING = 8  # requests
_ALIASES = (MODERATION, "omni-moderation-latest", "text-moderation-latest")


class Moderation:
    """The pack and, from the first text on, its model: the one that is served, if the pack was made for it."""

    def __init__(
        self, served: Callable[[], Model | None], watchdog: Watchdog, metrics: Metrics, n_threads: int = 0
    ) -> None:
        """Raises PackError if the bundled pack is damaged."""
        self.pack = LabelPack.load(find_pack(MODERATION))
        self._served, self._watchdog, self._metrics, self._n_threads = served, watchdog, metrics, n_threads
        self._thread = ThreadPoolExecutor(1, "edge-moderation")
        self._classifier: LabelClassifier | None = None
        self._n_open = 0
        self._lock = threading.Lock()
        metrics.thresholds = {
            (str(stage), label): float(self.pack.thresholds[stage, i])
            for stage in range(len(self.pack.thresholds))
            for i, label in enumerate(self.pack.labels)
        }

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for the name of another model."""
        if name is not None and name not in (self.pack.name, *_ALIASES):
            raise ApiError(404, f"there is no moderation model {name[:80]!r}", param="model", code="model_not_found")

    async def judge(self, texts: Sequence[str], deadline_s: float | None) -> dict[str, Any]:
        """OpenAI's record of what the pack says. Raises ApiError; given up, it ends behind the text at hand."""
        with self._lock:
            if self._n_open >= _MOST_WAITING:
                raise ApiError(429, "too many requests wait already", code="queue_full", retry_after_s=2)
            self._n_open += 1
        given_up = threading.Event()
        try:
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._predict, texts, given_up)
            decisions = await asyncio.wait_for(work, deadline_s)
        except asyncio.TimeoutError:
            raise ApiError(504, "the texts were not judged in time", code="deadline_exceeded") from None
        except EdgeError as error:
            raise ApiError(503, f"moderation is not available: {error.message}", retry_after_s=60) from error
        finally:
            given_up.set()
            with self._lock:
                self._n_open -= 1
        return {
            "id": f"modr-{secrets.token_hex(12)}",
            "model": self.pack.name,
            "results": [self._result(decision) for decision in decisions],
        }

    def _predict(self, texts: Sequence[str], given_up: threading.Event) -> list[Decision]:
        decisions: list[Decision] = []
        with self._watchdog.work():
            for text in texts:
                if given_up.is_set():
                    return []
                if self._classifier is None:
                    self._classifier = self._open()
                decisions += self._classifier.predict([text])
                self._watchdog.tick()
                self._metrics.depth.labels(str(decisions[-1].layer)).inc()
            if self._classifier is not None:
                self._metrics.drifts.inc(len(self._classifier.take_drifts()))
        return decisions

    def _open(self) -> LabelClassifier:
        from ..labels import ClassifierOptions

        model, options = self._served(), ClassifierOptions(n_threads=self._n_threads)
        if model is not None:
            try:
                return LabelClassifier(self.pack, model, options)
            except EdgeError:
                pass  # made for another model, which is loaded beside the served one
        return LabelClassifier(self.pack, DEMO_MODEL, options)

    def _result(self, decision: Decision) -> dict[str, Any]:
        names = [label for label in self.pack.labels if label != HARMLESS]
        scores = dict(zip(self.pack.labels, decision.probabilities, strict=True))
        return {
            "flagged": decision.label in names,
            "categories": {name: decision.label == name for name in names},
            "category_scores": {name: round(scores[name], 6) for name in names},
            "category_applied_input_types": {name: ["text"] for name in names},
        }

    def close(self) -> None:
        """Behind the text at hand."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._classifier is not None:
            self._classifier.close()
            self._classifier = None
