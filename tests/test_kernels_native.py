"""The matmul kernels of patches/kernels, built alone and run against the references of tests/native.

Each test makes one build and runs it, so that no build is made twice where tests are spread over processes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are no package: they must run before anything is installed

import _kernels  # noqa: E402
from _kernels import KERNELS, ON_ARM, Isa, cpu_flags, for_this_machine, host_compiler, listed, takes  # noqa: E402

TYPES = {"q4_0", "q8_0", "q4_K", "q6_K", "q4_1", "q5_K", "q5_0", "q5_1"}
NAMES = {
    "avx512": "avx512-vnni", "avxvnni": "avx-vnni", "avx2": "avx2",
    "i8mm": "neon-i8mm", "dotprod": "neon-dotprod", "neon": "neon",
}  # fmt: skip
CROSS, QEMU = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
QEMU_CPUS = {
    "cortex-a72": {"neon"},
    "cortex-a76": {"neon", "neon-dotprod"},
    "max": {"neon", "neon-dotprod", "neon-i8mm"},
}

WARNINGS = ("-Wall", "-Wextra", "-Werror")
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    # each of them doubles the time that the unrolled loops take to compile
    "-fno-sanitize=pointer-overflow,null,object-size,alignment",
)
CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")  # a call for each check: half the time again


def in_reach(isa: Isa) -> Isa:
    """AVX-VNNI in its AVX-512 form, where the CPU has only that."""
    if isa.name == "avxvnni" and "avx512_vnni" in cpu_flags() and "avx_vnni" not in cpu_flags():
        kept = [flag for flag in isa.flags if flag not in ("-mno-avx512f", "-mavxvnni")]
        return Isa(isa.name, isa.macro, (*kept, "-mavx512f", "-mavx512vl", "-mavx512vnni"))
    return isa


def build(folder: Path, compiler: str, isas: Sequence[Isa], *flags: str, link: Sequence[str] = ()) -> Path:
    program, problem = _kernels.build(
        ROOT / "tests" / "native" / "kernel_test.cpp", folder, compiler, isas, *WARNINGS, *flags, link=link
    )
    assert not problem, problem
    return program


def checked(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    # the compiler's first lines say it; it can go on for megabytes
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[:4000]}"
    return done.stdout


def compared(output: str) -> dict[str, set[str]]:
    """{instruction set: the weight types that were compared}"""
    found: dict[str, set[str]] = {}
    line = r"^(\S+) +(\S+) +\d+ shapes, [1-9]\d* results equal bit for bit$"
    for name, weight in re.findall(line, output, re.MULTILINE):
        found.setdefault(name, set()).add(weight)
    return found


def skipped(output: str) -> set[str]:
    return set(re.findall(r"^(\S+) +skipped: ", output, re.MULTILINE))


def here() -> list[Isa]:
    return [in_reach(isa) for isa in for_this_machine()]


def test_cmake_lists_every_instruction_set() -> None:
    assert {isa.name for isa in listed()} == set(NAMES) == {p.stem[9:] for p in KERNELS.glob("edge-isa-*.cpp")}
    assert {f"&edge_isa_{isa.name}" for isa in listed()} == set(
        re.findall(r"&edge_isa_\w+", (KERNELS / "edge-isas.cpp").read_text())
    )


def test_every_kernel_equals_the_promised_arithmetic(tmp_path: Path) -> None:
    isas = here()
    program = build(tmp_path, host_compiler(), isas, "-O2")
    output = checked([str(program)])
    results = compared(output)
    assert results
    assert set(results) | skipped(output) == {NAMES[isa.name] for isa in isas}
    assert all(weights == TYPES for weights in results.values())
    assert output.count(" attention: ") == len(results)
    if {"avx2", "fma", "f16c"} <= cpu_flags():
        assert "avx2" in results
    if {"avx512bw", "avx512_vnni"} <= cpu_flags():
        assert "avx512-vnni" in results

    name = next(iter(results))
    one = checked([str(program), "--isa", name, "--seed", "7", "--rounds", "3"])
    assert one.startswith("seed 7\n")
    assert set(compared(one)) == {name}
    assert subprocess.run([str(program), "--isa", "none"], capture_output=True).returncode == 2


def test_kernels_stay_in_bounds_and_defined(tmp_path: Path) -> None:
    compiler = host_compiler()
    if not takes(compiler, *SANITIZE):
        pytest.skip(f"{compiler} has no sanitizers here")
    isas = here()
    calls = CALLS if takes(compiler, *SANITIZE, *CALLS) else ()
    # the widest and the plainest: the others read and write memory as one of them does
    program = build(tmp_path, compiler, [isas[0], isas[-1]], "-O1", *SANITIZE, *calls)
    assert NAMES[isas[-1].name] in compared(checked([str(program), "--rounds", "40"]))


def test_arm_kernels_in_emulation(tmp_path: Path) -> None:
    emulator = next(filter(None, map(shutil.which, QEMU)), None)
    if emulator is None or shutil.which(CROSS) is None:
        pytest.skip(f"needs {CROSS} and {QEMU[0]}")
    program = build(tmp_path, CROSS, [isa for isa in listed() if isa.name in ON_ARM], "-O2", link=["-static"])
    for cpu, names in QEMU_CPUS.items():
        output = checked([emulator, "-cpu", cpu, str(program), "--rounds", "40"])
        assert compared(output) == dict.fromkeys(names, TYPES), cpu
        assert skipped(output) == {NAMES[name] for name in ON_ARM} - names, cpu
