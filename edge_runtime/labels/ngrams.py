"""Stage 0: a linear model over hashed n-grams, the exit before the network.

Character n-grams (2 to 5) catch spelling, word n-grams (1 and 2) catch phrases. Both are hashed into one table
(Weinberger et al., Feature Hashing, ICML 2009), so that a pack needs no vocabulary. Values are 1 + log(count), each
message scaled to length 1. Inverse document frequencies would add nothing: measured on 19,663 tweets, with them the
AUROC is .983, without .984.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..types import Floats

Buckets: TypeAlias = NDArray[np.int32]

_CHAR_LENGTHS = range(2, 6)
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint32(0x01000193)
_WORD_SALT = np.uint32(0x9E3779B9)
_CHUNK = 4096  # characters hashed at once, so that a long message needs little memory


@dataclass(frozen=True, slots=True)
class Sparse:
    """Messages as rows of (bucket, value) pairs: row r holds entries starts[r] to starts[r + 1]."""

    buckets: Buckets
    values: Floats
    starts: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    def rows(self, wanted: NDArray[np.int64]) -> Sparse:
        """The rows `wanted`, in that order."""
        lengths = np.diff(self.starts)[wanted]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        entries = np.repeat(self.starts[wanted] - starts[:-1], lengths) + np.arange(starts[-1])
        return Sparse(self.buckets[entries], self.values[entries], starts)


def ngram_rows(texts: Sequence[str], bits: int) -> Sparse:
    """Hashed n-grams of prepared texts in 2**bits buckets: values 1 + log(count), each row scaled to length 1."""
    parts = [_ngrams_of(text, bits) for text in texts]
    starts = np.concatenate(([0], np.cumsum([len(buckets) for buckets, _ in parts], dtype=np.int64)))
    if not parts:
        return Sparse(np.empty(0, np.int32), np.empty(0, np.float32), starts)
    return Sparse(np.concatenate([b for b, _ in parts]), np.concatenate([v for _, v in parts]), starts)


def _ngrams_of(text: str, bits: int) -> tuple[Buckets, Floats]:
    lowered = f" {text.lower()} "
    hashes = [_word_hashes(lowered)]
    overlap = _CHAR_LENGTHS[-1] - 1
    for start in range(0, len(lowered) - _CHAR_LENGTHS[0] + 1, _CHUNK):
        # parts overlap by what the longest n-gram needs, and count only what starts in them
        hashes += _char_hashes(lowered[start : start + _CHUNK + overlap], _CHUNK)
    buckets, counts = np.unique(np.concatenate(hashes) >> np.uint32(32 - bits), return_counts=True)
    values = 1 + np.log(counts)
    return buckets.astype(np.int32), (values / np.sqrt(np.square(values).sum())).astype(np.float32)


def _char_hashes(text: str, n_starts: int) -> list[NDArray[np.uint32]]:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    rolling = codes.copy()
    found = []
    for length in _CHAR_LENGTHS:
        if len(codes) < length:
            break
        rolling = rolling[: len(codes) - length + 1] * _MULTIPLIER ^ codes[length - 1 :]
        found.append(_mix(rolling[:n_starts] + np.uint32(length)))
    return found


def _word_hashes(text: str) -> NDArray[np.uint32]:
    words = _WORD.findall(text)
    if not words:
        return np.empty(0, np.uint32)
    codes = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.array([len(word) for word in words])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    places = np.arange(len(codes), dtype=np.uint32) - np.repeat(starts, lengths).astype(np.uint32)
    letters = _mix(codes * np.uint32(0x85EBCA6B) + places * np.uint32(0xC2B2AE35))
    single = np.add.reduceat(letters, starts, dtype=np.uint32)
    pairs = single[:-1] * _MULTIPLIER ^ single[1:]
    return _mix(np.concatenate((single + _WORD_SALT, pairs)))


def _mix(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    # the finaliser of MurmurHash3 (public domain): every input bit reaches the high bits, which choose the bucket
    values = (values ^ values >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    values = (values ^ values >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return values ^ values >> np.uint32(16)


def scores(rows: Sparse, weights: Floats | NDArray[np.int8], bias: Floats) -> Floats:
    """Linear scores (n_rows, n_labels) for weights (n_labels, 2**bits)."""
    columns = [_row_sums(rows.values * weight[rows.buckets], rows.starts) for weight in weights]
    return np.stack(columns, axis=1).astype(np.float32) + bias


def _row_sums(values: Floats, starts: NDArray[np.int64]) -> Floats:
    sums = np.zeros(len(starts) - 1, np.float32)
    filled = np.flatnonzero(np.diff(starts))  # reduceat gives an empty row its successor's first value
    if len(filled):
        sums[filled] = np.add.reduceat(values, starts[filled])
    return sums
