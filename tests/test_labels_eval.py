"""`edge-run labels eval`: its figures are those of the decisions a classifier makes, and its mistakes are explained."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import labels_eval
from edge_runtime.errors import EdgeError, PackError, UsageError
from edge_runtime.identity import identify
from edge_runtime.labels import evaluate
from edge_runtime.labels.classifier import ClassifierOptions, LabelClassifier
from edge_runtime.labels.dataset import Row
from edge_runtime.labels.decision import Decision
from edge_runtime.labels.evaluate import EvaluateOptions, StageTimes, choose_rows, judge, stage_probabilities, sweep
from edge_runtime.labels.fit import Linear
from edge_runtime.labels.novelty import StateNovelty, fit_word_novelty
from edge_runtime.labels.pack import LabelPack, NgramStage
from edge_runtime.labels.stack import Probe
from edge_runtime.labels_eval import EvalRequest, evaluate_labels
from edge_runtime.native import Model
from edge_runtime.reporter import Reporter

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker

LABELS = ("calm", "odd", "rude")
N_EMBD = 64
BITS = 8
NEVER, ALWAYS = 2.0, 0.0
WORDS = ("you", "are", "a", "fool", "friend", "see", "the", "sun", "tomorrow", "never", "again", "please")

Verb = Callable[..., dict[str, Any]]
Writer = Callable[..., Path]


def messages(n: int, seed: int = 1) -> list[str]:
    """Different texts, of different lengths."""
    random = np.random.default_rng(seed)
    return [f"{i} " + " ".join(random.choice(WORDS, random.integers(1, 7))) for i in range(n)]


def make_pack(model: Path, thresholds: Sequence[float] = (0.8, 0.5, ALWAYS), **changes: Any) -> LabelPack:
    """Random weights, probes after layers 2 and 4, and words and states that some messages are unlike."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape).astype(np.float32)

    n = len(LABELS)
    probes = tuple(
        Probe(layer, pools, Linear(0.1 * normal(n, len(pools) * N_EMBD + stage * n), normal(n)), 1.5)
        for stage, (layer, pools) in enumerate([(2, ("mean",)), (4, ("max", "last"))], 1)
    )
    basis = np.linalg.qr(normal(N_EMBD, 3))[0].T.astype(np.float32)
    pack = LabelPack(
        name="manners",
        labels=LABELS,
        instruction="How is this?\n",
        max_tokens=24,
        model=identify(model),
        ngrams=NgramStage(
            BITS,
            random.integers(-127, 128, (n, 2**BITS)).astype(np.int8),
            np.full(n, 0.02, np.float32),
            np.zeros(n, np.float32),
            1.0,
        ),
        probes=probes,
        weights=np.array([1.0, 1.3, 0.8], np.float32),
        thresholds=np.repeat(np.array(thresholds, np.float32)[:, None], n, axis=1),
        unsure_below=0.85,
        words=dataclasses.replace(fit_word_novelty([" ".join(WORDS)] * 2)[0], limit=0.4),
        # with this offset some of the messages are beyond the limit
        states=StateNovelty(np.zeros(N_EMBD, np.float32), basis, np.ones(4, np.float32), 0.0, 1.0, 1e6, 2.0),
        references={},
        report={},
    )
    return dataclasses.replace(pack, **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture
def pack(model_path: Path) -> LabelPack:
    return make_pack(model_path)


@pytest.fixture
def rows() -> list[Row]:
    texts = messages(70)
    return [Row(text, LABELS[i % 3]) for i, text in enumerate(texts)]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """write(rows): a CSV file of them."""

    def write(rows: Sequence[Row], name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_text("message,kind\n" + "".join(f'"{r.text}",{r.label}\n' for r in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def request_for(tmp_path: Path, model_path: Path) -> Callable[..., EvalRequest]:
    def make(pack: LabelPack, data: Path, **changes: Any) -> EvalRequest:
        path = tmp_path / "manners.gguf"
        pack.save(path)
        request = EvalRequest(str(path), data, "message", "kind", str(model_path), threads=1, full_depth=False)
        return dataclasses.replace(request, **changes)

    return make


@pytest.fixture
def verb(request_for: Callable[..., EvalRequest], capsys: pytest.CaptureFixture[str]) -> Verb:
    """verb(pack, data, …): the report that the verb prints as JSON."""

    def verb(pack: LabelPack, data: Path, **changes: Any) -> dict[str, Any]:
        capsys.readouterr()
        evaluate_labels(request_for(pack, data, json=True, **changes))
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        report = json.loads(out)
        assert isinstance(report, dict)
        return report

    return verb


def decide(pack: LabelPack, model: Path, rows: Sequence[Row], *, full_cascade: bool = False) -> list[Decision]:
    options = ClassifierOptions(n_threads=1, full_cascade=full_cascade)
    with LabelClassifier(pack, model, options) as classifier:
        return classifier.predict([row.text for row in rows])


def share(of: Sequence[bool]) -> float:
    return round(sum(of) / len(of), 4)


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_cascade_reported_is_what_a_classifier_decides(
    verb: Verb, pack: LabelPack, model_path: Path, rows: list[Row], write: Writer
) -> None:
    report = verb(pack, write(rows))["cascade"]
    decisions = decide(pack, model_path, rows)
    right = [d.likeliest == row.label for d, row in zip(decisions, rows, strict=True)]
    assert report["accuracy"] == share(right)
    assert report["mean_layer"] == round(float(np.mean([d.layer for d in decisions])), 3)
    stages = [d.stage for d in decisions]
    assert list(report["left_at"].values()) == [share([s == i for s in stages]) for i in range(3)]
    assert report["unsure"] == pytest.approx(share([d.unsure for d in decisions]), abs=1e-4)
    assert report["accuracy_where_sure"] == share([r for r, d in zip(right, decisions, strict=True) if not d.unsure])
    assert report["unfamiliar"] == share([d.unfamiliar for d in decisions])
    table = [
        [sum(r.label == t and d.likeliest == k for d, r in zip(decisions, rows, strict=True)) for k in LABELS]
        for t in LABELS
    ]
    assert report["confusion"] == table
    for k, label in enumerate(LABELS):
        found = report["labels"][label]
        assert found["messages"] == sum(table[k])
        assert found["recall"] == round(table[k][k] / sum(table[k]), 4)
        assert found["precision"] == round(table[k][k] / sum(row[k] for row in table), 4)
    # the messages are such that there is something to get wrong
    assert set(stages) == {0, 1, 2}
    assert 0 < report["unsure"] < 1
    assert 0 < report["unfamiliar"] < 1


def test_the_last_stage_alone_is_the_cascade_without_exits(
    verb: Verb, pack: LabelPack, model_path: Path, rows: list[Row], write: Writer
) -> None:
    report = verb(pack, write(rows))
    whole = decide(pack, model_path, rows, full_cascade=True)
    assert [stage["layer"] for stage in report["stages"]] == [0, 2, 4]
    assert report["stages"][-1]["accuracy"] == share([d.likeliest == r.label for d, r in zip(whole, rows, strict=True)])
    early = decide(pack, model_path, rows)
    agrees = share([a.likeliest == b.likeliest for a, b in zip(early, whole, strict=True)])
    assert report["cascade"]["agrees_with_all_stages"] == agrees < 1


@pytest.mark.parametrize("with_states", [True, False])
def test_evidence_and_thresholds_give_the_classifiers_decisions(
    pack: LabelPack, model_path: Path, rows: list[Row], with_states: bool
) -> None:
    pack = pack if with_states else dataclasses.replace(pack, states=None)
    with Model(str(model_path)) as model:
        options = EvaluateOptions(full_depth=False, n_threads=1)
        found = evaluate.evaluate(pack, model, rows, options, Reporter())
    decisions = decide(pack, model_path, rows)
    for ours, theirs in zip(found.decisions, decisions, strict=True):
        assert (ours.label, ours.stage, ours.unfamiliar) == (theirs.label, theirs.stage, theirs.unfamiliar)
    own = next(point for point in sweep(found) if point.boldness == 0)
    assert own.accuracy == share([d.likeliest == r.label for d, r in zip(decisions, rows, strict=True)])
    assert own.mean_layer == round(float(np.mean([d.layer for d in decisions])), 3)
    for decision, *said in zip(decisions, *found.evidence.stages, strict=True):
        assert decision.probabilities == pytest.approx(said[decision.stage], abs=1e-5)


def test_stage_probabilities_prepare_texts(pack: LabelPack, model_path: Path) -> None:
    with Model(str(model_path)) as model:
        raw = stage_probabilities(pack, model, ["you  &amp; @bob", "see https://a.b/c"], n_threads=1)
        prepared = stage_probabilities(pack, model, ["you & @user", "see http"], n_threads=1)
    assert [stage.shape for stage in raw] == [(2, 3)] * 3
    assert all(np.array_equal(a, b) for a, b in zip(raw, prepared, strict=True))


def test_a_pack_that_knows_words_only(verb: Verb, model_path: Path, rows: list[Row], write: Writer) -> None:
    pack = make_pack(model_path, (ALWAYS,), probes=(), states=None)
    report = verb(pack, write(rows))
    assert len(report["stages"]) == 1
    assert report["cascade"]["mean_layer"] == 0
    assert report["cascade"]["accuracy"] == report["stages"][0]["accuracy"]


def test_judge_by_hand() -> None:
    truth = np.array([0, 0, 0, 1])
    decided = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.3, 0.7, 0], [0.2, 0.8, 0]], np.float32)
    found = judge(LABELS, probabilities, decided, truth)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == round((0.8 + 2 / 3) / 2, 4)  # of the labels that are there
    assert found["labels"]["calm"] == {"messages": 3, "precision": 1.0, "recall": 0.6667, "f1": 0.8, "auroc": 1.0}
    assert found["labels"]["rude"]["messages"] == 0
    assert all(math.isnan(found["labels"]["rude"][key]) for key in ("precision", "recall", "f1", "auroc"))


def test_estimated_time_is_what_was_measured_where_all_go_all_the_way() -> None:
    times = StageTimes(np.array([1.0, 4.0, 8.0], np.float32), np.array([10, 30]))
    assert times.seconds_for(np.array([2, 2])) == 13
    assert times.seconds_for(np.array([0, 0])) == 1
    assert times.seconds_for(np.array([0, 1])) == 1 + 4 * 30 / 40
    without_probes = StageTimes(np.array([1.0], np.float32), np.array([0, 0]))
    assert without_probes.seconds_for(np.array([0, 0])) == 1


# ── other thresholds ────────────────────────────────────────────────────────────────────────────────────────────────

THRESHOLDS = st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.99, 1.0, 2.0]), min_size=3, max_size=3)


