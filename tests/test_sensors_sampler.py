"""The sampler keeps the latest readings, survives its sensors and takes no more than its share of a core; recordings
say what was read."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.sensors.reading import Battery, PowerSource, Rail, Reading
from edge_runtime.sensors.recording import Recorder, Replay, parse_reading, read_recording, reading_record
from edge_runtime.sensors.sampler import Sampler, SensorGroup, Timing, next_interval_s, thread_cpu_s

PATIENCE_S = 30.0  # for a thread that hangs because the code is wrong


class FakeSensor:
    """Says what `answer` makes of the time."""

    def __init__(self, answer: Callable[[float], Reading], name: str = "fake") -> None:
        self.name = name
        self._answer = answer

    def read(self, time_s: float) -> Reading:
        return self._answer(time_s)


def thermometer(temp_c: float = 50.0) -> FakeSensor:
    return FakeSensor(lambda t: Reading(t, temp_c=temp_c, sensors=("thermometer",)), "thermometer")


def broken(_time_s: float) -> Reading:
    raise RuntimeError("it fell off")


class Script:
    """Clocks that stand still but for the sampler's waiting, which ends after `n_rounds`."""

    def __init__(self, n_rounds: int, cpu_s: float = 0.0, wall_s: float = 0.0) -> None:
        self.waits: list[float] = []
        self.over = threading.Event()
        self._n_rounds, self._cpu_s, self._wall_s = n_rounds, cpu_s, wall_s
        self._now_s = self._spent_s = 0.0

    def work(self, _reading: Reading) -> None:
        """What a round takes; a listener, so that it is called once a round."""
        self._now_s += self._wall_s
        self._spent_s += self._cpu_s

    def wait(self, _stop: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self._now_s += seconds
        if len(self.waits) < self._n_rounds:
            return False
        self.over.set()
        return True

    @property
    def timing(self) -> Timing:
        return Timing(now=lambda: self._now_s, cpu=lambda: self._spent_s, wait=self.wait)


def sampled(script: Script, *sensors: FakeSensor, **options: Any) -> Sampler:
    """A sampler that has read as often as the script says."""
    sampler = Sampler(sensors, timing=script.timing, listeners=[script.work], **options)
    with sampler:
        assert script.over.wait(PATIENCE_S)
    return sampler


# ── how often ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted_s", "round_cpu_s", "interval_s"),
    [
        (1.0, 0.0, 1.0),
        (1.0, 0.01, 1.0),
        (1.0, 0.02, 2.0),
        (0.1, 0.05, 5.0),
        (1.0, 3.0, 30.0),  # one dear round blinds nobody for long
        (60.0, 0.9, 60.0),
        (60.0, 1000.0, 60.0),
    ],
)
def test_a_dear_round_delays_the_next(wanted_s: float, round_cpu_s: float, interval_s: float) -> None:
    assert next_interval_s(wanted_s, round_cpu_s) == pytest.approx(interval_s)


@given(st.floats(0.1, 100), st.floats(0, 0.3))
def test_the_share_of_a_core_is_kept(wanted_s: float, round_cpu_s: float) -> None:
    interval_s = next_interval_s(wanted_s, round_cpu_s)
    assert interval_s >= wanted_s
    assert round_cpu_s <= 0.01 * interval_s * (1 + 1e-9)


def test_rounds_begin_an_interval_apart_however_long_they_take() -> None:
    script = Script(3, wall_s=0.3)
    assert [r.time_s for r in sampled(script, thermometer()).since(0)] == pytest.approx([0, 1, 2])
    assert script.waits == pytest.approx([0.7] * 3)
    assert sampled(script := Script(2, wall_s=1.5), thermometer()).latest is not None
    assert script.waits == [0, 0]


def test_the_sampler_slows_down_for_dear_sensors() -> None:
    script = Script(3, cpu_s=0.04)
    assert [r.time_s for r in sampled(script, thermometer()).since(0)] == pytest.approx([0, 4, 8])


def test_cpu_time_grows_with_work() -> None:
    before_s = thread_cpu_s()
    assert sum(math.sqrt(i) for i in range(200_000)) > 0
    assert thread_cpu_s() > before_s


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_before_the_first_round_there_is_nothing() -> None:
    sampler = Sampler([thermometer()])
    assert sampler.latest is None
    assert sampler.since(0) == []
    sampler.close()  # though it never began


