"""The samplers of llama-cpp-python's `Llama`, behind the engine's interface: the same chain gives the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .native import Candidates, load
from .sampling import Sampler
from .types import Floats, TokenIds

# what a request may ask for that only full depth's logits answer, with the value that asks for nothing
_NEUTRAL = {
    "grammar": None,
    "logits_processor": None,  # logit_bias arrives as one
    "stopping_criteria": None,
    "mirostat_mode": 0,
    "typical_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def needs_full_depth(request: Mapping[str, Any]) -> str | None:
    """The argument of `Llama.generate` that a guess made before the last layer cannot serve; None if there is none."""
    if request["temp"] < 0:
        return "temp"
    return next((name for name, neutral in _NEUTRAL.items() if request[name] != neutral), None)


def is_plain_greedy(request: Mapping[str, Any], penalty_window: int) -> bool:
    """Whether the likeliest token is all that is asked for."""
    no_penalty = request["repeat_penalty"] == 1.0 or penalty_window == 0
    return request["temp"] == 0 and no_penalty and needs_full_depth(request) is None


class ChainSampler(Sampler):
    """A chain of samplers that the bindings made, applied to the engine's logits.

    As in the bindings, it counts the tokens it chose and none of the prompt.
    """

    def __init__(
        self, chain: Any, candidates: Candidates, before: Callable[[], None], *, greedy: bool, may_draft: bool
    ) -> None:
        """`chain` is a `LlamaSampler`; `before` is called ahead of each choice that is published.

        With `greedy` the chain is known to choose the likeliest token. Without `may_draft` a draft is its source's
        likeliest token: for chains that cannot be copied, or that must see every token.
        """
        self._c = load().c
        self._bound, self._before, self._all = chain, before, candidates
        self._greedy, self._may_draft = greedy, may_draft
        self._copy: Any = None

    def sample(self, logits: Floats, ids: TokenIds | None = None) -> int:
        self._before()
        return self._pick(self._bound, logits, ids)

    def accept(self, token: int) -> None:
        if not self._greedy:
            self._bound.accept(token)

    def rewind(self, text: Sequence[int]) -> None:
        pass  # only happens when this chain's turn is over

    def begin_draft(self) -> None:
        self._drop_copy()

    def draft(self, logits: Floats, ids: TokenIds | None = None) -> int:
        if len(logits) == 1 and ids is not None:
            return int(ids[0])
        if self._greedy or not self._may_draft:
            return _likeliest(logits, ids)
        if self._copy is None:
            self._copy = self._bound.clone()
        token = self._pick(self._copy, logits, ids)
        self._copy.accept(token)
        return token

    def _pick(self, chain: Any, logits: Floats, ids: TokenIds | None) -> int:
        if self._greedy:
            return _likeliest(logits, ids)
        self._all.fill(logits, ids)
        self._c.llama_sampler_apply(chain.sampler, self._all.reference)
        return self._all.selected

    def _drop_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def reset(self) -> None:
        self._bound.reset()

    def close(self) -> None:
        """Drop what drafts needed; the chain is the bindings' to close."""
        self._drop_copy()


def _likeliest(logits: Floats, ids: TokenIds | None) -> int:
    best = int(logits.argmax())
    return best if ids is None else int(ids[best])
