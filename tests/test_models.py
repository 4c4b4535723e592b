"""Names of models, and where they are looked for."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import pytest

from edge_runtime import models
from edge_runtime.errors import ModelNotFoundError


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No models but those a test makes."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv(models.ENV_MODELS, raising=False)
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no_such_package")
    monkeypatch.chdir(tmp_path)


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def test_a_name_is_found_in_the_listed_folders_then_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = put(tmp_path / "a" / "one.gguf"), put(tmp_path / "b" / "one.gguf")
    third = put(tmp_path / "data" / "edge-runtime" / "models" / "two.gguf")
    monkeypatch.setenv(models.ENV_MODELS, f"{first.parent}{os.pathsep}{second.parent}")
    assert models.find_model("one") == first
    assert models.find_model("two") == third
    assert [m.name for m in models.named_models()] == ["one", "one", "two"]


@pytest.mark.parametrize("wanted", ["./one", "dir/one", "one.gguf", "/one"])
def test_what_looks_like_a_path_is_one(wanted: str) -> None:
    assert models.find_model(wanted) == Path(wanted)


def test_a_home_directory_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert models.find_model("~/one.gguf") == Path("/home/ada/one.gguf")


def test_an_existing_file_needs_no_suffix_but_a_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "here")
    assert models.find_model("here") == Path("here")
    named = put(tmp_path / "m" / "here.gguf")
    monkeypatch.setenv(models.ENV_MODELS, str(named.parent))
    assert models.find_model("here") == named


def test_an_unknown_name_gets_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "m" / f"{models.DEMO_MODEL}.gguf")
    monkeypatch.setenv(models.ENV_MODELS, str(put(tmp_path / "m" / "qwen-0.5b.gguf").parent))
    with pytest.raises(ModelNotFoundError, match=r"no model is named 'qwen-0\.6b'") as failure:
        models.find_model("qwen-0.6b")
    assert "did you mean qwen-0.5b?" in failure.value.hint
    with pytest.raises(ModelNotFoundError) as failure:
        models.find_model("smollm")
    assert failure.value.hint.count(models.DEMO_MODEL) == 1


def test_a_name_like_nothing_else() -> None:
    with pytest.raises(ModelNotFoundError) as failure:
        models.find_model("zzz")
    assert "edge-run models" in failure.value.hint


@pytest.mark.parametrize("wanted", ["", "\0"])
def test_names_that_are_no_names(wanted: str) -> None:
    with pytest.raises(ModelNotFoundError):
        models.find_model(wanted)


def test_the_missing_demo_model_says_how_to_get_it() -> None:
    with pytest.raises(ModelNotFoundError) as failure:
        models.find_model(models.DEMO_MODEL)
    assert failure.value.hint == models.DEMO_HINT


def test_the_demo_model_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "pkg" / "demo.gguf")
    spec = importlib.machinery.ModuleSpec("pkg", None, is_package=True)
    spec.submodule_search_locations = [str(path.parent)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    assert models.find_model(models.DEMO_MODEL) == path
