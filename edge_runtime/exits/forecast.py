"""What heads or exits come to on this device before they have run: measured times, and what calibration saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..kept import Kept
from ..native import Model
from ..types import Mode
from .choose import predict_time
from .costs import Costs, measure_costs
from .head import HeadContext
from .pack import ExitPack
from .thresholds import Rung

_FORMAT = 1
_HEAD_CTX = 128
_UNSTEADY = 1.25
_TOKENS = 2000
_TEXT = 100  # tokens of an answer
_SEED = 0


def kept_part_costs(
    key: Mapping[str, object],
    model: Model,
    layers: tuple[int, ...],
    heads: Sequence[Path] | None,
    n_threads: int,
    say: Callable[[str], None],
) -> Costs:
    """What slices and heads take at `layers`: as kept under `key`, which names all it depends on, or measured now.

    `heads` are files, None the model's own output head. Raises as `measure_costs` and `HeadContext`.
    """
    kept = Kept("part-costs", _FORMAT, key)
    found = kept.read(partial(_costs_from, layers))
    if found is not None:
        return found
    say("measure the time of slices and heads, once for this model, pack and machine")
    with ExitStack() as opened:
        contexts = None
        if heads is not None:
            made = (HeadContext(path, _HEAD_CTX, n_threads, kernels=model.kernels) for path in heads)
            contexts = [opened.enter_context(head) for head in made]
        found = measure_costs(model, layers, contexts, n_threads=n_threads)
    if _steady(found):
        kept.write(asdict(found))
    return found


def _steady(costs: Costs) -> bool:
    """Whether the slices take together about what the whole does; else the machine was busy with something else."""
    parts = sum(times[0] for times in costs.slices)
    return costs.full[0] / _UNSTEADY < parts < _UNSTEADY * costs.full[0]


def _costs_from(layers: tuple[int, ...], payload: Any) -> Costs:
    """Raises ValueError, TypeError or LookupError for what are no costs at `layers`."""
    found = Costs(
        layers=tuple(payload["layers"]),
        slices=tuple(map(tuple, payload["slices"])),
        verify=tuple(payload["verify"]),
        heads=tuple(map(tuple, payload["heads"])),
        full=tuple(payload["full"]),
    )
    rows = (*found.slices, *found.heads, found.verify, found.full)
    good = found.layers == layers and len(found.slices) == len(layers) + 1 and len(found.heads) == len(layers)
    if not good or not all(row and all(type(x) is float and 0 <= x < math.inf for x in row) for row in rows):
        raise ValueError("these are no costs")
    if not found.full[0]:
        raise ValueError("a token takes time")
    return found


def predicted_time(pack: ExitPack, mode: Mode, costs: Costs, rung: Rung | None = None, cap: int = 8) -> float:
    """Time per token ÷ that of plain full depth, by what the pack's calibration saw of mode verified, or of `rung`.

    1 where it saw nothing. Raises UsageError for a mode without exits.
    """
    if rung is not None:
        return forecast(costs, mode, rung.coverage, cap=cap)
    plan: dict[str, Any] = (pack.report.get("plans") or {}).get(mode.value) or {}
    coverage, acceptance = plan.get("coverage"), plan.get("acceptance")
    if not isinstance(coverage, float) or not isinstance(acceptance, float) or not 0 < coverage <= acceptance <= 1:
        return 1.0
    return forecast(costs, mode, coverage / acceptance, acceptance, cap)


def forecast(costs: Costs, mode: Mode, coverage: float, acceptance: float = 1.0, cap: int = 8) -> float:
    """Time per token ÷ that of plain full depth, where a share `coverage` of the tokens would exit, drawn at random.

    All exits are thought to be at the last boundary, where most are. In mode verified, `acceptance` of the drafts
    agree with full depth. Raises UsageError for a mode without exits.
    """
    random = np.random.default_rng(_SEED)
    n = len(costs.layers)
    places = np.where(random.random(_TOKENS) < coverage, n - 1, n)
    agree = random.random(_TOKENS) < acceptance
    prompts = np.arange(_TOKENS, dtype=np.int32) // _TEXT
    pace = predict_time(mode, places, agree, prompts, costs, cap)
    return pace.ms_per_token / pace.full_ms
