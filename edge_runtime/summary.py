"""What one answer cost and how it came about."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .energy.request import RequestEnergy
from .types import EngineStats


class Finish(str, Enum):
    """Why an answer ended."""

    END_OF_TURN = "end-of-turn"
    STOP_STRING = "stop-string"
    MAX_TOKENS = "max-tokens"
    CONTEXT_FULL = "context-full"
    INTERRUPTED = "interrupted"

    @property
    def reason(self) -> str:
        """The short form that other runtimes use: stop, length or interrupted."""
        if self in (Finish.END_OF_TURN, Finish.STOP_STRING):
            return "stop"
        return "interrupted" if self is Finish.INTERRUPTED else "length"


@dataclass(frozen=True, slots=True)
class Summary:
    """One answer in numbers; None where there is nothing to divide."""

    mode: str
    boundaries: tuple[int, ...]
    finish_reason: str  # stop, length or interrupted
    finish: str  # … and which: a value of `Finish`
    prompt_tokens: int
    reused_tokens: int  # of the prompt, still in the KV cache from before
    generated_tokens: int
    time_to_first_token_ms: float | None
    prefill_tokens_per_s: float | None  # prompt tokens not reused ÷ time to first token
    decode_tokens_per_s: float | None  # tokens after the first ÷ the time they took
    mean_depth: float | None  # layers behind a token
    n_layer: int
    exits: int  # tokens that left early
    drafted: int
    accepted: int
    acceptance: float | None  # accepted ÷ drafted
    audited: int  # exits compared with full depth
    disagreed: int
    disagreement: float | None  # disagreed ÷ audited
    seed: int
    played: str | None = None  # mode auto: which of the modes it came to, at last
    policies: dict[str, int] | None = None  # mode auto: tokens written by each policy
    left: str | None = None  # mode auto: which policy lost and was left in this answer, and what it took
    kernels: str = "stock"  # what multiplied the weights: stock, or the edge kernels' instruction set
    relaxed: int = 0  # tokens that full depth would have chosen otherwise: mode margin
    changed: float | None = None  # relaxed ÷ generated
    theta: float | None = None  # mode margin: how close a second choice had to be
    draft: str | None = None  # what proposed drafts: the text so far ("ngram") or heads
    pack: str | None = None  # name of the exit pack
    head: str | None = None  # what guessed at boundaries: the pack's heads, or the model's own output head ("shared")
    signal: str | None = None  # what decided whether a token left
    prompt_uncertainty: float | None = None  # by a probe: probability that answers to the prompt differ in meaning
    energy_j: float | None = None  # gross, of the whole answer; this and what follows None where no power is known
    prefill_energy_j: float | None = None  # … until its first token
    decode_energy_j: float | None = None  # … and from there on
    energy_per_token_j: float | None = None  # of the tokens after the first
    net_energy_per_token_j: float | None = None  # the same above idling; None where the idle power is not known
    energy_source: str | None = None  # measured, calibrated or estimated
    energy_covered: float | None = None  # share of the time that readings of the power were near enough to


@dataclass(slots=True)
class Clock:
    """When an answer's tokens came, in seconds of one monotonic clock."""

    start: float
    first: float | None = None
    latest: float | None = None
    tokens: int = 0

    def tick(self, now: float) -> None:
        self.first = now if self.first is None else self.first
        self.latest = now
        self.tokens += 1

    @property
    def first_token_s(self) -> float | None:
        return None if self.first is None else self.first - self.start

    @property
    def decode_s(self) -> float | None:
        """Time from the first token to the latest."""
        return None if self.first is None or self.latest is None else self.latest - self.first


def rate(count: int, seconds: float | None) -> float | None:
    """`count` per second; None of nothing or in no time."""
    return count / seconds if seconds and count > 0 else None


def energy_fields(energy: RequestEnergy | None) -> dict[str, Any]:
    """A summary's fields about energy; none if nothing is known of it."""
    if energy is None:
        return {}
    return {
        "energy_j": energy.gross_j,
        "prefill_energy_j": energy.prefill.gross_j,
        "decode_energy_j": None if energy.decode is None else energy.decode.gross_j,
        "energy_per_token_j": energy.per_token_j,
        "net_energy_per_token_j": energy.net_per_token_j,
        "energy_source": energy.source.value,
        "energy_covered": energy.covered,
    }


def number(value: float) -> float | None:
    return None if math.isnan(value) else value


def stats_since(before: EngineStats, now: EngineStats) -> EngineStats:
    """What was counted after `before`, a copy made earlier with `copy_stats`."""
    counts = {f.name: getattr(now, f.name) - getattr(before, f.name) for f in _counts()}
    return EngineStats(**counts, by_depth=dict(Counter(now.by_depth) - Counter(before.by_depth)))


def copy_stats(stats: EngineStats) -> EngineStats:
    return dataclasses.replace(stats, by_depth=dict(stats.by_depth))


def _counts() -> list[dataclasses.Field[int]]:
    return [f for f in dataclasses.fields(EngineStats) if f.name != "by_depth"]