@given(THRESHOLDS, st.floats(-1, 1), st.floats(-1, 1))
def test_bolder_thresholds_are_nowhere_higher(values: list[float], one: float, other: float) -> None:
    thresholds = np.array([values], np.float32)
    safe, bold = (evaluate.thresholds_at(thresholds, b, 3) for b in sorted((one, other)))
    assert (bold <= safe + 1e-6).all()


@given(THRESHOLDS)
def test_ends_and_middle_of_the_boldness_scale(values: list[float]) -> None:
    thresholds = np.array([values], np.float32)
    assert np.isinf(evaluate.thresholds_at(thresholds, -1, 3)).all()
    assert (evaluate.thresholds_at(thresholds, 1, 3) <= np.float32(1 / 3)).all()
    own = evaluate.thresholds_at(thresholds, 0, 3)
    assert np.allclose(own[thresholds <= 1], thresholds[thresholds <= 1], atol=1e-6)
    assert np.isinf(own[thresholds > 1]).all()


def test_the_sweep_goes_from_all_stages_to_none(verb: Verb, pack: LabelPack, rows: list[Row], write: Writer) -> None:
    pack = dataclasses.replace(pack, states=None, words=dataclasses.replace(pack.words, limit=1.0))
    report = verb(pack, write(rows))
    points = report["sweep"]
    depths = [point["mean_layer"] for point in points]
    assert depths == sorted(depths, reverse=True)
    assert (depths[0], depths[-1]) == (4, 0)
    assert points[0]["accuracy"] == report["stages"][-1]["accuracy"]
    assert points[-1]["accuracy"] == report["stages"][0]["accuracy"]
    assert points[0]["messages_per_second"] == report["all_stages_messages_per_second"]


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_choosing_keeps_order_and_leaves_out_what_was_there_before() -> None:
    rows = [Row("a", "calm"), Row("b", "odd"), Row("A", "calm"), Row("a", "odd"), Row("c", "calm")]
    sample = choose_rows(iter(rows), LABELS, 10, 0)
    assert [row.text for row in sample.rows] == ["a", "b", "c"]
    assert sample.totals == {"calm": 2, "odd": 1, "rude": 0}
    assert (sample.n_duplicates, sample.n_conflicting) == (1, 1)


