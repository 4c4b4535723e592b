"""What the benchmarks of exit packs run on: prompts the pack never saw, engines side by side, one answer at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..draft import BoundaryView, DraftSource, Guess
from ..engine import Engine
from ..errors import PackError
from ..exits.pack import ExitPack
from ..exits.prompts import Request, builtin_requests
from ..exits.source import PackHeads
from ..exits.split import split
from ..native import ContextOptions, Model
from ..sampling import Sampler
from ..slices import close_slices, default_threads, open_slices
from ..types import Audit, EngineSettings, Floats, Mode, SamplingSettings, Step, Thresholds
from .exit_prompts import pack_requests

KINDS = ("chat", "summarize", "rewrite")
_SHINGLE = 12  # words; longer than what two tasks share but for their text
_PER_KIND = 16  # requests drawn for one of a kind that is kept
_GREEDY = SamplingSettings()


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def held_out_requests(data: Path | None, per_kind: int, seen: Sequence[Request], seed: int) -> dict[str, list[Request]]:
    """`per_kind` requests of each kind that have no 12 words in a row in common with `seen`, nor are any of them.

    Without a data folder there are questions of chat only. Those combine topics and tasks anew: a topic or a task
    alone may well be in `seen`. Fewer are given where there are not as many.
    """
    n = _PER_KIND * per_kind
    drawn = pack_requests(data, n, seed) if data else builtin_requests(n, seed)
    known = {request.text for request in seen}
    runs = set().union(*(_shingles(request.text) for request in seen))
    kept: dict[str, list[Request]] = {kind: [] for kind in (KINDS if data else KINDS[:1])}
    for request in drawn:
        place = kept.get(request.group)
        if place is None or len(place) == per_kind or request.text in known:
            continue
        if runs.isdisjoint(_shingles(request.text)):
            place.append(request)
    return kept


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)}


# ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Listener:
    """A draft source whose guesses are written down: by position of the token guessed, then by boundary.

    A mute one lets nothing exit, so that every boundary is heard on every token of full-depth text.
    """

    def __init__(self, source: DraftSource, *, mute: bool = False) -> None:
        self.said: dict[int, dict[int, tuple[float, int]]] = {}  # … → (uncertainty, likeliest token)
        self.wants_logits, self.wants_states = source.wants_logits, source.wants_states
        self.speaks_at, self.observe, self.forget = source.speaks_at, source.observe, source.forget
        self._source, self._mute = source, mute

    def guess(self, view: BoundaryView) -> Guess | None:
        found = self._source.guess(view)
        if found is None:
            return None
        best = int(found.logits.argmax())
        top = best if found.ids is None else int(found.ids[best])
        self.said.setdefault(len(view.tokens), {})[view.boundary] = found.uncertainty, top
        return dataclasses.replace(found, uncertainty=math.nan) if self._mute else found


class Rig:
    """A model in one piece and cut at a pack's boundaries, both open at once, and the pack's heads."""

    def __init__(
        self, path: Path, pack: ExitPack, options: ContextOptions, *, signal: str | None = None, cap: int = 8
    ) -> None:
        """Raises a ModelError, PackError, MemoryLimitError or LibraryError if something does not fit or open."""
        if pack.shared:
            raise PackError(
                f"the exit pack '{pack.name}' has no heads to measure", "give one made without --head shared"
            )
        n_threads = options.n_threads or default_threads()
        self.options = dataclasses.replace(options, n_threads=n_threads)
        self.path, self.pack, self.cap = path, pack, cap
        self.signal = signal or pack.default_signal
        self.head_paths = split(pack, path)
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(str(path)))
            self._whole = open_slices(self.model, (), self.options)
            opened.callback(close_slices, self._whole)
            self._cut = open_slices(self.model, pack.boundaries, self.options, n_outputs_max=cap + 1)
            opened.callback(close_slices, self._cut)
            self.heads = PackHeads(
                self.head_paths,
                pack.boundaries,
                pack.shortlist,
                pack.cluster_starts,
                pack.gates,
                self.signal,
                n_embd=self.model.n_embd,
                n_ctx=self.options.n_ctx,
                n_threads=n_threads,
            )
            opened.callback(self.heads.close)
            self._opened = opened.pop_all()

    def full(self, sampling: SamplingSettings = _GREEDY) -> Engine:
        """Mode full, the model in one piece. Engines that are made of the same piece are used one after another."""
        self._whole[0].remove(0)
        return Engine(self._whole, self._sampler(sampling), EngineSettings(), lambda: Thresholds(()))

    def exits(
        self,
        mode: Mode,
        thresholds: Sequence[float],
        sampling: SamplingSettings = _GREEDY,
        *,
        audit_rate: float = 0.0,
        listener: Listener | None = None,
    ) -> Engine:
        """The model cut, with the pack's heads, or a `listener` of theirs; used one after another as well."""
        for piece in self._cut:
            piece.remove(0)
        self.heads.forget(0)
        settings = EngineSettings(mode, self.cap, audit_rate)
        limits = Thresholds(tuple(thresholds))
        return Engine(self._cut, self._sampler(sampling), settings, lambda: limits, listener or self.heads)

    def _sampler(self, sampling: SamplingSettings) -> Sampler:
        sampler = Sampler(sampling, self.model.n_vocab)
        self._opened.callback(sampler.close)
        return sampler

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Answer:
    """One text, how it came about, and what it cost."""

    tokens: tuple[int, ...]
    steps: tuple[Step, ...]
    audits: tuple[Audit, ...]
    decode_s: float  # of all its tokens, the prompt being computed before
    settles: int
    drafted: int  # drafts sent to verification, those behind a refused one among them


