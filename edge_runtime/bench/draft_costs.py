"""How fast whole answers are with n-gram drafts: beside full depth, stock llama.cpp and its bindings' prompt lookup."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..batch_costs import measurable_sizes, measure_batch_costs
from ..draft import DraftSource
from ..engine import Engine
from ..generate import Runtime
from ..native import ContextOptions
from ..ngram import NGrams
from ..resolve import NGRAM_CAP, RunOptions
from ..sampling import Sampler
from ..slices import close_slices, default_threads, open_slices
from ..templates import Message
from ..types import EngineSettings, Mode, SamplingSettings, Thresholds
from .stock import StockProcess
from .turns import Countdown, Quartiles, in_turns, quartiles, ratios

N_CTX = 2048
N_BATCH = 128
OURS = {"full": Mode.FULL, "verified": Mode.VERIFIED, "margin": Mode.MARGIN}


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """A greedy text, its end token included, and what it took."""

    tokens: tuple[int, ...]
    first_s: float  # until the first token: the prefill
    decode_s: float  # of the other tokens
    drafted: int = 0
    accepted: int = 0
    relaxed: int = 0  # tokens that full depth would have chosen otherwise


class DraftRig:
    """A model with its kernels, for answers in any mode, each from an empty cache. Use it in a `with`."""

    def __init__(self, model: str, *, n_threads: int = 0, kernels: str = "edge", theta: float = 0.9) -> None:
        """Measures what batches cost. Raises a ModelError, MemoryLimitError, UsageError or LibraryError."""
        self.n_threads, self._theta = n_threads or default_threads(), theta
        context = ContextOptions(n_ctx=N_CTX, n_batch=N_BATCH, n_threads=self.n_threads, flash_attention=True)
        asked = RunOptions(
            model,
            Mode.FULL,
            n_ctx=N_CTX,
            n_batch=N_BATCH,
            n_threads=self.n_threads,
            flash_attention=True,
            kernels=kernels,
        )
        with ExitStack() as opened:
            self._runtime = opened.enter_context(Runtime(asked))
            self.model = self._runtime.model
            self.path = Path(self.model.path)
            self._whole = self._runtime.engine.slices  # its engine is not used again
            self._verifying = open_slices(self.model, (), context, n_outputs_max=NGRAM_CAP + 1)
            opened.callback(close_slices, self._verifying)
            self._sampler = opened.enter_context(closing(Sampler(SamplingSettings(), self.model.n_vocab)))
            sizes = measurable_sizes(NGRAM_CAP + 1)
            self.costs = measure_batch_costs(self._verifying, sizes).up_to(NGRAM_CAP + 1)
            self._opened = opened.pop_all()

    def chat(self, text: str) -> list[int]:
        """The tokens of a user's message; of the text alone where the model has no chat template."""
        if self._runtime.template is None:
            return self._runtime.text_tokens(text)
        return self._runtime.chat_tokens([Message("user", text)])

    def answer(
        self,
        mode: Mode,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        source: DraftSource | None = None,
        cap: int = NGRAM_CAP,
    ) -> TimedAnswer:
        """Answer `prompt` with drafts of `source`, else of n-grams that know no other text and the measured costs.

        What comes before the prefill, making the engine among it, is not timed.
        """
        slices = self._verifying if mode.verifies else self._whole
        if mode.verifies:
            source = source or NGrams(self.costs[: cap + 1])
        slices[0].remove(0)
        self._sampler.reset()
        engine = Engine(slices, self._sampler, EngineSettings(mode, cap, theta=self._theta), _no_thresholds, source)
        tokens: list[int] = []
        started = first = last = time.perf_counter()
        engine.extend(prompt)
        with closing(engine.generate(max_tokens)) as steps:
            for step in steps:
                last = time.perf_counter()
                first = first if tokens else last
                tokens.append(step.token)
                if self.model.is_end(step.token):
                    break
        stats = engine.stats
        return TimedAnswer(tuple(tokens), first - started, last - first, stats.drafted, stats.accepted, stats.relaxed)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> DraftRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _no_thresholds() -> Thresholds:
    return Thresholds(())


# ── the other sides ─────────────────────────────────────────────────────────────────────────────────────────────────


def stock_answer(stock: StockProcess, prompt: Sequence[int], n: int) -> TimedAnswer:
    """n greedy tokens of a process that is open: stock llama.cpp, or the bindings' prompt lookup."""
    found = stock.call("greedy", prompt=list(prompt), n=n)
    first, *others = found["seconds"]
    return TimedAnswer(tuple(found["tokens"]), first, sum(others))


def length_until_end(tokens: Sequence[int], is_end: Callable[[int], bool]) -> int:
    """How many of `tokens` there are up to and with the first that ends the turn."""
    return next((i for i, token in enumerate(tokens, 1) if is_end(token)), len(tokens))