def test_choosing_takes_all_messages_equally_often() -> None:
    rows = [Row(str(i), LABELS[i % 3]) for i in range(12)]
    counts = np.zeros(12)
    for seed in range(600):
        sample = choose_rows(rows, LABELS, 3, seed)
        indices = [int(row.text) for row in sample.rows]
        assert len(indices) == 3
        assert indices == sorted(indices)
        counts[indices] += 1
    assert sum(sample.totals.values()) == 12
    # 150 expected each, with a standard deviation of 10.6
    assert abs(counts - 150).max() < 50


@pytest.mark.parametrize(("n_unknown", "named"), [(1, "'new 0'; the pack"), (9, "'new 4', …; the pack")])
def test_labels_that_the_pack_does_not_know(
    request_for: Callable[..., EvalRequest], pack: LabelPack, write: Writer, n_unknown: int, named: str
) -> None:
    rows = [Row("hello", "calm")] + [Row(f"text {i}", f"new {i}") for i in range(n_unknown)]
    with pytest.raises(UsageError, match="does not know") as caught:
        evaluate_labels(request_for(pack, write(rows)))
    assert named in caught.value.message
    assert "'calm', 'odd', 'rude'" in caught.value.message


def test_a_file_with_one_label_only(verb: Verb, pack: LabelPack, model_path: Path, write: Writer) -> None:
    rows = [Row(text, "odd") for text in messages(9)]
    report = verb(pack, write(rows))
    decisions = decide(pack, model_path, rows)
    assert report["data"]["labels_missing"] == ["calm", "rude"]
    cascade = report["cascade"]
    assert cascade["accuracy"] == share([d.likeliest == "odd" for d in decisions])
    assert cascade["labels"]["odd"]["auroc"] is None
    assert cascade["labels"]["calm"]["recall"] is None
    assert cascade["macro_f1"] == cascade["labels"]["odd"]["f1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("message,kind\n", "is empty"),
        ("words,kind\na,calm\n", "no column 'message'"),
        ("message,sort\na,calm\n", "no column 'kind'"),
        ("message,kind\n   ,calm\n", "no text"),
        ("message,kind\na,\n", "unlabelled"),
    ],
)
def test_files_without_anything_to_evaluate_on(
    request_for: Callable[..., EvalRequest], pack: LabelPack, tmp_path: Path, content: str, message: str
) -> None:
    data = tmp_path / "data.csv"
    data.write_text(content)
    with pytest.raises(UsageError, match=message):
        evaluate_labels(request_for(pack, data))


