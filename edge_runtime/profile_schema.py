"""What a device profile may say: devices/NAME.toml → Profile, every table, key, type and range checked.

The native build reads profiles before anything is installed, so this needs the standard library alone (and tomli on
Python 3.10).
"""

from __future__ import annotations

import difflib
import importlib
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UsageError

TARGET_NAMES = ("battery", "quiet", "balanced", "fast")


# ── what is in a profile ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Build:
    """For whom the native library is built, and how; no systems or machines: any."""

    systems: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    cmake: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Detect:
    """How a machine is recognised: shell patterns, of which one must fit in each list that is not empty.

    A device tree or DMI name is enough to be sure; systems and machines alone say only what kind of computer it is.
    """

    device_tree: tuple[str, ...] = ()  # names in the device tree's "compatible"
    dmi: tuple[str, ...] = ()  # "vendor product" of the system or the board
    systems: tuple[str, ...] = ()  # as `uname -s`
    machines: tuple[str, ...] = ()  # as `uname -m`


@dataclass(frozen=True, slots=True)
class PowerFit:
    """What turns a sensor's sum of rails into the power of the whole board: slope · sum + offset."""

    slope: float
    offset_w: float


@dataclass(frozen=True, slots=True)
class PowerModel:
    """Power without a sensor: static + per core · busy cores + energy per GB · memory traffic in GB per second."""

    static_w: float
    active_w_per_core: float
    joule_per_gb: float  # of 10⁹ bytes
    source: str  # where the numbers are from, in words
    label: str = "estimated"  # or "calibrated": fitted to a power meter; a sensors.reading.PowerSource either way


@dataclass(frozen=True, slots=True)
class Thermal:
    """Where the firmware slows the processor down, and how hot it may get before we slow down ourselves."""

    throttle_c: float
    ceiling_c: float


