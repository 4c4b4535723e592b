"""What a batch of a few tokens costs on this device, in batches of one: measured once, then kept.

On some kernels a batch of four costs two and a half tokens, on others hardly more than one; whether a draft pays
depends on little else.
"""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any, overload

import psutil

from .cache import model_hash
from .kept import Kept
from .native import ContextOptions, Model, library_hash
from .slices import Slice, default_threads

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_MOST_TOKENS = 40  # time for so many batches of one, then a repeat is the last …
_REPEATS = range(2, 6)  # … but so many there are at least, and at most
_UNSTEADY = 1.5  # half of the single tokens took this many times as long as the quickest: the machine was busy
_UNLIKELY = 1.1  # … and so it was if a batch took this many times what its tokens take one by one
_FORMAT = 2

# What was measured once weighs as much as so many squared tokens seen now: a batch of k, one batch of four hardly
_MEASURED_WEIGHT = 30.0
_MEMORY = 0.95  # each batch seen leaves this much of the weight of those before it
_ONE_WEIGHT = 0.1  # of the latest single token in the running mean of their times, at least
_DISTURBED = 3.0  # a batch that took so many times what was expected was not alone on the machine


@dataclass(frozen=True, slots=True)
class BatchCosts:
    """c(k), the cost of a batch of k tokens ÷ that of one, for the `sizes` k measured."""

    sizes: tuple[int, ...]  # increasing, from 1
    costs: tuple[float, ...]  # the first is 1, none is lower than the one before
    one_s: float = 0.0  # seconds of a batch of one; 0: not known
    invariant: bool = False  # a token's logits had the same bits in batches of all sizes
    steady: bool = True  # False: measured on a busy machine, for want of better

    def at(self, size: int) -> float:
        """c(size): on the line between the sizes measured, beyond them on the line of the last two."""
        if size in self.sizes:
            return self.costs[self.sizes.index(size)]
        if len(self.sizes) == 1:
            return float(size)
        after = next((i for i, known in enumerate(self.sizes) if known > size), len(self.sizes) - 1)
        (x0, x1), (y0, y1) = self.sizes[after - 1 : after + 1], self.costs[after - 1 : after + 1]
        slope = (y1 - y0) / (x1 - x0)
        return y0 + slope * (size - x0)

    def up_to(self, largest: int) -> tuple[float, ...]:
        """c(1), c(2), … c(largest)."""
        return tuple(self.at(size) for size in range(1, largest + 1))


class LiveCosts(Sequence[float]):
    """c(1), c(2), … that follow what batches take now, as far as that is not what was measured.

    The correction is one slope s: c(k) + s·(k − 1), fitted by least squares to the batches seen, the latest counting
    most, and drawn towards 0. So one size tells of the others, and a wrong measurement is mended in a few batches.
    """

    def __init__(self, measured: Sequence[float], one_s: float = 0.0) -> None:
        """`measured` costs of batches of 1, 2, … in batches of one; `one_s` seconds of a batch of one, 0: not known."""
        self._measured = self._costs = tuple(measured)
        self._one_s, self._n_ones = one_s, int(one_s > 0)
        self._above = self._weight = 0.0

    @property
    def one_s(self) -> float:
        """Seconds that a batch of one takes now; 0 as long as nothing is known."""
        return self._one_s

    def observe(self, size: int, seconds: float) -> None:
        """Count a batch of `size` tokens, at most as many as there are costs, and what it took."""
        if size == 1:
            self._n_ones += 1
            self._one_s += max(_ONE_WEIGHT, 1 / self._n_ones) * (self._likely(1, seconds) - self._one_s)
        elif self._one_s:
            excess = self._likely(size, seconds) / self._one_s - self._measured[size - 1]
            self._above = _MEMORY * self._above + (size - 1) * excess
            self._weight = _MEMORY * self._weight + (size - 1) ** 2
            slope = self._above / (self._weight + _MEASURED_WEIGHT)
            corrected = (max(1.0, cost + slope * k) for k, cost in enumerate(self._measured))
            self._costs = tuple(itertools.accumulate(corrected, max))

    def _likely(self, size: int, seconds: float) -> float:
        """`seconds`, or what is believable of it: something else may have run in between."""
        return min(seconds, _DISTURBED * self._one_s * self._costs[size - 1]) if self._one_s else seconds

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...

    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        return self._costs[index]

    def __len__(self) -> int:
        return len(self._costs)


@dataclass(frozen=True, slots=True)
class CostKey:
    """All that batch costs depend on: measured anew when any of it changes."""

    model_sha256: str
    library: str  # identity of the build
    n_threads: int
    kv_type: str
    flash_attention: bool | None
    kernels: str = "stock"
    machine: str = ""

    @classmethod
    def of(cls, model: Model, options: ContextOptions, n_threads_batch: int | None = None) -> CostKey:
        """Of contexts of `model` with `options`, and other threads for batches if `n_threads_batch` says so."""
        n_threads = options.n_threads or default_threads()
        mixed = n_threads_batch not in (None, n_threads)
        return cls(
            model_sha256=model_hash(Path(model.path)),
            library=library_hash(),
            n_threads=n_threads,
            kv_type=options.kv_type.value,
            flash_attention=options.flash_attention,
            kernels=model.kernels,
            machine=machine_name() + (f", {n_threads_batch} threads for batches" if mixed else ""),
        )

    @property
    def kept(self) -> Kept:
        """Where the costs are kept, if they are."""
        return Kept("batch-costs", _FORMAT, asdict(self))


