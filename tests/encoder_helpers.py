"""A tiny random BERT as an installed package of weights, and ONNX files of other makers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.encoder.bert import BertShape, expected_sizes
from edge_runtime.encoder.recipes import CONFIG, TOKENIZER, WEIGHTS, Recipe

SHAPE = BertShape(n_layer=2, n_embd=64, n_head=4, n_ff=128, n_vocab=64, n_positions=24, norm_eps=1e-12)
MAX_TOKENS = 20
INT32, INT64 = 6, 7  # as onnx.TensorProto has them
MODULE = "tiny_encoder_weights"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "!", "?", "."]


def need_libraries() -> None:
    """Skip a module of tests where the libraries that build encoders are missing."""
    for library in ("onnx", "onnxruntime", "safetensors", "tokenizers"):
        pytest.importorskip(library, reason=f"building an encoder needs {library}")


def random_weights(seed: int = 0) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Weights of SHAPE, as large as a trained model's; norms near 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, size in expected_sizes(SHAPE).items():
        values = rng.normal(0, 0.1, size)
        weights[name] = (values + 1 if name.endswith("LayerNorm.weight") else values).astype(np.float32)
    return weights


def config() -> dict[str, Any]:
    return {
        "model_type": "bert",
        "hidden_act": "gelu",
        "num_hidden_layers": SHAPE.n_layer,
        "hidden_size": SHAPE.n_embd,
        "num_attention_heads": SHAPE.n_head,
        "intermediate_size": SHAPE.n_ff,
        "vocab_size": SHAPE.n_vocab,
        "max_position_embeddings": SHAPE.n_positions,
        "layer_norm_eps": SHAPE.norm_eps,
    }


def tiny_tokenizer() -> Any:
    """Letters, and the special tokens around; padded and cut as published tokenizers are, which must not matter."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def write_package(
    root: Path,
    weights: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    spoil: Callable[[Path], None] = lambda _folder: None,
) -> Recipe:
    """A package of weights below `root`, and the recipe for it; `spoil` changes files before the recipe is written."""
    from safetensors.numpy import save_file

    folder = root / MODULE / "model"
    folder.mkdir(parents=True)
    (root / MODULE / "__init__.py").write_text("raise ImportError('nobody needs to import this')\n")
    (folder / CONFIG).write_text(json.dumps({**config(), **(changes or {})}))
    save_file(dict(random_weights() if weights is None else weights), folder / WEIGHTS)
    tiny_tokenizer().save(str(folder / TOKENIZER))
    spoil(folder)
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (CONFIG, WEIGHTS, TOKENIZER)}
    return Recipe(
        name="tiny",
        package="tiny-encoder-weights",
        version="1.0",
        module=MODULE,
        folder="model",
        sha256=hashes,
        max_tokens=MAX_TOKENS,
        licence="Apache-2.0",
    )


def write_lookup_encoder(
    folder: Path,
    *,
    inputs: Mapping[str, tuple[Any, list[Any]]] | None = None,
    output: str = "last_hidden_state",
    summed_over: int | None = None,
) -> Path:
    """An encoder whose states are rows of a table, as (n, n_tokens, 4), or their sum over one of these axes.

    `inputs` gives the type and sizes of each input; only input_ids is read.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    free = ["n", "n_tokens"]
    inputs = inputs or dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (INT64, free))
    first = next(iter(inputs))
    nodes = [helper.make_node("Gather", ["table", first], [output if summed_over is None else "states"])]
    if summed_over is not None:
        nodes.append(helper.make_node("ReduceSum", ["states", "axis"], [output], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info(name, kind, sizes) for name, (kind, sizes) in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        initializer=[
            numpy_helper.from_array(lookup_table(), "table"),
            numpy_helper.from_array(np.array([summed_over or 0]), "axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "lookup.onnx")
    tiny_tokenizer().save(str(folder / TOKENIZER))
    return folder / "lookup.onnx"


def lookup_table() -> Any:
    """The rows of `write_lookup_encoder`."""
    return np.random.default_rng(3).normal(size=(len(VOCABULARY), 4)).astype(np.float32)
