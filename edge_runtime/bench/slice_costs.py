"""What slices cost, side by side with stock: time per token, forced exits, memory, batches, Python overhead."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..draft import BoundaryView, Guess
from ..engine import Engine
from ..native import ContextOptions, Model, Route
from ..sampling import Sampler
from ..slices import Slice, close_slices, open_slices
from ..types import EngineSettings, Floats, Mode, SamplingSettings, Signals, Thresholds
from .measure import Comparison, Spread, interleave, spread
from .stock import StockProcess, peak_resident_bytes

N_PROMPT = 64
N_TOKENS = 48
N_CTX = 2048
N_BATCH = 128


class FreeHead:
    """Exits at the first boundary at no cost: leaves the time of the layers themselves."""

    wants_logits = False
    wants_states = False
    _guess = Guess(np.zeros(1, np.float32), Signals(0.0, 1.0, 1.0), 0.0, np.array([5], np.int32))

    def speaks_at(self, boundary: int) -> bool:
        return boundary == 1

    def guess(self, view: BoundaryView) -> Guess | None:
        return self._guess

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        pass

    def forget(self, length: int) -> None:
        pass


class TimedSlice(Slice):
    """A slice that adds up the time spent inside llama.cpp."""

    seconds_inside = 0.0

    def _decode(self, batch: object, n: int, route: Route | None) -> None:
        started = time.perf_counter()
        super()._decode(batch, n, route)
        self.seconds_inside += time.perf_counter() - started


class Bench:
    """One model and one thread count; every figure comes from one run with stock beside it."""

    def __init__(self, path: Path, stock: StockProcess, n_threads: int, repeats: int) -> None:
        self.path, self.stock, self.repeats = path, stock, repeats
        self.model = Model(str(path))
        self.options = ContextOptions(n_ctx=N_CTX, n_batch=N_BATCH, n_threads=n_threads)
        self.prompt = [1 + (i * 37) % 250 for i in range(N_PROMPT)]

    def close(self) -> None:
        self.model.close()

    def boundaries(self) -> tuple[int, ...]:
        """Three boundaries, evenly spaced."""
        return tuple(round(self.model.n_layer * i / 4) for i in (1, 2, 3))

    def _open_stock(self, path: Path, n_outputs_max: int = 0) -> None:
        self.stock.open(
            path, n_ctx=N_CTX, n_batch=N_BATCH, n_threads=self.options.n_threads, n_outputs_max=n_outputs_max
        )

    def _engine(self, slices: Sequence[Slice], mode: Mode, source: FreeHead | None = None, cap: int = 8) -> Engine:
        limits = Thresholds((math.inf if source else 0.0,) * (len(slices) - 1))
        sampler = Sampler(SamplingSettings(), self.model.n_vocab)
        return Engine(slices, sampler, EngineSettings(mode, cap, audit_rate=0.0), lambda: limits, source)

    def _stock_token_seconds(self) -> float:
        seconds = self.stock.call("greedy", prompt=self.prompt, n=N_TOKENS)["seconds"]
        return float(np.median(seconds[1:]))

    def _token_seconds(self, engine: Engine) -> float:
        """Median time of a decoded token, the prompt's and the first one's left out."""
        engine.reset()
        engine.extend(self.prompt)
        marks = [time.perf_counter() for _ in engine.generate(N_TOKENS)]
        return float(np.median(np.diff(marks)))

    def full_mode(self) -> Comparison:
        """(a) Time per token of the engine in mode full with three boundaries, against stock."""
        self._open_stock(self.path)
        slices = open_slices(self.model, self.boundaries(), self.options)
        engine = self._engine(slices, Mode.FULL)
        result = interleave(lambda: self._token_seconds(engine), self._stock_token_seconds, self.repeats)
        close_slices(slices)
        return result

    def forced_exit(self, layer: int, truncated: Path) -> Comparison:
        """(b) Time per token of the engine when every token exits after `layer`, at a head that costs nothing, against
        a stock model of so many layers and a head of next to no rows."""
        self._open_stock(truncated)
        slices = open_slices(self.model, (layer,), self.options, n_outputs_max=N_TOKENS + 1)
        engine = self._engine(slices, Mode.EXIT, FreeHead(), cap=N_TOKENS)

        def ours() -> float:
            engine.reset()
            engine.extend(self.prompt)
            engine.settle()
            marks = [time.perf_counter() for _ in engine.generate(N_TOKENS)]
            return float(np.median(np.diff(marks)[1:]))

        result = interleave(ours, self._unread_seconds, self.repeats)
        close_slices(slices)
        return result

    def slice_alone(self, layer: int, truncated: Path) -> Comparison:
        """(b) Time of a slice of the first `layer` layers for one token, no engine, against the same stock model."""
        self._open_stock(truncated)
        piece = Slice(self.model, 0, layer, self.options)

        def ours() -> float:
            piece.remove(0)
            piece.decode_tokens(self.prompt, 0)
            seconds: list[float] = []
            for i in range(N_TOKENS):
                started = time.perf_counter()
                piece.decode_tokens((5,), N_PROMPT + i)
                piece.hidden(1)
                seconds.append(time.perf_counter() - started)
            return float(np.median(seconds[2:]))

        result = interleave(ours, self._unread_seconds, self.repeats)
        piece.close()
        return result

    def _unread_seconds(self) -> float:
        seconds = self.stock.call("decode_unread", prompt=self.prompt, n=N_TOKENS)["seconds"]
        return float(np.median(seconds[2:]))

    def batch_costs(self, sizes: Sequence[int]) -> dict[str, dict[int, Spread]]:
        """(d) c(k): time of a batch of k tokens over that of one, for stock and for each of four slices.

        Logits of every row where there is a head, as verification needs them.
        """
        self._open_stock(self.path)
        slices = open_slices(self.model, self.boundaries(), self.options, n_outputs_max=max(sizes))
        seconds: dict[str, dict[int, list[float]]] = {"stock, whole model": {k: [] for k in sizes}}
        for piece in slices:
            seconds[f"slice {piece.start}–{piece.end}"] = {k: [] for k in sizes}
        states = np.random.default_rng(0).standard_normal((N_PROMPT, self.model.n_embd)).astype(np.float32)
        for _ in range(self.repeats):
            for k in sizes:
                times = self.stock.call("time_batch", n_past=N_PROMPT, k=k, repeats=3, want="all")["seconds"]
                seconds["stock, whole model"][k].append(min(times))
                for piece in slices:
                    seconds[f"slice {piece.start}–{piece.end}"][k].append(_batch_seconds(piece, states, k, 3))
        close_slices(slices)
        return {
            name: {k: spread([a / b for a, b in zip(by_k[k], by_k[1], strict=True)]) for k in sizes}
            for name, by_k in seconds.items()
        }

    def python_overhead(self) -> Spread:
        """(e) Microseconds per token spent outside llama.cpp, mode full with three boundaries."""
        edges = (0, *self.boundaries(), self.model.n_layer)
        slices = [TimedSlice(self.model, a, b, self.options) for a, b in zip(edges, edges[1:], strict=False)]
        engine = self._engine(slices, Mode.FULL)
        values = []
        for _ in range(self.repeats):
            engine.reset()
            engine.extend(self.prompt)
            run = engine.generate(N_TOKENS)
            next(run)
            for piece in slices:
                piece.seconds_inside = 0.0
            started = time.perf_counter()
            count = sum(1 for _ in run)
            outside = time.perf_counter() - started - sum(piece.seconds_inside for piece in slices)
            values.append(1e6 * outside / count)
        close_slices(list(slices))
        return spread(values)


def _batch_seconds(piece: Slice, states: np.ndarray[Any, np.dtype[np.float32]], k: int, repeats: int) -> float:
    """Fastest of some runs of a batch of k tokens or states after as many others as `states` has rows."""
    n_past = len(states)
    want = range(k) if piece.is_last else ()
    best = math.inf
    piece.remove(0)
    if piece.start == 0:
        piece.decode_tokens([5] * n_past, 0)
    else:
        piece.decode_states(states, 0)
    for _ in range(repeats):
        started = time.perf_counter()
        if piece.start == 0:
            piece.decode_tokens([5] * k, n_past, want)
        else:
            piece.decode_states(states[:k], n_past, want)
        piece.synchronize()
        best = min(best, time.perf_counter() - started)
        piece.remove(n_past)
    return best


# ── (c) memory: each side in a fresh process ────────────────────────────────────────────────────────────────────────


def peak_memory(path: Path, stock_library: Path, n_threads: int, repeats: int) -> Comparison:
    """(c) Peak resident bytes of a prompt of 512 tokens and 32 more, three boundaries against stock, same options."""
    ours = [_our_peak(path, n_threads) for _ in range(repeats)]
    theirs = [_stock_peak(path, stock_library, n_threads) for _ in range(repeats)]
    return Comparison(spread([a / b for a, b in zip(ours, theirs, strict=True)]), spread(ours), spread(theirs))


def _stock_peak(path: Path, library: Path, n_threads: int) -> float:
    with StockProcess(library) as stock:
        stock.open(path, n_ctx=N_CTX, n_batch=N_BATCH, n_threads=n_threads, n_outputs_max=9)
        stock.call("greedy", prompt=[1 + i % 250 for i in range(512)], n=32)
        return float(stock.call("memory")["peak_bytes"])


def _our_peak(path: Path, n_threads: int) -> float:
    command = [sys.executable, "-m", "edge_runtime.bench.slice_costs", str(path), str(n_threads)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _run_and_print_peak(path: str, n_threads: int) -> None:
    model = Model(path)
    edges = tuple(round(model.n_layer * i / 4) for i in (1, 2, 3))
    options = ContextOptions(n_ctx=N_CTX, n_batch=N_BATCH, n_threads=n_threads)
    slices = open_slices(model, edges, options, n_outputs_max=9)
    engine = Engine(
        slices, Sampler(SamplingSettings(), model.n_vocab), EngineSettings(Mode.FULL), lambda: Thresholds((0.0,) * 3)
    )
    engine.extend([1 + i % 250 for i in range(512)])
    for _ in engine.generate(32):
        pass
    print(peak_resident_bytes())


if __name__ == "__main__":
    _run_and_print_peak(sys.argv[1], int(sys.argv[2]))
