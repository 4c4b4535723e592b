"""Sentences to vectors: any text, any number of them, and encoders of other makers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.encoder import SentenceEncoder
from edge_runtime.encoder.build import build_encoder
from edge_runtime.encoder.recipes import FLOAT32, INT8, TOKENIZER
from edge_runtime.errors import (
    DecodeError,
    EdgeError,
    ModelNotFoundError,
    ModelUnreadableError,
    UnsupportedModelError,
)
from tests import encoder_helpers
from tests.encoder_helpers import (
    INT32,
    INT64,
    MAX_TOKENS,
    SHAPE,
    lookup_table,
    need_libraries,
    tiny_tokenizer,
    write_lookup_encoder,
    write_package,
)

need_libraries()

TEXTS = [
    "a cat sat",
    "",
    "hello world!",
    "привет",
    "今天天气很好",
    "مرحبا",
    "\x00\n\t",
    "x" * 99,
    "é ü ñ",
    "a cat sat",
    "😀",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny encoder."""
    root = tmp_path_factory.mktemp("encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(root / "cache"))
        patch.syspath_prepend(str(root))
        return build_encoder(write_package(root), root / "tiny").folder


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("EDGE_RUNTIME_MODELS", raising=False)


@pytest.mark.parametrize("file", [INT8, FLOAT32])
def test_every_text_has_a_vector_of_unit_length(built: Path, file: str) -> None:
    encoder = SentenceEncoder(built / file)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), SHAPE.n_embd) == (len(TEXTS), encoder.n_embd)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.encode([]).shape == (0, SHAPE.n_embd)


@pytest.mark.parametrize("file", [INT8, FLOAT32])
def test_a_text_has_the_same_vector_in_any_company(built: Path, file: str) -> None:
    encoder = SentenceEncoder(built / file)
    together = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(encoder.encode([text])[0], vector)


def test_batches_of_float32_are_the_same_but_for_rounding(built: Path) -> None:
    encoder = SentenceEncoder(built / FLOAT32, n_threads=2)
    texts = [f"{a} {b}" for a in "abc" for b in ("x", "y z", "hello")]
    np.testing.assert_allclose(encoder.encode(texts, batch_size=2), encoder.encode(texts), atol=1e-5)


def test_a_folder_means_its_int8_file(built: Path) -> None:
    assert SentenceEncoder(built).path == SentenceEncoder(str(built)).path == built / INT8


def test_a_name_is_found_where_models_are(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(built.parent))
    assert SentenceEncoder("tiny").path == built / INT8


def test_long_texts_are_cut_as_if_all_of_them_were_read(built: Path) -> None:
    encoder = SentenceEncoder(built / FLOAT32)
    assert encoder.max_tokens == MAX_TOKENS
    rng = np.random.default_rng(0)
    whole = tiny_tokenizer()
    whole.no_padding()
    whole.enable_truncation(MAX_TOKENS)
    for _ in range(60):
        length = int(rng.integers(1, 3000))
        text = "".join(rng.choice(list("abc     !天é"), length))
        text = " " * int(rng.integers(0, 2000)) + text
        assert encoder._token_ids(text) == whole.encode(text).ids
    long = "a " * 10**6
    np.testing.assert_array_equal(encoder.encode([long]), encoder.encode(["a " * MAX_TOKENS]))


def test_half_a_surrogate_pair_is_no_failure(built: Path) -> None:
    encoder = SentenceEncoder(built)
    np.testing.assert_array_equal(encoder.encode(["a \ud83d b"]), encoder.encode(["a ? b"]))


def test_one_text_is_no_list_of_texts(built: Path) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        SentenceEncoder(built).encode("hello")


