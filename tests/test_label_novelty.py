"""What is unlike the training messages is told from what is like them, whatever its length."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.labels.novelty import StateNovelty, fit_state_novelty, fit_word_novelty, word_places
from edge_runtime.types import Floats


def messages(n: int, n_embd: int = 48, seed: int = 0, topics: float = 0.4) -> tuple[Floats, np.ndarray]:
    """Means over 1 to 60 tokens of states with a few wide and many narrow directions, and the numbers of tokens.

    Tokens of a message differ, and messages differ in what their tokens have in common, `topics` as much.
    """
    random = np.random.default_rng(seed)
    n_tokens = random.integers(1, 61, n)
    spread = np.concatenate([np.linspace(20, 4, 8), np.full(n_embd - 8, 0.5)])
    basis, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((n_embd, n_embd)))
    topic = random.standard_normal((n, n_embd)) * spread * topics
    noise = random.standard_normal((n, n_embd)) * spread / np.sqrt(n_tokens)[:, None]
    return ((topic + noise) @ basis + 7).astype(np.float32), n_tokens


def without_new_words(n_tokens: np.ndarray) -> Floats:
    return np.zeros(len(n_tokens), np.float32)


def fit(pooled: Floats, n_tokens: np.ndarray) -> StateNovelty:
    return fit_state_novelty(pooled, n_tokens, without_new_words(n_tokens))


def scores(novelty: StateNovelty, pooled: Floats, n_tokens: np.ndarray) -> Floats:
    return novelty.scores(pooled, n_tokens, without_new_words(n_tokens))


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_percent_of_the_training_messages_score_above_1() -> None:
    pooled, n_tokens = messages(3000)
    novelty = fit(pooled, n_tokens)
    assert (scores(novelty, pooled, n_tokens) > 1).mean() == pytest.approx(0.01, abs=0.002)


def test_other_messages_of_the_same_kind_are_as_familiar() -> None:
    novelty = fit(*messages(3000))
    assert (scores(novelty, *messages(3000, seed=1)) > 1).mean() < 0.025


@pytest.mark.parametrize("direction", ["along a wide one", "along a narrow one", "everywhere"])
def test_far_points_score_above_1(direction: str) -> None:
    pooled, n_tokens = messages(2000)
    novelty = fit(pooled, n_tokens)
    step = {
        "along a wide one": 120 * novelty.basis[0],
        "along a narrow one": 15 * np.linalg.svd(novelty.basis)[2][-1],
        "everywhere": np.full(48, 6.0),
    }[direction]
    far = (pooled + step).astype(np.float32)
    assert (scores(novelty, far, n_tokens) > 1).mean() > 0.99


def test_the_further_the_more_novel() -> None:
    pooled, n_tokens = messages(1000)
    novelty = fit(pooled, n_tokens)
    points = (pooled.mean(axis=0) + np.arange(1, 6)[:, None] * 5 * np.ones(48)).astype(np.float32)
    found = scores(novelty, points, np.full(5, 10))
    assert (np.diff(found) > 0).all()
    # distances grow in proportion, novelty in standard deviations of their logarithm
    assert np.log(found[4] / found[0]) == pytest.approx(np.log(5) / novelty.distance_scale, rel=0.01)


def test_short_and_long_messages_are_equally_often_novel() -> None:
    novelty = fit(*messages(6000, topics=0))
    pooled, n_tokens = messages(6000, seed=1, topics=0)
    above = scores(novelty, pooled, n_tokens) > 1
    assert novelty.length_slope == pytest.approx(-0.5, abs=0.02)  # a mean of n varies as the root of 1 / n
    assert above[n_tokens <= 5].mean() < 0.03
    assert above[n_tokens >= 40].mean() < 0.03
    # a distance that is ordinary in a short message is not in a long one
    one = pooled[:1]
    assert scores(novelty, one, np.array([60]))[0] > scores(novelty, one, np.array([2]))[0]


def test_messages_of_one_length_are_judged_by_distance_alone() -> None:
    pooled, _ = messages(500)
    novelty = fit(pooled, np.full(500, 12))
    assert novelty.length_slope == 0
    assert (scores(novelty, pooled, np.full(500, 12)) > 1).mean() == pytest.approx(0.01, abs=0.003)
    assert scores(novelty, pooled[:9], np.full(9, 3)).tolist() == scores(novelty, pooled[:9], np.full(9, 50)).tolist()


def test_distances_by_hand() -> None:
    novelty = StateNovelty(
        mean=np.float32([1, 1, 1]),
        basis=np.float32([[1, 0, 0]]),
        variances=np.float32([4, 9]),
        length_slope=-0.5,
        distance_scale=1.0,
        words_scale=0.2,
        offset=float(np.log(2)),
    )
    # 6 along the component of variance 4, (6, 3) left over at variance 9 per dimension: 9 + 5 = 14
    found = scores(novelty, np.float32([[7, 7, 4]]), np.array([16]))
    by_states = np.sqrt(36 / 4 + 45 / 9) / (2 * 16**-0.5)
    assert found[0] == pytest.approx(by_states, rel=1e-5)
    # two standard deviations more of new words count as one of distance
    with_words = novelty.scores(np.float32([[7, 7, 4]]), np.array([16]), np.float32([0.4]))
    assert with_words[0] == pytest.approx(by_states * np.e, rel=1e-5)


def test_new_words_make_a_message_more_novel() -> None:
    pooled, n_tokens = messages(3000)
    shares = np.random.default_rng(3).choice(np.float32([0, 0, 0, 0.1, 0.2]), 3000)
    novelty = fit_state_novelty(pooled, n_tokens, shares)
    assert (novelty.scores(pooled, n_tokens, shares) > 1).mean() == pytest.approx(0.01, abs=0.002)
    many = np.ones(3000, np.float32)
    assert (novelty.scores(pooled, n_tokens, many) > 1).mean() > 0.9


@pytest.mark.parametrize(("n", "n_embd"), [(1, 8), (2, 8), (5, 64), (300, 2)])
def test_few_messages_and_few_dimensions_give_finite_scores(n: int, n_embd: int) -> None:
    random = np.random.default_rng(0)
    pooled, n_tokens = random.standard_normal((n, n_embd)).astype(np.float32), random.integers(1, 9, n)
    novelty = fit(pooled, n_tokens)
    assert len(novelty.variances) == len(novelty.basis) + 1
    assert novelty.basis @ novelty.basis.T == pytest.approx(np.eye(len(novelty.basis)), abs=1e-5)
    assert np.isfinite(scores(novelty, np.vstack([pooled, pooled + 100]), np.append(n_tokens, n_tokens))).all()
    assert scores(novelty, pooled[:1] + 100, n_tokens[:1])[0] > 1


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────

VOCABULARY = [f"word{i}" for i in range(200)]


def training_texts(n: int = 1000) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(VOCABULARY, random.integers(3, 12))) for _ in range(n)]


def test_known_words_are_known_and_new_ones_new() -> None:
    words, _ = fit_word_novelty(training_texts())
    texts = ["word3 word7", "WORD3, word7!", "word3 qqq", "qqq zzz yyy xxx", "", "?! 😀", "word3 \ud800"]
    assert words.new_shares(texts) == pytest.approx([0, 0, 0.5, 1, 0, 0, 0], abs=1e-6)
    assert words.unfamiliar(words.new_shares(texts)).tolist() == [False, False, True, True, False, False, False]


def test_no_training_message_has_a_new_word() -> None:
    texts = [*training_texts(50), "once only", "naïve 日本 9"]
    assert fit_word_novelty(texts)[0].new_shares(texts).tolist() == [0.0] * len(texts)


def test_the_limit_is_what_training_messages_have_of_words_of_their_own() -> None:
    """Of 100 messages, two have half their words to themselves, and all others none."""
    texts = ["a b", "c d"] * 49 + ["a own1", "c own2"]
    words, _ = fit_word_novelty(texts)
    assert words.limit == pytest.approx(0.5)
    assert words.unfamiliar(words.new_shares(["a new", "a new newer", "b d"])).tolist() == [False, True, False]


def test_where_every_message_has_words_of_its_own_none_is_unfamiliar() -> None:
    words, _ = fit_word_novelty([f"only{i}" for i in range(100)])
    assert not words.unfamiliar(words.new_shares(["something else altogether"])).any()


def test_without_messages_every_word_is_new() -> None:
    words, _ = fit_word_novelty(["", "!"])
    assert words.limit == 0
    assert words.unfamiliar(words.new_shares(["hello", "..."])).tolist() == [True, False]


@pytest.mark.parametrize("bits", [3, 10, 18])
def test_the_table_has_the_bits_of_the_words_and_no_others(bits: int) -> None:
    words, _ = fit_word_novelty(["one two three", "two"], bits)
    assert len(words.table) == 2**bits // 8
    expected = set(word_places("one two three", 2**bits).tolist())
    assert set(np.flatnonzero(np.unpackbits(words.table, bitorder="little")).tolist()) == expected
