"""Forms of answers, and which answers mean the same, in whatever order they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.semantic import ByForm, ByMeaning, Grouping, embedding_similarity, form
from edge_runtime.semantic.forms import beyond, contradict
from edge_runtime.semantic.grouping import average_linkage
from edge_runtime.types import Floats

WORDS = ["", "Paris", "paris.", "the Paris", "Lyon", "yes", "No", "12", "twelve", "13", "東京", "Rome", "Roma", "a"]
ANGLES = {"paris": 0.0, "lyon": 0.5, "rome": 1.5, "roma": 1.6, "東京": 3.0, "yes": 0.2, "no": 0.25}


def encode(texts: list[str]) -> Floats:
    """Directions in a plane: near angles are near meanings."""
    angles = np.array([ANGLES.get(form(text), float(len(text))) for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


BY_MEANING = ByMeaning(embedding_similarity(encode), 0.8)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Twenty-One!", "21"),
        ("one hundred and five", "105"),
        ("two thousand one hundred", "2100"),
        ("a million", "1000000"),
        ("5 million", "5000000"),
        ("three hundred thousand", "300000"),
        ("two million five thousand and one", "2005001"),
        ("twenty twenty", "20 20"),
        ("salt and pepper", "salt and pepper"),
        ("two and two", "2 and 2"),
        ("1,000.50", "1000.5"),
        ("3.0", "3"),
        ("100", "100"),
        (".5", "0.5"),
        ("−5", "-5"),
        ("1990-1995", "1990 1995"),
        ("5 %", "5"),
        ("5%", "5%"),
        ("1/2", "1/2"),
        ("U.S.A.", "usa"),
        ("Don’t", "dont"),
        ("Vitamin A", "vitamin a"),
        ("A", "a"),
        ("  An   apple\n", "apple"),
        ("東京。", "東京"),
        ("Ｔｏｋｙｏ", "tokyo"),
        ("٣", "3"),
        ("हिन्दी", "हिन्दी"),
        ("Straße", "strasse"),
        ("🙂", "🙂"),
        ("...", ""),
        ("", ""),
    ],
)
def test_the_form_of_an_answer(answer: str, expected: str) -> None:
    assert form(answer) == expected


@given(st.lists(st.sampled_from([*WORDS, "and", "hundred", "thousand", "5", "-", ".", ",", "%", "/"]), max_size=6))
def test_a_form_is_its_own_form(words: list[str]) -> None:
    once = form(" ".join(words))
    assert form(once) == once


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("yes", "no", True),
        ("yes it is", "no it is not", True),
        ("yes", "yes it is", False),
        ("12", "13", True),
        ("1969", "20 july 1969", False),
        ("in 1969", "sixties", False),
        ("paris", "lyon", False),
    ],
)
def test_what_cannot_mean_the_same(a: str, b: str, expected: bool) -> None:
    assert contradict(a, b) == contradict(b, a) == expected


def test_by_form() -> None:
    assert ByForm().groups(["Paris", "Lyon", "paris!", "", "The Paris", "…"]) == [[0, 2, 4], [3, 5], [1]]
    assert ByForm().groups([]) == []


def test_by_meaning() -> None:
    assert BY_MEANING.groups(["Rome", "Paris", "Roma", "東京", "Lyon"]) == [[0, 2], [1, 4], [3]]
    assert BY_MEANING.groups(["yes", "no", "Yes!"]) == [[0, 2], [1]]  # near, and contradicting
    assert BY_MEANING.groups(["12", "13", "twelve"]) == [[0, 2], [1]]
    assert BY_MEANING.groups(["Paris"]) == [[0]]
    assert BY_MEANING.groups([]) == []


def words_in_common(texts: list[str]) -> Floats:
    """A direction for each word."""
    words = sorted({word for text in texts for word in text.split()})
    rows = np.array([[word in text.split() for word in words] for text in texts], np.float32)
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def test_what_answers_repeat_of_the_question_does_not_make_them_alike() -> None:
    question = "What is the capital of France?"
    answers = ["The capital of France is Paris.", "The capital of France is Rome.", "The capital of France: Rome!"]
    assert ByMeaning(embedding_similarity(words_in_common), 0.7).groups(answers) == [[0, 1, 2]]
    assert ByMeaning(embedding_similarity(words_in_common, question), 0.7).groups(answers) == [[1, 2], [0]]
    assert embedding_similarity(words_in_common, question)(["Rome"]) == pytest.approx(np.ones((1, 1)))


@pytest.mark.parametrize(
    ("question", "a", "b", "expected"),
    [
        ("capital of france", "capital of france is paris", "capital of france is rome", ("is paris", "is rome")),
        ("capital of france", "capital of france is paris", "rome", ("capital of france is paris", "rome")),
        ("is it red or blue", "it is red", "it is blue", ("red", "blue")),
        ("paris or rome", "paris", "paris in france", ("paris", "paris in france")),
        ("", "paris", "rome", ("paris", "rome")),
    ],
)
def test_what_answers_say_beyond_the_question(question: str, a: str, b: str, expected: tuple[str, str]) -> None:
    assert beyond(question, a, b) == expected
    assert beyond(question, b, a) == expected[::-1]


def test_an_empty_answer_means_nothing_else() -> None:
    together = ByMeaning(lambda texts: np.ones((len(texts), len(texts)), np.float32), 0.5)
    assert together.groups(["", "Paris", "Lyon", "?"]) == [[0, 3], [1, 2]]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_answers_makes_no_difference(answers: list[str], random: object) -> None:
    order = list(range(len(answers)))
    random.shuffle(order)  # type: ignore[attr-defined]
    groupings: list[Grouping] = [ByForm(), BY_MEANING]
    for grouping in groupings:
        found = {frozenset(group) for group in grouping.groups(answers)}
        shuffled = grouping.groups([answers[i] for i in order])
        assert {frozenset(order[i] for i in group) for group in shuffled} == found
        assert sorted(i for group in found for i in group) == list(range(len(answers)))


def test_average_linkage_joins_by_the_mean_and_not_by_a_chain() -> None:
    # 0–1 are near, 1–2 are, 0–2 are not: joined with 1, item 0 is too far from 2 on average
    near = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.85], [0.1, 0.85, 1.0]])
    assert average_linkage(near, np.ones(3), 0.6) == [[0, 1], [2]]
    # (3·0.85 + 0.1) ÷ 4 = 0.6625: an answer given three times weighs three times
    assert average_linkage(near, np.array([1.0, 3.0, 1.0]), 0.6) == [[0, 1, 2]]


def test_average_linkage_keeps_apart_what_must_be() -> None:
    near = np.array([[1.0, 1.0, -np.inf], [1.0, 1.0, 1.0], [-np.inf, 1.0, 1.0]])
    assert average_linkage(near, np.ones(3), 0.0) == [[0, 1], [2]]
