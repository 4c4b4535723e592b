"""A controller at the wheel: between tokens, what it decides is applied to a runtime.

How many threads compute, and for which share of the time nobody does, costs no quality: with the edge kernels, a text
does not depend on either (see docs/kernels.md). Where tokens may exit, it also says which certified thresholds hold and
how many exits are compared with full depth, and it learns what that comparison found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Any, Protocol

from .control import AuditCounts, Controller, Finding, Ladder, Observation, Rung, ladder_of
from .energy.model import PowerModel
from .errors import PackError
from .exits.pack import ExitPack
from .exits.settings import certified_rung
from .exits.thresholds import Rung as Certified
from .sensors.reading import Reading
from .slices import Slice
from .summary import copy_stats, stats_since
from .types import EngineStats, Mode

STEP_S = 0.5  # between decisions
RESTS = (0.0, 0.25, 0.5, 0.75)
LATE_BATCH = 4  # what exits leave to later runs in batches of a few
_TIMED_TOKENS = 3
_UNSTEADY = 1.5  # the usual token took this many times as long as the quickest: the machine was busy


# ── what a setting takes ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Milliseconds with some number of threads."""

    full_ms: float  # a token through all layers
    early_ms: float = math.nan  # … through those before the last boundary; NaN where nothing exits
    batch: int = 0
    late_ms: float = math.nan  # a batch of `batch` tokens through the layers behind it


def measure_token_times(
    slices: Sequence[Slice],
    thread_counts: Sequence[int],
    batch: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[int, TokenTimes], bool]:
    """Times through open `slices` with each number of threads, and whether the machine was left alone meanwhile.

    With `batch`, what lies before the last boundary and behind it is timed, too. Each is the median of
    three; the numbers of threads take turns, so that a slow spell hits all. The caches must be empty, and are left so;
    the slices keep the last of the numbers. Raises DecodeError.
    """
    first, *rest = slices
    route = first.route_to(rest) if rest else None
    early_route = first.route_to(rest[:-1]) if rest[:-1] else None

    def full() -> float:
        start = clock()
        first.decode_tokens([0], 0, [0], route=route)
        slices[-1].synchronize()
        return clock() - start

    def early(size: int) -> float:
        start = clock()
        first.decode_tokens([0] * size, 0, route=early_route)
        slices[-2].synchronize()
        return clock() - start

    def late() -> float:
        early(batch)
        start = clock()
        slices[-1].decode_states(slices[-2].hidden(batch), 0, [batch - 1])
        slices[-1].synchronize()
        return clock() - start

    def run(what: Callable[[], float]) -> float:
        took = what()
        for piece in slices:
            piece.remove(0)
        return took

    parts: list[Callable[[], float]] = [full, lambda: early(1), late] if batch else [full]
    taken: dict[int, list[list[float]]] = {n: [[] for _ in parts] for n in thread_counts}
    for n in [*thread_counts] * _TIMED_TOKENS:
        for piece in slices:
            piece.set_threads(n)
        for what, times in zip(parts, taken[n], strict=True):
            run(what)  # other threads start, the weights come from the disk, a batch of another size is prepared
            times.append(run(what))
    steady = all(median_low(times[0]) < _UNSTEADY * min(times[0]) for times in taken.values())
    return {n: _token_times(times, batch) for n, times in taken.items()}, steady


def _token_times(taken: Sequence[Sequence[float]], batch: int) -> TokenTimes:
    medians = [1e3 * median_low(times) for times in taken]
    return TokenTimes(medians[0], medians[1], batch, medians[2]) if batch else TokenTimes(medians[0])


def times_to_json(times: Mapping[int, TokenTimes]) -> list[list[float]]:
    """For `times_from_json`: a row for each number of threads."""
    return [[n, t.full_ms, *([t.early_ms, t.batch, t.late_ms] if t.batch else [])] for n, t in times.items()]


def times_from_json(rows: Any, thread_counts: Sequence[int], batch: int = 0) -> dict[int, TokenTimes]:
    """Times that were kept. Raises ValueError or TypeError unless they are those of `thread_counts` and `batch`."""
    times: dict[int, TokenTimes] = {}
    for n, *row in rows:
        good = type(n) is int and len(row) == (4 if batch else 1)
        if not good or not all(type(x) in (int, float) and 0 < x < math.inf for x in row):
            raise ValueError(f"these are no times of a token: {row}")
        if batch and row[2] != batch:
            raise ValueError(f"these are times of batches of {row[2]}")
        times[n] = (
            TokenTimes(float(row[0]), float(row[1]), batch, float(row[3])) if batch else TokenTimes(float(row[0]))
        )
    if list(times) != list(thread_counts):
        raise ValueError(f"these are times with {', '.join(map(str, times))} threads")
    return times


