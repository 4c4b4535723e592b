"""The samplers do what their settings say, and a draft is drawn with the random number of the token it guesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.sampling import Sampler, is_close_second
from edge_runtime.types import Floats, SamplingSettings

N_VOCAB = 8
FLAT = np.zeros(N_VOCAB, np.float32)
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture
def opened() -> Iterator[list[Sampler]]:
    samplers: list[Sampler] = []
    yield samplers
    for sampler in samplers:
        sampler.close()


def logits_of(probabilities: Sequence[float]) -> Floats:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def frequencies(settings: SamplingSettings, logits: Floats, n: int = 4000) -> list[float]:
    sampler = Sampler(settings, N_VOCAB)
    counts = Counter(sampler.sample(logits) for _ in range(n))
    sampler.close()
    return [counts[t] / n for t in range(len(logits))]


PEAKED = [0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005]


# ── greedy ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("penalty", [1.0, 1.0001])
def test_greedy_is_the_first_of_the_largest(opened: list[Sampler], penalty: float) -> None:
    """With and without the short cut past llama.cpp that greedy without a penalty takes."""
    sampler = Sampler(SamplingSettings(repeat_penalty=penalty), N_VOCAB)
    opened.append(sampler)
    random = np.random.default_rng(0)
    for _ in range(200):
        logits = random.integers(-2, 3, N_VOCAB).astype(np.float32)  # many ties
        assert sampler.sample(logits) == int(logits.argmax())
    assert sampler.sample(FLAT) == 0


def test_greedy_ignores_every_other_setting(opened: list[Sampler]) -> None:
    sampler = Sampler(SamplingSettings(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, seed=5), N_VOCAB)
    opened.append(sampler)
    assert [sampler.sample(logits_of(PEAKED[::-1])) for _ in range(5)] == [7] * 5


def test_a_shortlist_gives_ids_of_the_vocabulary(opened: list[Sampler]) -> None:
    ids = np.array([6, 2, 5], np.int32)
    for settings in (SamplingSettings(), SamplingSettings(repeat_penalty=1.0001), SamplingSettings(temperature=1e-3)):
        sampler = Sampler(settings, N_VOCAB)
        opened.append(sampler)
        assert sampler.sample(np.array([0.0, 3.0, 1.0], np.float32), ids) == 2
        assert sampler.draft(np.array([4.0, 3.0, 1.0], np.float32), ids) == 6
        assert sampler.sample(logits_of(PEAKED)) == 0  # and the whole vocabulary again


# ── every setting acts ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(temperature: float) -> None:
    found = frequencies(SamplingSettings(temperature=temperature, seed=3, **OFF), logits_of(PEAKED))
    expected = np.array(PEAKED) ** (1 / temperature)
    expected /= expected.sum()
    assert found == pytest.approx(expected.tolist(), abs=0.03)  # about four standard deviations


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({**OFF, "top_k": 3}, 3),
        ({**OFF, "top_p": 0.6}, 2),
        ({**OFF, "min_p": 0.3}, 3),
        ({**OFF, "top_k": 1}, 1),
        ({**OFF, "top_p": 1e-6}, 1),
        ({**OFF, "min_p": 1.0}, 1),
        (OFF, 7),
    ],
    ids=str,
)
def test_filters_keep_the_likeliest(settings: dict[str, Any], kept: int) -> None:
    found = frequencies(SamplingSettings(temperature=1.0, seed=1, **settings), logits_of(PEAKED))
    expected = [p / sum(PEAKED[:kept]) for p in PEAKED[:kept]]
    assert found[:kept] == pytest.approx(expected, abs=0.03)
    if kept < 7:
        assert sum(found[kept:]) == 0
    else:
        assert all(found)


def test_a_penalty_makes_what_was_published_less_likely(opened: list[Sampler]) -> None:
    sampler = Sampler(SamplingSettings(repeat_penalty=2.0, repeat_last_n=2), N_VOCAB)
    opened.append(sampler)
    logits = np.array([4.0, 3.0, 1.0, -5.0, -5.0, -5.0, -5.0, -5.0], np.float32)
    seen = []
    for _ in range(5):
        seen.append(sampler.sample(logits))
        sampler.accept(seen[-1])
    # 4/2 < 3, 3/2 < 4/2 twice, and then the window has forgotten the 1
    assert seen == [0, 1, 0, 0, 1]
    sampler.accept(7)
    sampler.accept(7)
    assert sampler.sample(logits) == 0
    assert logits[0] == 4.0


def test_a_window_of_none_is_no_penalty(opened: list[Sampler]) -> None:
    sampler = Sampler(SamplingSettings(repeat_penalty=100.0, repeat_last_n=0), N_VOCAB)
    opened.append(sampler)
    sampler.accept(0)
    assert sampler.sample(logits_of(PEAKED)) == 0


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(sampler: Sampler, n: int = 40, logits: Floats = FLAT) -> list[int]:
    tokens = []
    for _ in range(n):
        tokens.append(sampler.sample(logits))
        sampler.accept(tokens[-1])
    return tokens


def test_the_same_seed_gives_the_same_tokens(opened: list[Sampler]) -> None:
    settings = [SamplingSettings(temperature=1.0, seed=s, repeat_penalty=1.2, **OFF) for s in (7, 7, 8)]
    opened += [Sampler(s, N_VOCAB) for s in settings]
    first, second, other = (draw(s) for s in opened)
    assert first == second != other
    opened[0].reset()
    assert draw(opened[0]) == first


@pytest.mark.parametrize("seed", [0, 2**32 - 2])
def test_no_seed_is_a_random_one(opened: list[Sampler], seed: int) -> None:
    opened += [Sampler(SamplingSettings(temperature=1.0, seed=seed, **OFF), N_VOCAB) for _ in range(2)]
    assert draw(opened[0]) == draw(opened[1])


# ── drafts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

DRAFTING = [
    SamplingSettings(),
    SamplingSettings(repeat_penalty=1.5),
    SamplingSettings(temperature=1.0, seed=4, **OFF),
    SamplingSettings(temperature=0.8, seed=4, repeat_penalty=1.3, repeat_last_n=4),
]


@pytest.mark.parametrize("settings", DRAFTING, ids=str)
def test_with_equal_logits_every_draft_is_what_will_be_sampled(
    opened: list[Sampler], settings: SamplingSettings
) -> None:
    sampler = Sampler(settings, N_VOCAB)
    opened.append(sampler)
    random = np.random.default_rng(1)
    published: list[int] = []
    for n_drafts in [1, 3, 0, 5, 2, 8] * 4:
        rows = random.standard_normal((n_drafts + 1, N_VOCAB)).astype(np.float32)
        sampler.begin_draft()
        drafts = [sampler.draft(row) for row in rows[:-1]]
        for i, row in enumerate(rows):
            published.append(sampler.sample(row))
            sampler.accept(published[-1])
            if i < n_drafts:
                assert drafts[i] == published[-1]
    assert len(set(published)) > 3


@pytest.mark.parametrize("settings", DRAFTING, ids=str)
def test_drafts_leave_no_trace(opened: list[Sampler], settings: SamplingSettings) -> None:
    drafting, plain = Sampler(settings, N_VOCAB), Sampler(settings, N_VOCAB)
    opened += [drafting, plain]
    random = np.random.default_rng(2)
    for _ in range(60):
        row, others = random.standard_normal(N_VOCAB).astype(np.float32), random.standard_normal((3, N_VOCAB))
        drafting.begin_draft()
        for other in others.astype(np.float32):
            drafting.draft(other)
        token = drafting.sample(row)
        assert token == plain.sample(row)
        for sampler in (drafting, plain):
            sampler.accept(token)


def test_a_draft_counts_for_the_next_draft(opened: list[Sampler]) -> None:
    sampler = Sampler(SamplingSettings(repeat_penalty=2.0), N_VOCAB)
    opened.append(sampler)
    logits = np.array([4.0, 3.0, 2.9, 0, 0, 0, 0, 0], np.float32)
    sampler.begin_draft()
    assert [sampler.draft(logits) for _ in range(3)] == [0, 1, 2]
    sampler.begin_draft()
    assert sampler.draft(logits) == 0


def test_after_a_reset_drafts_begin_anew(opened: list[Sampler]) -> None:
    sampler = Sampler(SamplingSettings(temperature=1.0, seed=9, **OFF), N_VOCAB)
    opened.append(sampler)
    sampler.begin_draft()
    first = [sampler.draft(FLAT) for _ in range(10)]
    draw(sampler, 5)
    sampler.reset()
    sampler.begin_draft()
    assert [sampler.draft(FLAT) for _ in range(10)] == first


def test_logits_are_only_read(opened: list[Sampler]) -> None:
    logits = logits_of(PEAKED)
    logits.flags.writeable = False
    for settings in DRAFTING:
        sampler = Sampler(settings, N_VOCAB)
        opened.append(sampler)
        sampler.accept(0)
        sampler.begin_draft()
        sampler.sample(logits)
        sampler.draft(logits)
    assert np.array_equal(logits, logits_of(PEAKED))


# ── how close a second choice is ────────────────────────────────────────────────────────────────────────────────────


def ratio_by_softmax(logits: Floats, token: int) -> float:
    shares = np.exp(logits.astype(float) - logits.max())
    return float(shares[token] / shares.max())


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12),
    st.integers(0, 11),
    st.floats(0.01, 1),
    st.sampled_from([-1000.0, 0.0, 1000.0]),
)
def test_the_second_choice_and_no_other_and_whatever_is_added_to_all(
    tenths: list[int], token: int, theta: float, shift: float
) -> None:
    logits = np.array(tenths, np.float32) / 8 + np.float32(shift)  # eighths, so that the sum is exact
    token %= len(tenths)
    likelier = sum(v > tenths[token] for v in tenths)
    first = int(logits.argmax()) == token
    expected = not first and likelier <= 1 and ratio_by_softmax(logits, token) > theta
    assert is_close_second(logits, token, theta) is expected


def test_a_tie_is_close_unless_theta_is_one() -> None:
    tie = np.array([1, 5, 5, 2], np.float32)
    assert [is_close_second(tie, token, 0.999) for token in range(4)] == [False, False, True, False]
    assert not any(is_close_second(tie, token, 1.0) for token in range(4))


def test_what_cannot_be_is_not_close() -> None:
    assert not is_close_second(np.array([0, -np.inf], np.float32), 1, 0.01)
    assert not is_close_second(np.full(3, -np.inf, np.float32), 1, 0.01)
    assert not is_close_second(np.array([1, np.nan, 1], np.float32), 2, 0.01)