def test_history_and_latest() -> None:
    sampler = sampled(Script(5), FakeSensor(lambda t: Reading(t, temp_c=40 + t, sensors=("fake",))))
    assert sampler.latest == Reading(4, temp_c=44, sensors=("fake",))
    assert [r.temp_c for r in sampler.since(2)] == [42, 43, 44]
    assert [r.temp_c for r in sampler.since(2.5)] == [42, 43, 44]  # what held at that time is part of it
    assert [r.temp_c for r in sampler.since(-5)] == [40, 41, 42, 43, 44]
    assert [r.temp_c for r in sampler.since(99)] == [44]


def test_history_is_bounded() -> None:
    assert [r.time_s for r in sampled(Script(5), thermometer(), n_history=2).since(0)] == [3, 4]


def test_several_sensors_make_one_reading() -> None:
    load = FakeSensor(lambda t: Reading(t, temp_c=1.0, load=0.5, sensors=("load",)))
    latest = sampled(Script(1), thermometer(), load).latest
    assert latest == Reading(0, temp_c=50, load=0.5, sensors=("thermometer", "load"))


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_power_is_that_of_one_sensor_for_good() -> None:
    """Counters know no power at first and after a gap; the battery's, of the whole machine, must not step in."""

    def counter(t: float) -> Reading:
        return Reading(t, power_w=5.0 if t in (2, 4) else None, temp_c=40.0, sensors=("counter",))

    def battery(t: float) -> Reading:
        return Reading(t, power_w=9.5, power_source=PowerSource.MEASURED, load=0.5, sensors=("battery",))

    group = SensorGroup([FakeSensor(counter, "counter"), FakeSensor(battery, "battery")])
    readings = [group.read(t) for t in (1, 2, 3, 4)]
    assert [r.power_w for r in readings] == [None, 5.0, None, 5.0]
    assert all(r.power_source is None and r.load == 0.5 for r in readings)


def test_a_sensor_that_raises_is_left_out_with_one_warning() -> None:
    warnings: list[str] = []
    sampler = sampled(Script(4), FakeSensor(broken, "loose"), thermometer(), warn=warnings.append)
    assert [r.temp_c for r in sampler.since(0)] == [50] * 4
    (warning,) = warnings
    assert "loose" in warning
    assert "it fell off" in warning


def test_a_listener_that_raises_is_left_out_with_one_warning() -> None:
    heard: list[Reading] = []
    warnings: list[str] = []

    def full(_reading: Reading) -> None:
        raise EdgeError("the disk is full")

    script = Script(3)
    with Sampler([thermometer()], listeners=[full, heard.append], warn=warnings.append, timing=script.timing):
        assert script.over.wait(PATIENCE_S)
    assert len(heard) == 3
    assert len(warnings) == 1
    assert "the disk is full" in warnings[0]


def test_no_sensors_at_all() -> None:
    assert sampled(Script(1)).latest == Reading(0)


def test_closing_ends_a_long_wait() -> None:
    began, before = threading.Event(), threading.active_count()
    with Sampler([thermometer()], interval_s=3600, listeners=[lambda _: began.set()]) as sampler:
        assert began.wait(PATIENCE_S)
        assert sampler.latest is not None
    assert threading.active_count() == before


def test_what_a_hanging_sensor_says_after_the_end_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.sensors.sampler._PATIENCE_S", 0.0)
    asked, answered, over = threading.Event(), threading.Event(), threading.Event()
    heard: list[Reading] = []

    def hang(time_s: float) -> Reading:
        asked.set()
        answered.wait(PATIENCE_S)
        return Reading(time_s)

    def wait(stop: threading.Event, _seconds: float) -> bool:
        over.set()
        return stop.is_set()

    sampler = Sampler([FakeSensor(hang)], listeners=[heard.append], timing=Timing(wait=wait))
    with sampler:
        assert asked.wait(PATIENCE_S)
    answered.set()
    assert over.wait(PATIENCE_S)
    assert heard == []
    assert sampler.latest is None


def test_settling_reads_once_and_waits() -> None:
    times: list[float] = []
    waits: list[float] = []
    group = SensorGroup([FakeSensor(lambda t: times.append(t) or Reading(t))])  # type: ignore[func-returns-value]
    group.settle(lambda: 7.0, waits.append)
    assert times == [7]
    assert len(waits) == 1
    assert waits[0] > 0.1


