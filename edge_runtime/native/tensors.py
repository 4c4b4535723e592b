"""Read the GGUF files that this project writes: their text values and their tensors, without loading a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadableError
from .header import Gguf, check_readable
from .library import GgufInitParams, load

# enum ggml_type; Q4_0 and Q8_0 are blocks of 32 values, given as bytes
_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    2: np.dtype("u1"),
    8: np.dtype("u1"),
    24: np.dtype("i1"),
    26: np.dtype("<i4"),
}


@dataclass(frozen=True, slots=True)
class Tensors:
    """Text values by key, and tensors by name as flat arrays: their shapes are for the reader to know."""

    texts: dict[str, str]
    arrays: dict[str, NDArray[Any]]


def read_texts(path: str, keys: tuple[str, ...]) -> dict[str, str]:
    """The text values `keys` ('' where missing), without a look at the tensors, which may be large.

    Raises as `read_tensors`.
    """
    with _opened(path) as gguf:
        return {key: gguf.text(key) for key in keys}


def weight_bytes(path: str) -> dict[str, int]:
    """Bytes of weights by type, as in {"q4_1": 66048000}, from a file's header. Raises as `read_tensors`."""
    found: dict[str, int] = {}
    with _opened(path) as gguf:
        for i in range(int(gguf.lib.gguf_get_n_tensors(gguf.handle))):
            kind = gguf.lib.ggml_type_name(gguf.lib.gguf_get_tensor_type(gguf.handle, i)).decode().lower()
            found[kind] = found.get(kind, 0) + int(gguf.lib.gguf_get_tensor_size(gguf.handle, i))
    return found


def read_tensors(path: str, keys: tuple[str, ...]) -> Tensors:
    """The values `keys` ('' where missing) and all tensors of types F32, F16, I8, I32, Q4_0 and Q8_0.

    Raises ModelNotFoundError or ModelUnreadableError.
    """
    with _opened(path) as gguf:
        handle, lib = gguf.handle, gguf.lib
        texts = {key: gguf.text(key) for key in keys}
        with open(path, "rb") as file:
            data = file.read()
        start = int(lib.gguf_get_data_offset(handle))
        arrays: dict[str, NDArray[Any]] = {}
        for i in range(int(lib.gguf_get_n_tensors(handle))):
            kind = _TYPES.get(int(lib.gguf_get_tensor_type(handle, i)))
            if kind is None:
                continue
            first = start + int(lib.gguf_get_tensor_offset(handle, i))
            size = int(lib.gguf_get_tensor_size(handle, i))
            name = lib.gguf_get_tensor_name(handle, i).decode("utf-8", "replace")
            if first + size > len(data):
                raise ModelUnreadableError(f"{path} is cut short: tensor {name} ends behind it", "copy the file again")
            arrays[name] = np.frombuffer(data, kind, size // kind.itemsize, first)
        return Tensors(texts, arrays)


@contextmanager
def _opened(path: str) -> Iterator[Gguf]:
    check_readable(path)
    api = load()
    with api.log.fresh() as log:
        handle = api.lib.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
        if not handle:
            reason = log.reason() or "its header cannot be parsed"
            raise ModelUnreadableError(f"{path} is cut short or damaged: {reason}", "make or copy the file again")
    try:
        yield Gguf(api.lib, handle)
    finally:
        api.lib.gguf_free(handle)
