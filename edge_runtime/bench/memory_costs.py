"""Resident memory of `Llama` on stock llama.cpp and of `EdgeLlama`, each in a process of its own.

Three times: with the package imported, with the model loaded, and with the context full of tokens. Run as a program,
this module is such a process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from .._library import library_dir
from ..errors import EdgeError, LibraryError
from .stock import StockProcess, serve

MODES = ("full", "auto", "exit")
N_ANSWER = 64  # tokens of an answer behind the prompt that fills the context
_PERIOD = 250  # so many different tokens repeat themselves in the prompt: there is something to draft


@dataclass(frozen=True, slots=True)
class Side:
    """A class with arguments for its constructor: `EdgeLlama` with `edge`, else `Llama` on the stock library."""

    name: str
    edge: bool
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process."""

    rss: int
    pss: int | None  # pages shared with other processes count by their share; None: the system does not say


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one side with a context of `n_ctx` tokens."""

    side: str
    n_ctx: int
    imported: Memory
    loaded: Memory
    filled: Memory


def sides_of(modes: Sequence[str], pack: str) -> list[Side]:
    """`Llama` as it comes and with flash attention, which `EdgeLlama` has by default; then some of MODES.

    `pack` is for mode exit.
    """
    arguments = {mode: {"mode": mode, "pack": pack} if mode == "exit" else {"mode": mode} for mode in modes}
    return [
        Side("Llama", edge=False),
        Side("Llama, flash_attn", edge=False, arguments={"flash_attn": True}),
        *(Side(f"EdgeLlama, {mode}", edge=True, arguments=given) for mode, given in arguments.items()),
    ]


def measure_memory(
    model: Path, sides: Sequence[Side], contexts: Sequence[int], stock: Path, n_threads: int, say: Callable[[str], None]
) -> list[Footprint]:
    """All `sides`, on the `stock` library those that want it, with all `contexts`, one after the other.

    Before that, `EdgeLlama` is loaded once for what it keeps, the costs of batches and files of heads, which takes
    memory when it is made. Raises EdgeError for what a side refuses, LibraryError if a process ends.
    """

    def load(side: Side, n_ctx: int) -> _Child:
        say(f"{side.name}, {n_ctx} tokens: load")
        return _Child(side, model, n_ctx, library_dir() if side.edge else stock, n_threads)

    for side in sides:
        if side.edge:
            with load(side, min(contexts)):
                pass
    found = []
    for n_ctx in contexts:
        for side in sides:
            with load(side, n_ctx) as child:
                say(f"{side.name}, {n_ctx} tokens: fill the context")
                found.append(Footprint(side.name, n_ctx, child.imported, child.loaded, child.fill()))
    return found


class _Child:
    """A process in which one side has loaded the model. Use it in a `with`."""

    def __init__(self, side: Side, model: Path, n_ctx: int, library: Path, n_threads: int) -> None:
        """Raises EdgeError, LibraryError."""
        self._name, self._n_ctx = f"{side.name} with {n_ctx} tokens", n_ctx
        self._process = StockProcess(library, __name__)
        try:
            self.imported = self._ask("start", edge=side.edge)
            self.loaded = self._ask(
                "load", model=str(model), n_ctx=n_ctx, n_threads=n_threads, arguments=side.arguments
            )
        except BaseException:
            self._process.close()
            raise

    def fill(self) -> Memory:
        """Fill the context. Raises EdgeError, LibraryError."""
        return self._ask("fill", n_ctx=self._n_ctx)

    def _ask(self, op: str, **arguments: Any) -> Memory:
        try:
            answer = self._process.call(op, **arguments)
        except LibraryError as error:
            hint = "there may be too little memory: give smaller --contexts"
            raise LibraryError(f"the process of {self._name} ended", hint) from error
        if "error" in answer:
            raise EdgeError(f"{self._name}: {answer['error']}")
        return Memory(**answer)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()


def growth(found: Sequence[Footprint]) -> dict[str, int]:
    """Bytes of resident memory, by side, that the largest context takes more than the smallest when both are full."""
    by_side: dict[str, dict[int, int]] = {}
    for footprint in found:
        by_side.setdefault(footprint.side, {})[footprint.n_ctx] = footprint.filled.rss
    return {side: filled[max(filled)] - filled[min(filled)] for side, filled in by_side.items()}


# ── the process measured ────────────────────────────────────────────────────────────────────────────────────────────


def process_memory(rollup: Path = Path("/proc/self/smaps_rollup")) -> Memory:
    """Of this process; from `rollup` where the kernel has it."""
    try:
        fields = [line.split() for line in rollup.read_text().splitlines()]
    except OSError:
        return Memory(psutil.Process().memory_info().rss, None)
    kib = {words[0]: int(words[1]) for words in fields if words[-1] == "kB"}
    pss = kib.get("Pss:")
    return Memory(1024 * kib["Rss:"], None if pss is None else 1024 * pss)


class _Worker:
    """The child's side; each answer is the memory of then."""

    kind: Any = None
    llama: Any = None

    def start(self, edge: bool) -> dict[str, Any]:
        """Import the class."""
        try:
            if edge:
                from ..llama import EdgeLlama

                self.kind = EdgeLlama
            else:
                from llama_cpp import Llama

                self.kind = Llama
        except EdgeError as error:
            return {"error": str(error)}
        return asdict(process_memory())

    def load(self, model: str, n_ctx: int, n_threads: int, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            self.llama = self.kind(
                model, n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, verbose=False, **arguments
            )
        except (EdgeError, ValueError) as error:  # the latter is what Llama raises
            return {"error": str(error)}
        return asdict(process_memory())

    def fill(self, n_ctx: int) -> dict[str, Any]:
        """A prompt that leaves room for N_ANSWER tokens, and those."""
        different = min(_PERIOD, self.llama.n_vocab())
        prompt = [i % different for i in range(n_ctx - N_ANSWER)]
        try:
            for _ in itertools.islice(self.llama.generate(prompt, temp=0.0), N_ANSWER):
                pass
        except RuntimeError as error:
            return {"error": str(error)}
        return asdict(process_memory())


if __name__ == "__main__":
    serve(_Worker())
