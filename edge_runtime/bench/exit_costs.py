"""What an exit pack gains in mode verified, against full depth and stock llama.cpp, and why: times by part, drafts."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..exits.choose import Pace, exit_places, predict_time
from ..exits.costs import Costs, measure_costs
from ..exits.head import HeadContext
from ..native import ContextOptions
from ..signals import signals_of
from ..slices import Slice
from ..types import Mode, SamplingSettings
from .exit_runs import Answer, Hearing, Rig, answer, tokens_per_second
from .measure import Comparison, interleave
from .stock import StockProcess

_N_PAST = 64
_N_TIMED = 48  # tokens
_GREEDY = SamplingSettings()


# ── mode verified ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Drafting:
    """How drafting went, all texts taken together; NaN where there is nothing to divide by."""

    n_tokens: int
    settles: int
    drafted: int
    accepted: int
    rounds: int  # settles with drafts

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def drafts_per_settle(self) -> float:
        return self.drafted / self.settles if self.settles else float("nan")

    @property
    def tokens_per_settle(self) -> float:
        return self.n_tokens / self.settles if self.settles else float("nan")

    @property
    def draft_length(self) -> float:
        """Mean number of drafts in a settle that has any."""
        return self.drafted / self.rounds if self.rounds else float("nan")


def drafting(answers: Sequence[Answer]) -> Drafting:
    steps = [answer.steps for answer in answers]
    # a settle publishes accepted drafts and then one token of its own
    starts = [[s for i, s in enumerate(text) if i == 0 or not text[i - 1].accepted] for text in steps]
    return Drafting(
        n_tokens=sum(map(len, steps)),
        settles=sum(a.settles for a in answers),
        drafted=sum(a.drafted for a in answers),
        accepted=sum(s.accepted for text in steps for s in text),
        rounds=sum(s.drafted for text in starts for s in text),
    )


@dataclass(frozen=True, slots=True)
class VerifiedResult:
    """Mode verified on prompts of one kind. Speeds are tokens per second, the prompt's own time left out."""

    kind: str
    temperature: float
    n_prompts: int
    drafting: Drafting
    differing: int  # texts unlike full depth's
    differing_from_stock: int | None  # None: not compared
    against_full: Comparison | None
    against_stock: Comparison | None  # greedy only


def measure_verified(
    rig: Rig,
    kind: str,
    prompts: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    sampling: SamplingSettings = _GREEDY,
    *,
    max_tokens: int,
    repeats: int = 0,
    stock: StockProcess | None = None,
) -> VerifiedResult:
    """Answer all prompts verified and at full depth and compare the texts; then, with `repeats`, time them in turn.

    `stock` must be open on the same model with the options of `rig`; it is compared with where decoding is greedy.
    """
    full, engine = rig.full(sampling), rig.exits(Mode.VERIFIED, thresholds, sampling)
    pairs = [
        (answer(engine, prompt, max_tokens, rig.model.is_end), answer(full, prompt, max_tokens, rig.model.is_end))
        for prompt in prompts
    ]
    ours = partial(tokens_per_second, engine, prompts, max_tokens, rig.model.is_end)
    at_full = partial(tokens_per_second, full, prompts, max_tokens, rig.model.is_end)
    theirs = _StockSide(stock, prompts, [f for _, f in pairs]) if stock and sampling.temperature == 0 else None
    return VerifiedResult(
        kind=kind,
        temperature=sampling.temperature,
        n_prompts=len(prompts),
        drafting=drafting([verified for verified, _ in pairs]),
        differing=sum(verified.tokens != f.tokens for verified, f in pairs),
        differing_from_stock=theirs.differing([verified for verified, _ in pairs]) if theirs else None,
        against_full=interleave(ours, at_full, repeats) if repeats else None,
        against_stock=interleave(ours, theirs.per_second, repeats) if theirs and repeats else None,
    )


class _StockSide:
    """Stock llama.cpp, greedy, as many tokens as full depth gave."""

    def __init__(self, stock: StockProcess, prompts: Sequence[Sequence[int]], texts: Sequence[Answer]) -> None:
        self._stock = stock
        self._jobs = [(list(prompt), len(text.tokens)) for prompt, text in zip(prompts, texts, strict=True)]

    def differing(self, texts: Sequence[Answer]) -> int:
        found = [self._stock.call("greedy", prompt=prompt, n=n)["tokens"] for prompt, n in self._jobs]
        return sum(tuple(a) != b.tokens for a, b in zip(found, texts, strict=True))

    def per_second(self) -> float:
        """Tokens per second of those after each text's first, which comes with the prompt."""
        times = [self._stock.call("greedy", prompt=prompt, n=n)["seconds"][1:] for prompt, n in self._jobs]
        return sum(map(len, times)) / max(sum(map(sum, times)), 1e-9)


