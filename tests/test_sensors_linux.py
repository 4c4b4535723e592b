"""Heat, clock, throttling, load and battery, from trees of files as kernels show them, and from broken ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.sensors.linux import (
    BatterySensor,
    ClockSensor,
    LoadSensor,
    PsutilSensor,
    ThermalSensor,
    ThrottleSensor,
    find_linux,
    find_psutil,
    plausible_c,
)
from edge_runtime.sensors.machine import Machine
from edge_runtime.sensors.reading import Battery, PowerSource, Reading

from .board_trees import forbid

THERMAL = "sys/class/thermal"
HWMON = "sys/class/hwmon"
SUPPLY = "sys/class/power_supply"
CPU = "sys/devices/system/cpu"

LAPTOP = {
    f"{THERMAL}/thermal_zone0/type": "acpitz",
    f"{THERMAL}/thermal_zone0/temp": "27800",
    f"{THERMAL}/thermal_zone1/type": "x86_pkg_temp",
    f"{THERMAL}/thermal_zone1/temp": "61000",
    f"{THERMAL}/thermal_zone2/type": "iwlwifi_1",
    f"{THERMAL}/thermal_zone2/temp": "72000",
    f"{CPU}/cpufreq/policy0/scaling_cur_freq": "1800000",
    f"{CPU}/cpufreq/policy1/scaling_cur_freq": "3400123",
    f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "0",
    f"{CPU}/cpu0/thermal_throttle/package_throttle_count": "0",
    f"{CPU}/cpu1/thermal_throttle/core_throttle_count": "0",
    "proc/stat": "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 100 0 100 700 100 0 0 0 0 0\nintr 5\n",
    f"{SUPPLY}/AC/type": "Mains",
    f"{SUPPLY}/AC/online": "0",
    f"{SUPPLY}/BAT0/type": "Battery",
    f"{SUPPLY}/BAT0/status": "Discharging",
    f"{SUPPLY}/BAT0/capacity": "80",
    f"{SUPPLY}/BAT0/power_now": "9500000",
}


def plant(root: Path, files: Mapping[str, str | bytes]) -> Machine:
    """A recorded machine below `root`, added to what is there."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    return Machine(root, run=lambda command: None)


def zones(*kinds_and_temps: tuple[str, str | bytes]) -> dict[str, str | bytes]:
    pairs = enumerate(kinds_and_temps)
    files = [{f"{THERMAL}/thermal_zone{i}/type": k, f"{THERMAL}/thermal_zone{i}/temp": t} for i, (k, t) in pairs]
    return {name: content for zone in files for name, content in zone.items()}


class VanishingMachine(Machine):
    """Whatever is listed is gone by the time it is read."""

    __slots__ = ()

    def find(self, pattern: str) -> list[str]:
        found = super().find(pattern)
        for path in found:
            target = self.root / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        return found


def everything(machine: Machine) -> list[Any]:
    kinds = (ThermalSensor, ClockSensor, ThrottleSensor, LoadSensor, BatterySensor)
    return [kind(machine) for kind in kinds]


# --- which sensors there are ---


def test_a_laptop_has_all_sensors_and_each_names_itself_when_it_answers(tmp_path: Path) -> None:
    machine = plant(tmp_path, LAPTOP)
    sensors = find_linux(machine)
    assert [s.name for s in sensors] == ["thermal", "cpufreq", "thermal-throttle", "load", "battery"]
    first = {s.name: s.read(1.0) for s in sensors}
    assert {name: r.sensors for name, r in first.items()} == {
        **{name: (name,) for name in first},
        "load": (),  # it needs two reads
    }


def test_a_bare_machine_has_none(tmp_path: Path) -> None:
    assert find_linux(Machine(tmp_path)) == []
    assert find_linux(Machine(tmp_path / "missing")) == []


@pytest.mark.parametrize("missing", ["thermal/", "cpufreq/", "thermal_throttle", "proc/stat", "power_supply"])
def test_each_sensor_goes_with_its_files(tmp_path: Path, missing: str) -> None:
    machine = plant(tmp_path, {name: text for name, text in LAPTOP.items() if missing not in name})
    assert len(find_linux(machine)) == 4


