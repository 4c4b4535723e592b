"""The benchmark of drafts: its prompts, the arithmetic of speeds, what is compared, answers to mathematics."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.bench.draft_costs import DraftRig, TimedAnswer, length_until_end, measure_kinds, summarise
from edge_runtime.bench.draft_prompts import KINDS, many_texts, random_tokens, texts
from edge_runtime.bench.draft_quality import (
    RandomDrafts,
    check_parity,
    first_difference,
    last_number,
    measure_maths,
    read_questions,
)
from edge_runtime.bench.stock import StockProcess
from edge_runtime.draft import BoundaryView
from edge_runtime.errors import UsageError
from edge_runtime.types import Mode

from .conftest import TinyMaker

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [100, 101, 102, 100, 101], [9, 8, 7, 6]]


def quiet(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def rig(tiny_path: TinyMaker) -> Iterator[DraftRig]:
    with DraftRig(str(tiny_path("llama", n_layer=2, weights="Q8_0", tokenizer=True)), n_threads=1) as made:
        yield made


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_there_are_four_texts_of_each_kind() -> None:
    assert all(len(set(texts(kind))) == 4 for kind in KINDS if kind != "random")


def test_random_prompts_are_the_same_each_time_and_end_nothing() -> None:
    first = random_tokens(50, lambda token: token < 40, 3)
    assert first == random_tokens(50, lambda token: token < 40, 3)
    assert len(first) == 3
    assert {token for prompt in first for token in prompt} == set(range(40, 50))


@pytest.mark.parametrize("count", [1, 7, 100])
def test_many_texts_are_all_different(count: int) -> None:
    assert len(set(many_texts(count))) == count


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_ends_with_its_first_end_token() -> None:
    assert length_until_end([4, 5, 2, 6, 2], lambda token: token == 2) == 3
    assert length_until_end([4, 5], lambda token: token == 2) == 2


def test_speeds_are_of_all_prompts_together_and_compared_by_repeat() -> None:
    fast, slow = TimedAnswer((1, 2, 3), 0.5, 0.5, 4, 3), TimedAnswer((1, 2, 3), 1.0, 1.0)
    other = TimedAnswer((1, 2, 9, 9), 1.0, 1.0, relaxed=1)
    answers = [
        {"stock": [slow] * 2, "full": [slow] * 2, "verified": [fast] * 2, "margin": [other] * 2},
        {"stock": [slow] * 2, "full": [slow, other], "verified": [slow] * 2, "margin": [slow] * 2},
    ]
    found = summarise("chat", answers)
    assert found.whole["verified"].median == pytest.approx((6 / 3) / (6 / 4))
    assert found.decode["verified"].median == pytest.approx((4 / 1.5) / (4 / 2))
    assert found.whole["margin"].median == pytest.approx((7 / 4) / (6 / 4))
    assert found.over_lookup == {}
    assert found.over_full["decode"].median == pytest.approx((4 / 3 + 16 / 15) / 2)  # full: 4, then 5 tokens in 2 s
    assert (found.drafted, found.accepted, found.acceptance) == (4, 3, 0.75)
    assert (found.unlike_full, found.unlike_stock, found.margin_unlike_full) == (1, 1, 2)  # in any repeat
    assert found.margin_changed == 1 / 7
    assert found.n_tokens == {"stock": 6, "full": 6, "verified": 6, "margin": 7}


def test_an_answer_starts_from_nothing(rig: DraftRig) -> None:
    first = rig.answer(Mode.VERIFIED, PROMPTS[0], 24)
    rig.answer(Mode.VERIFIED, PROMPTS[1], 24)
    again = rig.answer(Mode.VERIFIED, PROMPTS[0], 24)
    assert (first.tokens, first.drafted, first.accepted) == (again.tokens, again.drafted, again.accepted)
    assert rig.answer(Mode.FULL, PROMPTS[0], 24).tokens == first.tokens


@pytest.mark.stock
def test_all_sides_answer(rig: DraftRig, stock: StockProcess, stock_library: Path) -> None:
    sizes = {"n_ctx": 512, "n_batch": 128, "n_threads": 1}
    stock.open(rig.path, flash_attention=True, **sizes)
    with StockProcess(stock_library, worker="edge_runtime.bench.lookup") as lookup:
        lookup.open(rig.path, **sizes)
        said: list[str] = []
        found = measure_kinds(rig, {"chat": PROMPTS[:2]}, stock, lookup, max_tokens=12, repeats=1, say=said.append)
    assert [result.kind for result in found] == ["chat"]
    assert found[0].unlike_full == 0
    assert set(found[0].whole) == {"lookup", "full", "verified", "margin"}
    assert len(found[0].partings) <= found[0].unlike_stock <= 2
    assert all(gap >= 0 for gap in found[0].partings)
    assert said[-1] == "20 of 20, 0 s left"


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_random_drafts_follow_the_text_as_often_as_they_are_told() -> None:
    def drafts(right: float) -> list[int]:
        source = RandomDrafts(range(1000), 10**6, random.Random(0), right, go_on=1.0)
        found = [source.guess(BoundaryView(0, range(at), None, None)) for at in range(1000)]
        return [int(guess.ids[0]) for guess in found if guess is not None and guess.ids is not None]

    assert drafts(1.0) == list(range(1000))
    assert 700 < sum(token == at for at, token in enumerate(drafts(0.8))) < 900
    assert RandomDrafts([1], 5, random.Random(0), go_on=0.0).guess(BoundaryView(0, [], None, None)) is None


def test_verified_texts_are_those_of_mode_full(rig: DraftRig) -> None:
    found = check_parity(rig, PROMPTS, 32, quiet)
    assert found.flips == ()
    assert found.n_prompts == 3
    assert found.drafted["random"] > found.accepted["random"] > 0


def test_a_flip_is_found_where_it_is(rig: DraftRig, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(1, 2, 3), (1, 2, 3), (1, 9, 3)])  # full, n-grams, random
    monkeypatch.setattr(rig, "answer", lambda *_, **__: TimedAnswer(next(answers), 0.0, 0.0))
    (flip,) = check_parity(rig, [[5]], 3, quiet).flips
    assert (flip.prompt, flip.source, flip.position) == (0, "random", 1)


def test_texts_differ_where_one_is_shorter() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


# ── mathematics ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7.0),
        ("It is $1,250.50 in all.", 1250.5),
        ("from 5 to -2", -2.0),
        ("half of it, .5", 0.5),
        ("it is 12, or so", 12.0),
        ("none", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_questions_are_drawn_from_the_test_part_if_it_is_there(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"5 and 6\n#### 1,00{i}"} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    drawn = read_questions(tmp_path, 3)
    assert drawn == read_questions(tmp_path, 3)
    assert set(drawn) < {(f"q{i}", 1000.0 + i) for i in range(5)}
    (tmp_path / "test.jsonl").write_text(text.replace('"q0', '"t0').replace('"q1', '"t1'))
    assert {question for question, _ in read_questions(tmp_path, 5)} == {"t0", "t1", "q2", "q3", "q4"}
    with pytest.raises(UsageError, match="has 5 questions, not 6"):
        read_questions(tmp_path, 6)


def test_a_folder_without_questions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no test\.jsonl or train\.jsonl"):
        read_questions(tmp_path, 1)


def test_right_and_wrong_are_counted_in_pairs(rig: DraftRig, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {0: "it is 7", 1: "it is 8", 2: "7"}
    answers = iter([(0,), (0,), (0,), (1,), (1,), (2,), (0,), (1,)])  # full and margin in turn; 7 is right
    monkeypatch.setattr(rig, "answer", lambda *_: TimedAnswer(next(answers), 0.0, 0.0, 2, 1, 1))
    monkeypatch.setattr(rig.model, "detokenize", lambda tokens: said[tokens[0]])
    found = measure_maths(rig, [("?", 7.0)] * 4, 8, quiet)
    assert (found.full.value, found.margin.value, found.difference.value) == (0.75, 0.5, -0.25)
    assert (found.gained, found.lost, found.same_texts) == (1, 2, 1)
    assert (found.changed, found.drafted, found.accepted) == (1.0, 8, 4)
