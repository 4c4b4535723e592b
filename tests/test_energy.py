"""Energy is the integral of power: exact where it can be, and honest about what was not seen."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.energy.account import Energy, idle_power, integrate
from edge_runtime.energy.fit import Point, fit, nonnegative_least_squares
from edge_runtime.energy.live import IDLE_WATCH_S, energy_meter, run_sampler
from edge_runtime.energy.meter_log import read_meter
from edge_runtime.energy.model import PowerModel
from edge_runtime.energy.points import Traffic, recorded_points
from edge_runtime.energy.request import Meter, RequestEnergy, Work, weights_gb
from edge_runtime.errors import UsageError
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.sensors.sampler import Timing
from edge_runtime.summary import energy_fields

MEASURED, CALIBRATED, ESTIMATED = PowerSource


def powers(*pairs: tuple[float, float | None], source: PowerSource = MEASURED) -> list[Reading]:
    return [Reading(t, power_w=p, power_source=None if p is None else source) for t, p in pairs]


def sampled(power: Callable[[float], float], n: int = 11, step: float = 1.0) -> list[Reading]:
    return powers(*((i * step, power(i * step)) for i in range(n)))


def energy(readings: list[Reading], start_s: float, end_s: float, **options: float) -> Energy:
    found = integrate(readings, start_s, end_s, **options)
    assert found is not None
    return found


# ── the integral ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("start", "end"), [(0, 10), (2.25, 7.5), (3.1, 3.2), (-1, 11)])
def test_constant_power_is_power_times_time(start: float, end: float) -> None:
    found = energy(sampled(lambda _: 5.0), start, end)
    assert found.gross_j == pytest.approx(5 * (end - start))
    assert (found.seconds, found.covered, found.source) == (end - start, 1.0, MEASURED)


@pytest.mark.parametrize(("start", "end"), [(0, 10), (0.3, 0.4), (2.5, 9.75)])
def test_linear_power_is_interpolated_at_the_ends(start: float, end: float) -> None:
    assert energy(sampled(lambda t: 1 + 2 * t), start, end).gross_j == pytest.approx(end - start + end**2 - start**2)


def test_a_step_is_exact_where_both_of_its_sides_are_read() -> None:
    readings = powers((0, 1), (2, 1), (2, 6), (5, 6))
    assert energy(readings, 0, 5).gross_j == pytest.approx(2 * 1 + 3 * 6)
    assert energy(readings, 1, 3).gross_j == pytest.approx(1 + 6)


@given(st.permutations(range(8)))
def test_the_order_of_readings_does_not_matter(order: list[int]) -> None:
    readings = sampled(lambda t: t * t, 8)
    assert energy([readings[i] for i in order], 0.5, 6.5) == energy(readings, 0.5, 6.5)


@given(st.lists(st.floats(0, 100), min_size=3, max_size=12), st.floats(0.1, 0.9))
def test_parts_add_up_to_the_whole(values: list[float], share: float) -> None:
    readings = powers(*enumerate(values))
    end = len(values) - 1
    first, second = energy(readings, 0, share * end), energy(readings, share * end, end)
    assert first.gross_j + second.gross_j == pytest.approx(energy(readings, 0, end).gross_j, abs=1e-9)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_short_gap_is_bridged(missing: float | None) -> None:
    found = energy(powers((0, 1), (1, missing), (2, 3), (3, 4)), 0, 3, max_gap_s=2)
    assert (found.gross_j, found.covered) == (pytest.approx(1 + 2 + 2 + 2.5), 1.0)


def test_a_long_gap_is_said_and_filled_with_the_mean() -> None:
    """Of the 8 s from 2 to 10, one on either side is believed: 4 of 10 s are seen, at 3 W on average."""
    readings = powers((0, 2), (1, 2), (2, 2), (5, None), (10, 6))
    found = energy(readings, 0, 10, max_gap_s=2, idle_w=1)
    assert found.covered == pytest.approx(0.4)
    assert found.gross_j == pytest.approx(3 * 10)
    assert found.net_j == pytest.approx(20)


def test_coverage_does_not_jump_where_a_gap_becomes_too_long() -> None:
    below, above = (energy(powers((0, 1), (2 + more, 2)), 0, 2, max_gap_s=2) for more in (0.0, 1e-9))
    assert below.covered == 1.0
    assert above.covered == pytest.approx(1.0)
    assert above.gross_j == pytest.approx(below.gross_j)


def test_one_reading_holds_for_half_a_gap_to_either_side() -> None:
    one = powers((10, 4))
    assert energy(one, 9, 11, max_gap_s=2).covered == 1.0
    assert energy(one, 8, 12, max_gap_s=2).covered == 0.5
    assert integrate(one, 11, 13, max_gap_s=2) is None


@pytest.mark.parametrize("readings", [[], powers((0, None), (1, None)), powers((100, 5))])
def test_where_nothing_is_known_there_is_no_energy(readings: list[Reading]) -> None:
    assert integrate(readings, 0, 1) is None


@pytest.mark.parametrize("end", [3, 2])
def test_no_time_has_no_energy(end: float) -> None:
    assert integrate(sampled(lambda _: 5.0), 3, end) is None


def test_the_source_is_the_least_good_of_those_that_count() -> None:
    readings = [*powers((0, 1), (1, 1)), *powers((2, 1), source=CALIBRATED), *powers((3, 1), source=ESTIMATED)]
    ends = {1: MEASURED, 1.5: CALIBRATED, 2: CALIBRATED, 2.1: ESTIMATED}
    assert {end: energy(readings, 0, end).source for end in ends} == ends
    assert energy([Reading(0, power_w=1)], 0, 1).source is ESTIMATED


def test_idling_is_subtracted_if_it_is_known() -> None:
    readings = sampled(lambda _: 5.0)
    known, unknown = energy(readings, 1, 3, idle_w=2), energy(readings, 1, 3)
    assert (known.gross_j, known.idle_j, known.net_j) == (pytest.approx(10), 4, pytest.approx(6))
    assert (unknown.idle_j, unknown.net_j) == (None, None)
    assert energy(readings, 1, 3, idle_w=6).net_j == pytest.approx(-2)


def test_idle_power_is_the_median_of_idle_readings_before() -> None:
    readings = [
        Reading(t, power_w=p, load=load)
        for t, p, load in [(0, 2, 0.0), (1, 9, 0.01), (2, 2.2, 0.05), (3, 8, 0.5), (4, None, 0), (5, 7, None)]
    ]
    late = [Reading(t, power_w=1.0, load=0.0) for t in range(10, 20)]
    assert idle_power([*late, *readings], until_s=10) == 2.2
    assert idle_power(readings, max_load=0.05) is None  # two are too few
    assert idle_power([]) is None


# ── an answer ───────────────────────────────────────────────────────────────────────────────────────────────────────

WORK = Work(start_s=10, first_s=12, end_s=17, decoded=10)


def test_prefill_and_decode_are_apart() -> None:
    asked: list[float] = []
    readings = powers((9, 6), (12, 6), (12, 4), (15, 4), (17, 4))

    def since(time_s: float) -> list[Reading]:
        asked.append(time_s)
        return readings

    found = Meter(since, idle_w=1.0).account(WORK)
    assert found is not None
    assert found.decode is not None
    assert (found.prefill.gross_j, found.decode.gross_j, found.gross_j) == (12, 20, 32)
    assert (found.per_token_j, found.net_per_token_j) == (2, 1.5)
    assert found.source is MEASURED
    assert asked[0] < WORK.start_s
    assert energy_fields(found) == {
        "energy_j": 32, "prefill_energy_j": 12, "decode_energy_j": 20, "energy_per_token_j": 2,
        "net_energy_per_token_j": 1.5, "energy_source": "measured", "energy_covered": 1.0,
    }  # fmt: skip


def test_an_answer_of_one_token_has_no_energy_per_token() -> None:
    found = Meter(lambda _: sampled(lambda _t: 5.0, 20), 1.0).account(dataclasses.replace(WORK, end_s=12, decoded=0))
    assert found is not None
    assert (found.gross_j, found.decode, found.per_token_j, found.net_per_token_j) == (10, None, None, None)
    assert energy_fields(found)["decode_energy_j"] is None


@pytest.mark.parametrize("readings", [[], powers((10, 5)), powers((15, 5))])
def test_an_answer_of_which_a_part_is_not_known(readings: list[Reading]) -> None:
    early = dataclasses.replace(WORK, start_s=0, first_s=12.5, end_s=19)
    assert Meter(lambda _: readings).account(early) is None
    assert energy_fields(None) == {}


def test_coverage_and_source_of_an_answer_are_those_of_both_parts() -> None:
    parts = [Energy(4.0, None, 2.0, MEASURED, 1.0), Energy(9.0, None, 6.0, ESTIMATED, 0.5)]
    found = RequestEnergy(parts[0], parts[1], decoded=3)
    assert (found.covered, found.source, found.net_per_token_j) == (0.625, ESTIMATED, None)


def test_weights_are_read_once_per_batch_behind_the_boundary_and_per_token_before_it() -> None:
    assert weights_gb(2_000_000_000, 10, 10) == pytest.approx(20)
    assert weights_gb(2_000_000_000, 10, 4) == pytest.approx(8)
    assert weights_gb(2_000_000_000, 10, 4, early_share=0.5) == pytest.approx(10 + 4)


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────

MODEL = PowerModel(static_w=2.0, active_w_per_core=0.75, joule_per_gb=0.25)


def test_the_model_adds_cores_and_traffic_to_what_is_always_used() -> None:
    assert MODEL.power_w(0, 4) == 2
    assert MODEL.power_w(0.5, 4) == 3.5
    assert MODEL.power_w(1, 4, gb_per_s=4) == 6


def test_a_modelled_power_is_labelled_and_never_measured() -> None:
    known, unknown = MODEL.fill([Reading(0, load=0.5), Reading(1)], 4, 2)
    assert (known.power_w, known.power_source) == (4, ESTIMATED)
    assert (unknown.power_w, unknown.power_source) == (None, None)
    fitted = dataclasses.replace(MODEL, label=CALIBRATED)
    assert fitted.fill([Reading(0, load=0)], 4)[0].power_source is CALIBRATED
    with pytest.raises(ValueError, match="not measured"):
        dataclasses.replace(MODEL, label=MEASURED)


def test_without_a_sensor_an_answer_is_modelled() -> None:
    """Prefill at 2 + 3 + 0.25 · 1 W for 2 s, decode at 2 + 3 + 0.25 · 8 W for 5 s; static power is that of idling."""
    readings = [Reading(float(t), load=1.0) for t in range(8, 19)]
    work = dataclasses.replace(WORK, prefill_gb=2, decode_gb=40)
    found = Meter(lambda _: readings, model=MODEL, n_cores=4).account(work)
    assert found is not None
    assert found.decode is not None
    assert (found.prefill.gross_j, found.decode.gross_j) == (pytest.approx(10.5), pytest.approx(35))
    assert (found.source, found.net_per_token_j) == (ESTIMATED, pytest.approx(2.5))


def test_a_sensor_is_believed_before_the_model() -> None:
    readings = [Reading(float(t), load=1.0, power_w=None if t == 12 else 3.0, power_source=MEASURED) for t in range(20)]
    found = Meter(lambda _: readings, model=MODEL, n_cores=4).account(WORK)
    assert found is not None
    assert (found.gross_j, found.source) == (pytest.approx(21), MEASURED)


def test_without_sensor_and_load_a_model_says_nothing() -> None:
    assert Meter(lambda _: [Reading(11.0)], model=MODEL, n_cores=4).account(WORK) is None


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Steady:
    """A sensor whose power and load never change; `enough` is set by its fifth reading."""

    name = "steady"

    def __init__(self, load: float) -> None:
        self._load, self._n = load, 0
        self.enough = threading.Event()

    def read(self, time_s: float) -> Reading:
        self._n += 1
        if self._n >= 5:
            self.enough.set()
        return Reading(time_s, power_w=3.0, power_source=MEASURED, load=self._load)


@pytest.mark.parametrize(("load", "given_w", "idle_w"), [(0.0, None, 3.0), (0.9, None, None), (0.9, 1.5, 1.5)])
def test_the_machine_is_watched_idling_unless_that_is_given(
    load: float, given_w: float | None, idle_w: float | None
) -> None:
    ticks = iter(range(10**9))
    timing = Timing(now=lambda: float(next(ticks)), cpu=lambda: 0.0, wait=lambda stop, _s: stop.wait(0.001))
    sensor, slept = Steady(load), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert sensor.enough.wait(60)

    with run_sampler([sensor], timing) as sampler:
        meter = energy_meter(sampler, given_w, MODEL, sleep=sleep)
        assert meter.idle_w == idle_w
        assert meter.model is MODEL
        assert meter.n_cores >= 1
        if given_w is None:
            assert all(reading.power_w == 3.0 for reading in meter.readings(0.0))
    assert slept == ([] if given_w is not None else [IDLE_WATCH_S])


@pytest.mark.parametrize(("power_w", "n_watches"), [(3.0, 3), (None, 1)])
def test_sensors_that_are_read_seldom_are_watched_for_longer(power_w: float | None, n_watches: int) -> None:
    """One reading per look: three are needed, none are waited for where there is no power."""
    looks, read = threading.Semaphore(0), threading.Semaphore(0)
    ticks = iter(range(10**9))

    class Slow(Steady):
        def read(self, time_s: float) -> Reading:
            return dataclasses.replace(super().read(time_s), power_w=power_w)

    def wait(stop: threading.Event, _seconds: float) -> bool:
        read.release()
        while not looks.acquire(timeout=0.01):
            if stop.is_set():
                return True
        return False

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if slept:
            looks.release()
        slept.append(seconds)
        assert read.acquire(timeout=60)

    timing = Timing(now=lambda: float(next(ticks)), cpu=lambda: 0.0, wait=wait)
    with run_sampler([Slow(0.0)], timing) as sampler:
        meter = energy_meter(sampler, sleep=sleep)
        assert (meter.idle_w, len(slept)) == (power_w, n_watches)


# ── the fit ─────────────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = [(0.0, 0.0), (1.0, 0.0), (0.25, 0.0), (1.0, 4.0), (0.5, 3.0), (0.75, 1.0)]


def points_of(model: PowerModel, n_cores: int = 4, noise_w: float = 0.0) -> list[Point]:
    random = np.random.default_rng(0)
    return [Point(load, gb, model.power_w(load, n_cores, gb) + noise_w * random.normal()) for load, gb in KINDS]


@given(st.floats(0, 50), st.floats(0, 20), st.floats(0, 5))
def test_a_fit_finds_the_coefficients_that_made_the_points(static: float, active: float, traffic: float) -> None:
    found = fit(points_of(PowerModel(static, active, traffic)), 4)
    model = found.model
    assert (model.static_w, model.active_w_per_core, model.joule_per_gb) == pytest.approx(
        (static, active, traffic), abs=1e-7
    )
    assert model.label is CALIBRATED
    assert found.worst_w == pytest.approx(0, abs=1e-7)
    assert found.at_zero == ()


def test_a_noisy_fit_says_how_well_it_fits() -> None:
    found = fit(points_of(MODEL, noise_w=0.05), 4)
    assert found.model.active_w_per_core == pytest.approx(0.75, abs=0.05)
    assert 0.98 < (found.r2 or 0) < 1
    assert 0 < found.rms_w < 0.1
    assert found.rms_w <= found.worst_w == max(abs(r) for r in found.residuals_w)


def test_no_coefficient_is_negative() -> None:
    """Power that falls with traffic: the best that can be said is that traffic costs nothing."""
    points = [dataclasses.replace(p, power_w=p.power_w - 0.6 * p.gb_per_s) for p in points_of(MODEL)]
    found = fit(points, 4)
    assert found.model.joule_per_gb == 0
    assert found.at_zero == ("joule_per_gb",)
    assert min(found.model.static_w, found.model.active_w_per_core) > 0


def test_constant_power_has_no_variance_to_explain() -> None:
    found = fit([Point(load, gb, 3.0) for load, gb in KINDS], 4)
    assert found.model.static_w == pytest.approx(3)
    assert found.r2 is None
    assert fit([Point(load, gb, 0.0) for load, gb in KINDS], 4).model.static_w == 0


@given(st.integers(0, 2**32 - 1))
def test_nonnegative_least_squares_is_optimal(seed: int) -> None:
    """By the conditions of Karush, Kuhn and Tucker: no gradient where x > 0, none that points upwards where x = 0."""
    random = np.random.default_rng(seed)
    design, wanted = random.normal(size=(9, 3)), random.normal(size=9)
    x = nonnegative_least_squares(design, wanted)
    gradient = design.T @ (wanted - design @ x)
    assert x.min() >= 0
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-9
    assert gradient[x == 0].max(initial=0) < 1e-9


@pytest.mark.parametrize(
    ("kinds", "why", "hint"),
    [
        ([], "there are none", "idle"),
        ([(0, 0)], "the load is 0 in all", "while a model generates"),
        ([(1, 0), (1, 4)], "the load is 1 in all", "idle"),
        ([(0, 0), (1, 0), (0.5, 0)], "0 GB/s of weights are read in all", "while a model generates"),
        ([(0, 3), (1, 3), (0.5, 3)], "3 GB/s of weights are read in all", "no model running"),
        ([(0, 0), (1, 4)], "one for each coefficient", "no model running"),
        ([(0.5, 0), (1, 4)], "one for each coefficient", "idle"),
        ([(0, 0), (1, 4), (0.5, 2), (0.25, 1)], "change only together", "no model running"),
        ([(1, 0), (0.5, 2), (0.75, 1)], "change only together", "idle"),
    ],
)
def test_points_that_do_not_determine_the_model(kinds: list[tuple[float, float]], why: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        fit([Point(load, gb, 5.0) for load, gb in kinds], 4)
    assert why in caught.value.message
    assert hint in caught.value.hint


# ── a meter beside a recording ──────────────────────────────────────────────────────────────────────────────────────


def test_recorded_points_pair_mean_power_with_the_load_of_the_same_time() -> None:
    """A reading's load is that of the second before it; the meter is four times as fast, with another clock."""
    loads = [0.0, 0.0, 0.5, 0.5, 1.0]
    readings = [Reading(100.0 + i, load=load) for i, load in enumerate(loads)]
    samples = [(7000 + t / 4, 2 + 4 * loads[math.ceil(t / 4)]) for t in range(16)]
    found = recorded_points(samples, readings, [Traffic(1, 3, 2.5)])
    assert [(p.load, p.gb_per_s) for p in found] == [(0.0, 0.0), (0.5, 2.5), (0.5, 2.5)]
    assert [p.power_w for p in found] == pytest.approx([2, 4, 4], abs=0.3)


