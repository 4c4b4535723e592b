"""Conversations side by side whose tokens leave early, beside the same at full depth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from ..batching import ExitBatchEngine, Question
from ..exits.source import BatchHeads
from ..opening import head_files, pack_heads
from ..resolve import RunOptions, checked_header, engine_settings, load_pack, resolve, thresholds_of
from ..types import Mode
from .batch_speed import Answers, BatchRig
from .turns import Countdown, Quartiles, in_turns, quartiles, ratios


@dataclass(frozen=True, slots=True)
class ExitsResult:
    """Answers to as many prompts at once, prefill included, tokens per second over all of them."""

    bound: float  # on the exits' disagreement, certified by the pack
    n_tokens: int
    exits: int  # tokens that left early
    audited: int
    disagreed: int
    exiting: Quartiles
    full: Quartiles
    ratio: Quartiles  # exiting ÷ full depth without drafts


@contextmanager
def exit_engine(rig: BatchRig, pack_name: str, bound: float) -> Iterator[ExitBatchEngine]:
    """An engine with the pack's heads, for as many conversations as the rig's.

    Raises as loading a pack, its heads and slices does.
    """
    header = checked_header(str(rig.path))
    pack = load_pack(pack_name, header)
    n_ctx = rig.options.n_ctx // rig.options.n_seq_max
    asked = RunOptions(
        str(rig.path), Mode.EXIT, pack=pack_name, max_disagreement=bound, n_threads=rig.n_threads, audit_rate=1.0
    )
    run = resolve(asked, header, n_ctx, pack, lambda _text: None)
    assert pack is not None
    files, n = head_files(pack, rig.model.path), rig.options.n_seq_max
    with closing(pack_heads(BatchHeads, rig.model, run, pack, files, n)) as heads:
        thresholds, settings = thresholds_of(run), engine_settings(run)
        boundaries = run.boundaries or ()
        with ExitBatchEngine(
            rig.model, rig.options, boundaries, lambda: thresholds, heads, settings, costs=rig.costs
        ) as engine:
            yield engine


def measure_exits(
    rig: BatchRig,
    pack: str,
    bound: float,
    texts: Sequence[str],
    *,
    max_tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> ExitsResult:
    """Answers of exactly `max_tokens` to `texts`, end tokens ignored: with exits, and at full depth without drafts."""
    prompts = [rig.chat(text) for text in texts]
    countdown = Countdown(2 * (repeats + 1), say)
    with exit_engine(rig, pack, bound) as engine:
        sides: dict[str, Callable[[], Answers]] = {
            "exits": lambda: _answer(engine, prompts, max_tokens),
            "full": lambda: rig.together(prompts, max_tokens, False),
        }
        found = in_turns({"answers": sides}, repeats, done=countdown.step)["answers"]
        stats = engine.stats
    speeds = {side: [answers.per_second for answers in some] for side, some in found.items()}
    return ExitsResult(
        bound=bound,
        n_tokens=stats.published,
        exits=stats.exits,
        audited=stats.audited,
        disagreed=stats.disagreed,
        exiting=quartiles(speeds["exits"]),
        full=quartiles(speeds["full"]),
        ratio=ratios(speeds["exits"], speeds["full"]),
    )


def _answer(engine: ExitBatchEngine, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answers:
    """All prompts submitted at once, from empty caches."""
    for sequence in engine.pool.sequences:
        sequence.keep(0)
    start = time.perf_counter()
    requests = [engine.submit(Question(tuple(prompt), max_tokens)) for prompt in prompts]
    while not engine.idle:
        engine.step()
    return Answers([request.answer for request in requests], time.perf_counter() - start, 0, 0)
