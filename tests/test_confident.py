"""A runtime's confidence: drawn beside its conversation, by whatever puts answers together, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.confident import SAME_BY, Confident
from edge_runtime.energy.model import PowerModel
from edge_runtime.energy.request import Meter
from edge_runtime.errors import MemoryLimitError, PromptError, UnsupportedModelError, UsageError
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.memory import MachineMemory
from edge_runtime.semantic import ConfidenceSettings, SampleSettings, Stopped
from edge_runtime.sensors.reading import Reading
from edge_runtime.types import Floats, Mode

from .confidence_fakes import scripted
from .conftest import TinyMaker

QUESTION = "Where is Paris?"
SETTINGS = ConfidenceSettings(samples=6, step=3, agree=0, sampling=SampleSettings(max_tokens=5, seed=3))


@pytest.fixture
def options(tiny_path: TinyMaker) -> RunOptions:
    return RunOptions(str(tiny_path("llama", tokenizer=True)), Mode.FULL, n_ctx=256, n_batch=32, n_threads=1)


@pytest.fixture
def runtime(options: RunOptions) -> Iterator[Runtime]:
    with Runtime(options) as opened:
        yield opened


def by_first_letter(texts: list[str]) -> Floats:
    """A direction for each first letter."""
    return np.eye(256, dtype=np.float32)[[ord(text[:1] or "\0") % 256 for text in texts]]


# ── what is drawn ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_are_of_the_models_answer_and_a_seed_repeats_them(runtime: Runtime) -> None:
    with Confident(runtime, SETTINGS) as confident:
        found, again = confident.ask(QUESTION), confident.ask(QUESTION)
        other = Confident(runtime, replace(SETTINGS, sampling=replace(SETTINGS.sampling, seed=4)))
        elsewhere = other.ask(QUESTION)
        other.close()
    assert len(found.samples) == found.planned == 6
    assert found.stopped is Stopped.ALL
    assert [s.tokens for s in again.samples] == [s.tokens for s in found.samples]
    assert [s.tokens for s in elsewhere.samples] != [s.tokens for s in found.samples]
    assert found.cost.prompt_tokens > len(QUESTION)  # bytes, and the template's
    assert all(1 <= len(sample.tokens) <= 5 for sample in found.samples)


def test_the_prompt_is_computed_once_and_all_rows_are_counted(runtime: Runtime) -> None:
    with Confident(runtime, SETTINGS) as confident:
        found, again = confident.ask(QUESTION), confident.ask(QUESTION)
    n_answers = sum(len(sample.tokens) - 1 for sample in found.samples)
    assert found.cost.rows == found.cost.prompt_tokens + n_answers
    assert again.cost.rows == n_answers


def test_the_conversation_stays_as_it_is(runtime: Runtime) -> None:
    prompt = runtime.text_tokens("Once upon")
    before = [chunk.step.token for chunk in runtime.stream(prompt, 8)]
    with Confident(runtime, SETTINGS) as confident:
        confident.of(runtime.text_tokens("Once more and longer than before"), "")
    text = [*prompt, *before]
    after = [chunk.step.token for chunk in runtime.stream(text, 1)]
    assert runtime.summary.reused_tokens == len(text) - 1
    with Runtime(runtime.asked) as fresh:
        assert [chunk.step.token for chunk in fresh.stream(text, 1)] == after


def test_a_longer_question_gets_a_larger_context(options: RunOptions) -> None:
    with Runtime(replace(options, n_ctx=600)) as runtime, Confident(runtime, SETTINGS) as confident:
        short, long = runtime.text_tokens("x"), runtime.text_tokens("x" * 400)
        first = confident.of(short, "")
        longer = confident.of(long, "")
        again = confident.of(short, "")
    assert longer.cost.rows == len(long) + sum(len(sample.tokens) - 1 for sample in longer.samples)
    assert [s.tokens for s in again.samples] == [s.tokens for s in first.samples]


def test_a_question_longer_than_the_context(runtime: Runtime) -> None:
    fits = [5] * (256 - 4)  # the last token of a sample is not computed
    with Confident(runtime, SETTINGS) as confident:
        confident.check(fits, QUESTION)
        with pytest.raises(PromptError, match="253 tokens long; with a sample of 5 it needs a context of 257"):
            confident.check([*fits, 5], QUESTION)
        with pytest.raises(PromptError, match="253 tokens long"):
            confident.of([*fits, 5], "")
        with pytest.raises(PromptError, match="empty"):
            confident.of([], "")
    # to compare two answers takes another question around it
    with Confident(runtime, SETTINGS, "entailment") as confident, pytest.raises(PromptError, match="sample of 1"):
        confident.check([5], QUESTION)


def test_memory_is_looked_at_before_a_context_is_opened(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with Confident(runtime, SETTINGS, note=notes.append) as confident:
        monkeypatch.setattr("edge_runtime.confident.machine_memory", lambda: MachineMemory(2**10, 2**10))
        with pytest.raises(MemoryLimitError, match="samples need"):
            confident.ask(QUESTION)
        monkeypatch.setattr("edge_runtime.confident.machine_memory", lambda: MachineMemory(2**40, 2**10))
        confident.ask(QUESTION)
        confident.ask(QUESTION)
    assert len(notes) == 1
    assert "expect swapping" in notes[0]


def test_a_model_that_thinks_aloud_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["<think>"] * 6)
    with Confident(runtime, SETTINGS) as confident, pytest.raises(UnsupportedModelError, match="thinks aloud"):
        confident.ask(QUESTION)


# ── which mean the same ─────────────────────────────────────────────────────────────────────────────────────────────

ANSWERS = ["In France", "France.", "in france!", "Texas", "It is in Italy", "In France"]


def test_by_form_and_by_meaning(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ANSWERS)
    with Confident(runtime, SETTINGS) as by_form:
        found = by_form.ask(QUESTION)
    assert [cluster.members for cluster in found.clusters] == [(0, 2, 5), (1,), (3,), (4,)]
    with Confident(runtime, SETTINGS, "meaning", by_first_letter) as by_meaning:
        found = by_meaning.ask(QUESTION)
    assert [cluster.members for cluster in found.clusters] == [(0, 2, 4, 5), (1,), (3,)]


def test_entailment_asks_the_model_itself_and_counts_that(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["Paris", "Lyon", "Paris", "Rome", "paris", "Lyon"])
    with Confident(runtime, SETTINGS, "entailment") as confident:
        found = confident.ask("Where?")
        again = confident.ask("Where?")
    # logits are all the same, so that every answer follows from every other
    assert len(found.clusters) == 1
    assert found.cost.rows == 6 * 2 + 3 * 2  # and no pair of answers is asked about twice
    assert again.cost.rows == 6 * 2


def test_the_tiny_model_can_be_asked_for_entailment(options: RunOptions) -> None:
    with (
        Runtime(replace(options, n_ctx=600)) as runtime,
        Confident(runtime, replace(SETTINGS, samples=3), "entailment") as confident,
    ):
        found = confident.ask("x")
    pairs = len({sample.text for sample in found.samples})
    assert found.cost.rows > found.cost.prompt_tokens + 100 * (pairs > 1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("in France.\nIt is the capital.", True),
        ("  \n IN FRANCE", True),
        ("France", False),
        ("", False),
    ],
)
def test_whether_the_answer_says_the_same(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, answer: str, expected: bool
) -> None:
    scripted(monkeypatch, ANSWERS)
    with Confident(runtime, SETTINGS) as confident:
        found = confident.ask(QUESTION)
        assert confident.agrees(found, QUESTION, answer) == expected


def test_of_equally_common_answers_each_will_do(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["France", "Texas", "France", "Texas", "Rome", "Lyon"])
    with Confident(runtime, SETTINGS) as confident:
        found = confident.ask(QUESTION)
        assert [confident.agrees(found, QUESTION, text) for text in ("France", "Texas", "Rome")] == [True, True, False]


# ── what it takes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_energy_by_the_meter(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["Paris", "Lyon"] * 3)

    def readings(since_s: float) -> list[Reading]:
        return [Reading(since_s + i, load=0.0) for i in range(60)]

    size_gb = runtime.header.file_bytes / 1e9
    found = []
    for model in (PowerModel(0.0, 0.0, 1.0), PowerModel(2.0, 1.0, 0.0)):
        with Confident(runtime, SETTINGS, meter=Meter(readings, model=model)) as confident:
            found.append(confident.ask(QUESTION).cost)
    traffic, static = found
    assert traffic.joules == pytest.approx(4 * size_gb)  # weights are read once per batch, here four times
    assert static.joules is not None
    assert static.joules >= 2 * static.ms / 1e3 > 0
    assert static.energy_source == "estimated"
    assert static.energy_covered == pytest.approx(1)


def test_energy_that_nobody_knows(runtime: Runtime) -> None:
    for meter in (None, Meter(lambda _since: [])):
        with Confident(runtime, SETTINGS, meter=meter) as confident:
            cost = confident.ask(QUESTION).cost
        assert (cost.joules, cost.energy_source, cost.energy_covered) == (None, None, None)


# ── what cannot be meant ────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_that_cannot_be_meant(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="one sample cannot agree"):
        Confident(runtime, ConfidenceSettings(samples=1))
    with pytest.raises(UsageError, match="by 'sense'") as failure:
        Confident(runtime, same_by="sense")
    assert all(name in failure.value.hint for name in SAME_BY)


# ── the demo model ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.model
def test_the_demo_model_is_surer_of_what_it_knows(demo_path: Path) -> None:
    scores = {}
    options = RunOptions(str(demo_path), Mode.FULL, n_ctx=256, n_threads=1)
    settings = ConfidenceSettings(samples=8, step=8, sampling=SampleSettings(max_tokens=12))
    with Runtime(options) as runtime, Confident(runtime, settings) as confident:
        for country in ("Japan", "Germany", "Vorenia", "my house"):
            prompt = f"Capital of France: Paris\nCapital of Italy: Rome\nCapital of Egypt: Cairo\nCapital of {country}:"
            found = confident.of(runtime.text_tokens(prompt), country)
            scores[country] = (found.score, found.answer)
    assert scores["Japan"] == (1.0, "Tokyo")
    assert scores["Germany"] == (1.0, "Berlin")
    assert max(scores[country][0] for country in ("Vorenia", "my house")) < 0.5