def measurable_sizes(largest: int) -> tuple[int, ...]:
    """The sizes to measure where batches hold at most `largest` tokens."""
    return tuple(size for size in SIZES if size <= largest)


def measure_batch_costs(
    slices: Sequence[Slice], sizes: Sequence[int] = SIZES, clock: Callable[[], float] = time.perf_counter
) -> BatchCosts:
    """Time batches of `sizes`, increasing from 1, through open `slices` of a whole model, with logits for every token.

    The sizes take turns, so that a slow spell hits all, two to five times, for about as long as forty single tokens
    take. Then their logits are compared. The caches must be empty, and are left so, whatever happens.

    Raises DecodeError.
    """
    first, *rest = slices
    route = first.route_to(rest) if rest else None
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    tokens = [0]

    def run(size: int) -> float:
        start = clock()
        first.decode_tokens(tokens[:size], 0, range(size), route=route)
        slices[-1].synchronize()
        took = clock() - start
        for piece in slices:
            piece.remove(0)
        return took

    try:
        run(1)  # the weights come from the disk now
        n_vocab = len(slices[-1].logits(0))
        tokens = [i % n_vocab for i in range(sizes[-1])]
        spent = 0.0
        for repeat in range(1, _REPEATS.stop):
            spent += run(1)  # after a larger batch the compute graph is made again, which later single tokens need not
            for size in (1, *sizes):
                took = run(size)
                taken[size].append(took)
                spent += took
            if repeat >= _REPEATS.start and spent >= _MOST_TOKENS * median_low(taken[1]):
                break
        invariant = _is_invariant(slices, sizes, tokens)
    finally:
        for piece in slices:
            piece.remove(0)
    # of two repeats the quicker, as what disturbs a measurement makes it longer; and no batch is taken for cheaper
    # than a smaller one, as an error on that side makes drafts cost more than they bring
    one = median_low(taken[1])
    ratios = (median_low(taken[size]) / one if one else 1.0 for size in sizes)
    costs = tuple(itertools.accumulate(ratios, max))
    likely = all(cost < _UNLIKELY * size for size, cost in zip(sizes, costs, strict=True))
    steady = likely and (one < _UNSTEADY * min(taken[1]) or not one)
    return BatchCosts(tuple(sizes), costs, one, invariant, steady)


def _is_invariant(slices: Sequence[Slice], sizes: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether the logits of `tokens` have the same bits one by one and, from the first, in a batch of each size."""
    first, *rest = slices
    route, last = first.route_to(rest) if rest else None, slices[-1]

    def logits(start: int, size: int) -> list[bytes]:
        first.decode_tokens(tokens[start : start + size], start, range(size), route=route)
        return [last.logits(row).tobytes() for row in range(size)]

    def forget() -> None:
        for piece in slices:
            piece.remove(0)

    alone = [bits for position in range(sizes[-1]) for bits in logits(position, 1)]
    forget()
    for size in sizes[1:]:
        together = logits(0, size)
        forget()
        if together != alone[:size]:
            return False
    return True


def kept_batch_costs(key: CostKey, sizes: Sequence[int], measure: Callable[[], BatchCosts]) -> BatchCosts:
    """The costs kept under `key` if they are of all `sizes`; else `measure` them now, and keep what is steady."""
    kept = key.kept.read(_costs_from)
    if kept is not None and set(sizes) <= set(kept.sizes):
        return kept
    found = measure()
    if found.steady:
        key.kept.write(asdict(found))
    return found


def _costs_from(payload: Any) -> BatchCosts:
    """Raises ValueError, TypeError or LookupError for what are no costs."""
    sizes, costs, one_s, invariant = (payload[name] for name in ("sizes", "costs", "one_s", "invariant"))
    good = (
        len(sizes) == len(costs)
        and all(type(size) is int for size in sizes)
        and sizes[0] == 1
        and all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
        and costs[0] == 1
        and all(type(cost) in (int, float) and cost < math.inf for cost in costs)
        and all(a <= b for a, b in zip(costs, costs[1:], strict=False))
        and type(one_s) in (int, float)
        and 0 <= one_s < math.inf
        and type(invariant) is bool
    )
    if not good:
        raise ValueError("these are no costs of batches")
    return BatchCosts(tuple(sizes), tuple(map(float, costs)), float(one_s), invariant)


def machine_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """This machine as far as batch costs depend on it: its processor and how many cores of it there are."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    # boards of one make and different processors tell them apart by part number alone
    processor = named.get("model name") or named.get("CPU part") or platform.processor()
    return f"{platform.system()} {platform.machine()}, {processor}, {psutil.cpu_count(logical=False)} cores"
