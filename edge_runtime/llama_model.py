"""A model that llama-cpp-python loaded, as slices want it."""

from __future__ import annotations

from typing import Any

from .native import Model, load


class BoundModel(Model):
    """A model loaded by the bindings, which also free it."""

    def __init__(self, bound: Any, kernels: str) -> None:
        """`bound` is a `LlamaModel`, loaded with `kernels`, a result of `resolve_kernels`."""
        self._api = load()
        self._c = self._api.c
        self.path, self.handle, self.kernels = bound.path_model, bound.model, kernels
        self.contexts = set()
        self._vocab = bound.vocab
        self._has_tokenizer = int(bound.vocab_type()) != 0  # LLAMA_VOCAB_TYPE_NONE
        self.architecture, self.name = self.meta("general.architecture"), self.meta("general.name")
        self.n_layer = int(self._c.llama_model_n_layer(self.handle))
        self.n_embd, self.n_vocab = int(bound.n_embd()), int(bound.n_vocab())
        self.n_ctx_train = int(bound.n_ctx_train())

    @property
    def why_not_sliced(self) -> str | None:
        """Why slices of this model would not do as the bindings' own context does; None if they would."""
        if not self._api.lib.edge_model_supported(self.handle):
            return f"architecture '{self.architecture}'"
        # the bindings give YaRN's factors, slices leave them to the model
        scaling = self.meta(f"{self.architecture}.rope.scaling.type")
        return "YaRN" if scaling == "yarn" else None

    def close(self) -> None:
        for context in list(self.contexts):
            context.close()
        self.handle = 0