def test_hwmon_alone_makes_a_thermal_sensor(tmp_path: Path) -> None:
    machine = plant(tmp_path, {f"{HWMON}/hwmon2/name": "coretemp", f"{HWMON}/hwmon2/temp1_input": "50000"})
    assert [s.name for s in find_linux(machine)] == ["thermal"]


# --- hostile trees, for all sensors ---


def test_sensors_of_an_empty_tree_know_nothing(tmp_path: Path) -> None:
    for sensor in everything(Machine(tmp_path)):
        assert sensor.read(1.0) == Reading(1.0)
        assert sensor.read(2.0) == Reading(2.0)


GARBAGE = [b"", b"\n", b"\xff\xfe\x00\x80", b"nan", b"inf", b"-inf", b"n/a", b"0x1F", b"1 2 3", b"9" * 5000, b"cpu"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: repr(g[:10]))
def test_garbage_in_every_file_is_no_answer(tmp_path: Path, garbage: bytes) -> None:
    machine = plant(tmp_path, LAPTOP)
    sensors = [*find_linux(machine), *everything(machine)]
    plant(tmp_path, dict.fromkeys(LAPTOP, garbage))
    for sensor in sensors:
        assert sensor.read(1.0) == Reading(1.0)
        assert sensor.read(2.0) == Reading(2.0)


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: repr(g[:10]))
def test_garbage_in_the_values_is_no_answer(tmp_path: Path, garbage: bytes) -> None:
    names = [name for name in LAPTOP if not name.endswith(("type", "status"))]
    machine = plant(tmp_path, LAPTOP | dict.fromkeys(names, garbage))  # type: ignore[arg-type]
    for sensor in everything(machine):
        assert sensor.read(1.0) == Reading(1.0)
        assert sensor.read(2.0) == Reading(2.0)


def test_what_may_not_be_read_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = plant(tmp_path, LAPTOP)
    sensors = find_linux(machine)
    forbid(monkeypatch, "")
    for sensor in sensors:
        assert sensor.read(1.0) == Reading(1.0)
    assert not {"load", "battery"} & {s.name for s in find_linux(machine)}


@pytest.mark.parametrize("kind", [ThermalSensor, ClockSensor, ThrottleSensor, BatterySensor])
def test_files_that_go_away_between_listing_and_reading_are_no_answer(tmp_path: Path, kind: Any) -> None:
    sensor = kind(VanishingMachine(tmp_path))
    plant(tmp_path, LAPTOP)
    assert sensor.read(1.0) == Reading(1.0)
    plant(tmp_path, LAPTOP)
    assert kind(Machine(tmp_path)).read(1.0) != Reading(1.0)


def test_looking_for_sensors_while_files_go_away_finds_what_is_left(tmp_path: Path) -> None:
    plant(tmp_path, LAPTOP)
    assert "load" in [s.name for s in find_linux(VanishingMachine(tmp_path))]  # it is listed by nobody


def test_folders_in_place_of_files_are_no_answer(tmp_path: Path) -> None:
    for name in LAPTOP:
        (tmp_path / name).mkdir(parents=True)
    for sensor in everything(Machine(tmp_path)):
        assert sensor.read(1.0) == Reading(1.0)


# --- heat ---


@pytest.mark.parametrize(
    "kind",
    ["x86_pkg_temp", "cpu-thermal", "cpu_thermal", "CPU-therm", "soc-thermal", "soc_thermal", "TCPU", "mtktscpu"],
)
def test_the_processors_zone_is_chosen_though_another_is_hotter(tmp_path: Path, kind: str) -> None:
    machine = plant(tmp_path, zones(("acpitz", "90000"), (kind, "51500"), ("gpu-thermal", "80000")))
    assert ThermalSensor(machine).read(1.0) == Reading(1.0, temp_c=51.5, sensors=("thermal",))


