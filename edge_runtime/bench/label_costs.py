"""What a label pack costs beside stock llama.cpp: messages per second, memory, and what it says of foreign texts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..labels.classifier import ClassifierOptions, LabelClassifier, message_tokens, prefix_tokens
from ..labels.pack import LabelPack
from ..labels.prepare import prepare
from ..metrics import auroc
from ..native import Model
from .measure import Spread, spread
from .stock import StockProcess

_CHUNK = 40  # messages
_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """One way of deciding messages: messages per second, and times as fast as stock with the same prefix kept."""

    name: str
    per_second: Spread
    ratio: Spread


@dataclass(frozen=True, slots=True)
class Speeds:
    """All ways, in turn on the same messages; shares of messages that left at each stage."""

    speeds: list[Speed]
    cascade_left_at: dict[int, float]
    network_left_at: dict[int, float]


def measure_speed(
    pack: LabelPack, model_path: Path, texts: Sequence[str], stock: StockProcess, n_threads: int
) -> Speeds:
    """Chunk by chunk, every way in turn, the order turned round each time; the first chunk only warms up."""
    with Model(str(model_path)) as model:
        prefix = prefix_tokens(model, pack.instruction)
        options = {"n_threads": n_threads}
        cascade = LabelClassifier(pack, model, ClassifierOptions(n_threads=n_threads))
        network = LabelClassifier(pack, model, ClassifierOptions(n_threads=n_threads, use_ngrams=False))
        n_ctx = len(prefix) + max(512, pack.max_tokens)
        stock.open(model_path, n_ctx=n_ctx, n_batch=512, n_seq_max=_SEQUENCES + 1, flash_attention=True, **options)

        def tokens_of(part: Sequence[str]) -> list[list[int]]:
            return [message_tokens(model, prepare(text), pack.max_tokens)[0] for text in part]

        def ours(classifier: LabelClassifier, size: int) -> Callable[[Sequence[str]], float]:
            def seconds(part: Sequence[str]) -> float:
                started = time.perf_counter()
                for first in range(0, len(part), size):
                    classifier.predict(part[first : first + size])
                return time.perf_counter() - started

            return seconds

        def theirs(kind: str) -> Callable[[Sequence[str]], float]:
            def seconds(part: Sequence[str]) -> float:
                messages = tokens_of(part)
                size = _SEQUENCES if kind == "batched" else len(messages)
                groups = [messages[i : i + size] for i in range(0, len(messages), size)]
                calls = (stock.call("time_messages", prefix=prefix, messages=g, kind=kind)["seconds"] for g in groups)
                return float(sum(calls))

            return seconds

        ways = {
            "stock, prefix kept": theirs("cached"),
            "stock, prefix kept, 16 in a batch": theirs("batched"),
            "stock, whole prompt each time": theirs("plain"),
            "cascade": ours(cascade, _CHUNK),
            "cascade, one message at a time": ours(cascade, 1),
            "network stages only": ours(network, _CHUNK),
            "network stages only, one message at a time": ours(network, 1),
        }
        chunks = [texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK)]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn, part in enumerate(chunks):
            for name in list(ways) if turn % 2 else reversed(ways):
                times[name].append(ways[name](part) / len(part))
            if not turn:
                for kept in times.values():
                    kept.clear()
        base = times["stock, prefix kept"]
        speeds = [
            Speed(name, spread([1 / s for s in kept]), spread([b / s for b, s in zip(base, kept, strict=True)]))
            for name, kept in times.items()
        ]
        left = [_shares(classifier) for classifier in (cascade, network)]
        cascade.close()
        network.close()
        return Speeds(speeds, left[0], left[1])


def _shares(classifier: LabelClassifier) -> dict[int, float]:
    layers = classifier.pack.layers
    return {layers[k]: n / classifier.stats.messages for k, n in sorted(classifier.stats.by_stage.items())}


@dataclass(frozen=True, slots=True)
class Shift:
    """Texts unlike the training messages, told from messages like them: AUROC of the novelty, and shares flagged."""

    name: str
    auroc_states: float  # novelty of the states at the first boundary
    flagged: float  # share marked unfamiliar, by words or states
    flagged_in_domain: float


def measure_shift(
    pack: LabelPack, model: Model, in_domain: Sequence[str], foreign: dict[str, Sequence[str]], n_threads: int
) -> list[Shift]:
    """Every message goes through the network, so that each has a novelty."""

    def look(texts: Sequence[str]) -> tuple[list[float], float]:
        options = ClassifierOptions(n_threads=n_threads, use_ngrams=False)
        with LabelClassifier(pack, model, options) as classifier:
            decisions = classifier.predict(texts)
        novelties = [d.novelty for d in decisions if d.novelty is not None]
        return novelties, sum(d.unfamiliar for d in decisions) / len(decisions)

    known, flagged_known = look(in_domain)
    found = []
    for name, texts in foreign.items():
        strange, flagged = look(texts)
        truth = np.array([False] * len(known) + [True] * len(strange))
        found.append(Shift(name, auroc(truth, np.array(known + strange, np.float32)), flagged, flagged_known))
    return found


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak resident memory of a process that decides some messages, in bytes."""

    ours: int
    stock: int
    n_open_slices: int
    n_slices: int


def measure_memory(
    pack_path: Path, model_path: Path, texts: Sequence[str], stock: StockProcess, n_threads: int
) -> Memory:
    """Ours and stock each in a fresh process; `stock` must be one that has not opened anything yet."""
    pack = LabelPack.load(pack_path)
    request = {"pack": str(pack_path), "model": str(model_path), "texts": list(texts), "n_threads": n_threads}
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime.bench.label_costs"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    with Model(str(model_path)) as model:
        prefix = prefix_tokens(model, pack.instruction)
        messages = [message_tokens(model, prepare(text), pack.max_tokens)[0] for text in texts]
    n_ctx = len(prefix) + max(256, pack.max_tokens)
    stock.open(model_path, n_ctx=n_ctx, n_batch=512, flash_attention=True, n_threads=n_threads)
    stock.call("time_messages", prefix=prefix, messages=messages, kind="cached")
    return Memory(answer["peak_bytes"], stock.call("memory")["peak_bytes"], answer["n_open"], len(pack.probes))


def _decide_and_report() -> None:
    """The process whose memory is measured."""
    from .stock import peak_resident_bytes

    request = json.load(sys.stdin)
    pack = LabelPack.load(request["pack"])
    with LabelClassifier(pack, request["model"], ClassifierOptions(n_threads=request["n_threads"])) as classifier:
        for _ in classifier.stream(request["texts"]):
            pass
        n_open = classifier.n_open_slices
    print(json.dumps({"peak_bytes": peak_resident_bytes(), "n_open": n_open}))


if __name__ == "__main__":
    _decide_and_report()
