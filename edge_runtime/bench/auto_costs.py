"""How fast mode auto is, beside stock llama.cpp and beside each policy that it may choose, run for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..generate import RunOptions, Runtime
from ..templates import Message
from ..types import Mode
from .draft_costs import TimedAnswer, length_until_end, stock_answer, whole_speed
from .stock import StockProcess
from .turns import Countdown, Quartiles, in_turns, quartiles, ratios

AUTO = "auto"


class AutoRig:
    """One model in several runtimes: mode auto, and each of its policies for itself. Use it in a `with`."""

    def __init__(self, options: RunOptions, say: Callable[[str], None]) -> None:
        """`options` are those of mode auto; with a pack, and a bound on disagreement, there are more policies.

        Raises as `Runtime` does.
        """
        fixed = {"full": replace(options, mode=Mode.FULL, pack=None, max_disagreement=None)}
        fixed["verified"] = replace(fixed["full"], mode=Mode.VERIFIED)
        if options.pack is not None:
            fixed["heads"] = replace(options, mode=Mode.VERIFIED, draft="heads", max_disagreement=None)
        if options.max_disagreement is not None:
            fixed["exit"] = replace(options, mode=Mode.EXIT)
        with ExitStack() as opened:
            self.runtimes = {
                name: opened.enter_context(Runtime(each, say, say))
                for name, each in {**fixed, AUTO: replace(options, mode=Mode.AUTO)}.items()
            }
            self._opened = opened.pop_all()
        self.policies = tuple(fixed)
        lossy = ("exit", AUTO) if options.max_disagreement is not None else ()
        self.lossless = tuple(name for name in (*fixed, AUTO) if name not in lossy)
        self.model = self.runtimes["full"].model

    def chat(self, text: str) -> list[int]:
        """The tokens of a user's message."""
        return self.runtimes["full"].chat_tokens([Message("user", text)])

    def answer(self, name: str, prompt: Sequence[int], max_tokens: int) -> TimedAnswer:
        """A greedy answer by one of the runtimes, text and all, from an empty KV cache.

        What the runtime has learnt about costs and acceptance stays, as it does in a program that runs on.
        """
        runtime = self.runtimes[name]
        runtime.engine.rollback(0)
        tokens: list[int] = []
        started = first = last = time.perf_counter()
        for chunk in runtime.stream(prompt, max_tokens):
            last = time.perf_counter()
            first = first if tokens else last
            tokens.append(chunk.step.token)
        summary = runtime.summary
        return TimedAnswer(tuple(tokens), first - started, last - first, summary.drafted, summary.accepted)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> AutoRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class AutoResult:
    """Prompts of one kind. Speeds are tokens per second over whole answers to all of them, prefill and decoding."""

    kind: str
    n_prompts: int
    n_tokens: int  # of all answers in mode auto
    over_stock: dict[str, Quartiles]  # side → its speed ÷ stock
    over_fixed: dict[str, Quartiles]  # policy → mode auto's speed ÷ that policy's
    per_second: dict[str, float]  # side → tokens per second, median
    drafted: int  # by mode auto, all prompts once
    accepted: int
    unlike_full: int  # texts of lossless sides unlike mode full's: must be none

    @property
    def best(self) -> str:
        """The policy that is fastest for itself."""
        return max(self.over_fixed, key=lambda name: self.per_second[name])

    @property
    def over_best(self) -> Quartiles:
        return self.over_fixed[self.best]


def measure_auto(
    rig: AutoRig,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    stock: StockProcess,
    *,
    max_tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> list[AutoResult]:
    """All sides answer each prompt in turn, `repeats` times after a warm-up. `stock` is open.

    Stock stops where its own text does, as ours do: where texts part, lengths may differ, and speeds are compared.
    """
    jobs = [(kind, list(prompt)) for kind, some in prompts.items() for prompt in some]
    figures: dict[str, dict[str, Callable[[], TimedAnswer]]] = {}
    for i, (_, prompt) in enumerate(jobs):
        n = length_until_end(stock_answer(stock, prompt, max_tokens).tokens, rig.model.is_end)
        ours = {name: partial(rig.answer, name, prompt, max_tokens) for name in rig.runtimes}
        figures[str(i)] = {"stock": partial(stock_answer, stock, prompt, n), **ours}
    countdown = Countdown(sum(map(len, figures.values())) * (repeats + 1), say, every=len(figures["0"]))
    found = in_turns(figures, repeats, done=countdown.step)
    return [
        summarise_auto(kind, [found[str(i)] for i, (name, _) in enumerate(jobs) if name == kind], rig.lossless)
        for kind in prompts
    ]


def summarise_auto(
    kind: str, answers: Sequence[Mapping[str, Sequence[TimedAnswer]]], lossless: Sequence[str]
) -> AutoResult:
    """Of one kind's prompts: for each, side → its answers by repeat."""
    speeds = {
        side: [whole_speed(some) for some in zip(*(by_side[side] for by_side in answers), strict=True)]
        for side in answers[0]
    }
    auto = [by_side[AUTO][0] for by_side in answers]
    return AutoResult(
        kind=kind,
        n_prompts=len(answers),
        n_tokens=sum(len(a.tokens) for a in auto),
        over_stock={side: ratios(found, speeds["stock"]) for side, found in speeds.items() if side != "stock"},
        over_fixed={side: ratios(speeds[AUTO], found) for side, found in speeds.items() if side not in ("stock", AUTO)},
        per_second={side: quartiles(found).median for side, found in speeds.items()},
        drafted=sum(a.drafted for a in auto),
        accepted=sum(a.accepted for a in auto),
        unlike_full=sum(
            any(a.tokens != b.tokens for a, b in zip(by_side[side], by_side["full"], strict=True))
            for by_side in answers
            for side in lossless
        ),
    )


def open_stock(stock: StockProcess, rig: AutoRig) -> None:
    """Open the rig's model in the stock process, with the same sizes. Raises as `StockProcess.open`."""
    options = rig.runtimes["full"].options
    stock.open(
        Path(rig.model.path),
        flash_attention=True,
        n_ctx=options.n_ctx,
        n_batch=options.n_batch,
        n_threads=options.n_threads,
    )
