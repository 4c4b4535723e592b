"""The benchmark of semantic entropy: its scores and curves against values by hand, what it keeps, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bench import semantic_quality
from edge_runtime.bench.questions import BenchQuestion, Kind, questions
from edge_runtime.bench.semantic_answers import (
    GREEDY_TEMPERATURE,
    WORDINGS,
    Answered,
    AnswerPlan,
    Keeper,
    answer_all,
    prompt_of,
    spread_out,
)
from edge_runtime.bench.semantic_costs import (
    ALONE,
    ONE,
    SEVERAL,
    STOPPED,
    CostRig,
    Took,
    measure_encoder,
    measure_equal_lengths,
    measure_questions,
    summarise_costs,
)
from edge_runtime.bench.semantic_plot import draw_curves
from edge_runtime.bench.semantic_quality import (
    Judged,
    Score,
    Source,
    auroc_within,
    by_kind,
    compare,
    confidences,
    held_out_probe,
    rejection_curve,
    scores_of_support,
)
from edge_runtime.bench.semantic_run import QualityResult, RememberedEntailment, judge_all, remembered
from edge_runtime.bench.semantic_tables import (
    cost_lines,
    cost_verdicts,
    plain,
    quality_report,
    quality_verdicts,
)
from edge_runtime.errors import UsageError
from edge_runtime.native import ContextOptions, Model
from edge_runtime.semantic import ByForm, Sample, SampleSettings
from edge_runtime.types import Floats

from .conftest import ROOT, TinyMaker
from .encoder_helpers import need_libraries, write_lookup_encoder

ASKED = questions()
PLAN = AnswerPlan(samples=4, sampling=SampleSettings(0.5, 8, 1))


def floats(values: Sequence[float]) -> Floats:
    return np.array(values, np.float32)


def score(name: str, source: Source, values: Sequence[float]) -> Score:
    return Score(name, source, floats(values))


def sample(text: str, log_likelihood: float = -1.0) -> Sample:
    return Sample(text, (1, 2), (log_likelihood, log_likelihood), -log_likelihood, True)


# ── how good a score is ─────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_compared_by_auroc_and_ties_count_half() -> None:
    wrong = np.array([True, True, True, False, False] * 8)
    scores = [
        score("knows", Source.SAMPLES, [1, 1, 1, 0, 0] * 8),
        score("tied", Source.SAMPLES, [2] * 40),
        score("some", Source.ANSWER, [3, 2, 1, 2, 0] * 8),  # of six pairs four are right and one is a tie
        score("worst", Source.ANSWER, [0, 0, 0, 1, 1] * 8),
    ]
    found = {each.name: each for each in compare(scores, wrong, 50)}
    assert [round(found[name].auroc.value, 6) for name in found] == [1.0, 0.5, 0.75, 0.0]
    assert (found["knows"].auroc.low, found["knows"].auroc.high) == (1.0, 1.0)
    assert (found["tied"].auroc.low, found["tied"].auroc.high) == (0.5, 0.5)
    assert found["some"].auroc.low < 0.75 < found["some"].auroc.high
    assert found["knows"].over_single.value == pytest.approx(0.25)
    assert (found["some"].over_single.low, found["some"].over_single.high) == (0.0, 0.0)
    assert found["knows"].accuracy_at == pytest.approx((1.0, 0.8, 0.5333, 0.4), abs=1e-3)
    assert found["tied"].accuracy_at == pytest.approx((0.4,) * 4)
    assert found["knows"].halves == (1.0, 1.0)


def test_halves_are_every_other_question() -> None:
    wrong = np.array([True, True, False, False] * 5)
    (found,) = compare([score("first half only", Source.ANSWER, [1, 0, 0, 1] * 5)], wrong, 10)
    assert found.halves == (1.0, 0.0)


def test_an_interval_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    wrong = np.arange(400) < 200
    values = rng.normal(size=400) + wrong  # AUROC Φ(1/√2) = 0.760
    (found,) = compare([Score("normal", Source.ANSWER, values.astype(np.float32))], wrong, 1000)
    a = found.auroc.value
    assert found.auroc.low < 0.760 < found.auroc.high
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)  # Hanley and McNeil 1982
    error = math.sqrt((a * (1 - a) + 199 * (q1 - a * a) + 199 * (q2 - a * a)) / 200**2)
    assert (found.auroc.high - found.auroc.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.15)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=5))
def test_a_rejection_curve_is_the_mean_over_orders_of_ties(questions_: list[tuple[int, bool]]) -> None:
    values, wrong = floats([value for value, _ in questions_]), np.array([is_wrong for _, is_wrong in questions_])
    orders = [
        order
        for order in itertools.permutations(range(len(wrong)))
        if all(values[a] <= values[b] for a, b in itertools.pairwise(order))
    ]
    sums = np.mean([np.cumsum(~wrong[list(order)]) for order in orders], axis=0)
    curve = rejection_curve(values, wrong)
    assert curve == pytest.approx(sums / np.arange(1, len(wrong) + 1))
    assert curve[-1] == pytest.approx(1 - wrong.mean())


def test_of_a_score_that_knows_all_the_curve_never_rises() -> None:
    wrong = np.random.default_rng(1).random(50) < 0.6
    curve = rejection_curve(wrong.astype(np.float32), wrong)
    assert (np.diff(curve) <= 0).all()
    assert (curve[: int((~wrong).sum())] == 1).all()
    assert curve[-1] == pytest.approx(1 - wrong.mean())


def test_within_kinds_no_kind_can_be_told() -> None:
    kinds = [Kind.FACT] * 4 + [Kind.ARITHMETIC] * 4
    wrong = np.array([False, False, False, True, True, True, True, False])
    told = score("kind", Source.SAMPLES, [0] * 4 + [1] * 4)
    rows = by_kind(kinds, wrong, told.values, [told])
    assert [(row.kind, row.n, row.accuracy) for row in rows] == [
        ("fact", 4, 0.75),
        ("arithmetic", 4, 0.25),
        ("within kinds", 8, 0.5),
    ]
    assert [row.auroc[0] for row in rows] == [0.5, 0.5, 0.5]
    assert rows[1].mean_entropy == 1.0
    groups = np.array(list("aaabbbbb"))
    values = floats([9, 5, 5, 1, 1, 1, 3, 3])  # two pairs of the first group are as they should be, none of six others
    wrong = np.array([True, False, False, True, True, True, False, False])
    assert auroc_within(groups, wrong, values) == 0.25
    assert math.isnan(auroc_within(np.array(["a"] * 2), np.array([True, True]), told.values[:2]))


# ── the probe ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_probe_is_never_fitted_to_the_question_it_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        """Knows the questions it was fitted to, and says how many of those it is asked about they are."""

        def __init__(self, states: Floats, entropies: Floats, layer: int, *, seed: int) -> None:
            assert layer == 3
            assert (entropies == 10 * states[:, 0]).all()
            self.known = set(states[:, 0].tolist())

        def predict(self, states: Floats) -> Floats:
            asked = states[:, 0].tolist()
            assert len(self.known) + len(asked) == 47
            return floats([100 * (number in self.known) + number for number in asked])

    monkeypatch.setattr(semantic_quality, "fit_probe", Memory)
    numbers = floats(range(47))
    found = held_out_probe(np.stack([numbers, numbers], axis=1), 10 * numbers, 3)
    assert found.tolist() == numbers.tolist()


def test_a_probe_finds_what_is_in_the_states() -> None:
    rng = np.random.default_rng(2)
    states = rng.normal(size=(120, 16)).astype(np.float32)
    entropies = (states[:, 4] > 0).astype(np.float32)
    found = held_out_probe(states, entropies, 1)
    assert found[entropies == 1].mean() > found[entropies == 0].mean() + 0.4
    with pytest.raises(UsageError):
        held_out_probe(states[:15], entropies[:15], 1)


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_some_questions_are_of_every_kind() -> None:
    assert Counter(q.kind for q in spread_out(ASKED, 30)) == Counter(
        {Kind.FACT: 9, Kind.ARITHMETIC: 6, Kind.YES_NO: 6, Kind.TRANSLATION: 5, Kind.UNANSWERABLE: 4}
    )
    assert spread_out(ASKED, 300) == ASKED
    for n in (1, 301):
        with pytest.raises(UsageError):
            spread_out(ASKED, n)


class _Letters:
    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [*text.encode(), int(add_special), int(parse_special)]


class _Template:
    def render(self, messages: Sequence[Any]) -> str:
        return "|".join(f"{m.role}:{m.content}" for m in messages)


def test_a_question_is_asked_in_each_wording() -> None:
    question, found = BenchQuestion(Kind.FACT, "Why?", ("so",)), {}
    for wording in WORDINGS:
        *text, special, parsed = prompt_of(question, wording, _Letters(), _Template())  # type: ignore[arg-type]
        found[wording] = bytes(text).decode()
        assert (special, parsed) == ((1, 0) if wording == "lines" else (0, 1))
    assert found["bare"] == "user:Why?"
    assert found["sentence"] == "user:Why? Answer in one short sentence."
    assert found["turns"].endswith("|assistant:I don't know|user:Why?")
    assert found["lines"].endswith("Answer: I don't know\n\nQuestion: Why?\nAnswer:")
    without = bytes(prompt_of(question, "words", _Letters(), None)[:-2]).decode()
    assert without == "Question: Why? Answer with a number or a few words only.\nAnswer:"
    yes_no = replace(question, kind=Kind.YES_NO)
    said = bytes(prompt_of(yes_no, "sentence", _Letters(), None)[:-2]).decode()
    assert said == "Question: Why? Answer in one short sentence that begins with yes or no.\nAnswer:"
    assert not any(q.text in found["turns"] for q in ASKED)


class Scripted:
    """A source that answers as the prompt, a question's number, says; counts, and fails where it should."""

    def __init__(self, fail_at: int = 10**9) -> None:
        self.rows, self.asked, self.fail_at = 0, [], fail_at  # type: ignore[var-annotated]

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        if settings.temperature == GREEDY_TEMPERATURE:
            self.asked.append(prompt[0])
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            return [sample(f"greedy ÿ {prompt[0]}", -0.1)]
        assert settings == PLAN.sampling
        return [sample(f"{prompt[0]}, {number}", -0.1 * (number + 1)) for number in numbers]


