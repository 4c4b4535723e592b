"""The tuned lens by ridge regression, and the shortlist it speaks."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from edge_runtime.exits.ridge import fit_projection, fit_ridge, rms_norm
from edge_runtime.exits.shortlist import choose_shortlist
from edge_runtime.types import Floats

from .corpus_fakes import LAYER, Made, make_corpus


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_corpus(tmp_path_factory.mktemp("corpus"), n_texts=120)


def _agreement(made: Made, projection: Floats) -> float:
    right = n = 0
    for text in made.texts:
        states = rms_norm(text.states(LAYER)[text.target_rows].astype(np.float32))
        said = (states @ projection.T @ made.output.T).argmax(axis=1)
        right += int((said == text.targets("top_ids")[:, 0]).sum())
        n += len(said)
    return right / n


def test_projection_finds_the_way_to_the_last_state(made: Made) -> None:
    projection = fit_projection(made.texts[:80], LAYER, made.final_norm)
    assert _agreement(made, projection) > 0.85
    assert _agreement(made, np.eye(32, dtype=np.float32)) < 0.2  # the plain lens knows nothing of the rotation


def test_projection_is_the_minimum_of_its_loss(made: Made) -> None:
    """The gradient of the squared error plus penalty is zero at the solution: an oracle by definition."""
    projection = fit_projection(made.texts, LAYER, made.final_norm).astype(np.float64)
    inputs = np.concatenate([rms_norm(t.states(LAYER)[t.target_rows].astype(np.float32)) for t in made.texts])
    wanted = np.concatenate([rms_norm(t.targets("final").astype(np.float32)) * made.final_norm for t in made.texts])
    inputs, wanted = inputs.astype(np.float64), wanted.astype(np.float64)
    penalty = 1e-2 * np.trace(inputs.T @ inputs) / inputs.shape[1]
    gradient = (projection @ inputs.T - wanted.T) @ inputs + penalty * projection
    assert np.abs(gradient).max() < 1e-3 * np.abs(wanted.T @ inputs).max()


def test_head_says_other_for_tokens_outside(made: Made) -> None:
    """The row for all other tokens scores higher before such tokens than before listed ones."""
    shortlist = choose_shortlist(made.texts, len(made.output), 48)
    head = fit_ridge(made.texts, LAYER, made.final_norm, made.output[shortlist], shortlist)
    table = head.table(made.output[shortlist])
    assert table.shape == (49, 32)
    inside, outside = [], []
    for text in made.texts:
        logits = rms_norm(text.states(LAYER)[text.target_rows].astype(np.float32)) @ table.T
        listed = np.isin(text.targets("top_ids")[:, 0], shortlist)
        inside += logits[listed, -1].tolist()
        outside += logits[~listed, -1].tolist()
    assert outside
    assert np.mean(outside) > np.mean(inside) + 0.5


def test_other_row_is_silent_where_all_tokens_are_listed(made: Made) -> None:
    shortlist = np.arange(len(made.output), dtype=np.int32)
    head = fit_ridge(made.texts, LAYER, made.final_norm, made.output, shortlist)
    assert not head.tensors["other"].any()


def test_no_text_is_an_error(made: Made) -> None:
    with pytest.raises(UsageError, match="no text"):
        fit_ridge([], LAYER, made.final_norm, made.output, np.arange(96, dtype=np.int32))


def test_shortlist_counts_probabilities_and_text(made: Made) -> None:
    counts = np.zeros(len(made.output))
    for text in made.texts:
        for ids, logp in zip(text.targets("top_ids"), text.targets("top_logp"), strict=True):
            for i, p in zip(ids, logp, strict=True):
                counts[i] += np.exp(np.float32(p))
        for token in text.shard["tokens"][text.start : text.end]:
            counts[token] += 1
    best = sorted(sorted(range(len(counts)), key=lambda i: -counts[i])[:30])
    assert choose_shortlist(made.texts, len(made.output), 30).tolist() == best


def test_shortlist_prefers_early_tokens_where_nothing_is_known() -> None:
    assert choose_shortlist([], 1000, 5).tolist() == [0, 1, 2, 3, 4]
    assert choose_shortlist([], 1000, 3, other_text=[[7, 7], [900]]).tolist() == [0, 7, 900]
    assert choose_shortlist([], 4, 10).tolist() == [0, 1, 2, 3]