def test_of_several_zones_of_the_processor_the_hottest_counts(tmp_path: Path) -> None:
    machine = plant(tmp_path, zones(("cpu0-thermal", "51000"), ("cpu1-thermal", "57000"), ("soc-thermal", "55000")))
    assert ThermalSensor(machine).read(1.0).temp_c == 57.0


def test_without_a_processors_zone_the_hottest_counts_but_not_wifi_or_battery(tmp_path: Path) -> None:
    machine = plant(
        tmp_path, zones(("acpitz", "40000"), ("board", "45000"), ("iwlwifi_1", "72000"), ("battery", "60000"))
    )
    assert ThermalSensor(machine).read(1.0).temp_c == 45.0


@pytest.mark.parametrize("absurd", ["-274000", "-40001", "150001", "0", "2147483647"])
def test_absurd_temperatures_are_ignored(tmp_path: Path, absurd: str) -> None:
    machine = plant(tmp_path, zones(("cpu0-thermal", absurd), ("cpu1-thermal", "43000")))
    assert ThermalSensor(machine).read(1.0).temp_c == 43.0
    plant(tmp_path, zones(("cpu0-thermal", absurd), ("cpu1-thermal", absurd)))
    assert ThermalSensor(machine).read(1.0) == Reading(1.0)


def test_the_limits_of_what_is_plausible() -> None:
    assert [plausible_c(c) for c in (-40.1, -40.0, -5.0, 0.0, 150.0, 150.1, None)] == [
        None,
        -40.0,
        -5.0,
        None,
        150.0,
        None,
        None,
    ]


def test_a_processors_zone_that_is_dead_leaves_the_word_to_its_chip_then_to_others(tmp_path: Path) -> None:
    machine = plant(tmp_path, zones(("x86_pkg_temp", "-274000"), ("acpitz", "38000")))
    sensor = ThermalSensor(machine)
    assert sensor.read(1.0).temp_c == 38.0
    plant(tmp_path, {f"{HWMON}/hwmon1/name": "coretemp", f"{HWMON}/hwmon1/temp1_input": "36000"})
    assert sensor.read(2.0).temp_c == 36.0
    plant(tmp_path, zones(("x86_pkg_temp", "35000")))
    assert sensor.read(3.0).temp_c == 35.0


@pytest.mark.parametrize("chip", ["k10temp", "coretemp"])
def test_a_processors_chip_is_known_by_its_name(tmp_path: Path, chip: str) -> None:
    files = {
        f"{HWMON}/hwmon0/name": "nvme",
        f"{HWMON}/hwmon0/temp1_input": "70000",
        f"{HWMON}/hwmon1/name": chip,
        f"{HWMON}/hwmon1/temp1_input": "48250",
        f"{HWMON}/hwmon1/temp2_input": "47000",
    }
    assert ThermalSensor(plant(tmp_path, files)).read(1.0).temp_c == 48.25


def test_the_fans_temperature_of_amd_gives_way_to_the_dies(tmp_path: Path) -> None:
    files = {f"{HWMON}/hwmon1/name": "k10temp"}
    for number, label, temp in ((1, "Tctl", "75000"), (2, "Tdie", "48000"), (3, "Tccd1", "47500")):
        files |= {f"{HWMON}/hwmon1/temp{number}_label": label, f"{HWMON}/hwmon1/temp{number}_input": temp}
    assert ThermalSensor(plant(tmp_path, files)).read(1.0).temp_c == 48.0
    (tmp_path / f"{HWMON}/hwmon1/temp2_label").unlink()  # without a Tdie, all count
    assert ThermalSensor(Machine(tmp_path)).read(1.0).temp_c == 75.0


def test_zones_and_chips_that_change_their_numbers_are_followed(tmp_path: Path) -> None:
    machine = plant(tmp_path, zones(("cpu-thermal", "50000"), ("gpu-thermal", "80000")))
    sensor = ThermalSensor(machine)
    assert sensor.read(1.0).temp_c == 50.0
    plant(tmp_path, zones(("gpu-thermal", "80000"), ("cpu-thermal", "51000")))
    assert sensor.read(2.0).temp_c == 51.0


