"""The sampler of a request that wants a grammar, penalties or biases."""

from __future__ import annotations

from collections.abc import Sequence

from ..native import Candidates, Model
from ..native.guided import Guidance, GuidedChain
from ..sampling import Sampler
from ..types import Floats, SamplingSettings, TokenIds


class GuidedSampler(Sampler):
    """Full depth's logits → token, for batches: drafts are the text's, so nothing is ever drawn for one."""

    def __init__(self, settings: SamplingSettings, guidance: Guidance, model: Model, n_answer: int) -> None:
        """Raises UsageError for a grammar that is none."""
        self.settings = settings
        self._all = Candidates(model.n_vocab)
        self._guided = GuidedChain(settings, guidance, model, n_answer)

    def sample(self, logits: Floats, ids: TokenIds | None = None) -> int:
        return self._guided.choose(self._all, logits, ids)

    def accept(self, token: int) -> None:
        self._guided.accept(token)

    def rewind(self, text: Sequence[int]) -> None:
        self._guided.set_history(text)

    def close(self) -> None:
        self._guided.close()
