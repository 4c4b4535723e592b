"""A loaded model and its vocabulary."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import MemoryLimitError, ModelUnreadableError, UnsupportedModelError, UsageError
from ..types import ModelHeader
from .header import read_header
from .interrupt import interrupt_deferred
from .kernels import STOCK, kernels_for_loading, resolve_kernels
from .library import Closed, load

_LOAD_MODE_AUTO, _LOAD_MODE_NONE = -1, 0  # enum llama_load_mode


class _Closable(Protocol):
    def close(self) -> None: ...


class Model:
    """Weights shared by every slice of a model. Closing it closes the contexts still open on it."""

    def __init__(
        self,
        path: str,
        *,
        header: ModelHeader | None = None,
        n_gpu_layers: int = 0,
        use_mmap: bool = True,
        kernels: str = STOCK,
    ) -> None:
        """Load the GGUF at `path`; `header` saves reading it again; `kernels` as `resolve_kernels` takes it.

        Raises UsageError for kernels that are not there, what `read_header` does, ModelUnreadableError with llama.cpp's
        reason, MemoryLimitError, or UnsupportedModelError for an architecture without slices.
        """
        api = load()
        self._api, self._c = api, api.c
        self.path = path
        self.contexts: set[_Closable] = set()  # contexts add and remove themselves
        self.architecture = (header or read_header(path)).architecture
        if self.architecture not in api.supported_architectures:
            # of others, the header's values have not been checked
            raise self._unsupported()
        self.kernels = resolve_kernels(kernels)
        params = self._c.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.load_mode = _LOAD_MODE_AUTO if use_mmap else _LOAD_MODE_NONE
        handle: Any = None
        with api.log.fresh() as log, interrupt_deferred() as interrupted:
            # loading stops between two tensors when Ctrl-C was pressed
            progress = self._c.llama_progress_callback(lambda _share, _user: not interrupted())
            params.progress_callback = progress
            with kernels_for_loading(self.kernels):
                handle = self._c.llama_model_load_from_file(os.fsencode(path), params)
            if interrupted() and handle:
                self._c.llama_model_free(handle)
                handle = None
            reason = log.reason()
        if not handle:
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
        self._has_tokenizer = int(self._c.llama_vocab_type(self._vocab)) != 0  # LLAMA_VOCAB_TYPE_NONE
        self.n_ctx_train = int(self._c.llama_model_n_ctx_train(handle))
        self.name = self.meta("general.name")
        if not api.lib.edge_model_supported(handle):
            self.close()
            raise self._unsupported()

    def _unsupported(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path} is of architecture '{self.architecture}', or a form of it, that cannot be run in slices",
            f"supported: {', '.join(self._api.supported_architectures)}",
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
        """Token ids of `text`; special tokens in it are recognised only with `parse_special`.

        Raises UnsupportedModelError without a tokenizer.
        """
        self._need_tokenizer()
        data = text.encode("utf-8") if isinstance(text, str) else text
        size = len(data) + 16
        while True:
            buffer = (ctypes.c_int32 * size)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            size = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; may be part of a UTF-8 character.

        Raises UnsupportedModelError without a tokenizer, UsageError for what is not a token.
        """
        self._need_tokenizer()
        if not 0 <= token < self.n_vocab:
            raise UsageError(f"there is no token {token}: the vocabulary has {self.n_vocab}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._c.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def _need_tokenizer(self) -> None:
        if not self.has_tokenizer:
            raise UnsupportedModelError(f"{self.path} has no tokenizer, so it cannot read or write text")

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
        return self._has_tokenizer

    @property
    def n_parameters(self) -> int:
        return int(self._c.llama_model_n_params(self.handle))

    @property
    def bytes_loaded(self) -> int:
        return int(self._c.llama_model_size(self.handle))

    def close(self) -> None:
        if getattr(self, "handle", None):
            for context in list(self.contexts):
                context.close()
            self._c.llama_model_free(self.handle)
            self.handle = 0
            self._c = Closed("this model")

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
