"""`EdgeLlama` answers as `Llama` does: whole answers, and the logits behind them bit for bit where that is promised.

Run as a program, this module is the other side: `Llama` on the stock library, in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bench.stock import StockProcess, serve

pytestmark = [pytest.mark.model, pytest.mark.stock]

ROOT = Path(__file__).parents[2]
# n_batch is less than one of the prompts has; flash attention is off, as in Llama
ARGUMENTS: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}

QUESTION = [
    {"role": "system", "content": "You are an assistant who perfectly describes images."},
    {"role": "user", "content": "Describe this image in detail please."},
]
TEAMS = [
    {"role": "system", "content": "You are a helpful assistant that outputs in JSON."},
    {"role": "user", "content": "Who won the world series in 2020"},
]
TEAM_SCHEMA = {"type": "object", "properties": {"team_name": {"type": "string"}}, "required": ["team_name"]}
EXTRACT = [
    {
        "role": "system",
        "content": "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    },
    {"role": "user", "content": "Extract Jason is 25 years old"},
]
USER_DETAIL = {
    "type": "function",
    "function": {
        "name": "UserDetail",
        "parameters": {
            "type": "object",
            "title": "UserDetail",
            "properties": {
                "name": {"title": "Name", "type": "string"},
                "age": {"title": "Age", "type": "integer"},
            },
            "required": ["name", "age"],
        },
    },
}
LINES = "".join(f"def get_{name}(self):\n    return self.{name}\n\n" for name in ("red", "green", "blue", "white"))
PLANETS = "Q: Name the planets in the solar system? A: "

# (method, arguments): the examples of llama-cpp-python's README, greedy, and others; in this order on one object, so
# that some find a part of their prompt in the cache
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("create_completion", {"prompt": PLANETS, "max_tokens": 32, "stop": ["Q:", "\n"], "echo": True}),
    "chat": ("create_chat_completion", {"messages": QUESTION, "max_tokens": 32}),
    "json": (
        "create_chat_completion",
        {"messages": TEAMS, "response_format": {"type": "json_object"}, "max_tokens": 24},
    ),
    "schema": (
        "create_chat_completion",
        {"messages": TEAMS, "response_format": {"type": "json_object", "schema": TEAM_SCHEMA}, "max_tokens": 24},
    ),
    "function": (
        "create_chat_completion",
        {
            "messages": EXTRACT,
            "tools": [USER_DETAIL],
            "tool_choice": {"type": "function", "function": {"name": "UserDetail"}},
            "max_tokens": 24,
        },
    ),
    "streamed": ("create_completion", {"prompt": PLANETS, "max_tokens": 24, "stream": True, "stop": ["Mars"]}),
    "streamed chat": ("create_chat_completion", {"messages": QUESTION, "max_tokens": 24, "stream": True}),
    "long prompt": ("create_completion", {"prompt": LINES + "def get_black(self):", "max_tokens": 24}),
    "repeated": ("create_completion", {"prompt": (LINES * 2)[:-20], "max_tokens": 48}),
    "the same again": ("create_completion", {"prompt": (LINES * 2)[:-20], "max_tokens": 1}),
    "and again": ("create_completion", {"prompt": (LINES * 2)[:-20], "max_tokens": 8}),
    "penalised": (
        "create_completion",
        {"prompt": LINES, "max_tokens": 24, "repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    ),
    "sampled": ("create_completion", {"prompt": LINES, "max_tokens": 32, "temperature": 0.8, "seed": 5}),
    "sampled otherwise": (
        "create_completion",
        {"prompt": LINES, "max_tokens": 16, "temperature": 1.2, "seed": 5, "typical_p": 0.9, "top_k": 0},
    ),
    "mirostat": (
        "create_completion",
        {"prompt": LINES, "max_tokens": 16, "temperature": 0.9, "seed": 5, "mirostat_mode": 2},
    ),
    "biased": ("create_completion", {"prompt": PLANETS, "max_tokens": 16, "logit_bias": {"30": 3.0}}),
    "tokens": ("create_completion", {"prompt": [504, 216, 33, 42], "max_tokens": 8}),
    "infill": ("create_completion", {"prompt": "def add(a, b):\n", "suffix": "\n    return c", "max_tokens": 8}),
    "to the end": ("create_completion", {"prompt": LINES * 6 + LINES[:40], "max_tokens": 0, "stop": ["purple"]}),
}

GREEDY = [name for name, (_, arguments) in SCENARIOS.items() if "temperature" not in arguments]


def answer(llama: Any, name: str) -> Any:
    """What a scenario returns, a stream as a list, without what differs from call to call."""
    method, arguments = SCENARIOS[name]
    arguments = {"temperature": 0.0, **arguments}
    if "logit_bias" in arguments:
        arguments["logit_bias"] = {int(k): v for k, v in arguments["logit_bias"].items()}
    chosen, llama.chat_format = (
        llama.chat_format,
        "chatml-function-calling" if name == "function" else llama.chat_format,
    )
    try:
        found = getattr(llama, method)(**arguments)
        found = list(found) if arguments.get("stream") else [found]
    finally:
        llama.chat_format = chosen
    for part in found:
        for key in ("id", "created", "model"):
            del part[key]
    return json.loads(re.sub("cmpl-[0-9a-f-]+", "", json.dumps(found)))  # a call of a function has one, too


def answers(llama: Any, names: Sequence[str] = tuple(SCENARIOS)) -> dict[str, Any]:
    return {name: answer(llama, name) for name in names}


def logits_seen(llama: Any) -> list[str]:
    """Hashes of all logits that two greedy answers are chosen from, the second to a prompt that begins alike."""
    seen: list[str] = []

    def look(_tokens: Any, logits: Any) -> Any:
        seen.append(hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest())
        return logits

    llama.reset()
    for prompt in ((LINES * 2)[:-20], (LINES * 2)[:-60] + "x\n\n"):
        llama.create_completion(prompt, max_tokens=32, temperature=0.0, logits_processor=[look])
    return seen


class _Worker:
    """The stock side."""

    llama: Any = None

    def open(self, model: str) -> dict[str, Any]:
        from llama_cpp import Llama

        self.llama = Llama(model, **ARGUMENTS)
        return {}

    def answers(self) -> dict[str, Any]:
        return answers(self.llama)

    def logits(self) -> dict[str, list[str]]:
        return {"seen": logits_seen(self.llama)}


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def stock_side(
    stock_library: Path, demo_path: Path, patched: pytest.MonkeyPatch
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Answers, and hashes of logits, of `Llama` on the stock library."""
    patched.setenv("PYTHONPATH", str(ROOT))
    with StockProcess(stock_library, __name__) as process:
        process.call("open", model=str(demo_path))
        yield process.call("answers"), process.call("logits")["seen"]


