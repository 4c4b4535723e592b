"""What mode exit does to a text: disagreement by audit and by replay, perplexity under the full model, output match.

The judge is a replay: another copy of the model, in one piece, reads prompt and text from an empty cache. It knows
nothing of slices, heads or audits, and says for every token of the text what full depth would have chosen there, and
how likely it held the token to be. Intervals are of 95%, with whole prompts drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..certify import binomial_p_value
from ..exits.pack import ExitPack
from ..exits.policies import fit_family, tally
from ..exits.quality import Interval, Resamples, interval
from ..exits.thresholds import Rung
from ..native import ContextOptions, Model
from ..prefix import common_prefix
from ..slices import Slice
from ..types import Mode, SamplingSettings
from .exit_runs import Answer, Hearing, Listener, Rig, answer, tokens_per_second
from .measure import Comparison, interleave

BOUNDS = (0.01, 0.02, 0.05)
_N_BATCH = 32
_HALVINGS = 60
# which certified risk counts as "disagreement", in this order
_RISKS = ("exits", "prompts", "tokens")


# ── the judge ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Replay:
    """Full depth's view of a text of n tokens."""

    argmax: NDArray[np.int32]  # (n,) what it would have chosen at each place
    logp: NDArray[np.float64]  # (n,) log-probability of the text's own tokens, temperature 1


class Replayer:
    """A copy of the model at `path`, in one piece, that shares nothing with the engines it judges."""

    def __init__(self, path: Path, options: ContextOptions) -> None:
        self._model = Model(str(path))
        self._n_batch = min(_N_BATCH, options.n_batch)
        self._piece = Slice(self._model, 0, self._model.n_layer, options, n_outputs_max=self._n_batch)

    def __call__(self, prompt: Sequence[int], text: Sequence[int]) -> Replay:
        """Read prompt and text, the text's last token excepted, which predicts nothing of it."""
        tokens = [*prompt, *text[:-1]]
        first = len(prompt) - 1  # this token predicts the text's first
        argmax: list[int] = []
        logp: list[float] = []
        self._piece.remove(0)
        for start in range(0, len(tokens), self._n_batch):
            part = tokens[start : start + self._n_batch]
            want = range(max(0, first - start), len(part))
            self._piece.decode_tokens(part, start, want)
            for row in want:
                logits = self._piece.logits(row).astype(np.float64)
                logits -= logits.max()
                argmax.append(int(logits.argmax()))
                logp.append(float(logits[text[len(logp)]] - math.log(np.exp(logits).sum())))
        return Replay(np.asarray(argmax, np.int32), np.asarray(logp, np.float64))

    def close(self) -> None:
        self._piece.close()
        self._model.close()

    def __enter__(self) -> Replayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ── thresholds ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Setting:
    """Thresholds for an allowed disagreement, and where they come from."""

    bound: float
    thresholds: tuple[float, ...]
    certified: bool
    origin: str  # the certificate in words, or what they were selected on


def settings_for(pack: ExitPack, signal: str, heard: Sequence[Hearing], bounds: Sequence[float]) -> list[Setting]:
    """The pack's certified thresholds of `signal` for each bound on disagreement; of several risks the strictest.

    Where none is certified, the boldest policy whose disagreement among exits stays within the bound on `heard`, texts
    that must not be those it is measured on: selected, not certified, and a little optimistic.
    """
    found = []
    for bound in bounds:
        rung = _certified(pack.rungs, signal, bound)
        if rung is not None:
            found.append(Setting(bound, rung.thresholds, True, f"risk {rung.risk}: {rung.sentence()}"))
        else:
            found.append(_selected(signal, heard, bound))
    return found


def _certified(rungs: Sequence[Rung], signal: str, bound: float) -> Rung | None:
    fitting = [r for r in rungs if r.holds and r.method == "ltt" and r.signal == signal and r.bound == bound]
    return min((r for r in fitting if r.risk in _RISKS), key=lambda r: _RISKS.index(r.risk), default=None)


