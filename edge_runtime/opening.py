"""What an engine needs besides open slices: a source of guesses, and for n-grams what batches cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TypeVar

from .batch_costs import BatchCosts, CostKey, kept_batch_costs, measurable_sizes, measure_batch_costs
from .draft import DraftSource
from .exits.pack import ExitPack
from .exits.source import PackHeads
from .exits.split import split
from .native import Model
from .ngram import NGrams
from .resolve import RunOptions, context_options, n_outputs, shared_head
from .slices import Slice
from .types import Mode

_Heads = TypeVar("_Heads")

Measured = MutableMapping[tuple[CostKey, tuple[int, ...]], BatchCosts]


def head_files(pack: ExitPack, model_path: str) -> dict[int, Path]:
    """Files of a pack's heads by the layer they stand behind; made, if they are not there yet. Raises as `split`."""
    return dict(zip(pack.boundaries, split(pack, model_path), strict=True))


def draft_source(
    model: Model,
    options: RunOptions,
    pack: ExitPack | None,
    files: Mapping[int, Path],
    costs: Sequence[float] = (),
) -> DraftSource | None:
    """What guesses at boundaries, or before the first slice, where batches have `costs`; None in mode full.

    `options` are resolved ones, `files` those of the pack's heads. PackHeads are to be closed. Raises as they do.
    """
    if options.mode is Mode.FULL:
        return None
    if options.draft == "ngram":
        return NGrams(costs)
    if options.head != "pack" or pack is None:
        return shared_head(options, pack)
    return pack_heads(PackHeads, model, options, pack, files)


def pack_heads(
    kind: Callable[..., _Heads],
    model: Model,
    options: RunOptions,
    pack: ExitPack,
    files: Mapping[int, Path],
    n_sequences: int = 1,
) -> _Heads:
    """A pack's heads at the boundaries of resolved `options`, as PackHeads or BatchHeads. Raises as they do."""
    layers = options.boundaries or ()
    places = [pack.boundaries.index(layer) for layer in layers]
    return kind(
        [files[layer] for layer in layers],
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
        n_sequences=n_sequences,
    )


def batch_costs(
    model: Model,
    options: RunOptions,
    slices: Sequence[Slice],
    measured: Measured,
    say: Callable[[str], None] = lambda _text: None,
    n_threads_batch: int | None = None,
) -> BatchCosts:
    """What batches that verify drafts cost; measured, if they never were. The slices' caches are left empty.

    `measured` are those of this run, and gets them: what was unsteady is kept nowhere else.
    """
    sizes = measurable_sizes(min(n_outputs(options), slices[0].n_batch))

    def measure() -> BatchCosts:
        say("measure the cost of small batches, once for this model and machine")
        return measure_batch_costs(slices, sizes)

    key = CostKey.of(model, context_options(options), n_threads_batch), sizes
    if key not in measured:
        measured[key] = kept_batch_costs(*key, measure)
    return measured[key]