def test_a_chip_that_changes_its_number_is_followed(tmp_path: Path) -> None:
    machine = plant(tmp_path, {f"{HWMON}/hwmon0/name": "k10temp", f"{HWMON}/hwmon0/temp1_input": "50000"})
    sensor = ThermalSensor(machine)
    plant(tmp_path, {f"{HWMON}/hwmon0/name": "nvme", f"{HWMON}/hwmon0/temp1_input": "65000"})
    plant(tmp_path, {f"{HWMON}/hwmon1/name": "k10temp", f"{HWMON}/hwmon1/temp1_input": "52000"})
    assert sensor.read(1.0).temp_c == 52.0


def test_a_zone_that_goes_and_comes_back_is_found_again(tmp_path: Path) -> None:
    sensor = ThermalSensor(plant(tmp_path, zones(("cpu-thermal", "50000"))))
    shutil.rmtree(tmp_path / "sys")
    assert sensor.read(1.0) == Reading(1.0)
    plant(tmp_path, zones(("cpu-thermal", "49000")))
    assert sensor.read(2.0).temp_c == 49.0


def test_a_zone_that_may_not_be_read_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = plant(tmp_path, zones(("cpu0-thermal", "60000"), ("cpu1-thermal", "50000")))
    forbid(monkeypatch, "thermal_zone0/temp")
    assert ThermalSensor(machine).read(1.0).temp_c == 50.0


# --- clock ---


def test_the_fastest_core_counts_in_hertz(tmp_path: Path) -> None:
    assert ClockSensor(plant(tmp_path, LAPTOP)).read(1.0) == Reading(1.0, freq_hz=3.400123e9, sensors=("cpufreq",))


