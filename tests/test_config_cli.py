"""`edge-run config`: what is in force and why, as TOML or JSON, and a file checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .cli_helpers import RunCli, assert_clean, runner


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGE_RUNTIME_DEVICE", "pi5")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "config" / "edge-runtime" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def test_each_value_comes_with_its_source(run: RunCli, own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_file.write_text("[limits]\nqueue_length = 3\n")
    monkeypatch.setenv("EDGE_RUNTIME_PORT", "9090")
    result = run("config")
    assert_clean(result, 0)
    lines = result.out.splitlines()
    assert f"queue_length = 3  # {own_file}" in lines
    assert "port = 9090  # $EDGE_RUNTIME_PORT" in lines
    assert "threads = 4  # device profile pi5" in lines
    assert "temp_ceiling_c = 76  # device profile pi5, target balanced" in lines
    assert 'api_key_file = ""  # default' in lines


def test_json_has_values_and_sources(run: RunCli, own_file: Path) -> None:
    own_file.write_text("[server]\nhost = '0.0.0.0'\n")
    result = run("config", "--json")
    assert_clean(result, 0)
    found = json.loads(result.out)
    assert found["server"]["host"] == {"value": "0.0.0.0", "from": str(own_file)}
    assert found["server"]["api_key_file"] == {"value": None, "from": "default"}
    assert found["files"] == [str(own_file)]
    assert len(found["warnings"]) == 1
    assert result.err.startswith("warning: server.host 0.0.0.0 can be reached by others")


def test_another_file_takes_the_place_of_the_standard_ones(run: RunCli, own_file: Path, tmp_path: Path) -> None:
    own_file.write_text("[server]\nport = 81\n")
    other = tmp_path / "other.toml"
    other.write_text("[limits]\nqueue_length = 2\n")
    found = json.loads(run("config", "--json", "--config", other).out)
    assert found["files"] == [str(other)]
    assert found["server"]["port"]["value"] == 8080


def test_a_file_is_checked_by_itself(run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_PORT", "wrong")
    path = tmp_path / "c.toml"
    path.write_text("[server]\nport = 81\n")
    result = run("config", "--check", path)
    assert_clean(result, 0)
    assert result.out == f"{path}: ok\n"
    assert json.loads(run("config", "--check", path, "--json").out)["ok"] is True


@pytest.mark.parametrize("text", ["[server]\nprot = 81\n", "[server\n", "[device]\nprofile = 'x'\n"])
def test_a_wrong_file_is_refused(run: RunCli, tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    result = run("config", "--check", path)
    assert_clean(result, 2)
    assert str(path) in result.err
    assert result.out == ""


def test_a_file_that_is_not_there_is_a_mistake_when_it_was_named(run: RunCli, tmp_path: Path) -> None:
    for option in ("--check", "--config"):
        result = run("config", option, tmp_path / "none.toml")
        assert_clean(result, 2)
        assert "there is no file" in result.err
    assert_clean(run("config", "--check", "a", "--config", "b"), 2)
