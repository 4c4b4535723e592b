"""Does a model fit into memory? Asked before it is loaded, because a small board that swaps is as good as dead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from .errors import MemoryLimitError
from .native import ContextOptions
from .types import ModelHeader

_MIB = 2**20
_KV_PADDING = 256  # llama.cpp rounds the cells of its KV cache up to this
# llama.cpp's buffers for one batch, per token: measured as about 14 float32 values per embedding value, and a row of
# the attention mask
_VALUES_PER_EMBEDDING = 16
_MASK_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Estimate of what a model with its slices takes, in bytes."""

    weights: int
    kv_cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute

    def __str__(self) -> str:
        parts = f"weights {_size(self.weights)}, KV cache {_size(self.kv_cache)}, buffers {_size(self.compute)}"
        return f"{_size(self.total)} ({parts})"


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """What this process may use, in bytes: the machine's memory, or its control group's limit where that is lower."""

    total: int
    available: int


def estimate_need(header: ModelHeader, options: ContextOptions, n_slices: int, n_outputs: int) -> MemoryNeed:
    """Memory of a model run in `n_slices` slices with `n_outputs` rows of logits each; an estimate, no guarantee.

    A slice holds the KV cache of its own layers, so slices together hold what one full context does.
    """
    cells = -(-options.n_ctx // _KV_PADDING) * _KV_PADDING
    values = cells * header.n_layer * header.n_head_kv * (header.key_length + header.value_length)
    n_batch = min(options.n_batch, options.n_ctx)
    per_token = _VALUES_PER_EMBEDDING * header.n_embd * 4 + cells * _MASK_BYTES
    compute = n_slices * (n_batch * per_token + n_outputs * header.n_vocab * 4)
    return MemoryNeed(header.tensor_bytes, int(values * options.kv_type.bytes_per_value), compute)


def check_need(need: MemoryNeed, machine: MachineMemory) -> str | None:
    """None if `need` fits; a warning if it fits only once other programs make room.

    Raises MemoryLimitError if it exceeds all the memory there is.
    """
    if need.total > machine.total:
        kv_is_most = need.kv_cache + need.compute > need.weights
        reduce = "a smaller --ctx, or --kv-type q8_0" if kv_is_most else "a smaller model or quantisation"
        raise MemoryLimitError(f"the model needs {need}, this machine has {_size(machine.total)}", f"use {reduce}")
    if need.total > machine.available:
        return f"the model needs {need}, only {_size(machine.available)} are free now: expect swapping"
    return None


def machine_memory() -> MachineMemory:
    """This machine's memory as this process may use it."""
    memory = psutil.virtual_memory()
    limit = min([memory.total, *_control_group_limits()])
    return MachineMemory(total=limit, available=min(memory.available, limit))


def _control_group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Limits of this process's control group and all above it; both versions of the kernel's interface."""
    files = {root / "memory.max", root / "memory" / "memory.limit_in_bytes"}
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        base, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        group = base / path.lstrip("/")
        files |= {folder / name for folder in (group, *group.parents) if folder.is_relative_to(base)}
    return [int(text) for text in map(_read, files) if text.strip().isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / _MIB:.0f} MiB"
