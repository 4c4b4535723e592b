"""An exit pack comes back as it was saved; anything else is refused in words, whatever is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from edge_runtime.bench.gguf_maker import tiny, write_random_model
from edge_runtime.errors import BoundaryError, EdgeError, PackError
from edge_runtime.exits import pack as pack_module
from edge_runtime.exits import packs as packs_module
from edge_runtime.exits import strict_json
from edge_runtime.exits.gate import Gate
from edge_runtime.exits.pack import ExitPack, this_library
from edge_runtime.exits.packed_head import PackedHead
from edge_runtime.exits.packs import bundled_exit_packs, find_exit_pack
from edge_runtime.exits.quantised import Quantised, quantise
from edge_runtime.identity import ModelIdentity
from edge_runtime.labels import packs as label_packs
from edge_runtime.labels.pack import LabelPack
from edge_runtime.native import read_tensors
from edge_runtime.native.tensors import read_texts

from .conftest import TinyMaker
from .exit_fakes import random_pack

ROOT = Path(__file__).parent.parent
INF, NAN = math.inf, math.nan


def plain(value: Any) -> Any:
    """All of a pack as lists and numbers, with the types of its arrays; NaN equal to itself."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value)}
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else repr(value)


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", n_layer=5)


@pytest.fixture(scope="module")
def pack(model_path: Path) -> ExitPack:
    return random_pack(model_path)


@pytest.fixture
def saved(pack: ExitPack, tmp_path: Path) -> Path:
    pack.save(tmp_path / "p.gguf")
    return tmp_path / "p.gguf"


# ── round trip ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q8_0", "F16"])
def test_a_pack_comes_back_as_it_was_saved(model_path: Path, tmp_path: Path, quantisation: str) -> None:
    pack = random_pack(model_path, (1, 2, 4), 40, 3, quantisation=quantisation, verify_thresholds=(0.0, 2.5, INF))
    size = pack.save(tmp_path / "p.gguf")
    assert size == (tmp_path / "p.gguf").stat().st_size
    assert os.listdir(tmp_path) == ["p.gguf"]
    loaded = ExitPack.load(str(tmp_path / "p.gguf"))
    assert plain(loaded) == plain(pack)
    assert math.isnan(loaded.report["agreement"][1])
    assert loaded.report["limit"] == INF
    assert loaded.rungs[0].certificate["risk"] is None
    assert loaded.digest == pack.digest
    kinds = {found.kind for head in loaded.heads for found in head.tensors.values() if isinstance(found, Quantised)}
    assert kinds == {quantisation}


def test_a_width_that_fills_no_blocks_stays_f16(tiny_path: TinyMaker, tmp_path: Path) -> None:
    path = tiny_path("llama", n_layer=3, n_embd=48)
    pack = random_pack(path, (1,), 9)
    pack.save(tmp_path / "p.gguf")
    loaded = ExitPack.load(tmp_path / "p.gguf")
    assert plain(loaded) == plain(pack)
    kinds = {name: found.kind for name, found in loaded.heads[0].tensors.items() if isinstance(found, Quantised)}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_saving_twice_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    ExitPack.load(saved).save(tmp_path / "b.gguf")
    assert saved.read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_folder_that_is_missing_is_made(pack: ExitPack, tmp_path: Path) -> None:
    pack.save(tmp_path / "new" / "folder" / "p.gguf")
    assert ExitPack.load(tmp_path / "new" / "folder" / "p.gguf").name == "random"


def test_other_readers_of_gguf_see_quantised_matrices(saved: Path) -> None:
    reader = GGUFReader(saved)
    assert reader.fields["general.architecture"].contents() == "edge-exits"
    manifest = json.loads(reader.fields["edge.exits.manifest"].contents(), parse_constant=pytest.fail)
    assert manifest["boundaries"] == [2, 4]
    assert manifest["library"] == this_library()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrix = tensors["head.2.blk.0.ffn_gate.weight"]
    assert matrix.tensor_type is GGMLQuantizationType.Q8_0
    assert matrix.shape.tolist() == [64, 192]
    assert tensors["head.4.projection"].tensor_type is GGMLQuantizationType.F16
    assert tensors["head.4.other"].tensor_type is GGMLQuantizationType.F32
    assert tensors["shortlist"].tensor_type is GGMLQuantizationType.I32


