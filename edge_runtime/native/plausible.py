"""What llama.cpp takes for granted of a model file: where it does not hold, llama.cpp would end the whole process.

So it is checked before llama.cpp is asked to load the file. Only for the architectures that can be sliced; what
llama.cpp itself refuses with a reason is left to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_MAX_WINDOW = 2**24
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_TOKENIZERS = ("", "none", "no_vocab", "llama", "gpt2")
_F32 = 0  # enum ggml_type
_NO_MATRIX_KINDS = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}


class Metadata(Protocol):
    """Look-ups of a file's metadata; a value of an unexpected type reads as missing."""

    def text(self, key: str, default: str = "") -> str: ...

    def number(self, key: str, default: float) -> float: ...

    def integers(self, key: str) -> Sequence[int]:
        """One value, or one per layer; empty if missing."""

    def integer(self, key: str, default: int) -> int:
        """One value, or the largest of several."""

    def is_list(self, key: str) -> bool: ...


def metadata_fault(meta: Metadata, architecture: str) -> str:
    """What is wrong with the metadata of a model of a supported architecture, '' if nothing is."""
    looks = _Looks(meta, architecture)
    return (
        _layers_fault(looks)
        or _heads_fault(looks)
        or _rotation_fault(looks)
        or _experts_fault(looks)
        or _window_fault(looks)
        or _other_fault(looks, meta)
    )


def tensor_fault(name: str, kind: int) -> str:
    """What is wrong with a tensor of type `kind` (enum ggml_type), '' if nothing is."""
    if name.endswith(".weight") and "norm" not in name and not name.startswith("rope_"):
        return f"tensor {name} is of type {_NO_MATRIX_KINDS[kind]}, not of weights" if kind in _NO_MATRIX_KINDS else ""
    return "" if kind == _F32 else f"tensor {name} must be of type F32"


def missing_tensor(names: Collection[str], architecture: str, n_layer: int) -> str:
    """A layer's tensor that llama.cpp would use without asking whether it is there, '' if none is missing."""
    if architecture != "phi3":
        return ""
    for layer in range(n_layer):
        for name in ("attn_q", "attn_k", "attn_v"):
            if f"blk.{layer}.attn_qkv.weight" not in names and f"blk.{layer}.{name}.weight" not in names:
                return f"tensor blk.{layer}.attn_qkv.weight is missing"
    return ""


class _Looks:
    """Look-ups below an architecture's prefix."""

    def __init__(self, meta: Metadata, architecture: str) -> None:
        self._meta, self.architecture = meta, architecture

    def largest(self, key: str, default: int = 0) -> int:
        return self._meta.integer(f"{self.architecture}.{key}", default)

    def all(self, key: str) -> Sequence[int]:
        return self._meta.integers(f"{self.architecture}.{key}")

    def number(self, key: str, default: float) -> float:
        return self._meta.number(f"{self.architecture}.{key}", default)

    def text(self, key: str, default: str) -> str:
        return self._meta.text(f"{self.architecture}.{key}", default)

    def is_list(self, key: str) -> bool:
        return self._meta.is_list(f"{self.architecture}.{key}")

    def head_size(self) -> int:
        """Of a key, where the file does not say otherwise."""
        first_layers_heads = max([1, *self.all("attention.head_count")[:1]])
        return self.largest("attention.key_length", self.largest("embedding_length") // first_layers_heads)


def _layers_fault(looks: _Looks) -> str:
    n_layer, n_embd = looks.largest("block_count"), looks.largest("embedding_length")
    if not 1 <= n_layer <= _MAX_LAYERS or n_embd < 1:
        return f"its header gives {n_layer} layers of width {n_embd}"
    if looks.largest("nextn_predict_layers") >= n_layer:
        return f"all its {n_layer} layers are for predicting further ahead"
    return ""


def _heads_fault(looks: _Looks) -> str:
    heads = looks.all("attention.head_count")
    heads_kv = looks.all("attention.head_count_kv") or heads
    if not heads or min(heads) < 1 or not heads_kv or min(heads_kv) < 1:
        return "a layer has no attention heads"
    n = max(len(heads), len(heads_kv))
    pairs = zip(_per_layer(heads, n), _per_layer(heads_kv, n), strict=False)
    if any(a % b for a, b in pairs):
        return f"{max(heads)} attention heads cannot share {max(heads_kv)} heads of keys and values"
    key = looks.head_size()
    value = looks.largest("attention.value_length", looks.largest("embedding_length") // heads[0])
    if looks.architecture in ("llama", "qwen2", "qwen3", "phi3") and key != value:
        return f"its keys are {key} wide, its values {value}"
    n_embd = looks.largest("embedding_length")
    if looks.architecture in ("qwen2", "phi3") and any(h * key != n_embd for h in heads):
        return f"{max(heads)} heads of width {key} do not make up its width of {n_embd}"
    return ""


def _per_layer(values: Sequence[int], n: int) -> Sequence[int]:
    return values if len(values) > 1 else list(values) * n


def _rotation_fault(looks: _Looks) -> str:
    size = looks.head_size()
    full = looks.largest("rope.dimension_count", size)
    for rotated in (full, looks.largest("rope.dimension_count_swa", full)):
        if not 2 <= rotated <= size or rotated % 2:
            return f"{rotated} of the {size} values of a head are rotated"
        if looks.architecture in ("qwen2", "qwen3") and rotated != size:
            return f"{rotated} of the {size} values of a head are rotated, but this architecture rotates all"
    scaling = looks.text("rope.scaling.type", "none")
    return "" if scaling in _ROPE_SCALINGS else f"its rotation scaling '{scaling}' is unknown"


def _experts_fault(looks: _Looks) -> str:
    experts, used = looks.largest("expert_count"), looks.largest("expert_used_count")
    groups, groups_used = looks.largest("expert_group_count"), looks.largest("expert_group_used_count")
    if not experts and not used and not groups:
        return ""
    in_groups = groups <= 1 or (experts % groups == 0 and 0 < groups_used < groups)
    if not 0 < used <= experts <= _MAX_EXPERTS or groups >= experts or not in_groups:
        return f"it uses {used} of {experts} experts, {groups_used} of {groups} groups"
    return ""


def _window_fault(looks: _Looks) -> str:
    if not looks.architecture.startswith("gemma"):
        return ""
    window, pattern = looks.largest("attention.sliding_window"), looks.all("attention.sliding_window_pattern")
    if window > _MAX_WINDOW:
        return f"its sliding window is {window} tokens wide"
    # a list tells of each layer whether it has a window, a number every how many layers one has none
    none = not any(pattern) if looks.is_list("attention.sliding_window_pattern") else pattern == [1]
    return "no layer has its sliding window" if none else ""


def _other_fault(looks: _Looks, meta: Metadata) -> str:
    epsilon = looks.number("attention.layer_norm_rms_epsilon", 0.0)
    if not epsilon >= 0:
        return f"its norm's epsilon is {epsilon}"
    tokenizer = meta.text("tokenizer.ggml.model")
    return "" if tokenizer in _TOKENIZERS else f"its tokenizer '{tokenizer}' does not go with '{looks.architecture}'"