def test_another_model_is_refused_before_the_file_is_read(
    request_for: Callable[..., EvalRequest], pack: LabelPack, tiny_path: TinyMaker, tmp_path: Path
) -> None:
    other = tiny_path("llama", tokenizer=True, n_layer=3)
    with pytest.raises(PackError, match="another model"):
        evaluate_labels(request_for(pack, tmp_path / "missing.csv", model=str(other)))


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_has_all_of_it(verb: Verb, pack: LabelPack, rows: list[Row], write: Writer) -> None:
    report = verb(pack, write([*rows, rows[0]]), max_rows=40, full_depth=True)
    assert report["messages"] == 40
    assert report["data"]["rows_read"] == 71
    assert report["data"]["duplicates_left_out"] == 1
    assert sum(report["data"]["by_label_in_file"].values()) == 70
    full = report["full_depth"]
    assert full["messages"] == 40
    for key in ("messages_per_second", "cascade_messages_per_second", "cascade_times_as_fast"):
        assert 0 < full[key]["low"] <= full[key]["median"] <= full[key]["high"]
        assert full[key]["n"] == 8
    assert len(report["stage_ms_per_message"]) == len(report["stages"]) == 3
    assert report["cascade"]["messages_per_second"] > 0
    assert verb(pack, write(rows))["full_depth"] is None