def test_the_digest_is_of_all_that_is_in_a_pack(pack: ExitPack, model_path: Path) -> None:
    others = [
        random_pack(model_path, seed=1),
        dataclasses.replace(pack, report={}),
        dataclasses.replace(pack, verify_thresholds=(1.0, 2.0)),
        dataclasses.replace(pack, cluster_starts=np.zeros(1, np.int32)),
    ]
    assert len({pack.digest, *(other.digest for other in others)}) == 5
    assert random_pack(model_path).digest == pack.digest


def test_quantised_matrices_stand_for_about_the_same_numbers() -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for kind, error in (("F16", 0.002), ("Q8_0", 0.02), ("Q4_0", 0.4)):
        found = quantise(matrix, kind)
        assert found.shape == (8, 64)
        assert found.is_finite
        assert np.abs(found.floats - matrix).max() < error
    assert np.abs(quantise(matrix, "Q4_0").floats - matrix).max() > 0.05


def test_weights_of_a_packed_head_pack_to_themselves(pack: ExitPack) -> None:
    head = pack.heads[0]
    again = PackedHead.of(head.weights, "Q8_0")
    assert plain(again.weights) == plain(head.weights)


# ── strict JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_that_json_lacks_come_back() -> None:
    value = {"a": [NAN, INF, -INF, 1.5], "b": {"float": "text"}, "c": {"float": 1}, "d": ("x", np.float32(0.5))}
    text = strict_json.dumps(
        {
            **value,
            "e": np.array([1, 2]),
            "f": np.float64("inf"),
            "g": np.bool_(True),
            7: None,
            "h": {"float": "nan", "x": 1},
        }
    )
    assert "NaN" not in text
    assert "Infinity" not in text
    found = strict_json.loads(text)
    assert math.isnan(found["a"][0])
    assert found["a"][1:] == [INF, -INF, 1.5]
    assert (found["b"], found["c"], found["d"]) == ({"float": "text"}, {"float": 1}, ["x", 0.5])
    assert (found["e"], found["f"], found["g"], found["7"]) == ([1, 2], INF, True, None)
    assert found["h"] == {"float": "nan", "x": 1}


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "[" * 100_000, "", "{", "[1,]"])
def test_what_is_no_strict_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (json's own words)
        strict_json.loads(text)


# ── damaged ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def outcome_of(path: Path, whole: str) -> str:
    """'equal', 'different', 'refused: …' or what else came of loading a pack; `whole` is `repr(plain(pack))`."""
    try:
        return "equal" if repr(plain(ExitPack.load(path))) == whole else "different"
    except PackError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def damaged(data: bytes) -> list[tuple[str, bytes]]:
    """Cut at many lengths, with bytes changed anywhere, and with bytes changed in the header, where it hurts most."""
    random = np.random.default_rng(0)
    header = data.index(b"head.1.projection") + 64
    used = len(data.rstrip(b"\0"))  # what follows is padding
    lengths = sorted({*range(0, 64, 7), *random.integers(0, used, 30).tolist(), used - 1})
    cases = [(f"cut at {n}", data[:n]) for n in lengths]
    for seed in range(240):
        random = np.random.default_rng(seed)
        end = header if seed % 3 else len(data)
        changed = bytearray(data)
        for place in random.integers(0, end, random.choice([1, 1, 2, 8])):
            changed[place] = random.choice([0, 1, 0x7F, 0xFF, changed[place] ^ 1 << random.integers(8), 8, 26])
        cases.append((f"flipped {seed}", bytes(changed)))
    return cases


def run_all(folder: Path) -> dict[str, str]:
    """Outcome by case, of all cases."""
    model = write_random_model(folder / "model.gguf", tiny("llama", n_layer=2, n_embd=32, n_head=1, n_head_kv=1))
    path, case = folder / "whole.gguf", folder / "case.gguf"
    random_pack(model, (1,), 9).save(path)
    data = path.read_bytes()
    whole = repr(plain(ExitPack.load(path)))
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
        [sys.executable, "-m", "tests.test_exit_pack", str(tmp_path_factory.mktemp("damaged"))],
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
    assert len(cut) > 30
    assert not {case: text for case, text in cut.items() if not text.startswith("refused: ")}


def test_flipped_bytes_are_refused_or_change_nothing(outcomes: dict[str, str]) -> None:
    flipped = {case: text for case, text in outcomes.items() if case.startswith("flipped")}
    assert len(flipped) == 240
    assert not {case: text for case, text in flipped.items() if not text.startswith(("refused: ", "equal"))}
    assert sum(text.startswith("refused: ") for text in flipped.values()) > 150


def test_every_refusal_has_a_hint(outcomes: dict[str, str]) -> None:
    assert not [text for text in outcomes.values() if text.startswith("refused: ") and "\nhint: " not in text]


def test_a_flipped_bit_in_any_tensor_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    tensors = GGUFReader(saved).tensors
    assert len(tensors) == 2 + 2 * 13
    for tensor in tensors:
        place = int(tensor.data_offset) + int(tensor.n_bytes) // 2
        saved.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(PackError, match="checksum is wrong"):
            ExitPack.load(saved)


def test_a_tensor_of_another_type_is_noticed(saved: Path) -> None:
    """I32 read as F32 has the same bytes, and means something else."""
    data = saved.read_bytes()
    place = data.index(b"cluster_starts") + len("cluster_starts")
    (n_dims,) = struct.unpack_from("<I", data, place)
    place += 4 + 8 * n_dims
    assert struct.unpack_from("<I", data, place) == (26,)
    saved.write_bytes(data[:place] + struct.pack("<I", 0) + data[place + 4 :])
    with pytest.raises(PackError, match="checksum is wrong"):
        ExitPack.load(saved)


def test_a_tensor_behind_the_end_of_the_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-4096])
    with pytest.raises(EdgeError, match=r"tensor head\.4\.projection ends behind it"):
        read_tensors(str(saved), ())


