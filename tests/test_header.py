"""What a GGUF file says of itself, read before anything is loaded; and every file that is none."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.bench.gguf_maker import tiny
from edge_runtime.errors import ModelNotFoundError, ModelUnreadableError, UnsupportedModelError
from edge_runtime.native import Model, load, read_header

from .conftest import TinyMaker
from .raw_gguf import BOOL, I32, TEXT, U64, RawModel

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field(tiny_path: TinyMaker, architecture: str) -> None:
    tokenizer = architecture != "phi3"  # which wants a vocabulary of its own
    path, shape = tiny_path(architecture, tokenizer=tokenizer), tiny(architecture)
    header = read_header(str(path))
    assert header.path == str(path)
    assert header.architecture == architecture
    assert header.name == f"random {architecture}"
    assert (header.n_layer, header.n_embd, header.n_ctx_train) == (shape.n_layer, shape.n_embd, shape.n_ctx_train)
    assert (header.n_head_kv, header.key_length, header.value_length) == (shape.n_head_kv, 16, 16)
    assert header.n_vocab == (shape.n_vocab if tokenizer else 0)
    assert header.file_bytes == path.stat().st_size
    with Model(str(path)) as model:
        assert (header.n_layer, header.n_embd) == (model.n_layer, model.n_embd)
        assert header.tensor_bytes == model.bytes_loaded
    assert header.n_tensors == len(RawModel(path).tensors)


def test_the_architectures_are_those_of_the_library() -> None:
    assert set(load().supported_architectures) == set(ARCHITECTURES)


def test_quantised_weights_are_counted_at_their_size(tiny_path: TinyMaker) -> None:
    sizes = [read_header(str(tiny_path("llama", weights=w))).tensor_bytes for w in ("F32", "F16", "Q8_0", "Q4_0")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@pytest.fixture
def raw(tiny_path: TinyMaker) -> RawModel:
    return RawModel(tiny_path("llama"))


def test_what_a_file_leaves_out_has_llama_cpps_default(raw: RawModel, tmp_path: Path) -> None:
    before = read_header(str(raw.write(tmp_path / "a.gguf")))
    for key in ("%.attention.key_length", "%.attention.value_length", "%.attention.head_count_kv", "general.name"):
        raw.drop(key)
    after = read_header(str(raw.write(tmp_path / "b.gguf")))
    expected = replace(before, path=after.path, file_bytes=after.file_bytes, n_head_kv=4, name="")
    assert after == expected
    assert (after.key_length, after.n_vocab) == (16, 0)


def test_of_values_per_layer_the_largest_counts(raw: RawModel, tmp_path: Path) -> None:
    raw.set_array("%.attention.head_count", [4, 4, 8, 4, 4, 4, 4])
    raw.set_array("%.attention.head_count_kv", [2, 4, 4, 1, 2, 2, 2], I32)
    for side in ("key", "value"):
        raw.drop(f"%.attention.{side}_length")
    header = read_header(str(raw.write(tmp_path / "m.gguf")))
    assert header.n_head_kv == 4
    assert (header.key_length, header.value_length) == (16, 16)  # of the first layer's heads


@pytest.mark.parametrize("kind", [TEXT, U64, BOOL])
def test_a_value_of_another_type_reads_as_missing(raw: RawModel, tmp_path: Path, kind: int) -> None:
    raw.set("%.context_length", "many" if kind == TEXT else 1, kind)
    assert read_header(str(raw.write(tmp_path / "m.gguf"))).n_ctx_train == 0


def test_an_architecture_that_cannot_be_sliced_can_be_read_of(raw: RawModel, tmp_path: Path) -> None:
    raw.set("general.architecture", "mamba", TEXT)
    path = str(raw.write(tmp_path / "m.gguf"))
    assert read_header(path).architecture == "mamba"
    with pytest.raises(UnsupportedModelError, match="'mamba'") as failure:
        Model(path)
    assert "llama, qwen2" in failure.value.hint


def test_a_name_of_no_utf8_is_read_as_far_as_it_goes(raw: RawModel, tmp_path: Path) -> None:
    raw.set("general.name", b"caf\xe9", TEXT)
    assert read_header(str(raw.write(tmp_path / "m.gguf"))).name == "caf�"


# ── files that are no models ────────────────────────────────────────────────────────────────────────────────────────


def refused(path: Path | str) -> str:
    with pytest.raises(ModelUnreadableError) as failure:
        read_header(str(path))
    assert failure.value.hint
    assert str(path) in failure.value.message
    return failure.value.message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        read_header(str(tmp_path / "none.gguf"))


def test_a_folder(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in refused(tmp_path / "pipe")
    assert "is a device or a pipe" in refused(os.devnull)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"G", "is not a GGUF file"),
        (b"GGML\x03\0\0\0", "is not a GGUF file (it starts with b'GGML')"),
        (b"GGUF", "is cut short or damaged"),
        (b"GGUF" + b"\xff" * 64, "is cut short or damaged"),
        (b"GGUF\3\0\0\0" + b"\0" * 16, "does not name its architecture"),
        (b"GGUF\3\0\0\0" + b"\0" * 8 + b"\xff" * 7 + b"\x0f", "is cut short or damaged"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert words in refused(path)


@pytest.mark.parametrize(("version", "words"), [(1, "GGUFv1"), (0, "bad GGUF version"), (9, "is version 9")])
def test_other_versions_are_named(raw: RawModel, tmp_path: Path, version: int, words: str) -> None:
    raw.version = version
    assert words in refused(raw.write(tmp_path / "m.gguf"))


def test_a_file_cut_short_says_how_much_is_missing(raw: RawModel, tmp_path: Path) -> None:
    path = raw.write(tmp_path / "m.gguf")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"its tensors need {size} bytes, the file has {size - 1}" in refused(path)


def test_a_file_cut_in_its_header(raw: RawModel, tmp_path: Path) -> None:
    whole = raw.write(tmp_path / "m.gguf").read_bytes()
    for length in [*range(4, 400, 7), *range(400, 4000, 301)]:
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(whole[:length])
        assert "is cut short or damaged" in refused(path)


def test_without_tensors_it_is_a_vocabulary(raw: RawModel, tmp_path: Path) -> None:
    raw.tensors.clear()
    with pytest.raises(UnsupportedModelError, match="holds a vocabulary only"):
        read_header(str(raw.write(tmp_path / "m.gguf")))


def test_without_architecture_there_is_no_header(raw: RawModel, tmp_path: Path) -> None:
    raw.set("general.architecture", 7)
    assert "does not name its architecture" in refused(raw.write(tmp_path / "m.gguf"))


def test_a_damaged_header_gives_the_parsers_reason(raw: RawModel, tmp_path: Path) -> None:
    raw.tensors["output.weight"].kind = 99
    assert "tensor 'output.weight' has invalid ggml type 99" in refused(raw.write(tmp_path / "m.gguf"))
