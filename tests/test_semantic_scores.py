"""Entropies against values by hand, and the rule that stops early against all that could still be drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from edge_runtime.semantic import (
    ByForm,
    ByMeaning,
    ConfidenceSettings,
    Grouping,
    Sample,
    SampleSettings,
    Stopped,
    estimate,
)
from edge_runtime.semantic.confidence import reason_to_stop, score_of
from edge_runtime.semantic.scores import entropy, entropy_bounds, entropy_of_shares, likelihood_shares, normalised


class Script:
    """Answers from a list; each of two tokens, as likely as is said."""

    def __init__(self, answers: Sequence[str], log_likelihoods: Sequence[float] | None = None) -> None:
        self.answers = answers
        self.log_likelihoods = log_likelihoods or [-1.0] * len(answers)
        self.rows = 0
        self.drawn: list[list[int]] = []

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        self.drawn.append(list(numbers))
        self.rows += 2 * len(numbers)
        return [Sample(self.answers[i], (1, 2), (self.log_likelihoods[i],) * 2, 0.5, True) for i in numbers]


def partitions(n: int, most: int | None = None) -> Iterator[list[int]]:
    """Sizes of the groups that n answers can form."""
    if n == 0:
        yield []
    for first in range(min(n, most or n), 0, -1):
        yield from ([first, *rest] for rest in partitions(n - first, first))


# ── entropies ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], 0.0),
        ([1], 0.0),
        ([8], 0.0),
        ([1, 1], math.log(2)),
        ([4, 4], math.log(2)),
        ([1] * 8, math.log(8)),
        ([3, 1], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ([5, 2, 1], 0.625 * math.log(1.6) + 0.25 * math.log(4) + 0.125 * math.log(8)),
    ],
)
def test_discrete_semantic_entropy(sizes: list[int], expected: float) -> None:
    assert entropy(sizes) == pytest.approx(expected, abs=1e-12)


def test_equal_entropies_are_equal() -> None:
    assert entropy([4, 1, 1, 1, 1]) == entropy([2, 2, 2, 2])  # 4·log 4 = 4·2·log 2


def test_likelihoods_weigh_the_clusters() -> None:
    shares = likelihood_shares([[math.log(0.5), math.log(0.3)], [math.log(0.2)]])
    assert shares == pytest.approx([0.8, 0.2])
    assert entropy_of_shares(shares) == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert entropy_of_shares(likelihood_shares([[-1.0], [-1.0], [-1.0]])) == pytest.approx(math.log(3))
    assert likelihood_shares([[-2000.0], [-2000.0 + math.log(3)]]) == pytest.approx([0.25, 0.75])
    assert likelihood_shares([[0.0], [-5000.0]]) == [1.0, 0.0]
    assert entropy_of_shares([1.0, 0.0]) == 0.0


def test_normalised_by_what_so_many_samples_can_have() -> None:
    assert normalised(entropy([1] * 5), 5) == 1.0
    assert normalised(entropy([2, 2]), 4) == pytest.approx(0.5)
    assert normalised(0.0, 1) == 0.0


# ── the exact rule ──────────────────────────────────────────────────────────────────────────────────────────────────


def completions(sizes: Sequence[int], n_left: int) -> Iterator[list[int]]:
    """Sizes after each further sample joined some group or made a new one."""
    if n_left == 0:
        yield list(sizes)
        return
    for i in range(len(sizes)):
        yield from completions([*sizes[:i], sizes[i] + 1, *sizes[i + 1 :]], n_left - 1)
    yield from completions([*sizes, 1], n_left - 1)


@pytest.mark.parametrize("n", range(7))
@pytest.mark.parametrize("n_left", range(5))
def test_bounds_are_the_least_and_the_most_of_all_that_can_come(n: int, n_left: int) -> None:
    for sizes in partitions(n):
        reached = [entropy(final) for final in completions(sizes, n_left)]
        assert entropy_bounds(sizes, n_left, fixed=True) == (min(reached), max(reached))
        least, most = entropy_bounds(sizes, n_left, fixed=False)
        assert most == max(reached)
        assert least == (0.0 if n_left else entropy(sizes))


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1 / 3, 0.5, 0.6, 2 / 3, 0.9, 1.0])
def test_it_stops_exactly_when_the_verdict_is_certain(threshold: float) -> None:
    settings = ConfidenceSettings(samples=6, step=1, agree=0, threshold=threshold)
    grouping = ByForm()
    for n in range(1, 6):
        for drawn in product("abcd", repeat=n):
            groups = grouping.groups(drawn)
            stopped = reason_to_stop(drawn, groups, settings, fixed=True)
            finals = completions([len(group) for group in groups], 6 - n)
            verdicts = {score_of(entropy(final), 6) >= threshold for final in finals}
            assert (stopped is Stopped.SETTLED) == (len(verdicts) == 1)
            if stopped:
                now = score_of(entropy([len(group) for group in groups]), 6) >= threshold
                assert {now} == verdicts


def near_by_letter(texts: list[str]) -> np.ndarray:
    """Similar as the alphabet has it, so that groups change as answers come."""
    places = np.array([ord(text) for text in texts])
    return 1 - 0.25 * np.abs(places[:, None] - places[None]).astype(np.float32)


@given(
    st.lists(st.sampled_from("bcdefg"), min_size=6, max_size=6),
    st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]),
    st.integers(1, 5),
    st.sampled_from([ByForm(), ByMeaning(near_by_letter, 0.7)]),
)
def test_stopping_never_changes_the_verdict(
    answers: list[str], threshold: float, step: int, grouping: Grouping
) -> None:
    early = ConfidenceSettings(samples=6, step=step, agree=0, threshold=threshold)
    whole = ConfidenceSettings(samples=6, step=6, agree=0)
    found = estimate(Script(answers), [1], early, grouping)
    assert found.sure(threshold) == estimate(Script(answers), [1], whole, grouping).sure(threshold)


# ── confidences ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_confidence_by_hand() -> None:
    source = Script(["Paris", "Lyon", "paris.", "", "The Paris", "Lyon"], [-2.0, -1.0, -0.5, -3.0, -1.0, -1.5])
    ticks = iter([1.0, 1.25])
    found = estimate(source, [7, 8, 9], ConfidenceSettings(samples=6, step=4), clock=lambda: next(ticks))
    assert [cluster.members for cluster in found.clusters] == [(0, 2, 4), (1, 5), (3,)]
    assert [cluster.answer for cluster in found.clusters] == ["paris.", "Lyon", ""]
    assert [cluster.share for cluster in found.clusters] == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    weights = [math.exp(-2) + math.exp(-0.5) + math.exp(-1), math.exp(-1) + math.exp(-1.5), math.exp(-3)]
    shares = [weight / sum(weights) for weight in weights]
    assert [cluster.likelihood for cluster in found.clusters] == pytest.approx(shares)
    by_hand = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    assert found.entropy == pytest.approx(by_hand)
    assert found.score == pytest.approx(1 - by_hand / math.log(6))
    assert found.normalised_entropy == pytest.approx(by_hand / math.log(6))
    assert found.likelihood_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert found.normalised_likelihood_entropy == pytest.approx(found.likelihood_entropy / math.log(6))
    assert found.consistency == 0.5
    assert found.answer == "paris."
    assert found.stopped is Stopped.ALL
    cost = found.cost
    assert (cost.prompt_tokens, cost.generated_tokens, cost.rows, cost.ms) == (3, 12, 12, 250.0)
    assert source.drawn == [[0, 1, 2, 3], [4, 5]]


def test_equal_answers_end_it() -> None:
    source = Script(["Paris", "paris", "PARIS", "the Paris", "Lyon", "Lyon", "Lyon", "Lyon"])
    found = estimate(source, [1], ConfidenceSettings(step=4))
    assert found.stopped is Stopped.AGREED
    assert (found.score, found.entropy, found.consistency, len(found.samples), found.planned) == (1.0, 0, 1.0, 4, 8)
    assert source.drawn == [[0, 1, 2, 3]]
    whole = estimate(source, [1], ConfidenceSettings(agree=0))
    assert whole.stopped is Stopped.ALL
    assert whole.entropy == pytest.approx(math.log(2))


def test_fewer_equal_answers_than_asked_for_do_not_end_it() -> None:
    found = estimate(Script(["a b"] * 8), [1], ConfidenceSettings(step=2, agree=5))
    assert len(found.samples) == 6


def test_one_sample_and_empty_answers() -> None:
    one = estimate(Script(["Paris"]), [1], ConfidenceSettings(samples=1))
    assert (one.score, one.entropy, one.consistency, one.stopped) == (1.0, 0.0, 1.0, Stopped.ALL)
    empty = estimate(Script([""] * 8), [1])
    assert (empty.answer, empty.score) == ("", 1.0)


def test_answers_in_other_scripts() -> None:
    found = estimate(Script(["東京", "東京。", "大阪", "京都"]), [1], ConfidenceSettings(samples=4))
    assert [cluster.members for cluster in found.clusters] == [(0, 1), (2,), (3,)]
    assert found.answer == "東京"


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"step": 0}, {"agree": -1}, {"threshold": 1.1}, {"threshold": math.nan}],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ConfidenceSettings(**wrong)  # type: ignore[arg-type]