@dataclass(frozen=True, slots=True)
class Targets:
    """What a controller is to hold; None: no such target."""

    power_cap_w: float | None = None
    temp_ceiling_c: float | None = None
    min_tokens_per_s: float | None = None
    max_disagreement: float | None = None  # share of tokens; 0: lossless


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of device. What its file leaves out is empty, automatic or None."""

    name: str
    description: str = ""
    build: Build = Build()
    n_threads: int = 0  # 0: one per physical core
    n_ubatch: int = 0  # prompt tokens computed at once; 0: as without a profile
    detect: Detect = Detect()
    sensors: tuple[str, ...] = ()  # names, the best first; empty: whatever answers
    power_fit: PowerFit | None = None
    power: PowerModel | None = None
    thermal: Thermal | None = None
    targets: Mapping[str, Targets] = field(default_factory=lambda: MappingProxyType({}))  # by TARGET_NAMES, all of them


# ── what each key may hold ──────────────────────────────────────────────────────────────────────────────────────────

Check = Callable[[Any], str]  # what is wrong with a value; "" if nothing is


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "is not a number"
        return "" if low <= value <= high else f"is not between {low:g} and {high:g}"  # nan is between nothing

    return check


def _whole(low: int, high: int) -> Check:
    in_range = _number(low, high)
    return lambda value: "is not a whole number" if isinstance(value, float) else in_range(value)


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "is not a text"


def _texts(value: Any) -> str:
    if not isinstance(value, list) or any(_text(item) for item in value):
        return "is not a list of texts"
    return "" if len(set(value)) == len(value) else "says something twice"


def _label(value: Any) -> str:
    return "" if value in ("estimated", "calibrated") else 'is neither "estimated" nor "calibrated"'


def _cmake(value: Any) -> str:
    return "" if isinstance(value, bool | str | int) else "is neither true, false, a text nor a whole number"


_TEMPERATURE = _number(30, 125)
_TARGET_KEYS = {
    "power_cap_w": _number(0.1, 2000),
    "temp_ceiling_c": _TEMPERATURE,
    "min_tokens_per_s": _number(0.001, 1e6),
    "max_disagreement": _number(0, 0.5),
}
# table → key → check; "" is the top of the file, and a table's name holds those of the tables around it
_TABLES: dict[str, dict[str, Check]] = {
    "": {"name": _text, "description": _text},
    "build": {"systems": _texts, "machines": _texts},
    "build.cmake": {},  # any option of llama.cpp
    "runtime": {"n_threads": _whole(0, 512), "n_ubatch": _whole(0, 65536)},
    "detect": {"device_tree": _texts, "dmi": _texts, "systems": _texts, "machines": _texts},
    "sensors": {"names": _texts},
    "sensors.fit": {"slope": _number(0.1, 10), "offset_w": _number(-100, 100)},
    "power": {
        "static_w": _number(0, 2000),
        "active_w_per_core": _number(0, 200),
        "joule_per_gb": _number(0, 100),
        "source": _text,
        "label": _label,
    },
    "thermal": {"throttle_c": _TEMPERATURE, "ceiling_c": _TEMPERATURE},
    "targets": {},
    **{f"targets.{name}": _TARGET_KEYS for name in TARGET_NAMES},
}
_REQUIRED = {
    "": ("name",),
    "sensors.fit": ("slope", "offset_w"),
    "power": ("static_w", "active_w_per_core", "joule_per_gb", "source"),
    "thermal": ("throttle_c", "ceiling_c"),
}
_CMAKE_NAME = re.compile(r"(CMAKE|GGML|LLAMA)_[A-Z0-9_]+")
_COMPARE = "compare with the other files in devices/"


def _where(file: str, table: str) -> str:
    return f"[{table}] of {file}" if table else file


def _check(file: str, table: str, values: Mapping[str, Any]) -> None:
    """Raises UsageError for the first thing in `values`, or in a table inside it, that the schema does not know."""
    prefix = f"{table}." if table else ""
    keys = _TABLES[table]
    tables = [name[len(prefix) :] for name in _TABLES if name.startswith(prefix) and name != table]
    tables = [name for name in tables if "." not in name]
    for key, value in values.items():
        if key in tables:
            if not isinstance(value, dict):
                raise UsageError(f"{key!r} in {_where(file, table)} is not a table", f"write [{prefix}{key}]")
            _check(file, prefix + key, value)
            continue
        if table == "build.cmake":
            if not _CMAKE_NAME.fullmatch(key):
                raise UsageError(
                    f"bad CMake name {key!r} in {_where(file, table)}: it does not start with GGML_, LLAMA_ or CMAKE_",
                    "use the option's name as llama.cpp spells it",
                )
            complaint = _cmake(value)
        elif key in keys:
            complaint = keys[key](value)
        else:
            raise unknown(f"unknown key {key!r} in {_where(file, table)}", key, [*keys, *tables])
        if complaint:
            raise UsageError(f"{key} in {_where(file, table)}: {reprlib.repr(value)} {complaint}", _COMPARE)
    missing = [key for key in _REQUIRED.get(table, ()) if key not in values]
    if missing:
        raise UsageError(f"{_where(file, table)} lacks {' and '.join(missing)}", _COMPARE)


def unknown(what: str, word: str, known: list[str]) -> UsageError:
    """The error that `word` is none of `known`: it lists them and asks for the nearest."""
    near = difflib.get_close_matches(word, known, 1, 0.0)
    hint = f"did you mean {near[0]!r}?" if near else _COMPARE
    return UsageError(f"{what}; known: {', '.join(known) or 'none'}", hint)


# ── from a file ─────────────────────────────────────────────────────────────────────────────────────────────────────


def read_profile(path: Path) -> Profile:
    """The profile in `path`, whose `name` must be the file's. Raises UsageError for anything wrong with it."""
    data = read_toml(path)
    _check(path.name, "", data)
    if data["name"] != path.stem:
        raise UsageError(f"{path.name} says that its name is {data['name']!r}", f"set name = {path.stem!r}")
    profile = _profile(data)
    _check_temperatures(path.name, profile)
    return profile


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UsageError, with line and column of a mistake."""
    try:
        toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise UsageError(
            "device profiles cannot be read: Python 3.10 needs the package tomli",
            "run `make setup` and use .venv/bin/python",
        ) from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check its path and permissions") from None
    try:
        found: dict[str, Any] = toml.loads(data.decode("utf-8"))
        return found
    except UnicodeDecodeError as error:
        place, why = _place(data[: error.start].decode("utf-8")), "not UTF-8"
    except toml.TOMLDecodeError as error:
        told = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        place = (int(told[2]), int(told[3])) if told else _place(data.decode("utf-8"))
        why = told[1] if told else str(error).replace(" (at end of document)", "")
    except RecursionError:
        place, why = (1, 1), "nested too deeply"
    line, column = place
    raise UsageError(f"{path} is not valid TOML: line {line}, column {column}: {why}", "correct the file")


def _place(before: str) -> tuple[int, int]:
    """Line and column, from 1, of what follows `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _profile(data: Mapping[str, Any]) -> Profile:
    def table(name: str) -> dict[str, Any]:
        return {key: tuple(v) if isinstance(v, list) else v for key, v in data.get(name, {}).items()}

    build, sensors, targets = table("build"), table("sensors"), data.get("targets", {})
    cmake = {key: _cmake_text(value) for key, value in build.pop("cmake", {}).items()}
    return Profile(
        name=data["name"],
        description=data.get("description", ""),
        build=Build(cmake=MappingProxyType(cmake), **build),
        **table("runtime"),
        detect=Detect(**table("detect")),
        sensors=sensors.get("names", ()),
        power_fit=PowerFit(**sensors["fit"]) if "fit" in sensors else None,
        power=PowerModel(**table("power")) if "power" in data else None,
        thermal=Thermal(**table("thermal")) if "thermal" in data else None,
        targets=MappingProxyType({name: Targets(**targets.get(name, {})) for name in TARGET_NAMES}),
    )


def _cmake_text(value: bool | str | int) -> str:
    return ("ON" if value else "OFF") if isinstance(value, bool) else str(value)


def _check_temperatures(file: str, profile: Profile) -> None:
    """A ceiling where the firmware throttles already is none."""
    if profile.thermal is None:
        return
    throttle_c = profile.thermal.throttle_c
    ceilings = {"ceiling_c in [thermal]": profile.thermal.ceiling_c} | {
        f"temp_ceiling_c in [targets.{name}]": targets.temp_ceiling_c
        for name, targets in profile.targets.items()
        if targets.temp_ceiling_c is not None
    }
    for what, ceiling_c in ceilings.items():
        if ceiling_c > throttle_c:
            raise UsageError(f"{what} of {file}: {ceiling_c:g} is above throttle_c, {throttle_c:g}", "lower it")
