"""A llama_context that runs a range of layers, with numpy in and out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ContextFullError, DecodeError, LibraryError, MemoryLimitError, UsageError
from ..types import Floats
from .interrupt import interrupt_deferred
from .library import Closed, load
from .model import Model

_MAX_CTX = 2**31 - 1  # positions are of 32 bits
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_MAX_THREADS = 512  # GGML_MAX_N_THREADS


class KvType(str, Enum):
    """Storage of keys and values; anything but f16 and f32 needs flash attention."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"

    @property
    def ggml(self) -> int:
        return {KvType.F32: 0, KvType.F16: 1, KvType.Q8_0: 8}[self]

    @property
    def bytes_per_value(self) -> float:
        return {KvType.F32: 4.0, KvType.F16: 2.0, KvType.Q8_0: 34 / 32}[self]


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """What every slice of a model shares. `n_batch` tokens at most go through a slice at once."""

    n_ctx: int = 2048
    n_batch: int = 128
    n_seq_max: int = 1
    n_threads: int = 0  # 0: all physical cores
    flash_attention: bool | None = None  # None: llama.cpp decides
    kv_type: KvType = KvType.F16
    # False: n_ctx is shared out evenly, and no sequence's sums depend on the others; none can share cells then
    kv_unified: bool = True

    def __post_init__(self) -> None:
        if self.kv_type is KvType.Q8_0 and self.flash_attention is False:
            raise UsageError("a q8_0 KV cache needs flash attention", "drop one of the two options")
        if min(self.n_ctx, self.n_batch, self.n_seq_max) < 1 or self.n_threads < 0:
            raise UsageError("context, batch and sequences must be at least 1, threads at least 0 (= all cores)")
        limits = (self.n_ctx, _MAX_CTX, "tokens"), (self.n_seq_max, _MAX_SEQUENCES, "sequences")
        for value, most, what in (*limits, (self.n_threads, _MAX_THREADS, "threads")):
            if value > most:
                raise UsageError(f"{value} {what} are too many: llama.cpp takes {most} at most")