def test_kernels_without_groups_have_one_file_per_core(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{i}/cpufreq/scaling_cur_freq": f"{600_000 * (i + 1)}" for i in range(4)}
    machine = plant(tmp_path, files)
    assert ClockSensor(machine).read(1.0).freq_hz == 2.4e9
    assert [s.name for s in find_linux(machine)] == ["cpufreq"]


@pytest.mark.parametrize("absurd", ["0", "-1500000", "<unknown>", "4294967295"])
def test_a_core_that_is_off_or_lies_does_not_count(tmp_path: Path, absurd: str) -> None:
    machine = plant(tmp_path, LAPTOP | {f"{CPU}/cpufreq/policy1/scaling_cur_freq": absurd})
    assert ClockSensor(machine).read(1.0).freq_hz == 1.8e9
    shutil.rmtree(tmp_path / f"{CPU}/cpufreq/policy0")
    assert ClockSensor(machine).read(1.0) == Reading(1.0)


def test_a_group_of_cores_that_appears_after_another_has_gone_is_found(tmp_path: Path) -> None:
    sensor = ClockSensor(plant(tmp_path, LAPTOP))
    shutil.rmtree(tmp_path / f"{CPU}/cpufreq/policy1")
    plant(tmp_path, {f"{CPU}/cpufreq/policy4/scaling_cur_freq": "2000000"})
    assert sensor.read(1.0).freq_hz == 2e9


def test_a_lowered_limit_of_the_clock_is_no_throttling(tmp_path: Path) -> None:
    limits = {
        f"{CPU}/cpufreq/policy0/scaling_max_freq": "1000000",
        f"{CPU}/cpufreq/policy0/cpuinfo_max_freq": "4000000",
    }
    machine = plant(tmp_path, LAPTOP | limits)
    for sensor in find_linux(machine):
        assert not sensor.read(1.0).throttled_now


# --- throttling ---

COUNT = f"{CPU}/cpu1/thermal_throttle/core_throttle_count"
HOT = frozenset({"thermal"})
COOL: frozenset[str] = frozenset()


def test_a_count_that_rises_is_throttling_now_and_since_boot(tmp_path: Path) -> None:
    sensor = ThrottleSensor(plant(tmp_path, LAPTOP))
    flags = []
    for time_s, count in enumerate(("0", "0", "3", "3", "4")):
        plant(tmp_path, {COUNT: count})
        reading = sensor.read(float(time_s))
        flags.append((reading.throttled_now, reading.throttled_since_boot))
    assert flags == [(None, COOL), (COOL, COOL), (HOT, HOT), (COOL, HOT), (HOT, HOT)]


def test_the_first_read_knows_of_the_boot_but_not_of_now(tmp_path: Path) -> None:
    reading = ThrottleSensor(plant(tmp_path, LAPTOP | {COUNT: "17"})).read(1.0)
    assert reading == Reading(1.0, throttled_since_boot=HOT, sensors=("thermal-throttle",))


def test_the_packages_count_counts(tmp_path: Path) -> None:
    sensor = ThrottleSensor(plant(tmp_path, LAPTOP))
    sensor.read(1.0)
    plant(tmp_path, {f"{CPU}/cpu0/thermal_throttle/package_throttle_count": "1"})
    assert sensor.read(2.0).throttled_now == HOT


def test_a_core_that_comes_back_with_old_counts_is_not_throttled_now(tmp_path: Path) -> None:
    sensor = ThrottleSensor(plant(tmp_path, LAPTOP | {COUNT: "9"}))
    sensor.read(1.0)
    (tmp_path / COUNT).unlink()
    assert sensor.read(2.0).throttled_now == COOL
    (tmp_path / f"{CPU}/cpu0/thermal_throttle/core_throttle_count").unlink()  # something is missed: all are listed anew
    plant(tmp_path, {COUNT: "9"})
    reading = sensor.read(3.0)
    assert (reading.throttled_now, reading.throttled_since_boot) == (COOL, HOT)


def test_a_core_that_comes_when_another_goes_is_counted(tmp_path: Path) -> None:
    sensor = ThrottleSensor(plant(tmp_path, LAPTOP))
    new = COUNT.replace("cpu1", "cpu7")
    flags = []
    for time_s, count in enumerate(("0", "1")):
        (tmp_path / COUNT).unlink(missing_ok=True)
        plant(tmp_path, {new: count})
        flags.append(sensor.read(float(time_s)).throttled_now)
    assert flags == [None, HOT]


@pytest.mark.parametrize("count", ["-5", "2", "garbage"])
def test_a_count_that_falls_or_makes_no_sense_is_not_throttling(tmp_path: Path, count: str) -> None:
    sensor = ThrottleSensor(plant(tmp_path, LAPTOP | {COUNT: "8"}))
    sensor.read(1.0)
    plant(tmp_path, {COUNT: count})
    assert sensor.read(2.0).throttled_now == COOL


@pytest.mark.parametrize("silent", ["garbage", "-5"])
def test_counts_that_were_all_silent_before_say_nothing_of_now(tmp_path: Path, silent: str) -> None:
    sensor = ThrottleSensor(plant(tmp_path, {COUNT: silent}))
    assert sensor.read(1.0) == Reading(1.0)
    plant(tmp_path, {COUNT: "5"})
    assert sensor.read(2.0).throttled_now is None


# --- load ---


def stat(*ticks: int) -> dict[str, str]:
    return {"proc/stat": f"cpu  {' '.join(map(str, ticks))}\ncpu0 1 2 3 4\n"}


def test_load_is_the_busy_share_between_two_reads(tmp_path: Path) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(100, 0, 100, 700, 100, 0, 0, 0)))
    assert sensor.read(1.0) == Reading(1.0)
    plant(tmp_path, stat(160, 10, 120, 750, 150, 5, 5, 0))  # 100 busy, 50 idle, 50 waiting for disks
    assert sensor.read(2.0) == Reading(2.0, load=0.5, sensors=("load",))


def test_time_of_guests_is_not_counted_twice(tmp_path: Path) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
    sensor.read(1.0)
    plant(tmp_path, stat(100, 0, 0, 300, 0, 0, 0, 0, 100, 0))
    assert sensor.read(2.0).load == 0.25


