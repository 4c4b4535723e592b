"""Make GGUF files to test and measure with: random ones of every supported shape, and real ones cut short."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

_BLOCK = 32
_N_SPECIAL = 5  # <unk> <s> </s> and the two turn markers
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a random model. `weights` is the type of the matrices: F32, F16, Q8_0 or Q4_0."""

    architecture: str = "llama"
    n_layer: int = 5
    n_embd: int = 64
    n_ff: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    n_vocab: int = 512
    n_ctx_train: int = 2048
    sliding_window: int = 16  # gemma2 and gemma3 only
    weights: str = "F32"
    tokenizer: bool = False  # a byte vocabulary with a chat template (n_vocab counts it), else none at all

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


ONE_BILLION = ModelShape(
    n_layer=16, n_embd=2048, n_ff=8192, n_head=32, n_head_kv=8, n_vocab=32_000, n_ctx_train=4096, weights="Q4_0"
)


def write_random_model(path: Path | str, shape: ModelShape, seed: int = 0) -> Path:
    """Write a random model; equal shape and seed give an equal file."""
    path = Path(path)
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, shape.architecture)
    _write_metadata(writer, shape)
    for name, rows_columns in _tensors(shape).items():
        _add_tensor(writer, name, rows_columns, shape, random)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: GGUFWriter, shape: ModelShape) -> None:
    writer.add_name(f"random {shape.architecture}")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    if shape.architecture.startswith("gemma"):
        writer.add_sliding_window(shape.sliding_window)
    if shape.architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if shape.architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(shape.n_ctx_train)
    if shape.tokenizer:
        _write_byte_vocabulary(writer, shape.n_vocab)
    else:
        writer.add_tokenizer_model("none")


def _write_byte_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """Special tokens, all 256 bytes, and unused filler: enough to write any text."""
    special = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]
    tokens = [*special, *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3, 3, 3, *([6] * 256)]  # unknown, control, byte
    filler = n_vocab - len(tokens)
    if filler < 0:
        raise ValueError(f"a byte vocabulary needs {len(tokens)} tokens, not {n_vocab}")
    tokens += [f"<filler{i}>" for i in range(filler)]
    types += [5] * filler  # unused
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(4)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Tensor name → numpy shape, (rows, columns) for matrices."""
    d, ff, kv = shape.n_embd, shape.n_ff, shape.n_head_kv * shape.head_size
    gemma, phi = shape.architecture.startswith("gemma"), shape.architecture == "phi3"
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (d,)}
    layer |= {"attn_qkv": (d + 2 * kv, d)} if phi else {"attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d)}
    layer |= {"attn_output": (d, d), "ffn_norm": (d,)}
    layer |= {"ffn_up": (2 * ff, d)} if phi else {"ffn_gate": (ff, d), "ffn_up": (ff, d)}
    layer |= {"ffn_down": (d, ff)}
    if gemma:
        layer |= {"post_attention_norm": (d,), "post_ffw_norm": (d,)}
    if shape.architecture in ("qwen3", "gemma3"):
        layer |= {"attn_q_norm": (shape.head_size,), "attn_k_norm": (shape.head_size,)}
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.n_vocab, d), "output_norm.weight": (d,)}
    if shape.architecture != "gemma2":
        tensors["output.weight"] = (shape.n_vocab, d)
    for i in range(shape.n_layer):
        tensors |= {f"blk.{i}.{name}.weight": size for name, size in layer.items()}
        if shape.architecture == "qwen2":
            tensors |= {f"blk.{i}.attn_{x}.bias": (n,) for x, n in (("q", d), ("k", kv), ("v", kv))}
    return tensors


def _add_tensor(
    writer: GGUFWriter, name: str, size: tuple[int, ...], shape: ModelShape, random: np.random.Generator
) -> None:
    if len(size) == 1:
        centre = 0.0 if name.endswith("bias") else 1.0
        writer.add_tensor(name, (centre + 0.1 * random.standard_normal(size)).astype(np.float32))
        return
    # large output weights make the distributions peaked, as a trained model's are
    scale = (4.0 if name == "output.weight" else 1.0) / np.sqrt(size[1])
    if shape.weights in ("F32", "F16"):
        kind = np.float32 if shape.weights == "F32" else np.float16
        writer.add_tensor(name, (scale * random.standard_normal(size, np.float32)).astype(kind))
    else:
        writer.add_tensor(
            name, _random_blocks(size, scale, shape.weights, random), raw_dtype=GGMLQuantizationType[shape.weights]
        )


def _random_blocks(size: tuple[int, ...], scale: float, kind: str, random: np.random.Generator) -> NDArray[np.uint8]:
    """Rows of quantised blocks: a float16 scale, then 32 random values of 4 or 8 bits."""
    rows, columns = size
    n_bytes = {"Q4_0": 16, "Q8_0": 32}[kind]
    spread = {"Q4_0": 4.6, "Q8_0": 73.9}[kind]  # standard deviation of uniform 4- and 8-bit values
    blocks = random.integers(0, 256, (rows, columns // _BLOCK, 2 + n_bytes), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(scale / spread).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def truncate_model(source: Path | str, target: Path | str, n_layer: int, n_vocab: int | None = None) -> Path:
    """Write a copy of `source` that ends after its first `n_layer` layers, output norm and head kept.

    With `n_vocab`, only so many tokens and rows of the head stay, and no tokenizer: a model of layers alone.
    """
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, arch)
    for name, item in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if n_vocab and (name.startswith("tokenizer.") or name == f"{arch}.vocab_size"):
            continue
        value: Any = n_layer if name == f"{arch}.block_count" else item.contents()
        kind = item.types[0]
        writer.add_key_value(name, value, kind, item.types[-1] if kind is GGUFValueType.ARRAY else None)
    if n_vocab:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(n_vocab)
    for tensor in reader.tensors:
        per_token = tensor.name in ("token_embd.weight", "output.weight")
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else ""
        if not layer or int(layer) < n_layer:
            data = tensor.data[:n_vocab] if n_vocab and per_token else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(target)


def tiny(architecture: str, **changes: Any) -> ModelShape:
    """A shape of the given architecture that loads in milliseconds; 7 layers show both kinds of gemma3's."""
    return replace(ModelShape(architecture, n_layer=7), **changes)
