"""The verbs `edge-run models` and `edge-run models build`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from edge_runtime.encoder import SentenceEncoder
from edge_runtime.encoder.recipes import INT8, RECIPES, home_of
from edge_runtime.errors import ModelNotFoundError, UsageError
from edge_runtime.models_build_cli import models_app
from tests.encoder_helpers import need_libraries, write_package

need_libraries()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """models(*arguments): the verb, with `tiny` as the only encoder that can be built."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("EDGE_RUNTIME_MODELS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_package(tmp_path)
    monkeypatch.delitem(RECIPES, "minilm-l6")
    monkeypatch.setitem(RECIPES, "tiny", recipe)

    def run(*arguments: str) -> None:
        command = typer.main.get_command(models_app)
        with command.make_context("models", list(arguments)) as context:
            command.invoke(context)

    return run


def test_without_a_verb_models_are_listed(models: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    models("--json")
    assert set(json.loads(capsys.readouterr().out)) == {"models", "looked_in"}
    models()
    assert "looked for .gguf files" in capsys.readouterr().err


def test_an_encoder_is_built_and_can_be_used_by_its_name(
    models: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelNotFoundError, match="is not built"):
        SentenceEncoder("tiny")
    models("build", "tiny")
    shown = capsys.readouterr()
    assert f"tiny is in {home_of('tiny')}" in shown.out
    assert "cosine with the reference" in shown.out
    assert "quantising to int8" in shown.err
    assert SentenceEncoder("tiny").path == home_of("tiny") / INT8
    models("build", "tiny", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["was_there"]
    assert record["folder"] == str(home_of("tiny"))
    models("build", "tiny")
    assert "it was there already" in capsys.readouterr().err


def test_quiet_says_nothing_but_the_result(
    models: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models("build", "tiny", "--out", str(tmp_path / "here"), "--quiet", "--json")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out)["folder"] == str(tmp_path / "here")
    assert SentenceEncoder(tmp_path / "here").n_embd == 64


def test_requests_that_cannot_be_met(models: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no encoder is named 'tinny'") as failure:
        models("build", "tinny")
    assert "tiny" in failure.value.hint
    with pytest.raises(UsageError, match="--json is given before the verb"):
        models("--json", "build", "tiny")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        models("build", "tiny", "--out", str(tmp_path / "file"))
