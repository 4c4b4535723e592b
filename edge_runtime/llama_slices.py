"""A model that llama-cpp-python loaded, opened in slices, with the engine that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

from .engine import Engine
from .exits.pack import ExitPack
from .exits.source import PackHeads
from .native import Model, load
from .opening import batch_costs, draft_source, head_files
from .resolve import RunOptions, context_options, engine_settings, n_outputs, thresholds_of
from .sampling import Sampler
from .slices import close_slices, open_slices
from .types import Mode, SamplingSettings


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


class BoundEngine(Engine):
    """An engine whose slices may be given a text's KV cache from outside."""

    def restore(self, tokens: Sequence[int]) -> None:
        """Take `tokens` for the text of an empty engine whose slices hold their states."""
        self.extend(tokens)
        self._n_done = [len(tokens)] * len(self.slices)
        for piece in self.slices:
            piece.remove(len(tokens))  # what was computed behind the text


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """An engine and the slices it runs; `close` frees them and what guesses for it."""

    engine: BoundEngine
    close: Callable[[], None]


def open_engine(
    model: BoundModel, options: RunOptions, pack: ExitPack | None, n_threads_batch: int, *, auto: bool
) -> Opened:
    """Open `model` as the resolved `options` say. Raises what opening slices, heads or packs does.

    With `auto`, nothing is drafted where a token's logits depend on the batch it is in.
    """
    with ExitStack() as opened:
        slices = open_slices(
            model, options.boundaries or (), context_options(options), n_outputs_max=n_outputs(options)
        )
        opened.callback(close_slices, slices)
        for piece in slices:
            model._c.llama_set_n_threads(piece.handle, options.n_threads, n_threads_batch)
        sampler = opened.enter_context(closing(Sampler(SamplingSettings(), model.n_vocab)))
        costs: tuple[float, ...] = ()
        if options.mode is not Mode.FULL and options.draft == "ngram":
            found = batch_costs(model, options, slices, {}, n_threads_batch=n_threads_batch)
            costs = found.up_to(n_outputs(options))
            if auto and not found.invariant:
                options = dataclasses.replace(options, mode=Mode.FULL, draft=None)
        headless = pack is None or options.mode is Mode.FULL or options.head != "pack"
        files = {} if pack is None or headless else head_files(pack, model.path)
        source = draft_source(model, options, pack, files, costs)
        if isinstance(source, PackHeads):
            opened.callback(source.close)
        thresholds = thresholds_of(options)
        settings = engine_settings(options)
        engine = BoundEngine(slices, sampler, settings, lambda: thresholds, source)
        return Opened(engine, opened.pop_all().close)

