"""A model that llama-cpp-python loaded, opened in slices, with the engine that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from .batch_costs import BatchCosts, CostKey, kept_batch_costs, machine_name, measurable_sizes, measure_batch_costs
from .cache import model_hash
from .draft import DraftSource
from .engine import Engine
from .exits.pack import ExitPack
from .exits.source import PackHeads
from .exits.split import split
from .native import Model, library_hash, load
from .ngram import NGrams
from .resolve import RunOptions, context_options, engine_settings, n_outputs, shared_head, thresholds_of
from .sampling import Sampler
from .slices import Slice, close_slices, open_slices
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
            found = _batch_costs(model, options, slices, n_threads_batch)
            costs = found.up_to(n_outputs(options))
            if auto and not found.invariant:
                options = dataclasses.replace(options, mode=Mode.FULL, draft=None)
        source = _source(model, options, pack, costs)
        if isinstance(source, PackHeads):
            opened.callback(source.close)
        thresholds = thresholds_of(options)
        settings = engine_settings(options)
        engine = BoundEngine(slices, sampler, settings, lambda: thresholds, source)
        return Opened(engine, opened.pop_all().close)


def _source(
    model: BoundModel, options: RunOptions, pack: ExitPack | None, costs: Sequence[float]
) -> DraftSource | None:
    """What guesses at boundaries, or before the first slice, where batches have `costs`."""
    if options.mode is Mode.FULL:
        return None
    if options.draft == "ngram":
        return NGrams(costs)
    if options.head != "pack" or pack is None:
        return shared_head(options, pack)
    layers = options.boundaries or ()
    places = [pack.boundaries.index(layer) for layer in layers]
    files = split(pack, model.path)
    return PackHeads(
        [files[i] for i in places],
        layers,
        pack.shortlist,
        pack.cluster_starts,
        [pack.gates[i] for i in places],
        options.signal or "entropy",
        [pack.askers[i] for i in places if pack.askers],
        n_embd=model.n_embd,
        n_ctx=options.n_ctx,
        n_threads=options.n_threads,
        kernels=model.kernels,
    )


def _batch_costs(model: BoundModel, options: RunOptions, slices: Sequence[Slice], n_threads_batch: int) -> BatchCosts:
    """What batches that verify drafts cost; measured, if they never were. The slices' caches are left empty."""
    sizes = measurable_sizes(min(n_outputs(options), slices[0].n_batch))
    mixed = f", {n_threads_batch} threads for batches" if n_threads_batch != options.n_threads else ""
    key = CostKey(
        model_sha256=model_hash(Path(model.path)),
        library=library_hash(),
        n_threads=options.n_threads,
        kv_type=options.kv_type.value,
        flash_attention=options.flash_attention,
        kernels=model.kernels,
        machine=machine_name() + mixed,
    )

    def measure() -> BatchCosts:
        return measure_batch_costs(slices, sizes)

    return kept_batch_costs(key, sizes, measure)
