"""Recorded machines for tests: the files and the commands of each board, written below a folder.

Written from the documented formats, with the folders and links of the real ones: /sys/class and /sys/bus hold links
into /sys/devices, /proc/device-tree is one into /sys/firmware. Numbers are of a board at work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

from edge_runtime.sensors.machine import Machine

PMIC = """\
 3V7_WL_SW_A current(0)=0.00000000A
   3V3_SYS_A current(1)=0.06245952A
   1V8_SYS_A current(2)=0.16102850A
  DDR_VDD2_A current(3)=0.00780744A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.17566740A
    0V8_SW_A current(6)=0.32791250A
  VDD_CORE_A current(7)=1.87674000A
   3V3_DAC_A current(17)=0.00036630A
   3V3_ADC_A current(18)=0.00042735A
   0V8_AON_A current(16)=0.00579975A
      HDMI_A current(22)=0.01367520A
 3V7_WL_SW_V volt(8)=3.79999600V
   3V3_SYS_V volt(9)=3.30632200V
   1V8_SYS_V volt(10)=1.79828900V
  DDR_VDD2_V volt(11)=1.10292900V
  DDR_VDDQ_V volt(12)=0.60476130V
   1V1_SYS_V volt(13)=1.10439400V
    0V8_SW_V volt(14)=0.80256330V
  VDD_CORE_V volt(15)=0.89745940V
   3V3_DAC_V volt(20)=3.30494200V
   3V3_ADC_V volt(21)=3.30219400V
   0V8_AON_V volt(19)=0.79736190V
      HDMI_V volt(23)=5.07056000V
     EXT5V_V volt(24)=5.06788000V
      BATT_V volt(25)=3.01110800V
"""
PMIC_SUM_W = 2.722760  # of the twelve rails above, V × A

MACMON = (
    '{"timestamp":"2026-02-24T20:38:15.427569+00:00","temp":{"cpu_temp_avg":61.5,"gpu_temp_avg":52.25},'
    '"memory":{"ram_total":25769803776,"ram_usage":20985479168,"swap_total":4294967296,"swap_usage":2602434560},'
    '"fans":[{"name":"fan0","rpm":1200,"max_rpm":5200}],"cpu_scaled_ratio":0.41,"cpu_active_ratio":0.625,'
    '"ecpu_freq_mhz":1100,"ecpu_scaled_ratio":0.08,"pcpu_freq_mhz":3204,"pcpu_scaled_ratio":0.52,'
    '"gpu_freq_mhz":461,"cpu_power":7.5,"gpu_power":1.25,"ane_power":0.0,"all_power":8.75,"sys_power":14.5,'
    '"ram_power":0.5,"gpu_ram_power":0.001}\n'
)
MACMON_07 = (
    '{"temp":{"cpu_temp_avg":43.7,"gpu_temp_avg":36.9},"memory":{"ram_total":25769803776},"ecpu_usage":[1181,0.08],'
    '"pcpu_usage":[1974,0.015],"gpu_usage":[461,0.021],"cpu_power":0.25,"gpu_power":0.017,"ane_power":0.0,'
    '"all_power":0.267,"sys_power":5.875,"ram_power":0.116,"gpu_ram_power":0.0009}\n'
)
THERM_SILENT = (
    "Note: No thermal warning level has been recorded\n"
    "Note: No performance warning level has been recorded\n"
    "Note: No CPU power status has been recorded\n"
)
THERM_LIMITED = (
    "Note: No thermal warning level has been recorded\n"
    "2026-08-20 05:08:37 -0700 CPU Power notify\n"
    "\tCPU_Scheduler_Limit \t= 80\n\tCPU_Available_CPUs \t= 12\n\tCPU_Speed_Limit \t= 62\n"
)


@dataclass
class Commands:
    """A command runner with recorded answers, by the first words of a command; all other programs are missing."""

    answers: Mapping[str, str | None] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __call__(self, command: Sequence[str]) -> str | None:
        words = " ".join(command)
        self.asked.append(words)
        return next((answer for start, answer in self.answers.items() if words.startswith(start)), None)


@dataclass(frozen=True, slots=True)
class Losing(Machine):
    """A machine whose files that match `lost` are found, and gone or forbidden once they are read."""

    lost: str = "*"

    def text(self, path: str) -> str | None:
        return None if fnmatch(path, self.lost) else Machine.text(self, path)


def forbid(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Reading a path that ends so is not permitted, not even to root, who tests run as in a container."""
    read_bytes = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if str(path).endswith(ending):
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)


