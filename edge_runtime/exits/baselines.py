"""What an exit head is compared with: exits that others have proposed, judged on the same targets in the same way.

- the plain logit lens: the model's own norm and output matrix on a boundary's state (nostalgebraist 2020,
  "interpreting GPT: the logit lens");
- SLERP: the same on a point of the arc between that state and a linear prediction of the last layer's;
- SEDAC V7: exit where neighbouring boundaries' states point the same way;
- fixed exits (Cerebellum): always exit at the boundary, whatever the token.

The first two make predictions of their own; the others are ways to decide upon a head's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Floats, TokenIds
from .corpus import Text
from .evaluate import TEMPERATURE, Predictions, Recorder
from .ridge import rms_norm

SLERP_WEIGHTS = (0.25, 0.5, 0.75)
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Baseline:
    """Whether a way to exit agrees with full depth (m,), and how uncertain it is (m,): lower is surer."""

    name: str
    layer: int
    prompts: NDArray[np.int32]
    agree: NDArray[np.bool_]
    uncertainty: Floats


def by_signal(name: str, predictions: Predictions, signal: str = "entropy") -> Baseline:
    """Exits of what made `predictions`, the surest by `signal` first."""
    p = predictions
    return Baseline(name, p.layer, p.prompts, p.agree, p.uncertainty(signal))


def cosine_stability(predictions: Predictions) -> Baseline:
    """SEDAC V7: exits where this boundary's state and that of the boundary before have the greatest cosine.

    At the first boundary there is none before it, and nothing exits.
    """
    return by_signal("cosine stability", predictions, "stability")


def fixed_exits(predictions: Predictions) -> Baseline:
    """Cerebellum: every token exits, none is more certain than another."""
    p = predictions
    return Baseline("fixed exits", p.layer, p.prompts, p.agree, np.zeros(len(p), np.float32))


def logit_lens(
    texts: Iterable[Text],
    layer: int,
    final_norm: Floats,
    output_rows: Floats,
    ids: TokenIds | None = None,
    cluster_starts: TokenIds | None = None,
    *,
    previous_layer: int | None = None,
    temperature: float = TEMPERATURE,
    groups: Mapping[int, str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """The plain logit lens at `layer`.

    `final_norm` (n_embd,) and `output_rows` (n, n_embd) are the model's own; the rows are those of tokens `ids` (n,),
    by default of the whole vocabulary. `groups` names the kind of each prompt, `advance` is told of rows computed.
    Raises UsageError without targets.

    The head is computed in float32 from states that were kept as float16, while llama.cpp, where the output matrix is
    quantised, rounds the state to 8 bits as well: of tokens that are nearly tied, single ones may come out otherwise.
    """
    return _lens(
        texts,
        layer,
        None,
        0.0,
        final_norm,
        output_rows,
        ids,
        cluster_starts,
        previous_layer,
        temperature,
        groups,
        advance,
    )


def slerp_lens(
    texts: Iterable[Text],
    layer: int,
    weight: float,
    projection: Floats,
    final_norm: Floats,
    output_rows: Floats,
    ids: TokenIds | None = None,
    cluster_starts: TokenIds | None = None,
    *,
    previous_layer: int | None = None,
    temperature: float = TEMPERATURE,
) -> Predictions:
    """The output matrix on the point `weight` of the way from the state at `layer` to the tuned lens's prediction.

    `projection` A (n_embd, n_embd) is the lens, as `ridge.fit_projection` makes it: A·norm(state) predicts the last
    layer's normed state. Weight 0 is the plain logit lens, weight 1 the tuned lens; SLERP_WEIGHTS lie between.
    The rest is as for `logit_lens`.
    """
    return _lens(
        texts, layer, projection, weight, final_norm, output_rows, ids, cluster_starts, previous_layer, temperature
    )


def slerp(a: Floats, b: Floats, weight: float) -> Floats:
    """Points (n, d) at `weight` of the way from rows of a to rows of b (n, d), in direction along the great circle.

    Lengths go in a straight line. Rows that point the same way, or in opposite ways, where the circle is not defined,
    are joined by a straight line.

    Shoemake 1985, "Animating rotation with quaternion curves".
    """
    length_a, length_b = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    unit_a, unit_b = a / np.maximum(length_a, 1e-12), b / np.maximum(length_b, 1e-12)
    cosine = np.clip((unit_a * unit_b).sum(axis=1, keepdims=True), -1.0, 1.0)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    straight = sine < 1e-4
    safe = np.where(straight, 1.0, sine)
    part_a = np.where(straight, 1.0 - weight, np.sin((1.0 - weight) * angle) / safe)
    part_b = np.where(straight, weight, np.sin(weight * angle) / safe)
    length = (1.0 - weight) * length_a + weight * length_b
    return np.asarray((part_a * unit_a + part_b * unit_b) * length, np.float32)


def _lens(
    texts: Iterable[Text],
    layer: int,
    projection: Floats | None,
    weight: float,
    final_norm: Floats,
    output_rows: Floats,
    ids: TokenIds | None,
    cluster_starts: TokenIds | None,
    previous_layer: int | None,
    temperature: float,
    groups: Mapping[int, str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    named = np.arange(len(output_rows), dtype=np.int32) if ids is None else ids
    recorder = Recorder(layer, named, cluster_starts, has_other=False, temperature=temperature, groups=groups)
    for text in texts:
        recorder.begin(text, previous_layer)
        rows = text.target_rows
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            states = rms_norm(text.states(layer)[rows[start : start + _ROWS_AT_ONCE]].astype(np.float32))
            points = states * final_norm
            if projection is not None:
                points = slerp(points, states @ projection.T, weight)
            for logits in points @ output_rows.T:
                recorder.add(logits)
        recorder.end()
        if advance:
            advance(text.end - text.start)
    return recorder.predictions()
