"""What small batches cost: measured with a clock of our own, kept, and measured anew when anything is amiss."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.batch_costs import (
    SIZES,
    BatchCosts,
    CostKey,
    LiveCosts,
    kept_batch_costs,
    machine_name,
    measurable_sizes,
    measure_batch_costs,
)
from edge_runtime.native import ContextOptions, Model
from edge_runtime.ngram import draft_length
from edge_runtime.slices import Slice, close_slices, open_slices
from edge_runtime.types import Floats

from .conftest import TinyMaker
from .fakes import FakeSlice, Interrupted

TRUE = {1: 10.0, 2: 14.0, 3: 15.0, 4: 16.0, 6: 20.0, 8: 24.0, 12: 33.0, 16: 40.0}
KEY = CostKey("ab" * 32, "cd" * 32, 4, "f16", None, machine="a board")


class TimedSlice(FakeSlice):
    """Takes the time it is told to, on a clock that only it moves."""

    def __init__(self, start: int, end: int, takes: Callable[[int, int], float]) -> None:
        super().__init__(start, end, 4, n_batch=16, n_outputs_max=16, has_hidden=False)
        self.takes, self.now, self.batches = takes, 0.0, [0] * 17

    def _decode(self, rows: list[list[int]], first_pos: int, want: Sequence[int]) -> None:
        super()._decode(rows, first_pos, want)
        self.batches[len(rows)] += 1
        self.now += self.takes(len(rows), sum(self.batches))

    def synchronize(self) -> None:
        pass


def measured(takes: Callable[[int, int], float], sizes: Sequence[int] = SIZES) -> tuple[BatchCosts, TimedSlice]:
    piece = TimedSlice(0, 4, takes)
    found = measure_batch_costs(cast(list[Slice], [piece]), sizes, clock=lambda: piece.now)
    assert piece.inputs == []
    return found, piece


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_costs_are_in_batches_of_one() -> None:
    found, piece = measured(lambda k, _: TRUE[k])
    assert found == BatchCosts(SIZES, (1, 1.4, 1.5, 1.6, 2.0, 2.4, 3.3, 4.0), one_s=10.0, invariant=True)
    assert piece.now <= 100 * TRUE[1]


def test_the_first_batches_and_a_slow_spell_do_not_count() -> None:
    found, _ = measured(lambda k, i: TRUE[k] * (100 if i == 1 else 5 if 5 <= i <= 9 else 1))
    assert found.costs == (1, 1.4, 1.5, 1.6, 2.0, 2.4, 3.3, 4.0)
    assert found.steady


def test_dear_batches_are_repeated_less_often() -> None:
    repeats = [measured(lambda k, _, s=s: 1 + s * (k - 1))[1].batches[16] for s in (0.0, 0.2, 1.0)]
    assert repeats == [5, 4, 3]


def test_a_busy_machine_is_noticed() -> None:
    found, _ = measured(lambda k, i: TRUE[k] * (1 if i < 4 else 3))
    assert not found.steady


def test_a_batch_that_took_longer_than_its_tokens_was_disturbed() -> None:
    assert not measured(lambda k, _: 10.0 * k if k < 4 else 12.0 * k)[0].steady
    assert measured(lambda k, _: 10.0 * k)[0].steady


def test_arithmetic_that_depends_on_the_batch_is_seen() -> None:
    class Variant(TimedSlice):
        def logits(self, row: int) -> Floats:
            found = super().logits(row).copy()
            found[0] += 1e-6 * (len(self.rows) == 3)
            return found

        def _decode(self, rows: list[list[int]], first_pos: int, want: Sequence[int]) -> None:
            super()._decode(rows, first_pos, want)
            self.rows = rows

    piece = Variant(0, 4, lambda k, _: TRUE[k])
    assert not measure_batch_costs(cast(list[Slice], [piece]), clock=lambda: piece.now).invariant
    assert measure_batch_costs(cast(list[Slice], [piece]), (1, 2, 4), clock=lambda: piece.now).invariant
    assert piece.inputs == []


@given(st.lists(st.floats(0.01, 100), min_size=60, max_size=60))
def test_no_batch_is_cheaper_than_a_smaller_one(noise: list[float]) -> None:
    found, _ = measured(lambda k, i: TRUE[k] * noise[i % len(noise)])
    assert found.costs[0] == 1
    assert list(found.costs) == sorted(found.costs)


def test_a_clock_too_coarse_says_nothing() -> None:
    assert measured(lambda *_: 0.0)[0].costs == (1.0,) * len(SIZES)


def test_all_slices_are_measured_together_and_left_empty() -> None:
    first, second = TimedSlice(0, 2, lambda *_: 0.0), TimedSlice(2, 4, lambda k, _: TRUE[k])
    found = measure_batch_costs(cast(list[Slice], [first, second]), (1, 2, 4), clock=lambda: second.now)
    assert found.costs == (1, 1.4, 1.6)
    assert first.inputs == second.inputs == []


def test_an_interruption_leaves_the_caches_empty() -> None:
    piece = TimedSlice(0, 4, lambda k, _: TRUE[k])
    piece.interrupt_in = 6
    with pytest.raises(Interrupted):
        measure_batch_costs(cast(list[Slice], [piece]), clock=lambda: piece.now)
    assert piece.inputs == []


def test_a_real_model(tiny_path: TinyMaker) -> None:
    with Model(str(tiny_path("llama"))) as model:
        for boundaries in ((), (2, 4)):
            slices = open_slices(model, boundaries, ContextOptions(n_ctx=64, n_threads=1), n_outputs_max=8)
            found = measure_batch_costs(slices, measurable_sizes(8))
            assert found.one_s > 0
            assert found.sizes == (1, 2, 3, 4, 6, 8)
            assert all(cost >= 1 for cost in found.costs)
            assert [piece.last_position() for piece in slices] == [-1] * len(slices)
            close_slices(slices)


@pytest.mark.parametrize("n_vocab", [1, 5])
def test_a_vocabulary_smaller_than_a_batch(tiny_path: TinyMaker, n_vocab: int) -> None:
    path = tiny_path("llama", n_layer=2, n_vocab=n_vocab)
    with Model(str(path)) as model:
        for boundaries in ((), (1,)):
            slices = open_slices(model, boundaries, ContextOptions(n_ctx=64, n_threads=1), n_outputs_max=16)
            assert measure_batch_costs(slices).sizes == SIZES
            close_slices(slices)


# ── between what was measured ───────────────────────────────────────────────────────────────────────────────────────


def test_between_and_beyond_the_sizes_measured() -> None:
    costs = BatchCosts((1, 2, 4, 8), (1.0, 1.5, 2.5, 3.0))
    assert costs.up_to(10) == (1.0, 1.5, 2.0, 2.5, 2.625, 2.75, 2.875, 3.0, 3.125, 3.25)
    assert BatchCosts((1,), (1.0,)).up_to(3) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(("largest", "sizes"), [(1, (1,)), (5, (1, 2, 3, 4)), (16, SIZES), (1000, SIZES)])
def test_only_what_fits_is_measured(largest: int, sizes: tuple[int, ...]) -> None:
    assert measurable_sizes(largest) == sizes


# ── keeping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Measure:
    def __init__(self, sizes: tuple[int, ...] = (1, 2, 4), steady: bool = True) -> None:
        self.calls, self.sizes, self.steady = 0, sizes, steady

    def __call__(self) -> BatchCosts:
        self.calls += 1
        costs = tuple(1 + 0.3 * k for k in range(len(self.sizes)))
        return BatchCosts(self.sizes, costs, 0.005, invariant=True, steady=self.steady)


def test_costs_are_measured_once() -> None:
    measure = Measure()
    assert [kept_batch_costs(KEY, (1, 2, 4), measure) for _ in range(3)] == [Measure()()] * 3
    assert measure.calls == 1
    assert kept_batch_costs(KEY, (1, 2), measure) == Measure()()
    assert measure.calls == 1
    assert list(KEY.kept.path.parent.iterdir()) == [KEY.kept.path]


def test_sizes_that_are_missing_are_measured() -> None:
    kept_batch_costs(KEY, (1, 2, 4), Measure())
    larger = Measure((1, 2, 4, 8))
    assert kept_batch_costs(KEY, (1, 2, 4, 8), larger).sizes == (1, 2, 4, 8)
    kept_batch_costs(KEY, (1, 2, 4, 8), larger)
    assert larger.calls == 1


def test_what_was_measured_on_a_busy_machine_is_not_kept() -> None:
    measure = Measure(steady=False)
    for _ in range(2):
        assert not kept_batch_costs(KEY, (1, 2, 4), measure).steady
    assert measure.calls == 2


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CostKey)])
def test_whatever_they_depend_on_has_costs_of_its_own(field: str) -> None:
    kept_batch_costs(KEY, (1, 2), Measure())
    measure = Measure()
    value: Any = {"n_threads": 5, "flash_attention": True}.get(field, "other")
    other = dataclasses.replace(KEY, **{field: value})
    kept_batch_costs(other, (1, 2), measure)
    assert measure.calls == 1
    assert other.kept.path != KEY.kept.path


def record(**changes: object) -> bytes:
    """The file as it was written, but for some of what it says of the costs."""
    kept_batch_costs(KEY, (1, 2, 4), Measure())
    found = json.loads(KEY.kept.path.read_bytes())
    return json.dumps({**found, "payload": {**found["payload"], **changes}}).encode()


def envelope(**changes: object) -> bytes:
    kept_batch_costs(KEY, (1, 2, 4), Measure())
    return json.dumps({**json.loads(KEY.kept.path.read_bytes()), **changes}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda: b"",
        lambda: b"\xff\x00",
        lambda: record()[:-20],
        lambda: b"[]",
        lambda: b"[" * 100_000,
        lambda: envelope(format=0),
        lambda: envelope(key={}),
        lambda: envelope(payload=[]),
        lambda: record(sizes=[]),
        lambda: record(sizes=[1, 2]),
        lambda: record(sizes=[1, 2, "4"]),
        lambda: record(sizes=[1, 4, 2]),
        lambda: record(sizes=3),
        lambda: record(sizes=[1, 2, 4], costs=[1, 1.5, None]),
        lambda: record(costs=[1, 1.5, float("nan")]),
        lambda: record(costs=[1, 1.5, float("inf")]),
        lambda: record(costs=[1, 1.5, 1.2]),
        lambda: record(costs=[2, 3, 4]),
        lambda: record(costs=[True, 3, 4]),
        lambda: record(one_s=-1.0),
        lambda: record(one_s=float("nan")),
        lambda: record(one_s="0.1"),
        lambda: record(invariant=1),
    ],
)
def test_a_damaged_file_is_measured_anew(damage: Callable[[], bytes]) -> None:
    data = damage()
    KEY.kept.path.parent.mkdir(parents=True, exist_ok=True)
    KEY.kept.path.write_bytes(data)
    measure = Measure()
    assert kept_batch_costs(KEY, (1, 2, 4), measure) == Measure()()
    assert measure.calls == 1
    assert kept_batch_costs(KEY, (1, 2, 4), measure) == Measure()()
    assert measure.calls == 1  # it is whole again


def test_a_cache_that_cannot_be_written_costs_only_the_time(own_cache: Path) -> None:
    own_cache.write_text("a file where a folder should be")
    assert kept_batch_costs(KEY, (1, 2, 4), Measure()) == Measure()()


def test_a_machine_is_its_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A Chip 3000\n\nprocessor\t: 1\nmodel name\t: A Chip 3000\n")
    assert "A Chip 3000" in machine_name(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd0b\n")
    assert "0xd0b" in machine_name(cpuinfo)
    assert os.uname().machine in machine_name(tmp_path / "none")


# ── live ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURED = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)


def test_what_was_measured_holds_until_something_else_is_seen() -> None:
    live = LiveCosts(MEASURED, one_s=0.01)
    assert tuple(live) == MEASURED
    for size in (1, 4, 2, 8):
        live.observe(size, 0.01 * MEASURED[size - 1])
    assert tuple(live) == pytest.approx(MEASURED)
    assert live.one_s == pytest.approx(0.01)


def test_a_wrong_measurement_is_mended_in_a_few_batches_for_all_sizes() -> None:
    live = LiveCosts(MEASURED, one_s=0.01)
    for _ in range(8):
        live.observe(4, 0.04)  # four tokens cost four
    assert live[3] > 3
    assert live[7] > 5
    assert list(live) == sorted(live)
    assert live[0] == 1


def test_batches_may_prove_cheaper_but_never_cheaper_than_one_token() -> None:
    live = LiveCosts((1.0, 2.0, 3.0, 4.0), one_s=0.01)
    for _ in range(50):
        live.observe(4, 0.005)
    assert live[3] < 1.5
    assert min(live) == 1


def test_a_machine_that_gets_slower_changes_no_cost() -> None:
    live = LiveCosts(MEASURED, one_s=0.01)
    for _ in range(60):
        live.observe(1, 0.03)
        live.observe(4, 0.03 * MEASURED[3])
    assert live.one_s == pytest.approx(0.03, rel=0.05)
    assert live[3] == pytest.approx(MEASURED[3], rel=0.15)


def test_one_long_pause_counts_for_little() -> None:
    live = LiveCosts(MEASURED, one_s=0.01)
    live.observe(2, 60.0)
    assert live[1] < 1.4
    live.observe(1, 60.0)
    assert live.one_s < 0.02


def test_without_the_time_of_one_token_batches_say_nothing() -> None:
    live = LiveCosts(MEASURED)
    live.observe(8, 1.0)
    assert tuple(live) == MEASURED
    live.observe(1, 0.5)
    assert live.one_s == 0.5


def test_ngrams_draft_by_the_costs_of_now() -> None:
    live = LiveCosts((1.0, 1.1, 1.2, 1.3, 1.4), one_s=0.01)
    assert draft_length([0.7] * 4, live) > 0
    for _ in range(20):
        live.observe(5, 0.05)
    assert draft_length([0.7] * 4, live) == 0
