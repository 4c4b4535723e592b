"""The tuned lens by ridge regression: from a boundary's state to the last layer's, in numpy.

A head with nothing but this is the baseline, what is trained where PyTorch is missing, and where training starts.
Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112, learn the
same map by gradient descent; here it is the closed form, on normed states.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..types import Floats, TokenIds
from .corpus import Text
from .head import HeadShape, HeadWeights, lens_shape

_EPSILON = 1e-5  # as in most models; a state is far larger
RIDGE_PENALTY = 1e-2  # relative to the mean square of an input


def rms_norm(states: Floats) -> Floats:
    """Rows divided by their root mean square, (n, n_embd)."""
    return np.asarray(states / np.sqrt((states * states).mean(axis=-1, keepdims=True) + np.float32(_EPSILON)))


def fit_projection(texts: Iterable[Text], layer: int, final_norm: Floats) -> Floats:
    """A (n_embd, n_embd) with A·norm(state at `layer`) nearest to final_norm·norm(state at the last layer).

    Raises UsageError without texts.
    """
    inner: NDArray[np.float64] | None = None
    cross: NDArray[np.float64] | None = None
    for text in texts:
        inputs = rms_norm(text.states(layer)[text.target_rows].astype(np.float32))
        wanted = rms_norm(text.targets("final").astype(np.float32)) * final_norm
        if inner is None or cross is None:
            inner, cross = np.zeros((inputs.shape[1],) * 2), np.zeros((inputs.shape[1],) * 2)
        inner += inputs.T @ inputs
        cross += inputs.T @ wanted
    if inner is None or cross is None:
        raise UsageError("there is no text to fit a head to", "give more prompts")
    inner[np.diag_indices_from(inner)] += RIDGE_PENALTY * np.trace(inner) / len(inner)
    return np.linalg.solve(inner, cross).T.astype(np.float32)


def fit_other_row(
    texts: Iterable[Text], layer: int, projection: Floats, output_rows: Floats, is_listed: NDArray[np.bool_]
) -> Floats:
    """The table's row (n_embd,) for all tokens outside the shortlist: the mean state that leads there, weighed down.

    The row is c·m, m the mean normed state before such tokens without what all states have in common, c such that its
    logit has the spread of the others.
    """
    outside: list[Floats] = []
    total, n = np.zeros(projection.shape[0]), 0
    for text in texts:
        inputs = rms_norm(text.states(layer)[text.target_rows].astype(np.float32))
        outside.append(inputs[~is_listed[text.targets("top_ids")[:, 0]]])
        total += inputs.sum(axis=0)
        n += len(inputs)
    found = np.concatenate(outside) if outside else np.empty((0, len(total)), np.float32)
    if not len(found):
        return np.zeros(len(total), np.float32)
    direction = found.mean(axis=0) - total / n
    spread = float(np.linalg.norm(output_rows @ projection, axis=1).mean())
    return np.asarray(direction * spread / max(float(np.linalg.norm(direction)), 1e-12), np.float32)


def lens_head(layer: int, projection: Floats, other: Floats, n_rows: int) -> HeadWeights:
    """A head that is its projection alone: a block that adds nothing."""
    shape = lens_shape(len(projection), n_rows)
    return HeadWeights(layer, shape, silent_tensors(shape, other), projection)


def silent_tensors(shape: HeadShape, other: Floats) -> dict[str, Floats]:
    """Tensors of a block whose matrices are zero."""
    tensors: dict[str, Floats] = {name: np.zeros(size, np.float32) for name, size in shape.matrices.items()}
    tensors |= {name: np.ones(shape.n_embd, np.float32) for name in shape.norms}
    return tensors | {"other": other}


def fit_ridge(
    texts: Iterable[Text], layer: int, final_norm: Floats, output_rows: Floats, shortlist: TokenIds
) -> HeadWeights:
    """A ridge head for `layer`; `output_rows` (n, n_embd) are the model's, of the shortlist (n,).

    Raises UsageError without texts.
    """
    found = list(texts)
    highest = max((int(text.targets("top_ids").max(initial=0)) for text in found), default=0)
    is_listed = np.zeros(1 + max(highest, int(shortlist.max())), np.bool_)
    is_listed[shortlist] = True
    projection = fit_projection(found, layer, final_norm)
    other = fit_other_row(found, layer, projection, output_rows, is_listed)
    return lens_head(layer, projection, other, len(output_rows) + 1)