def test_load_without_time_between_reads_is_not_known_and_the_next_spans_all(tmp_path: Path) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(0, 0, 0, 0)))
    sensor.read(5.0)
    plant(tmp_path, stat(10, 0, 0, 10))
    assert sensor.read(5.0) == Reading(5.0)
    assert sensor.read(4.0) == Reading(4.0)
    plant(tmp_path, stat(10, 0, 0, 30))
    assert sensor.read(6.0).load == 0.25


def test_load_without_ticks_between_reads_is_not_known(tmp_path: Path) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(5, 0, 0, 5)))
    assert [sensor.read(t).load for t in (1.0, 2.0)] == [None, None]


def test_counters_that_begin_anew_give_no_load_once(tmp_path: Path) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(500, 0, 0, 500)))
    sensor.read(1.0)
    plant(tmp_path, stat(5, 0, 0, 5))
    assert sensor.read(2.0).load is None
    plant(tmp_path, stat(10, 0, 0, 20))
    assert sensor.read(3.0).load == 0.25


@pytest.mark.parametrize(("after", "load"), [((90, 0, 0, 200), 0.0), ((200, 0, 0, 90), 1.0)])
def test_counters_that_step_back_a_little_keep_the_load_a_share(tmp_path: Path, after: Any, load: float) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(100, 0, 0, 100)))
    sensor.read(1.0)
    plant(tmp_path, stat(*after))
    assert sensor.read(2.0).load == load


@pytest.mark.parametrize(
    "text",
    [
        "cpu 1 2 3",
        "cpu0 1 2 3 4",
        "cpu -1 2 3 4",
        "cpu a b c d",
        "intr 1 2 3 4 5",
        "cpu 1 2 3 ²",
        "cpu 1 2 3 4" + "9" * 5000,
    ],
)
def test_other_lines_are_no_load(tmp_path: Path, text: str) -> None:
    machine = plant(tmp_path, {"proc/stat": text})
    assert find_linux(machine) == []
    sensor = LoadSensor(machine)
    assert [sensor.read(t) for t in (1.0, 2.0)] == [Reading(1.0), Reading(2.0)]


def test_a_stat_that_was_away_for_a_read_gives_a_load_one_read_later(tmp_path: Path) -> None:
    sensor = LoadSensor(plant(tmp_path, stat(0, 0, 0, 0)))
    sensor.read(1.0)
    (tmp_path / "proc/stat").unlink()
    assert sensor.read(2.0) == Reading(2.0)
    plant(tmp_path, stat(10, 0, 0, 10))
    assert sensor.read(3.0).load is None
    plant(tmp_path, stat(20, 0, 0, 20))
    assert sensor.read(4.0).load == 0.5


# --- battery ---


def battery(number: int = 0, **values: str) -> dict[str, str]:
    folder = f"{SUPPLY}/BAT{number}"
    return {f"{folder}/type": "Battery"} | {f"{folder}/{name}": text for name, text in values.items()}


def test_a_battery_that_feeds_the_machine_measures_its_power(tmp_path: Path) -> None:
    machine = plant(tmp_path, LAPTOP)
    assert BatterySensor(machine).read(1.0) == Reading(
        1.0, power_w=9.5, power_source=PowerSource.MEASURED, battery=Battery(80.0, charging=False), sensors=("battery",)
    )


def test_power_is_current_times_voltage_where_there_is_no_power(tmp_path: Path) -> None:
    values = {"status": "Discharging", "capacity": "50", "current_now": "1500000", "voltage_now": "4000000"}
    assert BatterySensor(plant(tmp_path, battery(**values))).read(1.0).power_w == pytest.approx(6.0)


def test_a_power_of_zero_gives_way_to_current_and_voltage(tmp_path: Path) -> None:
    values = {"capacity": "50", "power_now": "0", "current_now": "1500000", "voltage_now": "4000000"}
    assert BatterySensor(plant(tmp_path, battery(status="Discharging", **values))).read(1.0).power_w == pytest.approx(6)


