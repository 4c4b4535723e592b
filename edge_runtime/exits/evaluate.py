"""What a head says on texts it has not learned from, and whether full depth agrees.

The quantised head is run by llama.cpp over whole texts, and its signals are made by the code that makes them when text
is generated, so that what is fitted and certified here is what will be met there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import PackError, UsageError
from ..signals import signals_of
from ..types import SIGNALS, Floats, TokenIds
from .corpus import Text
from .gate import Gate
from .head import HeadContext

N_BATCH = 32
TEMPERATURE = 0.7
_COLUMNS = ("entropy", "top1", "margin", "clusters", "stability", "other")
# signals of which more is surer
_SURENESS = ("top1", "margin", "stability")
# a float16 log-probability is off by half a unit in the last place at most, and by what float32 sums lose
_ROUNDING = 2.0**-11
_SUM_ERROR = 1e-6


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one boundary says of `m` held-out targets; those of several boundaries have equal targets in equal order.

    `acceptance` is a lower bound of 1 - total variation between the full model and the head, both at one temperature:
    the probability that a token drawn from the head survives speculative sampling (Leviathan et al. 2023,
    arXiv 2211.17192).
    """

    layer: int
    prompts: NDArray[np.int32]  # (m,) the prompt a target belongs to
    groups: NDArray[np.int8]  # (m,) what kind of prompt, into `group_names`
    agree: NDArray[np.bool_]  # (m,) the likeliest token the head can name is the full model's likeliest
    in_shortlist: NDArray[np.bool_]  # (m,) the head can name the full model's likeliest
    acceptance: Floats  # (m,)
    guessed: NDArray[np.bool_]  # (m,) the head is asked, and does not expect a token it cannot name
    values: dict[str, Floats]  # (m,) each: entropy, top1, margin, clusters, stability, other, and gate if there is one
    group_names: tuple[str, ...] = ("",)

    def __len__(self) -> int:
        return len(self.agree)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that this boundary has."""
        return tuple(s for s in SIGNALS if s in self.values and np.isfinite(self.values[s]).any())

    def uncertainty(self, signal: str) -> Floats:
        """(m,) lower is surer, as `signals.uncertainty`; NaN never exits. Raises UsageError for an unknown signal."""
        if signal not in SIGNALS:
            raise UsageError(f"there is no signal '{signal}'", f"there are {', '.join(SIGNALS)}")
        if signal not in self.values:
            return np.full(len(self), np.nan, np.float32)
        column = self.values[signal]
        column = np.float32(1) - column if signal in _SURENESS else column
        return np.where(self.guessed, column, np.float32(np.nan)).astype(np.float32)

    def with_gate(self, gate: Gate) -> Predictions:
        """The same, with what `gate` makes of the signals as column "gate"."""
        return replace(self, values={**self.values, "gate": gate.probabilities(self.values)})

    def asked(self, where: NDArray[np.bool_]) -> Predictions:
        """The same for a head that is asked only about the targets (m,) marked in `where`."""
        return replace(self, guessed=self.guessed & where)

    def take(self, which: NDArray[np.bool_]) -> Predictions:
        """The targets (m,) marked in `which`."""
        return replace(
            self,
            prompts=self.prompts[which],
            agree=self.agree[which],
            in_shortlist=self.in_shortlist[which],
            acceptance=self.acceptance[which],
            guessed=self.guessed[which],
            values={name: column[which] for name, column in self.values.items()},
            groups=self.groups[which],
        )


class Recorder:
    """Collects `Predictions`: for each text its states' stability, and then the logits of its targets in order."""

    def __init__(
        self,
        layer: int,
        shortlist: TokenIds,
        cluster_starts: TokenIds | None,
        *,
        has_other: bool,
        temperature: float = TEMPERATURE,
        groups: Mapping[int, str] | None = None,
    ) -> None:
        """`groups` names the kind of each prompt; temperature 0 accepts where `agree`. Raises UsageError above 1."""
        if not 0 <= temperature <= 1:
            raise UsageError(f"acceptance cannot be bounded at temperature {temperature}", "allowed: from 0 to 1")
        self._layer, self._shortlist, self._starts = layer, shortlist, cluster_starts
        self._has_other, self._temperature = has_other, temperature
        self._by_id = np.argsort(shortlist, kind="stable")
        self._sorted = shortlist[self._by_id]
        self._group_of = dict(groups or {})
        self._group_names = tuple(sorted({"", *self._group_of.values()}))
        self._parts: dict[str, list[NDArray[np.generic]]] = {}
        self._text: Text | None = None
        self._rows: list[tuple[float, ...]] = []
        self._named: list[int] = []
        self._guessed: list[bool] = []
        self._drawn: list[Floats] = []

    def begin(self, text: Text, previous_layer: int | None) -> None:
        """The next logits are of `text`'s targets."""
        self._text, self._rows, self._named, self._guessed, self._drawn = text, [], [], [], []
        self._places = self._places_of(text.targets("top_ids"))
        self._stability: Floats = np.full(len(self._places), np.nan, np.float32)
        if previous_layer is not None:
            rows = text.target_rows
            self._stability = cosines(text.states(self._layer)[rows], text.states(previous_layer)[rows])

    def add(self, logits: Floats) -> None:
        """Logits (n_rows,) of the next target."""
        n = len(self._shortlist)
        if len(logits) != n + self._has_other:
            raise PackError(f"a head of {len(logits)} rows does not speak a shortlist of {n} tokens", "calibrate again")
        s = signals_of(logits, self._starts, self._has_other)
        self._rows.append((s.entropy, s.top1, s.margin, s.clusters, s.other))
        best = int(logits[:n].argmax())
        self._named.append(best)
        self._guessed.append(not self._has_other or bool(logits[best] >= logits[n]))
        places = self._places[len(self._drawn)]
        if self._temperature:
            weights = np.exp((logits[:n] - logits[best]) / np.float32(self._temperature))
            self._drawn.append(np.where(places >= 0, weights[places] / weights.sum(), np.float32(0)))
        else:
            self._drawn.append((places == best).astype(np.float32))

    def end(self) -> None:
        """All targets of the text were added."""
        text, n = self._text, len(self._rows)
        assert text is not None
        assert n == len(self._places)
        if not n:
            return
        first = self._places[:, 0]
        agree = first == np.asarray(self._named)
        if self._temperature:
            acceptance = acceptance_bound(text.targets("top_logp"), np.stack(self._drawn), self._temperature)
        else:
            acceptance = agree.astype(np.float32)
        entropy, top1, margin, clusters, other = np.asarray(self._rows, np.float32).T
        group = self._group_names.index(self._group_of.get(text.prompt, ""))
        columns = dict(zip(_COLUMNS, (entropy, top1, margin, clusters, self._stability, other), strict=True))
        for name, column in {
            "prompts": np.full(n, text.prompt, np.int32),
            "groups": np.full(n, group, np.int8),
            "agree": agree,
            "in_shortlist": first >= 0,
            "acceptance": acceptance,
            "guessed": np.asarray(self._guessed),
            **columns,
        }.items():
            self._parts.setdefault(name, []).append(column)

    def predictions(self) -> Predictions:
        """All that was recorded. Raises UsageError if there was no target."""
        if not self._parts:
            raise UsageError("there are no texts to measure a head on", "give more prompts")
        whole = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return Predictions(
            self._layer,
            whole["prompts"].astype(np.int32),
            whole["groups"].astype(np.int8),
            whole["agree"].astype(np.bool_),
            whole["in_shortlist"].astype(np.bool_),
            whole["acceptance"].astype(np.float32),
            whole["guessed"].astype(np.bool_),
            {name: whole[name].astype(np.float32) for name in _COLUMNS},
            self._group_names,
        )

    def _places_of(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where in the shortlist tokens are; -1: nowhere."""
        found = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[found] == ids, self._by_id[found], -1)


def predict(
    head: Path | HeadContext,
    texts: Iterable[Text],
    layer: int,
    shortlist: TokenIds,
    cluster_starts: TokenIds | None,
    previous_layer: int | None = None,
    *,
    temperature: float = TEMPERATURE,
    groups: Mapping[int, str] | None = None,
    n_threads: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """Run a head over all states of `texts` behind `layer`, and keep what it says of their targets.

    `shortlist` (V,) names the head's rows, and where it has one row more, that is for all other tokens;
    `previous_layer` is the boundary before, for the stability of states. An open head needs room for the longest text,
    and is left with the last one in its cache. `advance` is told of rows computed. Raises UsageError without targets,
    PackError if head and shortlist do not belong together, and what opening a head raises.
    """
    texts = list(texts)
    longest = max((text.end - text.start for text in texts), default=1)
    with contextlib.ExitStack() as stack:
        if isinstance(head, HeadContext):
            context = head
        else:
            context = stack.enter_context(HeadContext(head, longest, n_threads, N_BATCH, N_BATCH))
        recorder = Recorder(
            layer,
            shortlist,
            cluster_starts,
            has_other=context.n_rows > len(shortlist),
            temperature=temperature,
            groups=groups,
        )
        for text in texts:
            recorder.begin(text, previous_layer)
            context.forget(0)
            _run(context, text.states(layer), text.target_rows, recorder)
            recorder.end()
            if advance:
                advance(text.end - text.start)
    return recorder.predictions()


def _run(context: HeadContext, states: NDArray[np.float16], targets: NDArray[np.int64], recorder: Recorder) -> None:
    step = min(context.n_batch, context.n_outputs_max)
    for start in range(0, len(states), step):
        part = np.ascontiguousarray(states[start : start + step], np.float32)
        want = [int(row) - start for row in targets[(targets >= start) & (targets < start + step)]]
        context.decode(part, start, want)
        for row in want:
            recorder.add(context.logits(row))


def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> Floats:
    """Cosine (n,) between rows of a and b (n, n_embd); NaN for a row of zeros."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)), np.float32)


def acceptance_bound(top_logp: NDArray[np.floating], q: Floats, temperature: float) -> Floats:
    """Lower bound (m,) of Σ min(p, q) over the vocabulary, p being the full model at `temperature` (above 0, up to 1).

    `top_logp` (m, k) are its log-probabilities at temperature 1 of the k likeliest tokens, likeliest first, and q
    (m, k) the head's probabilities of these at `temperature`. Of the tail t, what is missing from 1, all are below the
    last kept probability p_k, so that at temperature T they weigh t · p_k^(1/T - 1) together at most. That kept numbers
    are rounded to 16 bits is allowed for.
    """
    logp = top_logp.astype(np.float64)
    slack = np.abs(logp) * _ROUNDING + _SUM_ERROR
    low, high = logp - slack, np.minimum(logp + slack, 0.0)
    tail = np.maximum(1.0 - np.exp(low).sum(axis=1), 0.0) * np.exp(high[:, -1] * (1 / temperature - 1))
    total = np.exp(high / temperature).sum(axis=1) + tail
    p = np.exp(low / temperature) / total[:, None]
    return np.asarray(np.minimum(p, q).sum(axis=1), np.float32)
