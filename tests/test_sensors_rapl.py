"""Power from energy counters that wrap, move, vanish and are forbidden."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_runtime.sensors.machine import Machine
from edge_runtime.sensors.rapl import Counter, RaplSensor, explain, find_rapl, mean_power_w, power_source, total_w
from edge_runtime.sensors.reading import PowerSource, Rail, Reading

from .board_trees import forbid

POWERCAP = "sys/class/powercap"
RANGE_J = 262143.328850

DESKTOP = {"0": "package-0", "0:0": "core", "0:1": "uncore", "0:2": "dram"}
SERVER = {"0": "package-0", "0:0": "dram", "1": "package-1", "1:0": "dram"}


def plant(root: Path, files: Mapping[str, str]) -> Machine:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{content}\n".encode())
    return Machine(root, run=lambda command: None)


def zones(root: Path, names: Mapping[str, str], range_j: float | None = RANGE_J) -> Machine:
    """A tree of zones "intel-rapl:<number>" by number, with all counters at 0 J."""
    for number, name in names.items():
        folder = f"{POWERCAP}/intel-rapl:{number}"
        plant(root, {f"{folder}/name": name, f"{folder}/energy_uj": "0"})
        if range_j is not None:
            plant(root, {f"{folder}/max_energy_range_uj": str(round(range_j * 1e6))})
    return Machine(root, run=lambda command: None)


def spend(root: Path, joules: Mapping[str, float]) -> None:
    """Sets counters, in joules by number."""
    plant(root, {f"{POWERCAP}/intel-rapl:{n}/energy_uj": str(round(j * 1e6)) for n, j in joules.items()})


def rails(reading: Reading) -> dict[str, float]:
    return {rail.name: pytest.approx(rail.power_w) for rail in reading.rails}


# --- power ---


def test_the_first_read_has_no_power(tmp_path: Path) -> None:
    (sensor,) = find_rapl(zones(tmp_path, DESKTOP))
    assert sensor.name == "rapl"
    assert sensor.read(10.0) == Reading(10.0)


def test_power_is_energy_over_time_with_parts_as_rails(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, DESKTOP))
    sensor.read(10.0)
    spend(tmp_path, {"0": 30.0, "0:0": 22.0, "0:2": 5.0})
    reading = sensor.read(12.0)
    assert reading.power_w == pytest.approx(17.5)  # the package and, as it is no part of it, the memory
    assert reading.power_source is PowerSource.MEASURED
    assert rails(reading) == {"package-0": 15.0, "package-0/core": 11.0, "package-0/uncore": 0.0, "package-0/dram": 2.5}
    assert reading.sensors == ("rapl",)


def test_power_is_of_the_time_since_the_last_read_only(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}))
    powers = []
    for time_s, energy_j in ((0.0, 100.0), (1.0, 110.0), (3.0, 170.0), (3.5, 171.0)):
        spend(tmp_path, {"0": energy_j})
        powers.append(sensor.read(time_s).power_w)
    assert powers == [None, pytest.approx(10.0), pytest.approx(30.0), pytest.approx(2.0)]


def test_packages_and_their_memories_add_up(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, SERVER))
    sensor.read(0.0)
    spend(tmp_path, {"0": 100.0, "0:0": 10.0, "1": 80.0, "1:0": 8.0})
    assert sensor.read(1.0).power_w == pytest.approx(198.0)


def test_a_platforms_counter_is_the_whole(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, DESKTOP | {"1": "psys"}))
    sensor.read(0.0)
    spend(tmp_path, {"0": 10.0, "0:2": 2.0, "1": 25.0})
    reading = sensor.read(1.0)
    assert reading.power_w == pytest.approx(25.0)
    assert Rail("psys", 25.0) in reading.rails


@pytest.mark.parametrize("platform_j", [0.0, 3.0])
def test_a_platforms_counter_that_is_not_wired_up_is_not_believed(tmp_path: Path, platform_j: float) -> None:
    sensor = RaplSensor(zones(tmp_path, DESKTOP | {"1": "psys"}))
    sensor.read(0.0)
    spend(tmp_path, {"0": 10.0, "0:2": 2.0, "1": platform_j})
    assert sensor.read(1.0).power_w == pytest.approx(12.0)


def test_the_second_view_of_the_same_package_is_not_counted(tmp_path: Path) -> None:
    machine = zones(tmp_path, {"0": "package-0"})
    mirror = f"{POWERCAP}/intel-rapl-mmio:0"
    plant(tmp_path, {f"{mirror}/name": "package-0", f"{mirror}/energy_uj": "0", f"{POWERCAP}/intel-rapl/enabled": "1"})
    sensor = RaplSensor(machine)
    sensor.read(0.0)
    spend(tmp_path, {"0": 10.0})
    plant(tmp_path, {f"{mirror}/energy_uj": "77000000"})
    assert sensor.read(1.0) == Reading(
        1.0, 10.0, PowerSource.MEASURED, rails=(Rail("package-0", 10.0),), sensors=("rapl",)
    )


# --- counters that cannot be taken as they are ---


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}))
    spend(tmp_path, {"0": RANGE_J - 10.0})
    sensor.read(0.0)
    spend(tmp_path, {"0": 5.0})
    assert sensor.read(1.0).power_w == pytest.approx(15.0)
    spend(tmp_path, {"0": 25.0})
    assert sensor.read(2.0).power_w == pytest.approx(20.0)


def test_a_counter_that_falls_without_a_range_gives_no_power_once(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}, range_j=None))
    spend(tmp_path, {"0": 1000.0})
    sensor.read(0.0)
    spend(tmp_path, {"0": 5.0})
    assert sensor.read(1.0) == Reading(1.0)
    spend(tmp_path, {"0": 25.0})
    assert sensor.read(2.0).power_w == pytest.approx(20.0)


def test_a_counter_that_began_anew_gives_no_absurd_power(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}))
    spend(tmp_path, {"0": 1000.0})
    sensor.read(0.0)
    spend(tmp_path, {"0": 1.0})  # as a wrap it would be 261 kW
    assert sensor.read(1.0) == Reading(1.0)


def test_a_counter_that_jumps_gives_no_absurd_power(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}))
    sensor.read(0.0)
    spend(tmp_path, {"0": 5000.0})
    assert sensor.read(1.0) == Reading(1.0)


def test_after_a_gap_in_which_it_may_have_wrapped_unnoticed_a_counter_gives_no_power(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}, range_j=65532.610987))  # as AMD's
    sensor.read(0.0)
    spend(tmp_path, {"0": 1000.0})
    assert sensor.read(600.0) == Reading(600.0)
    spend(tmp_path, {"0": 1030.0})
    assert sensor.read(601.0).power_w == pytest.approx(30.0)


@pytest.mark.parametrize("range_uj", ["0", "-1", "garbage", ""])
def test_a_range_that_makes_no_sense_is_none(tmp_path: Path, range_uj: str) -> None:
    machine = zones(tmp_path, {"0": "package-0"})
    plant(tmp_path, {f"{POWERCAP}/intel-rapl:0/max_energy_range_uj": range_uj})
    sensor = RaplSensor(machine)
    sensor.read(0.0)
    spend(tmp_path, {"0": 7.0})
    assert sensor.read(1.0).power_w == pytest.approx(7.0)
    spend(tmp_path, {"0": 1.0})
    assert sensor.read(2.0).power_w is None


@pytest.mark.parametrize("later_s", [5.0, 4.0, 5.001])
def test_without_time_between_reads_there_is_no_power_and_the_next_spans_all(tmp_path: Path, later_s: float) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0"}))
    sensor.read(5.0)
    spend(tmp_path, {"0": 4.0})
    assert sensor.read(later_s) == Reading(later_s)
    spend(tmp_path, {"0": 12.0})
    assert sensor.read(6.0).power_w == pytest.approx(12.0)


@pytest.mark.parametrize("energy", ["-5000000", "garbage", "", "nan", "inf", "\xff\x00"])
def test_an_energy_that_makes_no_sense_is_no_answer(tmp_path: Path, energy: str) -> None:
    machine = zones(tmp_path, {"0": "package-0"})
    sensor = RaplSensor(machine)
    sensor.read(0.0)
    plant(tmp_path, {f"{POWERCAP}/intel-rapl:0/energy_uj": energy})
    assert sensor.read(1.0) == Reading(1.0)
    assert find_rapl(machine) == []


def test_a_package_that_takes_nothing_has_a_dead_counter(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, SERVER))
    sensor.read(0.0)
    assert sensor.read(1.0).power_w is None
    spend(tmp_path, {"0": 10.0, "0:0": 1.0})
    reading = sensor.read(2.0)
    assert reading.power_w is None  # the other package is silent
    assert rails(reading) == {"package-0": 10.0, "package-0/dram": 1.0, "package-1/dram": 0.0}


# --- zones that go, come and move ---


@pytest.mark.parametrize("gone", ["1", "1:0"])
def test_without_one_of_its_parts_the_whole_is_not_known(tmp_path: Path, gone: str) -> None:
    sensor = RaplSensor(zones(tmp_path, SERVER))
    sensor.read(0.0)
    shutil.rmtree(tmp_path / f"{POWERCAP}/intel-rapl:{gone}")
    spend(tmp_path, {"0": 10.0})
    reading = sensor.read(1.0)
    assert (reading.power_w, reading.power_source) == (None, None)
    assert rails(reading)["package-0"] == 10.0


def test_without_the_platform_the_packages_do_not_stand_in_for_it(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, DESKTOP | {"1": "psys"}))
    sensor.read(0.0)
    shutil.rmtree(tmp_path / f"{POWERCAP}/intel-rapl:1")
    spend(tmp_path, {"0": 10.0})
    assert sensor.read(1.0).power_w is None


def test_a_part_that_is_in_the_package_may_go(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, DESKTOP))
    sensor.read(0.0)
    shutil.rmtree(tmp_path / f"{POWERCAP}/intel-rapl:0:0")
    spend(tmp_path, {"0": 10.0, "0:2": 1.0})
    assert sensor.read(1.0).power_w == pytest.approx(11.0)


def test_a_zone_that_comes_back_has_power_one_read_later(tmp_path: Path) -> None:
    machine = zones(tmp_path, {"0": "package-0"})
    sensor = RaplSensor(machine)
    sensor.read(0.0)
    shutil.rmtree(tmp_path / "sys")
    assert sensor.read(1.0) == Reading(1.0)
    zones(tmp_path, {"0": "package-0"})
    assert sensor.read(2.0) == Reading(2.0)
    spend(tmp_path, {"0": 9.0})
    assert sensor.read(3.0).power_w == pytest.approx(9.0)


def test_zones_that_change_their_numbers_are_followed_by_name(tmp_path: Path) -> None:
    sensor = RaplSensor(zones(tmp_path, {"0": "package-0", "1": "package-1"}))
    spend(tmp_path, {"0": 100.0, "1": 900.0})
    sensor.read(0.0)
    zones(tmp_path, {"0": "package-1", "1": "package-0"})
    spend(tmp_path, {"0": 905.0, "1": 110.0})
    reading = sensor.read(1.0)
    assert rails(reading) == {"package-0": 10.0, "package-1": 5.0}
    assert reading.power_w == pytest.approx(15.0)


def test_a_part_without_its_package_is_left_out(tmp_path: Path) -> None:
    machine = zones(tmp_path, {"0:0": "core"})
    assert find_rapl(machine) == []


def test_zones_that_go_away_between_listing_and_reading_are_no_answer(tmp_path: Path) -> None:
    class VanishingMachine(Machine):
        __slots__ = ()

        def find(self, pattern: str) -> list[str]:
            found = super().find(pattern)
            shutil.rmtree(self.root / POWERCAP)
            return found

    zones(tmp_path, DESKTOP)
    assert find_rapl(VanishingMachine(tmp_path)) == []
    for time_s in (0.0, 1.0):
        zones(tmp_path, DESKTOP)
        assert RaplSensor(VanishingMachine(tmp_path)).read(time_s) == Reading(time_s)


# --- what is a power worth, and why there is none ---


@pytest.mark.parametrize(
    ("vendor", "model", "source"),
    [
        ("GenuineIntel", "151", PowerSource.MEASURED),
        ("GenuineIntel", "60", PowerSource.MEASURED),
        ("GenuineIntel", "42", PowerSource.ESTIMATED),  # Sandy Bridge
        ("GenuineIntel", "62", PowerSource.ESTIMATED),  # Ivy Bridge
        ("AuthenticAMD", "97", PowerSource.ESTIMATED),
    ],
)
def test_what_the_processor_computes_is_called_estimated(
    tmp_path: Path, vendor: str, model: str, source: PowerSource
) -> None:
    processor = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\nmodel\t\t: {model}\nmodel name\t: A 42\n"
    machine = plant(tmp_path, {"proc/cpuinfo": processor})
    zones(tmp_path, {"0": "package-0"})
    assert power_source(machine) is source
    sensor = RaplSensor(machine)
    sensor.read(0.0)
    spend(tmp_path, {"0": 10.0})
    assert sensor.read(1.0) == Reading(1.0, 10.0, source, (Rail("package-0", 10.0, source),), sensors=("rapl",))


def test_root_only_counters_are_no_answer_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = zones(tmp_path, DESKTOP)
    sensor = RaplSensor(machine)
    assert explain(machine) is None
    forbid(monkeypatch, "energy_uj")
    assert find_rapl(machine) == []
    assert [sensor.read(t) for t in (0.0, 1.0)] == [Reading(0.0), Reading(1.0)]
    assert explain(machine) == "energy_uj can only be read by root"


def test_broken_zones_are_explained(tmp_path: Path) -> None:
    machine = zones(tmp_path, {"0": "package-0"})
    (tmp_path / f"{POWERCAP}/intel-rapl:0/energy_uj").unlink()
    assert explain(machine) == "the RAPL zones have no energy that could be read"


def test_an_x86_machine_without_zones_is_explained_and_others_need_no_explanation(tmp_path: Path) -> None:
    assert find_rapl(Machine(tmp_path)) == []
    assert explain(Machine(tmp_path)) is None
    plant(tmp_path, {"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\nCPU part\t: 0xd0b\n"})
    assert explain(Machine(tmp_path)) is None
    plant(tmp_path, {"proc/cpuinfo": "vendor_id\t: GenuineIntel\n"})
    assert "virtual machine" in (explain(Machine(tmp_path)) or "")


# --- the pure parts ---


def test_mean_power_is_never_negative_nor_absurd() -> None:
    for before_j in (0.0, 1.0, 1e3, 2e5):
        for now_j in (0.0, 1.0, 1e3, 2e5):
            for range_j in (None, 1e-6, 1e5, RANGE_J):
                for elapsed_s in (0.02, 1.0, 60.0, 1e6):
                    range_uj = range_j * 1e6 if range_j is not None else None
                    before, now = Counter(before_j * 1e6, range_uj), Counter(now_j * 1e6, range_uj)
                    power_w = mean_power_w(before, now, elapsed_s)
                    assert power_w is None or 0 <= power_w <= 2000


def test_the_whole_is_known_only_with_all_its_parts() -> None:
    assert total_w({}, set()) is None
    assert total_w({"package-0/core": 3.0}, {"package-0/core"}) is None
    assert total_w({"package-0": 3.0, "package-0/core": 2.0}, {"package-0", "package-0/core"}) == 3.0
    assert total_w({"package-0": 3.0}, {"package-0", "package-1"}) is None
    assert total_w({"package-0": 3.0, "psys": 9.0}, {"package-0", "package-1", "psys"}) == 9.0
    assert total_w({"package-0-die-0": 3.0, "platform-1": 9.0}, {"package-0-die-0", "platform-1"}) == 9.0