def test_a_battery_that_calls_itself_online_is_no_charger(tmp_path: Path) -> None:
    assert BatterySensor(plant(tmp_path, LAPTOP | battery(online="1"))).read(1.0).power_w == 9.5


@pytest.mark.parametrize("values", [{"power_now": "-7000000"}, {"current_now": "-2000000", "voltage_now": "3500000"}])
def test_drivers_that_count_discharging_as_negative_say_the_same(tmp_path: Path, values: dict[str, str]) -> None:
    machine = plant(tmp_path, battery(status="Discharging", capacity="50", **values))
    assert BatterySensor(machine).read(1.0).power_w == pytest.approx(7.0)


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown"])
def test_a_battery_that_is_not_discharging_says_nothing_of_the_machines_power(tmp_path: Path, status: str) -> None:
    reading = BatterySensor(plant(tmp_path, LAPTOP | battery(status=status))).read(1.0)
    assert (reading.power_w, reading.power_source) == (None, None)
    charging = {"Charging": True, "Unknown": None}.get(status, False)
    assert reading.battery == Battery(80.0, charging)


@pytest.mark.parametrize("online", ["1", "2"])
@pytest.mark.parametrize("kind", ["Mains", "USB", "Wireless"])
def test_a_battery_that_helps_a_weak_charger_measures_only_a_part(tmp_path: Path, kind: str, online: str) -> None:
    machine = plant(tmp_path, LAPTOP | {f"{SUPPLY}/AC/type": kind, f"{SUPPLY}/AC/online": online})
    reading = BatterySensor(machine).read(1.0)
    assert (reading.power_w, reading.battery) == (None, Battery(80.0, charging=False))


@pytest.mark.parametrize("power", ["0", "", "4294967295000", "garbage"])
def test_a_power_that_no_battery_gives_is_not_known(tmp_path: Path, power: str) -> None:
    reading = BatterySensor(plant(tmp_path, LAPTOP | battery(power_now=power))).read(1.0)
    assert (reading.power_w, reading.power_source, reading.battery) == (None, None, Battery(80.0, charging=False))


def test_two_batteries_are_one_weighted_by_size(tmp_path: Path) -> None:
    small = battery(0, status="Not charging", capacity="100", energy_full="10000000", power_now="0")
    large = battery(1, status="Discharging", capacity="40", energy_full="30000000", power_now="8000000")
    reading = BatterySensor(plant(tmp_path, small | large)).read(1.0)
    assert reading.battery == Battery(55.0, charging=False)
    assert reading.power_w == 8.0
    (tmp_path / f"{SUPPLY}/BAT1/energy_full").unlink()
    assert BatterySensor(Machine(tmp_path)).read(1.0).battery == Battery(70.0, charging=False)


def test_two_discharging_batteries_add_up_and_one_silent_one_makes_the_sum_unknown(tmp_path: Path) -> None:
    both = [battery(i, status="Discharging", capacity="50", power_now="4000000") for i in (0, 1)]
    machine = plant(tmp_path, both[0] | both[1])
    assert BatterySensor(machine).read(1.0).power_w == 8.0
    (tmp_path / f"{SUPPLY}/BAT1/power_now").unlink()
    assert BatterySensor(machine).read(2.0).power_w is None


def test_a_battery_that_charges_another_says_nothing_of_the_machines_power(tmp_path: Path) -> None:
    giving = battery(0, status="Discharging", capacity="50", power_now="20000000")
    taking = battery(1, status="Charging", capacity="10", power_now="12000000")
    reading = BatterySensor(plant(tmp_path, giving | taking)).read(1.0)
    assert (reading.power_w, reading.battery) == (None, Battery(30.0, charging=True))


def test_the_battery_of_a_mouse_is_not_the_machines(tmp_path: Path) -> None:
    mouse = battery(0, scope="Device", status="Discharging", capacity="5", power_now="1000000")
    machine = plant(tmp_path, mouse)
    assert find_linux(machine) == []
    assert BatterySensor(machine).read(1.0) == Reading(1.0)


