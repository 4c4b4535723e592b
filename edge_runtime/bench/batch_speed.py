"""Conversations side by side and one after the other; a further turn with the KV cache of the first, and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from ..batch_costs import measurable_sizes, measure_batch_costs
from ..batching import BatchEngine, Question
from ..engine import Engine
from ..models import find_model
from ..native import ContextOptions, Model
from ..ngram import NGrams
from ..sampling import Sampler
from ..slices import Slice, default_threads
from ..templates import ChatTemplate, Message
from ..types import EngineSettings, Mode, SamplingSettings, Thresholds
from .turns import Countdown, Quartiles, in_turns, quartiles, ratios

N_BATCH = 128
_CAP = 15  # tokens of a draft at most
_FURTHER = "Thank you. Which part of it matters most?"


@dataclass(frozen=True, slots=True)
class TogetherResult:
    """Answers to as many prompts, prefill included, tokens per second over all of them."""

    drafts: bool
    n_tokens: int
    together: Quartiles
    in_turn: Quartiles
    ratio: Quartiles
    unlike: int  # texts that differ between the two: none with the edge kernels
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class FurtherTurnResult:
    """Milliseconds to the first token of a further turn."""

    prompt_tokens: int
    reused_tokens: int
    kept_ms: Quartiles  # the KV cache holds the turns before
    anew_ms: Quartiles
    ratio: Quartiles  # anew ÷ kept
    unlike: int  # repeats in which the first tokens differ


class BatchRig:
    """A model open twice: for `n` conversations side by side, and for one at a time. Use it in a `with`."""

    def __init__(self, model: str, n: int, *, n_ctx: int = 1024, n_threads: int = 0, kernels: str = "edge") -> None:
        """`n_ctx` of each conversation. Raises a ModelError, MemoryLimitError, UsageError or LibraryError."""
        self.n_threads = n_threads or default_threads()
        one = ContextOptions(n_ctx=n_ctx, n_batch=N_BATCH, n_threads=self.n_threads, flash_attention=True)
        self.options = many = replace(one, n_ctx=n * n_ctx, n_seq_max=n)
        self.path = find_model(model)
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(str(self.path), kernels=kernels))
            self._template = ChatTemplate.of(self.model)
            self._alone = Slice(self.model, 0, self.model.n_layer, one, n_outputs_max=_CAP + 1)
            opened.callback(self._alone.close)
            self.costs = measure_batch_costs([self._alone], measurable_sizes(_CAP + 1)).up_to(_CAP + 1)
            self.engine = opened.enter_context(BatchEngine(self.model, many, self.costs))
            self._opened = opened.pop_all()

    def chat(self, *texts: str) -> tuple[int, ...]:
        """A conversation, user and assistant in turn; the bare texts where the model has no chat template."""
        if self._template is None:
            return tuple(self.model.tokenize("\n".join(texts), add_special=True, parse_special=False))
        messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        rendered = self._template.render(messages)
        return tuple(self.model.tokenize(rendered, add_special=False, parse_special=True))

    def forget(self) -> None:
        """Let the next requests find nothing of those before."""
        for sequence in self.engine.pool.sequences:
            sequence.keep(0)

    def together(self, prompts: Sequence[Sequence[int]], max_tokens: int, drafts: bool) -> Answers:
        """All prompts submitted at once, from empty caches."""
        self.forget()
        start = time.perf_counter()
        requests = [self.engine.submit(Question(tuple(prompt), max_tokens, drafts=drafts)) for prompt in prompts]
        while not self.engine.idle:
            self.engine.step()
        seconds = time.perf_counter() - start
        counts = [(request.stats.drafted, request.stats.accepted) for request in requests]
        drafted, accepted = (sum(column) for column in zip(*counts, strict=True))
        return Answers([request.answer for request in requests], seconds, drafted, accepted)

    def in_turn(self, prompts: Sequence[Sequence[int]], max_tokens: int, drafts: bool) -> Answers:
        """One prompt after the other in the engine of one conversation, each from an empty cache."""
        settings = EngineSettings(Mode.VERIFIED if drafts else Mode.FULL, _CAP)
        texts: list[list[int]] = []
        drafted = accepted = 0
        start = time.perf_counter()
        for prompt in prompts:
            self._alone.remove(0)
            with closing(Sampler(SamplingSettings(), self.model.n_vocab)) as sampler:
                engine = Engine(
                    [self._alone], sampler, settings, lambda: Thresholds(()), NGrams(self.costs) if drafts else None
                )
                engine.extend(prompt)
                texts.append([step.token for step in engine.generate(max_tokens)])
                drafted += engine.stats.drafted
                accepted += engine.stats.accepted
        return Answers(texts, time.perf_counter() - start, drafted, accepted)

    def first_token(self, prompt: Sequence[int], further: Sequence[int], n_answer: int, keep: bool) -> FirstToken:
        """Answer `prompt`, then time the first token of a text that goes on with `further`."""
        self.forget()
        before = self._finish(Question(tuple(prompt), n_answer, drafts=False))
        if not keep:
            self.forget()
        return self._finish(Question((*prompt, *before.tokens, *further), 1, drafts=False))

    def _finish(self, question: Question) -> FirstToken:
        request = self.engine.submit(question)
        while not self.engine.idle:
            self.engine.step()
        stats = request.stats
        return FirstToken(request.answer, stats.clock.first_token_s or 0.0, stats.prompt_tokens, stats.reused_tokens)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> BatchRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Answers:
    """Texts of all prompts, and what they took together."""

    texts: list[list[int]]
    seconds: float
    drafted: int
    accepted: int

    @property
    def per_second(self) -> float:
        return sum(map(len, self.texts)) / self.seconds


@dataclass(frozen=True, slots=True)
class FirstToken:
    """How long an answer's first token took; `tokens` is the whole answer."""

    tokens: list[int]
    seconds: float
    prompt_tokens: int
    reused_tokens: int


