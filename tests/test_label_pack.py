"""A pack comes back as it was saved; anything else in its place is refused in words, whatever is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from edge_runtime.errors import EdgeError, PackError
from edge_runtime.identity import ModelIdentity, identify
from edge_runtime.labels import pack as pack_module
from edge_runtime.labels.drift import Reference
from edge_runtime.labels.fit import Linear
from edge_runtime.labels.novelty import StateNovelty, WordNovelty
from edge_runtime.labels.pack import MAX_BYTES, LabelPack, NgramStage, quantise
from edge_runtime.labels.stack import Probe

from .conftest import TinyMaker

ROOT = Path(__file__).parent.parent
N_EMBD, N_LABELS = 16, 3
MODEL = ModelIdentity("ab" * 32, "m.gguf", "some model", "llama", 5, N_EMBD, 123_456_789)


def random_floats(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def make_pack(bits: int = 10, seed: int = 0, probes: int = 2, **changes: Any) -> LabelPack:
    random = np.random.default_rng(seed)
    pools = (("mean",), ("mean", "last"), ("max",))
    made = tuple(
        Probe(
            i + 1,
            pools[i],
            Linear(
                random_floats(random, N_LABELS, len(pools[i]) * N_EMBD + (i + 1) * N_LABELS),
                random_floats(random, N_LABELS),
            ),
            1.5 + i,
        )
        for i in range(probes)
    )
    weights = random.integers(-127, 128, (N_LABELS, 2**bits)).astype(np.int8)
    states = StateNovelty(
        random_floats(random, N_EMBD),
        random_floats(random, 4, N_EMBD),
        np.abs(random_floats(random, 5)),
        -0.5,
        0.25,
        0.1,
        3.5,
    )
    fields: dict[str, Any] = {
        "name": "test",
        "labels": ("ok", "spam", "größer 😀"),
        "instruction": "<|turn|>user\nWhich?\nMessage: \ud800",
        "max_tokens": 99,
        "model": MODEL,
        "ngrams": NgramStage(
            bits, weights, np.abs(random_floats(random, N_LABELS)), random_floats(random, N_LABELS), 2.5
        ),
        "probes": made,
        "weights": np.float32([1, 2.5, 0.5]),
        "thresholds": random.random((probes + 1, N_LABELS)).astype(np.float32),
        "unsure_below": 0.4,
        "words": WordNovelty(random.integers(0, 256, 64).astype(np.uint8), 0.3),
        "states": states if probes else None,
        "references": {"stage 0 confidence": Reference(np.float32([0.5, 0.9]), np.float32([0.1, 0.7]), 321)},
        "report": {"accuracy": 0.93, "labels": ["a", {"b": None}], "text": "naïve"},
    }
    return LabelPack(**{**fields, **changes})


def plain(value: Any) -> Any:
    """All of a pack as lists and numbers, with the types of its arrays."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_pack().save(tmp_path / "p.gguf")
    return tmp_path / "p.gguf"


# ── round trip ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("probes", [0, 1, 3])
def test_a_pack_comes_back_as_it_was_saved(tmp_path: Path, probes: int) -> None:
    pack = make_pack(probes=probes)
    size = pack.save(tmp_path / "p.gguf")
    assert size == (tmp_path / "p.gguf").stat().st_size
    assert os.listdir(tmp_path) == ["p.gguf"]
    loaded = LabelPack.load(str(tmp_path / "p.gguf"))
    assert plain(loaded) == plain(pack)
    assert loaded.layers == (0, 1, 2, 3)[: probes + 1]
    texts = ["one", "", "two 😀"]
    assert (loaded.ngrams.scores(texts) == pack.ngrams.scores(texts)).all()