def _selected(signal: str, heard: Sequence[Hearing], bound: float) -> Setting:
    columns = [item.uncertainty for item in heard]
    family = fit_family(signal, heard, columns)
    counts = tally(family.thresholds, heard, columns)
    exits, errors = counts.exits.sum(axis=0), counts.errors.sum(axis=0)
    within = np.flatnonzero((errors <= bound * exits) & (exits > 0))
    n_prompts = len(counts.prompts)
    if not len(within):
        return Setting(bound, (0.0,) * len(heard), False, f"no policy is within it on {n_prompts} other prompts")
    best = int(within[exits[within].argmax()])
    return Setting(
        bound,
        tuple(family.thresholds[best].tolist()),
        False,
        f"not certified; selected on {n_prompts} other prompts, "
        f"{int(errors[best])} of {int(exits[best])} exits wrong there",
    )


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Rate:
    """Errors among n, with a bootstrap interval by prompt and the exact binomial one (Clopper and Pearson 1934)."""

    errors: int
    n: int
    by_prompt: Interval
    binomial: tuple[float, float]

    @property
    def value(self) -> float:
        return self.by_prompt.value

    def holds(self, value: float) -> bool:
        """Whether `value` is within the wider of the two intervals; a bootstrap of no errors at all has no width."""
        low = min(self.binomial[0], self.by_prompt.low)
        return low <= value <= max(self.binomial[1], self.by_prompt.high)


def rate(prompts: Sequence[int], wrong: Sequence[bool], n_resamples: int = 1000) -> Rate:
    """Of items (n,), each with its prompt's number."""
    errors, n = sum(wrong), len(wrong)
    if not n:
        return Rate(0, 0, Interval(math.nan, math.nan, math.nan), (0.0, 1.0))
    resamples = Resamples(np.asarray(prompts, np.int32), n_resamples)
    return Rate(errors, n, resamples.mean(np.asarray(wrong, np.bool_)), binomial_interval(errors, n))


