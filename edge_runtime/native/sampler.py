"""llama.cpp's own samplers, applied to numpy logits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Floats, SamplingSettings, TokenIds
from .library import Closed, load

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Candidates:
    """A reusable llama_token_data_array for up to `size` tokens."""

    def __init__(self, size: int) -> None:
        c = load().c
        self._all_ids = np.arange(size, dtype=np.int32)
        self._data: NDArray[np.void] = np.zeros(size, _TOKEN_DATA)
        self.array = c.llama_token_data_array()
        self.array.data = ctypes.cast(self._data.ctypes.data, c.llama_token_data_p)
        self.reference = ctypes.byref(self.array)

    def fill(self, logits: Floats, ids: TokenIds | None) -> None:
        """Take logits (n,) for the tokens `ids` (n,), or for tokens 0 … n - 1."""
        n = logits.shape[0]
        self._data["id"][:n] = self._all_ids[:n] if ids is None else ids
        self._data["logit"][:n] = logits
        self.array.size, self.array.selected, self.array.sorted = n, -1, False

    @property
    def selected(self) -> int:
        return int(self._data["id"][self.array.selected])


class Chain:
    """A chain of llama.cpp's samplers, empty at first."""

    def __init__(self, settings: SamplingSettings, n_vocab: int) -> None:
        self._c = c = load().c
        self._handle = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self._settings, self._n_vocab = settings, n_vocab
        self._repeats: Any = None

    def _add(self, sampler: object) -> None:
        self._c.llama_sampler_chain_add(self._handle, sampler)

    def _add_repeat_penalty(self) -> None:
        settings = self._settings
        if settings.repeat_penalty != 1.0 and settings.repeat_last_n:
            self._repeats = self._c.llama_sampler_init_penalties(
                self._n_vocab, settings.repeat_last_n, settings.repeat_penalty, 0.0, 0.0
            )
            self._add(self._repeats)

    def _add_choice(self) -> None:
        """top-k → top-p → min-p → temperature → draw; greedy at temperature 0."""
        c, settings = self._c, self._settings
        if settings.temperature == 0:
            self._add(c.llama_sampler_init_greedy())
            return
        if settings.top_k:
            self._add(c.llama_sampler_init_top_k(settings.top_k))
        if settings.top_p < 1:
            self._add(c.llama_sampler_init_top_p(settings.top_p, 1))
        if settings.min_p > 0:
            self._add(c.llama_sampler_init_min_p(settings.min_p, 1))
        self._add(c.llama_sampler_init_temp(settings.temperature))
        self._add(c.llama_sampler_init_dist(settings.seed))

    def set_history(self, tokens: Sequence[int]) -> None:
        """Let the repeat penalty count `tokens` and no others."""
        if self._repeats is not None:
            self._c.llama_sampler_reset(self._repeats)
            for token in tokens[-self._settings.repeat_last_n :]:
                self._c.llama_sampler_accept(self._repeats, token)

    def close(self) -> None:
        if self._handle:
            self._c.llama_sampler_free(self._handle)
            self._handle = self._repeats = None
            self._c = Closed("this sampler")


class SamplerChain(Chain):
    """repeat penalty → top-k → top-p → min-p → temperature → draw; greedy at temperature 0."""

    def __init__(self, settings: SamplingSettings, n_vocab: int) -> None:
        super().__init__(settings, n_vocab)
        self._add_repeat_penalty()
        self._add_choice()

    def choose(self, candidates: Candidates) -> int:
        """The chosen token; does not yet count as seen."""
        self._c.llama_sampler_apply(self._handle, candidates.reference)
        return candidates.selected

    def accept(self, token: int) -> None:
        """Count a published token for the repeat penalty."""
        self._c.llama_sampler_accept(self._handle, token)

    def copy_from(self, other: SamplerChain) -> None:
        """Take over another chain's random state and history; both must have the same settings."""
        self._c.llama_sampler_copy(other._handle, self._handle)

    def reset(self) -> None:
        self._c.llama_sampler_reset(self._handle)