def answer(engine: Engine, prompt: Sequence[int], max_tokens: int, is_end: Callable[[int], bool]) -> Answer:
    """Answer `prompt` from an empty cache and the sampler's first random number; the end token belongs to the text.

    Every exit that is to be audited is, those at the very end after the clock has stopped. Random numbers of audits go
    on from text to text.
    """
    engine.rollback(0)
    engine.sampler.reset()
    engine.extend(prompt)
    engine.settle()
    settles, drafted = engine.stats.settles, engine.stats.drafted
    steps: list[Step] = []
    started = time.perf_counter()
    with closing(engine.generate(max_tokens)) as run:
        for step in run:
            steps.append(step)
            if is_end(step.token):
                break
    seconds = time.perf_counter() - started
    settles, drafted = engine.stats.settles - settles, engine.stats.drafted - drafted
    audits = [audit for step in steps for audit in step.audits]
    if engine.settings.mode is Mode.EXIT:
        engine.settle()
        # audits are handed out with the step that follows
        audits += [audit for step in engine.generate(1) for audit in step.audits]
    return Answer(tuple(s.token for s in steps), tuple(steps), tuple(audits), seconds, settles, drafted)


def tokens_per_second(
    engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int, is_end: Callable[[int], bool]
) -> float:
    """Over the answers to all prompts; what the prompts themselves cost is left out."""
    answers = [answer(engine, prompt, max_tokens, is_end) for prompt in prompts]
    return sum(len(a.tokens) for a in answers) / sum(a.decode_s for a in answers)


@dataclass(frozen=True, slots=True)
class Hearing:
    """What one boundary's head says on the tokens (m,) of full-depth greedy texts; no guess is NaN and wrong."""

    prompts: NDArray[np.int32]
    agree: NDArray[np.bool_]
    uncertainty: Floats

    @property
    def acceptance(self) -> Floats:
        """Greedy drafts are accepted where both agree."""
        return self.agree.astype(np.float32)


def hear(rig: Rig, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Hearing]:
    """Listen to every boundary along the full-depth greedy answers to `prompts`, drafts and exits off."""
    listener = Listener(rig.heads, mute=True)
    n = len(rig.pack.boundaries)
    engine = rig.exits(Mode.EXIT, [math.inf] * n, listener=listener)
    number: list[int] = []
    rows: list[list[tuple[float, bool]]] = []
    for i, prompt in enumerate(prompts):
        listener.said.clear()
        for step in answer(engine, prompt, max_tokens, rig.model.is_end).steps:
            said = listener.said.get(step.position, {})
            heard = [said.get(b, (math.nan, -1)) for b in range(1, n + 1)]
            rows.append([(uncertainty, top == step.token) for uncertainty, top in heard])
            number.append(i)
    return [
        Hearing(
            np.asarray(number, np.int32),
            np.asarray([row[b][1] for row in rows], np.bool_),
            np.asarray([row[b][0] for row in rows], np.float32),
        )
        for b in range(n)
    ]
