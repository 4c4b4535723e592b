"""Builds libllama from the pinned source, patched ("edge") or as it is ("stock"), into a cache keyed by all inputs."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from _devices import Device, check_host, load_device
from _patchset import abi_version, apply_series, load_series, own_sources
from _upstream import PATCHES, BuildError, Pin, cache_dir, fetch_sdist, load_pin, say, unpack

EDGE, STOCK = "edge", "stock"
MIN_CMAKE = (3, 14)
FLAGS_ENV = ("CFLAGS", "CXXFLAGS", "LDFLAGS")
COMMON_FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",  # plain file names: no links, which wheels cannot hold
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",  # the libraries find each other wherever they are copied to
    f"-DCMAKE_INSTALL_RPATH={'@loader_path' if platform.system() == 'Darwin' else '$ORIGIN'}",
]


# ---------------------------------------------------------------- tools


@dataclass(frozen=True)
class Tools:
    cmake: str
    cc: str
    cxx: str
    cxx_version: str
    generator: str


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[0]


def find_tools() -> Tools:
    def find(what: str, *names: str | None) -> str:
        for name in names:
            path = shutil.which(name) if name else None
            if path:
                return path
        hint = (
            "xcode-select --install; brew install cmake"
            if platform.system() == "Darwin"
            else ("apt-get install g++ cmake make patch (or your system's packages of these names)")
        )
        raise BuildError("cannot build llama.cpp", f"no {what} on PATH", hint)

    cxx = find("C++ compiler", os.environ.get("CXX"), "c++", "g++", "clang++")
    cc = find("C compiler", os.environ.get("CC"), "cc", "gcc", "clang")
    cmake = find("cmake", "cmake")
    find("patch", "patch")
    version = re.search(r"(\d+)\.(\d+)", _first_line([cmake, "--version"]))
    if version and (int(version[1]), int(version[2])) < MIN_CMAKE:
        raise BuildError(
            "cannot build llama.cpp",
            f"cmake is {version[0]}, needed is {MIN_CMAKE[0]}.{MIN_CMAKE[1]}",
            "install a newer one: python3 -m pip install cmake",
        )
    ninja = shutil.which("ninja")
    if not ninja:
        find("make or ninja", "make", "gmake")
    return Tools(cmake, cc, cxx, _first_line([cxx, "--version"]), "Ninja" if ninja else "Unix Makefiles")


def processor() -> str:
    """Model and instruction sets of this machine's processor."""
    if platform.system() == "Darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
    lines = {re.sub(r"\s+", " ", line) for line in text.splitlines() if line.startswith(wanted)}
    return "\n".join(sorted(lines))


def default_jobs() -> int:
    """As many as there are processors, but a compiler needs about 1 GB each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(memory_gb)))


# ---------------------------------------------------------------- what to build, and its key


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of a build."""

    variant: str
    pin: Pin
    device: Device
    compiler: str
    cpu: str  # empty unless built for this very processor
    environment: dict[str, str]
    patches: dict[str, str]  # file name → sha256; empty for stock
    abi: int  # 0 for stock

    @property
    def flags(self) -> list[str]:
        return COMMON_FLAGS + self.device.flags

    @property
    def key(self) -> str:
        inputs = [
            self.variant,
            vars(self.pin),
            self.flags,
            platform.system(),
            platform.machine(),
            self.compiler,
            self.cpu,
            self.environment,
            self.patches,
        ]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return cache_dir() / "native" / self.key

    def manifest(self, files: list[str]) -> dict[str, Any]:
        return {
            "key": self.key,
            "variant": self.variant,
            "abi": self.abi,
            "package": self.pin.package,
            "version": self.pin.version,
            "sdist_sha256": self.pin.sha256,
            "llama_cpp_commit": self.pin.llama_cpp_commit,
            "patches": self.patches,
            "device": self.device.name,
            "flags": self.flags,
            "environment": self.environment,
            "compiler": self.compiler,
            "system": platform.system(),
            "machine": platform.machine(),
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "files": files,
        }


