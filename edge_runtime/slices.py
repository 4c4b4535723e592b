"""A slice: a range of a model's layers with the KV cache of those layers only.

A slice that starts at layer 0 takes tokens, any other takes the hidden states of the slice before it. A slice that
ends before the last layer hands out hidden states for every token of a batch; logits (the model's own output head
after this layer: the plain logit lens) only for the rows asked for. The last slice gives the model's logits.

Positions of a sequence must be decoded in order, each slice at its own pace: a later slice may lag behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from contextlib import ExitStack

import psutil

from .errors import DecodeError
from .native import Context, ContextOptions, Model, expected_abi
from .types import check_boundaries

_STATE_MAGIC = b"EDGESLICE1\n"


def default_threads() -> int:
    """Physical cores this process may use; llama.cpp gains nothing from a core's second thread."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


class Slice(Context):
    """Layers [start, end) of `model`."""

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
        """Raises MemoryLimitError or LibraryError if llama.cpp cannot open it."""
        if not options.n_threads:
            options = dataclasses.replace(options, n_threads=default_threads())
        super().__init__(model, start, end, options, n_outputs_max=n_outputs_max, want_hidden=want_hidden)
        self.start, self.end = start, end
        self.is_last = end == model.n_layer
        self._identity = {
            "abi": expected_abi,
            "architecture": model.architecture,
            "model_bytes": model.bytes_loaded,
            "layers": [start, end, model.n_layer],
            "kv_type": options.kv_type.value,
        }

    def save_state(self, seq_id: int = 0) -> bytes:
        """The KV cache of one sequence, for `load_state` of an equal slice of the same model."""
        payload = self.state(seq_id)
        head = json.dumps({**self._identity, "crc32": zlib.crc32(payload), "bytes": len(payload)}, sort_keys=True)
        return _STATE_MAGIC + head.encode() + b"\n" + payload

    def load_state(self, data: bytes, seq_id: int = 0) -> None:
        """Replace one sequence's KV cache.

        Raises DecodeError, and leaves the cache as it was, for data that is damaged or of another slice.
        """
        if not data.startswith(_STATE_MAGIC):
            raise DecodeError("this is not a saved slice state")
        head, _, payload = data[len(_STATE_MAGIC) :].partition(b"\n")
        try:
            found = json.loads(head)
            crc, size = found.pop("crc32"), found.pop("bytes")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DecodeError("the saved slice state is damaged: its header cannot be read") from None
        for key, value in self._identity.items():
            if found.get(key) != value:
                raise DecodeError(f"the saved state is of another slice: its {key} is {found.get(key)}, not {value}")
        if size != len(payload) or crc != zlib.crc32(payload):
            raise DecodeError("the saved slice state is damaged: its checksum does not match")
        # llama.cpp empties the sequence before it finds that a state does not fit, and not at all for an empty one
        before = self.state(seq_id) if self.last_position(seq_id) >= 0 else b""
        try:
            self.remove(0, seq_id)
            self.set_state(payload, seq_id)
        except DecodeError:
            self.remove(0, seq_id)
            if before:
                self.set_state(before, seq_id)
            raise


def open_slices(
    model: Model,
    boundaries: tuple[int, ...],
    options: ContextOptions,
    *,
    n_outputs_max: int = 1,
    want_last_hidden: bool = False,
) -> list[Slice]:
    """Open the slices between `boundaries`: () gives one slice, (8, 16) gives [0, 8), [8, 16), [16, n_layer).

    `n_outputs_max` is for the last slice; the others give one row of logits per decode.
    Raises BoundaryError for boundaries that do not fit the model; closes what it opened if one fails.
    """
    check_boundaries(boundaries, model.n_layer)
    edges = (0, *boundaries, model.n_layer)
    slices: list[Slice] = []
    try:
        for start, end in zip(edges, edges[1:], strict=False):
            last = end == model.n_layer
            slices.append(
                Slice(
                    model,
                    start,
                    end,
                    options,
                    n_outputs_max=n_outputs_max if last else 1,
                    want_hidden=last and want_last_hidden,
                )
            )
        return slices
    except BaseException:
        close_slices(slices)
        raise


def close_slices(slices: list[Slice]) -> None:
    with ExitStack() as closing:  # all of them, though one be interrupted
        for item in slices:
            closing.callback(item.close)
