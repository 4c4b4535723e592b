"""What a classifier says of a message."""

from __future__ import annotations

from dataclasses import dataclass

UNSURE = "unsure"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one message."""

    label: str  # one of the pack's labels, or UNSURE
    likeliest: str  # the label it would have been without abstention
    confidence: float  # calibrated probability of `likeliest`
    probabilities: tuple[float, ...]  # calibrated, in the order of the pack's labels
    stage: int  # 0: before the network, i: at the pack's boundary i
    layer: int  # layers computed for this decision
    novelty: float | None  # how unlike the training messages, above 1: more than 99% of them; None: not looked at
    unfamiliar: bool  # its words or its states are unlike the training messages
    n_cut: int = 0  # tokens left out at the end of a message too long for the pack

    @property
    def unsure(self) -> bool:
        return self.label == UNSURE