# ── recordings ──────────────────────────────────────────────────────────────────────────────────────────────────────

FULL = Reading(
    12.25,
    power_w=4.125,
    power_source=PowerSource.CALIBRATED,
    rails=(Rail("VDD_CORE", 1.5), Rail("Übrige", 0.25, PowerSource.ESTIMATED)),
    temp_c=51.2,
    freq_hz=2.4e9,
    throttled_now=frozenset(),
    throttled_since_boot=frozenset({"under-voltage", "throttled"}),
    battery=Battery(80.5, charging=None),
    load=0.1 + 0.2,
    sensors=("pmic", "thermal"),
)

finite = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | finite
reasons = st.none() | st.frozensets(st.text(max_size=5), max_size=3)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)  # what UTF-8 can say
READINGS = st.builds(
    Reading,
    time_s=finite,
    power_w=maybe,
    power_source=st.none() | st.sampled_from(PowerSource),
    rails=st.lists(st.builds(Rail, text, finite, st.sampled_from(PowerSource)), max_size=2).map(tuple),
    temp_c=maybe,
    freq_hz=maybe,
    throttled_now=reasons,
    throttled_since_boot=reasons,
    battery=st.none() | st.builds(Battery, finite, st.sampled_from([None, True, False])),
    load=maybe,
    sensors=st.lists(text, max_size=2).map(tuple),
)


@given(READINGS)
def test_a_reading_comes_back_as_it_was(reading: Reading) -> None:
    back = parse_reading(json.loads(json.dumps(reading_record(reading))))
    assert back == reading
    assert back.power_source is reading.power_source