def measure_together(
    rig: BatchRig, texts: Sequence[str], *, max_tokens: int, repeats: int, drafts: bool, say: Callable[[str], None]
) -> TogetherResult:
    """Answers of exactly `max_tokens` to `texts`, end tokens ignored: together, and one after the other."""
    prompts = [rig.chat(text) for text in texts]
    countdown = Countdown(2 * (repeats + 1), say)
    sides: dict[str, Callable[[], Answers]] = {
        "together": lambda: rig.together(prompts, max_tokens, drafts),
        "in turn": lambda: rig.in_turn(prompts, max_tokens, drafts),
    }
    found = in_turns({"answers": sides}, repeats, done=countdown.step)["answers"]
    speeds = {side: [answers.per_second for answers in some] for side, some in found.items()}
    last = {side: some[-1] for side, some in found.items()}
    return TogetherResult(
        drafts=drafts,
        n_tokens=sum(map(len, last["together"].texts)),
        together=quartiles(speeds["together"]),
        in_turn=quartiles(speeds["in turn"]),
        ratio=ratios(speeds["together"], speeds["in turn"]),
        unlike=sum(a != b for a, b in zip(last["together"].texts, last["in turn"].texts, strict=True)),
        drafted=last["together"].drafted,
        accepted=last["together"].accepted,
    )


def measure_further_turn(
    rig: BatchRig, text: str, *, n_answer: int, repeats: int, say: Callable[[str], None]
) -> FurtherTurnResult:
    """The first token of a second turn, with the first one's KV cache and without."""
    prompt = rig.chat(text)
    further = rig.chat(_FURTHER)
    countdown = Countdown(2 * (repeats + 1), say)
    sides: dict[str, Callable[[], FirstToken]] = {
        "kept": lambda: rig.first_token(prompt, further, n_answer, True),
        "anew": lambda: rig.first_token(prompt, further, n_answer, False),
    }
    found = in_turns({"turn": sides}, repeats, done=countdown.step)["turn"]
    ms = {side: [1e3 * first.seconds for first in some] for side, some in found.items()}
    kept = found["kept"][0]
    return FurtherTurnResult(
        prompt_tokens=kept.prompt_tokens,
        reused_tokens=kept.reused_tokens,
        kept_ms=quartiles(ms["kept"]),
        anew_ms=quartiles(ms["anew"]),
        ratio=ratios(ms["anew"], ms["kept"]),
        unlike=sum(a.tokens != b.tokens for a, b in zip(found["kept"], found["anew"], strict=True)),
    )
