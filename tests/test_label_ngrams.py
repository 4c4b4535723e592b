"""Hashed n-grams are those that a slow count of them gives, and scores are those of the dense product."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.labels.ngrams import Sparse, ngram_rows, scores
from edge_runtime.types import Floats

BITS = 17
CHUNK = 4096
M32 = 2**32 - 1
# letters that repeat, that lower-case to two characters, outside the BMP, halves of surrogate pairs, joiners
LETTERS = st.sampled_from(
    [*"aab  bA_9.\n", "İ", "ß", "é", "e\u0301", "日", "😀", "👩\u200d💻", "\ud83d", "\udc4d", "\u200d", "\x00"]
)
TEXTS = st.one_of(st.lists(LETTERS, max_size=40).map("".join), st.text(max_size=20))


# ── oracle ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def mixed(value: int) -> int:
    value = ((value ^ value >> 16) * 0x85EBCA6B) & M32
    value = ((value ^ value >> 13) * 0xC2B2AE35) & M32
    return value ^ value >> 16


def hash_of_characters(gram: str) -> int:
    value = ord(gram[0])
    for letter in gram[1:]:
        value = (value * 0x01000193 & M32) ^ ord(letter)
    return mixed(value + len(gram) & M32)


def hash_of_letters(word: str) -> int:
    return sum(mixed(ord(c) * 0x85EBCA6B + i * 0xC2B2AE35 & M32) for i, c in enumerate(word)) & M32


def counted(text: str, bits: int) -> dict[int, int]:
    """Bucket → how many n-grams of the text fall into it."""
    text = f" {text.lower()} "
    grams = [text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n + 1)]
    words = [hash_of_letters(word) for word in re.findall(r"\w+", text)]
    hashes = [hash_of_characters(gram) for gram in grams]
    hashes += [mixed(word + 0x9E3779B9 & M32) for word in words]
    hashes += [mixed((a * 0x01000193 & M32) ^ b) for a, b in zip(words, words[1:], strict=False)]
    return Counter(value >> (32 - bits) for value in hashes)


def values_of(text: str, bits: int) -> dict[int, float]:
    values = {bucket: 1 + math.log(count) for bucket, count in counted(text, bits).items()}
    length = math.sqrt(sum(v * v for v in values.values()))
    return {bucket: value / length for bucket, value in values.items()}


def row(rows: Sparse, index: int) -> dict[int, float]:
    part = slice(rows.starts[index], rows.starts[index + 1])
    buckets = rows.buckets[part].tolist()
    assert len(set(buckets)) == len(buckets)
    return dict(zip(buckets, rows.values[part].tolist(), strict=True))


def assert_counted(texts: Sequence[str], bits: int = BITS) -> None:
    rows = ngram_rows(texts, bits)
    assert rows.n_rows == len(texts)
    for index, text in enumerate(texts):
        assert row(rows, index) == pytest.approx(values_of(text, bits), rel=1e-5), (index, text[:40])


# ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.sampled_from([1, 4, 12, BITS, 20]))
@example(["", "a", " ", "\ud800", "😀😀"], BITS)
@example(["ǅ İİ", "a b a b", "x" * 100], 3)
def test_ngrams_are_those_of_a_slow_count(texts: list[str], bits: int) -> None:
    assert_counted(texts, bits)


@pytest.mark.parametrize("around", [0, CHUNK, 2 * CHUNK])
def test_the_parts_that_a_long_text_is_hashed_in_do_not_show(around: int) -> None:
    random = np.random.default_rng(around)
    letters = list("abcdefgh ñ😀")
    sizes = [n for n in range(around - 6, around + 4) if n >= 0]
    assert_counted(["".join(random.choice(letters, n)) for n in sizes])


def test_every_row_has_length_1() -> None:
    rows = ngram_rows(["", "a", "hello hello hello", "x" * 5000, "😀 \ud83d"], BITS)
    squares = np.add.reduceat(np.square(rows.values), rows.starts[:-1])
    assert squares == pytest.approx(np.ones(5), abs=1e-5)


def test_case_is_folded_and_words_are_told_from_letters() -> None:
    lower, upper, apart = (row(ngram_rows([text], BITS), 0) for text in ("Bad Dog", "bAD dOG", "dog bad"))
    assert lower == upper
    assert lower != apart


def test_no_texts() -> None:
    rows = ngram_rows([], BITS)
    assert (rows.n_rows, rows.starts.tolist(), len(rows.buckets)) == (0, [0], 0)
    assert scores(rows, np.ones((2, 2**BITS), np.float32), np.zeros(2, np.float32)).shape == (0, 2)


# ── rows and scores ─────────────────────────────────────────────────────────────────────────────────────────────────


def sparse(rows: Sequence[dict[int, float]]) -> Sparse:
    starts = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    buckets = np.array([b for r in rows for b in r], np.int32)
    return Sparse(buckets, np.array([v for r in rows for v in r.values()], np.float32), starts)


def dense(rows: Sparse, n_buckets: int) -> NDArray[np.float64]:
    out = np.zeros((rows.n_rows, n_buckets))
    for index in range(rows.n_rows):
        for bucket, value in row(rows, index).items():
            out[index, bucket] = value
    return out


N_BUCKETS = 8
ROWS = st.lists(st.dictionaries(st.integers(0, N_BUCKETS - 1), st.floats(-3, 3, width=32), max_size=4), max_size=6)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 2**32 - 1))
@example([{0: 1.0, 1: 2.0, 2: 4.0}, {}], 0)
@example([{}, {0: 1.0, 1: 2.0}, {}, {}, {3: 1.0}], 0)
@example([{}, {}], 0)
def test_scores_are_those_of_the_dense_product(entries: list[dict[int, float]], seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((3, N_BUCKETS)).astype(np.float32)
    bias: Floats = random.standard_normal(3).astype(np.float32)
    rows = sparse(entries)
    found = scores(rows, weights, bias)
    assert found.dtype == np.float32
    assert found == pytest.approx(dense(rows, N_BUCKETS) @ weights.T + bias, abs=1e-4)


def test_weights_of_8_bits_score_as_their_values() -> None:
    weights = np.random.default_rng(0).integers(-127, 128, (2, 2**BITS)).astype(np.int8)
    rows = ngram_rows(["one text", "", "another one 😀"], BITS)
    expected = dense(rows, 2**BITS) @ weights.T.astype(np.float64)
    assert scores(rows, weights, np.zeros(1, np.float32)) == pytest.approx(expected, rel=1e-4, abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.data())
def test_rows_are_chosen_in_the_order_asked_for(entries: list[dict[int, float]], data: st.DataObject) -> None:
    some = st.lists(st.integers(0, len(entries) - 1), max_size=8) if entries else st.just([])
    wanted = data.draw(some)
    chosen = sparse(entries).rows(np.array(wanted, np.int64))
    assert chosen.n_rows == len(wanted)
    assert [row(chosen, i) for i in range(len(wanted))] == [row(sparse([entries[i]]), 0) for i in wanted]
