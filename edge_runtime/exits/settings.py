"""What a run with an exit pack uses: boundaries, signal and thresholds, by what was asked for and what is proven."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BoundaryError, PackError, UsageError
from ..types import Mode
from .pack import ExitPack
from .thresholds import Rung

DEFAULT_DISAGREEMENT = 0.02
# what a bound on disagreement is a bound of, the strongest statement first
_RISKS = ("exits", "prompts", "tokens")
# these compare a boundary with the one before it in the pack
_CHAINED = ("stability", "gate")


@dataclass(frozen=True, slots=True)
class ExitSettings:
    """Where tokens may leave, and when."""

    boundaries: tuple[int, ...]
    signal: str
    thresholds: tuple[float, ...]  # one, or one per boundary
    rung: Rung | None = None  # where the thresholds are from, if they are proven


def exit_settings(
    pack: ExitPack,
    mode: Mode,
    boundaries: tuple[int, ...] | None = None,
    thresholds: tuple[float, ...] | None = None,
    signal: str | None = None,
    max_disagreement: float | None = None,
) -> ExitSettings:
    """Settings of a run; None leaves a choice to the pack.

    Without thresholds, mode exit takes those proven for `max_disagreement` or 2%, mode verified those the pack found
    to pay. Raises BoundaryError for boundaries that the pack is not for, UsageError for choices that exclude each
    other, PackError where nothing is proven.
    """
    chosen = pack.boundaries if boundaries is None else boundaries
    signal = signal or pack.default_signal
    missing = [str(layer) for layer in chosen if layer not in pack.boundaries]
    if missing:
        raise BoundaryError(
            f"the exit pack '{pack.name}' has no {'gate' if pack.shared else 'head'} behind layer {', '.join(missing)}",
            f"it is for layers {_listed(pack.boundaries)}: choose from them, or leave --boundaries out",
        )
    if chosen != pack.boundaries and signal in _CHAINED and mode is not Mode.FULL:
        raise UsageError(
            f"the signal '{signal}' compares each boundary with the one before, so it needs all of the pack's",
            "leave --boundaries out, or choose another --signal",
        )
    if thresholds is not None or mode is Mode.FULL:
        return ExitSettings(chosen, signal, thresholds or (0.0,))
    if mode is Mode.EXIT:
        if chosen != pack.boundaries:
            raise UsageError(
                f"what the exit pack '{pack.name}' certifies is for all of its boundaries, {_listed(pack.boundaries)}",
                "leave --boundaries out, or give a --threshold, of which nothing is certified",
            )
        rung = certified_rung(pack, signal, DEFAULT_DISAGREEMENT if max_disagreement is None else max_disagreement)
        return ExitSettings(chosen, signal, rung.thresholds, rung)
    if signal != pack.default_signal:
        raise UsageError(
            f"the exit pack '{pack.name}' has thresholds for mode {mode.value} by {pack.default_signal}, "
            f"not by {signal}",
            "give a --threshold, or leave --signal out",
        )
    by_layer = dict(zip(pack.boundaries, pack.verify_thresholds, strict=True))
    return ExitSettings(chosen, signal, tuple(by_layer[layer] for layer in chosen))


def certified_rung(pack: ExitPack, signal: str, bound: float) -> Rung:
    """The rung by `signal` of the largest certified bound up to `bound`, on the strongest risk that has one.

    Raises PackError, saying what is missing and what there is, if nothing is certified.
    """
    rungs = [r for r in pack.rungs if r.method == "ltt" and r.risk in _RISKS]
    holding = [r for r in rungs if r.holds]
    for risk in _RISKS:
        found = [r for r in holding if r.signal == signal and r.risk == risk and r.bound <= bound]
        if found:
            return max(found, key=lambda r: (r.bound, -r.delta))
    tried = [r for r in rungs if r.signal == signal and r.bound <= bound]
    if tried:
        nearest = max(tried, key=lambda r: r.bound)
        why = max(
            (r for r in tried if r.bound == nearest.bound), key=lambda r: -(r.prompts_needed or 10**12)
        ).sentence()
    else:
        why = "it was not calibrated for that"
    there = sorted({(r.bound, r.signal) for r in holding})
    certified = ", ".join(f"{bound:g} by {name}" for bound, name in there)
    raise PackError(
        f"the exit pack '{pack.name}' certifies no exits at a disagreement of {bound:g} by {signal}: {why}",
        f"certified: {certified}; choose with --max-disagreement and --signal"
        if there
        else "nothing is: calibrate with more prompts, use --mode verified, or give a --threshold of your own",
    )


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
