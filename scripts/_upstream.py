"""The pinned source: its identity, its download and its unpacking. Also the errors of all scripts here."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"

# what a build of the library alone reads; the rest (tools, tests, web pages) is three times as large
NEEDED = ("CMakeLists.txt", "LICENSE", "cmake/", "ggml/", "include/", "licenses/", "src/", "vendor/")


class BuildError(Exception):
    """An expected failure: what, why, and one hint."""

    def __init__(self, what: str, why: str, hint: str) -> None:
        super().__init__(f"{what} — {why}")
        self.what, self.why, self.hint = what, why, hint

    def __str__(self) -> str:
        return f"error: {self.what} — {self.why}\nhint: {self.hint}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def disk_full(where: Path | str) -> BuildError:
    return BuildError(
        "the disk is full",
        f"no space left while writing to {where}",
        "free about 1 GB, or point EDGE_RUNTIME_CACHE at a larger disk",
    )


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs a script's main function; a user's mistake or a full disk ends in a message, never in a traceback."""

    def on_term(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, on_term)
    try:
        code = main()
    except BuildError as error:
        say(str(error))
        code = 1
    except KeyboardInterrupt:
        say("interrupted: nothing was installed")
        code = 130
    except OSError as error:
        if error.errno == errno.ENOSPC:
            say(str(disk_full(error.filename or cache_dir())))
        else:
            say(
                str(
                    BuildError(
                        f"cannot use {error.filename}",
                        error.strerror or str(error),
                        "check the path and its permissions",
                    )
                )
            )
        code = 1
    sys.exit(code)


def load_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib  # Python 3.10
        except ModuleNotFoundError:
            raise BuildError(
                "cannot read TOML files",
                "Python 3.10 needs the package tomli",
                "run `make setup` and use .venv/bin/python",
            ) from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BuildError(f"cannot read {path.name}", f"not valid TOML: {error}", "correct the file") from None


def cache_dir() -> Path:
    own = os.environ.get("EDGE_RUNTIME_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "edge-runtime"


@dataclass(frozen=True)
class Pin:
    """The source distribution that carries the llama.cpp sources."""

    package: str
    version: str
    sdist: str
    sha256: str
    llama_cpp_commit: str

    @property
    def base(self) -> str:
        return f"{self.package} {self.version}, llama.cpp {self.llama_cpp_commit}"


def load_pin(path: Path = PATCHES / "upstream.toml") -> Pin:
    return Pin(**load_toml(path))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, pin: Pin) -> None:
    got = sha256_of(path)
    if got != pin.sha256:
        raise BuildError(
            f"{path.name} is not the pinned file",
            f"sha256 is {got}, expected {pin.sha256}",
            "try again; if it stays so, the package index or a proxy serves another file: do not use it",
        )


def download(pin: Pin, folder: Path) -> None:
    """Lets pip find the source distribution by name and version, wherever the user's pip is set up to look."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--retries",
        "2",
        "--no-deps",
        "--no-binary",
        pin.package,
        f"{pin.package}=={pin.version}",
        "--dest",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    what = f"cannot download {pin.package} {pin.version}"
    if any("No module named pip" in line for line in lines):
        raise BuildError(what, f"{sys.executable} has no pip", "run `make setup` and use .venv/bin/python")
    if any("No space left" in line for line in lines):
        raise disk_full(folder)
    why = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "pip failed")
    raise BuildError(
        what, re.sub(r"^ERROR:\s*", "", why), f"check the network connection, or put {pin.sdist} into {folder.parent}"
    )


def fetch_sdist(pin: Pin, get: Callable[[Pin, Path], None] = download) -> Path:
    """The verified source distribution, from the cache if it is there."""
    folder = cache_dir() / "sdist"
    target = folder / pin.sdist
    if target.exists():
        try:
            verify(target, pin)
            return target
        except BuildError:
            say(f"{target} is damaged: downloading it again")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"download {pin.package} {pin.version} (source, 77 MB)")
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        get(pin, Path(temporary))
        arrived = Path(temporary) / pin.sdist
        if not arrived.exists():
            names = ", ".join(sorted(os.listdir(temporary))) or "nothing"
            raise BuildError(
                f"cannot download {pin.package} {pin.version}",
                f"expected {pin.sdist}, got {names}",
                "the package index offers another kind of file for this version",
            )
        verify(arrived, pin)
        os.replace(arrived, target)
    return target


def unpack(sdist: Path, into: Path, only: tuple[str, ...] = NEEDED) -> None:
    """Extracts the chosen parts of vendor/llama.cpp as `into`."""
    into.mkdir(parents=True)
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                inside = member.name.partition("/vendor/llama.cpp/")[2]
                if not member.isfile() or not inside.startswith(only):
                    continue
                path = into / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None  # a regular file always has content
                with source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
                path.chmod(member.mode & 0o755 | 0o600)
    except (tarfile.TarError, EOFError) as error:
        raise BuildError(f"cannot unpack {sdist.name}", str(error), f"delete {sdist} and try again") from None