class Context:
    """Layers [start, end) of `model` and their KV cache."""

    def __init__(
        self,
        model: Model,
        start: int,
        end: int,
        options: ContextOptions,
        *,
        n_outputs_max: int = 1,
        want_hidden: bool = False,
    ) -> None:
        """Open the context; `n_outputs_max` rows of logits can be asked of one decode.

        Raises MemoryLimitError if its buffers cannot be allocated, LibraryError with llama.cpp's reason otherwise.
        """
        api = load()
        self._c, self._lib, self._log = api.c, api.lib, api.log
        self._model, self._n_seq_max = model, options.n_seq_max
        self._n_vocab, self.n_embd = model.n_vocab, model.n_embd
        self.n_batch = min(options.n_batch, options.n_ctx)
        self.n_outputs_max = max(n_outputs_max, options.n_seq_max)
        self._hidden_of_outputs = end == model.n_layer
        self.has_hidden = want_hidden or not self._hidden_of_outputs
        self._views: dict[int, Floats] = {}
        self._hidden_view: tuple[int, Floats] | None = None
        params = self._c.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = options.n_seq_max
        params.n_outputs_max = self.n_outputs_max
        params.n_threads = params.n_threads_batch = options.n_threads
        params.type_k = params.type_v = options.kv_type.ggml
        params.flash_attn_type = {None: -1, False: 0, True: 1}[options.flash_attention]
        params.swa_full = True  # a rollback must find every position
        params.kv_unified = options.kv_unified
        params.no_perf = True
        if not model.handle:
            raise UsageError("this model is closed")
        # opening writes many lines to the log, which is a callback
        with self._log.fresh() as log, interrupt_deferred() as interrupted:
            self.handle = self._lib.edge_slice_init(model.handle, params, start, end, want_hidden)
            reason = log.reason() or "llama.cpp gave no reason"
            if interrupted():
                self.close()
        if not self.handle:
            kind = MemoryLimitError if "alloc" in reason else LibraryError
            raise kind(f"layers {start} to {end} cannot be opened: {reason}", "try a smaller --ctx")
        self._memory = self._c.llama_get_memory(self.handle)
        model.contexts.add(self)
        self._make_batches()

    def _make_batches(self) -> None:
        n, c = self.n_batch, self._c
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._seq = np.zeros(n, np.int32)
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(n, dtype=np.uint64)
        self._want = np.zeros(n, np.int8)

        def pointer(array: NDArray[Any], kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        shared = {
            "pos": pointer(self._pos, ctypes.c_int32),
            "n_seq_id": pointer(self._n_seq, ctypes.c_int32),
            "seq_id": pointer(self._seq_pointers, ctypes.POINTER(ctypes.c_int32)),
            "logits": pointer(self._want, ctypes.c_int8),
        }
        self._token_batch = c.llama_batch(token=pointer(self._token, ctypes.c_int32), **shared)
        self._state_batch = c.llama_batch(**shared)

    def route_to(self, others: Sequence[Context]) -> Route:
        """A way for batches through this context and then `others`, states never leaving llama.cpp in between."""
        return Route([self, *others])

    def decode_tokens(
        self,
        tokens: Sequence[int],
        first_pos: int,
        want: Sequence[int] = (),
        seq_ids: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        route: Route | None = None,
    ) -> None:
        """Run tokens at positions first_pos… (or `positions`) of sequence 0 (or `seq_ids`); `want` rows get logits.

        With a `route` that starts here, run them through all of it; the logits are the last context's.
        """
        n = len(tokens)
        self._fill(n, first_pos, want, seq_ids, positions, route)
        if n == 1:
            self._token[0] = tokens[0]
        else:
            self._token[:n] = tokens
        self._token_batch.n_tokens = n
        self._decode(self._token_batch, n, route)

    def decode_states(
        self,
        states: Floats,
        first_pos: int,
        want: Sequence[int] = (),
        seq_ids: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        route: Route | None = None,
    ) -> None:
        """As `decode_tokens`, for hidden states (n, n_embd) float32, C-contiguous."""
        n = states.shape[0]
        if states.shape[1:] != (self.n_embd,) or states.dtype != np.float32 or not states.flags.c_contiguous:
            raise UsageError(f"states must be contiguous float32 of shape (n, {self.n_embd}), not {states.shape}")
        self._fill(n, first_pos, want, seq_ids, positions, route)
        self._state_batch.embd = ctypes.cast(states.ctypes.data, ctypes.POINTER(ctypes.c_float))
        self._state_batch.n_tokens = n
        self._decode(self._state_batch, n, route)

    def _fill(
        self,
        n: int,
        first_pos: int,
        want: Sequence[int],
        seq_ids: Sequence[int] | None,
        positions: Sequence[int] | None,
        route: Route | None,
    ) -> None:
        n_outputs_max = route.last.n_outputs_max if route else self.n_outputs_max
        if not 1 <= n <= self.n_batch:
            raise UsageError(f"a batch of {n} does not fit: this slice takes 1 to {self.n_batch} tokens at once")
        if len(want) > n_outputs_max:
            raise UsageError(f"{len(want)} rows of logits asked for, this slice gives {n_outputs_max} at most")
        if n == 1 and positions is None and seq_ids is None:
            self._pos[0], self._seq[0], self._want[0] = first_pos, 0, len(want)
            return
        self._pos[:n] = np.arange(first_pos, first_pos + n) if positions is None else positions
        self._seq[:n] = 0 if seq_ids is None else seq_ids
        self._want[:n] = 0
        for row in want:
            self._want[row] = 1

    def _decode(self, batch: object, n: int, route: Route | None) -> None:
        if route is None:
            status = self._c.llama_decode(self.handle, batch)
        else:
            status = self._lib.edge_slices_decode(route.handles, route.n_contexts, batch)
        if status == 0:
            return
        if status == 1:
            raise ContextFullError(f"no room for {n} more tokens in the KV cache", "use a larger --ctx")
        reason = self._log.reason()
        self._log.clear()  # nobody does before a decode, and the next reason must not be this one
        raise DecodeError(f"llama.cpp failed on a batch of {n} (status {status}){': ' + reason if reason else ''}")

    def logits(self, row: int) -> Floats:
        """Logits (n_vocab,) of batch row `row`, which was in `want`. A view, valid until the next decode."""
        address = self._lib.logits_address(self.handle, row)
        if address is None:
            raise DecodeError(f"no logits were computed for row {row}")
        view = self._views.get(address)
        if view is None:
            view = self._views[address] = self._view(address, self._n_vocab)
        return view

    def hidden(self, n_rows: int) -> Floats:
        """Hidden states (n_rows, n_embd) after this slice's last layer, before the final norm.

        One row per batch token, or, where the slice ends the model, per wanted row.
        A view, valid until the next decode.
        """
        address = self._lib.edge_slice_hidden(self.handle)
        if not address:
            raise DecodeError("this slice was opened without hidden states")
        if self._hidden_view is None or self._hidden_view[0] != address:
            # the buffer always has room for a whole batch of states, but only for the rows of outputs at the end
            rows = self.n_outputs_max if self._hidden_of_outputs else self.n_batch
            self._hidden_view = (address, self._view(address, rows * self.n_embd).reshape(rows, self.n_embd))
        return self._hidden_view[1][:n_rows]

    @staticmethod
    def _view(address: int, count: int) -> Floats:
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))

    def remove(self, from_pos: int, seq_id: int = 0) -> None:
        """Forget positions from_pos and later of a sequence."""
        self._check_sequence(seq_id)
        if not self._c.llama_memory_seq_rm(self._memory, seq_id, from_pos, -1):
            raise DecodeError(f"positions from {from_pos} cannot be removed from the KV cache")

    def copy_sequence(self, source: int, target: int) -> None:
        """Let an empty sequence share what another holds; nothing is copied in memory."""
        self._check_sequence(source)
        self._check_sequence(target)
        self._c.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self) -> None:
        self._c.llama_memory_clear(self._memory, False)

    def last_position(self, seq_id: int = 0) -> int:
        """Highest position held of a sequence, -1 if none."""
        self._check_sequence(seq_id)
        return int(self._c.llama_memory_seq_pos_max(self._memory, seq_id))

    def state(self, seq_id: int = 0) -> bytes:
        """The KV cache of one sequence, as llama.cpp writes it."""
        self._check_sequence(seq_id)
        size = self._c.llama_state_seq_get_size(self.handle, seq_id)
        buffer = (ctypes.c_uint8 * size)()
        written = self._c.llama_state_seq_get_data(self.handle, buffer, size, seq_id)
        return bytes(buffer[:written]) if written < size else bytes(buffer)

    def set_state(self, data: bytes, seq_id: int = 0) -> None:
        self._check_sequence(seq_id)
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        with self._log.fresh() as log:
            if self._c.llama_state_seq_set_data(self.handle, buffer, len(data), seq_id) == 0:
                raise DecodeError(f"the saved state does not fit this slice: {log.reason()}")

    def _check_sequence(self, seq_id: int) -> None:
        if not 0 <= seq_id < self._n_seq_max:
            raise UsageError(f"sequence {seq_id} is none of this slice's {self._n_seq_max}", "raise n_seq_max")

    def set_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """For single tokens and for batches, None: as many. Raises UsageError for numbers out of range."""
        for n in (n_threads, n_threads_batch or n_threads):
            if not 1 <= n <= _MAX_THREADS:
                raise UsageError(f"{n} threads cannot be used", f"allowed: from 1 to {_MAX_THREADS}")
        self._c.llama_set_n_threads(self.handle, n_threads, n_threads_batch or n_threads)

    def synchronize(self) -> None:
        self._c.llama_synchronize(self.handle)

    @property
    def n_ctx(self) -> int:
        return int(self._c.llama_n_ctx(self.handle))

    def close(self) -> None:
        if getattr(self, "handle", None):
            self._c.llama_free(self.handle)
            self.handle = None
            self._model.contexts.discard(self)
            self._c = self._lib = Closed("this slice")
            self._views.clear()
            self._hidden_view = None


class Route:
    """Consecutive contexts that a batch runs through in one call."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        self.last = contexts[-1]
        self.n_contexts = len(contexts)
        self.handles = (ctypes.c_void_p * self.n_contexts)(*(c.handle for c in contexts))
