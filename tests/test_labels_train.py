"""`edge-run labels train`: a pack from every kind of file, and every mistake explained before any work is done."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import labels_train
from edge_runtime.identity import identify
from edge_runtime.labels.pack import LabelPack
from edge_runtime.labels_train import summary_lines
from edge_runtime.native import Model

from .cli_helpers import Result, RunCli, assert_clean, finish, program, runner, start
from .conftest import TinyMaker

WORDS = ("alder", "birch", "cedar", "elm", "fir", "hazel", "ivy", "lime", "maple", "oak", "pine", "rowan")
# 200 messages: 30 to certify with, and 30 to test with
N = 200

Table = Sequence[tuple[str, str]]
Verb = Callable[..., Result]


def table(n: int = N) -> Table:
    """Texts of two kinds, and the kind."""
    random = np.random.default_rng(0)
    told = {"yes": "please", "no": "never"}
    rows = []
    for i in range(n):
        label = ("yes", "no")[i % 2]
        rows.append((f"{told[label]} {' '.join(random.choice(WORDS, 2))} n{i}", label))
    return rows


def as_csv(rows: Table, header: str = "message,kind") -> bytes:
    return "".join(f"{line}\n" for line in [header, *(f'"{text}",{label}' for text, label in rows)]).encode()


def as_tsv(rows: Table) -> bytes:
    return "".join(f"{text}\t{label}\n" for text, label in [("message", "kind"), *rows]).encode()


def as_jsonl(rows: Table) -> bytes:
    return "".join(json.dumps({"kind": label, "message": text}) + "\n" for text, label in rows).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program runs."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture
def common(model_path: Path) -> tuple[object, ...]:
    """The verb with all that is always the same."""
    columns = ("--text", "message", "--label", "kind")
    return "labels", "train", *columns, "-m", model_path, "--threads", 1, "--boundaries", "2", "--instruction", "Q: "


@pytest.fixture
def verb(run: RunCli, folder: Path, common: tuple[object, ...]) -> Verb:
    """verb(content of the file, *options, name=…)"""

    def verb(data: bytes, *options: object, name: str = "data.csv") -> Result:
        (folder / name).write_bytes(data)
        return run(*common, "--data", name, *options)

    return verb


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_refused(result: Result, folder: Path, said: str, code: int = 2) -> None:
    """An explanation that says so, and no pack."""
    assert_clean(result, code)
    *_, error, hint = [line for line in result.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert said in error + "\n" + hint
    assert result.out == ""
    assert not any("gguf" in name for name in left_behind(folder))


def refuse(verb: Verb, folder: Path, said: str, data: bytes, *options: object, code: int = 2) -> None:
    """Quiet, so that the error is all there is to be seen."""
    assert_refused(verb(data, "--quiet", *options), folder, said, code)


# ── packs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data.csv", as_csv(table())),
        ("data.tsv.gz", gzip.compress(as_tsv(table()))),
        ("data.jsonl", as_jsonl(table())),
    ],
)
def test_a_pack_is_made_of_every_kind_of_file_and_runs(
    verb: Verb, run: RunCli, folder: Path, model_path: Path, name: str, data: bytes
) -> None:
    result = verb(data, "--max-error", 0.3, "--no-full-depth", name=name)
    assert_clean(result, 0)
    stem = name.removesuffix(".gz").rsplit(".", 1)[0]
    path = folder / f"{stem}.labels.gguf"
    assert left_behind(folder) == {name, path.name}
    assert f"{path.name} (" in result.err
    pack = LabelPack.load(path)
    assert (pack.name, pack.labels, pack.instruction) == (stem, ("no", "yes"), "Q: ")
    assert pack.model == identify(model_path)
    lines = result.out.splitlines()
    assert lines == summary_lines(pack.report)
    assert lines[0] == "200 messages (no: 100, yes: 100); tested on 30 of them never seen in training"
    assert any(line.startswith("certified: error rate at most 0.3 with confidence 95%") for line in lines)

    labelled = run(
        "labels", "run", "--pack", path, "-m", model_path, "--threads", 1, "--quiet", "please elm fir", "never fir ivy"
    )
    assert_clean(labelled, 0)
    assert [line.split("\t")[0] for line in labelled.out.splitlines()] == ["yes", "no"]


def test_all_files_give_the_same_pack(verb: Verb, folder: Path) -> None:
    contents = {"a.csv": as_csv(table()), "b.tsv": as_tsv(table()), "c.jsonl": as_jsonl(table())}
    packs = []
    for name, data in contents.items():
        assert_clean(verb(data, "--out", "x.gguf", name=name), 0)
        packs.append(LabelPack.load("x.gguf"))
    for pack in packs[1:]:
        assert (pack.thresholds == packs[0].thresholds).all()
        assert (pack.ngrams.weights == packs[0].ngrams.weights).all()
        assert pack.report["test"] == packs[0].report["test"]


def test_json_output(verb: Verb, folder: Path) -> None:
    result = verb(as_csv(table()), "--json", "--out", "kinds.labels.gguf")
    assert_clean(result, 0)
    record = json.loads(result.out, parse_constant=pytest.fail)
    path = folder / "kinds.labels.gguf"
    assert record["pack"] == "kinds.labels.gguf"
    assert record["bytes"] == path.stat().st_size
    assert set(record) == {"pack", "bytes", *LabelPack.load(path).report}
    assert record["data"]["messages"] == N
    assert record["certificate"]["delta"] == 0.05
    assert "cascade" in record["test"]


def test_quiet_leaves_the_summary_alone(verb: Verb) -> None:
    result = verb(as_csv(table()), "--quiet")
    assert_clean(result, 0)
    assert result.out.startswith("200 messages ")
    assert "computing" not in result.err
    assert "rows read" not in result.err


def test_what_is_going_on_is_told(verb: Verb) -> None:
    rows = [*table(), table()[0], ("", "yes"), ("no label here", "")]
    err = verb(as_csv(rows)).err
    for said in ("reading data.csv", "computing hidden states up to layer 7", "fitting", "certifying"):
        assert said in err
    assert "203 rows read; left out: 1 without a label, 1 without a text, 1 seen before" in err


def test_fewer_rows_on_demand(verb: Verb) -> None:
    result = verb(as_csv(table()), "--max-rows", 60, "--json")
    assert_clean(result, 0)
    assert json.loads(result.out)["data"]["messages"] == 60
    assert "60 of 200 different messages are used (--max-rows 60)" in result.err


def test_what_is_not_certified_is_not_said_to_be(verb: Verb) -> None:
    result = verb(as_csv(table()), "--max-loss", 0.01)
    assert_clean(result, 0)
    assert "\nNOT certified: " in result.out
    assert "the calibration part has 30 messages; at least " in result.out


def test_errors_are_named_where_they_and_not_too_few_messages_are_the_reason(verb: Verb, folder: Path) -> None:
    """More than enough messages, of which half are labelled by chance."""
    random = np.random.default_rng(0)
    rows = [(text, str(random.choice(["no", "yes"]))) for text, _ in table()]
    result = verb(as_csv(rows), "--max-error", 0.2, "--no-full-depth")
    assert_clean(result, 0)
    assert "\nNOT certified: " in result.out
    needed = LabelPack.load(folder / "data.labels.gguf").report["certificate"]["messages_needed"]
    assert needed < 30
    assert f"at least {needed}" not in result.out


def test_bytes_that_are_not_utf_8_are_read_and_counted(verb: Verb) -> None:
    data = as_csv(table()).replace(b"elm", b"\xe9lm")
    result = verb(data)
    assert_clean(result, 0)
    n = sum("elm" in text for text, _ in table())
    assert f"warning: {n} rows hold bytes that are not UTF-8" in result.err


def test_a_pack_takes_the_place_of_an_older_one(verb: Verb, folder: Path) -> None:
    (folder / "data.labels.gguf").write_bytes(b"older")
    assert_clean(verb(as_csv(table())), 0)
    assert LabelPack.load(folder / "data.labels.gguf").name == "data"


def test_the_same_command_computes_nothing_twice(verb: Verb, cache: Path) -> None:
    assert_clean(verb(as_csv(table())), 0)
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.states")}
    assert files
    assert_clean(verb(as_csv(table())), 0)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.states")} == files


def test_hidden_states_are_kept_where_one_says(verb: Verb, folder: Path, cache: Path) -> None:
    assert_clean(verb(as_csv(table()), "--cache", folder / "kept"), 0)
    assert list((folder / "kept").rglob("*.states"))
    assert not list(cache.rglob("*.states"))


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"message,kind\n", "has a header and no rows", id="header only"),
        pytest.param(as_csv([(text, "yes") for text, _ in table()]), "have the same label, 'yes'", id="one label"),
        pytest.param(as_csv(table(), "mesage,kind"), "did you mean 'mesage'?", id="no text column"),
        pytest.param(as_csv(table(), "message,kid"), "did you mean 'kid'?", id="no label column"),
        pytest.param(as_csv([(text, "") for text, _ in table()]), "unlabelled", id="unlabelled"),
        pytest.param(as_csv(table(3)), "at least 20 rows", id="three rows"),
        pytest.param(as_csv([("", label) for _, label in table()]), "has no text", id="no texts"),
        pytest.param(
            as_csv([(text, text) for text, _ in table()]), "more than 64 different labels", id="texts as labels"
        ),
        pytest.param(as_csv([("same", label) for _, label in table()]), "rows", id="one text"),
        pytest.param("message,kind\na,b\n".encode("utf-16"), "UTF-16", id="utf-16"),
    ],
)
def test_data_that_cannot_be_learned_from(verb: Verb, folder: Path, data: bytes, said: str) -> None:
    refuse(verb, folder, said, data)


def test_jsonl_that_is_none(verb: Verb, folder: Path) -> None:
    (folder / "data.jsonl").write_bytes(as_csv(table()))
    assert_refused(verb(as_csv(table()), "--quiet", name="data.jsonl"), folder, "no JSON object", 1)


def test_gzip_cut_short(verb: Verb, folder: Path) -> None:
    cut = gzip.compress(as_csv(table()))[:-200]
    assert_refused(verb(cut, "--quiet", name="data.csv.gz"), folder, "data.csv.gz", 1)


def test_a_file_of_another_kind_or_none(verb: Verb, run: RunCli, folder: Path, common: tuple[object, ...]) -> None:
    assert_refused(verb(b"x", "--quiet", name="data.xlsx"), folder, "data.xlsx")
    assert_refused(run(*common, "--data", "missing.csv", "--quiet"), folder, "there is no file missing.csv")
    (folder / "sub.csv").mkdir()
    assert_refused(run(*common, "--data", "sub.csv", "--quiet"), folder, "is a directory")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--out", "missing/x.gguf"), "a pack cannot be written to missing/x.gguf"),
        (("--out", "."), "a pack cannot be written to ."),
        (("--out", "data.csv"), "take the place of data.csv"),
        (("--max-loss", 0.01, "--max-error", 0.1), "exclude each other"),
        (("--max-loss", 0.01, "--no-full-depth"), "full depth"),
        (("--max-error", 0), "cannot be certified"),
        (("--max-error", 1), "cannot be certified"),
        (("--max-error", -1), "cannot be certified"),
        (("--max-error", "nan"), "cannot be certified"),
        (("--max-error", 1e-10), "cannot be certified"),
        (("--max-loss", 0), "cannot be certified"),
        (("--confidence", 1), "cannot be certified"),
        (("--confidence", 0), "cannot be certified"),
        (("--confidence", 95), "cannot be certified"),
        (("-m", "no-such-model"), "no-such-model"),
        (("-m", "data.csv"), "data.csv"),
        (("--boundaries", "99"), "boundary 99 is outside this model's 7 layers"),
        (("--boundaries", "0"), "boundary 0"),
        (("--boundaries", "3,2"), "not in order"),
        (("--boundaries", "two"), "not layer numbers"),
        (("--max-rows", 5), "5 rows are too few for 2 labels"),
        (("--text", "kind"), "two columns"),
    ],
)
def test_options_that_make_no_sense(verb: Verb, folder: Path, options: tuple[object, ...], said: str) -> None:
    refuse(verb, folder, said, as_csv(table()), *options, code=1 if options[0] == "-m" else 2)
    assert (folder / "data.csv").read_bytes() == as_csv(table())


@pytest.mark.parametrize(
    "options", [("--max-rows", 0), ("--max-tokens", 0), ("--objective", "speed"), ("--max-harm", 2), ("--seed", -1)]
)
def test_options_out_of_range(verb: Verb, folder: Path, options: tuple[object, ...]) -> None:
    result = verb(as_csv(table()), *options)
    assert_clean(result, 2)
    assert str(options[0]) in result.err
    assert left_behind(folder) == {"data.csv"}


def test_the_figures_of_an_impossible_guarantee_are_as_they_were_given(verb: Verb, folder: Path) -> None:
    err = verb(as_csv(table()), "--max-error", 0).err
    assert "0000" not in err
    assert "99999" not in err


def test_a_model_is_not_overwritten(verb: Verb, folder: Path, model_path: Path) -> None:
    copy = folder / "own.model"
    copy.write_bytes(model_path.read_bytes())
    refuse(verb, folder, "take the place of", as_csv(table()), "-m", copy, "--out", copy)
    assert copy.read_bytes() == model_path.read_bytes()


def test_mistakes_are_found_before_the_file_is_read(verb: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Any:
        pytest.fail("the file was read")

    monkeypatch.setattr(labels_train, "_read", read)
    for options in (("--out", "missing/x.gguf"), ("--max-error", 0), ("-m", "no-such-model"), ("--boundaries", "x")):
        refuse(verb, folder, "", as_csv(table()), *options, code=1 if options[0] == "-m" else 2)


def test_help_has_examples(run: RunCli) -> None:
    result = run("labels", "train", "--help")
    assert_clean(result, 0)
    assert "Examples:\n    edge-run labels train --data" in result.out


# ── interrupted ─────────────────────────────────────────────────────────────────────────────────────────────────────

INTERRUPT_IN_COLLECTION = """
import os, signal
from edge_runtime.labels.states import StateCache
add = StateCache.add
def interrupting(self, keys, values):
    add(self, keys, values)
    os.kill(os.getpid(), signal.SIGINT)