def parting(stock: StockProcess, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> float | None:
    """By how much stock's logits prefer its token to ours where the texts part first; None if they do not.

    Next to nothing is a near-tie, which other kernels, or a batch of another size, decide otherwise.
    """
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            _, logits = stock.greedy(prompt, i + 1)
            return float(logits[i][b] - logits[i][a])
    return None


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class KindResult:
    """Prompts of one kind. Speeds are tokens per second over the answers to all of them."""

    kind: str
    n_prompts: int
    n_tokens: dict[str, int]  # by side
    whole: dict[str, Quartiles]  # side → speed ÷ stock, prefill and decoding
    decode: dict[str, Quartiles]  # side → speed ÷ stock, decoding alone
    over_full: dict[str, Quartiles]  # "whole" and "decode": mode verified ÷ mode full
    over_lookup: dict[str, Quartiles]  # … ÷ prompt lookup; {} without
    per_second: dict[str, float]  # side → tokens per second of decoding, median
    drafted: int  # mode verified, all prompts once
    accepted: int
    unlike_full: int  # texts of mode verified unlike mode full's: must be none
    unlike_stock: int  # texts of mode full unlike stock's
    partings: tuple[float, ...]  # … and the differences of logits where they part
    lookup_unlike_stock: int | None  # as the bindings' batches have other sums; None: left out
    margin_changed: float  # share of mode margin's tokens that full depth would have chosen otherwise
    margin_unlike_full: int

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


def measure_kinds(
    rig: DraftRig,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    stock: StockProcess,
    lookup: StockProcess | None,
    *,
    max_tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> list[KindResult]:
    """All sides answer each prompt in turn, `repeats` times after a warm-up. `stock` and `lookup` are open.

    Stock stops where its own text does, as ours do: where texts part, lengths may differ, and speeds are compared.
    """
    jobs = [(kind, list(prompt)) for kind, some in prompts.items() for prompt in some]
    figures: dict[str, dict[str, Callable[[], TimedAnswer]]] = {}
    for i, (_, prompt) in enumerate(jobs):
        tokens = stock_answer(stock, prompt, max_tokens).tokens
        n = length_until_end(tokens, rig.model.is_end)
        sides = {"stock": partial(stock_answer, stock, prompt, n)}
        if lookup is not None:
            sides["lookup"] = partial(stock_answer, lookup, prompt, n)
        ours = {side: partial(rig.answer, mode, prompt, max_tokens) for side, mode in OURS.items()}
        figures[str(i)] = {**sides, **ours}
    countdown = Countdown(sum(map(len, figures.values())) * (repeats + 1), say, every=len(figures["0"]))
    found = in_turns(figures, repeats, done=countdown.step)
    results = []
    for kind in prompts:
        of_kind = [i for i, (name, _) in enumerate(jobs) if name == kind]
        answers = [found[str(i)] for i in of_kind]
        pairs = [(jobs[i][1], found[str(i)]["full"][0].tokens, found[str(i)]["stock"][0].tokens) for i in of_kind]
        gaps = tuple(gap for pair in pairs if (gap := parting(stock, *pair)) is not None)
        results.append(replace(summarise(kind, answers), partings=gaps))
    return results


def summarise(kind: str, answers: Sequence[Mapping[str, Sequence[TimedAnswer]]]) -> KindResult:
    """Of one kind's prompts: for each, side → its answers by repeat."""
    sides = list(answers[0])
    once = {side: [by_side[side][0] for by_side in answers] for side in sides}
    whole = {side: [whole_speed(some) for some in _by_repeat(answers, side)] for side in sides}
    decode = {side: [_decode_speed(some) for some in _by_repeat(answers, side)] for side in sides}
    others = [side for side in sides if side != "stock"]
    speeds = {"whole": whole, "decode": decode}
    margin_tokens = sum(len(a.tokens) for a in once["margin"])
    return KindResult(
        kind=kind,
        n_prompts=len(answers),
        n_tokens={side: sum(len(a.tokens) for a in once[side]) for side in sides},
        whole={side: ratios(whole[side], whole["stock"]) for side in others},
        decode={side: ratios(decode[side], decode["stock"]) for side in others},
        over_full={name: ratios(by_side["verified"], by_side["full"]) for name, by_side in speeds.items()},
        over_lookup={
            name: ratios(by_side["verified"], by_side["lookup"])
            for name, by_side in speeds.items()
            if "lookup" in by_side
        },
        per_second={side: quartiles(decode[side]).median for side in sides},
        drafted=sum(a.drafted for a in once["verified"]),
        accepted=sum(a.accepted for a in once["verified"]),
        unlike_full=_unlike(answers, "verified", "full"),
        unlike_stock=_unlike(answers, "full", "stock"),
        partings=(),
        lookup_unlike_stock=_unlike(answers, "lookup", "stock") if "lookup" in sides else None,
        margin_changed=sum(a.relaxed for a in once["margin"]) / margin_tokens,
        margin_unlike_full=_unlike(answers, "margin", "full"),
    )


def _by_repeat(answers: Sequence[Mapping[str, Sequence[TimedAnswer]]], side: str) -> list[tuple[TimedAnswer, ...]]:
    return list(zip(*(by_side[side] for by_side in answers), strict=True))


def whole_speed(answers: Sequence[TimedAnswer]) -> float:
    """Tokens per second of the answers, prefill included."""
    return sum(len(a.tokens) for a in answers) / sum(a.first_s + a.decode_s for a in answers)


def _decode_speed(answers: Sequence[TimedAnswer]) -> float:
    """0 where no answer is longer than its first token, which comes with the prefill."""
    seconds = sum(a.decode_s for a in answers)
    return sum(len(a.tokens) - 1 for a in answers) / seconds if seconds else 0.0


def _unlike(answers: Sequence[Mapping[str, Sequence[TimedAnswer]]], side: str, other: str) -> int:
    """Prompts of which any repeat's text differs."""
    return sum(
        any(a.tokens != b.tokens for a, b in zip(by_side[side], by_side[other], strict=True)) for by_side in answers
    )
