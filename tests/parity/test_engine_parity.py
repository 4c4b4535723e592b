"""The engine on real weights: mode verified = mode full = stock; mode exit leaves every cache as a full run would."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from edge_runtime.bench.stock import StockProcess
from edge_runtime.draft import SharedHead
from edge_runtime.engine import Engine
from edge_runtime.native import ContextOptions, Model
from edge_runtime.sampling import Sampler
from edge_runtime.slices import close_slices, open_slices
from edge_runtime.types import EngineSettings, Mode, SamplingSettings, Thresholds

from .prompts import PROMPTS

N_TOKENS = 128
N_CTX = 1024
N_THREADS = 1  # two that wait for each other take many times as long where other tests run beside

# Two tokens whose full-depth logits are closer than this are a near-tie: a batch sums in another order than a single
# token, which moves a logit of this model by up to 2, the difference of the two best by less.
NEAR_TIE = 0.5

pytestmark = [pytest.mark.model, pytest.mark.stock]


def make_engine(
    model: Model,
    mode: Mode,
    boundaries: tuple[int, ...],
    limits: Sequence[float] | None,
    cap: int = 4,
    *,
    n_batch: int = 128,
    n_ctx: int = N_CTX,
    sampling: SamplingSettings | None = None,
) -> Engine:
    """An engine with fixed thresholds, or random ones for each token if `limits` is None."""
    draws = random.Random(7)

    def thresholds() -> Thresholds:
        return Thresholds(tuple(limits or (draws.choice([0.0, 0.7, 2.5, math.inf]) for _ in boundaries)))

    slices = open_slices(
        model, boundaries, ContextOptions(n_ctx=n_ctx, n_batch=n_batch, n_threads=N_THREADS), n_outputs_max=cap + 1
    )
    sampler = Sampler(sampling or SamplingSettings(), model.n_vocab)
    return Engine(slices, sampler, EngineSettings(mode, cap), thresholds, SharedHead())


def run(engine: Engine, prompt: Sequence[int], n: int) -> list[int]:
    engine.reset()
    engine.extend(prompt)
    return [step.token for step in engine.generate(n)]


@pytest.fixture(scope="module")
def prompts(demo_model: Model) -> list[list[int]]:
    return [
        demo_model.tokenize(
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special=True, parse_special=True
        )
        for text in PROMPTS
    ]


@pytest.fixture(scope="module")
def stock_texts(stock: StockProcess, demo_model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """Stock's greedy tokens after every prompt."""
    stock.open(demo_model.path, n_ctx=N_CTX, n_batch=128, n_threads=N_THREADS)
    return [stock.greedy(prompt, N_TOKENS)[0] for prompt in prompts]


def near_tie(stock: StockProcess, prompt: list[int], ours: list[int], theirs: list[int]) -> float | None:
    """None for equal texts, else how much stock's logits prefer its token to ours where the texts part."""
    if ours == theirs:
        return None
    at = next(i for i in range(N_TOKENS) if ours[i] != theirs[i])
    logits = stock.greedy(prompt, at + 1)[1][at]  # up to here the texts are one, so these are about our choice, too
    return float(logits[theirs[at]] - logits[ours[at]])


def test_there_are_enough_varied_prompts(prompts: list[list[int]]) -> None:
    assert len(prompts) == 40
    assert len({tuple(p) for p in prompts}) == 40
    assert max(len(p) for p in prompts) > 512  # long enough for llama.cpp's other way of attention


def test_mode_full_is_stock(demo_model: Model, prompts: list[list[int]], stock_texts: list[list[int]]) -> None:
    engine = make_engine(demo_model, Mode.FULL, (8, 16, 24), (0.0, 0.0, 0.0))
    for prompt, theirs in zip(prompts, stock_texts, strict=True):
        assert run(engine, prompt, N_TOKENS) == theirs
    close_slices(engine.slices)


@pytest.mark.parametrize(
    ("kind", "boundaries", "limits", "cap"),
    [
        ("good", (28,), (0.7,), 4),
        ("bad", (1,), (math.inf,), 1),
        ("random", (10, 24), None, 2),
        ("always", (6,), (math.inf,), 2),
    ],
)
def test_mode_verified_is_stock(
    demo_model: Model,
    prompts: list[list[int]],
    stock: StockProcess,
    stock_texts: list[list[int]],
    kind: str,
    boundaries: tuple[int, ...],
    limits: Sequence[float] | None,
    cap: int,
    record_property: Callable[[str, object], None],
) -> None:
    engine = make_engine(demo_model, Mode.VERIFIED, boundaries, limits, cap)
    flips: list[float] = []
    drafted = accepted = 0
    for prompt, theirs in zip(prompts, stock_texts, strict=True):
        ours = run(engine, prompt, N_TOKENS)
        assert len(ours) == N_TOKENS
        drafted += engine.stats.drafted
        accepted += engine.stats.accepted
        flip = near_tie(stock, prompt, ours, theirs)
        flips += [] if flip is None else [flip]
    close_slices(engine.slices)
    record_property(
        "finding",
        f"{kind} drafts: {accepted} of {drafted} accepted; {len(flips)} of {len(prompts)} texts leave stock's at a "
        f"near-tie (differences of the two logits: {[round(f, 3) for f in flips]})",
    )
    assert all(0 <= flip < NEAR_TIE for flip in flips)
    rate = accepted / drafted
    assert {"good": rate > 0.6, "bad": rate < 0.1, "random": drafted > 1000, "always": rate < 0.3}[kind]


def test_mode_verified_samples_what_full_depth_samples(demo_model: Model, prompts: list[list[int]]) -> None:
    """The same seed gives the same text, with temperature, top-k, top-p, min-p and repeat penalty all at work."""
    sampling = SamplingSettings(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, repeat_penalty=1.1, seed=11)
    full = make_engine(demo_model, Mode.FULL, (), (), sampling=sampling)
    verified = make_engine(demo_model, Mode.VERIFIED, (26,), (1.5,), sampling=sampling)
    accepted = 0
    short = [p for p in prompts if len(p) < 100][:8]
    for prompt in short:
        assert run(verified, prompt, 64) == run(full, prompt, 64)
        accepted += verified.stats.accepted
    assert accepted > 50
    close_slices([*full.slices, *verified.slices])


@pytest.fixture(scope="module")
def fresh(demo_model: Model) -> Iterator[Engine]:
    """A full engine whose batches are at most 32 wide: for those llama.cpp's sums do not depend on the width."""
    engine = make_engine(demo_model, Mode.FULL, (), (), n_batch=32, n_ctx=256)
    yield engine
    close_slices(engine.slices)


def test_mode_exit_leaves_every_cache_as_a_full_run_would(
    demo_model: Model, prompts: list[list[int]], fresh: Engine
) -> None:
    """Bit for bit: the logits after the text, and those of four more tokens, which attend to all of it."""
    short = [p for p in prompts if len(p) < 100]
    for cap in range(1, 33):
        engine = make_engine(demo_model, Mode.EXIT, (8, 20), None, cap, n_batch=32, n_ctx=256)
        run(engine, short[cap % len(short)], 40)
        assert engine.stats.exits > 10
        fresh.reset()
        fresh.extend(engine.tokens)
        for token in range(100, 104):
            assert np.array_equal(engine.settle(), fresh.settle()), f"cap {cap}"
            engine.extend([token])
            fresh.extend([token])
        close_slices(engine.slices)
