"""Stock llama.cpp in a process of its own: the oracle that slices are compared with, and the other side of timings.

Two builds of one library cannot share a process, so `StockProcess` starts `python -m edge_runtime.bench.stock` with
the stock library and talks to it in JSON lines. Arrays travel through .npy files.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from .._library import ENV_BINDINGS, ENV_OURS
from ..errors import LibraryError
from ..types import Floats


class StockProcess:
    """One stock context at a time, driven from here. Close it, or use it in a `with`."""

    def __init__(self, library: Path | str, worker: str = "edge_runtime.bench.stock") -> None:
        """`library` is the directory of an unpatched libllama (scripts/build_llama --stock --print-path).

        `worker` is the module that answers there.
        """
        environment = {**os.environ, ENV_BINDINGS: str(library)}
        environment.pop(ENV_OURS, None)
        self._folder = tempfile.TemporaryDirectory(prefix="edge-stock-")
        self._child = subprocess.Popen(
            [sys.executable, "-m", worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def call(self, op: str, **arguments: Any) -> Any:
        """Run one operation of `_Worker` and return its answer."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise LibraryError(f"stock llama.cpp ended during '{op}' (exit status {self._child.wait()})")
        return json.loads(line)

    def open(self, model: Path | str, **options: Any) -> None:
        """Open a context; options as in `_Worker.open`."""
        self.call("open", model=str(model), **options)

    def decode(
        self,
        tokens: Sequence[int],
        want: Sequence[int],
        *,
        positions: Sequence[int] | None = None,
        seq_ids: Sequence[int] | None = None,
    ) -> Floats:
        """Decode one batch; logits (len(want), n_vocab)."""
        path = str(Path(self._folder.name, "logits.npy"))
        self.call("decode", tokens=list(tokens), want=list(want), positions=positions, seq_ids=seq_ids, path=path)
        return cast(Floats, np.load(path))

    def greedy(self, prompt: Sequence[int], n: int) -> tuple[list[int], Floats]:
        """Prefill and n greedy tokens from an empty context: tokens, and logits (n, n_vocab) they were chosen from."""
        path = str(Path(self._folder.name, "logits.npy"))
        tokens = self.call("greedy", prompt=list(prompt), n=n, path=path)["tokens"]
        return tokens, cast(Floats, np.load(path))

    def close(self) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def library_variant(library: Path) -> str:
    """What scripts/build_llama says it built in a directory: "stock", "edge", or "unknown" to it."""
    try:
        return str(json.loads((library / "manifest.json").read_bytes())["variant"])
    except (OSError, ValueError, TypeError, KeyError):
        return "unknown"


def checked_library(library: Path, warn: Callable[[str], None]) -> Path:
    """`library`, absolute; with a warning if it was not built as stock. Raises LibraryError if there is none."""
    library = library.absolute()
    if not any(library.glob("libllama.*")):
        raise LibraryError(f"there is no llama.cpp library in {library}", "build it with scripts/build_llama --stock")
    variant = library_variant(library)
    if variant != "stock":
        warn(f"the library in {library} is of variant '{variant}', not 'stock': compare with care")
    return library


