"""Which boundaries pay: hand-made costs with obvious answers, a plain replay of the engine's rules, one real run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import BoundaryError, UsageError
from edge_runtime.exits.choose import choose, exit_places, predict_time
from edge_runtime.exits.costs import Costs, measure_costs
from edge_runtime.exits.head import HeadContext, lens_shape, write_head
from edge_runtime.exits.ridge import silent_tensors
from edge_runtime.native import Model
from edge_runtime.types import Floats, Mode

from .conftest import TinyMaker

FREE = (0.0,) * 8


def flat(ms: float) -> tuple[float, ...]:
    """A batch costs what one token does."""
    return (ms,) * 8


def steep(ms: float) -> tuple[float, ...]:
    """A batch of k costs k tokens."""
    return tuple(ms * k for k in range(1, 9))


def costs(shape: Any, head: Any, layers: tuple[int, ...] = (10,)) -> Costs:
    """A model of 10 ms per boundary and 10 ms behind the last."""
    n = len(layers)
    return Costs(layers, (shape(10.0),) * (n + 1), shape(10.0), (head,) * n, shape(10.0 * (n + 1)))


@dataclass
class Told:
    """Predictions of one boundary, as far as they are read."""

    prompts: np.ndarray
    agree: np.ndarray
    acceptance: Floats


def one_text(n: int) -> np.ndarray:
    return np.zeros(n, np.int32)


def pace(places: list[int], agree: list[bool], mode: Mode, with_costs: Costs, cap: int = 8) -> Any:
    return predict_time(mode, np.array(places), np.array(agree), one_text(len(places)), with_costs, cap)


# --- obvious answers


def test_free_heads_and_free_batches() -> None:
    """All exit at half depth: eight of nine tokens wait for a settle that costs no more than one token's."""
    found = pace([0] * 900, [True] * 900, Mode.EXIT, costs(flat, FREE))
    assert found.ms_per_token == pytest.approx((10 * 9 + 10) / 9)
    assert found.full_ms == 20
    assert found.coverage == pytest.approx(8 / 9)
    assert found.tokens_per_settle == pytest.approx(9)
    assert found.pays
    assert found.speedup == pytest.approx(1.8)
    assert math.isnan(found.acceptance)


def test_verified_with_free_heads_and_free_batches() -> None:
    found = pace([0] * 900, [True] * 900, Mode.VERIFIED, costs(flat, FREE))
    assert found.ms_per_token == pytest.approx((10 * 9 + 10) / 9)
    assert found.acceptance == 1
    assert found.tokens_per_settle == pytest.approx(9)
    assert found.coverage == pytest.approx(8 / 9)


@pytest.mark.parametrize("mode", [Mode.EXIT, Mode.VERIFIED])
def test_where_a_batch_costs_as_many_tokens_nothing_is_won(mode: Mode) -> None:
    found = pace([0] * 900, [True] * 900, mode, costs(steep, FREE))
    assert found.ms_per_token == pytest.approx(20)
    assert not found.pays


@pytest.mark.parametrize("mode", [Mode.EXIT, Mode.VERIFIED])
def test_dear_heads(mode: Mode) -> None:
    found = pace([0] * 900, [True] * 900, mode, costs(flat, flat(10.0)))
    assert found.ms_per_token == pytest.approx(20 * 9 / 9 + 10 / 9)
    assert not found.pays


@pytest.mark.parametrize("mode", [Mode.EXIT, Mode.VERIFIED])
def test_without_exits_a_token_costs_the_model_and_its_heads(mode: Mode) -> None:
    found = pace([1] * 50, [True] * 50, mode, costs(flat, flat(1.0)))
    assert found.ms_per_token == pytest.approx(21)
    assert (found.coverage, found.tokens_per_settle) == (0, 1)


