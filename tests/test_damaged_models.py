"""Files that llama.cpp would crash on: each must end in an error of ours, in a process that lives on.

Every case runs in a child of its own, forked from one that has the library loaded, so that a crash shows as a signal.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.bench.gguf_maker import tiny, write_random_model
from edge_runtime.errors import EdgeError
from edge_runtime.native import ContextOptions, Model, load, read_header
from edge_runtime.native.plausible import tensor_fault
from edge_runtime.slices import open_slices

from .raw_gguf import BOOL, F32, I32, TEXT, RawModel, RawTensor

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
Change = Callable[[RawModel], object]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

# ── values that llama.cpp asserts on ────────────────────────────────────────────────────────────────────────────────

VALUES: dict[str, list[int]] = {
    "%.block_count": [0, 2, 4, 513, 2**31, 2**32 - 1],
    "%.embedding_length": [0, 63, 65, 2**32 - 1],
    "%.attention.head_count": [0, 1, 3, 5, 64, 2**32 - 1],
    "%.attention.head_count_kv": [0, 1, 3, 5, 2**32 - 1],
    "%.attention.key_length": [0, 1, 7, 15, 2**31],
    "%.attention.value_length": [0, 1, 7, 15, 2**31],
    "%.rope.dimension_count": [0, 1, 3, 8, 18, 2**32 - 1],
    "%.rope.dimension_count_swa": [0, 1, 18, 2**32 - 1],
    "%.feed_forward_length": [0, 1, 2**32 - 1],
    "%.context_length": [0, 2**32 - 1],
    "%.vocab_size": [0, 1, 511, 513, 2**31, 2**32 - 1],
    "%.expert_count": [1, 8, 1025, 2**32 - 1],
    "%.expert_used_count": [1, 2**32 - 1],
    "%.expert_group_count": [1, 2**32 - 1],
    "%.nextn_predict_layers": [1, 3, 4, 2**32 - 1],
    "%.attention.sliding_window": [0, 1, 2**31, 2**32 - 1],
    "%.attention.sliding_window_pattern": [0, 1, 2**32 - 1],
    "%.embedding_length_out": [1, 2**32 - 1],
    "%.pooling_type": [1, 99],
    "general.alignment": [0, 3, 2**31],
    "split.count": [2],
}
LISTS: dict[str, list[list[int]]] = {
    "%.attention.head_count": [[], [4, 0, 4], [4, 2, 1], [4] * 2, [4] * 600],
    "%.attention.head_count_kv": [[], [2, 0, 2], [2, 3, 2], [2] * 2, [2**32 - 1] * 3],
    "%.feed_forward_length": [[], [128, 0, 128], [128] * 2],
    "%.attention.sliding_window_pattern": [[], [0], [0, 0, 0], [1] * 600],
    "%.expert_used_count": [[], [0, 1, 0]],
}


def values() -> Iterator[tuple[str, Change]]:
    for key, some in VALUES.items():
        for value in some:
            yield f"{key} = {value}", lambda m, key=key, value=value: m.set(key, value)
    for key, lists in LISTS.items():
        for many in lists:
            yield f"{key} = {many[:3]} × {len(many)}", lambda m, key=key, many=many: m.set_array(key, many)
    for epsilon in (-1.0, float("nan"), float("inf")):
        yield f"epsilon {epsilon}", lambda m, e=epsilon: m.set("%.attention.layer_norm_rms_epsilon", e, F32)
    for scaling in ("", "x", "yarn", "longrope"):
        yield f"rope scaling '{scaling}'", lambda m, s=scaling: m.set("%.rope.scaling.type", s, TEXT)
    yield "not causal", lambda m: m.set("%.attention.causal", False, BOOL)
    yield "negative heads", lambda m: m.set_array("%.attention.head_count", [-4, -4, -4], I32)
    yield "experts without tensors", lambda m: (m.set("%.expert_count", 4), m.set("%.expert_used_count", 2))
    yield "expert groups", lambda m: [m.set(f"%.expert_{k}", v) for k, v in _GROUPS.items()]


_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "rope.dimension_count",
    "attention.layer_norm_rms_epsilon",
    "vocab_size",
)
_GROUPS = {"count": 6, "used_count": 2, "group_count": 4, "group_used_count": 2}


def missing() -> Iterator[tuple[str, Change]]:
    for key in _KEYS:
        yield f"without {key}", lambda m, key=key: m.drop(f"%.{key}")
        yield f"{key} as text", lambda m, key=key: m.set(f"%.{key}", "16", TEXT)


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_KINDS = {1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}  # enum ggml_type → bytes of a value


def retyped(name: str, kind: int) -> Change:
    def change(model: RawModel) -> None:
        tensor = model.tensors[name]
        tensor.data = bytes(len(tensor.data) // 4 * _KINDS[kind])
        tensor.kind = kind

    return change


def reshaped(name: str, dims: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Change:
    def change(model: RawModel) -> None:
        tensor = model.tensors[name]
        tensor.dims = dims(tensor.dims)
        n = 1
        for dim in tensor.dims:
            n *= dim
        tensor.data = (tensor.data * 4)[: 4 * n]

    return change


def tensors(raw: RawModel) -> Iterator[tuple[str, Change]]:
    for name in raw.tensors:
        if name.startswith(("blk.1.", "blk.2.")):
            continue
        yield f"without {name}", lambda m, name=name: m.tensors.pop(name)
        for kind in _KINDS:
            yield f"{name} of type {kind}", retyped(name, kind)
        yield f"{name} turned", reshaped(name, lambda d: d[::-1])
        yield f"{name} halved", reshaped(name, lambda d: (d[0] // 2, *d[1:]))
        yield f"{name} doubled", reshaped(name, lambda d: (*d[:-1], 2 * d[-1]))
        yield f"{name} empty", reshaped(name, lambda d: (0, *d[1:]))
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_q.scale", "blk.9.attn_q.weight", "blk.x.y"):
        for kind in (0, 27):
            added = RawTensor((8,), kind, bytes(8 * (4 if kind == 0 else 8)))
            yield f"with {name} of type {kind}", lambda m, name=name, t=added: m.tensors.__setitem__(name, t)


# ── vocabularies ────────────────────────────────────────────────────────────────────────────────────────────────────


def vocabularies() -> Iterator[tuple[str, Change]]:
    for tokenizer in ("gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "x", "", "none"):
        yield f"tokenizer '{tokenizer}'", lambda m, t=tokenizer: m.set("tokenizer.ggml.model", t, TEXT)
    merges = [[], ["a b"], ["ab"], ["", " ", "a b c"]]
    for some in merges:

        def change(model: RawModel, some: list[str] = some) -> None:
            model.set("tokenizer.ggml.model", "gpt2", TEXT)
            model.set_array("tokenizer.ggml.merges", some, TEXT)

        yield f"gpt2 with merges {some}", change
    for special in ("bos", "eos", "eot", "unknown", "padding"):
        for value in (511, 512, 2**32 - 1):
            key = f"tokenizer.ggml.{special}_token_id"
            yield f"{special} {value}", lambda m, key=key, value=value: m.set(key, value)
    yield "no special tokens", lambda m: [m.fields.pop(k) for k in list(m.fields) if k.endswith("_token_id")]
    for n in (0, 10, 511, 513):
        yield f"{n} types", lambda m, n=n: m.set_array("tokenizer.ggml.token_type", [1] * n, I32)
        yield f"{n} scores", lambda m, n=n: m.set_array("tokenizer.ggml.scores", [0.0] * n, F32)
        yield f"{n} tokens", lambda m, n=n: m.set_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(n)], TEXT)
    yield "types of none", lambda m: m.set_array("tokenizer.ggml.token_type", [99] * 512, I32)
    yield "adding what is not there", _add_without_ids


def _add_without_ids(model: RawModel) -> None:
    for name in ("bos", "eos", "sep"):
        model.set(f"tokenizer.ggml.add_{name}_token", True, BOOL)
        model.fields.pop(f"tokenizer.ggml.{name}_token_id", None)


# ── running them ────────────────────────────────────────────────────────────────────────────────────────────────────


def use(path: Path) -> None:
    """All that a run does with a model."""
    read_header(str(path))
    with Model(str(path)) as model:
        if model.has_tokenizer:
            tokens = model.tokenize("a text\n<s>", add_special=True, parse_special=True)
            model.detokenize([*tokens, 0, model.n_vocab - 1], special=True)
            model.special_text("bos")
        slices = open_slices(model, (1,) if model.n_layer > 1 else (), ContextOptions(64, 16, n_threads=1))
        slices[0].decode_tokens([0] * 4, 0, () if len(slices) > 1 else [3])
        if len(slices) > 1:
            slices[1].decode_states(slices[0].hidden(4), 0, [3])
        slices[-1].logits(3)


def outcome_of(make: Callable[[], Path]) -> str:
    """'used', 'refused: …' or how it crashed, of using a model in a child."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.alarm(20)  # a hang is a crash, too
            path = make()
            try:
                use(path)
                text = "used"
            except EdgeError as error:
                text = f"refused: {error}"
            os.write(send, text.encode())
            code = 0
        except BaseException:
            os.write(send, traceback.format_exc()[-1500:].encode())
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive, "rb") as answer:
        text = answer.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if code == 0 else f"ended with {code}: {text}"