def test_saving_twice_gives_the_same_file(tmp_path: Path) -> None:
    make_pack().save(tmp_path / "a.gguf")
    LabelPack.load(tmp_path / "a.gguf").save(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_threshold_that_is_never_reached_stays_so(tmp_path: Path) -> None:
    thresholds = np.float32([[math.inf, 0.9, 1.0], [math.inf] * 3, [0] * 3])
    make_pack(thresholds=thresholds).save(tmp_path / "p.gguf")
    loaded = LabelPack.load(tmp_path / "p.gguf").thresholds
    assert (loaded[thresholds == math.inf] > 1).all()
    assert (loaded[thresholds < 2] == thresholds[thresholds < 2]).all()


def test_other_readers_of_gguf_can_read_it(saved: Path) -> None:
    reader = GGUFReader(saved)
    assert reader.fields["general.architecture"].contents() == "edge-labels"
    assert json.loads(reader.fields["edge.labels.manifest"].contents())["labels"][0] == "ok"
    shapes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
    assert shapes["ngrams.weights"] == (N_LABELS, 2**10)
    assert all(np.isfinite(tensor.data).all() for tensor in reader.tensors)


def test_weights_are_rounded_to_8_bits_per_label() -> None:
    random = np.random.default_rng(0)
    weights = random_floats(random, 3, 64) * np.float32([[1], [100], [0]])
    stage = quantise(Linear(weights, np.float32([1, 2, 3])), 6, 1.5)
    assert stage.weights.dtype == np.int8
    assert np.abs(stage.weights).max(axis=1).tolist() == [127, 127, 0]
    error = np.abs(stage.weights * stage.scale[:, None] - weights)
    assert (error.max(axis=1) <= stage.scale * 0.501).all()
    assert (stage.bits, stage.bias.tolist(), stage.temperature) == (6, [1, 2, 3], 1.5)
    assert stage.probabilities(np.float32([[3, 0, 0]]))[0, 0] == pytest.approx(math.e**2 / (math.e**2 + 2))


# ── damaged ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def outcome_of(path: Path, whole: str) -> str:
    """'equal', 'different', 'refused: …' or what else came of loading a pack; `whole` is `repr(plain(pack))`."""
    try:
        return "equal" if repr(plain(LabelPack.load(path))) == whole else "different"
    except PackError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def damaged(data: bytes) -> list[tuple[str, bytes]]:
    """Cut at many lengths, with bytes changed anywhere, and with bytes changed in the header, where it hurts most."""
    random = np.random.default_rng(0)
    header = data.index(b"states.variances") + 64
    used = len(data.rstrip(b"\0"))  # what follows is padding
    lengths = sorted({*range(0, 64, 5), *random.integers(0, used, 60).tolist(), used - 1})
    cases = [(f"cut at {n}", data[:n]) for n in lengths]
    for seed in range(450):
        random = np.random.default_rng(seed)
        end = header if seed % 3 else len(data)
        changed = bytearray(data)
        for place in random.integers(0, end, random.choice([1, 1, 2, 8])):
            changed[place] = random.choice([0, 1, 0x7F, 0xFF, changed[place] ^ 1 << random.integers(8), 26])
        cases.append((f"flipped {seed}", bytes(changed)))
    return cases


def run_all(folder: Path) -> dict[str, str]:
    """Outcome by case, of all cases."""
    path = folder / "whole.gguf"
    make_pack(bits=6).save(path)
    data, case = path.read_bytes(), folder / "case.gguf"
    whole = repr(plain(LabelPack.load(path)))
    outcomes = {}
    for name, content in damaged(data):
        case.write_bytes(content)
        outcomes[name] = outcome_of(case, whole)
        print(name, outcomes[name][:40], file=sys.stderr, flush=True)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of all cases, from a process of their own, so that a crash is seen as one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_label_pack", str(tmp_path_factory.mktemp("damaged"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_a_truncated_pack_is_refused_at_every_length(outcomes: dict[str, str]) -> None:
    cut = {case: text for case, text in outcomes.items() if case.startswith("cut")}
    assert len(cut) > 60
    assert not {case: text for case, text in cut.items() if not text.startswith("refused: ")}


def test_flipped_bytes_are_refused_or_change_nothing(outcomes: dict[str, str]) -> None:
    flipped = {case: text for case, text in outcomes.items() if case.startswith("flipped")}
    assert len(flipped) == 450
    assert not {case: text for case, text in flipped.items() if not text.startswith(("refused: ", "equal"))}
    assert sum(text.startswith("refused: ") for text in flipped.values()) > 300
    assert "equal" in flipped.values()


def test_every_refusal_has_a_hint(outcomes: dict[str, str]) -> None:
    assert not [text for text in outcomes.values() if text.startswith("refused: ") and "\nhint: " not in text]


def test_a_flipped_bit_in_any_tensor_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    tensors = GGUFReader(saved).tensors
    assert len(tensors) == 15
    for tensor in tensors:
        place = int(tensor.data_offset) + int(tensor.n_bytes) // 2
        saved.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(PackError, match="checksum is wrong"):
            LabelPack.load(saved)


def test_a_tensor_of_another_type_is_noticed(saved: Path) -> None:
    """F32 read as I32 has the same bytes, and means something else."""
    data = saved.read_bytes()
    place = data.index(b"probe.0.weights") + len("probe.0.weights")
    (n_dims,) = struct.unpack_from("<I", data, place)
    place += 4 + 8 * n_dims
    assert struct.unpack_from("<I", data, place) == (0,)
    saved.write_bytes(data[:place] + struct.pack("<I", 26) + data[place + 4 :])
    with pytest.raises(PackError):
        LabelPack.load(saved)


def rewritten(source: Path, target: Path, *, manifest: Any = None, drop: str = "", checksum: bool = True) -> Path:
    """A copy of a pack with a manifest of other content, or without a tensor, and its checksum made right again."""
    reader = GGUFReader(source)
    text = reader.fields["edge.labels.manifest"].contents()
    if manifest is not None:
        text = json.dumps(manifest(json.loads(text)))
    arrays = {t.name: np.array(t.data) for t in reader.tensors if t.name != drop}
    writer = GGUFWriter(target, "edge-labels")
    writer.add_string("edge.labels.manifest", text)
    if checksum:
        writer.add_string("edge.labels.crc32", str(pack_module._checksum(text, arrays)))
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_pack_of_another_version_says_so(saved: Path, tmp_path: Path) -> None:
    later = rewritten(saved, tmp_path / "later.gguf", manifest=lambda m: {**m, "version": 99})
    with pytest.raises(PackError, match="is of format 99, this reads") as failure:
        LabelPack.load(later)
    assert "update" in failure.value.hint
    with pytest.raises(PackError, match="is of format 0, this reads") as failure:
        LabelPack.load(rewritten(saved, tmp_path / "old.gguf", manifest=lambda m: {**m, "version": 0}))
    assert "train" in failure.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [],
        lambda m: {},
        lambda m: {**m, "version": "1"},
        lambda m: {**m, "labels": m["labels"] + ["more"]},
        lambda m: {**m, "labels": 7},
        lambda m: {**m, "model": {**m["model"], "n_embd": 17}},
        lambda m: {**m, "model": {}},
        lambda m: {**m, "probes": m["probes"][:1]},
        lambda m: {**m, "probes": [*m["probes"], m["probes"][0]]},
        lambda m: {**m, "probes": [{}]},
        lambda m: {**m, "ngrams": {**m["ngrams"], "bits": 9}},
        lambda m: {**m, "ngrams": {**m["ngrams"], "bits": -1}},
        lambda m: {**m, "references": ["unknown"]},
        lambda m: {**m, "states": {"length_slope": 1}},
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_though_its_checksum_is_right(
    saved: Path, tmp_path: Path, change: Any
) -> None:
    with pytest.raises(PackError, match="damaged"):
        LabelPack.load(rewritten(saved, tmp_path / "changed.gguf", manifest=change))


@pytest.mark.parametrize("name", ["ngrams.weights", "probe.1.bias", "thresholds", "words.table", "states.mean"])
def test_a_pack_without_one_of_its_tensors_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(PackError, match=f"damaged: .*{name}"):
        LabelPack.load(rewritten(saved, tmp_path / "less.gguf", drop=name))


def test_a_pack_without_a_checksum_is_refused(saved: Path, tmp_path: Path) -> None:
    assert plain(LabelPack.load(rewritten(saved, tmp_path / "same.gguf"))) == plain(make_pack())
    with pytest.raises(PackError, match="checksum"):
        LabelPack.load(rewritten(saved, tmp_path / "less.gguf", checksum=False))


# ── no pack ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_is_no_pack(tiny_path: TinyMaker) -> None:
    with pytest.raises(PackError, match="no label pack but a GGUF of architecture 'llama'"):
        LabelPack.load(tiny_path("llama", n_layer=1))


def test_what_is_no_file_or_no_gguf_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("label,text\nok,hello\n")
    (tmp_path / "magic.gguf").write_bytes(b"GGUF")
    (tmp_path / "large.gguf").write_bytes(b"GGUF" + bytes(2 * MAX_BYTES))
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (
        ("none.gguf", "there is no file"),
        ("", "is a directory"),
        ("empty.gguf", "is empty"),
        ("text.gguf", "is not a GGUF file"),
        ("magic.gguf", "cut short or damaged"),
        ("large.gguf", "larger than any"),
        ("pipe.gguf", "a pipe"),
        ("empty.gguf/below", "there is no file"),
        ("a\0b", "there is no file"),
    ):
        with pytest.raises(PackError, match=words) as failure:
            LabelPack.load(tmp_path / name)
        assert failure.value.hint, name
        assert "model file" not in str(failure.value), name


def test_a_name_longer_than_names_can_be_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(PackError):
        LabelPack.load(tmp_path / ("n" * 300))


# ── saving fails ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pack_over_the_limit_is_not_written_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"would have \d,\d{3},\d{3} bytes, 2,097,152 are allowed"):
        make_pack(bits=20).save(tmp_path / "p.gguf")
    assert os.listdir(tmp_path) == []


def test_an_old_pack_outlives_a_failed_save(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(PackError):
        make_pack(bits=20).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "p.gguf", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(PackError, match="cannot be written: ") as failure:
            make_pack().save(path)
        assert "--out" in failure.value.hint
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PackError, match="No space left on device"):
            make_pack().save(tmp_path / "p.gguf")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(PackError, match="No space left on device"):
        make_pack().save(tmp_path / "p.gguf")
    assert os.listdir(tmp_path) == []


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "qwen2"}, "this is another model:"),
        ({"n_layer": 6}, "this is another model:"),
        ({"n_embd": 32}, "this is another model:"),
        ({"n_embd": 32, "file_bytes": 1}, "this is another model:"),
        ({"file_bytes": 99}, "another quantisation or fine-tune of the model"),
        ({}, "only the weights differ"),
    ],
)
def test_another_model_is_refused_with_the_kind_of_difference(change: dict[str, Any], words: str) -> None:
    other = dataclasses.replace(MODEL, sha256="cd" * 32, file="other.gguf", **change)
    with pytest.raises(PackError, match=words) as failure:
        make_pack().check_model(other)
    assert "some model (m.gguf, llama, 5 layers, 118 MiB)" in failure.value.message
    assert "other.gguf" in failure.value.message
    assert "--model" in failure.value.hint


def test_the_same_file_under_another_name_will_do() -> None:
    make_pack().check_model(dataclasses.replace(MODEL, file="renamed.gguf", name=""))


def test_identities_of_files(tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    path = tiny_path("llama", n_layer=2)
    found = identify(path)
    assert (found.file, found.name, found.architecture) == (path.name, "random llama", "llama")
    assert (found.n_layer, found.n_embd, found.file_bytes) == (2, 64, path.stat().st_size)
    pack = make_pack(model=found)
    pack.check_model(identify(path))
    for other, words in (
        (tiny_path("llama", n_layer=3), "this is another model:"),
        (tiny_path("llama", n_layer=2, weights="Q8_0"), "another quantisation"),
    ):
        with pytest.raises(PackError, match=words):
            pack.check_model(identify(other))
    with pytest.raises(EdgeError, match="there is no file"):
        identify(tmp_path / "none.gguf")


if __name__ == "__main__":
    json.dump(run_all(Path(sys.argv[1])), sys.stdout)
