"""What a simulated run must show, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..control import ControlSettings
from .scenarios import Scenario
from .simulator import PERIOD_S, Numbers, Trace, full_depth_alone, simulate

SETTLE_S = 45.0  # after something outside changes at once
_OVER_C = 2.0
_CAP_SHARE = 1.10
_CAP_WINDOW_S = 5.0  # over which power is averaged
_CHANGE_WINDOW_S = 30.0
_CHANGE_EVERY_S = 5.0
_LEAST_TOKENS = 500  # a share of fewer says little


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run's worst values; None where the scenario asks for nothing of the kind."""

    name: str
    kind: str
    machine: str
    over_ceiling_c: float | None  # highest temperature minus the ceiling
    cap_share: float | None  # highest mean power of 5 s after settling ÷ what must be held
    changes_per_5_s: float  # in the busiest 30 s after settling
    disagreement: float  # highest share of all tokens so far, from the 500th on
    budget: float
    tokens_per_second: float
    alone_tokens_per_second: float  # full depth, without a controller
    alone_over_ceiling_c: float
    alone_throttles: bool

    @property
    def missed(self) -> tuple[str, ...]:
        """The criteria that were not met, in words."""
        found = []
        if self.over_ceiling_c is not None and self.over_ceiling_c > _OVER_C:
            found.append(f"{self.over_ceiling_c:.1f} °C above the ceiling")
        if self.cap_share is not None and self.cap_share > _CAP_SHARE:
            found.append(f"{self.cap_share:.2f} × the power cap")
        if self.changes_per_5_s >= 1:
            found.append(f"{self.changes_per_5_s:.1f} rung changes in 5 s")
        if self.disagreement > self.budget:
            found.append(f"a disagreement of {self.disagreement:.4f}")
        return tuple(found)


def run_scenario(scenario: Scenario, settings: ControlSettings | None = None) -> tuple[Outcome, Trace, Trace]:
    """The outcome, the run under the controller, and that of full depth alone."""
    trace, alone = simulate(scenario, settings), full_depth_alone(scenario)
    return judge(trace, alone), trace, alone


def judge(trace: Trace, alone: Trace) -> Outcome:
    scenario, targets = trace.scenario, trace.scenario.targets
    ceiling_c = targets.ceiling_c
    settled = _settled(trace)
    tokens, wrong = np.cumsum(trace.column("tokens")), np.cumsum(trace.column("wrong"))
    counted = tokens >= min(_LEAST_TOKENS, tokens[-1])
    return Outcome(
        name=scenario.name,
        kind=scenario.kind,
        machine=scenario.machine.name,
        over_ceiling_c=None if ceiling_c is None else float(trace.column("temp_c").max()) - ceiling_c,
        cap_share=_cap_share(trace, settled),
        changes_per_5_s=_changes(trace, settled),
        disagreement=float((wrong[counted] / np.maximum(1, tokens[counted])).max()),
        budget=targets.budget,
        tokens_per_second=float(tokens[-1]) / scenario.duration_s,
        alone_tokens_per_second=float(alone.column("tokens").sum()) / scenario.duration_s,
        alone_over_ceiling_c=0.0 if ceiling_c is None else float(alone.column("temp_c").max()) - ceiling_c,
        alone_throttles=any(moment.throttled for moment in alone.moments),
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """The worst of all runs, None where none has such a value, and how many missed something."""
    over = [o.over_ceiling_c for o in outcomes if o.over_ceiling_c is not None]
    over_where_needed = [o.over_ceiling_c for o in outcomes if o.over_ceiling_c is not None and o.alone_throttles]
    caps = [o.cap_share for o in outcomes if o.cap_share is not None]
    return {
        "runs": len(outcomes),
        "missed": sum(bool(o.missed) for o in outcomes),
        "full_depth_alone_throttles": sum(o.alone_throttles for o in outcomes),
        "over_ceiling_c": max(over, default=None),
        "over_ceiling_c_where_full_depth_throttles": max(over_where_needed, default=None),
        "cap_share": max(caps, default=None),
        "changes_per_5_s": max((o.changes_per_5_s for o in outcomes), default=0.0),
        "disagreement": max((o.disagreement for o in outcomes), default=0.0),
    }


def _settled(trace: Trace) -> NDArray[np.bool_]:
    """Periods that lie long enough after the last disturbance (n,)."""
    time_s = trace.column("time_s")
    settled = np.ones(len(time_s), np.bool_)
    for start in trace.scenario.disturbances_s:
        settled &= (time_s < start) | (time_s >= start + SETTLE_S)
    return settled


def _cap_share(trace: Trace, settled: NDArray[np.bool_]) -> float | None:
    """Against the cap or, where other programs and the most saving rung take more than it, against what those take."""
    scenario, cap_w = trace.scenario, trace.scenario.targets.power_cap_w
    if cap_w is None:
        return None
    least_w = [scenario.machine.least_w(cores, scenario.power_error) for cores in trace.column("background")]
    width = round(_CAP_WINDOW_S / PERIOD_S)
    share = _moving_mean(trace.column("power_w") / np.maximum(cap_w, least_w), width)
    whole = _moving_mean(settled.astype(np.float64), width) > 1 - 1e-9
    return float(share[whole].max()) if whole.any() else None


def _changes(trace: Trace, settled: NDArray[np.bool_]) -> float:
    rungs = trace.column("rung")
    changed = np.diff(rungs, prepend=rungs[0]) != 0
    width = round(_CHANGE_WINDOW_S / PERIOD_S)
    per_window = _moving_mean((changed & settled).astype(np.float64), width) * width
    return float(per_window.max()) * _CHANGE_EVERY_S / _CHANGE_WINDOW_S


def _moving_mean(values: Numbers, width: int) -> Numbers:
    """Means of `width` neighbours (n - width + 1,)."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray((sums[width:] - sums[:-width]) / width)
