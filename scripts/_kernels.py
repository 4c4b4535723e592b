"""The instruction sets of patches/kernels, and how to compile them apart from llama.cpp."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "patches" / "kernels"
ON_ARM = ("i8mm", "dotprod", "neon")


@dataclass(frozen=True)
class Isa:
    """An instruction set as edge-kernels.cmake lists it: edge-isa-NAME.cpp, the macro of the table, the flags."""

    name: str
    macro: str
    flags: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The name it goes by when it runs."""
        source = (KERNELS / f"edge-isa-{self.name}.cpp").read_text()
        return re.findall(r'= isa<\w+>\("([\w-]+)"', source)[0]


def listed() -> list[Isa]:
    text = (KERNELS / "edge-kernels.cmake").read_text()
    found = re.findall(r"^\s*edge_isa\((\w+) (EDGE_\w+)((?: -\S+)*)\)$", text, re.MULTILINE)
    return [Isa(name, macro, tuple(flags.split())) for name, macro, flags in found]


def cpu_flags() -> set[str]:
    """What Linux says of this CPU; nothing elsewhere."""
    try:
        return set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return set()


def host_compiler() -> str:
    return os.environ.get("CXX", "c++")


def for_this_machine() -> list[Isa]:
    """Those of this processor's family that the compiler knows; the processor itself may lack some."""
    on_arm = platform.machine().lower() in ("aarch64", "arm64")
    same_family = [isa for isa in listed() if (isa.name in ON_ARM) == on_arm]
    return [isa for isa in same_family if takes(host_compiler(), *isa.flags)]


def takes(compiler: str, *flags: str) -> bool:
    """Whether the compiler knows the flags and can link with them."""
    command = [compiler, *flags, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0


def build(
    main: Path, folder: Path, compiler: str, isas: Sequence[Isa], *flags: str, link: Sequence[str] = ()
) -> tuple[Path, str]:
    """The program of main.cpp with these instruction sets, and what went wrong, if something did.

    They are compiled side by side, for they take most of the time.
    """
    common = ("-std=c++17", "-ffp-contract=off", f"-I{KERNELS}", *flags)
    sources = [(KERNELS / f"edge-isa-{isa.name}.cpp", isa.flags) for isa in isas]
    sources += [(main, ()), (KERNELS / "edge-isas.cpp", tuple(f"-D{isa.macro}" for isa in isas))]
    program = folder / main.stem

    def compiled(source: tuple[Path, tuple[str, ...]]) -> str:
        path, own = source
        return problem([compiler, *common, *own, "-c", str(path), "-o", str(folder / f"{path.stem}.o")])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = [text for text in pool.map(compiled, sources) if text]
    objects = [str(folder / f"{path.stem}.o") for path, _ in sources]
    return program, "\n".join(problems) or problem([compiler, *flags, *link, *objects, "-o", str(program)])


def problem(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    # the compiler's first lines say it; it can go on for megabytes
    return f"{' '.join(command)}\n{done.stderr[:4000]}" if done.returncode else ""
