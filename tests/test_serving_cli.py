"""The verb `edge-run serve` as far as it goes without a server."""

from __future__ import annotations

import builtins
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import serve_cli
from edge_runtime.config import Config, LimitsConfig, ModelConfig
from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.serving.backend import plan_backend
from edge_runtime.serving.listening import address_of, has_unix, is_local, open_listeners


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: Any) -> Any:
        if name == "fastapi":
            raise ImportError("no", name=name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="not installed: fastapi") as missing:
        serve_cli._check_packages()
    assert missing.value.hint == "pip install 'edge-runtime[serve]'"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(ModelConfig(pack="x")), "model.pack means nothing to a server in mode auto"),
        (Config(ModelConfig(mode="verified", pack="x")), "model.pack means nothing to a server in mode verified"),
        (Config(ModelConfig(max_disagreement=0.1)), "model.max_disagreement means nothing"),
        (Config(ModelConfig(mode="exit", max_disagreement=0.1)), "max-disagreement needs"),
        (Config(ModelConfig(mode="exit", pack="no-such-pack")), "no-such-pack"),
        (Config(ModelConfig(name="/no/such.gguf")), "/no/such.gguf"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(config: Config, words: str) -> None:
    with pytest.raises(EdgeError, match=words):
        plan_backend(config, lambda _text: None)


def test_the_context_is_for_each_conversation(tiny_path: Callable[..., Path]) -> None:
    path = tiny_path(tokenizer=True)
    limits = LimitsConfig(max_conversations=3)
    plan = plan_backend(Config(ModelConfig(name=str(path), ctx=100), limits=limits), lambda _text: None)
    assert (plan.n_ctx, plan.options.n_ctx, plan.options.n_seq_max) == (100, 300, 3)
    assert plan.name == path.stem
    notes: list[str] = []
    with pytest.raises(UsageError, match="too many"):
        plan_backend(Config(ModelConfig(name=str(path), ctx=2**30), limits=limits), notes.append)
    assert "trained for" in notes[0]


def test_listeners_know_who_can_reach_them(tmp_path: Path) -> None:
    (local,) = open_listeners("localhost", 0, {})
    (other,) = open_listeners("0.0.0.0", 0, {})
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    with local, other, unix:
        assert is_local([local, unix])
        assert not is_local([local, other])
        assert (has_unix([local, unix]), has_unix([local])) == (True, False)
        assert address_of(local) == f"http://127.0.0.1:{local.getsockname()[1]}"
        assert address_of(unix) == f"unix:{tmp_path}/socket"
        with pytest.raises(EdgeError, match="cannot listen on"):
            open_listeners("127.0.0.1", local.getsockname()[1], {})
    with pytest.raises(UsageError, match="has no address"):
        open_listeners("256.1.1.1.invalid.", 1, {})
