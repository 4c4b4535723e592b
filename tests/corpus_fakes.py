"""Made-up corpora: hidden states whose next tokens follow from them by a known rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.exits.collect import top_of
from edge_runtime.exits.corpus import Corpus, Shard, Text
from edge_runtime.exits.ridge import rms_norm
from edge_runtime.types import Floats

LAYER = 2


@dataclass(frozen=True)
class Made:
    """A shard and the model behind it: next tokens come from softmax(output · final_norm · norm(final))."""

    shard: Shard
    output: Floats  # (n_vocab, n_embd)
    final_norm: Floats  # (n_embd,)
    texts: list[Text]


def make_corpus(
    folder: Path, *, n_texts: int = 40, n_embd: int = 32, n_vocab: int = 96, noise: float = 0.1, seed: int = 0
) -> Made:
    """Texts of 6 to 20 rows, the last two thirds of them targets; the last state is a rotation of the boundary's."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.standard_normal((n_embd, n_embd)))[0].astype(np.float32)
    output = (3 * random.standard_normal((n_vocab, n_embd)) / np.sqrt(n_embd)).astype(np.float32)
    final_norm = random.uniform(0.5, 2.0, n_embd).astype(np.float32)
    lengths = random.integers(6, 21, n_texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    states = random.standard_normal((offsets[-1], n_embd)).astype(np.float32) * random.uniform(1, 9)
    final = states @ rotation.T + noise * random.standard_normal(states.shape).astype(np.float32)
    rows = np.concatenate([np.arange(o + n // 3, o + n) for o, n in zip(offsets[:-1], lengths, strict=True)])
    tops = [top_of(row, 8) for row in rms_norm(final[rows].astype(np.float32)) * final_norm @ output.T]
    arrays = {
        "tokens": random.integers(0, n_vocab, offsets[-1]).astype(np.int32),
        "offsets": offsets,
        "prompts": np.arange(n_texts, dtype=np.int32),
        f"layer_{LAYER}": states.astype(np.float16),
        "rows": rows.astype(np.int64),
        "final": final[rows].astype(np.float16),
        "top_ids": np.stack([ids for ids, _ in tops]),
        "top_logp": np.stack([logp for _, logp in tops]).astype(np.float16),
    }
    corpus = Corpus(folder, {"made": seed})
    corpus.write(0, arrays)
    shard = corpus.read(0)
    return Made(shard, output, final_norm, list(shard.texts()))