@pytest.mark.parametrize(("capacity", "percent"), [("104", 100.0), ("0", 0.0), ("-3", None), ("255", None), ("", None)])
def test_percent_is_a_percent_or_not_known(tmp_path: Path, capacity: str, percent: float | None) -> None:
    reading = BatterySensor(plant(tmp_path, battery(status="Charging", capacity=capacity))).read(1.0)
    assert (reading.battery.percent if reading.battery else None) == percent


def test_a_battery_that_is_taken_out_is_no_answer(tmp_path: Path) -> None:
    sensor = BatterySensor(plant(tmp_path, LAPTOP))
    shutil.rmtree(tmp_path / f"{SUPPLY}/BAT0")
    assert sensor.read(1.0) == Reading(1.0)


def test_a_battery_that_may_not_be_read_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = plant(tmp_path, LAPTOP)
    forbid(monkeypatch, "capacity")
    assert BatterySensor(machine).read(1.0).battery is None
    assert BatterySensor(machine).read(1.0).power_w == 9.5


# --- psutil ---


class FakePsutil:
    """psutil of a laptop without /proc; `busy` and `idle` are set by tests."""

    def __init__(self) -> None:
        self.busy, self.idle = 0.0, 0.0
        self.plugged: bool | None = False
        self.percent: Any = 64
        self.mhz: Any = 3200

    def cpu_times(self) -> Any:
        class Times(tuple[float, ...]):
            idle = self.idle

        return Times((self.busy, self.idle))

    def cpu_freq(self) -> Any:
        return SimpleNamespace(current=self.mhz)

    def sensors_battery(self) -> Any:
        return SimpleNamespace(percent=self.percent, power_plugged=self.plugged)


def test_psutil_gives_load_clock_and_battery() -> None:
    source = FakePsutil()
    sensor = PsutilSensor(source)
    first = sensor.read(1.0)
    assert first == Reading(1.0, freq_hz=3.2e9, battery=Battery(64.0, charging=False), sensors=("psutil",))
    source.busy, source.idle = 30.0, 10.0
    assert sensor.read(2.0).load == 0.75
    assert sensor.read(2.0).load is None


@pytest.mark.parametrize("plugged", [True, False, None])
def test_a_plug_counts_as_charging(plugged: bool | None) -> None:
    source = FakePsutil()
    source.plugged = plugged
    assert PsutilSensor(source).read(1.0).battery == Battery(64.0, plugged)


@pytest.mark.parametrize("absurd", [0, -5, float("nan"), float("inf"), None, "fast"])
def test_absurd_values_of_psutil_are_not_known(absurd: Any) -> None:
    source = FakePsutil()
    source.mhz = absurd
    source.percent = absurd if absurd != 0 else -1
    assert PsutilSensor(source).read(1.0) == Reading(1.0)


@pytest.mark.parametrize("failure", [OSError, RuntimeError, NotImplementedError, AttributeError, IndexError])
def test_psutil_may_fail_in_any_way(failure: type[Exception]) -> None:
    def fail() -> None:
        raise failure("no such thing here")

    source = SimpleNamespace(cpu_times=fail, cpu_freq=fail, sensors_battery=fail)
    assert PsutilSensor(source).read(1.0) == Reading(1.0)
    assert PsutilSensor(SimpleNamespace()).read(1.0) == Reading(1.0)  # psutil leaves out what a system lacks
    nothing = SimpleNamespace(cpu_times=lambda: None, cpu_freq=lambda: None, sensors_battery=lambda: None)
    assert PsutilSensor(nothing).read(1.0) == Reading(1.0)


def test_psutil_is_for_this_very_machine_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_psutil(Machine(tmp_path)) == []  # a recording
    monkeypatch.setattr(Machine, "text", lambda self, path: "cpu 1 2 3 4")
    assert find_psutil(Machine()) == []
    monkeypatch.setattr(Machine, "text", lambda self, path: None)
    assert [s.name for s in find_psutil(Machine())] == ["psutil"]
