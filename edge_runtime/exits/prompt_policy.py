"""A prompt decides how far its answer may leave early: a probe reads its last token's state on the way through.

    prompt ──► slices ──► boundary ──► probe ──► probability that answers differ ──► policy ──► thresholds × 0 … 1
                             │
                             └──► the draft source, as without a probe

The state is that of the prompt's own computation, so that nothing is computed twice. Until it has come to the
boundary, exits are closed: the first token of an answer is always full depth's. No threshold is ever raised, so that
of the tokens of one text none exits that would not have done so without a probe.

What a certificate says afterwards: a bound on disagreements per token (risk "tokens") still holds, since there are
fewer exits, and none of them new. A bound on the share of exits that disagree is of all prompts' exits; those that are
left are of the prompts that the probe is sure of, and it holds for them only where they are not wrong more often than
the others. Semantic entropy does not say so, audits do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..draft import BoundaryView, DraftSource, Guess
from ..errors import UsageError
from ..semantic.probe import Probe
from ..types import Floats, Thresholds
from .probe_file import ProbeFile

# a prompt's probability of high semantic entropy → what its thresholds are multiplied by, from 0, full depth, to 1
PromptPolicy: TypeAlias = Callable[[float], float]

DEFAULT_LIMIT = 0.5


@dataclass(frozen=True, slots=True)
class FullDepthIfUncertain:
    """Exits as they are certified where the probability is below `limit`, full depth elsewhere.

    Raises UsageError for a limit outside 0 … 1.
    """

    limit: float = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise UsageError(f"{self.limit} is no limit on a probability", "allowed: from 0, always full depth, to 1")

    def __call__(self, probability: float) -> float:
        return 1.0 if probability < self.limit else 0.0


class PromptWatch:
    """A draft source that hands all through to another and has a prompt's state looked at in passing.

    `begin` is told of every prompt, and `scaled` gives the thresholds that are in force.
    """

    wants_states = True

    def __init__(self, source: DraftSource, probe: Probe, boundary: int, policy: PromptPolicy) -> None:
        """`boundary` is the engine's number, from 1, of the one behind `probe.layer` layers."""
        self._source, self._probe, self._boundary, self._policy = source, probe, boundary, policy
        self.wants_logits = source.wants_logits
        self._last = -1  # position of the prompt's last token
        self.probability: float | None = None  # of high semantic entropy; None before it is known
        self._scale = 0.0

    def begin(self, n_tokens: int) -> None:
        """A text of so many tokens is to be answered; what was known of another is forgotten."""
        self._last, self.probability, self._scale = n_tokens - 1, None, 0.0

    def scaled(self, thresholds: Thresholds) -> Thresholds:
        """`thresholds`, none of them raised, as the policy has them for this prompt; all 0 before it is known."""
        if self._scale == 1:
            return thresholds
        return Thresholds(tuple(below * self._scale if self._scale else 0.0 for below in thresholds.exit_below))

    def speaks_at(self, boundary: int) -> bool:
        return boundary == self._boundary or self._source.speaks_at(boundary)

    def guess(self, view: BoundaryView) -> Guess | None:
        return self._source.guess(view) if self._source.speaks_at(view.boundary) else None

    def observe(self, boundary: int, first_pos: int, states: Floats) -> None:
        row = self._last - first_pos
        if boundary == self._boundary and 0 <= row < len(states):
            self.probability = float(self._probe.predict(states[row : row + 1])[0])
            scale = self._policy(self.probability)
            self._scale = min(scale, 1.0) if scale > 0 else 0.0  # NaN closes, too
        if self._source.wants_states and self._source.speaks_at(boundary):
            self._source.observe(boundary, first_pos, states)

    def forget(self, length: int) -> None:
        if self._source.wants_states:
            self._source.forget(length)


def watch_prompts(
    source: DraftSource, probes: ProbeFile, boundaries: Sequence[int], policy: PromptPolicy | None = None
) -> PromptWatch:
    """`source` behind the best of `probes` for slices cut at `boundaries`; by default `FullDepthIfUncertain` decides.

    Raises UsageError if no probe reads states there.
    """
    probe = probes.at(boundaries)
    return PromptWatch(source, probe, 1 + list(boundaries).index(probe.layer), policy or FullDepthIfUncertain())