def test_a_shift_puts_the_two_clocks_together() -> None:
    readings = [Reading(float(i), load=0.5) for i in range(10)]
    samples = [(float(t), 3.0) for t in range(5)]
    assert len(recorded_points(samples, readings)) == 4
    assert len(recorded_points(samples, readings, shift_s=2.5)) == 3
    assert len(recorded_points(samples[::-1], readings, shift_s=-2)) == 2
    with pytest.raises(UsageError, match="for the same time"):
        recorded_points(samples, readings, shift_s=50)


def test_intervals_in_which_something_is_not_known_are_left_out() -> None:
    readings = [Reading(float(i), load=None if i == 3 else 0.5) for i in range(6)]
    samples = [(float(t), 3.0) for t in range(6)]
    assert len(recorded_points(samples, readings)) == 4
    assert len(recorded_points(samples, readings, [Traffic(0.5, 2.0, 1.0)])) == 3
    hole = [(0.0, 3.0), (1.0, 3.0), (40.0, 3.0)]
    assert len(recorded_points(hole, [Reading(float(i), load=0.5) for i in range(41)])) == 11


@pytest.mark.parametrize(("n_readings", "load", "why"), [(1, 0.5, "too little to pair"), (5, None, "has a load")])
def test_a_recording_without_points(n_readings: int, load: float | None, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        recorded_points([(0.0, 3.0), (9.0, 3.0)], [Reading(float(i), load=load) for i in range(n_readings)])


def test_a_fit_to_a_recording_recovers_the_machine() -> None:
    readings, samples = [Reading(0.0)], [(0.0, MODEL.power_w(0, 4))]
    phases = [(0.0, 0.0), (1.0, 0.0), (1.0, 4.0), (0.5, 3.0)]
    for i, (load, gb) in enumerate(phases):
        for t in range(1, 21):
            readings.append(Reading(20.0 * i + t, load=load))
            samples.append((20.0 * i + t - 0.99, MODEL.power_w(load, 4, gb)))
            samples.append((20.0 * i + t, MODEL.power_w(load, 4, gb)))
    traffic = [Traffic(20.0 * i, 20.0 * (i + 1), gb) for i, (_, gb) in enumerate(phases) if gb]
    model = fit(recorded_points(samples, readings, traffic), 4).model
    assert (model.static_w, model.active_w_per_core, model.joule_per_gb) == pytest.approx((2, 0.75, 0.25), rel=0.01)


# ── a meter's file ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [
        b"time_s,power_w\n0,2.5\n1.5,3\n",
        b"\xef\xbb\xbftime_s,power_w\r\n0,2.5\r\n1.5,3\r\n",
        "time_s\tpower_w\n0\t2.5\n1.5\t3\n".encode("utf-16"),
        b"time_s;power_w\n0;2,5\n1,5;3\n",
        b"power_w|volts|time_s\n2.5|5.1|0\n3|5.1|1.5\n",
        b'"Time_S" , " POWER_W"\n"0","2,5"\n"1.5","3"\n',
        b"\n# a plug\n\ntime_s,power_w\n\n0,2.5\n , \n1.5,3",
        b"time_s,power_w\n0,2.5\ntime_s,power_w\n1.5,3\n",
        b"time_s,power_w,\xb0C\n0,2.5,30\n1.5,3,31,\n",
        b"time,power_w\n0e0,+2.5\n1.5,3.0\n",
    ],
)
def test_a_meters_file_as_programs_write_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "meter.csv"
    path.write_bytes(content)
    log = read_meter(path)
    assert log.samples == ((0.0, 2.5), (1.5, 3.0))
    assert (log.absolute, log.n_skipped) == (False, 0)


