"""The question set is whole and unambiguous, and the matcher tells right answers from wrong ones."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from edge_runtime.bench.questions import BenchQuestion, Kind, is_right, questions, result_of, yes_or_no

QUESTIONS = questions()
OPERATORS = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}


def asked(kind: Kind, *accepted: str) -> BenchQuestion:
    return BenchQuestion(kind, "?", accepted)


def test_there_are_as_many_of_each_kind_as_planned_and_none_twice() -> None:
    counts = Counter(question.kind for question in QUESTIONS)
    assert [counts[kind] for kind in Kind] == [90, 60, 60, 50, 40]
    assert len({question.text for question in QUESTIONS}) == 300


def test_every_accepted_answer_is_right_and_no_refusal_is() -> None:
    for question in QUESTIONS:
        assert question.accepted or question.kind is Kind.UNANSWERABLE
        for accepted in question.accepted:
            assert is_right(question, accepted), question
            assert is_right(question, f"{accepted.capitalize()}."), question
        assert is_right(question, "I don't know.") == (question.kind is Kind.UNANSWERABLE)
        assert not is_right(question, "")


def test_no_question_gives_its_answer_away() -> None:
    for question in QUESTIONS:
        if question.kind in (Kind.FACT, Kind.TRANSLATION):
            assert not is_right(question, question.text), question
        if question.kind is Kind.UNANSWERABLE:
            assert not is_right(question, question.text), question


def test_the_arithmetic_is_right() -> None:
    checked = 0
    for question in QUESTIONS:
        found = re.fullmatch(r"What is (\d+) (plus|minus|times|divided by) (\d+)\?", question.text)
        if found:
            a, operator, b = int(found[1]), OPERATORS[found[2]], int(found[3])
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
            assert [float(accepted) for accepted in question.accepted] == [value], question
            checked += 1
    assert checked == 40


def test_yes_and_no_are_nearly_balanced() -> None:
    counts = Counter(question.accepted for question in QUESTIONS if question.kind is Kind.YES_NO)
    assert set(counts) == {("yes",), ("no",)}
    assert abs(counts["yes",] - counts["no",]) <= 10


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Paris", True),
        ("The capital of France is PARIS.", True),
        ("It is not Paris.", False),
        ("Parish", False),
        ("London", False),
    ],
)
def test_a_fact_is_found_as_a_word(answer: str, right: bool) -> None:
    assert is_right(asked(Kind.FACT, "Paris"), answer) == right


@pytest.mark.parametrize("answer", ["8", "Eight legs.", "A spider has 8 legs", "It has eight."])
def test_a_number_may_be_a_word(answer: str) -> None:
    assert is_right(asked(Kind.FACT, "8"), answer)
    assert not is_right(asked(Kind.FACT, "6"), answer)


def test_a_number_may_have_a_unit_behind_it() -> None:
    assert is_right(asked(Kind.FACT, "100"), "Water boils at 100°C.")
    assert is_right(asked(Kind.FACT, "H2O"), "It's H₂O!")
    assert not is_right(asked(Kind.FACT, "100"), "1000")


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("12", "12"),
        ("7 + 5 = 12", "12"),
        ("The sum of 7 and 5 is twelve.", "12"),
        ("12, because 7 and 5 make it", "12"),
        ("7 plus 5 equals 12.", "12"),
        ("1,000", "1000"),
        ("1 is small", "1"),
        ("-3", "-3"),
        ("none", None),
        ("", None),
    ],
)
def test_the_result_of_a_sum(answer: str, result: str | None) -> None:
    assert result_of(answer) == result


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"),
        ("No, there is no such thing.", "no"),
        ("Yes, no doubt.", "yes"),
        ("That is true", "yes"),
        ("The answer is no.", "no"),
        ("Some say yes, some say no", None),
        ("The Sun is a star", None),
        ("", None),
    ],
)
def test_yes_or_no(answer: str, said: str | None) -> None:
    assert yes_or_no(answer) == said


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("I don’t know.", True),
        ("I cannot know that.", True),
        ("That is impossible to say.", True),
        ("Napoleon never went there.", True),
        ("In 1804.", False),
    ],
)
def test_a_refusal_answers_what_cannot_be_answered(answer: str, right: bool) -> None:
    assert is_right(asked(Kind.UNANSWERABLE, "never"), answer) == right
