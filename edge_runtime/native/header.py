"""Read a GGUF file's header with ggml's own parser, before anything is loaded."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from ..errors import ModelNotFoundError, ModelUnreadableError, UnsupportedModelError
from ..types import ModelHeader
from .library import GgufInitParams, load
from .plausible import metadata_fault, missing_tensor, tensor_fault

# enum gguf_type
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_CELLS = {_UINT32: ctypes.c_uint32, _INT32: ctypes.c_uint32, _BOOL: ctypes.c_uint8}
_MAGIC = b"GGUF"


class Gguf:
    """Typed look-ups; a value of an unexpected type reads as missing instead of aborting in C."""

    def __init__(self, lib: Any, handle: int) -> None:
        self.lib, self.handle = lib, handle

    def _find(self, key: str) -> tuple[int, int]:
        index = self.lib.gguf_find_key(self.handle, key.encode())
        return index, self.lib.gguf_get_kv_type(self.handle, index) if index >= 0 else -1

    def text(self, key: str, default: str = "") -> str:
        index, kind = self._find(key)
        return self.lib.gguf_get_val_str(self.handle, index).decode("utf-8", "replace") if kind == _STRING else default

    def number(self, key: str, default: float) -> float:
        index, kind = self._find(key)
        return float(self.lib.gguf_get_val_f32(self.handle, index)) if kind == _FLOAT32 else default

    def integers(self, key: str) -> list[int]:
        """A 32-bit value, or the values of a per-layer array of them; empty if missing."""
        index, kind = self._find(key)
        if kind == _UINT32:
            return [int(self.lib.gguf_get_val_u32(self.handle, index))]
        cell = _CELLS.get(self.lib.gguf_get_arr_type(self.handle, index)) if kind == _ARRAY else None
        if cell is None:
            return []
        count = self.lib.gguf_get_arr_n(self.handle, index)
        data = ctypes.cast(self.lib.gguf_get_arr_data(self.handle, index), ctypes.POINTER(cell))
        return [int(v) for v in data[:count]]

    def integer(self, key: str, default: int) -> int:
        """A 32-bit value, or the largest of a per-layer array of them."""
        return max(self.integers(key), default=default)

    def is_list(self, key: str) -> bool:
        return self._find(key)[1] == _ARRAY

    def array_length(self, key: str) -> int:
        index, kind = self._find(key)
        return int(self.lib.gguf_get_arr_n(self.handle, index)) if kind == _ARRAY else 0


def read_header(path: str) -> ModelHeader:
    """Header of the GGUF at `path`.

    Raises ModelNotFoundError, UnsupportedModelError (vocabulary only) or ModelUnreadableError: no GGUF, cut short, or
    of a supported architecture and with values that llama.cpp would abort on.
    """
    check_readable(path)
    api = load()
    file_bytes = os.path.getsize(path)
    with api.log.fresh() as log:
        handle = api.lib.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
        if not handle:
            raise ModelUnreadableError(
                f"{path} is cut short or damaged: {log.reason() or 'its header cannot be parsed'}",
                "download or copy the file again and compare its checksum",
            )
    try:
        gguf = Gguf(api.lib, handle)
        header = _describe(gguf, path, file_bytes)
        if header.architecture in api.supported_architectures:
            _check_plausible(gguf, header)
        return header
    finally:
        api.lib.gguf_free(handle)


def check_readable(path: str) -> None:
    if os.path.isdir(path):
        raise ModelUnreadableError(f"{path} is a directory, not a model file", "name the .gguf file inside it")
    if not os.path.exists(path):
        raise ModelNotFoundError(f"there is no file {path}", "`edge-run models` lists what can be named instead")
    if not os.path.isfile(path):
        raise ModelUnreadableError(f"{path} is a device or a pipe, not a file", "name a .gguf file")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelUnreadableError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    if not start:
        raise ModelUnreadableError(f"{path} is empty", "download or copy the file again")
    if start != _MAGIC:
        raise ModelUnreadableError(
            f"{path} is not a GGUF file (it starts with {start!r})",
            "convert the model with llama.cpp's convert_hf_to_gguf.py, or download a .gguf",
        )


def _describe(gguf: Gguf, path: str, file_bytes: int) -> ModelHeader:
    lib, handle = gguf.lib, gguf.handle
    n_tensors = int(lib.gguf_get_n_tensors(handle))
    data = int(lib.gguf_get_data_offset(handle))
    sizes = [int(lib.gguf_get_tensor_size(handle, i)) for i in range(n_tensors)]
    ends = [int(lib.gguf_get_tensor_offset(handle, i)) + size for i, size in enumerate(sizes)]
    if n_tensors and data + max(ends) > file_bytes:
        raise ModelUnreadableError(
            f"{path} is cut short: its tensors need {data + max(ends)} bytes, the file has {file_bytes}",
            "download or copy the file again and compare its checksum",
        )
    arch = gguf.text("general.architecture")
    if not arch:
        raise ModelUnreadableError(f"{path} does not name its architecture", "convert the model again")
    if n_tensors == 0:
        raise UnsupportedModelError(f"{path} holds a vocabulary only, no weights", "use the model's full GGUF file")
    n_embd = gguf.integer(f"{arch}.embedding_length", 0)
    n_head = gguf.integer(f"{arch}.attention.head_count", 1)
    # llama.cpp takes the first layer's heads for the size of all
    head_size = n_embd // max([1, *gguf.integers(f"{arch}.attention.head_count")[:1]])
    return ModelHeader(
        path=path,
        architecture=arch,
        name=gguf.text("general.name"),
        n_layer=gguf.integer(f"{arch}.block_count", 0),
        n_embd=n_embd,
        n_ctx_train=gguf.integer(f"{arch}.context_length", 0),
        n_head_kv=gguf.integer(f"{arch}.attention.head_count_kv", n_head),
        key_length=gguf.integer(f"{arch}.attention.key_length", head_size),
        value_length=gguf.integer(f"{arch}.attention.value_length", head_size),
        n_tensors=n_tensors,
        n_vocab=gguf.array_length("tokenizer.ggml.tokens"),
        tensor_bytes=sum(sizes),
        file_bytes=file_bytes,
    )


def _check_plausible(gguf: Gguf, header: ModelHeader) -> None:
    lib, handle = gguf.lib, gguf.handle
    kinds = {
        lib.gguf_get_tensor_name(handle, i).decode("utf-8", "replace"): lib.gguf_get_tensor_type(handle, i)
        for i in range(header.n_tensors)
    }
    fault = (
        metadata_fault(gguf, header.architecture)
        or missing_tensor(kinds, header.architecture, header.n_layer)
        or next(filter(None, map(tensor_fault, kinds, kinds.values())), "")
    )
    if fault:
        raise ModelUnreadableError(
            f"{header.path} is damaged or of a kind that llama.cpp does not know: {fault}",
            "convert or download the model again",
        )
