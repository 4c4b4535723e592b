"""What parts of a model and its heads cost on this device: a token, and batches of a few."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..errors import UsageError
from ..native import ContextOptions, Model
from ..signals import signals_of
from ..slices import Slice, close_slices, open_slices
from ..types import Floats
from .head import HeadContext

_N_PAST = 64  # tokens in the caches while times are taken


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds for a batch of 1, 2, … tokens; what is larger than measured follows the line of the last two."""

    layers: tuple[int, ...]  # the candidate boundaries
    slices: tuple[tuple[float, ...], ...]  # before, between and after them; the last gives logits for one token
    verify: tuple[float, ...]  # the last slice with logits for every token
    heads: tuple[tuple[float, ...], ...]  # by boundary: states in, one guess out
    full: tuple[float, ...]  # the whole model in one piece, with logits for every token

    def keep(self, chosen: Sequence[int]) -> Costs:
        """The costs with the boundaries at places `chosen` alone; slices that are no longer parted add up."""
        edges = (0, *(i + 1 for i in chosen), len(self.slices))
        merged = tuple(_sums(self.slices[a:b]) for a, b in itertools.pairwise(edges))
        return Costs(
            layers=tuple(self.layers[i] for i in chosen),
            slices=merged,
            verify=_sums((*self.slices[edges[-2] : -1], self.verify)),
            heads=tuple(self.heads[i] for i in chosen),
            full=self.full,
        )

    def asking(self, shares: Sequence[float]) -> Costs:
        """The costs where heads are asked about a share of the tokens at their boundary only; they hear all.

        What is not asked about is heard later, in a batch: it costs what one more token in a batch does.
        """
        heads = []
        for times, share in zip(self.heads, shares, strict=True):
            one, more = times[0], max(0.0, (times[-1] - times[0]) / max(1, len(times) - 1))
            saved = (1 - share) * max(0.0, one - more)
            heads.append(tuple(max(0.0, time - saved) for time in times))
        return replace(self, heads=tuple(heads))

    @staticmethod
    def at(times: Sequence[float], k: int) -> float:
        """Time of a batch of k, by the times of 1, 2, …"""
        if k <= len(times):
            return times[k - 1]
        slope = times[-1] - times[-2] if len(times) > 1 else times[0]
        return times[-1] + (k - len(times)) * max(0.0, slope)


def measure_costs(
    model: Model,
    layers: Sequence[int],
    heads: Sequence[HeadContext] | None,
    *,
    n_threads: int = 0,
    largest: int = 8,
    n_repeats: int = 7,
) -> Costs:
    """Times on this device, now: medians over repeats in which all parts take turns, so that a slow spell hits all.

    `heads` are those of the candidate `layers`, opened with the threads they will run with. The caches hold 64 tokens.
    Takes a few seconds for a small model. Heads need a context of 64 + `largest` tokens; their caches are left empty.
    None stands for the model's own output head, which runs with the slice before a boundary: it costs what that slice
    takes longer when it gives logits for one token.

    Raises BoundaryError for layers that do not fit, UsageError if there is not one head per layer, or it takes fewer
    than `largest` states, MemoryLimitError or LibraryError if something cannot be opened.
    """
    if heads is not None and (len(heads) != len(layers) or any(head.n_batch < largest for head in heads)):
        raise UsageError(f"{len(layers)} boundaries need one head each, for batches of {largest}")
    options = ContextOptions(n_ctx=_N_PAST + largest, n_batch=_N_PAST, n_threads=n_threads)
    opened: list[Slice] = []
    try:
        parts = open_slices(model, tuple(layers), options, n_outputs_max=largest)
        opened += parts
        opened += open_slices(model, (), options, n_outputs_max=largest)
        whole = opened[-1]
        tokens = [(1 + 37 * i) % model.n_vocab for i in range(_N_PAST + largest)]
        states = _fill(parts, whole, heads, tokens, largest)
        jobs = _jobs(parts, whole, heads, tokens, states, largest)
        taken: dict[tuple[str, int, int], list[float]] = {key: [] for key in jobs}
        for repeat in range(n_repeats + 1):
            for key, (run, undo) in jobs.items():
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                undo(_N_PAST)
                if repeat:  # the first time, buffers are made
                    taken[key].append(1000 * took)
    finally:
        close_slices(opened)
        for head in heads or ():
            head.forget(0)

    def medians(name: str, i: int) -> tuple[float, ...]:
        return tuple(statistics.median(taken[name, i, k]) for k in range(1, largest + 1))

    slices = tuple(medians("slice", i) for i in range(len(parts)))
    asked = tuple(medians("head", i) for i in range(len(layers)))
    if heads is None:
        pairs = zip(asked, slices[:-1], strict=True)
        asked = tuple(tuple(max(0.0, a - b) for a, b in zip(*pair, strict=True)) for pair in pairs)
    return Costs(
        layers=tuple(layers),
        slices=slices,
        verify=medians("verify", 0),
        heads=asked,
        full=medians("full", 0),
    )


