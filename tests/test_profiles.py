"""Device profiles: each is found on its own board, and nothing wrong in a file goes unnoticed or unexplained."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import pkgutil
from pathlib import Path

import pytest

import edge_runtime.sensors
from edge_runtime import options, profiles
from edge_runtime.errors import UsageError
from edge_runtime.options import RunArguments, run_options
from edge_runtime.profile_schema import TARGET_NAMES, read_profile
from edge_runtime.profiles import (
    Detect,
    PowerFit,
    Profile,
    RunDefaults,
    Targets,
    Thermal,
    choose_profile,
    describe,
    detect_profile,
    load_profile,
    profile_names,
    run_defaults,
    usable_cores,
)
from edge_runtime.resolve import RunOptions
from edge_runtime.sensors.machine import Machine
from edge_runtime.sensors.reading import PowerSource

SHIPPED = ["apple-silicon", "generic", "jetson-nano", "jetson-orin-nano", "native", "pi4", "pi5", "x86-64"]
ON_DEVICES = [name for name in SHIPPED if name != "native"]


def write(root: Path, path: str, text: str | bytes) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def board(root: Path, *compatible: str) -> Machine:
    """A recorded tree of a machine with a device tree: its names, each ended by a NUL."""
    write(root, "proc/device-tree/compatible", "".join(f"{name}\0" for name in compatible))
    return Machine(root)


def profile_file(folder: Path, text: str, name: str = "x") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(f'name = "{name}"\n{text}')
    return file


# ── the profiles that are there ─────────────────────────────────────────────────────────────────────────────────────


def test_the_shipped_profiles() -> None:
    assert profile_names() == SHIPPED


@pytest.mark.parametrize("name", ON_DEVICES)
def test_a_shipped_profile_is_whole(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert profile.sensors
    assert profile.power is not None
    assert PowerSource(profile.power.label) is PowerSource.ESTIMATED
    assert "://" not in profile.power.source
    assert profile.thermal is not None
    # what a controller may pass its ceiling by must not be enough to throttle
    assert profile.thermal.ceiling_c <= profile.thermal.throttle_c - 3
    assert tuple(profile.targets) == TARGET_NAMES
    for targets in profile.targets.values():
        assert targets.temp_ceiling_c is not None
        assert targets.temp_ceiling_c <= profile.thermal.throttle_c - 3
        # a cap at or below what the idle board takes could not be held
        assert targets.power_cap_w is None or targets.power_cap_w > profile.power.static_w + 0.5
    assert profile.targets["balanced"].max_disagreement == 0


def test_native_says_nothing_of_a_device() -> None:
    native = load_profile("native")
    assert (native.detect, native.power, native.thermal, native.sensors) == (Detect(), None, None, ())
    assert set(native.targets.values()) == {Targets()}


def test_profiles_name_sensors_that_exist() -> None:
    known = set()
    for module in pkgutil.iter_modules(edge_runtime.sensors.__path__):
        for sensor in vars(importlib.import_module(f"edge_runtime.sensors.{module.name}")).values():
            if isinstance(sensor, type) and hasattr(sensor, "read"):
                fields = dataclasses.fields(sensor) if dataclasses.is_dataclass(sensor) else ()
                known |= {field.default for field in fields if field.name == "name"} | {getattr(sensor, "name", None)}
    for name in SHIPPED:
        assert set(load_profile(name).sensors) <= known, name


def test_the_fit_of_the_pi5() -> None:
    assert load_profile("pi5").power_fit == PowerFit(slope=1.1451, offset_w=0.5879)
    assert load_profile("pi4").power_fit is None


def test_a_profile_cannot_be_changed() -> None:
    profile = load_profile("pi5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.n_threads = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        profile.targets["fast"] = Targets()  # type: ignore[index]
    with pytest.raises(TypeError):
        profile.build.cmake["GGML_NATIVE"] = "ON"  # type: ignore[index]


def test_what_a_profile_sets_in_one_line() -> None:
    assert describe(load_profile("pi4")) == (
        "4 threads; prompts in batches of 32; sensors raspberry-pi, thermal, cpufreq, load, battery, psutil; "
        "estimated power model; ceiling 76 °C, throttles at 80 °C; targets battery, quiet, balanced, fast"
    )
    assert describe(Profile("x")) == "a thread per physical core; no power model"


def test_an_installed_package_has_its_profiles_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edge_runtime").mkdir()
    (tmp_path / "devices").mkdir()
    monkeypatch.setattr(profiles, "__file__", str(tmp_path / "edge_runtime" / "profiles.py"))
    assert profiles.profiles_dir() == tmp_path / "devices"
    (tmp_path / "edge_runtime" / "devices").mkdir()
    assert profiles.profiles_dir() == tmp_path / "edge_runtime" / "devices"


# ── detection ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("compatible", "name"),
    [
        (("raspberrypi,4-model-b", "brcm,bcm2711"), "pi4"),
        (("raspberrypi,400", "brcm,bcm2711"), "pi4"),
        (("raspberrypi,4-compute-module", "brcm,bcm2711"), "pi4"),
        (("someone,carrier-board", "brcm,bcm2711"), "pi4"),
        (("raspberrypi,5-model-b", "brcm,bcm2712"), "pi5"),
        (("raspberrypi,500", "brcm,bcm2712"), "pi5"),
        (("nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210"), "jetson-nano"),
        (("nvidia,p3450-0000", "nvidia,tegra210"), "jetson-nano"),
        (("nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", "nvidia,tegra234"), "jetson-orin-nano"),
        (("nvidia,p3768-0000+p3767-0003-super", "nvidia,tegra234"), "jetson-orin-nano"),
        # neighbours that are not ours
        (("nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"), "generic"),  # Orin NX
        (("nvidia,p2371-2180", "nvidia,tegra210"), "generic"),  # TX1: the Nano's chip family
        (("raspberrypi,3-model-b", "brcm,bcm2837"), "generic"),
        (("apple,j314s", "apple,t6000", "apple,arm-platform"), "generic"),  # Linux: without Metal
    ],
)
def test_boards_are_known_by_their_device_tree(tmp_path: Path, compatible: tuple[str, ...], name: str) -> None:
    found = detect_profile(board(tmp_path, *compatible), "Linux", "aarch64")
    assert found.profile.name == name
    if name == "generic":
        assert found.why == "no other profile is for Linux on aarch64"
    else:
        assert found.why in {f"the device tree names {each}" for each in compatible}


@pytest.mark.parametrize(
    ("system", "arch", "name"),
    [
        ("Linux", "x86_64", "x86-64"),
        ("Darwin", "x86_64", "x86-64"),
        ("FreeBSD", "amd64", "x86-64"),
        ("Darwin", "arm64", "apple-silicon"),
        ("Linux", "aarch64", "generic"),
        ("Linux", "arm64", "generic"),
        ("Linux", "riscv64", "generic"),
        ("", "", "generic"),
    ],
)
def test_other_machines_are_known_by_uname(tmp_path: Path, system: str, arch: str, name: str) -> None:
    found = detect_profile(Machine(tmp_path), system, arch)
    assert found.profile.name == name
    assert (system or "an unknown system") in found.why


def test_every_profile_but_native_is_detected_somewhere(tmp_path: Path) -> None:
    trees = {"pi4": "raspberrypi,4-model-b", "pi5": "raspberrypi,5-model-b", "jetson-nano": "nvidia,jetson-nano"}
    trees["jetson-orin-nano"] = "nvidia,p3767-0005"
    found = {detect_profile(board(tmp_path / n, c), "Linux", "aarch64").profile.name for n, c in trees.items()}
    for uname in (("Linux", "x86_64"), ("Darwin", "arm64"), ("Linux", "s390x")):
        found.add(detect_profile(Machine(tmp_path / "empty"), *uname).profile.name)
    assert sorted(found) == ON_DEVICES


def test_the_other_place_of_the_device_tree(tmp_path: Path) -> None:
    write(tmp_path, "sys/firmware/devicetree/base/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert detect_profile(Machine(tmp_path), "Linux", "aarch64").profile.name == "pi5"


def test_an_orin_nano_that_started_without_a_device_tree(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/dmi/id/sys_vendor", "NVIDIA\n")
    write(tmp_path, "sys/class/dmi/id/product_name", "NVIDIA Jetson Orin Nano Developer Kit\n")
    found = detect_profile(Machine(tmp_path), "Linux", "aarch64")
    assert found.profile.name == "jetson-orin-nano"
    assert found.why == "the firmware (DMI) names NVIDIA NVIDIA Jetson Orin Nano Developer Kit"


@pytest.mark.parametrize(
    "compatible",
    [
        b"",
        b"\0\0\0\0",
        b"\xff\xfe\xfd garbage \x80\0",
        b"raspberrypi,5-model-b-but-no,\x1b[2Jend",  # a terminal must not be commanded
        b"\0raspberrypi",
        b"x" * 100_000,
        b"brcm,bcm27120\0",
    ],
)
def test_a_device_tree_of_garbage_is_no_board(tmp_path: Path, compatible: bytes) -> None:
    write(tmp_path, "proc/device-tree/compatible", compatible)
    found = detect_profile(Machine(tmp_path), "Linux", "aarch64")
    assert found.profile.name == "generic"
    assert "\x1b" not in found.why


def test_a_device_tree_that_is_a_folder_or_a_dead_link(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree/compatible").mkdir(parents=True)
    folder = tmp_path / "sys/firmware/devicetree/base"
    folder.mkdir(parents=True)
    (folder / "compatible").symlink_to("nowhere")
    (tmp_path / "sys/class/dmi/id/product_name").mkdir(parents=True)
    assert detect_profile(Machine(tmp_path), "Linux", "aarch64").profile.name == "generic"


def test_dmi_that_only_root_may_read(tmp_path: Path) -> None:
    class Forbidden:
        def text(self, path: str) -> str | None:
            return None

    assert detect_profile(Forbidden(), "Linux", "x86_64").profile.name == "x86-64"


def test_the_more_particular_reason_wins(tmp_path: Path) -> None:
    folder = tmp_path / "devices"
    folder.mkdir()
    profile_file(folder, '[detect]\nmachines = ["aarch64"]', "a-processor")
    profile_file(folder, '[detect]\nsystems = ["Linux"]\nmachines = ["aarch64"]', "b-system")
    profile_file(folder, '[detect]\ndmi = ["Acme Board*"]', "c-dmi")
    profile_file(folder, '[detect]\ndevice_tree = ["acme,chip"]', "d-chip")
    profile_file(folder, '[detect]\ndevice_tree = ["acme,board"]', "e-board")
    profile_file(folder, '[detect]\nsystems = ["Darwin"]\ndevice_tree = ["acme,board"]', "e-a-board-elsewhere")
    profile_file(folder, "", "generic")
    machine = Machine(tmp_path)

    def name() -> str:
        return detect_profile(machine, "Linux", "aarch64", folder).profile.name

    assert detect_profile(machine, "Linux", "mips", folder).profile.name == "generic"
    assert name() == "b-system"
    write(tmp_path, "sys/class/dmi/id/board_vendor", "Acme\n")
    write(tmp_path, "sys/class/dmi/id/board_name", "Board 7\n")
    assert name() == "c-dmi"
    board(tmp_path, "acme,chip")
    assert name() == "d-chip"
    board(tmp_path, "acme,board", "acme,chip")
    assert name() == "e-board"


# ── who decides ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_beats_the_environment_and_that_beats_detection(tmp_path: Path) -> None:
    machine = board(tmp_path, "raspberrypi,5-model-b")
    by_name = choose_profile(machine, "Linux", "aarch64", "pi4", {"EDGE_RUNTIME_DEVICE": "x86-64"})
    assert (by_name.profile.name, by_name.why) == ("pi4", "it was asked for")
    by_environment = choose_profile(machine, "Linux", "aarch64", None, {"EDGE_RUNTIME_DEVICE": "x86-64"})
    assert (by_environment.profile.name, by_environment.why) == ("x86-64", "$EDGE_RUNTIME_DEVICE names it")
    for nothing in ({}, {"EDGE_RUNTIME_DEVICE": ""}):
        assert choose_profile(machine, "Linux", "aarch64", None, nothing).profile.name == "pi5"
    assert choose_profile(Machine(tmp_path / "none"), "Linux", "mips", None, {}).profile.name == "generic"


def test_native_means_that_this_machine_is_looked_at(tmp_path: Path) -> None:
    """The Makefile always sets $EDGE_RUNTIME_DEVICE, to native unless told otherwise."""
    machine = board(tmp_path, "raspberrypi,5-model-b")
    assert choose_profile(machine, "Linux", "aarch64", None, {"EDGE_RUNTIME_DEVICE": "native"}).profile.name == "pi5"
    asked = choose_profile(machine, "Linux", "aarch64", "native", {"EDGE_RUNTIME_DEVICE": "pi4"})
    assert (asked.profile.name, asked.why) == ("pi5", "the device tree names raspberrypi,5-model-b")


@pytest.mark.parametrize(("name", "near"), [("pi6", "pi"), ("Jetson Nano", "jetson-nano"), ("../pi5", "pi5"), ("", "")])
def test_an_unknown_name_lists_the_known_ones(name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_profile(name)
    assert f"unknown device {name!r}; known: {', '.join(SHIPPED)}" in caught.value.message
    assert near in caught.value.hint
    assert caught.value.hint.startswith("did you mean")


def test_a_profile_of_the_users_own(tmp_path: Path) -> None:
    """A new device is one file, wherever it is: no code, no installed folder to write to."""
    file = profile_file(tmp_path, "[thermal]\nthrottle_c = 70\nceiling_c = 65.5", "my-board")
    chosen = choose_profile(Machine(tmp_path), "Linux", "aarch64", str(file), {})
    assert chosen.profile.thermal == Thermal(70, 65.5)


def test_without_any_profiles_there_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown device 'generic'; known: none"):
        detect_profile(Machine(tmp_path), "Linux", "aarch64", tmp_path)


# ── how a model runs there ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "n_usable", "n_threads", "n_batch"),
    [("pi4", 4, 4, 32), ("pi5", 2, 2, 64), ("pi5", 8, 4, 64), ("x86-64", 8, 0, 128), ("generic", 8, 0, 128)],
)
def test_a_device_says_how_a_model_runs_with_no_more_threads_than_cores(
    name: str, n_usable: int, n_threads: int, n_batch: int
) -> None:
    assert run_defaults(load_profile(name), n_usable) == RunDefaults(n_threads, n_batch)


def test_without_a_word_of_the_profile_a_model_runs_as_the_library_does() -> None:
    plain = RunOptions()
    for profile in (Profile("x"), load_profile("x86-64"), load_profile("generic")):
        assert run_defaults(profile, 64) == RunDefaults(plain.n_threads, plain.n_batch)


def test_what_the_command_line_says_beats_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 3)

    def found(**arguments: object) -> tuple[int, int]:
        chosen = run_options(RunArguments(**arguments))  # type: ignore[arg-type]
        return chosen.n_threads, chosen.n_batch

    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "generic")
    assert found() == (0, 128)
    assert found(device="pi4") == (3, 32)
    assert found(device="pi4", threads=8, batch=512) == (8, 512)
    assert found(device="pi4", threads=1) == (1, 32)
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "jetson-nano")
    assert found() == (3, 32)
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "jetson-mano")
    with pytest.raises(UsageError, match="unknown device 'jetson-mano'"):
        run_options(RunArguments())


def test_cores_that_may_be_used_are_at_least_one() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# ── what is wrong with a file ───────────────────────────────────────────────────────────────────────────────────────

POWER = '[power]\nstatic_w = 1\nactive_w_per_core = 1\njoule_per_gb = 0.1\nsource = "a guess"\n'
THERMAL = "[thermal]\nthrottle_c = 80\nceiling_c = 75\n"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('descripton = ""', "unknown key 'descripton' in x.toml; known: name, description, build, ", "'description'"),
        ("[runtime]\nn_thread = 4", "unknown key 'n_thread' in [runtime] of x.toml", "'n_threads'"),
        ("[detect]\ndevicetree = []", "unknown key 'devicetree' in [detect] of x.toml", "'device_tree'"),
        ("[sensors.fitt]\nslope = 1", "unknown key 'fitt' in [sensors] of x.toml; known: names, fit", "'fit'"),
        ("[targets.silent]\n", "unknown key 'silent' in [targets] of x.toml; known: battery, quiet", "did you mean"),
        ("[targets.quiet]\npower_cap = 3", "unknown key 'power_cap' in [targets.quiet] of x.toml", "'power_cap_w'"),
        ('"" = 1', "unknown key '' in x.toml", "did you mean"),
        ("[build.cmake]\nAVX2 = true", "bad CMake name 'AVX2' in [build.cmake] of x.toml", "as llama.cpp spells it"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_profile(profile_file(tmp_path, text))
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description = 3", "description in x.toml: 3 is not a text"),
        ("[runtime]\nn_threads = '4'", "n_threads in [runtime] of x.toml: '4' is not a number"),
        ("[runtime]\nn_threads = 4.0", "n_threads in [runtime] of x.toml: 4.0 is not a whole number"),
        ("[runtime]\nn_threads = true", "n_threads in [runtime] of x.toml: True is not a number"),
        ("[runtime]\nn_threads = -1", "n_threads in [runtime] of x.toml: -1 is not between 0 and 512"),
        ("[runtime]\nn_ubatch = 65537", "n_ubatch in [runtime] of x.toml: 65537 is not between 0 and 65536"),
        ("runtime = 4", "'runtime' in x.toml is not a table"),
        ("[targets]\nfast = 1", "'fast' in [targets] of x.toml is not a table"),
        ('[build]\nsystems = "Linux"', "systems in [build] of x.toml: 'Linux' is not a list of texts"),
        ("[build]\nmachines = [1]", "machines in [build] of x.toml: [1] is not a list of texts"),
        ("[build.cmake]\nGGML_X = 1.5", "GGML_X in [build.cmake] of x.toml: 1.5 is neither"),
        ("[build.cmake]\nGGML_X = 2020-01-01", "GGML_X in [build.cmake] of x.toml: datetime.date"),
        ('[detect]\ndmi = [""]', "dmi in [detect] of x.toml: [''] is not a list of texts"),
        ('[sensors]\nnames = ["a", "a"]', "names in [sensors] of x.toml: ['a', 'a'] says something twice"),
        ("[sensors.fit]\nslope = 0\noffset_w = 0", "slope in [sensors.fit] of x.toml: 0 is not between 0.1 and 10"),
        ("[power]\nstatic_w = -1", "static_w in [power] of x.toml: -1 is not between 0 and 2000"),
        ("[power]\nstatic_w = nan", "static_w in [power] of x.toml: nan is not between"),
        ("[power]\njoule_per_gb = inf", "joule_per_gb in [power] of x.toml: inf is not between"),
        ('[power]\nlabel = "measured"', "label in [power] of x.toml: 'measured' is neither"),
        ("[power]\nlabel = []", "label in [power] of x.toml: [] is neither"),
        ("[thermal]\nthrottle_c = 353", "throttle_c in [thermal] of x.toml: 353 is not between 30 and 125"),
        ("[targets.fast]\nmax_disagreement = 2", "max_disagreement in [targets.fast] of x.toml: 2 is not between"),
        ("[targets.fast]\npower_cap_w = 0", "power_cap_w in [targets.fast] of x.toml: 0 is not between"),
        (POWER.replace("static_w", "#"), "[power] of x.toml lacks static_w"),
        ("[thermal]", "[thermal] of x.toml lacks throttle_c and ceiling_c"),
        ("[sensors.fit]\nslope = 1.1", "[sensors.fit] of x.toml lacks offset_w"),
        (THERMAL.replace("75", "81"), "ceiling_c in [thermal] of x.toml: 81 is above throttle_c, 80"),
        (f"{THERMAL}[targets.fast]\ntemp_ceiling_c = 90", "temp_ceiling_c in [targets.fast] of x.toml: 90 is above"),
    ],
)
def test_a_wrong_value_names_key_and_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_profile(profile_file(tmp_path, text))
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "line", "column", "why"),
    [
        (b'name = "x"\n[runtime\nn_threads = 4', 2, 9, ""),
        (b'name = "x"\nn_threads 4', 2, 11, ""),
        (b'name = "x"\nname = "x"', 2, 11, ""),
        (b'name = "x"\n[runtime]\n[runtime]', 3, 9, ""),
        (b"name =", 1, 7, ""),
        (b'a = 1\nname = "x', 2, 10, ""),
        (b'name = "x" # caf\xe9', 1, 17, "not UTF-8"),
        ('name = "x"\n# é\n# €\xe9'.encode() + b"\xff", 3, 5, "not UTF-8"),
        (b"a = " + b"[" * 100_000, 1, 1, "nested too deeply"),
    ],
)
def test_a_syntax_error_names_line_and_column(tmp_path: Path, data: bytes, line: int, column: int, why: str) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_profile(file)
    assert f"{file} is not valid TOML: line {line}, column {column}: " in caught.value.message
    assert why in caught.value.message
    assert "(at" not in caught.value.message


def test_a_name_that_is_not_the_files(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('name = "y"')
    with pytest.raises(UsageError, match=r"x.toml says that its name is 'y'"):
        read_profile(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text("")
    with pytest.raises(UsageError, match=r"x.toml lacks name"):
        read_profile(tmp_path / "x.toml")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing.toml cannot be read: No such file"):
        load_profile(os.fspath(tmp_path / "nothing.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"folder.toml cannot be read: Is a directory"):
        load_profile(os.fspath(tmp_path / "folder.toml"))


def test_a_file_that_says_nothing_but_its_name(tmp_path: Path) -> None:
    profile = read_profile(profile_file(tmp_path, ""))
    assert dataclasses.replace(profile, targets={}) == Profile("x", targets={})
    assert profile.targets == {name: Targets() for name in TARGET_NAMES}


def test_everything_a_file_can_say(tmp_path: Path) -> None:
    profile = read_profile(
        profile_file(
            tmp_path,
            'description = "a board"\n[build]\nsystems = ["Linux"]\nmachines = ["aarch64"]\n[build.cmake]\n'
            'GGML_NATIVE = false\nGGML_CPU_ARM_ARCH = "armv8-a"\nCMAKE_X = 87\n'
            "[runtime]\nn_threads = 3\nn_ubatch = 32\n"
            '[detect]\ndevice_tree = ["a"]\ndmi = ["b"]\nsystems = ["c"]\nmachines = ["d"]\n[sensors]\nnames = ["e"]\n'
            f"[sensors.fit]\nslope = 1.5\noffset_w = -0.5\n{POWER}label = 'calibrated'\n{THERMAL}"
            "[targets.quiet]\npower_cap_w = 3\ntemp_ceiling_c = 60\nmin_tokens_per_s = 2.5\nmax_disagreement = 0.02\n",
        )
    )
    assert profile.build.cmake == {"GGML_NATIVE": "OFF", "GGML_CPU_ARM_ARCH": "armv8-a", "CMAKE_X": "87"}
    assert (profile.build.systems, profile.build.machines) == (("Linux",), ("aarch64",))
    assert (profile.n_threads, profile.n_ubatch, profile.sensors) == (3, 32, ("e",))
    assert profile.detect == Detect(("a",), ("b",), ("c",), ("d",))
    assert profile.power_fit == PowerFit(1.5, -0.5)
    assert profile.power is not None
    assert (profile.power.label, profile.power.source) == ("calibrated", "a guess")
    assert math.isclose(profile.power.joule_per_gb, 0.1)
    assert profile.targets["quiet"] == Targets(3, 60, 2.5, 0.02)
    assert profile.targets["fast"] == Targets()