# ── a right checksum over wrong content ─────────────────────────────────────────────────────────────────────────────

Change = Callable[[dict[str, Any]], Any]


def rewritten(
    source: Path, target: Path, *, manifest: Change | None = None, arrays: Change | None = None, checksum: bool = True
) -> Path:
    """A copy of a pack with other content, and its checksum made right again; `arrays` changes name → (array, type)."""
    reader = GGUFReader(source)
    text = reader.fields["edge.exits.manifest"].contents()
    if manifest is not None:
        text = json.dumps(manifest(json.loads(text)))
    found: dict[str, Any] = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    if arrays is not None:
        arrays(found)
    writer = GGUFWriter(target, "edge-exits")
    writer.add_string("edge.exits.manifest", text)
    if checksum:
        crc = pack_module._checksum(text, {name: array for name, (array, _) in found.items()})
        writer.add_string("edge.exits.crc32", str(crc))
    for name, (array, kind) in found.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_pack_without_a_checksum_is_refused(pack: ExitPack, saved: Path, tmp_path: Path) -> None:
    assert plain(ExitPack.load(rewritten(saved, tmp_path / "same.gguf"))) == plain(pack)
    with pytest.raises(PackError, match="checksum"):
        ExitPack.load(rewritten(saved, tmp_path / "less.gguf", checksum=False))