# ── why ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Reason:
    """Measured times of the parts, and the time per token they predict for mode verified on texts heard before."""

    costs: Costs
    predicted: Pace
    all_agreed: Pace  # … if full depth agreed with every draft
    flat: Pace  # … if a batch cost no more than one token, c(k) = 1

    def sentence(self) -> str:
        """The verdict with the numbers that decide it."""
        full = self.predicted.full_ms
        text = (
            f"predicted {self.predicted.ms_per_token:.2f} ms per token against {full:.2f} at full depth "
            f"({self.predicted.speedup:.2f}×); with every draft accepted {self.all_agreed.speedup:.2f}×, "
            f"with batches for the price of one token {self.flat.speedup:.2f}×"
        )
        if self.predicted.pays:
            return f"pays: {text}"
        if not self.predicted.coverage and not self.predicted.acceptance > 0:
            return f"does not pay, as nothing useful is drafted: {text}"
        blames = []
        if self.all_agreed.pays:
            blames.append("too few drafts are accepted")
        if self.flat.pays:
            blames.append("batches cost too much")
        return f"does not pay: {' and '.join(blames) or 'neither acceptance nor batches alone would help'}: {text}"


def explain(rig: Rig, heard: Sequence[Hearing], thresholds: Sequence[float], costs: Costs) -> Reason:
    """What the costs predict for `thresholds` on the texts `heard`, greedy."""
    places = exit_places(thresholds, [item.uncertainty for item in heard])
    n = len(places)
    outcome = np.stack([*(item.agree for item in heard), np.ones(n, np.bool_)])[places, np.arange(n)]

    def pace(agree: np.ndarray[tuple[int], np.dtype[np.bool_]], costs: Costs) -> Pace:
        return predict_time(Mode.VERIFIED, places, agree, heard[0].prompts, costs, rig.cap)

    return Reason(costs, pace(outcome, costs), pace(np.ones(n, np.bool_), costs), pace(outcome, _flat(costs)))


def _flat(costs: Costs) -> Costs:
    """The same, a batch of any size at the price of one token."""

    def one(times: tuple[float, ...]) -> tuple[float, ...]:
        return (times[0],) * len(times)

    return dataclasses.replace(
        costs,
        slices=tuple(map(one, costs.slices)),
        verify=one(costs.verify),
        heads=tuple(map(one, costs.heads)),
    )


def part_costs(rig: Rig, n_repeats: int = 7) -> Costs:
    """Times of slices, heads and batches at the rig's boundaries, here and now."""
    n_threads = rig.options.n_threads
    with ExitStack() as opened:
        heads = [opened.enter_context(HeadContext(path, 2 * _N_PAST, n_threads)) for path in rig.head_paths]
        return measure_costs(
            rig.model, rig.pack.boundaries, heads, n_threads=n_threads, largest=rig.cap + 1, n_repeats=n_repeats
        )


# ── the head's share ────────────────────────────────────────────────────────────────────────────────────────────────


def head_shares(rig: Rig, n_threads: int, repeats: int, n_tokens: int = _N_TIMED) -> dict[int, Comparison]:
    """By boundary: seconds of a head's guess, signals and all, against those of a token at full depth, in turn.

    Each side's figure is the median over `n_tokens` tokens behind 64 others.
    """
    n_ctx = _N_PAST + n_tokens
    options = ContextOptions(n_ctx=n_ctx, n_batch=_N_PAST, n_threads=n_threads)
    states = np.random.default_rng(0).standard_normal((n_ctx, rig.model.n_embd)).astype(np.float32)
    shares: dict[int, Comparison] = {}
    whole = Slice(rig.model, 0, rig.model.n_layer, options)
    try:
        for layer, path in zip(rig.pack.boundaries, rig.head_paths, strict=True):
            with HeadContext(path, n_ctx, n_threads, _N_PAST) as head:

                def guess(i: int, head: HeadContext = head) -> None:
                    head.decode(states[i : i + 1], i, (0,))
                    signals_of(head.logits(0), rig.pack.cluster_starts, True)

                def token(i: int) -> None:
                    whole.decode_tokens((5,), i, (0,))
                    whole.logits(0).argmax()

                def ours(head: HeadContext = head, guess: Callable[[int], None] = guess) -> float:
                    head.forget(0)
                    head.decode(states[:_N_PAST], 0)
                    return _median_seconds(guess, n_tokens)

                def theirs() -> float:
                    whole.remove(0)
                    whole.decode_tokens([5] * _N_PAST, 0)
                    return _median_seconds(token, n_tokens)

                shares[layer] = interleave(ours, theirs, repeats)
    finally:
        whole.close()
    return shares


def _median_seconds(run: Callable[[int], None], n_tokens: int) -> float:
    seconds = []
    for i in range(_N_PAST, _N_PAST + n_tokens):
        started = time.perf_counter()
        run(i)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
