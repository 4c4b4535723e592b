"""Probe files: what is read is what was written, and anything else is refused with a reason."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.pack import this_library
from edge_runtime.exits.probe_file import ProbeFile
from edge_runtime.exits.strict_json import dumps, loads
from edge_runtime.identity import identify
from edge_runtime.semantic.probe import Probe

from .conftest import TinyMaker


def probe(layer: int, loss: float) -> Probe:
    random = np.random.default_rng(layer)
    vectors = {name: random.uniform(0.5, 2, 64).astype(np.float32) for name in ("weights", "mean", "scale")}
    numbers = {"bias": 0.1, "threshold": 1.0, "penalty": 1.0, "n_prompts": 48, "n_high": 24, "auroc": 0.8}
    return Probe(layer=layer, loss=loss, **vectors, **numbers)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama")


@pytest.fixture
def saved(tmp_path: Path, model_path: Path) -> Path:
    path = tmp_path / "a.probe.json"
    probes = (probe(2, 0.5), probe(4, 0.6), probe(5, 0.4))
    ProbeFile("a", identify(model_path), this_library(), 4, probes, {"prompts": 72, "none": math.nan}).save(path)
    return path


def test_a_file_holds_what_was_put_in(saved: Path, tmp_path: Path) -> None:
    found = ProbeFile.load(saved)
    found.save(tmp_path / "b.probe.json")
    assert (tmp_path / "b.probe.json").read_bytes() == saved.read_bytes()
    assert [one.layer for one in found.probes] == [2, 4, 5]
    for one in found.probes:
        expected = probe(one.layer, one.loss)
        for name in ("weights", "mean", "scale"):
            assert getattr(one, name).tobytes() == getattr(expected, name).tobytes()
        assert (one.bias, one.threshold, one.n_prompts) == (0.1, 1.0, 48)
    assert math.isnan(found.report["none"])


def test_the_probe_to_use_is_the_chosen_one_or_the_best_there_is(saved: Path) -> None:
    found = ProbeFile.load(saved)
    assert found.at((1, 2, 4, 5)).layer == 4
    assert found.at((2, 5)).layer == 5
    assert found.at((2,)).layer == 2
    for layers in ((), (3, 6)):
        with pytest.raises(UsageError, match=r"behind layers 2, 4, 5, and the model is cut behind (none|3, 6)"):
            found.at(layers)


def loaded(path: Path) -> ProbeFile | None:
    """None for what is refused."""
    try:
        return ProbeFile.load(path)
    except PackError:
        return None


def test_every_damaged_byte_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    random = np.random.default_rng(0)
    for place in [*range(120), *random.integers(0, len(data), 200).tolist()]:
        changed = bytearray(data)
        changed[place] ^= 1 + int(random.integers(0, 255))
        saved.write_bytes(changed)
        # a space between two words of JSON may be another, and no more
        assert loaded(saved) is None or bytes(changed).split() == data.split(), place
    for n in (0, 1, 50, len(data) // 2, len(data) - 3):
        saved.write_bytes(data[:n])
        assert loaded(saved) is None


def test_what_is_no_probe_is_told_apart_from_a_damaged_one(saved: Path, tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(PackError, match="is no probe"):
        ProbeFile.load(model_path)
    for text in ("[]", '{"format": 1}', "3", '{"format": "edge-labels"}', "[" * 100_000):
        (tmp_path / "b").write_text(text)
        with pytest.raises(PackError, match="is no probe"):
            ProbeFile.load(tmp_path / "b")
    with pytest.raises(PackError, match="cannot be read: No such file"):
        ProbeFile.load(tmp_path / "none")
    with pytest.raises(PackError, match="cannot be read: Is a directory"):
        ProbeFile.load(tmp_path)
    saved.write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(PackError, match="damaged: it is no JSON"):
        ProbeFile.load(saved)


def resealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file with its content changed by `change`, its checksum right."""
    found = loads(path.read_text())
    change(found["content"])
    text = dumps(found["content"])
    head = f'{{"format": "edge-probe", "version": 1, "crc32": {zlib.crc32(text.encode())}'
    path.write_text(f'{head}, "content": {text}}}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(chosen=3), "no probe behind layer 3"),
        (lambda c: c.update(chosen=2.0), "no whole number"),
        (lambda c: c.update(probes=[]), "no probe behind layer"),
        (lambda c: c["probes"].reverse(), "not in order"),
        (lambda c: c["probes"][0].update(layer=9), "outside this model's 7 layers"),
        (lambda c: c["probes"][0].update(weights="AAAA"), "multiple of element size"),
        (lambda c: c["probes"][0].update(weights="AAAAAA=="), "not equally many"),
        (lambda c: c["probes"][0].update(weights="?"), "damaged"),
        (lambda c: c["probes"][0].update(weights=3), "damaged"),
        (lambda c: c["probes"][0].update(bias=float("inf")), "not all of its numbers are finite"),
        (lambda c: c["probes"][0].update(bias="x"), "no number"),
        (lambda c: c["probes"][0].pop("scale"), "scale"),
        (lambda c: c["probes"][0].update(threshold=-1), "out of range"),
        (lambda c: c["model"].update(n_embd=32), "64 wide, the model 32"),
        (lambda c: c["model"].update(n_embd=None), "no whole number"),
        (lambda c: c["model"].update(extra=1), "extra"),
        (lambda c: c.update(name=7), "no text"),
        (lambda c: c.update(report=[1]), "damaged"),
    ],
)
def test_parts_that_do_not_fit_are_refused(saved: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    resealed(saved, change)
    with pytest.raises(PackError, match=said) as error:
        ProbeFile.load(saved)
    assert "is damaged" in error.value.message
    assert error.value.hint


def test_a_later_version_and_a_file_too_large(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = saved.read_text()
    for version, hint in ((2, "update edge_runtime"), (0, "make it again")):
        saved.write_text(text.replace('"version": 1', f'"version": {version}', 1))
        with pytest.raises(PackError, match=f"of format {version}, this reads 1") as error:
            ProbeFile.load(saved)
        assert hint in (error.value.hint or "")
    saved.write_text(text.replace('"version": 1', '"version": "1"', 1))
    with pytest.raises(PackError, match="damaged: '1' is no whole number"):
        ProbeFile.load(saved)
    monkeypatch.setattr("edge_runtime.exits.probe_file.MAX_BYTES", 100)
    with pytest.raises(PackError, match="larger than any"):
        ProbeFile.load(saved)


def test_another_model_or_build_is_refused(saved: Path, tiny_path: TinyMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ProbeFile.load(saved)
    other = identify(tiny_path("llama", n_layer=8))
    with pytest.raises(PackError, match=r"the probe 'a' is for .*, this is another model"):
        made.check_model(other)
    monkeypatch.setattr("edge_runtime.exits.probe_file.this_library", lambda: "llama-cpp-python 9.9.9, ABI 9")
    with pytest.raises(PackError, match="made with another build"):
        made.check_model(made.model)


def test_a_place_that_cannot_be_written_to(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match="cannot be written"):
        ProbeFile.load(saved).save(tmp_path / "file" / "a.probe.json")