def _fill(
    parts: Sequence[Slice], whole: Slice, heads: Sequence[HeadContext] | None, tokens: Sequence[int], largest: int
) -> list[Floats]:
    """Fill all caches with the first 64 tokens; the states (largest, n_embd) of those behind, by boundary."""
    whole.decode_tokens(tokens[:_N_PAST], 0)
    states: list[Floats] = []
    for first, stop in ((0, _N_PAST), (_N_PAST, _N_PAST + largest)):
        parts[0].decode_tokens(tokens[first:stop], first)
        states = []
        for i, part in enumerate(parts[1:]):
            states.append(parts[i].hidden(stop - first).copy())
            part.decode_states(states[-1], first)
            if first == 0 and heads is not None:
                head = heads[i]
                head.forget(0)
                for row in range(0, _N_PAST, head.n_batch):
                    head.decode(np.ascontiguousarray(states[-1][row : row + head.n_batch]), row)
    for part in parts:
        part.remove(_N_PAST)
    return states


_Job = tuple[Callable[[], None], Callable[[int], None]]


def _jobs(
    parts: Sequence[Slice],
    whole: Slice,
    heads: Sequence[HeadContext] | None,
    tokens: Sequence[int],
    states: Sequence[Floats],
    largest: int,
) -> dict[tuple[str, int, int], _Job]:
    """What is timed, and how it is undone, by (what, place, batch size)."""
    last = len(parts) - 1

    def run_slice(part: Slice, i: int, k: int, want: Sequence[int]) -> None:
        if i == 0:
            part.decode_tokens(tokens[_N_PAST : _N_PAST + k], _N_PAST, want)
        else:
            part.decode_states(states[i - 1][:k], _N_PAST, want)
        part.synchronize()

    def run_head(head: HeadContext, i: int, k: int) -> None:
        head.decode(states[i][:k], _N_PAST, (k - 1,))
        signals_of(head.logits(k - 1))

    def run_shared(i: int, k: int) -> None:
        run_slice(parts[i], i, k, (k - 1,))
        signals_of(parts[i].logits(k - 1))

    jobs: dict[tuple[str, int, int], _Job] = {}
    for k in range(1, largest + 1):
        for i, part in enumerate(parts):
            want = (k - 1,) if i == last else ()
            jobs["slice", i, k] = partial(run_slice, part, i, k, want), part.remove
        jobs["verify", 0, k] = partial(run_slice, parts[last], last, k, range(k)), parts[last].remove
        for i in range(last):
            if heads is None:
                jobs["head", i, k] = partial(run_shared, i, k), parts[i].remove
            else:
                jobs["head", i, k] = partial(run_head, heads[i], i, k), heads[i].forget
        jobs["full", 0, k] = partial(run_slice, whole, 0, k, range(k)), whole.remove
    return jobs


def _sums(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(float(sum(column)) for column in zip(*rows, strict=True))