def test_other_columns_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    path.write_text("Date;P, total (W);power_w\n2025-01-31T12:00:00Z;4,5;9\n")
    log = read_meter(path, "date", "P, Total (W)")
    assert log.samples == ((1738324800.0, 4.5),)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2025-01-31T12:00:01.5Z", 1.5),
        ("2025-01-31 13:00:01.5+01:00", 1.5),
        ("2025-01-31T12:00:01.123456789+00:00", 1.123456),
        ("2025-01-31T12:00+00:00", 0.0),
    ],
)
def test_iso_times(tmp_path: Path, text: str, seconds: float) -> None:
    path = tmp_path / "meter.csv"
    path.write_text(f"time_s;power_w\n{text};4\n")
    log = read_meter(path)
    assert log.absolute
    assert log.samples[0][0] == pytest.approx(1738324800 + seconds)


def test_an_iso_time_may_have_a_decimal_comma_and_no_zone(tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    path.write_text("time;power_w\n2025-01-31T12:00:01,25;4\n2025-01-31T12:00:02;4\n")
    (first, _), (second, _) = read_meter(path).samples
    assert second - first == 0.75


def test_rows_without_a_value_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    path.write_text("time_s,power_w\n0,2\n1,\n,3\n2\n3,4\n")
    log = read_meter(path)
    assert (log.samples, log.n_skipped) == (((0.0, 2.0), (3.0, 4.0)), 3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"time_s,power_w\n", "has no row"),
        (b"time_s,power_w\n1,\n", "has no row"),
        (b"when,power_w\n0,1\n", "no column time_s or time or timestamp; its first row is: when, power_w"),
        (b"time_s;watt\n0;1\n", "no column power_w; its first row is: time_s, watt"),
        (b"0,1\n1,2\n", "no column"),
        (b"time_s,power_w\n0,two\n", "line 2: 'two' is no power"),
        (b"time_s,power_w\n0,nan\n", "line 2: 'nan' is no power"),
        (b"time_s,power_w\n0,-1\n", "line 2: '-1' is no power"),
        (b'time_s,power_w\n0,"1,234.5"\n', "'1,234.5' is no power"),
        (b"time_s,power_w\n0,1\n\nnoon,1\n", "line 4: 'noon' is no time"),
        (b"time_s,power_w\ninf,1\n", "'inf' is no time"),
        (b"time_s,power_w\n2025-13-31T12:00,1\n", "is no time"),
        (b"time_s,power_w\n2025-01-31T12:00:00Z,1\n5,1\n", "line 3: times are numbers before"),
        (b"time_s,power_w\n\0,1\n", "not a text file"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"time_s,power_w\n" + b"1" * 200_000 + b",1\n", "line 2: field larger"),
    ],
)
def test_files_that_are_no_meters(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "meter.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_meter(path)
    assert why in caught.value.message
    assert caught.value.hint
    assert str(path) in caught.value.message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_meter(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match="is a folder"):
        read_meter(tmp_path)
