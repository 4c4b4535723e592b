"""From labelled messages to a pack: the pack does what was seen in training, and promises no more than was shown."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.certify import betting_p_value, binomial_p_value
from edge_runtime.errors import BoundaryError, EdgeError, UsageError
from edge_runtime.identity import identify
from edge_runtime.labels import states as states_module
from edge_runtime.labels import train as train_module
from edge_runtime.labels.classifier import ClassifierOptions, LabelClassifier
from edge_runtime.labels.dataset import Row, Sample, sample_rows, split
from edge_runtime.labels.ngrams import ngram_rows
from edge_runtime.labels.novelty import fit_state_novelty, fit_word_novelty
from edge_runtime.labels.pack import LabelPack
from edge_runtime.labels.stack import StackFitter
from edge_runtime.labels.thresholds import Evidence, Guarantee, Setting, apply, certify
from edge_runtime.labels.train import Trained, TrainOptions, candidate_boundaries, default_instruction, train
from edge_runtime.native import Model
from edge_runtime.reporter import Reporter
from edge_runtime.types import Floats, check_boundaries

from .conftest import TinyMaker

FILL = ("alder", "birch", "cedar", "elm", "fir", "hazel", "ivy", "lime", "maple", "oak", "pine", "rowan")
BOUNDARIES = (2, 4)
SHARD = 256  # messages, of the cache of hidden states
NEVER = np.inf

Trainer = Callable[..., Trained]


def wording(random: np.random.Generator) -> str:
    return " ".join([*random.choice(FILL, random.integers(1, 5)), "refund", *random.choice(FILL, 2)])


def order(first: str, second: str) -> Callable[[np.random.Generator], str]:
    """Texts that differ from those with the two words swapped in no n-gram, only in what comes first."""

    def make(random: np.random.Generator) -> str:
        return " ".join(["oh", first, "so", *random.choice(FILL, random.integers(1, 4)), "oh", second, "so"])

    return make


WORDS_AND_ORDER = {"money": wording, "rise": order("kilo", "mega"), "fall": order("mega", "kilo")}


def sample_of(n: int, makers: dict[str, Callable[[np.random.Generator], str]], seed: int = 0) -> Sample:
    """`n` different messages of each label, the labels taking turns."""
    random = np.random.default_rng(seed)
    rows, seen = [], set[str]()
    for _ in range(n):
        for label, make in makers.items():
            text = make(random)
            while text in seen:
                text = make(random)
            seen.add(text)
            rows.append(Row(text, label))
    return sample_rows(rows, len(rows), 0)


def noise(n: int, labels: Sequence[str] = ("heads", "tails"), wrong: float = 0.5) -> Sample:
    """Two words that tell the label, but for a share `wrong` of messages, which have the other one's."""
    random = np.random.default_rng(3)
    rows = []
    for i in range(n):
        truth = int(random.integers(2))
        shown = labels[truth if random.random() >= wrong else 1 - truth]
        rows.append(Row(f"{shown[::-1]} {i} {' '.join(random.choice(FILL, 2))}", labels[truth]))
    return sample_rows(rows, n, 0)


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[Model]:
    with Model(str(model_path)) as model:
        yield model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all tests: states of a message are computed once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EDGE_RUNTIME_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(model: Model, model_path: Path, cache: Path) -> Trainer:
    """run(sample, reporter, **options)"""

    def run(sample: Sample, reporter: Reporter | None = None, **options: Any) -> Trained:
        chosen: dict[str, Any] = {"instruction": "Kind?", "boundaries": BOUNDARIES, "n_threads": 1, **options}
        return train("kinds", sample, model, identify(model_path), TrainOptions(**chosen), reporter or Reporter())

    return run


@pytest.fixture(scope="module")
def sample() -> Sample:
    return sample_of(140, WORDS_AND_ORDER)


@pytest.fixture(scope="module")
def small() -> Sample:
    return sample_of(30, {"money": wording, "rise": WORDS_AND_ORDER["rise"]})


@pytest.fixture(scope="module")
def trained(run: Trainer, sample: Sample) -> Trained:
    """A bound so wide that a few messages certify it."""
    return run(sample, guarantee=Guarantee("depth", 0.2))


