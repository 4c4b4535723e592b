"""The programs in examples/ as modules, and a runtime without a model for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Generator, Sequence
from types import ModuleType
from typing import Any

from edge_runtime.generate import Chunk, Message
from edge_runtime.summary import Finish
from edge_runtime.types import Step

from .cli_helpers import ROOT

EXAMPLES = ROOT / "examples"
STEP = Step(token=0, position=0, depth=1)


def load_example(name: str) -> ModuleType:
    """The program examples/NAME.py, imported."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def example(name: str, *arguments: object) -> list[str]:
    """The command line of a real program; one thread, which needs no second core to be free."""
    return [sys.executable, str(EXAMPLES / f"{name}.py"), "--threads", "1", *map(str, arguments)]


class FakeRuntime:
    """Stands for `Runtime`: answers with the given texts in turn, a word per token, and remembers what it was asked."""

    def __init__(self, *answers: str, on_token: Callable[[int], None] = lambda _n: None) -> None:
        """`on_token` is called before each token with how many there were."""
        self.answers, self.on_token = list(answers), on_token
        self.asked: list[list[Message]] = []
        self.n_tokens = 0
        self.n_closed = 0  # answers that were closed before their end

    def __enter__(self) -> FakeRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """One token per letter."""
        self.asked.append(list(messages))
        return [0] * sum(len(m.content) for m in messages)

    def stream(self, _tokens: Sequence[int], max_tokens: int, _stop: Sequence[str] = ()) -> Generator[Chunk, Any, None]:
        words = self.answers.pop(0).split(" ")
        finish = Finish.END_OF_TURN if len(words) <= max_tokens else Finish.MAX_TOKENS
        done = False
        try:
            for i, word in enumerate(words[:max_tokens]):
                self.on_token(self.n_tokens)
                self.n_tokens += 1
                yield Chunk(word if i == 0 else f" {word}", STEP)
            done = True
            yield Chunk("", STEP, finish)
        finally:
            self.n_closed += not done