def binomial_interval(errors: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided limits of a share (Clopper and Pearson 1934)."""
    tail = (1 - level) / 2
    return 1 - _upper_limit(n - errors, n, tail), _upper_limit(errors, n, tail)


def _upper_limit(errors: int, n: int, tail: float) -> float:
    if errors == n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_p_value(errors, n, middle) > tail else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Under the full model at temperature 1, e to the mean negative log-probability of a token."""

    exits: Interval  # of the text produced with exits, all prompts pooled
    full: Interval  # of full depth's own text for the same prompts
    ratio: Interval
    exits_by_prompt: list[float]
    full_by_prompt: list[float]


def perplexities(exits: Sequence[Replay], full: Sequence[Replay], n_resamples: int = 1000) -> Perplexity:
    """Of texts with exits and at full depth, in pairs of one prompt each."""
    means = []
    for replays in (exits, full):
        number = np.repeat(np.arange(len(replays), dtype=np.int32), [len(r.logp) for r in replays])
        resamples = Resamples(number, n_resamples)  # equal draws of prompts for both
        totals = resamples.per_prompt(-np.concatenate([r.logp for r in replays]))
        means.append((resamples.counts @ totals) / (resamples.counts @ resamples.per_prompt(np.ones(len(number)))))
    return Perplexity(
        interval(np.exp(means[0])),
        interval(np.exp(means[1])),
        interval(np.exp(means[0] - means[1])),
        [math.exp(-r.logp.mean()) for r in exits],
        [math.exp(-r.logp.mean()) for r in full],
    )


# ── mode exit ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ExitResult:
    """Mode exit at one setting and temperature, against full depth on the same prompts."""

    setting: Setting
    temperature: float
    n_prompts: int
    n_tokens: int
    n_layer: int
    exits: Interval  # share of tokens
    mean_depth: float  # layers
    audit: Rate
    replay: Rate
    within: bool | None  # the replay's rate lies in the audit's interval; None without audits
    contradicted: int  # audits that the replay, of the same token, judges otherwise
    perplexity: Perplexity
    same_tokens: Interval  # up to the first difference, share of the longer text, on average over prompts
    same_texts: int
    speed: Comparison | None = None  # tokens per second: ratio, with exits, full depth


def study_exits(
    rig: Rig,
    replayer: Replayer,
    prompts: Sequence[Sequence[int]],
    setting: Setting,
    sampling: SamplingSettings,
    *,
    max_tokens: int,
    audit_rate: float,
    repeats: int = 0,
) -> ExitResult:
    """Answer all prompts both ways and judge the texts; then, with `repeats`, time both in turn, audits as before.

    What audits and replay compare is the head's likeliest token with full depth's, also where tokens are drawn.
    """
    listener = Listener(rig.heads)
    full = rig.full(sampling)
    engine = rig.exits(Mode.EXIT, setting.thresholds, sampling, audit_rate=audit_rate, listener=listener)
    pairs: list[tuple[Answer, Answer]] = []
    replays: list[tuple[Replay, Replay]] = []
    exited: list[tuple[int, bool]] = []  # prompt, wrong by replay
    audited: list[tuple[int, bool]] = []
    contradicted = 0
    for i, prompt in enumerate(prompts):
        listener.said.clear()
        ours, theirs = (answer(e, prompt, max_tokens, rig.model.is_end) for e in (engine, full))
        replays.append((replayer(prompt, ours.tokens), replayer(prompt, theirs.tokens)))
        pairs.append((ours, theirs))
        wrong = _wrong_exits(ours, listener, replays[-1][0], len(prompt), rig)
        exited += [(i, is_wrong) for is_wrong in wrong.values()]
        audited += [(i, not audit.agreed) for audit in ours.audits]
        contradicted += sum(wrong[audit.position] == audit.agreed for audit in ours.audits)
    audit, replayed = (rate([i for i, _ in rows], [w for _, w in rows]) for rows in (audited, exited))
    steps = [step for ours, _ in pairs for step in ours.steps]
    number = np.repeat(np.arange(len(pairs), dtype=np.int32), [len(ours.steps) for ours, _ in pairs])
    match = np.asarray([common_prefix(a.tokens, b.tokens) / max(len(a.tokens), len(b.tokens)) for a, b in pairs])
    speed = None
    if repeats:
        timed = rig.exits(Mode.EXIT, setting.thresholds, sampling, audit_rate=audit_rate)
        per_second = partial(tokens_per_second, prompts=prompts, max_tokens=max_tokens, is_end=rig.model.is_end)
        speed = interleave(lambda: per_second(timed), lambda: per_second(full), repeats)
    return ExitResult(
        setting=setting,
        temperature=sampling.temperature,
        n_prompts=len(prompts),
        n_tokens=len(steps),
        n_layer=rig.model.n_layer,
        exits=Resamples(number).mean(np.asarray([step.boundary is not None for step in steps])),
        mean_depth=float(np.mean([step.depth for step in steps])),
        audit=audit,
        replay=replayed,
        within=audit.holds(replayed.value) if audit.n else None,
        contradicted=contradicted,
        perplexity=perplexities([a for a, _ in replays], [b for _, b in replays]),
        same_tokens=Resamples(np.arange(len(pairs), dtype=np.int32)).mean(match),
        same_texts=sum(a.tokens == b.tokens for a, b in pairs),
        speed=speed,
    )


def _wrong_exits(ours: Answer, listener: Listener, judged: Replay, n_prompt: int, rig: Rig) -> dict[int, bool]:
    """By position of each exit of a text, whether the replay would have chosen otherwise than the head."""
    wrong: dict[int, bool] = {}
    for step in ours.steps:
        if step.boundary is not None:
            _, top = listener.said[step.position][rig.pack.boundaries.index(step.boundary) + 1]
            wrong[step.position] = int(judged.argmax[step.position - n_prompt]) != top
    return wrong