def make_recipe(variant: str, device: Device, tools: Tools, pin: Pin, patches: Path = PATCHES) -> Recipe:
    files: dict[str, str] = {}
    if variant == EDGE:
        paths = {name: patches / name for name in ["series", *(patch.name for patch in load_series(patches))]}
        paths |= own_sources(patches)
        files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return Recipe(
        variant,
        pin,
        device,
        tools.cxx_version,
        processor() if device.native else "",
        {name: os.environ[name] for name in FLAGS_ENV if os.environ.get(name)},
        files,
        abi_version(patches) if variant == EDGE else 0,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete library folder; empty if it is missing, damaged or lacks a file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest if all((folder / name).is_file() for name in manifest["files"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# ---------------------------------------------------------------- running cmake


class Progress:
    """One line per stage: rewritten in place on a terminal; elsewhere its name, and then a line every 30 s."""

    def __init__(self, stage: str) -> None:
        self.stage, self.terminal = stage, sys.stderr.isatty()
        self.start = self.last = time.monotonic()
        if self.terminal:
            self._line(0)
        else:
            say(stage)

    def _line(self, percent: int) -> None:
        elapsed = int(time.monotonic() - self.start)
        start, end = ("\r", "") if self.terminal else ("", "\n")
        text = f"{start}{self.stage}  {percent:3d}%  {elapsed // 60}:{elapsed % 60:02d}"
        print(text, end=end, file=sys.stderr, flush=True)

    def see(self, output: str) -> None:
        """Reads ninja's "[12/345]" or make's "[ 12%]"."""
        found = re.match(r"\[\s*(\d+)(?:/(\d+)|%)\]", output)
        if found and time.monotonic() - self.last >= (0.5 if self.terminal else 30):
            self.last = time.monotonic()
            self._line(int(found[1]) * 100 // int(found[2] or 100))

    def end(self, complete: bool) -> None:
        if self.terminal:
            if complete:
                self._line(100)
            say("")


def _stop(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _explain(log: Path) -> BuildError | OSError:
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    text = "\n".join(lines[-200:])
    if "No space left on device" in text:
        return OSError(errno.ENOSPC, "no space left", str(log.parent))  # then the tree is removed, too
    if re.search(r"fatal error: Killed|Killed signal terminated|out of memory allocating", text):
        return BuildError(
            "cannot build llama.cpp", "the compiler ran out of memory", "try again with --jobs 1, or add swap"
        )
    if re.search(r"CMAKE_CUDA_COMPILER|CUDA Toolkit not found", text):
        return BuildError(
            "cannot build llama.cpp",
            "no CUDA compiler was found",
            "install the CUDA toolkit and put nvcc on PATH, or use --device native",
        )
    say("\n".join(f"  | {line}" for line in lines[-20:]))
    return BuildError(
        "cannot build llama.cpp", "the compiler or cmake failed, see the lines above", f"the whole log: {log}"
    )


def _run(command: list[str], log: Path, stage: str) -> None:
    # NINJA_STATUS is the user's taste; progress needs ninja's own form
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    progress = Progress(stage)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None  # a pipe was asked for
        try:
            for line in process.stdout:
                file.write(line)
                progress.see(line)
        except BaseException:
            _stop(process)
            progress.end(complete=False)
            raise
    progress.end(complete=process.returncode == 0)
    if process.returncode != 0:
        raise _explain(log)


# ---------------------------------------------------------------- building


@contextmanager
def build_lock() -> Iterator[None]:
    """One build per cache at a time: a second process waits and then finds the result."""
    folder = cache_dir() / "native"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("wait for another build of llama.cpp")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _collect(recipe: Recipe, source: Path, build: Path) -> None:
    new, old = recipe.folder.with_suffix(".new"), recipe.folder.with_suffix(".old")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    new.mkdir()
    libraries = sorted(path for path in (build / "bin").iterdir() if path.suffix in (".so", ".dylib"))
    for path in libraries:
        shutil.copy2(path, new / path.name)
    shutil.copy2(source / "LICENSE", new / "LICENSE.llama.cpp")  # its licence asks to travel with the code
    manifest = recipe.manifest([path.name for path in libraries])
    (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if recipe.folder.exists():
        recipe.folder.rename(old)
    new.rename(recipe.folder)
    shutil.rmtree(old, ignore_errors=True)


def _build(recipes: list[Recipe], tools: Tools, jobs: int) -> None:
    """Builds the recipes in one tree: stock first, then the patches on top, so that ggml is compiled once."""
    work = cache_dir() / "native" / "build"
    shutil.rmtree(work, ignore_errors=True)  # what an earlier failure left for reading
    sdist = fetch_sdist(recipes[0].pin)
    try:
        say("unpack llama.cpp")
        source, build, log = work / "source", work / "tree", work / "build.log"
        unpack(sdist, source)
        for recipe in sorted(recipes, key=lambda recipe: recipe.variant == EDGE):
            name = "patched" if recipe.variant == EDGE else "stock"
            if recipe.variant == EDGE:
                apply_series(source, load_series())
            if not build.exists():
                _run(
                    [
                        tools.cmake,
                        "-G",
                        tools.generator,
                        "-S",
                        str(source),
                        "-B",
                        str(build),
                        f"-DCMAKE_C_COMPILER={tools.cc}",
                        f"-DCMAKE_CXX_COMPILER={tools.cxx}",
                        *recipe.flags,
                    ],
                    log,
                    f"configure llama.cpp for {recipe.device.name}",
                )
            _run(
                [tools.cmake, "--build", str(build), "--target", "llama", "--parallel", str(jobs)],
                log,
                f"build {name} llama.cpp with {jobs} jobs",
            )
            _collect(recipe, source, build)
    except BuildError:
        raise  # the tree stays, for its log
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)


def ensure(variants: list[str], device_name: str, jobs: int = 0, force: bool = False) -> dict[str, Path]:
    """The cached library folder of each variant, built now if it is not there."""
    device = load_device(device_name)
    check_host(device)
    tools, pin = find_tools(), load_pin()
    recipes = [make_recipe(variant, device, tools, pin) for variant in variants]

    def missing() -> list[Recipe]:
        return [recipe for recipe in recipes if force or not read_manifest(recipe.folder)]

    if missing():
        with build_lock():
            todo = missing()  # another process may have built it meanwhile
            if todo:
                _build(todo, tools, jobs or default_jobs())
    return {recipe.variant: recipe.folder for recipe in recipes}


def install(cached: Path, into: Path) -> bool:
    """Puts a copy of a cached library at `into`, whole or not at all; False if it is there already."""
    manifest = read_manifest(cached)
    if read_manifest(into).get("key") == manifest["key"]:
        return False
    if into.exists() and any(into.iterdir()) and not (into / "manifest.json").exists():
        raise BuildError(f"cannot install into {into}", "it holds files that are not ours", "choose an empty directory")
    new, old = into.with_name(f".{into.name}.new"), into.with_name(f".{into.name}.old")
    with build_lock():
        if read_manifest(into).get("key") == manifest["key"]:
            return False  # another process was quicker
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(cached, new)
        try:
            if into.exists():
                into.rename(old)
            new.rename(into)
        except BaseException:
            if old.exists() and not into.exists():
                old.rename(into)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return True
