"""What crosses modules: frozen data, no behaviour beyond reading it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import BoundaryError, UsageError

Floats: TypeAlias = NDArray[np.float32]
TokenIds: TypeAlias = NDArray[np.int32]

DEFAULT_THETA = 0.9  # mode margin: how likely, beside full depth's first choice, a second one must be to be accepted


class Mode(str, Enum):
    """What becomes of a token that left the network early."""

    AUTO = "auto"  # whichever of the others takes least time, of those that are as good; no engine's mode
    FULL = "full"  # no token leaves early
    EXIT = "exit"  # published at once; its missing layers are computed later
    VERIFIED = "verified"  # a draft, published only if full depth agrees: lossless
    MARGIN = "margin"  # … or if it is full depth's second choice and nearly as likely as its first (MARS)

    @property
    def verifies(self) -> bool:
        """Whether what left early is a draft that full depth is asked about before anyone sees it."""
        return self in (Mode.VERIFIED, Mode.MARGIN)


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """What a GGUF file says of itself before it is loaded."""

    path: str
    architecture: str
    name: str
    n_layer: int
    n_embd: int
    n_ctx_train: int
    n_head_kv: int
    key_length: int
    value_length: int
    n_tensors: int
    n_vocab: int
    tensor_bytes: int
    file_bytes: int


SIGNALS = ("entropy", "top1", "margin", "clusters", "stability", "gate")


@dataclass(frozen=True, slots=True)
class Signals:
    """Uncertainty of one next-token distribution."""

    entropy: float  # nats, 0 = certain
    top1: float  # probability of the likeliest token
    margin: float  # probability of the likeliest minus that of the second
    clusters: float = math.nan  # nats, entropy over clusters of tokens that mean the same
    stability: float = math.nan  # cosine of this boundary's hidden state and the one before; NaN at the first
    other: float = 0.0  # probability of a token that the head cannot name
    gate: float = math.nan  # estimated probability that full depth disagrees


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Exit at boundary i when its guess is less uncertain than `exit_below[i]`, by the signal that was chosen (see
    `signals.uncertainty`; entropies in nats, others from 0 to 1); 0 never exits, infinity always does."""

    exit_below: tuple[float, ...]

    def __post_init__(self) -> None:
        for value in self.exit_below:
            if math.isnan(value) or value < 0:
                raise UsageError(
                    f"threshold {value} is no bound on uncertainty: it must be a number, 0 or more",
                    "0 never exits, inf always exits; between, it depends on the signal (entropy: nats)",
                )


@dataclass(frozen=True, slots=True)
class Audit:
    """An exited token compared with full depth, after the fact."""

    position: int  # of the published token
    layer: int  # the layer it left after
    agreed: bool  # full depth's likeliest token is the head's likeliest token


@dataclass(frozen=True, slots=True)
class Step:
    """One published token and how it came about."""

    token: int
    position: int
    depth: int  # layers behind this choice; all of the model's where full depth chose or confirmed it
    boundary: int | None = None  # layer after which it left, 0 if guessed before the first; None: full depth
    signals: tuple[tuple[int, Signals], ...] = ()  # (layer, signals) of each boundary asked on the way
    drafted: bool = False  # a draft was verified for this position
    accepted: bool = False  # … and full depth agreed, or was undecided
    relaxed: bool = False  # … it chose another token, and was undecided; `token` is the draft
    corrected: bool = False  # … and full depth said otherwise; `token` is full depth's
    audits: tuple[Audit, ...] = ()  # earlier exits whose truth became known with this step


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How a token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repeat penalty", self.repeat_penalty, 0 < self.repeat_penalty < math.inf, "above 0; 1 is off"),
            ("repeat window", self.repeat_last_n, self.repeat_last_n >= 0, "0 (off) or more tokens"),
            # 2**32 - 1 is LLAMA_DEFAULT_SEED, which draws another seed each time
            ("seed", self.seed, 0 <= self.seed < 2**32 - 1, "from 0 to 4294967294"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise UsageError(f"{name} {value} is out of range", f"allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine runs: see `Mode`; `cap` bounds the exited tokens that wait for depth."""

    mode: Mode = Mode.FULL
    cap: int = 8
    audit_rate: float = 0.1  # share of exits compared with full depth in mode exit
    audit_seed: int = 0
    theta: float = DEFAULT_THETA  # mode margin: a second choice more than this times as likely as the first is accepted

    def __post_init__(self) -> None:
        if self.mode is Mode.AUTO:
            raise UsageError("an engine runs one mode, and auto stands for several", "name the mode")
        if self.cap < 1:
            raise UsageError(f"cap {self.cap} is too small", "at least 1 token must be able to wait")
        if not 0 <= self.audit_rate <= 1:
            raise UsageError(f"audit rate {self.audit_rate} is not a share", "allowed: from 0 to 1")
        if not 0 < self.theta <= 1:
            raise UsageError(
                f"theta {self.theta} is no ratio of a second choice's probability to the first's",
                "allowed: above 0, at most 1, which accepts no second choice",
            )


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made or `reset`; the engine adds, readers only read."""

    published: int = 0
    exits: int = 0  # published tokens that left early, confirmed drafts among them
    drafted: int = 0  # drafts sent to verification
    accepted: int = 0
    relaxed: int = 0  # accepted although full depth chose another token
    audited: int = 0
    disagreed: int = 0
    settles: int = 0  # batches through the last slice, prompts included
    settled_rows: int = 0  # tokens in them
    by_depth: dict[int, int] = field(default_factory=dict)  # published tokens by depth in layers

    @property
    def mean_depth(self) -> float:
        """Layers behind a published token, on average; NaN before the first."""
        return sum(d * n for d, n in self.by_depth.items()) / self.published if self.published else math.nan

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def changed(self) -> float:
        """Share of published tokens that full depth would have chosen otherwise (mode margin); NaN before the first."""
        return self.relaxed / self.published if self.published else math.nan

    @property
    def disagreement(self) -> float:
        """Share of audited exits that full depth would have chosen otherwise; NaN without audits."""
        return self.disagreed / self.audited if self.audited else math.nan


def check_boundaries(boundaries: tuple[int, ...], n_layer: int) -> None:
    """Raise BoundaryError unless `boundaries` are strictly increasing layers within 1 … n_layer - 1."""
    allowed = f"give increasing layers from 1 to {n_layer - 1}, for example --boundaries {max(1, n_layer // 2)}"
    for layer in boundaries:
        if not 1 <= layer < n_layer:
            raise BoundaryError(f"boundary {layer} is outside this model's {n_layer} layers", allowed)
    for before, after in zip(boundaries, boundaries[1:], strict=False):
        if before == after:
            raise BoundaryError(f"boundary {after} is given twice", allowed)
        if before > after:
            raise BoundaryError(f"boundaries are not in order: {after} comes after {before}", allowed)