def number_of(question: BenchQuestion) -> list[int]:
    return [ASKED.index(question)]


@pytest.fixture
def model(tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    with Model(str(tiny_path("llama"))) as opened:
        yield opened


def test_answers_are_kept_and_an_interrupted_run_goes_on(model: Model, tmp_path: Path) -> None:
    path, asked = tmp_path / "new" / "answers.jsonl", ASKED[:5]
    with Keeper(path, PLAN, model) as keeper, pytest.raises(KeyboardInterrupt):
        answer_all(asked, Scripted(fail_at=4), number_of, PLAN, keeper)
    path.write_bytes(path.read_bytes()[:-9])  # the third one's line is cut short
    source = Scripted()
    with Keeper(path, PLAN, model) as keeper:
        assert keeper.n_known == 2
        found = answer_all(asked, source, number_of, PLAN, keeper)
    assert source.asked == [2, 3, 4]
    assert found == answer_all(asked, Scripted(), number_of, PLAN)
    with Keeper(path, PLAN, model) as keeper:
        source, steps = Scripted(), []
        assert answer_all(asked, source, number_of, PLAN, keeper, lambda: steps.append(1)) == found
    assert (source.asked, steps) == ([], [])
    assert [len(a.samples) for a in found] == [4] * 5


def test_a_file_cut_in_its_first_line_is_begun_anew(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Keeper(path, PLAN, model):
        first = path.read_bytes()
    path.write_bytes(first[:40])
    with Keeper(path, PLAN, model) as keeper:
        assert keeper.n_known == 0
    assert path.read_bytes() == first


def test_other_answers_are_not_taken_for_these(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Keeper(path, PLAN, model) as keeper:
        answer_all(ASKED[:1], Scripted(), number_of, PLAN, keeper)
    before = path.read_bytes()
    for plan, what in (
        (replace(PLAN, samples=5), "samples"),
        (replace(PLAN, wording="bare"), "wording"),
        (replace(PLAN, sampling=SampleSettings(0.6, 8, 1)), "temperature"),
    ):
        with pytest.raises(UsageError, match=f"otherwise: {what}"):
            Keeper(path, plan, model)
    assert path.read_bytes() == before
    for content in (b"no JSON\n", b"{}\n", b"[1]\n2\n", before + b'{"question": "?"}\n', b"\xff\n", b"my notes"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="no answers"):
            Keeper(path, PLAN, model)
        assert path.read_bytes() == content
    with pytest.raises(UsageError, match="cannot be kept"):
        Keeper(tmp_path, PLAN, model)


def test_plans_that_measure_nothing() -> None:
    for changes in ({"wording": "loud"}, {"samples": 1}):
        with pytest.raises(UsageError):
            replace(PLAN, **changes)


# ── from answers to tables ──────────────────────────────────────────────────────────────────────────────────────────


def answers_of(question: BenchQuestion, number: int) -> Answered:
    """Two right ones and then two of which all samples differ, and so on."""
    right = question.accepted[0] if question.accepted else "unknown"
    if number % 4 < 2:
        return Answered(question, sample(right, -0.5 - number % 7), (sample(right, -0.2),) * 8)
    others = tuple(sample(3 * letter, -0.2) for letter in "qwzxjkvy")
    return Answered(question, sample("qqq", -0.5 - number % 5), others)


@pytest.fixture(scope="module")
def judged() -> tuple[QualityResult, dict[str, Any]]:
    asked = spread_out(ASKED, 60)
    answered = [answers_of(question, i) for i, question in enumerate(asked)]
    states = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    states[:, 0] = np.arange(60) % 4 < 2
    return judge_all(answered, {"form": lambda _question: ByForm()}, "form", {4: states, 5: states[:, 1:]})


def test_scores_of_answers_that_tell(judged: tuple[QualityResult, dict[str, Any]]) -> None:
    result, curves = judged
    assert (result.questions, result.main) == (60, "semantic entropy, by form")
    assert result.drawn_when_stopping == 6.0  # four of those that agree, eight of the others
    assert [each.judged for each in result.judged] == [Judged.GREEDY, Judged.COMMON]
    for each in result.judged:
        by_name = {s.name: s for s in each.scores}
        assert each.accuracy == 0.5
        assert by_name[result.main].auroc.value == 1.0
        assert by_name["self-consistency, by form"].auroc.value == 1.0
        assert by_name["semantic entropy, by form, stopping early"].auroc.value == 1.0
        assert by_name["samples unlike the answer, by form"].auroc.value == 1.0
        assert by_name["probe of semantic entropy, layer 4"].auroc.value == 1.0
        assert by_name["probe of semantic entropy, layer 5"].auroc.value < 0.9
        assert each.numbers == {2: (1.0, 1.0), 4: (1.0, 1.0), 8: (1.0, 1.0)}
        assert each.kinds[-1].n == 60
    likelihood = next(s for s in result.judged[0].scores if s.name == "log-likelihood per token")
    assert 0.3 < likelihood.auroc.value < 0.7
    assert curves["best possible"].tolist() == curves[result.main].tolist()


def test_tables_say_all(judged: tuple[QualityResult, dict[str, Any]]) -> None:
    result, _ = judged
    text = "\n".join(quality_report(result))
    assert "| semantic entropy, by form | several answers | 1.000 [1.000, 1.000] |" in text
    assert "| fact | 18 | 56% |" in text
    assert "wanted ≥ 0.7: met" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for table in ("| score", "| kind", "| samples"):
        (start, *_) = (i for i, row in enumerate(rows) if row.startswith(table))
        assert rows[start].count("|") == rows[start + 1].count("|") == rows[start + 2].count("|")
    worse = "probe of semantic entropy, layer 5"
    assert "MISSED" in quality_verdicts(result.judged[0].scores, worse)[0]
    as_json = json.loads(json.dumps(plain(result), allow_nan=False))
    assert as_json["judged"][0]["judged"] == "greedy"
    assert as_json["judged"][0]["scores"][0]["auroc"]["value"] == 1.0


def test_what_is_not_defined_is_null_in_json() -> None:
    assert plain({"a": (math.nan, 1.5, math.inf), 2: None}) == {"a": [None, 1.5, None], "2": None}


def test_the_picture(judged: tuple[QualityResult, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "there" / "curves.png"
    draw_curves(judged[1], "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="--picture"):
        draw_curves(judged[1], "title", tmp_path)


def test_answers_of_which_none_or_all_are_right() -> None:
    answered = [answers_of(question, 2) for question in ASKED[:4]]
    with pytest.raises(UsageError, match="no answer is right"):
        judge_all(answered, {"form": lambda _question: ByForm()}, "form", {})
    answered = [answers_of(question, 1) for question in ASKED[:4]]
    with pytest.raises(UsageError, match="every answer is right"):
        judge_all(answered, {"form": lambda _question: ByForm()}, "form", {})


def test_too_few_questions_for_a_probe_leave_it_out() -> None:
    said: list[str] = []
    answered = [answers_of(question, i) for i, question in enumerate(ASKED[:6])]
    states = np.ones((6, 2), np.float32)
    found, _ = judge_all(answered, {"form": lambda _question: ByForm()}, "form", {2: states}, say=said.append)
    assert not any(s.source is Source.PROMPT for s in found.judged[0].scores)
    assert any("layer 2 is left out" in text for text in said)


def test_the_first_samples_are_what_fewer_would_have_been() -> None:
    texts = ("a", "a", "b", "a")
    answered = [Answered(ASKED[0], sample("a"), tuple(map(sample, texts)))]
    whole, half, stopped = (
        confidences(answered, lambda _question: ByForm(), n, stop_early=stop)[0]
        for n, stop in ((0, False), (2, False), (0, True))
    )
    assert whole.consistency == 0.75
    assert (half.entropy, len(half.samples)) == (0.0, 2)
    assert (stopped.entropy, len(stopped.samples), stopped.planned) == (0.0, 2, 4)


def test_samples_unlike_the_answer_are_counted() -> None:
    answered = [Answered(ASKED[0], sample("b"), tuple(map(sample, "aaba")))] * 2
    (found,) = scores_of_support(answered, [sample("The b."), sample("c")], lambda _question: ByForm(), "by form")
    assert (found.name, found.source) == ("samples unlike the answer, by form", Source.SAMPLES)
    assert found.values.tolist() == [0.75, 1.0]


def test_nothing_is_encoded_or_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []

    def encode(texts: list[str]) -> Floats:
        encoded.append(texts)
        return floats([[len(text), 1] for text in texts])

    known = remembered(encode)
    assert known(["a", "bb", "a"]).tolist() == [[1, 1], [2, 1], [1, 1]]
    assert known(["bb", "ccc"]).tolist() == [[2, 1], [3, 1]]
    known(["a"])
    assert encoded == [["a", "bb"], ["ccc"]]

    asked: list[str] = []

    class Words:
        def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            return [0 if text.strip().lower() == "yes" else 1]

    def next_logits(prompt: Sequence[int]) -> Floats:
        return floats([1.0, 0.0])

    judge = RememberedEntailment(Words(), lambda text: asked.append(text) or [1], next_logits)  # type: ignore[func-returns-value]
    first = judge.about("Why?")(["a", "b"])
    assert (judge.about("Why?")(["b", "a"]) == first).all()
    assert len(asked) == 2
    judge.about("Who?")(["a", "b"])
    assert len(asked) == 4


# ── costs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_costs_are_compared_repeat_by_repeat() -> None:
    found = summarise_costs(
        [[1, 2], [3]],
        {ONE: [Took(1.0, 5, 2.0), Took(2.0, 5, 4.0)], SEVERAL: [Took(2.0, 40, 3.0), Took(8.0, 40, None)]},
    )
    assert (found.prompts, found.prompt_tokens) == (2, 3)
    assert found.over_one[SEVERAL].median == 3.0
    assert found.ms[ONE].median == 1500
    assert found.energy_j == {ONE: 3.0, SEVERAL: None}
    text = "\n".join(cost_lines({"x": found}))
    assert f"| x | 3 | {SEVERAL} | 5000 (3500–6500) | 40 | 3.00 (2.50–3.50) | not known |" in text
    assert cost_verdicts({"x": found}) == [f"x: {SEVERAL} ÷ {ONE} 3.00, wanted ≤ 3.0: met"]


def test_all_sides_answer(tiny_path: TinyMaker) -> None:
    path = tiny_path("llama", n_layer=2, weights="Q8_0", tokenizer=True)
    options, settings = ContextOptions(n_ctx=256, n_batch=16, n_threads=1), SampleSettings(1.0, 5, 0)
    said: list[str] = []
    with CostRig(path, 4, options) as rig:
        found = measure_equal_lengths(rig, [5, 6, 7], settings, repeats=2, say=said.append)
        assert found.tokens == {ONE: 5, ALONE: 5, SEVERAL: 20}
        assert set(found.over_one) == {ALONE, SEVERAL}
        assert not rig.model.endless
        found = measure_questions(rig, [[5, 6, 7], [8, 9]], settings, repeats=1, say=said.append)
    assert found.prompts == 2
    assert found.tokens[ONE] <= 10
    assert found.tokens[STOPPED] <= found.tokens[SEVERAL] <= 40
    assert all(value is None for value in found.energy_j.values())
    assert "9 of 9" in said[2]


def test_what_an_encoder_takes(tmp_path: Path) -> None:
    need_libraries()
    from edge_runtime.encoder.session import SentenceEncoder

    path = write_lookup_encoder(tmp_path / "made")
    found = measure_encoder(SentenceEncoder(path), ["one", "two"], 2)
    assert (found.encoder, found.texts, found.loaded_before) == ("made/lookup.onnx", 2, False)
    assert found.rss_bytes > 0 < found.open_ms


# ── the script ──────────────────────────────────────────────────────────────────────────────────────────────────────


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench_semantic"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--questions", "1"), "no 1 questions"),
        (("--wording", "loud"), "no wording 'loud'"),
        (("--samples", "1"), "1 samples"),
        (("--temperature", "0"), "temperature 0"),
        (("--repeats", "0"), "--repeats 0"),
        (("--samples", "65"), "--samples 65"),
        (("--max-tokens", "0"), "0 tokens"),
        (("--threshold", "2"), "no cosine"),
        (("--only", "cost", "--model", "/no/such.gguf"), "/no/such.gguf"),
        (("--only", "quality", "--same-by", "meaning"), "edge-run models build"),
        (("--only", "encoder"), "edge-run models build"),
    ],
)
def test_what_the_script_refuses(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = script(*arguments, XDG_DATA_HOME=str(tmp_path), EDGE_RUNTIME_MODELS="")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_prints_one_object(tiny_path: TinyMaker, tmp_path: Path) -> None:
    model = tiny_path("llama", n_layer=1, n_embd=32, n_head=2, n_ff=32, weights="Q8_0", tokenizer=True)
    sizes = ["--samples", "2", "--max-tokens", "3", "--repeats", "1", "--threads", "1", "--questions", "2"]
    done = script("--model", str(model), "--only", "cost", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sampling"]["max_tokens"] == 3
    assert found["cost"]["3 tokens each"]["tokens"] == {ONE: 3, ALONE: 3, SEVERAL: 6}


@pytest.mark.model
def test_the_script_on_few_questions(tmp_path: Path) -> None:
    keep = tmp_path / "answers.jsonl"
    common = ["--only", "quality", "--questions", "20", "--samples", "2", "--max-tokens", "12", "--threads", "1"]
    common += ["--keep", str(keep)]
    first = script(*common, XDG_DATA_HOME=str(tmp_path), EDGE_RUNTIME_MODELS="")
    assert first.returncode == 0, first.stderr
    assert "answers are put together by form only" in first.stderr
    assert "edge-run models build" in first.stderr
    assert "questions: 20 of 20" in first.stderr
    assert "| semantic entropy, by form | several answers |" in first.stdout
    second = script(*common, "--json", XDG_DATA_HOME=str(tmp_path), EDGE_RUNTIME_MODELS="")
    assert "questions: " not in second.stderr
    assert json.loads(second.stdout)["quality"]["questions"] == 20