def test_a_pack_of_another_version_says_so(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is of format 99, this reads 1") as failure:
        ExitPack.load(rewritten(saved, tmp_path / "later.gguf", manifest=lambda m: {**m, "version": 99}))
    assert "update" in failure.value.hint
    with pytest.raises(PackError, match="is of format 0, this reads 1") as failure:
        ExitPack.load(rewritten(saved, tmp_path / "old.gguf", manifest=lambda m: {**m, "version": 0}))
    assert "calibrate" in failure.value.hint


def with_item(key: str, **changes: Any) -> Change:
    """A manifest whose first item of a list has other values."""
    return lambda m: {**m, key: [{**m[key][0], **changes}, *m[key][1:]]}


def with_shape(**changes: Any) -> Change:
    def change(m: dict[str, Any]) -> dict[str, Any]:
        m["heads"][0]["shape"].update(changes)
        return m

    return change


def with_model(**changes: Any) -> Change:
    return lambda m: {**m, "model": {**m["model"], **changes}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: [], ""),
        (lambda m: {}, ""),
        (lambda m: {**m, "version": "1"}, ""),
        (lambda m: {**m, "name": 7}, "its name is 7"),
        (lambda m: {**m, "name": ""}, "its name is ''"),
        (lambda m: {**m, "name": "a\x1b[2Jb"}, "its name is"),
        (lambda m: {**m, "name": "n" * 101}, "its name is"),
        (lambda m: {**m, "library": None}, "its build is None"),
        (lambda m: {**m, "default_signal": "luck"}, "its signal is 'luck'"),
        (lambda m: {**m, "default_signal": ["gate"]}, "its signal is"),
        (lambda m: {**m, "report": "good"}, "its report is no table"),
        (lambda m: {**m, "boundaries": []}, "2 heads for 0 boundaries"),
        (lambda m: {**m, "boundaries": [2]}, "2 heads for 1 boundaries"),
        (lambda m: {**m, "boundaries": [4, 2]}, "not in order"),
        (lambda m: {**m, "boundaries": [2, 5]}, "head.5."),
        (lambda m: {**m, "boundaries": ["2", "4"]}, "its boundaries are"),
        (lambda m: {**m, "boundaries": 7}, ""),
        (lambda m: {**m, "boundaries": [], "heads": [], "gates": [], "rungs": []}, "it has no boundaries"),
        (lambda m: {**m, "heads": [{}, {}]}, "shape"),
        (lambda m: {**m, "heads": m["heads"][:1]}, "1 heads for 2 boundaries"),
        (with_item("heads", quantisation="Q4_0"), "values, not"),
        (with_item("heads", quantisation="F16"), "of type uint8"),
        (with_item("heads", quantisation="Q5_K"), "quantised to 'Q5_K'"),
        (with_item("heads", quantisation=["Q8_0"]), "quantised to"),
        (with_shape(n_embd=32, n_head=1), "values, not"),
        (with_shape(n_embd=10**30), ""),
        (with_shape(n_ff=-192), "dimensions"),
        (with_shape(n_ff=192.0), ""),
        (with_shape(n_ff=2**62), "values, not"),
        (with_shape(n_head=0), "dimensions"),
        (with_shape(n_head=True), "no whole numbers"),
        (with_shape(n_rows=64), "has 64 rows, the shortlist asks for 65"),
        (with_shape(n_rows=2**40), "rows, the shortlist asks for 65"),
        (with_shape(rope_base={"float": "inf"}), "a constant of inf"),
        (with_shape(rope_base=1e300), "a constant of 1e"),
        (with_shape(rope_base="x"), "a constant of 'x'"),
        (with_shape(norm_epsilon=0.0), "a constant of 0"),
        (with_shape(more=1), ""),
        (with_model(sha256="AB"), "no hash"),
        (with_model(sha256=None), "no hash"),
        (with_model(file=7), "the model's file is no text"),
        (with_model(n_embd=32), "has 64 values, not"),
        (with_model(n_layer=4), "boundary 4 is outside"),
        (with_model(n_layer=True), "the model's n_layer"),
        (with_model(file_bytes=-1), "the model's file_bytes"),
        (with_model(more=1), ""),
        (lambda m: {**m, "gates": m["gates"][:1]}, "1 gates for 2 boundaries"),
        (with_item("gates", weights=[1.0]), "numbers of a gate"),
        (with_item("gates", scale=[0.0, 1.0]), "numbers of a gate"),
        (with_item("gates", bias={"float": "nan"}), "numbers of a gate"),
        (with_item("gates", names=["magic", "entropy"]), "magic"),
        (lambda m: {**m, "rungs": [{}]}, ""),
        (lambda m: {**m, "rungs": 3}, ""),
        (with_item("rungs", thresholds=[1.0]), "rung 0 has 1 thresholds for 2 boundaries"),
        (with_item("rungs", thresholds=[1.0, -1.0]), "a threshold of the rung 0 is -1"),
        (with_item("rungs", thresholds=[1.0, {"float": "nan"}]), "a threshold of the rung 0 is nan"),
        (with_item("rungs", thresholds=[1.0, "inf"]), "a threshold of the rung 0 is 'inf'"),
        (with_item("rungs", signal="luck"), "the signal of rung 0"),
        (with_item("rungs", risk="none"), "the risk of rung 0"),
        (with_item("rungs", method="none"), "the method of rung 0"),
        (with_item("rungs", bound=0), "the bound of rung 0"),
        (with_item("rungs", delta=1.5), "the delta of rung 0"),
        (with_item("rungs", certificate=[]), "the certificate of rung 0"),
        (with_item("rungs", certificate={"kind": "x"}), "does not say what it is of"),
        (with_item("rungs", certificate={"kind": 3, "n": 3}), "does not say what it is of"),
        (with_item("rungs", certificate={"kind": "x", "n": 3, "risk": "no"}), "does not say what it is of"),
        (with_item("rungs", coverage="all"), "the coverage of rung 0"),
        (with_item("rungs", prompts_needed=-1), "rung 0 needs -1 prompts"),
        (lambda m: {**m, "verify_thresholds": [1.0]}, "1 verify thresholds for 2 boundaries"),
        (lambda m: {**m, "verify_thresholds": [1.0, True]}, "a threshold of the verify thresholds is True"),
        (lambda m: {**m, "verify_thresholds": [1.0, NAN]}, "NaN is no JSON"),
        (lambda m: {**m, "verify_thresholds": [1.0, 10**400]}, ""),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_though_its_checksum_is_right(
    saved: Path, tmp_path: Path, change: Change, words: str
) -> None:
    with pytest.raises(PackError, match=f"is damaged: .*{words}") as failure:
        ExitPack.load(rewritten(saved, tmp_path / "changed.gguf", manifest=change))
    assert "calibrate" in failure.value.hint


def ids(*values: int) -> Change:
    def change(arrays: dict[str, Any]) -> None:
        array, kind = arrays["shortlist"]
        array[: len(values)] = values
        arrays["shortlist"] = array, kind

    return change


def starts(*values: int) -> Change:
    return lambda arrays: arrays.update(cluster_starts=(np.int32(values), GGMLQuantizationType.I32))


def poked(name: str, value: Any) -> Change:
    """The first bytes or number of a tensor are others."""

    def change(arrays: dict[str, Any]) -> None:
        raw = np.asarray(value).view(arrays[name][0].dtype)
        arrays[name][0].reshape(-1)[: raw.size] = raw

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("shortlist"), "shortlist"),
        (lambda a: a.pop("head.4.blk.0.attn_v.weight"), "head.4.blk.0.attn_v.weight"),
        (lambda a: a.update(shortlist=a["head.2.other"]), "shortlist is of type float32"),
        (lambda a: a.update({"head.2.projection": a["head.2.other"]}), "projection is of type float32"),
        (lambda a: a.update({"head.2.other": (a["head.2.other"][0][:32], a["head.2.other"][1])}), "32 values, not"),
        (ids(-1), "no tokens"),
        (ids(5, 5), "a token twice"),
        (starts(1, 2), "not in order"),
        (starts(0, 4, 4), "not in order"),
        (starts(0, 8, 4), "not in order"),
        (starts(0, 64), "not in order"),
        (poked("head.2.blk.0.ffn_norm.weight", np.float32([NAN])), "blk.0.ffn_norm.weight of the head of boundary 2"),
        (poked("head.2.other", np.float32([INF])), "other of the head of boundary 2"),
        (poked("head.4.projection", np.float16([NAN])), "the projection of the head of boundary 4"),
        (poked("head.4.blk.0.attn_q.weight", np.float16([NAN])), "blk.0.attn_q.weight of the head of boundary 4"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_though_the_checksum_is_right(
    saved: Path, tmp_path: Path, change: Change, words: str
) -> None:
    with pytest.raises(PackError, match=f"is damaged: .*{words}"):
        ExitPack.load(rewritten(saved, tmp_path / "changed.gguf", arrays=change))


def test_parts_that_do_not_fit_cannot_be_put_together(pack: ExitPack) -> None:
    with pytest.raises(ValueError, match="the head of boundary 3 is of layer 4"):
        dataclasses.replace(pack, boundaries=(2, 3))
    with pytest.raises(BoundaryError):
        dataclasses.replace(pack, boundaries=(2, 5))
    tensors = pack.heads[0].tensors
    for changed, words in (
        ({}, "lacks a tensor"),
        ({**tensors, "more": tensors["other"]}, "lacks a tensor or has one too many"),
        ({**tensors, "other": tensors["blk.0.attn_q.weight"]}, "does not fit"),
        ({**tensors, "blk.0.attn_q.weight": np.ones((64, 64), np.float32)}, "does not fit"),
        ({**tensors, "blk.0.attn_q.weight": quantise(np.ones((64, 64), np.float32), "Q4_0")}, "does not fit"),
    ):
        heads = (dataclasses.replace(pack.heads[0], tensors=changed), pack.heads[1])
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(pack, heads=heads)
    with pytest.raises(PackError):
        Gate(("entropy",), (0.0,), (1.0,), (NAN,), 0.0)


# ── no pack ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_is_no_pack(model_path: Path) -> None:
    with pytest.raises(PackError, match="no exit pack but a GGUF of architecture 'llama'"):
        ExitPack.load(model_path)


def test_packs_of_the_other_kind_are_refused_both_ways(saved: Path) -> None:
    with pytest.raises(PackError, match="no exit pack but a label pack"):
        ExitPack.load(label_packs.find_pack("moderation"))
    with pytest.raises(PackError, match="no label pack but a GGUF of architecture 'edge-exits'"):
        LabelPack.load(saved)


def test_what_is_no_file_or_no_gguf_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("hello\n")
    (tmp_path / "magic.gguf").write_bytes(b"GGUF")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (
        ("none.gguf", "there is no file"),
        ("", "is a directory"),
        ("empty.gguf", "is empty"),
        ("text.gguf", "is not a GGUF file"),
        ("magic.gguf", "cut short or damaged"),
        ("pipe.gguf", "a pipe"),
        ("empty.gguf/below", "there is no file"),
        ("a\0b", "there is no file"),
        ("n" * 300, "there is no file"),
    ):
        with pytest.raises(PackError, match=words) as failure:
            ExitPack.load(tmp_path / name)
        assert failure.value.hint, name
        assert "model file" not in str(failure.value), name


def test_a_file_larger_than_any_pack_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "MAX_BYTES", saved.stat().st_size - 1)
    monkeypatch.setattr(pack_module, "read_tensors", pytest.fail)
    with pytest.raises(PackError, match="larger than any"):
        ExitPack.load(saved)


