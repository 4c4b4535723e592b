"""What the edge kernels cost and gain, side by side with stock: small batches, one token, prefill, loading, memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from ..engine import Engine
from ..native import ContextOptions, Model, kernel_weight_types
from ..sampling import Sampler
from ..slices import Slice, close_slices, open_slices
from ..types import EngineSettings, Mode, SamplingSettings, Thresholds
from .gguf_maker import ONE_BILLION, ModelShape, write_random_model
from .stock import StockProcess, peak_resident_bytes
from .turns import Quartiles, in_turns, quartiles, ratios

N_PAST = 64  # tokens before the batches that are timed
N_CTX = 2048
N_BATCH = 128  # of a prompt, on both sides
SIZES = (1, 2, 4, 8, 16)
_N_TOKENS = 32  # decoded one at a time, the first left out
_N_PREFILL = 256
_TRIES = 3  # of a batch in a row, the quickest counts
_N_MEMORY = 3  # fresh processes of each side
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}  # enum llama_ftype


@dataclass(frozen=True, slots=True)
class KernelSettings:
    """What is measured, and how often; `kernels` as `native.resolve_kernels` takes it."""

    kernels: str = "edge"
    n_threads: int = 2
    repeats: int = 9

    @property
    def context(self) -> ContextOptions:
        return ContextOptions(n_ctx=N_CTX, n_batch=N_BATCH, n_threads=self.n_threads, flash_attention=True)

    @property
    def stock_context(self) -> dict[str, Any]:
        """The same for `StockProcess.open`."""
        return {"n_ctx": N_CTX, "n_batch": N_BATCH, "n_threads": self.n_threads, "flash_attention": True}


@dataclass(frozen=True, slots=True)
class KernelCosts:
    """One model. Ratios are ours ÷ stock, pair by pair."""

    kernels: str  # the set that was used
    weights: dict[str, float]  # share of the matrices' bytes by type
    taken: float  # share that the edge kernels take
    ours: dict[int, Quartiles]  # c(k): a batch of k tokens ÷ one, ours and …
    stock: dict[int, Quartiles]
    batch: dict[int, Quartiles]  # time of a batch of k
    batch_ms: dict[str, dict[int, float]]  # median by side
    single: Quartiles  # speed of decoding one token at a time
    prefill: Quartiles  # speed of a prompt of 256 tokens
    load: Quartiles  # time from the file, in the page cache, to the first token
    memory: Quartiles  # peak of a fresh process
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # medians of the last four, by side; bytes


def measure_kernels(
    path: Path, stock: StockProcess, library: Path, settings: KernelSettings, say: Callable[[str], None]
) -> KernelCosts:
    """All figures of one model; `library` is that of `stock`. Raises EdgeError for what does not open."""
    say(f"batches, single tokens and prefill, {settings.repeats} times in turn")
    stock.open(path, **settings.stock_context)
    with _Ours(path, settings) as ours:
        name = ours.model.kernels
        figures: dict[str, Mapping[str, Callable[[], float]]] = {
            f"batch {k}": {"ours": partial(ours.batch, k), "stock": partial(_stock_batch, stock, k)} for k in SIZES
        }
        figures["single"] = {"ours": ours.token, "stock": partial(_stock_token, stock)}
        figures["prefill"] = {"ours": ours.prefill, "stock": partial(_stock_prefill, stock)}
        found = in_turns(figures, settings.repeats)
    say("loading")
    load = {"ours": partial(_our_load, path, settings), "stock": partial(_stock_load, stock, path, settings)}
    found |= in_turns({"load": load}, settings.repeats)
    say("memory of fresh processes")
    memory = {
        "ours": partial(_our_peak, path, settings),
        "stock": partial(_stock_peak, path, library, settings),
    }
    found |= in_turns({"memory": memory}, min(_N_MEMORY, settings.repeats), warm_up=False)
    weights, taken = weight_shares(path)
    return summarise(name, weights, taken, found)


def summarise(
    kernels: str, weights: dict[str, float], taken: float, found: Mapping[str, Mapping[str, list[float]]]
) -> KernelCosts:
    """The ratios of what was measured: figure → side → seconds (of memory: bytes) by repeat."""
    batches = {k: found[f"batch {k}"] for k in SIZES}
    growth = {side: {k: ratios(batches[k][side], batches[1][side]) for k in SIZES} for side in ("ours", "stock")}
    others = {name: found[name] for name in ("single", "prefill", "load", "memory")}
    return KernelCosts(
        kernels=kernels,
        weights=weights,
        taken=taken,
        ours=growth["ours"],
        stock=growth["stock"],
        batch={k: ratios(batches[k]["ours"], batches[k]["stock"]) for k in SIZES},
        batch_ms={s: {k: 1e3 * quartiles(batches[k][s]).median for k in SIZES} for s in ("ours", "stock")},
        # speeds: the less time, the more
        single=ratios(others["single"]["stock"], others["single"]["ours"]),
        prefill=ratios(others["prefill"]["stock"], others["prefill"]["ours"]),
        load=ratios(others["load"]["ours"], others["load"]["stock"]),
        memory=ratios(others["memory"]["ours"], others["memory"]["stock"]),
        seconds={name: {s: quartiles(v).median for s, v in sides.items()} for name, sides in others.items()},
    )


# ── our side ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Ours:
    """A whole model with edge kernels in one slice, and the engine in mode full on it."""

    def __init__(self, path: Path, settings: KernelSettings) -> None:
        self.model = Model(str(path), kernels=settings.kernels)
        (self._piece,) = open_slices(self.model, (), settings.context, n_outputs_max=max(SIZES))
        self._sampler = Sampler(SamplingSettings(), self.model.n_vocab)
        self._engine = Engine([self._piece], self._sampler, EngineSettings(Mode.FULL), lambda: Thresholds(()))

    def batch(self, k: int) -> float:
        """Seconds of a batch of k tokens, with logits of each."""
        self._engine.reset()
        self._piece.decode_tokens(_prompt(N_PAST), 0)
        best = min(_batch_seconds(self._piece, k) for _ in range(_TRIES))
        self._piece.remove(0)
        return best

    def token(self) -> float:
        """Seconds of a token of the engine in mode full, the median of some."""
        self._engine.reset()
        self._engine.extend(_prompt(N_PAST))
        marks = [time.perf_counter() for _ in self._engine.generate(_N_TOKENS)]
        return float(np.median(np.diff(marks)))

    def prefill(self) -> float:
        """Seconds until the first token."""
        self._engine.reset()
        started = time.perf_counter()
        self._engine.extend(_prompt(_N_PREFILL))
        for _ in self._engine.generate(1):
            pass
        return time.perf_counter() - started

    def close(self) -> None:
        close_slices([self._piece])
        self._sampler.close()
        self.model.close()

    def __enter__(self) -> _Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _batch_seconds(piece: Slice, k: int) -> float:
    started = time.perf_counter()
    piece.decode_tokens([5] * k, N_PAST, range(k))
    piece.synchronize()
    seconds = time.perf_counter() - started
    piece.remove(N_PAST)
    return seconds


def _prompt(n: int) -> list[int]:
    return [1 + i % 100 for i in range(n)]


def _our_load(path: Path, settings: KernelSettings) -> float:
    started = time.perf_counter()
    with Model(str(path), kernels=settings.kernels) as model:
        piece = Slice(model, 0, model.n_layer, settings.context)
        piece.decode_tokens([1], 0, (0,))
        piece.logits(0).argmax()
        seconds = time.perf_counter() - started
        piece.close()
    return seconds


def _our_peak(path: Path, settings: KernelSettings) -> float:
    module = "edge_runtime.bench.kernel_costs"
    command = [sys.executable, "-m", module, str(path), settings.kernels, str(settings.n_threads)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _run_and_print_peak(path: str, kernels: str, n_threads: int) -> None:
    with _Ours(Path(path), KernelSettings(kernels, n_threads)) as ours:
        ours.prefill()
        ours.token()
        print(peak_resident_bytes())


# ── the stock side ──────────────────────────────────────────────────────────────────────────────────────────────────


def _stock_batch(stock: StockProcess, k: int) -> float:
    return float(min(stock.call("time_batch", n_past=N_PAST, k=k, repeats=_TRIES, want="all")["seconds"]))


def _stock_token(stock: StockProcess) -> float:
    return float(np.median(stock.call("greedy", prompt=_prompt(N_PAST), n=_N_TOKENS)["seconds"][1:]))


def _stock_prefill(stock: StockProcess) -> float:
    return float(stock.call("greedy", prompt=_prompt(_N_PREFILL), n=1)["seconds"][0])


def _stock_load(stock: StockProcess, path: Path, settings: KernelSettings) -> float:
    return float(stock.call("load", model=str(path), **settings.stock_context)["seconds"])


def _stock_peak(path: Path, library: Path, settings: KernelSettings) -> float:
    with StockProcess(library) as stock:
        # as many rows of logits as our side gives
        stock.open(path, **settings.stock_context, n_outputs_max=max(SIZES))
        stock.call("greedy", prompt=_prompt(_N_PREFILL), n=1)
        stock.call("greedy", prompt=_prompt(N_PAST), n=_N_TOKENS)
        return float(stock.call("memory")["peak_bytes"])


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_shares(path: Path) -> tuple[dict[str, float], float]:
    """Share of the matrices' bytes by type, the largest first, and the share of types that the edge kernels take.

    Token embeddings count if they are the output head as well; else nothing is multiplied by them.
    """
    tensors = [t for t in GGUFReader(path).tensors if len(t.shape) > 1]
    if any(t.name == "output.weight" for t in tensors):
        tensors = [t for t in tensors if t.name != "token_embd.weight"]
    n_bytes: dict[str, int] = {}
    for tensor in tensors:
        kind = tensor.tensor_type.name.lower()
        n_bytes[kind] = n_bytes.get(kind, 0) + int(tensor.n_bytes)
    total = sum(n_bytes.values())
    shares = {kind: n / total for kind, n in sorted(n_bytes.items(), key=lambda item: -item[1])}
    return shares, sum(share for kind, share in shares.items() if kind in kernel_weight_types())


def requantised(
    source: Path, kind: str, folder: Path, stock: StockProcess, n_threads: int, say: Callable[[str], None]
) -> Path:
    """`source` in another of FILE_TYPES, made once and kept in `folder`."""
    target = folder / f"{source.stem}-as-{kind.lower()}.gguf"
    if not target.exists():
        say(f"make {target.name}")
        part = target.with_suffix(".part")
        stock.call("quantize", source=str(source), target=str(part), file_type=FILE_TYPES[kind], n_threads=n_threads)
        part.replace(target)
    return target


def random_model(kind: str, folder: Path, say: Callable[[str], None], shape: ModelShape = ONE_BILLION) -> Path:
    """A random model of a shape of 1B parameters in Q4_0 or Q8_0, made once and kept in `folder`."""
    target = folder / f"random-1b-{kind.lower()}{'-text' if shape.tokenizer else ''}.gguf"
    if not target.exists():
        say(f"make {target.name}")
        part = target.with_suffix(".part")
        write_random_model(part, replace(shape, weights=kind))
        part.replace(target)
    return target


if __name__ == "__main__":
    _run_and_print_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))
