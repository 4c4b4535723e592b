"""Raspberry Pi, Jetson and Mac: the sensors on recorded trees of each board, whole ones and hostile ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.profiles import PowerFit
from edge_runtime.sensors.apple import AppleChip, ApplePressure, find_apple
from edge_runtime.sensors.jetson import JetsonPower, JetsonTemperature, JetsonThrottle, find_jetson
from edge_runtime.sensors.machine import Machine, Sensor
from edge_runtime.sensors.raspberry import RaspberryBoard, RaspberryPower, find_raspberry
from edge_runtime.sensors.reading import PowerSource, Rail, Reading, combine
from tests import board_trees
from tests.board_trees import ORIN_EVENTS, ORIN_RAILS, Commands, Losing

Tree = Callable[[Path], Machine]
NONE: frozenset[str] = frozenset()


def read_all(sensors: list[Sensor]) -> Reading:
    return combine(3.0, [sensor.read(3.0) for sensor in sensors])


def find_all(machine: Machine, system: str = "Linux") -> list[Sensor]:
    return find_raspberry(machine) + find_jetson(machine) + find_apple(machine, system)


def answering(machine: Machine, **answers: str | None) -> Machine:
    """The machine with other answers: get_throttled="…" for what starts with "vcgencmd get_throttled"."""
    assert isinstance(machine.run, Commands)
    others = {f"vcgencmd {name}": answer for name, answer in answers.items()}
    return replace(machine, run=Commands({**machine.run.answers, **others}))


def names(sensors: list[Sensor]) -> list[str]:
    return [sensor.name for sensor in sensors]


# --- detection ---


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (board_trees.raspberry_pi_4, ["raspberry-pi"]),
        (board_trees.raspberry_pi_5, ["raspberry-pi", "raspberry-pi-pmic"]),
        (board_trees.jetson_nano, ["jetson-ina3221", "jetson-thermal"]),
        (board_trees.jetson_orin_nano, ["jetson-ina3221", "jetson-thermal", "jetson-throttle"]),
    ],
)
def test_each_board_gets_its_own_sensors(tmp_path: Path, tree: Tree, expected: list[str]) -> None:
    assert names(find_all(tree(tmp_path))) == expected


def test_a_mac_is_known_by_its_system(tmp_path: Path) -> None:
    machine = board_trees.apple_silicon(tmp_path)
    assert names(find_all(machine, "Darwin")) == ["macmon", "apple-thermal-pressure"]
    assert find_all(machine, "Linux") == []


def test_an_empty_machine_has_none(tmp_path: Path) -> None:
    assert find_all(Machine(tmp_path / "nowhere", Commands())) == []


def test_detection_of_a_mac_starts_no_program(tmp_path: Path) -> None:
    commands = Commands()
    find_apple(Machine(tmp_path, commands), "Darwin")
    assert commands.asked == []


def test_a_compute_module_5_has_the_power_chip_too(tmp_path: Path) -> None:
    board_trees.device_tree(tmp_path, "Raspberry Pi Compute Module 5 Rev 1.0", "raspberrypi,5-cm", "brcm,bcm2712")
    assert "raspberry-pi-pmic" in names(find_raspberry(Machine(tmp_path, Commands())))


def test_a_nano_without_power_sensor_has_only_its_temperature(tmp_path: Path) -> None:
    board_trees.device_tree(tmp_path, "NVIDIA Jetson Nano 2GB Developer Kit", "nvidia,tegra210")
    assert names(find_jetson(Machine(tmp_path, Commands()))) == ["jetson-thermal"]


# --- Raspberry Pi ---


def test_pi_4(tmp_path: Path) -> None:
    reading = read_all(find_raspberry(board_trees.raspberry_pi_4(tmp_path)))
    assert reading == Reading(
        3.0, temp_c=48.199, throttled_now=NONE, throttled_since_boot=NONE, sensors=("raspberry-pi",)
    )


def test_pi_5(tmp_path: Path) -> None:
    reading = read_all(find_raspberry(board_trees.raspberry_pi_5(tmp_path)))
    assert reading.power_w == pytest.approx(1.1451 * board_trees.PMIC_SUM_W + 0.5879, abs=1e-4)
    assert reading.power_source is PowerSource.CALIBRATED
    assert reading.temp_c == 80.35
    assert reading.throttled_now == {"soft-temperature-limit"}
    assert reading.throttled_since_boot == {"under-voltage", "throttled", "soft-temperature-limit"}
    assert reading.sensors == ("raspberry-pi", "raspberry-pi-pmic")


def test_pi_5_rails_are_measured_and_leave_out_the_supply_and_the_clock(tmp_path: Path) -> None:
    reading = RaspberryPower(board_trees.raspberry_pi_5(tmp_path)).read(0.0)
    by_name = {rail.name: rail for rail in reading.rails}
    assert len(by_name) == 12
    assert not {"EXT5V", "BATT"} & by_name.keys()
    assert by_name["VDD_CORE"].power_w == pytest.approx(1.87674 * 0.8974594)
    assert {rail.source for rail in reading.rails} == {PowerSource.MEASURED}


def test_the_fit_can_be_another_board_s(tmp_path: Path) -> None:
    *_, power = find_raspberry(board_trees.raspberry_pi_5(tmp_path), PowerFit(slope=2.0, offset_w=1.0))
    assert power.read(0.0).power_w == pytest.approx(2 * board_trees.PMIC_SUM_W + 1, abs=1e-4)


def test_pi_asks_each_question_once(tmp_path: Path) -> None:
    machine = board_trees.raspberry_pi_5(tmp_path)
    read_all(find_raspberry(machine))
    assert isinstance(machine.run, Commands)
    assert machine.run.asked == ["vcgencmd get_throttled", "vcgencmd pmic_read_adc"]


@pytest.mark.parametrize(
    ("answer", "now", "since_boot"),
    [
        ("throttled=0x0", NONE, NONE),
        ("throttled=0x1\n", {"under-voltage"}, NONE),
        ("throttled=0x2\n", {"frequency-capped"}, NONE),
        ("throttled=0x4\n", {"throttled"}, NONE),
        ("throttled=0x8\n", {"soft-temperature-limit"}, NONE),
        ("throttled=0x50005\n", {"under-voltage", "throttled"}, {"under-voltage", "throttled"}),
        ("throttled=0xA0000\n", NONE, {"frequency-capped", "soft-temperature-limit"}),
        ("throttled=0xfff0fff0\n", NONE, NONE),  # only bits without a meaning
    ],
)
def test_pi_throttle_bits(tmp_path: Path, answer: str, now: set[str], since_boot: set[str]) -> None:
    reading = RaspberryBoard(answering(board_trees.raspberry_pi_4(tmp_path), get_throttled=answer)).read(0.0)
    assert (reading.throttled_now, reading.throttled_since_boot) == (now, since_boot)


@pytest.mark.parametrize(
    "answer", [None, "", "throttled=", "throttled=50005", "throttled=0x", "throttled=0xzz", "throttled=-0x1", "\0\0"]
)
def test_pi_without_a_sane_answer_is_not_known_to_run_free(tmp_path: Path, answer: str | None) -> None:
    reading = RaspberryBoard(answering(board_trees.raspberry_pi_4(tmp_path), get_throttled=answer)).read(0.0)
    assert (reading.throttled_now, reading.throttled_since_boot) == (None, None)
    assert reading.temp_c == 48.199


def test_without_vcgencmd_the_kernel_s_alarm_tells_of_an_under_voltage(tmp_path: Path) -> None:
    machine = replace(board_trees.raspberry_pi_4(tmp_path), run=Commands())
    board_trees.hwmon(tmp_path, "virtual/other", 0, "cpu_thermal", {"in0_lcrit_alarm": 1})
    assert RaspberryBoard(machine).read(0.0).throttled_now is None
    board_trees.write(tmp_path, {"sys/class/hwmon/hwmon1/in0_lcrit_alarm": 1})
    reading = RaspberryBoard(machine).read(0.0)
    assert reading.throttled_now == reading.throttled_since_boot == {"under-voltage"}


def test_vcgencmd_is_believed_over_the_kernel(tmp_path: Path) -> None:
    machine = board_trees.raspberry_pi_4(tmp_path)
    board_trees.write(tmp_path, {"sys/class/hwmon/hwmon1/in0_lcrit_alarm": 1})
    assert RaspberryBoard(machine).read(0.0).throttled_now == NONE


@pytest.mark.parametrize("temp_mc", ["", "hot", "-274000", "999999", "nan", "inf", "0"])
def test_pi_with_an_absurd_zone_asks_the_firmware(tmp_path: Path, temp_mc: str) -> None:
    machine = board_trees.raspberry_pi_4(tmp_path)
    board_trees.write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": temp_mc})
    assert RaspberryBoard(machine).read(0.0).temp_c == 48.2


@pytest.mark.parametrize("answer", [None, "", "temp=", "temp=48.2", "temp=999.0'C", "temp=-273.1'C", "temp=NaN'C"])
def test_pi_without_any_temperature(tmp_path: Path, answer: str | None) -> None:
    machine = answering(board_trees.raspberry_pi_4(tmp_path), measure_temp=answer)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
    assert RaspberryBoard(machine).read(0.0).temp_c is None


def test_pi_that_answers_nothing_names_no_sensor(tmp_path: Path) -> None:
    board_trees.device_tree(tmp_path, "Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712")
    sensors = find_raspberry(Machine(tmp_path, Commands()))
    assert len(sensors) == 2
    assert read_all(sensors) == Reading(3.0)


CORE_A, CORE_V = "VDD_CORE_A current(7)=1.87674000A", "VDD_CORE_V volt(15)=0.89745940V"


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        (CORE_A, ""),  # half of a rail
        (CORE_V, ""),
        (CORE_A, "VDD_CORE_A current(7)=1.87674000"),  # no unit
        (CORE_V, "VDD_CORE_V volt(15)=0.89745940A"),  # the wrong unit
        (CORE_V, "VDD_CORE_V volt(15)=-0.8974594V"),
        (CORE_A, "VDD_CORE_A current(7)=1876740A"),  # absurd
        (CORE_A, "VDD_CORE_A current(7)=nanA"),
        (CORE_A, f"VDD_CORE_A current(7)={'9' * 400}A"),
        (CORE_A + "\n", "VDD_CORE_A\n"),
    ],
)
def test_pi_5_with_a_broken_rail_has_the_others_but_no_total(tmp_path: Path, line: str, instead: str) -> None:
    assert line in board_trees.PMIC
    machine = answering(board_trees.raspberry_pi_5(tmp_path), pmic_read_adc=board_trees.PMIC.replace(line, instead))
    reading = RaspberryPower(machine).read(0.0)
    assert (reading.power_w, reading.power_source) == (None, None)
    assert len(reading.rails) == 11
    assert "VDD_CORE" not in [rail.name for rail in reading.rails]


@pytest.mark.parametrize("n_lines", range(24))
def test_pi_5_with_output_cut_short_has_no_total(tmp_path: Path, n_lines: int) -> None:
    cut = "\n".join(board_trees.PMIC.splitlines()[:n_lines])
    reading = RaspberryPower(answering(board_trees.raspberry_pi_5(tmp_path), pmic_read_adc=cut)).read(0.0)
    assert reading.power_w is None
    assert len(reading.rails) == max(0, n_lines - 12)


@pytest.mark.parametrize(
    "answer", [None, "", "error=1", "EXT5V_V volt(24)=5.06788000V", "X_A current(0)=0.0A\nX_V volt(1)=1V"]
)
def test_pi_5_without_rails_or_current_has_no_power(tmp_path: Path, answer: str | None) -> None:
    reading = RaspberryPower(answering(board_trees.raspberry_pi_5(tmp_path), pmic_read_adc=answer)).read(0.0)
    assert (reading.power_w, reading.power_source) == (None, None)


def test_a_fit_that_gives_no_power_gives_none(tmp_path: Path) -> None:
    machine = board_trees.raspberry_pi_5(tmp_path)
    for fit in (PowerFit(1.0, -50.0), PowerFit(1e6, 0.0), PowerFit(float("nan"), 0.0)):
        reading = RaspberryPower(machine, fit).read(0.0)
        assert (reading.power_w, reading.power_source) == (None, None)


# --- Jetson ---


def test_nano(tmp_path: Path) -> None:
    reading = read_all(find_jetson(board_trees.jetson_nano(tmp_path)))
    assert (reading.power_w, reading.power_source) == (5.5, PowerSource.MEASURED)
    assert reading.rails == (Rail("POM_5V_IN", 5.5), Rail("POM_5V_GPU", 0.16), Rail("POM_5V_CPU", 2.48))
    assert reading.temp_c == 46.5  # not PMIC-Die, which says 100 °C always
    assert reading.throttled_now is None


def test_orin(tmp_path: Path) -> None:
    sensors = find_jetson(board_trees.jetson_orin_nano(tmp_path))
    first, second = read_all(sensors), read_all(sensors)
    assert (first.power_w, first.power_source) == (9.6, PowerSource.MEASURED)
    assert [rail.name for rail in first.rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert [rail.power_w for rail in first.rails] == pytest.approx([9.6, 2.496, 1.4952])
    assert first.temp_c == 56.312
    assert (first.throttled_now, first.throttled_since_boot) == (None, None)
    assert (second.throttled_now, second.throttled_since_boot) == (NONE, None)
    assert first.sensors == ("jetson-ina3221", "jetson-thermal", "jetson-throttle")


def test_nano_s_rails_move_between_readings(tmp_path: Path) -> None:
    sensor = JetsonPower(board_trees.jetson_nano(tmp_path))
    assert sensor.read(0.0).power_w == 5.5
    board_trees.nano_rails(tmp_path, {"POM_5V_CPU": 2000, "POM_5V_GPU": 100, "POM_5V_IN": 5000})
    assert sensor.read(1.0).power_w == 5.0


def test_orin_s_rails_and_chips_move_between_readings(tmp_path: Path) -> None:
    sensor = JetsonPower(board_trees.jetson_orin_nano(tmp_path))
    assert sensor.read(0.0).power_w == 9.6
    board_trees.orin_rails(tmp_path, {"VDD_SOC": (5000, 100), "VDD_IN": (5000, 1000), "VDD_CPU_GPU_CV": (5000, 300)})
    (tmp_path / ORIN_RAILS).rename((tmp_path / ORIN_RAILS).with_name("hwmon4"))
    assert sensor.read(1.0).power_w == 5.0


@pytest.mark.parametrize("power_mw", ["", "garbage", "5.5 W", "-5500", "1e9", "nan", "inf", "0x10"])
def test_nano_with_an_absurd_total_has_the_other_rails_only(tmp_path: Path, power_mw: str) -> None:
    machine = board_trees.jetson_nano(tmp_path)
    board_trees.nano_rails(tmp_path, {"POM_5V_IN": power_mw})
    reading = JetsonPower(machine).read(0.0)
    assert (reading.power_w, reading.power_source) == (None, None)
    assert [rail.name for rail in reading.rails] == ["POM_5V_GPU", "POM_5V_CPU"]


@pytest.mark.parametrize(
    ("voltage_mv", "current_ma"),
    [("", 1), (5000, ""), ("5000 mV", 1), (-5000, -100), (5000, -8), (5000, "1e9"), ("nan", 1), ("1e200", "1e200")],
)
def test_orin_with_an_absurd_channel_leaves_it_out(tmp_path: Path, voltage_mv: object, current_ma: object) -> None:
    machine = board_trees.jetson_orin_nano(tmp_path)
    board_trees.orin_rails(tmp_path, {"VDD_IN": (voltage_mv, current_ma)})
    reading = JetsonPower(machine).read(0.0)
    assert (reading.power_w, reading.power_source) == (None, None)
    assert [rail.name for rail in reading.rails] == ["VDD_CPU_GPU_CV", "VDD_SOC"]


def test_a_total_of_nothing_is_no_total(tmp_path: Path) -> None:
    machine = board_trees.jetson_orin_nano(tmp_path)
    board_trees.orin_rails(tmp_path, {"VDD_IN": (5000, 0)})
    assert JetsonPower(machine).read(0.0).power_w is None


def test_channels_without_a_rail_are_left_out(tmp_path: Path) -> None:
    machine = board_trees.jetson_orin_nano(tmp_path)
    board_trees.orin_rails(tmp_path, {"VDD_IN": (5000, 1000), "NC": (5000, 1), "": (5000, 1)})
    assert [rail.name for rail in JetsonPower(machine).read(0.0).rails] == ["VDD_IN"]


@pytest.mark.parametrize("tree", [board_trees.jetson_nano, board_trees.jetson_orin_nano])
@pytest.mark.parametrize("lost", ["*ina3221*", "*_label", "*rail_name_*", "*curr*", "*/type", "*/temp", "*"])
def test_jetson_s_files_go_away_after_they_are_found(tmp_path: Path, tree: Tree, lost: str) -> None:
    whole = tree(tmp_path)
    sensors: list[Sensor] = [
        JetsonPower(Losing(tmp_path, whole.run, lost)),
        JetsonTemperature(Losing(tmp_path, whole.run, lost)),
        JetsonThrottle(Losing(tmp_path, whole.run, lost)),
    ]
    reading = read_all(sensors)
    if lost == "*":
        assert reading == Reading(3.0)
    assert (reading.power_w is None) == (reading.power_source is None)
    assert reading.power_w in (None, 5.5, 9.6)


@pytest.mark.parametrize(("lost", "expected"), [("*zone0*", 56.312), ("*zone[05]/temp", 55.062)])
def test_orin_s_hottest_zone_goes_away(tmp_path: Path, lost: str, expected: float) -> None:
    machine = board_trees.jetson_orin_nano(tmp_path)
    assert JetsonTemperature(Losing(tmp_path, machine.run, lost)).read(0.0).temp_c == expected


def test_a_sleeping_chip_has_no_temperature(tmp_path: Path) -> None:
    board_trees.zones(tmp_path, {"cpu-thermal": -256000, "gpu-thermal": "garbage", "tj-thermal": 1e9, "iwlwifi": 50000})
    assert JetsonTemperature(Machine(tmp_path, Commands())).read(0.0) == Reading(0.0)


def test_orin_names_the_part_that_is_hot(tmp_path: Path) -> None:
    sensor = JetsonThrottle(board_trees.jetson_orin_nano(tmp_path))
    board_trees.cooling(tmp_path, {"pwm-fan": 3, "cpu-throttle-alert": 1, "gpu-throttle-alert": 0})
    reading = sensor.read(0.0)
    assert reading.throttled_now == reading.throttled_since_boot == {"thermal-cpu"}
    board_trees.cooling(tmp_path, {"pwm-fan": 3, "cpu-throttle-alert": 0, "gpu-throttle-alert": 2})
    assert sensor.read(1.0).throttled_now == {"thermal-gpu"}


def test_orin_s_events_are_now_if_they_are_new(tmp_path: Path) -> None:
    sensor = JetsonThrottle(board_trees.jetson_orin_nano(tmp_path))
    seen = []
    for counts in ((2, 0, 0), (2, 0, 0), (2, 0, 7), (2, 1, 9), (2, 1, 9), (0, 0, 0)):
        board_trees.orin_events(tmp_path, counts)
        reading = sensor.read(0.0)
        seen.append((reading.throttled_now, reading.throttled_since_boot))
    voltage, average, current = "under-voltage", "over-current-average", "over-current"
    assert seen == [
        (None, {voltage}),
        (NONE, {voltage}),
        ({current}, {voltage, current}),
        ({average, current}, {voltage, average, current}),
        (NONE, {voltage, average, current}),
        (NONE, None),  # the driver was loaded anew
    ]


def test_orin_s_events_that_slow_nothing_down_do_not_count(tmp_path: Path) -> None:
    machine = board_trees.jetson_orin_nano(tmp_path)
    board_trees.orin_events(tmp_path, (0, 0, 5))
    board_trees.write(tmp_path / ORIN_EVENTS, {"oc3_throt_en": 0})
    assert JetsonThrottle(machine).read(0.0).throttled_since_boot is None


@pytest.mark.parametrize("lost", ["*soctherm*", "*_event_cnt", "*/hwmon*/name", "*cooling_device*", "*cur_state"])
def test_orin_with_half_of_its_sources_is_not_known_to_run_free(tmp_path: Path, lost: str) -> None:
    whole = board_trees.jetson_orin_nano(tmp_path)
    sensor = JetsonThrottle(Losing(tmp_path, whole.run, lost))
    readings = [sensor.read(float(time_s)) for time_s in range(3)]
    expected = [None, NONE, NONE] if lost == "*soctherm*" else [None] * 3
    assert [reading.throttled_now for reading in readings] == expected
    assert {reading.sensors for reading in readings} == {("jetson-throttle",)}


@pytest.mark.parametrize("count", ["", "many", "-1", "nan"])
def test_orin_with_an_absurd_count(tmp_path: Path, count: str) -> None:
    sensor = JetsonThrottle(board_trees.jetson_orin_nano(tmp_path))
    board_trees.orin_events(tmp_path, (count, 0, 0))
    assert [sensor.read(0.0).throttled_since_boot for _ in range(2)] == [None, None]


@pytest.mark.parametrize("absent", ["", "-1"])
def test_a_counter_that_comes_back_is_no_event(tmp_path: Path, absent: str) -> None:
    sensor = JetsonThrottle(board_trees.jetson_orin_nano(tmp_path))
    seen = []
    for counts in ((0, 0, 3), (0, 0, absent), (0, 0, 8), (0, 0, 8)):
        board_trees.orin_events(tmp_path, counts)
        seen.append(sensor.read(0.0).throttled_now)
    assert seen == [None, NONE, None, NONE]


# --- Apple ---


def test_mac(tmp_path: Path) -> None:
    reading = read_all(find_apple(board_trees.apple_silicon(tmp_path), "Darwin"))
    assert reading == Reading(
        3.0,
        power_w=14.5,
        power_source=PowerSource.MEASURED,
        rails=tuple(Rail(name, w, PowerSource.ESTIMATED) for name, w in (("CPU", 7.5), ("GPU", 1.25), ("RAM", 0.5))),
        temp_c=61.5,
        freq_hz=3.204e9,
        throttled_now=NONE,
        load=0.625,
        sensors=("macmon", "apple-thermal-pressure"),
    )


def test_mac_with_an_older_macmon(tmp_path: Path) -> None:
    reading = AppleChip(Machine(tmp_path, Commands({"macmon": board_trees.MACMON_07}))).read(0.0)
    assert (reading.power_w, reading.temp_c, reading.freq_hz, reading.load) == (5.875, 43.7, 1.974e9, None)


def test_macmon_measures_well_within_the_runner_s_patience(tmp_path: Path) -> None:
    machine = board_trees.apple_silicon(tmp_path)
    AppleChip(machine).read(0.0)
    AppleChip(machine, interval_ms=500).read(0.0)
    assert isinstance(machine.run, Commands)
    assert machine.run.asked == ["macmon pipe -s 1 -i 200", "macmon pipe -s 1 -i 500"]


@pytest.mark.parametrize(
    "whole", ['"sys_power":0.0', '"sys_power":-3.0', '"sys_power":1e9', '"sys_power":null', '"x":1']
)
def test_mac_without_its_whole_power_has_the_chip_s_as_an_estimate(tmp_path: Path, whole: str) -> None:
    output = board_trees.MACMON.replace('"sys_power":14.5', whole)
    reading = AppleChip(Machine(tmp_path, Commands({"macmon": output}))).read(0.0)
    assert (reading.power_w, reading.power_source) == (8.75, PowerSource.ESTIMATED)


@pytest.mark.parametrize(
    "output",
    [
        None,
        "",
        "garbage",
        "[]",
        "7",
        "null",
        "{}",
        '{"cpu_power": 1',
        board_trees.MACMON[:200],
        board_trees.MACMON * 2,
        "[" * 100_000,
        '{"all_power": ' + "9" * 5000 + "}",
    ],
)
def test_mac_without_sane_output_knows_nothing(tmp_path: Path, output: str | None) -> None:
    assert AppleChip(Machine(tmp_path, Commands({"macmon": output}))).read(5.0) == Reading(5.0)


@pytest.mark.parametrize("value", ['"hot"', "null", "true", "[]", "{}", "-1", "1e400", "NaN", "9" * 400, "0", "[null]"])
def test_a_mac_s_absurd_values_are_left_out(tmp_path: Path, value: str) -> None:
    keys = ["sys_power", "all_power", "cpu_power", "gpu_power", "cpu_active_ratio", "pcpu_freq_mhz", "pcpu_usage"]
    temps = f'"temp": {{"cpu_temp_avg": {value}, "gpu_temp_avg": {value}}}'
    output = "{" + ", ".join([f'"{key}": {value}' for key in keys] + [temps]) + "}"
    reading = AppleChip(Machine(tmp_path, Commands({"macmon": output}))).read(5.0)
    expected = Reading(5.0, load=0.0, sensors=("macmon",)) if value == "0" else Reading(5.0)
    assert reading == expected


@pytest.mark.parametrize("temps", ["null", "7", "[1]", "{}", '"x"'])
def test_a_mac_s_temperatures_may_be_of_any_shape(tmp_path: Path, temps: str) -> None:
    output = f'{{"all_power": 3.0, "temp": {temps}}}'
    reading = AppleChip(Machine(tmp_path, Commands({"macmon": output}))).read(0.0)
    assert (reading.power_w, reading.temp_c) == (3.0, None)


@pytest.mark.parametrize(
    ("level", "now"),
    [
        ("0", NONE),
        ("1", NONE),
        ("2", {"thermal-pressure-heavy"}),
        ("3", {"thermal-pressure-trapping"}),
        ("4", {"thermal-pressure-sleeping"}),
    ],
)
def test_mac_thermal_pressure(tmp_path: Path, level: str, now: set[str]) -> None:
    commands = Commands({"notifyutil": f"com.apple.system.thermalpressurelevel {level}\n"})
    assert ApplePressure(Machine(tmp_path, commands)).read(0.0).throttled_now == now
    assert len(commands.asked) == 1


@pytest.mark.parametrize("level", [None, "", "com.apple.system.thermalpressurelevel", "x 9", "x -1", "x 1 2", "failed"])
@pytest.mark.parametrize(
    ("therm", "now"),
    [
        (board_trees.THERM_LIMITED, {"frequency-capped"}),
        (board_trees.THERM_LIMITED.replace("62", "100"), NONE),
        (board_trees.THERM_LIMITED.replace("62", "0"), None),
        (board_trees.THERM_LIMITED.replace("62", "6200"), None),
        (board_trees.THERM_SILENT, None),
        ("garbage", None),
        (None, None),
    ],
)
def test_mac_without_pressure_asks_for_the_limit(
    tmp_path: Path, level: str | None, therm: str | None, now: set[str] | None
) -> None:
    reading = ApplePressure(Machine(tmp_path, Commands({"notifyutil": level, "pmset -g therm": therm}))).read(0.0)
    assert reading.throttled_now == now
    assert reading.sensors == (() if now is None else ("apple-thermal-pressure",))


# --- all of them ---


TREES = [
    board_trees.raspberry_pi_4,
    board_trees.raspberry_pi_5,
    board_trees.jetson_nano,
    board_trees.jetson_orin_nano,
    board_trees.apple_silicon,
]


@pytest.mark.parametrize("tree", TREES)
def test_all_files_are_forbidden_after_detection(tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = find_all(replace(tree(tmp_path), run=Commands()), "Darwin")

    def forbidden(*_args: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert read_all(sensors) == Reading(3.0)
    monkeypatch.setattr(Path, "glob", forbidden)
    assert read_all(sensors) == Reading(3.0)
    assert names(find_all(Machine(tmp_path, Commands()))) == []


@pytest.mark.parametrize("tree", TREES)
def test_all_files_are_folders(tmp_path: Path, tree: Tree) -> None:
    sensors = find_all(replace(tree(tmp_path), run=Commands()), "Darwin")
    files = [path for path in (tmp_path / "sys").rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        path.unlink()
        path.mkdir()
    assert read_all(sensors) == Reading(3.0)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("content", [b"", b"\0\0", b"\xff\xfe\xfd", b"-300000", b"1e308", b"9" * 5000, b"two\nlines"])
def test_all_files_hold_garbage(tmp_path: Path, tree: Tree, content: bytes) -> None:
    sensors = find_all(replace(tree(tmp_path), run=Commands()), "Darwin")
    for path in (tmp_path / "sys").rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.write_bytes(content)
    assert read_all(sensors) == Reading(3.0)


@given(
    pieces=st.lists(
        st.sampled_from(
            [
                *board_trees.PMIC.split(),
                *board_trees.MACMON.split(","),
                "throttled=0x",
                "temp=",
                "{",
                "}",
                "-",
                "\n",
                " ",
                "9e9",
            ]
        )
        | st.text(max_size=5),
        max_size=60,
    )
)
def test_no_output_of_a_command_brings_a_sensor_down(pieces: list[str]) -> None:
    machine = Machine(Path("/nonexistent"), Commands({"": "".join(pieces)}))
    sensors: list[Sensor] = [RaspberryBoard(machine), RaspberryPower(machine), *find_apple(machine, "Darwin")]
    reading = read_all(sensors)
    assert reading.power_w is None or 0 < reading.power_w <= 1000
    assert (reading.power_w is None) == (reading.power_source is None)
    assert all(0 <= rail.power_w <= 1000 for rail in reading.rails)


@given(values=st.lists(st.floats() | st.integers() | st.text(max_size=8), min_size=6, max_size=6))
def test_no_number_brings_a_jetson_down(values: list[object], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("orin")
    for i in (1, 2, 3):
        board_trees.write(root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1", {f"in{i}_label": f"RAIL{i}"})
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    for i in (1, 2, 3):
        pair = {f"in{i}_input": values[2 * i - 2], f"curr{i}_input": values[2 * i - 1]}
        for name, value in pair.items():
            (folder / name).write_text(str(value), encoding="utf-8", errors="replace")
    assert all(0 <= rail.power_w <= 200 for rail in JetsonPower(Machine(root, Commands())).read(0.0).rails)
