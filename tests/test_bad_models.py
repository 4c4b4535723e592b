"""Files that are no models: each gives an error that says so, and none a crash."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from edge_runtime.errors import EdgeError, ModelNotFoundError, ModelUnreadableError, UnsupportedModelError
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.memory import machine_memory
from edge_runtime.resolve import checked_header

from .conftest import TinyMaker


def write_header_only(path: Path, architecture: str, *, rows: int = 0, n_layer: int = 2, n_embd: int = 32) -> Path:
    """A GGUF with metadata and, with `rows`, one tensor whose data is a hole in the file."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_head_count(4)
    if rows:
        size = rows * 1024 * 4
        writer.add_tensor_info("token_embd.weight", [rows, 1024], "float32", size, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if rows:
        writer.write_ti_data_to_file()
    writer.close()
    if rows:
        os.truncate(path, path.stat().st_size + rows * 1024 * 4 + 64)
    return path


def error_of(path: Path) -> EdgeError:
    with pytest.raises(EdgeError) as failure:
        checked_header(str(path))
    assert failure.value.hint
    assert failure.value.exit_code == 1
    return failure.value


def test_no_such_file(tmp_path: Path) -> None:
    assert isinstance(error_of(tmp_path / "none.gguf"), ModelNotFoundError)


def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in error_of(tmp_path).message


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"GG", "not a GGUF"), (b"PK\x03\x04zip", "not a GGUF")]
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert words in error_of(path).message


def test_a_file_cut_anywhere(tmp_path: Path, tiny_path: TinyMaker) -> None:
    whole = tiny_path("llama", tokenizer=True).read_bytes()
    draw = random.Random(0)
    cuts = [draw.randrange(4, 20_000) for _ in range(15)] + [draw.randrange(20_000, len(whole)) for _ in range(15)]
    for cut in [*cuts, len(whole) - 1]:
        path = tmp_path / f"cut-{cut}.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelUnreadableError, match="cut short"):
            Runtime(RunOptions(model=str(path)))


def test_an_architecture_without_slices(tmp_path: Path) -> None:
    error = error_of(write_header_only(tmp_path / "m.gguf", "bert", rows=32))
    assert isinstance(error, UnsupportedModelError)
    assert "'bert'" in error.message
    assert "llama" in error.hint


def test_a_vocabulary_without_weights(tmp_path: Path) -> None:
    error = error_of(write_header_only(tmp_path / "m.gguf", "llama"))
    assert isinstance(error, UnsupportedModelError)
    assert "vocabulary only" in error.message


@pytest.mark.parametrize("shape", [{"n_layer": 0}, {"n_embd": 0}])
def test_a_header_that_makes_no_sense(tmp_path: Path, shape: dict[str, int]) -> None:
    error = error_of(write_header_only(tmp_path / "m.gguf", "llama", rows=32, **shape))
    assert isinstance(error, ModelUnreadableError)


def test_a_model_larger_than_memory_is_refused_at_once(tmp_path: Path) -> None:
    rows = machine_memory().total * 2 // 4096
    path = write_header_only(tmp_path / "m.gguf", "llama", rows=rows)
    with pytest.raises(EdgeError, match="this machine has") as failure:
        Runtime(RunOptions(model=str(path)))
    assert "smaller model" in failure.value.hint


def test_tensors_that_are_not_the_models(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "m.gguf", "llama", rows=32)
    with pytest.raises(ModelUnreadableError, match="cannot be loaded"):
        Runtime(RunOptions(model=str(path)))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, tiny_path: TinyMaker) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    assert "cannot be read" in error_of(path).message
