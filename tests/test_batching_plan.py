"""What goes into a batch: shares of prompts, rows that join passes, and how wide drafts make it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.batching.plan import CompanyCosts, best_width, bridges, cost_of, padded, prompt_shares
from edge_runtime.batching.plan import passes as passes_of
from edge_runtime.ngram import GAIN

FLAT = (1.0,) * 16
EDGE = tuple(1 + 0.08 * k for k in range(16))
LINEAR = tuple(float(k) for k in range(1, 17))

costs = st.lists(st.floats(0, 2), max_size=15).map(lambda more: tuple(itertools.accumulate([1.0, *more])))
chances = st.lists(st.lists(st.floats(0, 1), max_size=6), min_size=1, max_size=4)


# ── shares ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_shares(due: Sequence[int], room: int) -> list[int]:
    """One row at a time, each to the prompt that has fewest and needs more."""
    shares = [1] * len(due)
    for _ in range(room - len(due)):
        hungry = [i for i in range(len(due)) if shares[i] < due[i]]
        if hungry:
            shares[min(hungry, key=lambda i: shares[i])] += 1
    return shares


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 80))
def test_room_is_shared_as_if_row_by_row(due: list[int], more: int) -> None:
    room = len(due) + more
    shares = prompt_shares(due, room)
    assert sum(shares) == min(room, sum(due))
    assert all(1 <= share <= need for share, need in zip(shares, due, strict=True))
    assert all(abs(a - b) <= 1 for a, b in zip(sorted(shares), sorted(slow_shares(due, room)), strict=True))


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    assert prompt_shares([1000, 5, 1000], 65) == [30, 5, 30]
    assert prompt_shares([], 8) == []


# ── passes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def passes(active: Sequence[int], cost: Sequence[float]) -> float:
    """What one row of each sequence costs: a pass for each run of numbers that follow one another."""
    starts = [i for i, number in enumerate(active) if not i or number != active[i - 1] + 1]
    ends = [*starts[1:], len(active)]
    return sum(cost_of(cost, end - start) for start, end in zip(starts, ends, strict=bool(starts)))


@given(st.lists(st.integers(0, 11), unique=True, max_size=8).map(sorted), costs)
def test_bridges_make_a_batch_cheaper_or_are_none(active: list[int], cost: tuple[float, ...]) -> None:
    found = bridges(active, cost)
    assert found == sorted(found)
    assert not set(found) & set(active)
    assert passes(sorted([*active, *found]), cost) <= passes(active, cost) + 1e-9
    assert bool(found) <= (passes(sorted([*active, *found]), cost) < passes(active, cost))


def test_gaps_are_bridged_where_rows_are_cheap() -> None:
    assert bridges([0, 1, 2, 3], EDGE) == bridges([], EDGE) == bridges([5], EDGE) == []
    assert bridges([0, 2, 5], EDGE) == [1, 3, 4]
    assert bridges([0, 2, 5], LINEAR) == []
    assert bridges([0, 30], EDGE) == []  # thirty rows for nothing are dearer than a second pass


def slow_passes(rows: dict[int, int]) -> list[int]:
    """Row by row: a pass grows by a row of each sequence of its run for as long as all of them have one."""
    left, found = dict(rows), list[int]()
    while any(left.values()):
        first = min(number for number, n in left.items() if n)
        run = [first]
        while left.get(run[-1] + 1):
            run.append(run[-1] + 1)
        found.append(0)
        while all(left[number] for number in run):
            found[-1] += len(run)
            for number in run:
                left[number] -= 1
    return found


ROWS = st.dictionaries(st.integers(0, 9), st.integers(1, 7), min_size=1, max_size=6)


@given(ROWS)
def test_a_batch_goes_through_in_rectangles(rows: dict[int, int]) -> None:
    assert passes_of(rows) == slow_passes(rows)
    assert sum(passes_of(rows)) == sum(rows.values())


@given(ROWS, costs, st.integers(10, 80), st.data())
def test_padding_never_costs_more_nor_takes_rows_away(
    rows: dict[int, int], cost: tuple[float, ...], n_batch: int, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, max(rows.values())))
    full = data.draw(st.sets(st.integers(0, 9)))  # sequences without room for more than they were asked

    def fits(number: int, n: int) -> bool:
        return number not in full or n <= rows.get(number, 0)

    found = padded(rows, width, n_batch, cost, fits)
    assert list(found) == sorted(found)
    assert all(found[number] >= n for number, n in rows.items())
    assert all(fits(number, n) for number, n in found.items())
    assert found == rows or sum(found.values()) <= n_batch

    def time_of(shape: dict[int, int]) -> float:
        return sum(cost_of(cost, n) for n in passes_of(shape))

    assert time_of(found) <= time_of(rows)


def test_answers_of_unequal_length_are_filled_up_where_rows_are_cheap() -> None:
    def shape(rows: dict[int, int], cost: Sequence[float], width: int) -> dict[int, int]:
        return padded(rows, width, 64, cost, lambda _number, _n: True)

    unequal = {0: 1, 1: 3, 2: 2, 3: 4}
    assert shape(unequal, EDGE, 4) == dict.fromkeys(range(4), 4)
    assert shape(unequal, LINEAR, 4) == unequal
    assert shape({0: 2, 3: 2}, EDGE, 2) == dict.fromkeys(range(4), 2)
    assert shape({0: 2, 2: 20}, EDGE, 2) == {0: 2, 2: 20}  # beside a prompt there is no gap worth filling
    assert shape({0: 1, 1: 3, 2: 20}, EDGE, 3) == {0: 3, 1: 3, 2: 20}


def test_the_cost_of_more_rows_than_were_measured_is_in_proportion() -> None:
    assert [cost_of((1.0, 1.5), rows) for rows in (1, 2, 4)] == [1.0, 1.5, 3.0]
    assert cost_of((1.0,), 7) == 7.0


# ── drafts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(chances, st.integers(0, 3), costs, st.integers(0, 8))
def test_the_width_is_the_best_of_all(
    shares: list[list[float]], extra: int, cost: tuple[float, ...], widest: int
) -> None:
    n = len(shares) + extra

    def rate(width: int) -> float:
        tokens = 0.0
        for of_text in shares:
            survival = 1.0
            for chance in [1.0, *of_text][:width]:
                survival *= chance
                tokens += survival
        return tokens / cost_of(cost, n * width)

    chosen = best_width(shares, n, cost, widest)
    assert 1 <= chosen <= max(1, widest)
    others = [rate(width) for width in range(2, widest + 1)]
    worth = [found for found in others if found > rate(1) * (1 + GAIN)]
    assert rate(chosen) == pytest.approx(max(worth, default=rate(1)))


def test_lengths_that_pay_alone_may_not_in_company() -> None:
    assert best_width([[0.9] * 8], 1, EDGE, 16) == 9
    assert best_width([[0.9] * 8, [], [], []], 4, EDGE, 4) == 1
    assert best_width([[0.9] * 8] * 4, 4, EDGE, 4) == 4
    assert best_width([[0.9] * 8], 1, LINEAR, 16) == 1


def test_costs_in_company_follow_their_source_and_the_company() -> None:
    live = [1.0, 1.2, 1.6, 2.0]
    company = CompanyCosts(live)
    assert tuple(company) == company[:] == tuple(live)
    company.n_sequences = 2
    assert tuple(company) == pytest.approx((1.0, 2.0 / 1.2))
    assert company[1:] == pytest.approx((2.0 / 1.2,))
    live[3] = 3.0
    assert company[1] == pytest.approx(3.0 / 1.2)
    company.n_sequences = 5
    assert (len(company), company[0]) == (1, 1.0)
    with pytest.raises(IndexError):
        company[1]