# ── the ladder ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Exits:
    """Which exits a run may use, and what their time is predicted from."""

    certified: tuple[Certified, ...]  # thresholds of the run's boundaries; may be empty
    n_boundaries: int
    early_share: float  # of the layers, those before the last boundary
    head_share: float  # time to ask all heads about a token ÷ that of a token at full depth
    cap: int  # exited tokens that may wait

    def tokens_per_settle(self, coverage: float) -> float:
        """Tokens that run behind the last boundary together, on average, where a share `coverage` exits at random."""
        return sum(coverage**k for k in range(self.cap + 1))

    def token_ms(self, took: TokenTimes, coverage: float) -> float:
        """Time per token where a share `coverage` exits, all at the last boundary; batches cost along a line.

        That is a first guess: the controller corrects it by the pace that it sees.
        """
        size = self.tokens_per_settle(coverage)
        one_ms = max(0.0, took.full_ms - took.early_ms)
        more_ms = max(0.0, (took.late_ms - one_ms) / (took.batch - 1)) if took.batch > 1 else one_ms
        return took.early_ms + self.head_share * took.full_ms + (one_ms + (size - 1) * more_ms) / size


def certified_rungs(pack: ExitPack, signal: str, budget: float) -> tuple[Certified, ...]:
    """What `certified_rung` gives for each bound of the pack up to `budget`, the most careful first; may be empty."""
    found: dict[float, Certified] = {}
    for bound in sorted({rung.bound for rung in pack.rungs if rung.holds and rung.bound <= budget}):
        try:
            rung = certified_rung(pack, signal, bound)
        except PackError:  # of other signals and risks only
            continue
        found[rung.bound] = rung
    return tuple(found.values())


def exits_of(pack: ExitPack, signal: str, budget: float, n_layer: int, cap: int) -> Exits:
    """The exits by `signal` that `pack` certifies for a disagreement of `budget` at most."""
    certified = certified_rungs(pack, signal, budget)
    heads = sum(_head_share(pack.report, layer, n_layer) for layer in pack.boundaries)
    return Exits(certified, len(pack.boundaries), pack.boundaries[-1] / n_layer, heads, cap)


def _head_share(report: Mapping[str, Any], layer: int, n_layer: int) -> float:
    """As the calibration measured it; else a head is thought to take as long as one of the model's layers."""
    try:
        share = report["costs"]["head_share"][str(layer)]
    except (KeyError, TypeError):
        share = None
    return float(share) if type(share) in (int, float) and 0 <= share < math.inf else 1 / n_layer


def run_ladder(
    times: Mapping[int, TokenTimes], power: PowerModel, gb_per_token: float, mode: Mode, exits: Exits | None = None
) -> Ladder:
    """Rungs for each number of threads in `times` and each share of rest, with the power that the model predicts.

    `gb_per_token` is what of the weights a token reads at full depth, in 10⁹ bytes. In mode exit, `exits` add their
    certified thresholds, and full depth is that no token may exit. Rungs that another one beats in disagreement, time
    and power are left out.
    """
    rungs = []
    for n, took in times.items():
        name = f"{n} thread{'' if n == 1 else 's'}"
        watts = power.power_w(1.0, n, gb_per_token / (took.full_ms / 1e3))
        settings = [Rung(name, Mode.FULL if exits else mode, took.full_ms, watts, n_threads=n)]
        if exits is not None:
            closed = replace(settings[0], thresholds=(0.0,) * exits.n_boundaries)
            found = exits.certified
            settings = [closed, *(_exiting(closed, took, rung, exits, power, gb_per_token) for rung in found)]
        rungs += [_rested(rung, rest, power.static_w) for rung in settings for rest in RESTS]
    return ladder_of(rungs)


def _exiting(
    closed: Rung, took: TokenTimes, found: Certified, exits: Exits, power: PowerModel, gb_per_token: float
) -> Rung:
    """As `closed`, but tokens exit by the thresholds `found`."""
    ms = exits.token_ms(took, found.coverage)
    read = exits.early_share + (1 - exits.early_share) / exits.tokens_per_settle(found.coverage)
    return replace(
        closed,
        name=f"{closed.name}, exits certified for {found.bound:g}",
        mode=Mode.EXIT,
        time_per_token_ms=ms,
        power_w=power.power_w(1.0, closed.n_threads, read * gb_per_token / (ms / 1e3)),
        disagreement=found.bound,
        thresholds=found.thresholds,
    )


def _rested(rung: Rung, rest: float, static_w: float) -> Rung:
    """As `rung`, but for a share `rest` of the time nothing is computed."""
    if not rest:
        return rung
    return replace(
        rung,
        name=f"{rung.name}, resting {rest:.0%}",
        time_per_token_ms=rung.time_per_token_ms / (1 - rest),
        power_w=static_w + (rung.power_w - static_w) * (1 - rest),
        rest=rest,
    )


# ── between tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


class Controls(Protocol):
    """What is steered, as far as a pilot sees it, between tokens."""

    @property
    def engine(self) -> object:
        """What runs now: another one must be told all settings again."""

    @property
    def stats(self) -> EngineStats:
        """Counts of the run so far; another object where they begin anew."""

    def set_threads(self, n_threads: int) -> None: ...

    def set_thresholds(self, exit_below: tuple[float, ...]) -> None:
        """Where the next token may exit; one bound per boundary, 0 nowhere."""

    def set_audit_rate(self, rate: float) -> None:
        """The share of exits to compare with full depth, of those that still wait for it, too."""