# ── end to end ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_words_are_learned_before_the_network_and_order_within_it(trained: Trained) -> None:
    stages = trained.pack.report["test"]
    before = stages["before the network"]["labels"]
    assert before["money"]["auroc"] > 0.99
    assert before["rise"]["recall"] + before["fall"]["recall"] < 1.5
    assert stages["layer 2"]["accuracy"] > 0.95
    assert stages["cascade"]["accuracy"] > 0.95
    assert trained.pack.report["certificate"]["holds"]
    shares = stages["cascade"]["left_at"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares["before the network"] > 0.1  # money
    assert shares["layer 2"] > 0.1
    assert 0 < stages["cascade"]["mean_layer"] < 7


@pytest.mark.parametrize("together", [1, 64])
def test_a_classifier_decides_as_the_evidence_of_the_training_says(
    trained: Trained, sample: Sample, model: Model, tmp_path: Path, together: int
) -> None:
    path = tmp_path / "kinds.gguf"
    trained.pack.save(path)
    pack = LabelPack.load(path)
    parts = split(sample.rows, sample.labels, seed=0)
    for evidence, rows in ((trained.calibration, parts[1]), (trained.test, parts[2])):
        texts = [sample.rows[i].text for i in rows]
        assert [sample.rows[i].label for i in rows] == [pack.labels[k] for k in evidence.truth]
        outcome, answered = apply(Setting(pack.thresholds, pack.unsure_below, 0.0), evidence, pack.weights)
        with LabelClassifier(pack, model, ClassifierOptions(n_threads=1)) as classifier:
            decisions = list(classifier.stream(texts, together))
        assert [d.likeliest for d in decisions] == [pack.labels[k] for k in outcome.labels]
        assert [d.stage for d in decisions] == outcome.stages.tolist()
        assert [not d.unsure for d in decisions] == answered.tolist()
        assert [d.unfamiliar for d in decisions] == [
            bool(evidence.held[stage][i]) for i, stage in enumerate(outcome.stages)
        ]
        # kept states are of half precision, those of a run are not
        for i, decision in enumerate(decisions):
            np.testing.assert_allclose(decision.probabilities, evidence.stages[decision.stage][i], atol=2e-3)
            if decision.novelty is not None:
                assert evidence.novelty is not None
                assert decision.novelty == pytest.approx(evidence.novelty[i], rel=1e-2)


def test_the_report_says_what_was_done(trained: Trained, sample: Sample) -> None:
    report = trained.pack.report
    assert set(report) == {"data", "objective", "certificate", "level", "training", "test", "seconds"}
    data = report["data"]
    assert data["messages"] == 420 == data["training"] + data["calibration"] + data["test"]
    assert data["by_label"] == data["by_label_in_file"] == {"fall": 140, "money": 140, "rise": 140}
    assert data["test"] == len(trained.test.truth)
    assert data["calibration"] == len(trained.calibration.truth) == report["certificate"]["messages"]
    assert data["longer_than_max_tokens"] == 0
    assert data["mean_tokens"] > 10
    assert report["objective"] == "accuracy"
    certificate = report["certificate"]
    assert certificate["kind"] == "loss of accuracy against full depth"
    assert (certificate["bound"], certificate["delta"]) == (0.2, 0.05)
    assert certificate["p_value"] <= 0.05
    assert certificate["sentence"].startswith("loss of accuracy against full depth at most 0.2 with confidence 95%")
    assert {trial["layer"] for trial in report["training"]["trials"]} == {2, 4, 7}
    assert {"before the network", "layer 2", "full depth alone"} <= set(report["training"]["out_of_fold_log_loss"])
    assert {"before the network", "layer 2", "full depth alone", "full depth, all stages", "cascade"} <= set(
        report["test"]
    )
    assert set(report["test"]["cascade"]["labels"]) == {"fall", "money", "rise"}
    assert report["seconds"] > 0


def test_the_pack_is_what_was_asked_for(trained: Trained, model_path: Path) -> None:
    pack = trained.pack
    assert (pack.name, pack.labels, pack.instruction) == ("kinds", ("fall", "money", "rise"), "Kind?")
    assert pack.max_tokens == 256
    assert pack.model == identify(model_path)
    assert set(pack.layers) <= {0, 2, 4, 7}
    assert (pack.thresholds[-1] == 0).all()
    assert (pack.weights == 1).all()
    assert pack.unsure_below == 0


def test_a_boundary_that_gains_nothing_is_dropped(trained: Trained) -> None:
    """Behind layer 2 nothing is left to be learned."""
    assert trained.pack.layers == (0, 2)


def test_the_same_again_gives_the_same_pack(run: Trainer, sample: Sample, trained: Trained, tmp_path: Path) -> None:
    again = run(sample, guarantee=Guarantee("depth", 0.2))
    assert packed(again.pack, tmp_path) == packed(trained.pack, tmp_path)


def packed(pack: LabelPack, folder: Path) -> bytes:
    """The pack's file, but for how long the training took."""
    path = folder / "packed.gguf"
    dataclasses.replace(pack, report={**pack.report, "seconds": 0}).save(path)
    return path.read_bytes()


def test_progress_is_counted_to_the_end(run: Trainer, small: Sample) -> None:
    said: list[str] = []
    counted: dict[str, list[tuple[int, int]]] = {}
    reporter = Reporter(said.append, lambda done, total: counted.setdefault(said[-1], []).append((done, total)))
    run(small, reporter, instruction="Which?")
    assert said == ["computing hidden states up to layer 7", "fitting", "certifying"]
    assert counted["computing hidden states up to layer 7"][-1] == (60, 60)
    for counts in counted.values():
        assert counts == sorted(counts)
        assert all(done <= total == counts[0][1] for done, total in counts)
    assert counted["fitting"][-1][0] == counted["fitting"][-1][1]


def test_texts_for_calibration_and_test_never_reach_fitting(
    run: Trainer, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = split(sample.rows, sample.labels, seed=0)
    numbers = [sample.labels.index(sample.rows[i].label) for i in parts[0]]
    training = {sample.rows[i].text for i in parts[0]}
    seen: list[list[int]] = []
    texts: list[list[str]] = []
    n_states: list[int] = []

    class Spy(StackFitter):
        def __init__(self, labels: Any, *others: Any) -> None:
            seen.append(labels.tolist())
            super().__init__(labels, *others)

    def words(given: Sequence[str]) -> Any:
        texts.append(list(given))
        return fit_word_novelty(given)

    def states(pooled: Floats, *others: Any) -> Any:
        n_states.append(len(pooled))
        return fit_state_novelty(pooled, *others)

    def ngrams(given: Sequence[str], bits: int) -> Any:
        texts.append(list(given))
        return ngram_rows(given, bits)

    monkeypatch.setattr(train_module, "StackFitter", Spy)
    monkeypatch.setattr(train_module, "fit_word_novelty", words)
    monkeypatch.setattr(train_module, "fit_state_novelty", states)
    monkeypatch.setattr(train_module, "ngram_rows", ngrams)
    run(sample)
    assert seen == [numbers, numbers]  # the cascade, and a probe on the last layer alone
    assert len(texts) == 2
    assert all(set(given) == training for given in texts)
    assert n_states == [len(training)]


def test_labels_of_the_test_part_change_nothing_but_the_report(
    run: Trainer, sample: Sample, trained: Trained, tmp_path: Path
) -> None:
    parts = split(sample.rows, sample.labels, seed=0)
    rows = list(sample.rows)
    for i in parts[2]:
        # texts of one label swap places, which leaves the split as it is
        rows[i] = Row(rows[i].text + " unheard of", rows[i].label)
    other = run(dataclasses.replace(sample, rows=rows), guarantee=Guarantee("depth", 0.2))
    bare = [packed(dataclasses.replace(t.pack, report={}), tmp_path) for t in (trained, other)]
    assert bare[0] == bare[1]


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_labels_without_full_depth(run: Trainer) -> None:
    makers = {"rise": WORDS_AND_ORDER["rise"], "fall": WORDS_AND_ORDER["fall"]}
    found = run(sample_of(60, makers), full_depth=False, guarantee=Guarantee("error", 0.3))
    assert found.pack.labels == ("fall", "rise")
    assert found.calibration.full is None
    assert found.test.plain_full is None
    assert max(found.pack.layers) <= 4
    assert "full depth alone" not in found.pack.report["test"]
    assert found.pack.report["certificate"]["holds"]


def test_five_labels(run: Trainer, tmp_path: Path) -> None:
    def word(name: str) -> Callable[[np.random.Generator], str]:
        return lambda random: f"{' '.join(random.choice(FILL, 3))} {name}"

    found = run(sample_of(40, {name: word(name) for name in ("one", "two", "three", "four", "five")}))
    assert found.pack.labels == ("five", "four", "one", "three", "two")
    assert found.pack.report["test"]["cascade"]["accuracy"] > 0.9
    assert found.pack.save(tmp_path / "five.gguf") < 2 * 2**20


def test_labels_in_blocks_are_learned_as_well_as_in_turn(run: Trainer, sample: Sample) -> None:
    rows = sorted(sample.rows, key=lambda row: row.label)
    found = run(dataclasses.replace(sample, rows=rows))
    assert found.pack.report["test"]["cascade"]["accuracy"] > 0.95


@pytest.mark.parametrize("objective", [None, "accuracy"])
def test_rare_labels_count_as_much_as_common_ones_unless_told_otherwise(run: Trainer, objective: Any) -> None:
    common = sample_of(100, {"rise": WORDS_AND_ORDER["rise"]} | {"fall": WORDS_AND_ORDER["fall"]})
    kept = [row for i, row in enumerate(common.rows) if row.label == "rise" or i % 5 == 0]
    sample = sample_rows(kept, len(kept), 0)
    assert sample.totals == {"fall": 20, "rise": 100}
    found = run(sample, objective=objective)
    assert found.pack.report["objective"] == (objective or "macro-f1")
    if objective:
        assert (found.pack.weights == 1).all()


def test_long_messages_are_cut_and_counted(run: Trainer, small: Sample) -> None:
    found = run(small, max_tokens=20)
    report = found.pack.report["data"]
    assert found.pack.max_tokens == 20
    assert report["mean_tokens"] <= 20
    assert 0 < report["longer_than_max_tokens"] <= 60


def test_messages_alike_up_to_where_they_are_cut(run: Trainer) -> None:
    rows = [Row(f"always the same at first, then {i}", ("no", "yes")[i % 2]) for i in range(80)]
    found = run(sample_rows(rows, 80, 0), max_tokens=12)
    assert found.pack.report["data"]["longer_than_max_tokens"] == 80


# ── interrupted ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_training_goes_on_where_it_was(
    run: Trainer, sample: Sample, trained: Trained, tmp_path: Path
) -> None:
    counted: list[int] = []

    def interrupt(done: int, total: int) -> None:
        if done > SHARD + 50:
            raise KeyboardInterrupt

    def count(done: int, total: int) -> None:
        if total == len(sample.rows):
            counted.append(done)

    options = {"cache": tmp_path / "states", "guarantee": Guarantee("depth", 0.2)}
    with pytest.raises(KeyboardInterrupt):
        run(sample, Reporter(progress=interrupt), **options)
    found = run(sample, Reporter(progress=count), **options)
    assert counted[0] > SHARD  # the first shard is there
    assert counted[0] <= SHARD + 16  # a group of messages more
    assert counted[-1] == len(sample.rows)
    assert packed(found.pack, tmp_path) == packed(trained.pack, tmp_path)
    counted.clear()
    run(sample, Reporter(progress=count), **options)
    assert counted == []


def test_an_interruption_while_fitting_computes_no_states_again(run: Trainer, small: Sample, tmp_path: Path) -> None:
    said: list[str] = []
    n_states = 0

    def count(done: int, total: int) -> None:
        nonlocal n_states
        if said[-1] == "fitting" and len(said) == 2:
            raise KeyboardInterrupt
        n_states += said[-1].startswith("computing")

    with pytest.raises(KeyboardInterrupt):
        run(small, Reporter(said.append, count), cache=tmp_path)
    before = n_states
    assert before > 0
    run(small, Reporter(said.append, count), cache=tmp_path)
    assert n_states == before


def test_a_full_disk_is_explained_and_can_be_tried_again(
    run: Trainer, small: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(states_module, "replacing", full)
        with pytest.raises(EdgeError) as caught:
            run(small, cache=tmp_path)
    assert "No space left on device" in caught.value.message
    assert "--cache" in caught.value.hint
    assert run(small, cache=tmp_path).pack.report["test"]["cascade"]["accuracy"] > 0.95


def test_other_boundaries_are_computed_anew(run: Trainer, small: Sample, tmp_path: Path) -> None:
    run(small, cache=tmp_path, boundaries=(2, 4))
    counted: list[int] = []

    def count(done: int, total: int) -> None:
        if total == len(small.rows):
            counted.append(done)

    run(small, Reporter(progress=count), cache=tmp_path, boundaries=(2,))  # all of these are there
    assert counted == []
    run(small, Reporter(progress=count), cache=tmp_path, boundaries=(3,))
    assert counted[-1] == len(small.rows)


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_guarantee_against_full_depth_needs_it(run: Trainer, sample: Sample) -> None:
    with pytest.raises(UsageError, match="full depth") as caught:
        run(sample, full_depth=False)
    assert "error rate" in caught.value.hint


@pytest.mark.parametrize("boundaries", [(0, 2), (7,), (99,), (4, 2), (2, 2)])
def test_boundaries_outside_the_model_or_out_of_order(run: Trainer, sample: Sample, boundaries: Any) -> None:
    with pytest.raises(BoundaryError):
        run(sample, boundaries=boundaries)


@pytest.mark.parametrize("bad", [{"bound": 0.0}, {"bound": 1.0}, {"delta": 0.0}, {"delta": 1.0}, {"bound": math.nan}])
def test_a_guarantee_that_cannot_be_given(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Guarantee(**bad)


def test_a_bound_too_small_for_any_number_of_messages_is_refused_at_once() -> None:
    with pytest.raises(UsageError):
        Guarantee("error", 1e-12)


def test_an_empty_instruction_is_not_replaced_by_another(run: Trainer, small: Sample) -> None:
    """The tokenizer puts a token before any text, so that there is something before each message all the same."""
    found = run(
        small,
        instruction="",
        full_depth=False,
        guarantee=Guarantee("error", 0.5),
    )
    assert found.pack.instruction == ""


def test_an_instruction_without_tokens_is_refused(
    run: Trainer, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "prefix_tokens", lambda _model, _text: [])
    with pytest.raises(UsageError, match="instruction"):
        run(sample, instruction="")


@pytest.mark.parametrize("n_layer", range(2, 81))
def test_boundaries_tried_by_default_are_valid(n_layer: int) -> None:
    boundaries = candidate_boundaries(n_layer)
    check_boundaries(boundaries, n_layer)
    assert 1 <= len(boundaries) <= 6


def test_a_model_of_one_layer_has_no_boundaries_but_an_explanation(tiny_path: TinyMaker, sample: Sample) -> None:
    path = tiny_path("llama", tokenizer=True, n_layer=1)
    with Model(str(path)) as model, pytest.raises(EdgeError) as caught:
        train("x", sample, model, identify(path), TrainOptions(n_threads=1), Reporter())
    assert "layer" in caught.value.message


def test_the_default_instruction_begins_the_turn_of_the_user(model: Model) -> None:
    text = default_instruction(model, ("calm", "odd", "rude"))
    assert text == "<|turn|>user\nWhich label fits this message: calm, odd or rude?\nMessage: "


def test_the_default_instruction_without_a_chat_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "meta", lambda _self, _key: "")
    assert default_instruction(model, ("no", "yes")) == "Which label fits this message: no or yes?\nMessage: "


def test_the_default_instruction_is_used(run: Trainer, small: Sample, model: Model) -> None:
    found = run(small, instruction=None, boundaries=None)
    assert found.pack.instruction == default_instruction(model, ("money", "rise"))
    tried = {trial["layer"] for trial in found.pack.report["training"]["trials"]}
    assert tried == {*candidate_boundaries(7), 7}


# ── guarantees ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_few_messages_cannot_show_is_not_certified(run: Trainer) -> None:
    """63 messages, without one error, say too little for a bound of 0.01."""
    found = run(sample_of(140, WORDS_AND_ORDER), guarantee=Guarantee("depth", 0.01))
    certificate = found.pack.report["certificate"]
    assert not certificate["holds"]
    assert certificate["p_value"] > 0.05
    assert "not certified" in certificate["sentence"]
    json.dumps(found.pack.report, allow_nan=False)  # as every reader of JSON takes it
    assert found.pack.report["test"]["cascade"]["left_at"]["before the network"] == 0
    outcome, _ = apply(found.settings[0], found.test, found.pack.weights)
    assert (outcome.stages == len(found.pack.layers) - 1).all()


@pytest.mark.parametrize("kind", ["depth", "error"])
def test_as_many_messages_as_are_said_to_be_needed_are_enough_without_errors(
    run: Trainer, small: Sample, kind: Any
) -> None:
    """Otherwise the advice to bring more of them would be of no use."""
    guarantee = Guarantee(kind, 0.05)
    needed = run(small, guarantee=guarantee).pack.report["certificate"]["messages_needed"]
    for n, holds in ((needed, True), (needed - 1, False)):
        _, certificate = certify(settings_of(0.5), sure_evidence(n), np.ones(2, np.float32), guarantee)
        assert certificate.holds == holds


def test_an_error_rate_is_kept_by_abstaining(run: Trainer) -> None:
    """Of half the messages nobody can know the label, and of these the pack has to keep silent."""
    plain, unclear = noise(350, wrong=0.0), noise(350, ("tails", "heads"))
    rows = [*plain.rows, *(Row(f"no idea {row.text.split(' ', 1)[1]}", row.label) for row in unclear.rows)]
    found = run(sample_rows(rows, 700, 0), full_depth=False, guarantee=Guarantee("error", 0.1))
    cascade = found.pack.report["test"]["cascade"]
    assert found.pack.report["certificate"]["holds"]
    assert found.pack.unsure_below > 0.5
    assert 0.3 < cascade["unsure"] < 0.7
    _, answered = apply(Setting(found.pack.thresholds, found.pack.unsure_below, 0.0), found.test, found.pack.weights)
    assert found.pack.report["certificate"]["messages"] < len(found.calibration.truth)
    assert answered.mean() == pytest.approx(1 - cascade["unsure"], abs=1e-4)


def test_an_error_rate_that_cannot_be_kept_is_not_certified(run: Trainer) -> None:
    found = run(noise(500, wrong=0.5), full_depth=False, guarantee=Guarantee("error", 0.05))
    assert not found.pack.report["certificate"]["holds"]


def test_an_error_rate_that_all_messages_keep_is_certified_though_none_of_them_is_sure(run: Trainer) -> None:
    """A tenth of the labels is wrong, so that no probability gets near to 1: that is no reason to certify nothing."""
    found = run(noise(700, wrong=0.1), full_depth=False, guarantee=Guarantee("error", 0.3))
    assert found.test.stages[-1].max() < 0.99
    assert found.pack.report["certificate"]["holds"]
    assert found.pack.report["test"]["cascade"]["unsure"] < 0.2


def test_an_easy_task_needs_no_abstention(run: Trainer, sample: Sample) -> None:
    found = run(sample, guarantee=Guarantee("error", 0.1))
    assert found.pack.unsure_below == 0
    assert found.pack.report["certificate"]["holds"]
    assert found.pack.report["certificate"]["kind"] == "error rate"
    assert found.pack.report["test"]["cascade"]["left_at"]["before the network"] > 0.1


def test_no_setting_is_bolder_than_the_harm_allowed(run: Trainer, small: Sample) -> None:
    levels = [setting.level for setting in run(small, max_harm=0.001).settings]
    assert math.isnan(levels[0])
    assert levels[1:] == [0.0001, 0.00025, 0.0005, 0.00075, 0.001]
    none = run(small, max_harm=0.0).settings
    assert len(none) == 1
    assert (none[0].thresholds[:-1] == NEVER).all()


# ── certify ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def two_labels(first: Sequence[float]) -> Floats:
    """Probabilities (n, 2) from those of label 0."""
    column = np.array(first, np.float32)
    return np.stack([column, 1 - column], axis=1)


def evidence_of(early: Sequence[float], late: Sequence[float], truth: Sequence[int]) -> Evidence:
    n = len(truth)
    stages = [two_labels(early), two_labels(late)]
    free = np.zeros(n, np.bool_)
    return Evidence(stages, stages[-1], None, [free, free], None, np.array(truth, np.int64))


def sure_evidence(n: int) -> Evidence:
    return evidence_of([0.9] * n, [0.95] * n, [0] * n)


def settings_of(*thresholds: float, unsure_below: float = 0.0) -> list[Setting]:
    last = np.zeros(2, np.float32)
    return [
        Setting(np.stack([np.full(2, t, np.float32), last]), unsure_below, float(i)) for i, t in enumerate(thresholds)
    ]


def test_the_boldest_setting_that_is_certified_is_chosen() -> None:
    # surer than 0.8: right; less sure: wrong, and right at the last stage
    n = 1000
    early = [0.95] * (n // 2) + [0.85] * (n // 4) + [0.6] * (n // 4)
    evidence = evidence_of(early, [0.9] * n, [0] * (3 * n // 4) + [1] * (n // 4))
    evidence.stages[1][3 * n // 4 :] = [0.1, 0.9]
    settings = settings_of(NEVER, 0.9, 0.8, 0.5)
    weights = np.ones(2, np.float32)
    chosen, certificate = certify(settings, evidence, weights, Guarantee("depth", 0.02))
    assert chosen == 2
    assert certificate.holds
    assert (certificate.n, certificate.risk) == (n, 0.0)
    chosen, certificate = certify(settings, evidence, weights, Guarantee("depth", 0.4))
    assert chosen == 3
    assert certificate.risk == 0.25
    chosen, certificate = certify(settings, evidence, weights, Guarantee("error", 0.02))
    assert chosen == 2
    assert certificate.p_value == binomial_p_value(0, n, 0.02)


def test_nothing_behind_a_setting_that_fails_is_chosen() -> None:
    n = 400
    evidence = evidence_of([0.9] * n, [0.9] * (n // 2) + [0.1] * (n // 2), [0] * n)
    # the second setting lets nobody go, so that half the labels are wrong; the third would be right again
    chosen, certificate = certify(
        settings_of(0.5, NEVER, 0.5), evidence, np.ones(2, np.float32), Guarantee("error", 0.1)
    )
    assert chosen == 0
    assert certificate.holds


def test_the_safest_setting_stands_in_where_none_is_certified() -> None:
    chosen, certificate = certify(
        settings_of(NEVER, 0.5), sure_evidence(5), np.ones(2, np.float32), Guarantee("error", 0.1)
    )
    assert chosen == 0
    assert not certificate.holds
    assert certificate.n == 5


def test_only_answers_count_for_an_error_rate() -> None:
    evidence = evidence_of([0.9] * 300 + [0.6] * 100, [0.9] * 300 + [0.6] * 100, [0] * 300 + [1] * 100)
    strict, open_to_all = settings_of(NEVER, unsure_below=0.8)[0], settings_of(NEVER)[0]
    weights = np.ones(2, np.float32)
    chosen, certificate = certify([strict, open_to_all], evidence, weights, Guarantee("error", 0.05))
    assert chosen == 0
    assert (certificate.n, certificate.risk, certificate.holds) == (300, 0.0, True)


def test_gains_over_full_depth_make_up_for_losses() -> None:
    n = 600
    # leaving early is wrong where the whole model is right in 5%, and the other way round in 10%
    truth = [0] * n
    early = [0.4] * 30 + [0.9] * 570
    late = [0.9] * 540 + [0.4] * 60
    shuffled = np.random.default_rng(0).permutation(n)
    evidence = evidence_of(early, late, truth).part(shuffled)
    chosen, certificate = certify(settings_of(NEVER, 0.5), evidence, np.ones(2, np.float32), Guarantee("depth", 0.1))
    assert chosen == 1
    assert certificate.risk == pytest.approx(-0.05)


def test_a_file_sorted_by_label_gets_no_certificate_that_it_would_not_get_mixed() -> None:
    """Bets on one message after the other are won on the first label, whatever comes behind it."""
    n = 1500
    # all of label 0 is kept by leaving early; of label 1, one in 20 is lost: 2.5% of all, for a bound of 1%
    truth = [0] * n + [1] * n
    early = [0.9] * n + ([0.9] + [0.1] * 19) * (n // 20)
    late = [0.9] * n + [0.1] * n
    evidence = evidence_of(early, late, truth)
    losses = np.r_[np.zeros(n), np.tile([1.0] + [0.0] * 19, n // 20)]
    assert betting_p_value(losses, 0.01, -1.0, 1.0) <= 0.05  # in this order it would seem proven
    settings = settings_of(NEVER, 0.5)
    chosen, certificate = certify(settings, evidence, np.ones(2, np.float32), Guarantee("depth", 0.01))
    assert chosen == 0
    assert certificate.holds