def test_refused_drafts_are_paid_for() -> None:
    """Of eight drafts the first is wrong: nine runs of the first slice and a settle give one token."""
    found = pace([0] * 100, [False] * 100, Mode.VERIFIED, costs(flat, FREE))
    assert found.acceptance == 0
    assert found.tokens_per_settle == 1
    whole = 92 * 100  # later, fewer tokens are left to draft
    assert found.ms_per_token * 100 == pytest.approx(whole + sum(10 * (k + 1) + 10 for k in range(1, 9)))


def test_texts_end_with_a_settle() -> None:
    prompts = np.repeat(np.arange(5, dtype=np.int32), 2)
    found = predict_time(Mode.EXIT, np.zeros(10, int), np.ones(10, bool), prompts, costs(flat, FREE))
    assert found.ms_per_token == pytest.approx((2 * 10 + 10) / 2)
    assert found.tokens_per_settle == 2


def test_larger_batches_than_were_measured() -> None:
    assert Costs.at((1.0, 2.0, 4.0), 5) == 8
    assert Costs.at((1.0,), 3) == 3
    assert Costs.at((3.0, 2.0), 4) == 2


def test_parts_that_are_no_longer_parted_add_up() -> None:
    whole = Costs(
        layers=(4, 8, 12),
        slices=((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)),
        verify=(9.0, 10.0),
        heads=((0.1, 0.1), (0.2, 0.2), (0.3, 0.3)),
        full=(20.0, 21.0),
    )
    kept = whole.keep((1,))
    assert kept.layers == (8,)
    assert kept.slices == ((4.0, 6.0), (12.0, 14.0))
    assert kept.verify == (14.0, 16.0)
    assert kept.heads == ((0.2, 0.2),)
    assert whole.keep((0, 1, 2)) == whole


# --- the engine's rules, replayed with sets of positions


def replay_exits(places: list[int], prices: Costs, cap: int) -> float:
    """Mode exit for one text, with every slice's positions written out."""
    n, ms = len(prices.slices), 0.0
    done: list[list[int]] = [[] for _ in range(n)]

    def through(stop: int, newest: int) -> float:
        cost = 0.0
        for s in range(stop):
            batch = [p for p in range(newest + 1) if p not in done[s]]
            done[s] += batch
            if batch:
                cost += Costs.at(prices.slices[s], len(batch))
                cost += Costs.at(prices.heads[s], len(batch)) if s < n - 1 else 0.0
        return cost

    for i, place in enumerate(places):
        forced = i - len(done[-1]) >= cap
        ms += through(n if forced else place + 1, i)
    return ms + through(n, len(places) - 1)


def replay_verified(places: list[int], agree: list[bool], prices: Costs, cap: int) -> float:
    n, ms, i = len(prices.slices), 0.0, 0
    while i < len(places):
        done: list[set[int]] = [set(range(i)) for _ in range(n)]
        row = i
        while True:
            exits = row - i < cap and row < len(places) and places[row] < n - 1
            for s in range(places[row] + 1 if exits else n):
                batch = set(range(row + 1)) - done[s]
                done[s] |= batch
                if batch:
                    table = prices.verify if s == n - 1 else prices.slices[s]
                    ms += Costs.at(table, len(batch))
                    ms += Costs.at(prices.heads[s], len(batch)) if s < n - 1 else 0.0
            if not exits:
                break
            row += 1
        while i < row and agree[i]:
            i += 1
        i += 1
    return ms


@pytest.mark.parametrize("cap", [1, 3, 8])
def test_the_time_is_that_of_a_plain_replay(cap: int) -> None:
    rng = np.random.default_rng(cap)
    table = np.cumsum(rng.random((9, 8)), axis=1).round(3)
    rows = [tuple(row.tolist()) for row in table]
    prices = Costs((5, 9), (rows[0], rows[1], rows[2]), rows[3], (rows[4], rows[5]), rows[6])
    for _ in range(20):
        n = int(rng.integers(1, 40))
        places, agree = rng.choice(3, n, p=[0.5, 0.3, 0.2]).tolist(), (rng.random(n) < 0.7).tolist()
        found = pace(places, agree, Mode.EXIT, prices, cap)
        assert found.ms_per_token * n == pytest.approx(replay_exits(places, prices, cap))
        found = pace(places, agree, Mode.VERIFIED, prices, cap)
        assert found.ms_per_token * n == pytest.approx(replay_verified(places, agree, prices, cap))