StateCache.add = interrupting
"""

INTERRUPT_IN_FITTING = """
import os, signal
from edge_runtime.labels.stack import StackFitter
fit = StackFitter.fit_probe
def interrupting(self, *arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return fit(self, *arguments)
StackFitter.fit_probe = interrupting
"""

INTERRUPT_IN_WRITING = """
import os, signal
from gguf import GGUFWriter
write = GGUFWriter.write_kv_data_to_file
def interrupting(self):
    os.kill(os.getpid(), signal.SIGINT)
    write(self)
GGUFWriter.write_kv_data_to_file = interrupting
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(INTERRUPT_IN_COLLECTION, id="hidden states"),
        pytest.param(INTERRUPT_IN_FITTING, id="fitting"),
        pytest.param(INTERRUPT_IN_WRITING, id="writing"),
    ],
)
def test_ctrl_c_leaves_no_half_pack_and_the_states(
    folder: Path, common: tuple[object, ...], cache: Path, script: str
) -> None:
    (folder / "data.csv").write_bytes(as_csv(table()))
    result = finish(start(program(*common, "--data", "data.csv", "--no-full-depth", "--max-error", 0.2, script=script)))
    assert_clean(result, 130)
    assert left_behind(folder) == {"data.csv"}
    assert result.out == ""
    assert list(cache.rglob("*.states"))
    if script != INTERRUPT_IN_WRITING:
        assert "the same command goes on from there" in result.err


def test_an_interruption_closes_the_model(verb: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Model] = []
    close = Model.close

    def note(model: Model) -> None:
        closed.append(model)
        close(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "close", note)
    monkeypatch.setattr(labels_train, "train", interrupt)
    assert_clean(verb(as_csv(table()), "--quiet"), 130)
    assert len(closed) == 1
    assert left_behind(folder) == {"data.csv"}
