"""Clusters of tokens that mean the same, made once per shortlist: by case, leading space, and output embedding.

The entropy over clusters is the per-token form of semantic entropy (Kuhn, Gal, Farquhar 2023, "Semantic Uncertainty",
arXiv 2302.09664): a head torn between "The" and " the" knows what comes.

Nearness of output rows alone does not mean likeness of meaning: it is greatest between "three" and "four", "Wednesday"
and "Thursday", "positive" and "negative", which stand in the same places. So only forms of one word are joined, those
that begin alike and end differently, where each is the nearest such form of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..types import Floats, TokenIds

# of a cosine, what all rows have in common taken off. SmolLM2-135M's pairs above it are "unit" and "units", "resign"
# and "resigned", at the loosest "Islam" and "Islamic"; between 0.5 and 0.6 come "eight" and "eighteen", "free" and
# "freedom", below that "through" and "throughout", "prince" and "princess"
SIMILARITY = 0.6
_STEM = 4  # letters that two forms of one word share at least
_ENDING = 3  # letters that follow what they share at most


def cluster_tokens(pieces: Sequence[bytes | str], rows: Floats, similarity: float = SIMILARITY) -> TokenIds:
    """Cluster number (n,) of each token; numbers count from 0 in order of first appearance.

    `pieces` are what the tokens stand for, `rows` (n, n_embd) their rows of the model's output matrix. Tokens are
    joined that differ in case or leading spaces alone, and of such groups those two and two that are forms of one word
    and whose mean rows have a cosine of at least `similarity`. A cluster is never more than two words in all their
    spellings.
    """
    forms = [_form(piece) for piece in pieces]
    numbers: dict[bytes | str | int, int] = {}
    # control tokens stand for nothing, each in its own way
    group = np.array([numbers.setdefault(form or i, len(numbers)) for i, form in enumerate(forms)], np.int64)
    if not len(group):
        return np.zeros(0, np.int32)
    means = _means(rows, group, len(numbers))
    parent = np.arange(len(numbers))
    for a, b in _word_pairs(list(numbers), means, similarity):
        parent[b] = a  # each is in one pair at most
    _, first, cluster = np.unique(parent[group], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[cluster]


def order_by_cluster(ids: TokenIds, clusters: TokenIds) -> tuple[TokenIds, TokenIds]:
    """Ids (n,) with clusters side by side, and where each cluster starts (n_clusters,), as `np.add.reduceat` asks.

    Clusters come in the order of their smallest id, tokens of one cluster in order of id.
    """
    if not len(ids):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    _, number = np.unique(clusters, return_inverse=True)
    smallest = np.full(int(number.max()) + 1, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(smallest, number, ids)
    order = np.lexsort((ids, smallest[number]))
    sorted_number = number[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_number[1:] != sorted_number[:-1])))
    return ids[order].astype(np.int32), starts.astype(np.int32)


def _form(piece: bytes | str) -> bytes | str:
    """What spellings of one token share; bytes that are no text, and spaces alone, are like nothing else."""
    try:
        text = piece if isinstance(piece, str) else piece.decode()
    except UnicodeDecodeError:
        return piece
    return text.lstrip(" ").casefold() or piece


def _means(rows: Floats, group: NDArray[np.int64], n: int) -> Floats:
    """Unit rows (n, n_embd): the mean of each group's, without what all rows have in common."""
    centred = rows - rows.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(n))
    means = np.add.reduceat(centred[order], starts, axis=0)
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.float32)


def _word_pairs(forms: Sequence[bytes | str | int], means: Floats, similarity: float) -> list[tuple[int, int]]:
    """Pairs of forms of one word, each the other's nearest, at least `similarity` near."""
    stems: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        if isinstance(form, str) and len(form) >= _STEM and form.isalpha():
            stems.setdefault(form[:_STEM], []).append(i)
    pairs = []
    for members in stems.values():
        if len(members) < 2:
            continue
        index = np.array(members)
        cosine = means[index] @ means[index].T
        cosine[~_alike([str(forms[i]) for i in members])] = -2.0
        nearest = cosine.argmax(axis=1)
        for i, j in enumerate(nearest.tolist()):
            if i < j and nearest[j] == i and cosine[i, j] >= similarity:
                pairs.append((members[i], members[j]))
    return pairs


def _alike(words: Sequence[str]) -> NDArray[np.bool_]:
    """Which of words with one stem (n, n) are forms of one word: short endings behind what they share."""
    lengths = np.array([len(word) for word in words])
    letters = np.array(words, dtype=f"U{lengths.max()}").view(np.uint32).reshape(len(words), -1)
    # padding is 0 and no letter, so that words stop to be equal where one ends
    same = (letters[:, None] == letters[None]) & (letters[:, None] != 0)
    shared = np.logical_and.accumulate(same, axis=2).sum(axis=2)
    longer = np.maximum(lengths[:, None], lengths[None])
    alike = longer - shared <= _ENDING
    np.fill_diagonal(alike, False)
    return np.asarray(alike)