def write(root: Path, files: Mapping[str, object]) -> None:
    """Each file with its content and the line end that the kernel adds; folders are made."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def link(root: Path, name: str, target: str) -> None:
    """A relative link at `name` to `target`, both paths below the root."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(root / target, path.parent))


def raspberry_pi_4(root: Path) -> Machine:
    """Cool and well supplied. It has no current sensor, and its firmware says so."""
    device_tree(root, "Raspberry Pi 4 Model B Rev 1.4", "raspberrypi,4-model-b", "brcm,bcm2711")
    zones(root, {"cpu-thermal": 48199})
    clocks(root, 4, 1_500_000)
    hwmon(root, "soc/soc:firmware/raspberrypi-hwmon", 1, "rpi_volt", {"in0_lcrit_alarm": 0})
    return Machine(
        root,
        Commands(
            {
                "vcgencmd get_throttled": "throttled=0x0\n",
                "vcgencmd measure_temp": "temp=48.2'C\n",
                "vcgencmd pmic_read_adc": 'error=1 error_msg="Command not registered"\n',
            }
        ),
    )


def raspberry_pi_5(root: Path) -> Machine:
    """At its soft limit now, and once under-voltage and throttled."""
    device_tree(root, "Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712")
    zones(root, {"cpu-thermal": 80350})
    clocks(root, 4, 2_400_000)
    hwmon(root, "platform/soc@107c000000/rpi-hwmon", 2, "rpi_volt", {"in0_lcrit_alarm": 0})
    return Machine(
        root,
        Commands(
            {
                "vcgencmd get_throttled": "throttled=0xd0008\n",
                "vcgencmd measure_temp": "temp=80.3'C\n",
                "vcgencmd pmic_read_adc": PMIC,
            }
        ),
    )


NANO_RAILS = "sys/devices/7000c400.i2c/i2c-6/6-0040/iio:device0"


def jetson_nano(root: Path) -> Machine:
    """L4T r32, at 5.5 W."""
    compatible = ("nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210")
    device_tree(root, "NVIDIA Jetson Nano Developer Kit", *compatible)
    temps_mc = {"AO-therm": 51500, "CPU-therm": 46500, "GPU-therm": 44000, "PLL-therm": 45500}
    zones(root, temps_mc | {"PMIC-Die": 100000, "thermal-fan-est": 45250})
    clocks(root, 4, 1_479_000)
    nano_rails(root, {"POM_5V_IN": 5500, "POM_5V_GPU": 160, "POM_5V_CPU": 2480})
    link(root, "sys/bus/i2c/drivers/ina3221x/6-0040", "sys/devices/7000c400.i2c/i2c-6/6-0040")
    return Machine(root, Commands())


def nano_rails(root: Path, powers_mw: Mapping[str, object]) -> None:
    """The older driver's files, in the order given."""
    for channel, (name, power_mw) in enumerate(powers_mw.items()):
        write(root / NANO_RAILS, {f"rail_name_{channel}": name, f"in_power{channel}_input": power_mw})


ORIN_RAILS = "sys/devices/platform/bus@0/c240000.i2c/i2c-1/1-0040/hwmon/hwmon1"
ORIN_EVENTS = "sys/devices/platform/soctherm-oc-event/hwmon/hwmon3"


