"""Greedy answers of `EdgeLlama` on the edge kernels part from `Llama`'s on the stock library at near-ties only.

Other kernels, and flash attention, sum in another order, and so every logit moves a little. Where a text parts from
stock's, the gap between the two tokens in stock's own logits must be no more than a few times what such gaps usually
move by.

Run as a program, this module is the stock side, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bench.stock import StockProcess, serve
from edge_runtime.types import Floats

from .test_edge_llama_parity import ARGUMENTS, GREEDY, ROOT, SCENARIOS, answer

pytestmark = [pytest.mark.model, pytest.mark.stock]

# the gap of two tokens where texts part, in median movements of such a gap from stock to us; few move by more
A_FEW = 4.0
NEAR_TIE = 0.5  # and in logits, as for the engine
GUIDED = {"json", "schema", "function"}  # a grammar forbids tokens, but none that either side chose


@dataclass
class Run:
    """One call of `generate`: what it was given, and the tokens it gave."""

    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Parting:
    """Where two texts part. Gaps are how much the logits of each side prefer stock's token to ours."""

    scenario: str
    position: int
    stock_gap: float
    edge_gap: float


def is_near_tie(parting: Parting, usual: float) -> bool:
    """Whether the logits explain a parting, where gaps usually move by `usual`."""
    return parting.edge_gap <= 0 <= parting.stock_gap < min(A_FEW * usual, NEAR_TIE)


@contextmanager
def recorded(llama: Any) -> Iterator[list[Run]]:
    """The runs that are made within."""
    runs: list[Run] = []
    generate = llama.generate

    def record(tokens: Sequence[int], **arguments: Any) -> Iterator[int]:
        runs.append(Run([int(token) for token in tokens], []))
        for token in generate(tokens, **arguments):
            runs[-1].tokens.append(int(token))
            yield token

    llama.generate = record
    try:
        yield runs
    finally:
        del llama.generate


def logits_at_hand(llama: Any) -> Floats:
    """Those of the last token, (n_vocab,)."""
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()


class _Worker:
    """The stock side."""

    llama: Any = None

    def open(self, model: str) -> dict[str, Any]:
        from llama_cpp import Llama

        self.llama = Llama(model, **ARGUMENTS)
        return {}

    def runs(self, name: str, path: str) -> dict[str, Any]:
        """Runs of a scenario; the logits behind their tokens, one after the other, go to `path`."""
        rows: list[Floats] = []
        sample = self.llama.sample

        def look(**arguments: Any) -> int:
            rows.append(logits_at_hand(self.llama))
            return int(sample(**arguments))

        self.llama.sample = look
        with recorded(self.llama) as runs:
            answer(self.llama, name)
        del self.llama.sample
        np.save(path, np.array(rows))
        return {"runs": [asdict(run) for run in runs]}


@pytest.fixture(scope="module")
def stock_runs(
    stock_library: Path, demo_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Run], Floats]]:
    """Runs of the greedy scenarios, and the logits (n_tokens, n_vocab) that all their tokens were chosen from."""
    folder = tmp_path_factory.mktemp("logits")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with StockProcess(stock_library, __name__) as process:
            process.call("open", model=str(demo_path))
            for i, name in enumerate(GREEDY):
                path = folder / f"{i}.npy"
                runs = process.call("runs", name=name, path=str(path))["runs"]
                found[name] = [Run(**run) for run in runs], np.load(path)
    return found


def decisive(logits: Floats, name: str, text: Sequence[int]) -> Floats:
    """What a scenario's greedy choice is made from: `logits` with its bias, and its penalties for the tokens so far."""
    arguments = SCENARIOS[name][1]
    changed = logits.copy()
    for token, bias in arguments.get("logit_bias", {}).items():
        changed[int(token)] += bias
    seen, counts = np.unique(np.array(text, np.intp), return_counts=True)
    penalty = arguments.get("repeat_penalty", 1.0)
    changed[seen] = np.where(changed[seen] > 0, changed[seen] / penalty, changed[seen] * penalty)
    changed[seen] -= arguments.get("presence_penalty", 0.0) + counts * arguments.get("frequency_penalty", 0.0)
    return changed


def edge_logits(llama: Any, run: Run) -> Iterator[Floats]:
    """The logits that our kernels give for each token of a run: with them, a token's do not depend on the batch."""
    llama.reset()
    for token in [None, *run.tokens[:-1]]:
        llama.eval(run.prompt if token is None else [token])
        yield logits_at_hand(llama)


def compare(
    llama: Any, name: str, stock: tuple[list[Run], Floats], ours: Sequence[Run]
) -> tuple[list[float], Parting | None]:
    """How far our kernels move the gap between stock's two best tokens, by position; and where the texts part."""
    moved: list[float] = []
    rows = iter(stock[1])
    for theirs, own in zip(stock[0], ours, strict=True):
        assert own.prompt == theirs.prompt, f"the prompts of '{name}' differ"
        for i, (edge_raw, raw) in enumerate(zip(edge_logits(llama, theirs), rows, strict=False)):
            logits, edge = (decisive(side, name, theirs.tokens[:i]) for side in (raw, edge_raw))
            best, second = logits.argsort()[:-3:-1]
            moved.append(abs(float((logits[best] - logits[second]) - (edge[best] - edge[second]))))
            a, b = theirs.tokens[i], own.tokens[i]
            assert a == best or name in GUIDED, f"these are not the logits behind token {i} of '{name}'"
            if a != b:
                return moved, Parting(name, i, float(logits[a] - logits[b]), float(edge[a] - edge[b]))
        assert own.tokens == theirs.tokens
    return moved, None


@pytest.fixture(scope="module")
def edge(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """At full depth, whose text no draft changes."""
    from edge_runtime.llama import EdgeLlama

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
        with closing(EdgeLlama(str(demo_path), mode="full", **ARGUMENTS)) as llama:
            yield llama


def test_texts_part_from_stock_at_near_ties_only(
    stock_runs: dict[str, tuple[list[Run], Floats]], edge: Any, record_property: Callable[[str, object], None]
) -> None:
    ours: dict[str, list[Run]] = {}
    for name in GREEDY:
        with recorded(edge) as ours[name]:
            answer(edge, name)
    found = [compare(edge, name, stock_runs[name], ours[name]) for name in GREEDY]
    usual = float(np.median([movement for moved, _ in found for movement in moved]))
    partings = [parting for _, parting in found if parting is not None]
    record_property(
        "finding",
        f"EdgeLlama on edge kernels: {len(partings)} of {len(GREEDY)} greedy answers part from stock's, at gaps of "
        f"{[round(p.stock_gap, 3) for p in partings]} between two logits, which usually move by {usual:.3f}",
    )
    assert [parting for parting in partings if not is_near_tie(parting, usual)] == []


def test_another_token_where_stock_is_sure_is_no_near_tie(
    stock_runs: dict[str, tuple[list[Run], Floats]], edge: Any
) -> None:
    (run,), logits = stock_runs["repeated"]
    ordered = np.sort(logits, axis=1)
    sure = int((ordered[:, -1] - ordered[:, -2]).argmax())
    other = int(logits[sure].argsort()[-2])
    changed = Run(run.prompt, [*run.tokens[:sure], other, *run.tokens[sure + 1 :]])
    moved, parting = compare(edge, "repeated", stock_runs["repeated"], [changed])
    assert parting is not None
    assert parting.position == sure == len(moved) - 1
    assert not is_near_tie(parting, float(np.median(moved)))


if __name__ == "__main__":
    serve(_Worker())
