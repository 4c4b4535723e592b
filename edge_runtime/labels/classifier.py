"""A label pack at work: messages in, decisions out, as few layers as each message needs."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..cache import cache_dir
from ..errors import UsageError
from ..identity import identify
from ..models import find_model
from ..native import Model, library_hash
from ..types import Floats
from .cascade import leaves, weigh
from .decision import UNSURE, Decision
from .drift import Drift, DriftMonitor
from .pack import LabelPack
from .prefix import PrefixStore
from .prepare import prepare
from .stack import score_features
from .states import groups, pool
from .trunk import Trunk, TrunkOptions

_STREAM_BATCH = 64
CONFIDENCE, DISTANCE = "stage 0 confidence", "distance from the training messages"


@dataclass(frozen=True, slots=True)
class ClassifierOptions:
    """How a pack is used; thresholds of the pack apply where nothing else is said."""

    unsure_below: float | None = None  # a label less probable than this becomes UNSURE; None: as the pack says
    unsure_unfamiliar: bool = False  # and so does the label of a message unlike the training messages
    use_ngrams: bool = True  # False: no message leaves before the network
    full_cascade: bool = False  # every message goes through all stages
    n_threads: int = 0  # 0: all physical cores
    keep_prefix: bool = True  # in a file, over restarts

    def __post_init__(self) -> None:
        if self.unsure_below is not None and not 0 <= self.unsure_below <= 1:
            raise UsageError(f"{self.unsure_below} is not a probability", "allowed: from 0 to 1")


@dataclass(slots=True)
class ClassifierStats:
    """Counts since the classifier was made."""

    messages: int = 0
    unsure: int = 0
    unfamiliar: int = 0
    cut: int = 0  # messages longer than the pack takes
    by_stage: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Message:
    """One message on its way."""

    raw: list[Floats]  # uncalibrated scores (n_labels,) of the stages so far
    new_share: float  # of its words
    unfamiliar: bool
    novelty: float | None = None
    n_cut: int = 0


class LabelClassifier:
    """Decides messages with a pack and its model, which is loaded when the first message needs it.

    Threads may share one: they take turns at the model. Close it, or use it in a `with`.
    """

    def __init__(
        self, pack: LabelPack, model: str | Path | Model = "smollm2-135m", options: ClassifierOptions | None = None
    ) -> None:
        """`model` is a name, a path, or a Model already loaded, which stays open and must be of the pack's file.

        Raises PackError if the model is not the one the pack was made for, and what finding and reading it does.
        """
        self.pack, self.options = pack, options or ClassifierOptions()
        self.stats = ClassifierStats()
        below = self.options.unsure_below
        self._unsure_below = pack.unsure_below if below is None else below
        self._given = model if isinstance(model, Model) else None
        path = Path(model.path) if isinstance(model, Model) else find_model(str(model))
        self._identity = identify(path)
        pack.check_model(self._identity)
        self._path = path
        self._own: Model | None = None
        self._trunk: Trunk | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._monitors = {key: DriftMonitor(key, reference) for key, reference in pack.references.items()}
        self._drifts: list[Drift] = []

    # ── one batch ───────────────────────────────────────────────────────────────────────────────────────────────────

    def predict(self, texts: Sequence[str]) -> list[Decision]:
        """A decision for each text, in order. What a text gets does not depend on the others."""
        prepared = [prepare(text) for text in texts]
        if not prepared:
            return []
        raw = self.pack.ngrams.scores(prepared)
        weighed = weigh(self.pack.ngrams.probabilities(raw), self.pack.weights)
        new_shares = self.pack.words.new_shares(prepared)
        new_words = self.pack.words.unfamiliar(new_shares)
        messages = [_Message([raw[i]], float(new_shares[i]), bool(new_words[i])) for i in range(len(prepared))]
        leaving = leaves(weighed, self.pack.thresholds[0]) & ~new_words
        if not self.options.use_ngrams or self.options.full_cascade:
            leaving[:] = False
        # a text without anything in it has no tokens, and nothing for a network to read
        going = [i for i, text in enumerate(prepared) if text and not leaving[i]] if self.pack.probes else []
        with self._lock:
            self._check_open()
            if going:
                self._climb([prepared[i] for i in going], [messages[i] for i in going])
            decisions = [self._decide(message) for message in messages]
            for message, confidence in zip(messages, weighed.max(axis=1), strict=True):
                self._watch(message, float(confidence))
        return decisions

    def stream(self, texts: Iterable[str], batch: int = _STREAM_BATCH) -> Iterator[Decision]:
        """Decisions as texts come, `batch` of them at a time."""
        part: list[str] = []
        for text in texts:
            part.append(text)
            if len(part) >= batch:
                yield from self.predict(part)
                part = []
        yield from self.predict(part)

    async def predict_async(self, texts: Sequence[str]) -> list[Decision]:
        """As `predict`, in a thread, so that an event loop goes on meanwhile."""
        import asyncio  # three megabytes that only those need who run a loop

        return await asyncio.to_thread(self.predict, texts)

    async def stream_async(self, texts: AsyncIterable[str]) -> AsyncIterator[Decision]:
        """A decision for each text as it comes."""
        async for text in texts:
            for decision in await self.predict_async([text]):
                yield decision

    def take_drifts(self) -> list[Drift]:
        """Warnings raised since this was last asked."""
        with self._lock:
            drifts, self._drifts = self._drifts, []
        return drifts

    @property
    def n_open_slices(self) -> int:
        """Slices of the model opened so far: those that some message has reached."""
        return self._trunk.n_open if self._trunk else 0

    # ── through the network ─────────────────────────────────────────────────────────────────────────────────────────

    def _climb(self, texts: list[str], messages: list[_Message]) -> None:
        """Give each message the scores of the boundaries it reaches."""
        trunk = self._open_trunk()
        tokens = [self._tokenize(text, message) for text, message in zip(texts, messages, strict=True)]
        first = 0
        for part in groups(tokens, trunk):
            self._climb_together(trunk, part, messages[first : first + len(part)])
            first += len(part)

    def _climb_together(self, trunk: Trunk, tokens: Sequence[Sequence[int]], messages: list[_Message]) -> None:
        group = trunk.start(tokens)
        for stage, probe in enumerate(self.pack.probes, 1):
            group.advance()
            states = group.states()
            members = [messages[i] for i in group.members]
            pooled = np.stack([np.concatenate([pool(s, kind) for kind in probe.pools]) for s in states])
            if stage == 1 and self.pack.states is not None:
                means = np.stack([pool(s, "mean") for s in states])
                new_shares = np.array([message.new_share for message in members], np.float32)
                novelties = self.pack.states.scores(means, np.array([len(s) for s in states]), new_shares)
                for message, novelty in zip(members, novelties, strict=True):
                    message.novelty = float(novelty)
                    message.unfamiliar |= bool(novelty > 1)
            earlier = [score_features(np.stack([m.raw[i] for m in members])) for i in range(stage)]
            raw = probe.scores(pooled, earlier)
            for message, row in zip(members, raw, strict=True):
                message.raw.append(row)
            if stage == len(self.pack.probes):
                return
            leaving = leaves(weigh(self._probabilities(raw, stage), self.pack.weights), self.pack.thresholds[stage])
            stay = [
                i
                for i, message, leaves_here in zip(group.members, members, leaving, strict=True)
                if self.options.full_cascade or message.unfamiliar or not leaves_here
            ]
            if not stay:
                return
            group.keep(stay)

    def _probabilities(self, raw: Floats, stage: int) -> Floats:
        if stage == 0:
            return self.pack.ngrams.probabilities(raw)
        return self.pack.probes[stage - 1].probabilities(raw)

    def _decide(self, message: _Message) -> Decision:
        stage = len(message.raw) - 1
        probabilities = self._probabilities(message.raw[-1][None], stage)
        best = int(weigh(probabilities, self.pack.weights)[0].argmax())
        confidence = float(probabilities[0, best])
        likeliest = self.pack.labels[best]
        unsure = confidence < self._unsure_below or (message.unfamiliar and self.options.unsure_unfamiliar)
        stats = self.stats
        stats.messages += 1
        stats.unsure += unsure
        stats.unfamiliar += message.unfamiliar
        stats.cut += message.n_cut > 0
        stats.by_stage[stage] = stats.by_stage.get(stage, 0) + 1
        return Decision(
            label=UNSURE if unsure else likeliest,
            likeliest=likeliest,
            confidence=confidence,
            probabilities=tuple(map(float, probabilities[0])),
            stage=stage,
            layer=self.pack.layers[stage],
            novelty=message.novelty,
            unfamiliar=message.unfamiliar,
            n_cut=message.n_cut,
        )

    def _watch(self, message: _Message, confidence: float) -> None:
        for key, value in ((CONFIDENCE, confidence), (DISTANCE, message.novelty)):
            if value is not None and key in self._monitors:
                drift = self._monitors[key].add(value)
                if drift is not None:
                    self._drifts.append(drift)

    # ── model ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokenize(self, text: str, message: _Message) -> list[int]:
        tokens, message.n_cut = message_tokens(self._model, text, self.pack.max_tokens)
        return tokens

    @property
    def _model(self) -> Model:
        if self._given is not None:
            return self._given
        if self._own is None:
            self._own = Model(str(self._path))
        return self._own

    def _open_trunk(self) -> Trunk:
        if self._trunk is None:
            prefix = prefix_tokens(self._model, self.pack.instruction)
            store = None
            if self.options.keep_prefix:
                store = PrefixStore(cache_dir() / "prefixes", self._identity.sha256, library_hash())
            options = trunk_options(self.pack.max_tokens, self.options.n_threads)
            self._trunk = Trunk(self._model, tuple(p.layer for p in self.pack.probes), prefix, options, store)
        return self._trunk

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this classifier is closed", "open it again, or close it later")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._trunk is not None:
                self._trunk.close()
                self._trunk = None
            if self._own is not None:
                self._own.close()
                self._own = None

    def __enter__(self) -> LabelClassifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefix_tokens(model: Model, instruction: str) -> list[int]:
    """Tokens before each message."""
    return model.tokenize(instruction, add_special=True, parse_special=True)


def message_tokens(model: Model, text: str, max_tokens: int) -> tuple[list[int], int]:
    """Tokens of a prepared text, and how many were cut at its end.

    Special tokens written in a message are plain text. A text that a tokenizer drops as a whole reads as token 0.
    """
    tokens = model.tokenize(text, add_special=False, parse_special=False) or [0]
    return tokens[:max_tokens], max(0, len(tokens) - max_tokens)


def trunk_options(max_tokens: int, n_threads: int) -> TrunkOptions:
    """Room for the longest message, and for a few ordinary ones at once."""
    return TrunkOptions(n_tokens=max(256, max_tokens), n_threads=n_threads)