def jetson_orin_nano(root: Path) -> Machine:
    """L4T r36, at 9.6 W; its image engines sleep, so that their zones cannot be read."""
    compatible = ("nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", "nvidia,tegra234")
    device_tree(root, "NVIDIA Jetson Orin Nano Developer Kit", *compatible)
    temps_mc = {"cpu-thermal": 56312, "gpu-thermal": 54625, "cv0-thermal": -256000, "soc0-thermal": 53906}
    zones(root, temps_mc | {"soc1-thermal": 55062, "tj-thermal": 56312})
    clocks(root, 6, 1_510_400)
    orin_rails(root, {"VDD_IN": (5000, 1920), "VDD_CPU_GPU_CV": (4992, 500), "VDD_SOC": (4984, 300)})
    write(root / ORIN_RAILS, {"name": "ina3221", "in4_input": 9600, "in7_label": "sum of shunt voltages"})
    link(root, "sys/bus/i2c/drivers/ina3221/1-0040", "sys/devices/platform/bus@0/c240000.i2c/i2c-1/1-0040")
    link(root, "sys/class/hwmon/hwmon1", ORIN_RAILS)
    orin_events(root, (0, 0, 0))
    link(root, "sys/class/hwmon/hwmon3", ORIN_EVENTS)
    cooling(root, {"pwm-fan": 2, "cpu-throttle-alert": 0, "gpu-throttle-alert": 0, "hot-surface-alert": 0})
    return Machine(root, Commands())


def orin_rails(root: Path, channels: Mapping[str, tuple[object, object]]) -> None:
    """The kernel driver's files, name: (mV, mA), in the order given."""
    for i, (name, (voltage_mv, current_ma)) in enumerate(channels.items(), 1):
        files = {f"in{i}_label": name, f"in{i}_input": voltage_mv, f"curr{i}_input": current_ma}
        write(root / ORIN_RAILS, files)


def orin_events(root: Path, counts: Sequence[object]) -> None:
    """Under-voltages, average and instant over-currents since boot."""
    write(root / ORIN_EVENTS, {"name": "soctherm_oc"})
    for event, count in enumerate(counts, 1):
        write(root / ORIN_EVENTS, {f"oc{event}_event_cnt": count, f"oc{event}_throt_en": 1})


def apple_silicon(root: Path) -> Machine:
    """A Mac with macmon, at 14.5 W; it has none of Linux' files."""
    return Machine(
        root,
        Commands(
            {
                "macmon pipe -s 1": MACMON,
                "notifyutil -g com.apple.system.thermalpressurelevel": "com.apple.system.thermalpressurelevel 0\n",
                "pmset -g therm": THERM_SILENT,
            }
        ),
    )


def device_tree(root: Path, model: str, *compatible: str) -> None:
    """The board's name, and the names its kernel knows it by; both end in a zero byte."""
    folder = root / "sys/firmware/devicetree/base"
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(model.encode() + b"\0")
    (folder / "compatible").write_bytes("\0".join(compatible).encode() + b"\0")
    link(root, "proc/device-tree", "sys/firmware/devicetree/base")


def zones(root: Path, temps_mc: Mapping[str, object]) -> None:
    """Thermal zones, in the order given."""
    for i, (kind, temp_mc) in enumerate(temps_mc.items()):
        write(root / f"sys/devices/virtual/thermal/thermal_zone{i}", {"type": kind, "temp": temp_mc})
        if not (root / f"sys/class/thermal/thermal_zone{i}").exists():
            link(root, f"sys/class/thermal/thermal_zone{i}", f"sys/devices/virtual/thermal/thermal_zone{i}")


def cooling(root: Path, states: Mapping[str, object]) -> None:
    """Cooling devices, in the order given."""
    for i, (kind, state) in enumerate(states.items()):
        write(root / f"sys/class/thermal/cooling_device{i}", {"type": kind, "cur_state": state, "max_state": 3})


def hwmon(root: Path, device: str, number: int, name: str, files: Mapping[str, object]) -> None:
    """A chip of /sys/class/hwmon."""
    folder = f"sys/devices/{device}/hwmon/hwmon{number}"
    write(root / folder, {"name": name, **files})
    link(root, f"sys/class/hwmon/hwmon{number}", folder)


def clocks(root: Path, n_cores: int, freq_khz: int) -> None:
    """One frequency for all cores."""
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    write(root / policy, {"scaling_cur_freq": freq_khz, "affected_cpus": " ".join(map(str, range(n_cores)))})
    for core in range(n_cores):
        link(root, f"sys/devices/system/cpu/cpu{core}/cpufreq", policy)