def test_where_tokens_exit() -> None:
    first, second = np.array([0.1, 0.5, np.nan, 0.5]), np.array([0.0, 0.2, 0.1, 0.9])
    places = exit_places((0.5, 0.3), [first.astype(np.float32), second.astype(np.float32)])
    assert places.tolist() == [0, 1, 1, 2]
    assert exit_places((0.0, 0.0), [first.astype(np.float32)] * 2).tolist() == [2] * 4


@pytest.mark.parametrize(("mode", "n"), [(Mode.FULL, 3), (Mode.EXIT, 0)])
def test_nothing_to_time(mode: Mode, n: int) -> None:
    with pytest.raises(UsageError, match="no exits to time"):
        predict_time(mode, np.zeros(n, int), np.ones(n, bool), one_text(n), costs(flat, FREE))


# --- choosing


def told(rng: np.random.Generator, wrong: float, n_prompts: int = 60) -> tuple[Told, Floats]:
    """A boundary whose gate knows what it is worth: uncertainty is the probability of disagreement, `wrong` at most."""
    sizes = 40
    prompts = np.repeat(np.arange(n_prompts, dtype=np.int32), sizes)
    doubt = (rng.random(len(prompts)) * wrong).astype(np.float32)
    agree = rng.random(len(prompts)) >= doubt
    return Told(prompts, agree, 1 - doubt), doubt


def test_the_earlier_of_two_perfect_boundaries() -> None:
    rng = np.random.default_rng(1)
    heard, doubts = zip(*(told(rng, 1e-6) for _ in range(2)), strict=True)
    found = choose(costs(flat, FREE, (10, 20)), heard, doubts, 0.01)
    assert found.exit is not None
    assert found.verified is not None
    assert found.exit.pace.ms_per_token == pytest.approx((10 * 9 + 20) / 9, rel=0.1)
    assert 10 in found.exit.layers
    assert found.exit.pace.pays
    assert found.exit.disagreement <= 0.01
    assert found.boundaries()[0] == 10
    assert {plan.layers for plan in found.considered} == {(10,), (20,), (10, 20)}
    assert "faster than full depth with 30.00 ms" in found.exit.sentence()


def test_a_useless_early_boundary_is_left_out() -> None:
    rng = np.random.default_rng(2)
    useless = told(rng, 1.0)[0], np.full(2400, 0.9, np.float32)
    good = told(rng, 1e-6)
    found = choose(costs(flat, flat(2.0), (10, 20)), (useless[0], good[0]), (useless[1], good[1]), 0.01)
    assert found.exit is not None
    assert found.verified is not None
    assert found.exit.layers == found.verified.layers == (20,)


@pytest.mark.parametrize(("shape", "head"), [(steep, FREE), (flat, flat(40.0)), (steep, flat(1.0))])
def test_none_pays(shape: Any, head: Any) -> None:
    heard, doubt = told(np.random.default_rng(3), 0.5)
    found = choose(costs(shape, head), [heard], [doubt], 0.05)
    assert found.exit is not None
    assert found.verified is not None
    assert not found.exit.pace.pays
    assert not found.verified.pace.pays
    assert found.boundaries() == ()
    assert "no faster than" in found.verified.sentence()


def test_fewer_disagreements_allowed_are_slower() -> None:
    heard, doubt = told(np.random.default_rng(4), 0.5)
    speeds = []
    for allowed in (0.01, 0.05, 0.2):
        plan = choose(costs(flat, FREE), [heard], [doubt], allowed).exit
        assert plan is not None
        assert plan.disagreement <= allowed
        speeds.append(plan.pace.ms_per_token)
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > speeds[-1]