def test_numbers_that_make_no_sense(built: Path) -> None:
    with pytest.raises(ValueError, match="n_threads is 0"):
        SentenceEncoder(built, n_threads=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        SentenceEncoder(built).encode([], batch_size=0)


@pytest.mark.parametrize("kind", [INT64, INT32])
@pytest.mark.parametrize("inputs", [("input_ids", "attention_mask"), ("input_ids", "attention_mask", "token_type_ids")])
@pytest.mark.parametrize(("output", "summed_over"), [("last_hidden_state", None), ("sentence_embedding", 1)])
def test_encoders_of_other_makers(
    tmp_path: Path, kind: int, inputs: tuple[str, ...], output: str, summed_over: int | None
) -> None:
    sizes = ["n", "n_tokens"]
    given = dict.fromkeys(inputs, (kind, sizes))
    path = write_lookup_encoder(tmp_path / "m", inputs=given, output=output, summed_over=summed_over)
    found = SentenceEncoder(path).encode(["abc", "", "zz"])
    ids = [[2, 4, 31, 32, 3], [2, 3], [2, 29, 55, 3]]
    expected = np.array([lookup_table()[row].mean(0) for row in ids])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_limit_of_tokens_of_another_encoder(tmp_path: Path) -> None:
    path = write_lookup_encoder(tmp_path)
    assert SentenceEncoder(path).max_tokens == 8  # by its tokenizer.json
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    encoder = SentenceEncoder(path)
    assert encoder.max_tokens == 6
    np.testing.assert_array_equal(encoder.encode(["a b c d e f"]), encoder.encode(["a b c d"]))
    (tmp_path / "sentence_bert_config.json").unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.no_truncation()
    tokenizer.save(str(tmp_path / TOKENIZER))
    assert SentenceEncoder(path).max_tokens == 512


def test_a_tokenizer_without_special_tokens_can_have_none_for_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = write_lookup_encoder(tmp_path)
    Tokenizer(models.WordPiece({"a": 5, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / TOKENIZER))
    np.testing.assert_allclose(np.linalg.norm(SentenceEncoder(path).encode([""])), 1, atol=1e-6)


def test_other_inputs_are_named(tmp_path: Path) -> None:
    free = (INT64, ["n", "n_tokens"])
    for names in (["input_ids"], ["pixel_values", "attention_mask"], ["input_ids", "attention_mask", "position_ids"]):
        path = write_lookup_encoder(tmp_path, inputs=dict.fromkeys(names, free))
        with pytest.raises(UnsupportedModelError, match=f"has the inputs {', '.join(names)}\n") as failure:
            SentenceEncoder(path)
        assert failure.value.hint.endswith("input_ids, attention_mask and possibly token_type_ids")


def test_other_outputs_are_named(tmp_path: Path) -> None:
    path = write_lookup_encoder(tmp_path, output="logits")
    with pytest.raises(UnsupportedModelError, match="has the outputs logits") as failure:
        SentenceEncoder(path)
    assert failure.value.hint.endswith("sentence_embedding or last_hidden_state")


@pytest.mark.parametrize("sizes", [[1, 8], ["n", 8], [1, "n_tokens"], ["n"]])
def test_inputs_of_fixed_sizes(tmp_path: Path, sizes: list[object]) -> None:
    path = write_lookup_encoder(tmp_path, inputs=dict.fromkeys(("input_ids", "attention_mask"), (INT64, sizes)))
    with pytest.raises(UnsupportedModelError, match="of the sizes"):
        SentenceEncoder(path)


def test_a_token_that_the_encoder_does_not_know(tmp_path: Path) -> None:
    path = write_lookup_encoder(tmp_path)
    longer = tiny_tokenizer()
    longer.add_tokens(["ab"])
    longer.save(str(path.with_name(TOKENIZER)))
    with pytest.raises(DecodeError, match="failed on 1 x 3 tokens"):
        SentenceEncoder(path).encode(["ab"])


def test_an_output_that_is_no_vector_per_text(tmp_path: Path) -> None:
    path = write_lookup_encoder(tmp_path, summed_over=0)
    with pytest.raises(DecodeError, match=r"gave an array \(2, 4\) for 1 texts"):
        SentenceEncoder(path)


def test_an_output_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = lookup_table()
    table[5] = np.nan  # the letter b
    monkeypatch.setattr(encoder_helpers, "lookup_table", lambda: table)
    encoder = SentenceEncoder(write_lookup_encoder(tmp_path))
    assert np.isfinite(encoder.encode(["a"])).all()
    with pytest.raises(DecodeError, match="not finite"):
        encoder.encode(["a", "b"])


def test_files_that_are_missing_or_damaged(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no encoder"):
        SentenceEncoder(tmp_path / "nothing.onnx")
    with pytest.raises(ModelNotFoundError, match=r"there is no int8\.onnx"):
        SentenceEncoder(tmp_path)
    path = tmp_path / "cut.onnx"
    path.write_bytes((built / INT8).read_bytes()[:1000])
    with pytest.raises(ModelNotFoundError, match=r"there is no .*tokenizer\.json"):
        SentenceEncoder(path)
    path.with_name(TOKENIZER).write_text("{}")
    with pytest.raises(ModelUnreadableError, match=r"tokenizer\.json cannot be read"):
        SentenceEncoder(path)
    path.with_name(TOKENIZER).write_bytes((built / TOKENIZER).read_bytes())
    with pytest.raises(ModelUnreadableError, match=r"cut\.onnx cannot be loaded"):
        SentenceEncoder(path)


def test_a_name_that_is_not_built_says_how() -> None:
    with pytest.raises(ModelNotFoundError, match="the encoder minilm-l6 is not built") as failure:
        SentenceEncoder()
    assert failure.value.hint == "edge-run models build minilm-l6"
    with pytest.raises(ModelNotFoundError, match="no encoder is named 'minilm'") as failure:
        SentenceEncoder("minilm")
    assert "minilm-l6" in failure.value.hint
    with pytest.raises(ModelNotFoundError):
        SentenceEncoder("")


@pytest.mark.parametrize("library", ["onnxruntime", "tokenizers"])
def test_without_a_library(built: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EdgeError, match=f"encoding sentences needs {library}") as failure:
        SentenceEncoder(built)
    assert failure.value.hint == "pip install 'edge-runtime[semantic]'"


def test_nothing_is_imported_before_it_is_used() -> None:
    script = (
        "import sys, edge_runtime.encoder, edge_runtime.encoder.build, edge_runtime.models_build_cli\n"
        "print(sorted({'onnx', 'onnxruntime', 'tokenizers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
