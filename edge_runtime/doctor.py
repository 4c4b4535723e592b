"""What this installation has and lacks: each part checked on its own, so that one missing part hides no other."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

from . import __version__, display
from ._library import ENV_BINDINGS, ENV_OURS, library_dir
from .errors import EdgeError
from .memory import machine_memory
from .models import DEMO_HINT, DEMO_MODEL, demo_model_path
from .native import (
    BINDINGS_VERSION,
    BUILD_HINT,
    Api,
    available_kernels,
    expected_abi,
    kernel_weight_types,
    load,
    struct_sizes,
    weight_bytes,
)
from .profiles import Profile, choose_profile, describe, run_defaults, usable_cores
from .resolve import checked_header
from .sensors.detect import detect, missing
from .sensors.machine import Machine, Sensor
from .sensors.reading import combine
from .sensors.recording import read_recording
from .sensors.sampler import SensorGroup
from .sensors_view import summary
from .slices import default_threads

_EDGE_FUNCTIONS = (
    "edge_abi_version",
    "edge_supported_archs",
    "edge_model_supported",
    "edge_sizeof",
    "edge_slice_init",
    "edge_slice_hidden",
    "edge_slices_decode",
)


class Status(str, Enum):
    """How a part is doing."""

    OK = "ok"
    OPTIONAL = "optional"  # missing, and not needed to run
    MISSING = "missing"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    part: str
    status: Status
    detail: str
    hint: str = ""

    @property
    def fails(self) -> bool:
        return self.status in (Status.MISSING, Status.PROBLEM)


def examine(model: str | None, replay: Path | None = None) -> list[Check]:
    """Every check, in the order in which things build on each other; `replay` is a recording instead of the sensors."""
    checks = [_python(), _bindings(), _library_files(), *_manifest(library_dir())]
    try:
        api = load()
    except EdgeError as error:
        checks.append(Check("library", Status.PROBLEM, error.message, error.hint))
    else:
        checks += _loaded_library(api)
    device, profile = _device_profile()
    sensors = _sensors(Machine(), profile) if replay is None else _recorded_sensors(replay)
    checks += [*_run_defaults(profile), _memory(), device, *sensors, _demo_model()]
    if model is not None:
        checks += _model(model)
    return [*checks, _matplotlib(), *_build_tools()]


def doctor(model: str | None, *, as_json: bool, replay: Path | None = None) -> bool:
    """Print the checks; True if nothing needed is missing."""
    checks = examine(model, replay)
    healthy = not any(check.fails for check in checks)
    if as_json:
        display.write_json({"healthy": healthy, "checks": [dataclasses.asdict(check) for check in checks]})
        return healthy
    width = max(len(check.part) for check in checks)
    for check in checks:
        print(f"{check.status.value:<8}  {check.part:<{width}}  {check.detail}")
        if check.hint and check.status is not Status.OK:
            print(f"{'':<8}  {'':<{width}}  hint: {check.hint}")
    failed = sum(check.fails for check in checks)
    display.tell("all that is needed is there" if healthy else f"{failed} of {len(checks)} checks failed")
    return healthy


# ── the parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, edge-runtime {__version__}"
    return Check(
        "python", Status.OK if sys.version_info >= (3, 10) else Status.PROBLEM, detail, "use Python 3.10 or later"
    )


def _bindings() -> Check:
    hint = f"pip install llama-cpp-python=={BINDINGS_VERSION}"
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Check("bindings", Status.MISSING, "llama-cpp-python is not installed", hint)
    if version != BINDINGS_VERSION:
        return Check("bindings", Status.PROBLEM, f"llama-cpp-python {version}, needed: {BINDINGS_VERSION}", hint)
    return Check("bindings", Status.OK, f"llama-cpp-python {version}")


def _library_files() -> Check:
    folder = library_dir()
    chosen = next((f", from ${name}" for name in (ENV_OURS, ENV_BINDINGS) if os.environ.get(name) == str(folder)), "")
    if folder == Path(__file__).parent / "lib":
        chosen = ""  # point_bindings has set the variable itself
    files = sorted(folder.glob("libllama.*"))
    if not files:
        return Check("library file", Status.MISSING, f"no libllama in {folder}{chosen}", BUILD_HINT)
    return Check("library file", Status.OK, f"{files[0]}{chosen}")


def _manifest(folder: Path) -> Iterator[Check]:
    """What the build wrote about itself."""
    path = folder / "manifest.json"
    if not path.exists():
        yield Check("build", Status.OPTIONAL, f"no manifest.json in {folder}: how it was built is unknown")
        return
    try:
        found = json.loads(path.read_text())
        made_of = f"{found['package']} {found['version']}, llama.cpp {found['llama_cpp_commit']}"
        yield Check("source", Status.OK, f"{made_of}, patches: {', '.join(_patch_names(found['patches']))}")
        flags = " ".join(found["flags"])
        yield Check("build", Status.OK, f"for device {found['device']} by {found['compiler']}, flags: {flags}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Check("build", Status.PROBLEM, f"{path} cannot be read: {error!r}", BUILD_HINT)


def _patch_names(patches: dict[str, str]) -> list[str]:
    return [name.removesuffix(".patch") for name in patches if name.endswith(".patch")]


def _loaded_library(api: Api) -> Iterator[Check]:
    missing = [name for name in _EDGE_FUNCTIONS if not hasattr(api.lib, name)]
    detail = (
        f"lacks {', '.join(missing)}" if missing else f"ABI {expected_abi}, {len(_EDGE_FUNCTIONS)} edge_* functions"
    )
    yield Check("library", Status.PROBLEM if missing else Status.OK, detail, BUILD_HINT)
    sizes = struct_sizes(api.c, api.lib)
    wrong = [f"{name} {ours} here, {theirs} there" for name, (ours, theirs) in sizes.items() if ours != theirs]
    detail = "; ".join(wrong) or f"{len(sizes)} structs have equal sizes in bindings and library"
    yield Check("structs", Status.PROBLEM if wrong else Status.OK, detail, BUILD_HINT)
    yield Check("architectures", Status.OK, ", ".join(api.supported_architectures))
    yield Check("cpu features", Status.OK, api.system_info)
    yield _kernels(available_kernels())


def _kernels(names: tuple[str, ...]) -> Check:
    if not names:
        return Check(
            "kernels",
            Status.OPTIONAL,
            "stock: no edge kernels for this processor, or in this build",
            "they need AVX2 with FMA and F16C, or a 64-bit ARM, and a build with GGML_EDGE_KERNELS",
        )
    others = f"; also {', '.join(names[1:])}" if names[1:] else ""
    return Check("kernels", Status.OK, f"edge: {names[0]}{others}; for {', '.join(kernel_weight_types())}")


def _run_defaults(profile: Profile | None) -> Iterator[Check]:
    """How many threads compute and how many prompt tokens at once, where nobody says otherwise, and why."""
    usable, cores = usable_cores(), psutil.cpu_count(logical=False) or "unknown"
    defaults = run_defaults(profile or Profile(""), usable)
    threads = f"{default_threads()}, one per physical core"
    if profile is not None and defaults.n_threads:
        threads = f"{defaults.n_threads}, of the {profile.n_threads} that the device profile {profile.name} says"
    has = f"the machine has {cores} physical cores, this process may use {usable}"
    yield Check("threads", Status.OK, f"{threads}: {has}")
    why = (
        f"as the device profile {profile.name} says" if profile and profile.n_ubatch else "no device profile says more"
    )
    yield Check("batch", Status.OK, f"{defaults.n_batch} prompt tokens at once, {why}")


def _memory() -> Check:
    memory, whole = machine_memory(), psutil.virtual_memory().total
    limit = "" if memory.total == whole else f" (a control group's limit; the machine has {whole / 2**30:.1f} GiB)"
    return Check(
        "memory", Status.OK, f"{memory.total / 2**30:.1f} GiB{limit}, {memory.available / 2**30:.1f} GiB available"
    )


def _device_profile() -> tuple[Check, Profile | None]:
    """Which kind of device this is taken for, why, and what its profile sets; and the profile."""
    try:
        found = choose_profile(Machine(), platform.system(), platform.machine())
    except EdgeError as error:
        return Check("device profile", Status.PROBLEM, error.message, error.hint), None
    said = f"{found.profile.name}, because {found.why}: {describe(found.profile)}"
    return Check("device profile", Status.OK, said), found.profile


def _sensors(
    machine: Machine,
    profile: Profile | None = None,
    find: Callable[[Machine, Profile | None], list[Sensor]] = detect,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Check]:
    """What each sensor says now, which do not answer, and what none says."""
    broken: list[str] = []
    found = find(machine, profile)
    group = SensorGroup(found, broken.append)
    if found:
        group.settle(now, sleep)
    time_s = now()
    parts = [part for part in group.parts(time_s) if part.sensors]
    said = "; ".join(f"{', '.join(part.sensors)}: {summary(part)}" for part in parts)
    yield Check("sensors", Status.OK if parts else Status.OPTIONAL, said or "none answers")
    reading = combine(time_s, parts)
    silent = [name for name in group.names if name not in reading.sensors]
    for text in broken:
        yield Check("broken sensor", Status.OPTIONAL, text)
    if silent:
        yield Check("silent sensors", Status.OPTIONAL, ", ".join(silent))
    for lack in missing(machine, reading):
        yield Check(f"no {lack.what}", Status.OPTIONAL, lack.why, lack.hint)


def _recorded_sensors(path: Path) -> Iterator[Check]:
    """Which sensors answered in a recording, what they knew first, and what none of them knew."""
    warnings: list[str] = []
    try:
        recording = read_recording(path, warnings.append)
    except EdgeError as error:
        yield Check("sensors", Status.PROBLEM, error.message, error.hint)
        return
    readings = recording.readings
    known = combine(readings[0].time_s, readings)
    seconds = readings[-1].time_s - readings[0].time_s
    names = ", ".join(known.sensors) or "sensors without a name"
    where = f"a replay of {path}, from {recording.machine}"
    told = f"{where}: {len(readings):,} readings in {seconds:.0f} s by {names}, at first {summary(known)}"
    yield Check("sensors", Status.OK, display.harmless(told))
    for text in warnings:
        yield Check("recording", Status.OPTIONAL, display.harmless(text))
    for lack in missing(None, known):
        yield Check(f"no {lack.what}", Status.OPTIONAL, lack.why, lack.hint)


def _demo_model() -> Check:
    path = demo_model_path()
    if path is None:
        return Check("demo model", Status.OPTIONAL, f"{DEMO_MODEL} is not installed", DEMO_HINT)
    return Check("demo model", Status.OK, f"{DEMO_MODEL}: {path}")


def _model(name: str) -> Iterator[Check]:
    try:
        header = checked_header(name)
    except EdgeError as error:
        yield Check("model", Status.PROBLEM, error.message, error.hint)
        return
    size = f"{header.file_bytes / 2**20:.0f} MiB"
    yield Check("model", Status.OK, f"{header.path}: {header.architecture}, {header.n_layer} layers, {size}")
    names = available_kernels()
    if names:
        by_type = weight_bytes(header.path)
        taken = sum(n for kind, n in by_type.items() if kind in kernel_weight_types())
        others = ", ".join(sorted(set(by_type) - set(kernel_weight_types()) - {"f32"}))
        detail = f"{names[0]} for {taken / max(1, sum(by_type.values())):.0%} of its weights"
        yield Check("model kernels", Status.OK, detail + (f"; stock for {others}" if others else ""))


def _matplotlib() -> Check:
    if importlib.util.find_spec("matplotlib") is None:
        return Check(
            "matplotlib", Status.OPTIONAL, "draws the pictures of `lens --png`", "pip install 'edge-runtime[plot]'"
        )
    return Check("matplotlib", Status.OK, importlib.metadata.version("matplotlib"))


def _build_tools() -> Iterator[Check]:
    needed = {"compiler": (os.environ.get("CXX", "c++"), "g++", "clang++"), "cmake": ("cmake",), "patch": ("patch",)}
    for part, programs in needed.items():
        path = next((found for program in programs if (found := shutil.which(program))), None)
        if path:
            yield Check(part, Status.OK, path)
        else:
            hint = "on Debian and its kin: apt install g++ cmake patch; on macOS: xcode-select --install"
            yield Check(part, Status.OPTIONAL, "needed only to rebuild the library", hint)
