"""Which matmul kernels multiply a model's weights: llama.cpp's own ("stock"), or the patched library's ("edge").

The edge kernels keep weights in tiles and give a token the same sums in every batch, on any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError
from .library import load

STOCK, EDGE = "stock", "edge"
_selecting = threading.Lock()  # the library's choice is one for the process


def available_kernels() -> tuple[str, ...]:
    """Names of the edge kernel sets that run on this CPU, best first, as in ("avx512-vnni", "avx2").

    Empty where there are none, or where the library was built without them.
    """
    lib = load().lib
    names: bytes = lib.edge_kernels_available() if hasattr(lib, "edge_kernels_available") else b""
    return tuple(names.decode().split(",")) if names else ()


def kernel_weight_types() -> tuple[str, ...]:
    """Weight types that the edge kernels take, by ggml's names in lower case; others are llama.cpp's to multiply."""
    names: bytes = load().lib.edge_kernels_types()
    return tuple(names.decode().lower().split(","))


def resolve_kernels(wanted: str) -> str:
    """The kernel set that `wanted` means: "stock", "edge" for the best there is, or the name of one.

    "edge" means "stock" where this CPU has none. Raises UsageError for a name that is not there.
    """
    names = available_kernels()
    if wanted == EDGE:
        return names[0] if names else STOCK
    if wanted != STOCK and wanted not in names:
        raise UsageError(
            f"there are no kernels '{wanted}' on this machine", f"there are: {', '.join((STOCK, EDGE, *names))}"
        )
    return wanted


@contextmanager
def kernels_for_loading(name: str) -> Iterator[None]:
    """Models loaded inside get the kernel set `name`, a result of `resolve_kernels`; other threads that load wait."""
    if name == STOCK:
        with _selecting:
            yield
        return
    lib = load().lib
    with _selecting:
        lib.edge_kernels_select(name.encode())
        try:
            yield
        finally:
            lib.edge_kernels_select(None)
