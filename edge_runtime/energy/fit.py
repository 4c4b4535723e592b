"""The coefficients of the power model that fit a power meter's readings best.

Least squares with coefficients of at least 0 (Lawson and Hanson, "Solving least squares problems", 1974, chapter 23).
Three unknowns have eight supports, so all can be tried: the best without a negative coefficient is the optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..sensors.reading import PowerSource
from .model import PowerModel

COEFFICIENTS = ("static_w", "active_w_per_core", "joule_per_gb")
# smallest singular value of the columns at unit length: below it, noise would decide between two coefficients
_MIN_INDEPENDENCE = 0.02
_SAME = 0.05  # values that differ by a smaller share of the largest say nothing about a slope

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """What a machine did, and the power it took for that."""

    load: float  # share of all cores that is busy, 0 to 1
    gb_per_s: float  # 10⁹ bytes of weights read in a second
    power_w: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted model, and how well it fits: measured - modelled power of each point, in their order."""

    model: PowerModel
    residuals_w: tuple[float, ...]
    r2: float | None  # explained share of the power's variance; None if there is none
    at_zero: tuple[str, ...]  # coefficients that would fit better below 0

    @property
    def rms_w(self) -> float:
        return math.sqrt(sum(r * r for r in self.residuals_w) / len(self.residuals_w))

    @property
    def worst_w(self) -> float:
        return max(abs(r) for r in self.residuals_w)


def fit(points: Sequence[Point], n_cores: int) -> Fit:
    """The power model of a machine with `n_cores`. Raises UsageError if the points do not determine it."""
    design = np.array([(1.0, p.load * n_cores, p.gb_per_s) for p in points], np.float64).reshape(-1, 3)
    power = np.array([p.power_w for p in points], np.float64)
    missing = missing_point(points)
    if missing:
        raise UsageError(f"the points do not determine the power model: {missing[0]}", missing[1])
    solution = nonnegative_least_squares(design, power)
    residuals = power - design @ solution
    spread = float(((power - power.mean()) ** 2).sum())
    free = np.linalg.lstsq(design, power, rcond=None)[0]
    tiny = 1e-9 * float(np.abs(power).max())
    at_zero = tuple(
        name
        for name, value, wanted, column in zip(COEFFICIENTS, solution, free, design.T, strict=True)
        if value == 0 and wanted * column.max() < -tiny
    )
    static, active, traffic = (float(value) for value in solution)
    return Fit(
        PowerModel(static, active, traffic, PowerSource.CALIBRATED),
        tuple(float(r) for r in residuals),
        1 - float((residuals**2).sum()) / spread if spread > 0 else None,
        at_zero,
    )


def nonnegative_least_squares(design: _Array, wanted: _Array) -> _Array:
    """x (k,) ≥ 0 with the least |design · x - wanted|, for design (n, k) with few columns, linearly independent."""
    n_columns = design.shape[1]
    best, least = np.zeros(n_columns), float(wanted @ wanted)
    for size in range(1, n_columns + 1):
        for support in itertools.combinations(range(n_columns), size):
            columns = design[:, support]
            found = np.linalg.lstsq(columns, wanted, rcond=None)[0]
            error = float(((columns @ found - wanted) ** 2).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(n_columns), error
                best[list(support)] = found
    return best


def missing_point(points: Sequence[Point]) -> tuple[str, str] | None:
    """Why the points do not determine three coefficients, and the kind of point to add; None if they do."""
    loads, traffic = [p.load for p in points], [p.gb_per_s for p in points]
    idle = "add a point with the machine idle: load 0, 0 GB/s"
    generating = (
        "add a point while a model generates: GB/s is its tokens per second × the size of its file in 10⁹ bytes"
    )
    busy = "add a point with the cores busy and no model running: 0 GB/s"
    if not points:
        return "there are none", idle
    if _all_same(loads):
        return f"the load is {loads[0]:.3g} in all of them", idle if max(loads) > 0.1 else generating
    if _all_same(traffic):
        same = f"{traffic[0]:.3g} GB/s of weights are read in all of them"
        return same, busy if max(traffic) > 0 else generating
    hint = busy if min(loads) < 0.1 else idle
    if len(points) < len(COEFFICIENTS):
        return "one for each coefficient is needed", hint
    design = np.array([(1.0, *row) for row in zip(loads, traffic, strict=True)])
    if np.linalg.svd(design / np.linalg.norm(design, axis=0), compute_uv=False).min() < _MIN_INDEPENDENCE:
        return "the load and the GB/s of weights change only together", hint
    return None


def _all_same(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= _SAME * max(max(values), 1e-9)
