"""The doctor finds what is there and what is not, whatever else is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from edge_runtime import _library, doctor, models
from edge_runtime.doctor import Check, Status
from edge_runtime.errors import LibraryError

from .cli_helpers import RunCli, assert_clean, finish, program, runner, start
from .conftest import TinyMaker


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


def by_part(checks: list[Check]) -> dict[str, Check]:
    return {check.part: check for check in checks}


def test_a_healthy_installation(run: RunCli, tiny_path: TinyMaker) -> None:
    result = run("doctor", "--model", tiny_path("llama", tokenizer=True))
    assert_clean(result, 0)
    assert "7 layers" in result.out
    assert "edge_* functions" in result.out


def test_json_says_the_same(run: RunCli) -> None:
    found = json.loads(run("doctor", "--json").out)
    assert found["healthy"] is True
    assert {"python", "bindings", "library", "structs", "threads", "memory"} <= {c["part"] for c in found["checks"]}


def test_a_missing_library_is_found_and_the_rest_still_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_library.ENV_OURS, str(tmp_path))
    process = start(program("doctor"))
    result = finish(process)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert f"no libllama in {tmp_path}, from $EDGE_RUNTIME_LIB" in result.out
    assert "memory" in result.out
    assert "hint: " in result.out


def test_a_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise LibraryError("wrong ABI", "build it")

    monkeypatch.setattr(doctor, "load", refuse)
    checks = by_part(doctor.examine(None))
    assert checks["library"] == Check("library", Status.PROBLEM, "wrong ABI", "build it")
    assert checks["library"].fails


def test_a_model_that_cannot_be_read(run: RunCli, tmp_path: Path) -> None:
    result = run("doctor", "--model", tmp_path / "none.gguf")
    assert result.code == 1
    assert "there is no file" in result.out


def test_what_is_optional_fails_nothing(run: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _program: None)
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find_spec(n))
    result = run("doctor")
    assert result.code == 0
    assert result.out.count("optional") >= 4
    assert f"hint: {models.DEMO_HINT}" in result.out


def test_bindings_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.1.0")
    assert doctor._bindings().status is Status.PROBLEM

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert doctor._bindings().status is Status.MISSING


def test_the_manifest_of_a_build(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "package": "llama-cpp-python",
                "version": "1.2.3",
                "llama_cpp_commit": "abc",
                "patches": {"series": "0", "layer-range.patch": "0"},
                "device": "pi5",
                "flags": ["-DA=1"],
                "compiler": "c++",
            }
        )
    )
    source, build = doctor._manifest(tmp_path)
    assert source.detail == "llama-cpp-python 1.2.3, llama.cpp abc, patches: layer-range"
    assert "for device pi5 by c++, flags: -DA=1" in build.detail


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    (check,) = doctor._manifest(tmp_path)
    assert check.status is Status.PROBLEM
