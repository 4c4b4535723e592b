"""Is a message like those the pack was trained on? By its words, before the network, and by its states behind a slice.

States: Mahalanobis distance of the mean-pooled hidden state (Lee et al., A Simple Unified Framework for Detecting
Out-of-Distribution Samples, NeurIPS 2018) in the leading principal components, plus what these leave over. The mean of
a short message varies more, so distances are judged against those of training messages of like length. The share of
new words counts as well: measured on tweets against English news, the AUROC is .88 by states behind layer 2, .87 by
words and .92 by both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ..types import Floats

N_COMPONENTS = 32
FAMILIAR_SHARE = 0.99  # of the training messages count as familiar
_WORDS_WEIGHT = 0.5  # against states; measured, from 0.5 to 1 is the same
_LARGEST = 80.0  # logarithm of a novelty; float32 ends soon after
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class StateNovelty:
    """Novelty at one boundary; above 1 it is beyond what 99% of the training messages have."""

    mean: Floats  # (n_embd,)
    basis: Floats  # (n_components, n_embd), orthonormal
    variances: Floats  # (n_components + 1,): of the components, and of each dimension left over
    length_slope: float  # of log distance by log tokens, in training messages
    distance_scale: float  # standard deviation of log distance around that
    words_scale: float  # standard deviation of the share of new words
    offset: float  # of the sum of both, where 99% of the training messages are below

    def scores(self, pooled: Floats, n_tokens: NDArray[np.int64], new_shares: Floats) -> Floats:
        """Novelty (n,) of mean-pooled states (n, n_embd) of messages of n_tokens (n,) with new_shares (n,) of words."""
        beyond = self._sums(pooled, n_tokens, new_shares) - self.offset
        return np.asarray(np.exp(np.minimum(beyond, _LARGEST)), np.float32)

    def _sums(self, pooled: Floats, n_tokens: NDArray[np.int64], new_shares: Floats) -> Floats:
        logs = np.log(_distances(pooled, self.mean, self.basis, self.variances))
        by_states = (logs - self.length_slope * np.log(n_tokens)) / self.distance_scale
        return np.asarray(by_states + _WORDS_WEIGHT * new_shares / self.words_scale, np.float32)


def _distances(pooled: Floats, mean: Floats, basis: Floats, variances: Floats) -> Floats:
    centred = pooled - mean
    # row by row: a product of matrices would depend on their number in the last bits
    inside = np.array([basis @ row for row in centred], np.float32).reshape(len(pooled), len(basis))
    left = np.maximum(np.square(centred).sum(axis=1) - np.square(inside).sum(axis=1), 0)
    squares = (np.square(inside) / variances[:-1]).sum(axis=1) + left / variances[-1]
    return np.asarray(np.sqrt(np.maximum(squares, 1e-12)), np.float32)


def fit_state_novelty(pooled: Floats, n_tokens: NDArray[np.int64], new_shares: Floats) -> StateNovelty:
    """From mean-pooled states (n, n_embd) of training messages, their tokens (n,) and shares of new words (n,)."""
    mean = pooled.mean(axis=0)
    centred = pooled - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(pooled))
    n_components = min(N_COMPONENTS, len(values) - 1, len(pooled) - 1)
    top = np.arange(len(values) - 1, len(values) - 1 - n_components, -1)
    rest = max(float(values[: len(values) - n_components].mean()), 1e-12)
    variances = np.append(np.maximum(values[top], 1e-12), rest).astype(np.float32)
    basis = np.ascontiguousarray(vectors[:, top].T, np.float32)
    logs, lengths = np.log(_distances(pooled, mean, basis, variances)), np.log(n_tokens)
    varied = float(lengths.var())
    slope = float(((lengths - lengths.mean()) * (logs - logs.mean())).mean() / varied) if varied > 1e-9 else 0.0
    scale = max(float((logs - slope * lengths).std()), 1e-6)
    words_scale = max(float(new_shares.std()), 0.01)
    plain = StateNovelty(mean, basis, variances, slope, scale, words_scale, 0.0)
    sums = plain._sums(pooled, n_tokens, new_shares)
    return dataclasses.replace(plain, offset=float(np.quantile(sums, FAMILIAR_SHARE)))


@dataclass(frozen=True, slots=True)
class WordNovelty:
    """Which words occurred in training, as a table of bits: a word not in it is new, few new ones pass for known."""

    table: NDArray[np.uint8]  # (2**bits / 8,)
    limit: float  # share of new words that 99% of the training messages stay below

    def new_shares(self, texts: Sequence[str]) -> Floats:
        """Share (n,) of the different words of each prepared text that are new; 0 for a text without words."""
        return np.array([self._new_share(text) for text in texts], np.float32)

    def _new_share(self, text: str) -> float:
        places = np.unique(word_places(text, 8 * len(self.table)))
        if not len(places):
            return 0.0
        known = self.table[places >> 3] >> (places & 7) & 1
        return 1 - float(known.mean())

    def unfamiliar(self, shares: Floats) -> NDArray[np.bool_]:
        """(n,): more new words than training messages have."""
        return shares > self.limit


def word_places(text: str, n_bits: int) -> NDArray[np.int64]:
    """The bit of each word of a text in a table of n_bits."""
    return np.array([crc32(word.encode("utf-8", "replace")) % n_bits for word in _WORD.findall(text.lower())], np.int64)


def fit_word_novelty(texts: Sequence[str], bits: int = 18) -> tuple[WordNovelty, Floats]:
    """From prepared training texts; also each one's share of new words (n,), as if it had not been among them.

    A word counts as known to a message if another message has it, too.
    """
    n_bits = 2**bits
    places = [np.unique(word_places(text, n_bits)) for text in texts]
    counts = np.bincount(np.concatenate([*places, np.empty(0, np.int64)]), minlength=n_bits)
    shares = np.array([float((counts[p] < 2).mean()) if len(p) else 0.0 for p in places], np.float32)
    table = np.packbits(counts > 0, bitorder="little")
    return WordNovelty(table, float(np.quantile(shares, FAMILIAR_SHARE))), shares