def peak_resident_bytes() -> int:
    """Peak resident memory of this process.

    Linux: from /proc, because getrusage() also counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (text for text in status.read_text().splitlines() if text.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Worker:
    """The child's side: plain llama-cpp-python calls, nothing of ours."""

    def __init__(self) -> None:
        import llama_cpp

        self.c: Any = llama_cpp
        self._log = self.c.llama_log_callback(lambda _level, _text, _user: None)
        self.c.llama_log_set(self._log, ctypes.c_void_p(0))
        self.c.llama_backend_init()
        self.context: Any = None
        self.model: Any = None

    def open(
        self,
        model: str,
        n_ctx: int = 512,
        n_batch: int = 128,
        n_threads: int = 2,
        flash_attention: bool | None = None,
        kv_type: int = 1,
        n_seq_max: int = 1,
        n_outputs_max: int = 0,
    ) -> dict[str, int]:
        """Close what was open; `kv_type` is a ggml type, n_outputs_max 0 is llama.cpp's default (n_batch)."""
        c = self.c
        self._close()
        self.model = c.llama_model_load_from_file(os.fsencode(model), c.llama_model_default_params())
        if not self.model:
            raise LibraryError(f"stock llama.cpp cannot load {model}")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_outputs_max = n_ctx, n_seq_max, n_outputs_max
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = {None: -1, False: 0, True: 1}[flash_attention]
        params.kv_unified = params.swa_full = params.no_perf = True
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise LibraryError(f"stock llama.cpp cannot open a context for {model}")
        self.n_batch = n_batch
        self.n_vocab = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model)))
        self.batch = c.llama_batch_init(n_batch, 0, 1)
        return {"n_vocab": self.n_vocab}

    def load(self, token: int = 1, **options: Any) -> dict[str, float]:
        """Open as `open` does, with the seconds until the first token has come: a mapped file is read with it."""
        self._close()
        started = time.perf_counter()
        self.open(**options)
        self.greedy([token], 1)
        return {"seconds": time.perf_counter() - started}

    def quantize(self, source: str, target: str, file_type: int, n_threads: int) -> dict[str, int]:
        """Write `source` as another enum llama_ftype, from whatever type it is of."""
        params = self.c.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = file_type, n_threads, True
        if self.c.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
            raise LibraryError(f"stock llama.cpp cannot quantise {source}")
        return {}

    def _close(self) -> None:
        if self.context:
            self.c.llama_batch_free(self.batch)
            self.c.llama_free(self.context)
        if self.model:
            self.c.llama_model_free(self.model)
        self.context = self.model = None

    def _run(self, tokens: list[int], positions: list[int], seq_ids: list[int], want: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq_ids[i]
            batch.logits[i] = i in want
        if self.c.llama_decode(self.context, batch) != 0:
            raise LibraryError("stock llama_decode failed")

    def _logits(self, row: int) -> Floats:
        pointer = self.c.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def decode(
        self, tokens: list[int], want: list[int], positions: list[int] | None, seq_ids: list[int] | None, path: str
    ) -> dict[str, int]:
        n = len(tokens)
        self._run(tokens, positions or list(range(n)), seq_ids or [0] * n, set(want))
        np.save(path, np.array([self._logits(row) for row in want], np.float32))
        return {}

    def clear(self) -> dict[str, int]:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        return {}

    def _prefill(self, prompt: list[int]) -> int:
        """Decode the prompt in batches from an empty context; the batch row of its last token."""
        self.clear()
        for start in range(0, len(prompt), self.n_batch):
            part = prompt[start : start + self.n_batch]
            self._run(part, list(range(start, start + len(part))), [0] * len(part), {len(part) - 1})
        return (len(prompt) - 1) % self.n_batch

    def greedy(self, prompt: list[int], n: int, path: str | None = None) -> dict[str, Any]:
        """n greedy tokens; the time of the prefill and of each decoded token, in seconds."""
        started = time.perf_counter()
        row = self._prefill(prompt)
        tokens: list[int] = []
        kept: list[Floats] = []
        seconds: list[float] = []
        for i in range(n):
            logits = self._logits(row)
            if path:
                kept.append(logits.copy())
            tokens.append(int(logits.argmax()))
            seconds.append(time.perf_counter() - started)
            if i == n - 1:
                break
            started = time.perf_counter()
            self._run([tokens[-1]], [len(prompt) + i], [0], {0})
            row = 0
        if path:
            np.save(path, np.array(kept, np.float32))
        return {"tokens": tokens, "seconds": seconds}

    def decode_unread(self, prompt: list[int], n: int) -> dict[str, list[float]]:
        """Seconds of each of n tokens decoded after the prompt, logits computed but not read.

        Without any output, llama.cpp would leave out most of the last layer as well.
        """
        self._prefill(prompt)
        seconds: list[float] = []
        for i in range(n):
            started = time.perf_counter()
            self._run([5], [len(prompt) + i], [0], {0})
            self.c.llama_synchronize(self.context)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def time_batch(self, n_past: int, k: int, repeats: int, want: str) -> dict[str, list[float]]:
        """Seconds of a batch of k tokens after n_past others; `want` logits of 'all', 'last' or 'none'."""
        rows = {"all": set(range(k)), "last": {k - 1}, "none": set()}[want]
        self._prefill([1 + i % 100 for i in range(n_past)])
        memory = self.c.llama_get_memory(self.context)
        seconds: list[float] = []
        for _ in range(repeats):
            started = time.perf_counter()
            self._run([5] * k, list(range(n_past, n_past + k)), [0] * k, rows)
            self.c.llama_synchronize(self.context)
            seconds.append(time.perf_counter() - started)
            self.c.llama_memory_seq_rm(memory, 0, n_past, -1)
        return {"seconds": seconds}

    def time_messages(self, prefix: list[int], messages: list[list[int]], kind: str) -> dict[str, float]:
        """Seconds for messages behind a prefix, each through the whole model, with the logits of its last token.

        Kind 'cached': the prefix is computed before and kept, one message at a time, as llama-cpp-python does for
        prompts that begin alike. 'plain': prefix and message each time. 'batched': as cached, all messages as
        sequences of one batch, which must have room for them.
        """
        memory = self.c.llama_get_memory(self.context)
        n = len(prefix)
        self._prefill(prefix)
        started = time.perf_counter()
        if kind == "batched":
            tokens = [token for message in messages for token in message]
            positions = [n + i for message in messages for i in range(len(message))]
            seq_ids = [q for q, message in enumerate(messages, 1) for _ in message]
            ends = [i for i in range(len(seq_ids)) if i + 1 == len(seq_ids) or seq_ids[i + 1] != seq_ids[i]]
            for q in range(1, len(messages) + 1):
                self.c.llama_memory_seq_cp(memory, 0, q, -1, -1)
            self._run(tokens, positions, seq_ids, set(ends))
            for row in ends:
                self._logits(row)
        for message in messages if kind != "batched" else ():
            tokens = message if kind == "cached" else prefix + message
            start = n if kind == "cached" else 0
            self.c.llama_memory_seq_rm(memory, 0, start, -1)
            for first in range(0, len(tokens), self.n_batch):
                part = tokens[first : first + self.n_batch]
                self._run(part, list(range(start + first, start + first + len(part))), [0] * len(part), {len(part) - 1})
            self._logits((len(tokens) - 1) % self.n_batch)
        self.c.llama_synchronize(self.context)
        return {"seconds": time.perf_counter() - started}

    def memory(self) -> dict[str, int]:
        """Peak resident memory of this process in bytes."""
        return {"peak_bytes": peak_resident_bytes()}


def serve(worker: object) -> None:
    """Answer each line of stdin, an operation and its arguments, with a line on stdout."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("op"))(**request)
        print(json.dumps(answer if isinstance(answer, dict) else {}), flush=True)


if __name__ == "__main__":
    serve(_Worker())