def test_few_messages_make_few_chunks(verb: Verb, pack: LabelPack, rows: list[Row], write: Writer) -> None:
    report = verb(pack, write(rows[:3]), full_depth=True)
    assert report["full_depth"]["messages"] == report["full_depth"]["messages_per_second"]["n"] == 3


def test_tables_go_to_stdout_and_the_rest_to_stderr(
    request_for: Callable[..., EvalRequest],
    pack: LabelPack,
    rows: list[Row],
    write: Writer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write([row for row in rows if row.label != "rude"])
    evaluate_labels(request_for(pack, data, full_depth=True))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in ("before the network", "layer 2", "cascade "))
    assert any(line.startswith("rude ") and line.split()[1] == "0" and line.endswith(" -") for line in lines)
    assert "times as fast as all 7 layers of the model" in printed.out
    assert "no message has the label rude" in printed.err
    assert "reading" in printed.err
    evaluate_labels(request_for(pack, data, quiet=True))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out


def test_the_verb_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request_for: Callable[..., EvalRequest],
    pack: LabelPack,
    rows: list[Row],
    write: Writer,
) -> None:
    run: RunCli = runner(capsys, monkeypatch)
    request = request_for(pack, write(rows))
    given = ("labels", "eval", "--pack", request.pack, "--data", request.data, "--text", "message", "--label", "kind")
    options = ("--model", request.model, "--threads", 1, "--no-full-depth", "--json")
    result = run(*given, *options)
    assert_clean(result, 0)
    assert json.loads(result.out)["messages"] == 70
    assert_clean(run(*given[:-1], "nonsense", *options, "--quiet"), 2)
    result = run("labels", "eval", "--help")
    assert_clean(result, 0)
    assert "Examples:\n    edge-run labels eval" in result.out


def test_the_picture_is_a_png(verb: Verb, model_path: Path, rows: list[Row], write: Writer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    verb(make_pack(model_path, name="$x_1$ 50% \x07"), write(rows), png=picture, full_depth=True)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    words_only = make_pack(model_path, (ALWAYS,), probes=(), states=None)
    picture.unlink()
    verb(words_only, write(rows[:1]), png=picture)
    assert picture.exists()


def test_a_picture_that_cannot_be_written_is_refused_at_once(
    request_for: Callable[..., EvalRequest], pack: LabelPack, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    missing = tmp_path / "missing.csv"
    for path in (tmp_path, tmp_path / "no" / "x.png"):
        with pytest.raises(UsageError, match="picture cannot be written"):
            evaluate_labels(request_for(pack, missing, png=path))


def test_drawing_without_matplotlib_says_how_to_get_it(
    request_for: Callable[..., EvalRequest], pack: LabelPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EdgeError) as caught:
        evaluate_labels(request_for(pack, tmp_path / "missing.csv", png=tmp_path / "x.png"))
    assert caught.value.hint == labels_eval.PLOT_HINT


def test_an_interruption_closes_everything_and_leaves_no_picture(
    request_for: Callable[..., EvalRequest],
    pack: LabelPack,
    rows: list[Row],
    write: Writer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    closed: list[Model] = []
    close = Model.close

    def note(model: Model) -> None:
        closed.append(model)
        close(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "close", note)
    monkeypatch.setattr(evaluate, "_run_cascade", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_labels(request_for(pack, write(rows), png=tmp_path / "x.png"))
    assert len(closed) == 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "x.png").exists()