class Pilot:
    """Asks the controller every half second of generation and does what it says.

    Where an audit finds that full depth would have chosen otherwise, it asks at once: the next token is the first that
    can be kept from exiting.
    """

    def __init__(
        self,
        controller: Controller,
        controls: Controls,
        latest: Callable[[], Reading | None],
        now: Callable[[], float],
        sleep: Callable[[float], None],
        estimate: Callable[[Reading, float | None], Reading] = lambda reading, _ms: reading,
    ) -> None:
        """`latest` gives the newest reading, of the clock `now`.

        `estimate` adds what can be said, by the milliseconds per token, where no sensor says it.
        """
        self._controller, self._controls, self._latest = controller, controls, latest
        self._now, self._sleep, self._estimate = now, sleep, estimate
        self._rung: Rung | None = None
        self._audit_rate = 1.0  # before the first decision nothing is audited
        self._engine = controls.engine
        self._since_s = self._token_s = 0.0
        self._n_tokens = self._spent_s = 0.0
        self._prompt = True  # its first token is still to come
        self._counted = controls.stats
        self._seen = copy_stats(controls.stats)

    def begin(self) -> None:
        """Before an answer: take a rung by what the sensors say now."""
        self._decide(None)
        self._prompt = True

    @property
    def rung(self) -> Rung | None:
        """The setting in force; None before the first decision."""
        return self._rung

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What people should know of the targets: what cannot be held, or not be known."""
        return self._controller.findings

    def batch(self, took_s: float, count: float) -> None:
        """After a batch of several conversations that took `took_s`: rest for it, and decide anew when it is time.

        `count` is how many tokens each answer got in it, on average; 0: it was a prompt's, too, or nobody's, and its
        time says nothing of a token's.
        """
        if self._rung is not None and self._rung.rest:
            rest_s = took_s * self._rung.rest / (1 - self._rung.rest)
            self._sleep(rest_s)
            took_s += rest_s
        if count:
            self._n_tokens += count
            self._spent_s += took_s
        if self._now() - self._since_s >= STEP_S or self._disagreed():
            self._decide(1e3 * self._spent_s / self._n_tokens if self._n_tokens else None)

    def token(self) -> None:
        """After each token of the one answer: rest, if that is the rung, and decide anew when it is time.

        The first one came with the prompt, whose time says nothing of a token's and is not rested for.
        """
        if self._rung is not None and self._controls.engine is not self._engine:
            self._apply(self._rung)
            self._controls.set_audit_rate(self._audit_rate)
        if self._prompt:
            self._prompt = False
            self._since_s = self._token_s = self._now()
            if self._disagreed():
                self._decide(None)
            return
        self._n_tokens += 1
        if self._rung is not None and self._rung.rest:
            self._sleep((self._now() - self._token_s) * self._rung.rest / (1 - self._rung.rest))
        passed_s = self._now() - self._since_s
        if passed_s >= STEP_S or self._disagreed():
            self._decide(1e3 * passed_s / self._n_tokens)
        self._token_s = self._now()

    def resume(self, away_s: float) -> None:
        """Between tokens, after `away_s` in which whoever reads them kept everything waiting."""
        self._token_s += away_s
        self._since_s += away_s

    def _disagreed(self) -> bool:
        """Whether audits have found something since the last decision."""
        return self._stats().disagreed > self._seen.disagreed

    def _stats(self) -> EngineStats:
        stats = self._controls.stats
        if stats is not self._counted:
            self._counted, self._seen = stats, EngineStats()
        return stats

    def _decide(self, time_per_token_ms: float | None) -> None:
        now_s = self._now()
        reading = self._estimate(self._latest() or Reading(now_s), time_per_token_ms)
        observation = Observation(now_s, reading, time_per_token_ms)
        decision = self._controller.observe(observation, self._counts())
        anew = self._controls.engine is not self._engine
        if decision.rung != self._rung or anew:
            self._apply(decision.rung)
        if decision.audit_rate != self._audit_rate or self._rung is None or anew:
            self._controls.set_audit_rate(decision.audit_rate)
        self._audit_rate, self._rung = decision.audit_rate, decision.rung
        self._since_s, self._n_tokens, self._spent_s = now_s, 0.0, 0.0

    def _counts(self) -> AuditCounts:
        """What happened since the last decision.

        Exits of a lossless rung are confirmed drafts, of which there is nothing to doubt. Audits count by the rate in
        force when they were made, not when their tokens exited, so that one rate is right for all of them.
        """
        stats = self._stats()
        new, self._seen = stats_since(self._seen, stats), copy_stats(stats)
        exits = 0 if self._rung is None or self._rung.lossless else new.exits
        return AuditCounts(new.published, exits, new.audited, new.disagreed, self._audit_rate)

    def _apply(self, rung: Rung) -> None:
        self._engine = self._controls.engine
        self._controls.set_threads(rung.n_threads)
        if rung.thresholds:
            self._controls.set_thresholds(rung.thresholds)