def test_texts_of_a_gguf_are_read_alone(saved: Path) -> None:
    assert read_texts(str(saved), ("general.architecture", "none")) == {
        "general.architecture": "edge-exits",
        "none": "",
    }


# ── saving fails ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pack_over_the_limit_is_not_written_and_an_old_one_stays(
    pack: ExitPack, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(pack_module, "MAX_BYTES", len(before))
    assert pack.save(saved) == len(before)
    monkeypatch.setattr(pack_module, "MAX_BYTES", len(before) - 1)
    with pytest.raises(PackError, match=r"would have \d+,\d+ bytes, \d+,\d+ are allowed"):
        pack.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_place_that_cannot_be_written_is_said(pack: ExitPack, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "p.gguf", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(PackError, match="cannot be written: ") as failure:
            pack.save(path)
        assert "--out" in failure.value.hint
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("missing", [1, 4097, 60_000, 120_000])
def test_a_disk_that_fills_is_said_and_leaves_nothing(pack: ExitPack, tmp_path: Path, missing: int) -> None:
    size = pack.save(tmp_path / "p.gguf")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, old[1]))
    try:
        with pytest.raises(PackError, match=r"cannot be written: (No space left|File too large)"):
            pack.save(tmp_path / "q.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == ["p.gguf"]


def test_a_last_tensor_written_in_part_is_noticed(
    pack: ExitPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that fills within the last bytes, which stay in a buffer until the file is closed."""
    close = GGUFWriter.close

    def cut(self: GGUFWriter) -> None:
        if self.fout is not None:
            self.fout[0].truncate(self.fout[0].tell() - 100)
        close(self)

    monkeypatch.setattr(GGUFWriter, "close", cut)
    with pytest.raises(PackError, match="cannot be written: No space left"):
        pack.save(tmp_path / "p.gguf")
    assert os.listdir(tmp_path) == []


# ── models and builds ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "qwen2"}, r"this is another model:.*; architecture is qwen2 instead of llama"),
        ({"n_layer": 6}, r"this is another model:.*; n_layer is 6 instead of 5"),
        ({"n_embd": 32}, r"this is another model:.*; n_embd is 32 instead of 64"),
        ({"n_embd": 32, "file_bytes": 1}, r"; n_embd is 32"),
        ({"file_bytes": 99}, r"another quantisation or fine-tune.*; file_bytes is 99 instead of \d+"),
        ({}, r"only the weights differ.*; sha256 is cdcd.* instead of "),
    ],
)
def test_another_model_is_refused_with_the_field_that_differs(
    pack: ExitPack, change: dict[str, Any], words: str
) -> None:
    other: ModelIdentity = dataclasses.replace(pack.model, sha256="cd" * 32, file="other.gguf", **change)
    with pytest.raises(PackError, match=words) as failure:
        pack.check_model(other)
    assert "other.gguf" in failure.value.message
    assert "--model" in failure.value.hint


def test_another_build_is_refused(pack: ExitPack, model_path: Path) -> None:
    pack.check_model(pack.model)
    pack.check_model(pack.model, this_library())
    with pytest.raises(
        PackError, match=r"made with another build: llama-cpp-python 0\.3\.36, ABI \d+, this is x, ABI 1"
    ):
        pack.check_model(pack.model, "x, ABI 1")
    with pytest.raises(PackError, match="made with another build: x"):
        random_pack(model_path, library="x").check_model(pack.model)
    assert this_library().startswith("llama-cpp-python 0.")


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the folder of the packs that come with the package."""
    folder = tmp_path / "packs"
    folder.mkdir()
    for name in ("smollm2-135m.exits.gguf", "moderation-smollm2-135m.gguf", "notes.md"):
        (folder / name).touch()
    monkeypatch.setattr(packs_module, "_FOLDER", folder)
    monkeypatch.setattr(label_packs, "_FOLDER", folder)
    return folder


def test_each_kind_of_pack_lists_its_own(folder: Path) -> None:
    assert bundled_exit_packs() == {"smollm2-135m": folder / "smollm2-135m.exits.gguf"}
    label = folder / "moderation-smollm2-135m.gguf"
    assert label_packs.bundled_packs() == {"moderation": label, "moderation-smollm2-135m": label}


def test_packs_are_found_by_path_and_by_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_exit_pack("smollm2-135m") == folder / "smollm2-135m.exits.gguf"
    assert find_exit_pack("./x") == Path("x")
    assert find_exit_pack("x.gguf") == Path("x.gguf")
    assert find_exit_pack("~/x.gguf") == Path.home() / "x.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").touch()
    assert find_exit_pack("local") == Path("local")


def test_an_unknown_name_gets_the_nearest(folder: Path) -> None:
    with pytest.raises(PackError, match="no exit pack is named 'smolm2-135m'") as failure:
        find_exit_pack("smolm2-135m")
    assert failure.value.hint == "did you mean smollm2-135m?"
    with pytest.raises(PackError) as failure:
        find_exit_pack("qqq")
    assert "one of these names: smollm2-135m; `edge-run calibrate`" in failure.value.hint
    with pytest.raises(PackError):
        find_exit_pack("")


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]))))
