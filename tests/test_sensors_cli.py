"""`edge-run sensors`: what it shows, records and replays, and how it ends."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from edge_runtime import sensors_view
from edge_runtime.errors import UsageError
from edge_runtime.profiles import Profile
from edge_runtime.sensors.machine import Machine, Sensor
from edge_runtime.sensors.reading import Battery, PowerSource, Rail, Reading
from edge_runtime.sensors.recording import Recorder, parse_reading, read_recording
from edge_runtime.sensors_view import SensorsRequest, entries, show_sensors, summary, table

from .cli_helpers import Result, RunCli, assert_clean, environment, finish, program, runner, start

FULL = Reading(
    5.0,
    power_w=4.125,
    power_source=PowerSource.CALIBRATED,
    rails=(Rail("VDD_CORE", 1.5),),
    temp_c=51.23,
    freq_hz=2.4e9,
    throttled_now=frozenset({"throttled", "under-voltage"}),
    throttled_since_boot=frozenset(),
    battery=Battery(80.4, charging=True),
    load=0.354,
    sensors=("pmic", "thermal"),
)


class FakeSensor:
    """Grows a degree warmer with each reading."""

    name = "fake"

    def __init__(self) -> None:
        self._temps = itertools.count(39)  # the reading that only settles is not shown

    def read(self, time_s: float) -> Reading:
        return Reading(time_s, temp_c=next(self._temps), sensors=(self.name,))


class FakeTime:
    """A clock that only sleeping moves, and someone who presses Ctrl-C in the nth sleep."""

    def __init__(self, interrupted_sleep: int | None = None) -> None:
        self.slept: list[float] = []
        self._interrupted_sleep = interrupted_sleep

    def now(self) -> float:
        return 100.0 + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) == self._interrupted_sleep:
            raise KeyboardInterrupt


Patch = Callable[..., FakeTime]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """faked(sensors, interrupted_sleep=…): the verb has these sensors and a fake time, which is returned."""

    def patch(sensors: Sequence[Sensor] | None = None, interrupted_sleep: int | None = None) -> FakeTime:
        def find(_machine: Machine, _profile: Profile) -> list[Sensor]:
            return [FakeSensor()] if sensors is None else list(sensors)

        time = FakeTime(interrupted_sleep)
        verb = functools.partial(show_sensors, find=find, now=time.now, sleep=time.sleep)
        monkeypatch.setattr(sensors_view, "show_sensors", verb)
        return time

    return patch


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.jsonl"
    with Recorder(path, "A Board") as recorder:
        for t in range(3):
            recorder.append(Reading(50.0 + t, temp_c=40.0 + t, sensors=("thermal",)))
    return path


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_has_examples(run: RunCli) -> None:
    result = run("sensors", "--help")
    assert_clean(result, 0)
    assert "Examples:\n    edge-run sensors" in result.out
    assert "sensors" in run("--help").out.split()


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import atexit, sys; atexit.register(lambda: print({'numpy', 'llama_cpp', 'rich.live'} & set(sys.modules)))"
    )
    result = finish(start(program("sensors", "--help", script=script)))
    assert_clean(result, 0)
    assert result.out.endswith("set()\n")


def test_all_a_reading_tells() -> None:
    assert entries(FULL) == [
        ("temperature", "51.2 °C"),
        ("power", "4.12 W calibrated"),
        ("  VDD_CORE", "1.50 W measured"),
        ("clock", "2.40 GHz"),
        ("load", "35%"),
        ("throttled now", "throttled, under-voltage"),
        ("  since boot", "no"),
        ("battery", "80%, charging"),
        ("sensors", "pmic, thermal"),
    ]
    assert summary(FULL) == (
        "51.2 °C, 4.12 W calibrated, 2.40 GHz, 35% busy, throttled: throttled, under-voltage, since boot: no, "
        "battery 80%, charging"
    )


def test_what_is_not_known_is_not_zero() -> None:
    assert {text for name, text in entries(Reading(0)) if name != "sensors"} == {"-"}
    assert summary(Reading(0)) == "nothing is known"
    assert "0.00 W" in summary(Reading(0, power_w=0.0))


def test_rails_are_told_where_there_is_no_total() -> None:
    assert summary(Reading(0, rails=(Rail("gpu", 2), Rail("cpu", 1)))) == "gpu 2.00 W, cpu 1.00 W"


def drawn(reading: Reading, title: str = "A Board", *, colour: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=colour, color_system="standard" if colour else None).print(
        table(reading, title)
    )
    return out.getvalue()


def test_the_table() -> None:
    lines = [line.split(maxsplit=1) for line in drawn(FULL).splitlines()]
    assert ["power", "4.12 W calibrated"] in [[word.strip() for word in line] for line in lines]
    assert drawn(FULL).startswith("A Board")
    assert "\x1b[31mthrottled, under-voltage" in drawn(FULL, colour=True)
    assert "\x1b[31m" not in drawn(Reading(0, throttled_now=frozenset()), colour=True)


def test_names_cannot_command_a_terminal() -> None:
    evil = Reading(
        0, rails=(Rail("[red]a\x1b[2J", 1.0),), throttled_now=frozenset({"\x1b[2J"}), sensors=("\x1b]0;x\x07",)
    )
    assert "\x1b" not in drawn(evil, "\x1b[2J") + summary(evil)
    assert "[red]a" in drawn(evil)


def test_once_is_a_table(run: RunCli, faked: Patch) -> None:
    time = faked()
    result = run("sensors", "--once")
    assert_clean(result, 0)
    assert "temperature    40.0 °C" in result.out
    assert len(time.slept) == 1  # so that counters count


def test_a_pipe_gets_lines(run: RunCli, faked: Patch) -> None:
    time = faked()
    result = run("sensors", "--count", 3, "--interval", 2)
    assert_clean(result, 0)
    assert result.out.splitlines() == ["     0.0 s  40.0 °C", "     2.0 s  41.0 °C", "     4.0 s  42.0 °C"]
    assert time.slept[1:] == [2, 2]  # nobody waits after the last one


def test_json_is_an_object_per_reading(run: RunCli, faked: Patch) -> None:
    faked()
    result = run("sensors", "--json", "--count", 2)
    assert_clean(result, 0)
    assert result.err == ""
    readings = [parse_reading(json.loads(line)) for line in result.out.splitlines()]
    assert [r.temp_c for r in readings] == [40, 41]
    assert json.loads(result.out.splitlines()[0])["power_w"] is None


def test_a_recorded_tree(run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("61500\n")
    time = FakeTime()
    verb = functools.partial(show_sensors, now=time.now, sleep=time.sleep)
    monkeypatch.setattr(sensors_view, "show_sensors", verb)
    result = run("sensors", "--root", tmp_path, "--json", "--once")
    assert_clean(result, 0)
    reading = parse_reading(json.loads(result.out))
    assert (reading.temp_c, reading.sensors) == (61.5, ("thermal",))


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


class Silent:
    name = "silent"

    def read(self, time_s: float) -> Reading:
        return Reading(time_s)


class Broken:
    name = "broken"

    def read(self, time_s: float) -> Reading:
        raise RuntimeError("it fell off")


@pytest.mark.parametrize("sensors", [[], [Silent()]])
def test_no_sensor_answers(run: RunCli, faked: Patch, tmp_path: Path, sensors: list[Sensor]) -> None:
    faked(sensors)
    result = run("sensors", "--record", tmp_path / "new.jsonl")
    assert_clean(result, 1)
    assert "no sensor of this machine answers" in result.err
    assert not (tmp_path / "new.jsonl").exists()
    assert f"hint: {tmp_path} stands for /" in run("sensors", "--root", tmp_path).err


def test_a_sensor_that_breaks_is_said_once(run: RunCli, faked: Patch) -> None:
    faked([Broken(), FakeSensor()])
    result = run("sensors", "--count", 3)
    assert_clean(result, 0)
    assert result.err.count("warning: the sensor broken is read no more") == 1
    assert len(result.out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--once", "--count", 2), "--once and --count exclude each other"),
        (("--force",), "--force means nothing without --record"),
        (("--replay", "a", "--record", "b"), "--replay and --record exclude each other"),
        (("--replay", "a", "--root", "/"), "--replay and --root exclude each other"),
        (("--root", "/no/such/folder"), "/no/such/folder is no folder"),
        (("--replay", "/no/such/file"), "/no/such/file cannot be read: No such file"),
        (("--interval", "0"), "interval"),
        (("--interval", "nan"), "interval"),
        (("--count", "0"), "count"),
    ],
)
def test_requests_that_cannot_be_met(run: RunCli, faked: Patch, arguments: tuple[object, ...], words: str) -> None:
    faked()
    result = run("sensors", *arguments)
    assert_clean(result, 2)
    assert words in result.err
    assert result.out == ""


def test_a_damaged_recording(run: RunCli, faked: Patch, recording: Path) -> None:
    faked()
    recording.write_text(recording.read_text().replace("41.0", '"hot"'))
    result = run("sensors", "--replay", recording)
    assert_clean(result, 1)
    assert f'{recording}, line 3: "temp_c" is not a finite number' in result.err


# ── recording and replaying ─────────────────────────────────────────────────────────────────────────────────────────


def test_recording(run: RunCli, faked: Patch, tmp_path: Path) -> None:
    faked()
    path = tmp_path / "new.jsonl"
    result = run("sensors", "--record", path, "--json", "--count", 2)
    assert_clean(result, 0)
    assert f"2 readings in {path}" in result.err
    shown = tuple(parse_reading(json.loads(line)) for line in result.out.splitlines())
    assert read_recording(path).readings == shown


def test_a_recording_is_overwritten_only_by_force(run: RunCli, faked: Patch, recording: Path) -> None:
    faked()
    before = recording.read_bytes()
    result = run("sensors", "--record", recording, "--once")
    assert_clean(result, 2)
    assert "--force" in result.err
    assert recording.read_bytes() == before
    assert_clean(run("sensors", "--record", recording, "--once", "--force"), 0)
    assert [r.temp_c for r in read_recording(recording).readings] == [40]


def test_a_replay_takes_as_long_as_the_recording_and_ends(run: RunCli, faked: Patch, recording: Path) -> None:
    time = faked()
    result = run("sensors", "--replay", recording)
    assert_clean(result, 0)
    assert result.out.splitlines() == ["     0.0 s  40.0 °C", "     1.0 s  41.0 °C", "     2.0 s  42.0 °C"]
    assert sum(time.slept) == 3
    assert "A Board (a recording)" in run("sensors", "--replay", recording, "--once").out


def test_a_replay_of_a_recording_cut_short_warns(run: RunCli, faked: Patch, recording: Path) -> None:
    faked()
    recording.write_bytes(recording.read_bytes()[:-9])
    result = run("sensors", "--replay", recording)
    assert_clean(result, 0)
    assert len(result.out.splitlines()) == 2
    assert result.err == f"warning: {recording}, line 4: cut short, and left out\n"


# ── how it ends ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("interrupted_sleep", "n_readings"), [(1, 0), (2, 1), (3, 2)])
def test_ctrl_c_is_how_it_is_meant_to_end(
    run: RunCli, faked: Patch, tmp_path: Path, interrupted_sleep: int, n_readings: int
) -> None:
    faked(interrupted_sleep=interrupted_sleep)
    path = tmp_path / "new.jsonl"
    result = run("sensors", "--record", path)
    assert_clean(result, 0)
    assert len(result.out.splitlines()) == n_readings
    if n_readings:
        assert len(read_recording(path).readings) == n_readings


def test_ctrl_c_leaves_whole_lines(recording: Path) -> None:
    process = start(program("sensors", "--replay", recording, "--json"))
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert_clean(result, 0)
    for line in (first.decode() + result.out).splitlines():
        parse_reading(json.loads(line))


def test_a_reader_that_leaves_ends_the_program_quietly(recording: Path) -> None:
    with start(program("sensors", "--replay", recording, "--json", "--interval", 0.1)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == b""


def test_a_terminal_has_its_cursor_back_after_ctrl_c(recording: Path) -> None:
    result = in_terminal(program("sensors", "--replay", recording), until="40.0 °C")
    assert_clean(result, 0)
    assert "A Board (a recording); Ctrl-C ends" in result.out
    assert "\x1b[?25l" in result.out  # hidden while the table lives
    assert result.out.rindex("\x1b[?25h") > result.out.rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_lines(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    result = in_terminal(program("sensors", "--replay", recording), until="40.0 °C")
    assert_clean(result, 0)
    assert "0.0 s  40.0 °C" in result.out
    assert "\x1b" not in result.out


def in_terminal(command: Sequence[str], until: str) -> Result:
    """Run a program whose output is a terminal, and press Ctrl-C as soon as it has written `until`."""
    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment()}
    variables.pop("FORCE_COLOR", None)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, env=variables, start_new_session=True
    ) as process:
        os.close(theirs)
        written = b""
        while until.encode() not in written:
            written += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # how Linux says that nobody is left at the other end
                break
            if not data:
                break
            written += data
        os.close(ours)
        errors = process.stderr.read().decode()
        return Result(process.wait(timeout=120), written.decode(errors="replace"), errors)


def test_a_request_is_checked_before_anything_is_read() -> None:
    with pytest.raises(UsageError):
        show_sensors(SensorsRequest(once=True, count=1), find=lambda *_: pytest.fail("it looked for sensors"))
