"""What a batch of a few tokens costs on this device, in batches of one: measured once, then kept.

On some kernels a batch of four costs two and a half tokens, on others hardly more than one; whether a draft pays
depends on little else.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low

import psutil

from .cache import cache_dir, replacing
from .slices import Slice

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_MOST_TOKENS = 40  # time for so many batches of one, then a repeat is the last …
_REPEATS = range(2, 6)  # … but so many there are at least, and at most
_UNSTEADY = 1.5  # half of the single tokens took this many times as long as the quickest: the machine was busy
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class BatchCosts:
    """c(k), the cost of a batch of k tokens ÷ that of one, for the `sizes` k measured."""

    sizes: tuple[int, ...]  # increasing, from 1
    costs: tuple[float, ...]  # the first is 1, none is lower than the one before
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

    @property
    def path(self) -> Path:
        """Where the costs are kept; the file need not exist."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_dir() / "batch-costs" / f"{digest[:32]}.json"


def measurable_sizes(largest: int) -> tuple[int, ...]:
    """The sizes to measure where batches hold at most `largest` tokens."""
    return tuple(size for size in SIZES if size <= largest)


def measure_batch_costs(
    slices: Sequence[Slice], sizes: Sequence[int] = SIZES, clock: Callable[[], float] = time.perf_counter
) -> BatchCosts:
    """Time batches of `sizes`, increasing from 1, through open `slices` of a whole model, with logits for every token.

    The sizes take turns, so that a slow spell hits all, two to five times, for about as long as forty single tokens
    take. The caches must be empty, and are left so, whatever happens. Raises DecodeError.
    """
    first, *rest = slices
    route = first.route_to(rest) if rest else None
    taken: dict[int, list[float]] = {size: [] for size in sizes}

    def run(size: int) -> float:
        start = clock()
        first.decode_tokens(list(range(size)), 0, range(size), route=route)
        slices[-1].synchronize()
        took = clock() - start
        for piece in slices:
            piece.remove(0)
        return took

    try:
        run(1)  # the weights come from the disk now
        spent = 0.0
        for repeat in range(1, _REPEATS.stop):
            spent += run(1)  # after a larger batch the compute graph is made again, which later single tokens need not
            for size in (1, *sizes):
                took = run(size)
                taken[size].append(took)
                spent += took
            if repeat >= _REPEATS.start and spent >= _MOST_TOKENS * median_low(taken[1]):
                break
    finally:
        for piece in slices:
            piece.remove(0)
    # of two repeats the quicker, as what disturbs a measurement makes it longer; and no batch is taken for cheaper
    # than a smaller one, as an error on that side makes drafts cost more than they bring
    one = median_low(taken[1])
    ratios = (median_low(taken[size]) / one if one else 1.0 for size in sizes)
    costs = tuple(itertools.accumulate(ratios, max))
    return BatchCosts(tuple(sizes), costs, steady=one < _UNSTEADY * min(taken[1]) or not one)


def kept_batch_costs(key: CostKey, sizes: Sequence[int], measure: Callable[[], BatchCosts]) -> BatchCosts:
    """The costs kept under `key` if they are of all `sizes`; else `measure` them now, and keep what is steady."""
    kept = _read(key)
    if kept is not None and set(sizes) <= set(kept.sizes):
        return kept
    found = measure()
    if not found.steady:
        return found
    record = {"format": _FORMAT, "key": asdict(key), "sizes": found.sizes, "costs": found.costs}
    with contextlib.suppress(OSError), replacing(key.path) as out:  # a full or read-only disk costs only the time
        out.write(json.dumps(record, indent=1).encode())
    return found


def _read(key: CostKey) -> BatchCosts | None:
    """None of a file that is not there, damaged or of something else."""
    try:
        record = json.loads(key.path.read_bytes())
        sizes, costs = record["sizes"], record["costs"]
        good = (
            record["format"] == _FORMAT
            and record["key"] == asdict(key)
            and len(sizes) == len(costs)
            and all(type(size) is int for size in sizes)
            and sizes[0] == 1
            and all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
            and costs[0] == 1
            and all(type(cost) in (int, float) and cost < math.inf for cost in costs)
            and all(a <= b for a, b in zip(costs, costs[1:], strict=False))
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    return BatchCosts(tuple(sizes), tuple(map(float, costs))) if good else None


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