def test_no_policy_stays_within_what_is_allowed() -> None:
    prompts = np.repeat(np.arange(20, dtype=np.int32), 10)
    heard = Told(prompts, np.zeros(200, bool), np.zeros(200, np.float32))
    doubt = np.random.default_rng(5).random(200).astype(np.float32)
    found = choose(costs(flat, FREE), [heard], [doubt], 0.05, risk="exits")
    assert found.exit is None
    assert found.verified is not None
    assert not found.verified.pace.pays
    assert found.boundaries() == ()


def test_sampling_accepts_by_probability() -> None:
    heard, doubt = told(np.random.default_rng(6), 1e-6)
    heard.acceptance = np.full(len(doubt), 0.5, np.float32)
    greedy = choose(costs(flat, FREE), [heard], [doubt], 0.05).verified
    drawn = choose(costs(flat, FREE), [heard], [doubt], 0.05, sampling=True).verified
    assert greedy is not None
    assert drawn is not None
    assert greedy.pace.acceptance == pytest.approx(1, abs=0.001)
    assert drawn.pace.acceptance < 0.6
    assert drawn.pace.ms_per_token > greedy.pace.ms_per_token


def test_costs_of_other_boundaries() -> None:
    heard, doubt = told(np.random.default_rng(7), 0.5)
    with pytest.raises(UsageError, match="costs of 1 boundaries"):
        choose(costs(flat, FREE), [heard, heard], [doubt, doubt], 0.05)


# --- measuring


def open_head(path: Path, n_embd: int, n_batch: int = 4) -> HeadContext:
    rng = np.random.default_rng(0)
    shape = lens_shape(n_embd, 33)
    other = np.zeros(n_embd, np.float32)
    write_head(path, shape, silent_tensors(shape, other), rng.normal(size=(33, n_embd)).astype(np.float32), "F16")
    return HeadContext(path, 128, 1, n_batch)


def test_a_real_model_is_measured(tiny_path: TinyMaker, tmp_path: Path) -> None:
    with Model(str(tiny_path("llama"))) as model:
        heads = [open_head(tmp_path / f"{i}.gguf", 64) for i in range(2)]
        try:
            found = measure_costs(model, (1, 3), heads, n_threads=1, largest=4, n_repeats=2)
            again = measure_costs(model, (1, 3), heads, n_threads=1, largest=2, n_repeats=1)
            with pytest.raises(UsageError, match="need one head each"):
                measure_costs(model, (1,), heads, n_threads=1)
            with pytest.raises(UsageError, match="batches of 5"):
                measure_costs(model, (1, 3), heads, n_threads=1, largest=5)
            with pytest.raises(BoundaryError):
                measure_costs(model, (1, 30), heads, n_threads=1, largest=2)
            assert not model.contexts
        finally:
            for head in heads:
                head.close()
    assert found.layers == (1, 3)
    assert [len(row) for row in (*found.slices, found.verify, *found.heads, found.full)] == [4] * 7
    assert all(ms > 0 for row in (*found.slices, found.verify, *found.heads, found.full) for ms in row)
    assert len(found.slices) == 3
    assert len(again.full) == 2
    assert predict_time(Mode.EXIT, np.zeros(9, int), np.ones(9, bool), one_text(9), found.keep((0,))).ms_per_token > 0


def test_heads_that_are_seldom_asked_cost_less() -> None:
    costs = Costs((4,), ((1.0, 1.5), (1.0, 1.5)), (1.0, 1.5), ((0.5, 0.6, 0.7),), (2.0, 3.0))
    assert costs.asking([1.0]).heads == costs.heads
    # what is never asked about costs what the next token of a batch does
    assert costs.asking([0.0]).heads[0] == pytest.approx((0.1, 0.2, 0.3))
    assert costs.asking([0.25]).heads[0][0] == pytest.approx(0.25 * 0.5 + 0.75 * 0.1)
    assert costs.asking([0.25]).slices == costs.slices