def flipped(whole: bytes, seed: int) -> bytes:
    """`whole` with some bytes of its first kilobytes changed."""
    draw, data = random.Random(seed), bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[draw.randrange(4, min(len(data), draw.choice([200, 1000, 5000])))] = draw.choice([0, 1, 0x7F, 0xFF, 32])
    return bytes(data)


def run_all(folder: Path) -> dict[str, str]:
    """Outcome by case, of all cases."""
    load()
    outcomes: dict[str, str] = {}
    case = folder / "case.gguf"
    for architecture in ARCHITECTURES:
        path = write_random_model(folder / f"{architecture}.gguf", tiny(architecture, n_layer=3, tokenizer=False))
        raw = RawModel(path)
        changes = [("as it is", lambda _model: None), *values(), *missing()]
        changes += tensors(raw) if architecture in ("llama", "phi3") else []
        for name, change in changes:

            def make(path: Path = path, change: Change = change) -> Path:
                model = RawModel(path)
                change(model)
                return model.write(case)

            outcomes[f"{architecture}: {name}"] = outcome_of(make)
    path = write_random_model(folder / "words.gguf", tiny("llama", n_layer=3, tokenizer=True))
    for name, change in vocabularies():

        def make_words(path: Path = path, change: Change = change) -> Path:
            model = RawModel(path)
            change(model)
            return model.write(case)

        outcomes[f"vocabulary: {name}"] = outcome_of(make_words)
    whole = (folder / "llama.gguf").read_bytes()
    for seed in range(150):

        def make_flipped(seed: int = seed) -> Path:
            case.write_bytes(flipped(whole, seed))
            return case

        outcomes[f"flipped: {seed}"] = outcome_of(make_flipped)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of all cases, from a fresh process: this one has threads, and must not fork."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_damaged_models", str(tmp_path_factory.mktemp("damaged"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # llama.cpp's last words, if it has any
        text=True,
        cwd=ROOT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_nothing_crashes(outcomes: dict[str, str]) -> None:
    crashed = {case: text for case, text in outcomes.items() if not text.startswith(("used", "refused: "))}
    assert not crashed
    assert len(outcomes) > 900


def test_every_refusal_says_what_is_wrong(outcomes: dict[str, str]) -> None:
    for case, text in outcomes.items():
        if text.startswith("refused: "):
            assert "\nhint: " in text, case
            assert "gave no reason" not in text, case
            assert "failed to load model\n" not in text, case


def test_models_as_they_are_can_be_used(outcomes: dict[str, str]) -> None:
    """So that nothing is refused for another reason than the change."""
    assert [outcomes[f"{a}: as it is"] for a in ARCHITECTURES] == ["used"] * 6
    used = [case for case, text in outcomes.items() if text == "used"]
    refused = [case for case, text in outcomes.items() if text != "used"]
    assert len(used) > 100
    assert len(refused) > 500


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("llama: %.block_count = 0", "its header gives 0 layers of width 64"),
        ("llama: %.block_count = 4", "'blk.3.attn_norm.weight' not found"),
        ("llama: %.attention.head_count = 0", "a layer has no attention heads"),
        ("llama: %.attention.head_count_kv = 3", "4 attention heads cannot share 3 heads of keys and values"),
        ("llama: %.attention.key_length = 7", "its keys are 7 wide, its values 16"),
        ("phi3: without blk.0.attn_qkv.weight", "tensor blk.0.attn_qkv.weight is missing"),
        ("qwen2: %.attention.head_count = 64", "64 heads of width 16 do not make up its width of 64"),
        ("qwen2: %.rope.dimension_count = 8", "8 of the 16 values of a head are rotated, but"),
        ("gemma3: %.rope.dimension_count = 18", "18 of the 16 values of a head are rotated"),
        ("gemma2: %.attention.sliding_window_pattern = 1", "no layer has its sliding window"),
        ("gemma2: %.attention.sliding_window = 2147483648", "its sliding window is 2147483648 tokens wide"),
        ("llama: %.expert_count = 8", "it uses 0 of 8 experts, 0 of 0 groups"),
        ("llama: expert groups", "2 of 4 groups"),
        ("llama: %.nextn_predict_layers = 3", "all its 3 layers are for predicting further ahead"),
        ("llama: epsilon nan", "its norm's epsilon is nan"),
        ("llama: rope scaling 'x'", "its rotation scaling 'x' is unknown"),
        ("llama: output_norm.weight of type 1", "tensor output_norm.weight must be of type F32"),
        ("llama: output.weight of type 27", "tensor output.weight is of type I64, not of weights"),
        ("vocabulary: tokenizer 'bert'", "its tokenizer 'bert' does not go with 'llama'"),
    ],
)
def test_refusals_name_the_fault(outcomes: dict[str, str], case: str, words: str) -> None:
    assert outcomes[case].startswith("refused: ")
    assert words in outcomes[case]


def test_tensors_of_every_shape_of_model_are_plausible(tmp_path: Path) -> None:
    for architecture in ARCHITECTURES:
        for weights in ("F32", "F16", "Q8_0", "Q4_0"):
            shape = tiny(architecture, n_layer=1, weights=weights)
            raw = RawModel(write_random_model(tmp_path / f"{architecture}-{weights}.gguf", shape))
            assert not [name for name, tensor in raw.tensors.items() if tensor_fault(name, tensor.kind)]


if __name__ == "__main__":
    json.dump(run_all(Path(sys.argv[1])), sys.stdout)
