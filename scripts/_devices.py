"""Device profiles: one TOML file each under devices/. This module reads what a build needs and checks every key."""

from __future__ import annotations

import difflib
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _upstream import ROOT, BuildError, load_toml

DEVICES = ROOT / "devices"

# table → key → type; "" is the top of the file
SCHEMA: dict[str, dict[str, type]] = {
    "": {"name": str, "description": str, "build": dict, "runtime": dict},
    "build": {"systems": list, "machines": list, "cmake": dict},
    "runtime": {"n_threads": int, "n_ubatch": int},
}
CMAKE_NAME = re.compile(r"(CMAKE|GGML|LLAMA)_[A-Z0-9_]+")


@dataclass(frozen=True)
class Device:
    name: str
    description: str
    systems: tuple[str, ...]  # empty: any
    machines: tuple[str, ...]  # empty: any
    cmake: dict[str, str]

    @property
    def native(self) -> bool:
        """Built for the very processor it is built on."""
        return self.cmake.get("GGML_NATIVE") == "ON"

    @property
    def flags(self) -> list[str]:
        return [f"-D{name}={value}" for name, value in sorted(self.cmake.items())]


def device_names(folder: Path = DEVICES) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.toml"))


def _check(file: str, table: str, values: dict[str, Any]) -> None:
    where = f"[{table}] of {file}" if table else file
    known = SCHEMA[table]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise BuildError(
                f"unknown key {key!r} in {where}", f"known keys: {', '.join(known)}", f"did you mean {near!r}?"
            )
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise BuildError(
                f"bad value for {key!r} in {where}",
                f"{value!r} is not of type {known[key].__name__}",
                "compare with the other files in devices/",
            )
        if isinstance(value, int) and value < 0:
            raise BuildError(f"bad value for {key!r} in {where}", f"{value} is negative", "use 0 for automatic")


def _cmake_value(file: str, name: str, value: Any) -> str:
    if not CMAKE_NAME.fullmatch(name):
        raise BuildError(
            f"bad CMake name {name!r} in {file}",
            "it does not start with GGML_, LLAMA_ or CMAKE_",
            "use the option's name as llama.cpp spells it",
        )
    if isinstance(value, bool):
        return "ON" if value else "OFF"
    if isinstance(value, str | int):
        return str(value)
    raise BuildError(
        f"bad value for {name!r} in {file}",
        f"{value!r} is neither true, false, a text nor a number",
        "compare with the other files in devices/",
    )


def load_device(name: str, folder: Path = DEVICES) -> Device:
    path = folder / f"{name}.toml"
    if not path.exists():
        names = device_names(folder)
        near = difflib.get_close_matches(name, names, 1, 0.0)
        raise BuildError(
            f"unknown device {name!r}",
            f"known devices: {', '.join(names)}",
            f"did you mean {near[0]!r}?" if near else f"add {path}",
        )
    data = load_toml(path)
    _check(path.name, "", data)
    for table in ("build", "runtime"):
        _check(path.name, table, data.get(table, {}))
    if data.get("name") != name:
        raise BuildError(f"bad device file {path.name}", f"its name is {data.get('name')!r}", f"set name = {name!r}")
    build = data.get("build", {})
    cmake = {key: _cmake_value(path.name, key, value) for key, value in build.get("cmake", {}).items()}
    return Device(
        name, data.get("description", ""), tuple(build.get("systems", ())), tuple(build.get("machines", ())), cmake
    )


def check_host(device: Device, system: str = "", machine: str = "") -> None:
    """A profile with another processor's flags would fail deep inside the compiler, so refuse it here."""
    system, machine = system or platform.system(), machine or platform.machine()
    for wanted, here in ((device.systems, system), (device.machines, machine)):
        if wanted and here not in wanted:
            raise BuildError(
                f"cannot build for {device.name!r} here",
                f"it is for {' or '.join(wanted)}, this machine is {system} {machine}",
                "build on the board itself, or use --device native",
            )