@pytest.fixture(scope="module")
def edge_side(
    demo_path: Path, tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Opens an `EdgeLlama`, with batches that cost nothing more, so that there are many drafts and long ones."""
    from edge_runtime import opening
    from edge_runtime.batch_costs import BatchCosts
    from edge_runtime.llama import EdgeLlama

    patched.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
    patched.setattr(opening, "measure_batch_costs", lambda *_: BatchCosts((1, 16), (1.0, 1.01), invariant=True))
    return lambda **wish: closing(EdgeLlama(str(demo_path), **ARGUMENTS, **wish))


@pytest.fixture(scope="module")
def llama_on_edge_kernels(demo_path: Path) -> tuple[dict[str, Any], list[str]]:
    """Answers, and hashes of logits, of `Llama` on the patched library."""
    from edge_runtime.native import load, resolve_kernels
    from edge_runtime.native.kernels import kernels_for_loading

    load()
    from llama_cpp import Llama

    with kernels_for_loading(resolve_kernels("edge")):
        llama = Llama(str(demo_path), **ARGUMENTS)
    with closing(llama):
        return answers(llama), logits_seen(llama)


@pytest.fixture(scope="module")
def full(edge_side: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """Answers, and hashes of logits, at full depth on the edge kernels."""
    with edge_side(mode="full") as llama:
        return answers(llama), logits_seen(llama)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [name for name in found if found[name] != expected[name]]


def test_mode_full_on_stock_kernels_is_llama_on_the_stock_library(
    stock_side: tuple[dict[str, Any], list[str]], edge_side: Callable[..., Any]
) -> None:
    with edge_side(mode="full", kernels="stock") as llama:
        assert differing(answers(llama), stock_side[0]) == []
        assert logits_seen(llama) == stock_side[1]
        assert llama.stats.drafted == 0


def test_mode_auto_on_stock_kernels_takes_no_risk(
    stock_side: tuple[dict[str, Any], list[str]], edge_side: Callable[..., Any]
) -> None:
    with edge_side(kernels="stock") as llama:
        assert logits_seen(llama) == stock_side[1]


def test_mode_verified_on_stock_kernels_answers_as_llama_on_the_stock_library(
    stock_side: tuple[dict[str, Any], list[str]], edge_side: Callable[..., Any]
) -> None:
    """Up to near-ties, which none of the greedy scenarios has."""
    with edge_side(mode="verified", kernels="stock") as llama:
        assert differing(answers(llama, GREEDY), stock_side[0]) == []
        assert llama.stats.drafted > llama.stats.accepted > 20


def test_mode_full_on_edge_kernels_is_llama_on_edge_kernels(
    llama_on_edge_kernels: tuple[dict[str, Any], list[str]], edge_side: Callable[..., Any]
) -> None:
    with edge_side(mode="full", flash_attn=False) as llama:
        assert differing(answers(llama), llama_on_edge_kernels[0]) == []
        assert logits_seen(llama) == llama_on_edge_kernels[1]


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        ({}, SCENARIOS),
        ({"mode": "verified"}, GREEDY),
        ({"mode": "verified", "boundaries": (24,), "thresholds": 2.5}, ["chat", "function", "repeated", "sampled"]),
    ],
    ids=["auto", "n-grams", "heads"],
)
def test_drafts_change_no_bit(
    wish: dict[str, Any], names: Sequence[str], edge_side: Callable[..., Any], full: tuple[dict[str, Any], list[str]]
) -> None:
    with edge_side(**wish) as llama:
        assert differing(answers(llama, names), full[0]) == []
        assert logits_seen(llama) == full[1]
        assert llama.stats.drafted > llama.stats.accepted > 20


def test_mode_margin_with_theta_one_is_mode_full_and_a_low_theta_is_not(
    edge_side: Callable[..., Any], full: tuple[dict[str, Any], list[str]]
) -> None:
    with edge_side(mode="margin", theta=1.0) as llama:
        assert differing(answers(llama), full[0]) == []
    with edge_side(mode="margin", theta=0.01) as llama:
        changed = differing(answers(llama), full[0])
    assert changed != []
    # what only full depth can answer stays as it is
    assert not {"json", "schema", "function", "penalised", "mirostat", "biased"} & set(changed)


if __name__ == "__main__":
    serve(_Worker())
