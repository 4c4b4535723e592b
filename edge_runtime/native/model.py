"""A loaded model and its vocabulary."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from ..errors import MemoryLimitError, ModelUnreadableError, UnsupportedModelError
from .interrupt import interrupt_deferred
from .library import load


class Model:
    """Weights shared by every slice of a model. Close it after its contexts."""

    def __init__(self, path: str, *, n_gpu_layers: int = 0, use_mmap: bool = True) -> None:
        """Load the GGUF at `path`.

        Raises ModelUnreadableError with llama.cpp's reason, UnsupportedModelError for an architecture without slices.
        """
        api = load()
        self._api, self._c = api, api.c
        self.path = path
        params = self._c.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_mmap = use_mmap
        handle: Any = None
        with api.log.fresh() as log, interrupt_deferred() as interrupted:
            # loading stops between two tensors when Ctrl-C was pressed
            progress = self._c.llama_progress_callback(lambda _share, _user: not interrupted())
            params.progress_callback = progress
            handle = self._c.llama_model_load_from_file(os.fsencode(path), params)
            if interrupted() and handle:
                self._c.llama_model_free(handle)
                handle = None
        if not handle:
            reason = log.last_error()
            if "allocate" in reason or "bad_alloc" in reason:
                raise MemoryLimitError(f"{path} does not fit into memory: {reason}", "use a smaller quantisation")
            raise ModelUnreadableError(
                f"{path} cannot be loaded: {reason or 'llama.cpp gave no reason'}",
                "check that the file is complete and of a llama.cpp version this build knows",
            )
        self.handle: int = handle
        self._vocab = self._c.llama_model_get_vocab(handle)
        self.n_layer = int(self._c.llama_model_n_layer(handle))
        self.n_embd = int(self._c.llama_model_n_embd(handle))
        self.n_vocab = int(self._c.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(self._c.llama_model_n_ctx_train(handle))
        self.architecture = self.meta("general.architecture")
        self.name = self.meta("general.name")
        if not api.lib.edge_model_supported(handle):
            self.close()
            raise UnsupportedModelError(
                f"architecture '{self.architecture}' cannot be run in slices",
                f"supported: {', '.join(api.supported_architectures)}",
            )

    def meta(self, key: str, default: str = "") -> str:
        """A metadata value as text, or `default`."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._c.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if length < 0:
                return default
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    def tokenize(self, text: str | bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised only with `parse_special`."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        size = len(data) + 16
        while True:
            buffer = (ctypes.c_int32 * size)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            size = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; may be part of a UTF-8 character."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._c.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return b"".join(self.piece(t, special=special) for t in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """True for a token that ends the model's turn (EOS, EOT and the like)."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def special_text(self, which: str) -> str:
        """Text of the 'bos' or 'eos' token, '' if the vocabulary has none."""
        token = int(getattr(self._c, f"llama_vocab_{which}")(self._vocab))
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    @property
    def adds_bos(self) -> bool:
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @property
    def has_tokenizer(self) -> bool:
        return int(self._c.llama_vocab_type(self._vocab)) != 0  # LLAMA_VOCAB_TYPE_NONE

    @property
    def n_parameters(self) -> int:
        return int(self._c.llama_model_n_params(self.handle))

    @property
    def bytes_loaded(self) -> int:
        return int(self._c.llama_model_size(self.handle))

    def close(self) -> None:
        if getattr(self, "handle", None):
            self._c.llama_model_free(self.handle)
            self.handle = 0

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
