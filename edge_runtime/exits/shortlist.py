"""Which tokens a head can name: those the model is expected to choose most often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..types import TokenIds
from .corpus import Text

# of tokens never met: vocabularies are numbered by how early, and so how often, merges were made
_PRIOR_COUNT = 1e-3


# a token of some other text says less than one of the model's own
_OTHER_TEXT = 0.05


def choose_shortlist(texts: Iterable[Text], n_vocab: int, n: int, other_text: Iterable[Sequence[int]] = ()) -> TokenIds:
    """The `n` tokens of the greatest expected count, sorted by id.

    A token counts by the probability that the full model gives it at each target, by its occurrences in prompts
    (answers repeat what was asked), and, with little weight, by those in `other_text`, token ids of any text like the
    one expected. Ties, which are mostly tokens never met, go to the lower id.
    """
    counts = _PRIOR_COUNT / (1.0 + np.arange(n_vocab))
    for tokens in other_text:
        counts += _OTHER_TEXT * np.bincount(np.asarray(tokens, np.int64), minlength=n_vocab)
    for text in texts:
        ids, logp = text.targets("top_ids"), text.targets("top_logp")
        counts += np.bincount(ids.ravel(), np.exp(logp.ravel().astype(np.float32)), n_vocab)
        counts += np.bincount(text.shard["tokens"][text.start : text.end], minlength=n_vocab)
    best = np.argsort(-counts, kind="stable")[: min(n, n_vocab)]
    return np.sort(best).astype(np.int32)