def test_what_is_not_finite_is_not_known() -> None:
    odd = dataclasses.replace(
        FULL, power_w=math.nan, temp_c=math.inf, rails=(Rail("a", math.nan), Rail("b", 1.0)), battery=Battery(math.nan)
    )
    back = parse_reading(json.loads(json.dumps(reading_record(odd), allow_nan=False)))
    assert (back.power_w, back.temp_c, back.rails, back.battery) == (None, None, (Rail("b", 1.0),), None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "day.jsonl"


def record(path: Path, *readings: Reading) -> Path:
    with Recorder(path, "a board", overwrite=True) as recorder:
        for reading in readings:
            recorder.append(reading)
        assert recorder.n_readings == len(readings)
    return path


def test_a_recording_comes_back_as_it_was(path: Path) -> None:
    later = Reading(13.0)
    recording = read_recording(record(path, FULL, later))
    assert recording.machine == "a board"
    assert recording.readings == (FULL, later)


def test_each_reading_is_there_as_soon_as_it_is_written(path: Path) -> None:
    with Recorder(path, "a board") as recorder:
        recorder.append(FULL)
        assert read_recording(path).readings == (FULL,)


def test_a_recording_is_not_overwritten_unasked(path: Path) -> None:
    record(path, FULL)
    with pytest.raises(UsageError, match="is there already"):
        Recorder(path, "another")
    assert read_recording(path).machine == "a board"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none/day\.jsonl cannot be written: No such file"):
        Recorder(tmp_path / "none" / "day.jsonl", "a board")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_recording(tmp_path / "none")


def test_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(EdgeError, match="No space left"):
        Recorder(Path("/dev/full"), "a board", overwrite=True)


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_a_last_line_cut_short_is_left_out(path: Path, cut: int) -> None:
    whole = record(path, FULL, FULL).read_bytes()
    path.write_bytes(whole[:-cut])
    warnings: list[str] = []
    recording = read_recording(path, warnings.append)
    if cut == 1:  # all but the newline
        assert (len(recording.readings), warnings) == (2, [])
    else:
        assert (len(recording.readings), warnings) == (1, [f"{path}, line 3: cut short, and left out"])


HEADER = '{"format": "edge-runtime sensors", "version": 1, "machine": "m"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "line 1: this is no recording"),
        ("[]\n", "line 1: this is no recording"),
        (HEADER[:30], "line 1: this is no recording"),
        ('{"format": "csv"}\n', "line 1: this is no recording"),
        ("\x00\x01\x02", "line 1: this is no recording"),
        (HEADER.replace("1", "2"), "line 1: the format has version 2, and 1 can be read"),
        (HEADER.replace('"m"', "7"), "line 1: the machine's description is missing"),
        (HEADER, "without readings"),
        (HEADER + "nonsense\n{}\n", "line 2: not JSON"),
        (HEADER + "\n", "line 2: not JSON"),
        (HEADER + "[" * 100_000 + "\n", "line 2: not JSON"),
        (HEADER + "7\n", "line 2: a reading is a JSON object"),
        (HEADER + "{}\n", 'line 2: "time_s" is missing'),
        (HEADER + '{"time_s": true}\n', 'line 2: "time_s" is not a finite number'),
        (HEADER + '{"time_s": 1e999}\n', 'line 2: "time_s" is not a finite number'),
        (HEADER + '{"time_s": 1' + "0" * 400 + "}\n", 'line 2: "time_s" is not a finite number'),
        (HEADER + '{"time_s": 1}\n{"time_s": 0.5}\n', 'line 3: "time_s" is 0.5, earlier than 1.0'),
        (HEADER + '{"time_s": 1, "power": 2}\n', 'line 2: a reading has no field "power"; it has time_s, power_w'),
        (HEADER + '{"time_s": 1, "power_w": "2"}\n', 'line 2: "power_w" is not a finite number'),
        (HEADER + '{"time_s": 1, "power_source": "guessed"}\n', '"guessed", not measured or calibrated or estimated'),
        (HEADER + '{"time_s": 1, "power_source": []}\n', '"power_source" is not a text'),
        (HEADER + '{"time_s": 1, "rails": {}}\n', '"rails" is not a list'),
        (HEADER + '{"time_s": 1, "rails": [{"power_w": 2}]}\n', '"name" is missing'),
        (HEADER + '{"time_s": 1, "throttled_now": [1]}\n', '"throttled_now" is not a list of texts'),
        (HEADER + '{"time_s": 1, "battery": 80}\n', "a battery is a JSON object"),
        (HEADER + '{"time_s": 1, "battery": {"percent": 80, "charging": 1}}\n', '"charging" is not true'),
        (HEADER + " " * 2**20 + "\n", "line 2: longer than 1048576 bytes"),
    ],
    ids=lambda value: value[-40:],
)
def test_what_is_wrong_with_a_recording_is_said_with_its_line(path: Path, content: str, words: str) -> None:
    path.write_text(content)
    with pytest.raises(EdgeError) as caught:
        read_recording(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(HEADER.encode() + b'{"time_s": 1, "sensors": ["\xff"]}\n')
    with pytest.raises(EdgeError, match="line 2: not JSON, or not UTF-8"):
        read_recording(path)


def test_a_line_written_by_hand_may_leave_out_what_is_not_known(path: Path) -> None:
    path.write_text(HEADER + '{"time_s": 1, "power_w": 3, "rails": [{"name": "a", "power_w": 3}]}')
    assert read_recording(path).readings == (Reading(1, power_w=3, rails=(Rail("a", 3),)),)


# ── replays ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_replay_says_what_was_said_at_that_time() -> None:
    recorded = [Reading(100 + t, temp_c=40 + t, sensors=("thermal",)) for t in (0, 1, 2, 5)]
    replay = Replay(recorded)
    assert not replay.ended(1e9)  # it has not begun
    said = {t: replay.read(7 + t) for t in (0, 0.9, 1, 4.9, 5, 5.9, 6)}
    assert {t: r.temp_c for t, r in said.items()} == {0: 40, 0.9: 40, 1: 41, 4.9: 42, 5: 45, 5.9: 45, 6: None}
    assert said[1] == Reading(8, temp_c=41, sensors=("thermal",))
    assert said[6] == Reading(13)
    assert [replay.ended(7 + t) for t in (0, 5.9, 6)] == [False, False, True]


def test_a_replay_of_one_reading() -> None:
    replay = Replay([FULL])
    assert replay.read(0) == dataclasses.replace(FULL, time_s=0)
    assert not replay.ended(0.5)
    assert replay.ended(1.0)


def test_a_replay_keeps_all_that_a_group_of_sensors_passes_on() -> None:
    assert SensorGroup([Replay([FULL])]).read(3) == dataclasses.replace(FULL, time_s=3)
