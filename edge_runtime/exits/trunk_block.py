"""What a head's block is before training: the trunk's own next layer, or one that adds nothing.

A head that begins as the layer behind its boundary learns faster and further than one that begins as noise. (Measured
on SmolLM2-135M, boundary 20, one pass over 29,000 tokens: agreement 0.47 against 0.42.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..types import Floats
from .head import HeadShape, HeadWeights, usual_shape

# blocks of these are computed as a llama block is, but for biases
_ALIKE = ("llama",)


def trunk_block(model_path: Path | str, layer: int, n_rows: int) -> tuple[HeadShape, dict[str, Floats]] | None:
    """Shape and tensors, by a head's names, of a model's layer number `layer` (from 0): the one behind that boundary.

    None where the model has no such layer, or one that a plain llama block cannot stand for.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(model_path)
    architecture = _value(reader, "general.architecture", "")
    if architecture not in _ALIKE:
        return None
    get = {name: _value(reader, f"{architecture}.{name}", 0) for name in ("embedding_length", "feed_forward_length")}
    n_head = _value(reader, f"{architecture}.attention.head_count", 0)
    n_head_kv = _value(reader, f"{architecture}.attention.head_count_kv", n_head)
    n_embd, n_ff = get["embedding_length"], get["feed_forward_length"]
    head_size = _value(reader, f"{architecture}.rope.dimension_count", 0) or (n_head and n_embd // n_head)
    found = {t.name.replace(f"blk.{layer}.", "blk.0."): t for t in reader.tensors if t.name.startswith(f"blk.{layer}.")}
    scaled = any(key.startswith(f"{architecture}.rope.scaling") for key in reader.fields)
    if not all(isinstance(n, int) and n > 0 for n in (n_embd, n_ff, n_head, n_head_kv)) or scaled:
        return None
    if head_size * n_head != n_embd or "rope_freqs.weight" in {t.name for t in reader.tensors}:
        return None
    shape = HeadShape(
        n_embd,
        n_head,
        n_head_kv,
        n_ff,
        n_rows,
        rope_base=float(_value(reader, f"{architecture}.rope.freq_base", 10_000.0)),
        norm_epsilon=float(_value(reader, f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)),
    )
    wanted = {**shape.matrices, **dict.fromkeys(shape.norms[:2], (n_embd,))}
    tensors: dict[str, Floats] = {}
    for name, size in wanted.items():
        if name not in found:
            return None
        values = np.asarray(dequantize(found[name].data, found[name].tensor_type), np.float32)
        if values.shape != size:
            return None
        tensors[name] = values
    return (shape, tensors) if set(found) == set(wanted) else None


def start_head(model_path: Path | str, ridge: HeadWeights, seed: int) -> HeadWeights:
    """The head that training starts from: the trunk's next layer where it can be had, behind it the ridge lens."""
    n_rows = ridge.shape.n_rows
    found = trunk_block(model_path, ridge.layer, n_rows)
    if found is None:
        shape = usual_shape(ridge.shape.n_embd, n_rows)
        found = shape, fresh_block(shape, seed)
    shape, tensors = found
    kept = {name: ridge.tensors[name] for name in ("output_norm.weight", "other")}
    return HeadWeights(ridge.layer, shape, tensors | kept, ridge.projection)


def fresh_block(shape: HeadShape, seed: int) -> dict[str, Floats]:
    """Tensors of a block that adds nothing yet: matrices into it random, those out of it zero."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Floats] = {name: np.ones(shape.n_embd, np.float32) for name in shape.norms[:2]}
    for name, (rows, columns) in shape.matrices.items():
        silent = name.endswith(("attn_output.weight", "ffn_down.weight"))
        scale = 0.0 if silent else columns**-0.5
        tensors[name] = (scale * random.standard_normal((rows, columns))).astype(np.float32)
    return tensors


def _value(reader: Any, key: str, default: Any) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()
