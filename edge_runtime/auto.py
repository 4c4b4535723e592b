"""Mode auto: which policy writes, by what a token takes with each, here and now.

A policy is plain full depth in one piece, with drafts copied from the text where they pay, or one that needs the
model in slices: drafts of heads at boundaries, or certified exits. Times are counted in *token times*: one is what a
token takes at plain full depth now, so that a machine that gets slower, or a longer text, changes no verdict.

What a policy has not shown yet is predicted from measured times and from what its heads did when they were
calibrated. One that seems worse is tried only as far as all that such trials have cost stays below 2% of the time: a
bandit with a budget for exploration.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .types import EngineStats, Step

BUDGET = 0.02  # of all time may go into trials …
_PLANNED = 0.01  # … and so much is planned with, as what is tried may be worse than thought
TRIAL = 32  # tokens after which a policy that loses has been left
_FEW = 16  # … and sooner, if it loses clearly
_CLEARLY = 1.1
_BETTER = 0.98  # a change is worth it only from here on
_ANSWER = 128  # tokens that a change is thought to be good for
_PREDICTED = 8.0  # tokens that a prediction counts for
_MEMORY = 0.99  # each token leaves this much of the weight of those before it
_PROBE_EVERY = 24  # tokens between two at plain full depth, for comparison
_ONE_WEIGHT = 0.2  # of the latest such token in the running mean of their times, at least


@dataclass(slots=True)
class _Record:
    """What a policy took, in token times."""

    predicted: float
    times: float = 0.0
    tokens: float = 0.0
    seen: float = -1.0  # when it wrote last, in token times from the start

    @property
    def estimate(self) -> float:
        return (_PREDICTED * self.predicted + self.times) / (_PREDICTED + self.tokens)

    def add(self, times: float, tokens: int) -> None:
        kept = _MEMORY**tokens
        self.times, self.tokens = kept * self.times + times, kept * self.tokens + tokens


class Chooser:
    """Which policy is to write. Feed it every round; it never looks at a clock."""

    def __init__(self, predicted: Mapping[str, float], one_s: float = 0.0) -> None:
        """`predicted` token times per token by policy; the first is the one without slices, to which others fall back.

        `one_s` seconds are what a token at plain full depth is thought to take; 0: not known.
        """
        self._records = {name: _Record(value) for name, value in predicted.items()}
        self._base = self.current = next(iter(predicted))
        self._one_s, self._n_alone = one_s, int(one_s > 0)
        self._latest: deque[tuple[int, float]] = deque()  # (tokens, token times) of the rounds since the change
        self._since_probe = _PROBE_EVERY
        self._total = self._spent = 0.0

    def estimate(self, name: str) -> float:
        """Token times per token that a policy is thought to take now."""
        return self._records[name].estimate

    @property
    def one_s(self) -> float:
        """Seconds that a token at plain full depth takes now; 0 as long as nothing is known."""
        return self._one_s

    @property
    def spent(self) -> float:
        """Share of all time that went into policies that proved worse than the one to fall back to."""
        return self._spent / self._total if self._total else 0.0

    def begin(self, cost: float = 0.0) -> str:
        """The policy for the next answer; a change costs so many token times, as what was computed is lost with it."""
        records, now = self._records, self._records[self.current]
        best = min(records, key=lambda name: records[name].estimate)
        gain = now.estimate - records[best].estimate
        if records[best].estimate < _BETTER * now.estimate and gain * _ANSWER > cost:
            return self._change(best, 0.0)
        unknown = min(records, key=lambda name: records[name].seen)
        # what needs slices is left as soon as it has lost, what needs none stays for an answer
        n = _ANSWER if unknown == self._base else TRIAL
        loss = n * max(0.0, records[unknown].estimate - records[best].estimate)
        if unknown != self.current and self._spent + loss + 2 * cost <= _PLANNED * self._total:
            self._spent += loss if unknown == self._base else 0.0
            return self._change(unknown, cost)
        return self.current

    @property
    def probing(self) -> bool:
        """Whether the next token is to be one at plain full depth: in slices nothing else tells its time."""
        return self.current != self._base and self._since_probe >= _PROBE_EVERY

    def observe(self, tokens: int, seconds: float, alone: bool) -> None:
        """Count a round: the tokens it published and what it took; `alone`: one token at full depth, no guess asked."""
        if alone:
            self._n_alone += 1
            self._one_s += max(_ONE_WEIGHT, 1 / self._n_alone) * (seconds - self._one_s)
        if not self._one_s:
            return
        times = seconds / self._one_s
        self._total += times
        self._records[self.current].seen = self._total
        if self.current == self._base:
            self._records[self._base].add(times, tokens)
            return
        if alone:
            self._since_probe = 0
            return
        self._since_probe += tokens
        self._records[self.current].add(times, tokens)
        self._spent += max(0.0, times - tokens * self.estimate(self._base))
        self._latest.append((tokens, times))
        while self._n_latest - self._latest[0][0] >= TRIAL:
            self._latest.popleft()

    @property
    def latest(self) -> float:
        """Token times per token of what writes now, over its last tokens; NaN before the first."""
        return sum(times for _, times in self._latest) / self._n_latest if self._latest else math.nan

    @property
    def losing(self) -> bool:
        """Whether what writes now has shown that it is slower than what there is to fall back to."""
        n, limit = self._n_latest, self.estimate(self._base)
        return (n >= TRIAL and self.latest > limit) or (n >= _FEW and self.latest > _CLEARLY * limit)

    @property
    def _n_latest(self) -> int:
        return sum(tokens for tokens, _ in self._latest)

    def fall_back(self, cost: float = 0.0) -> str:
        """Leave what loses, which costs so many token times; the policy that writes from here on."""
        return self._change(self._base, cost)

    def _change(self, name: str, cost: float) -> str:
        self.current = name
        self._spent += cost
        self._total += cost
        self._latest.clear()
        self._since_probe = _PROBE_EVERY
        return name


@dataclass(frozen=True, slots=True)
class Round:
    """What an engine did from one decision to the next."""

    tokens: int  # published
    rows: int  # that went through the last slice
    seconds: float


def rounds(
    steps: Iterator[Step], stats: EngineStats, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[Step, Round | None]]:
    """Each step, the last of a round with what it took. The first round, which has the prompt in it, is left out.

    What is done with a step before the next one is asked for takes none of the time.
    """
    tokens, seconds, first, rows = 0, 0.0, True, stats.settled_rows
    while True:
        started = clock()
        step = next(steps, None)
        seconds += clock() - started
        if step is None:
            return
        tokens += 1
        if step.accepted:
            yield step, None
            continue
        yield step, None if first else Round(tokens, stats.settled_rows - rows, seconds)
        tokens, seconds, first, rows = 0, 0.0, False, stats.settled_rows
