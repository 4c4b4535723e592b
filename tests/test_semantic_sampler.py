"""Answers drawn side by side: from the right distribution, the prompt computed once, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import PromptError, UnsupportedModelError, UsageError
from edge_runtime.native import ContextOptions, Model
from edge_runtime.semantic import (
    AnswerSampler,
    ByMeaning,
    ConfidenceSettings,
    Entailment,
    SampleSettings,
    estimate,
)
from edge_runtime.semantic.draw import Drawn, draw_token
from edge_runtime.slices import Slice
from edge_runtime.templates import ChatTemplate, Message
from edge_runtime.types import Floats

from .conftest import TinyMaker

OPTIONS = ContextOptions(n_ctx=128, n_batch=16, n_threads=1)
SETTINGS = SampleSettings(temperature=1.0, max_tokens=6, seed=5)
PROMPT = [(i * 7) % 60 + 5 for i in range(40)]


@pytest.fixture(scope="module")
def model(tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path("llama"))) as opened:
        yield opened


class _Letters:
    """Stands in for a vocabulary, which the tiny model has not: every token is a letter, and none ends an answer."""

    def is_end(self, token: int) -> bool:
        return False

    def piece(self, token: int) -> bytes:
        return b"x"


@pytest.fixture
def sturdy_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that hardly depend on the logits' last bits, which differ between batches of other shapes."""

    def draw(logits: Floats, temperature: float, uniform: float) -> Drawn:
        noise = np.random.default_rng(int(uniform * 2**53)).gumbel(size=len(logits))
        return Drawn(int((logits + noise).argmax()), -1.0, 1.0)

    monkeypatch.setattr("edge_runtime.semantic.sampler.draw_token", draw)


def opened(model: Model, n_parallel: int) -> AnswerSampler:
    sampler = AnswerSampler(model, n_parallel, OPTIONS)
    sampler._model = _Letters()  # type: ignore[assignment]
    return sampler


@pytest.fixture
def sampler(model: Model) -> Iterator[AnswerSampler]:
    with opened(model, 4) as sampler:
        yield sampler


# ── one token ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25, 1e-30], np.float32))
    for temperature, expected in ((1.0, [0.5, 0.25, 0.25, 0]), (0.5, [4 / 6, 1 / 6, 1 / 6, 0])):
        tokens = [draw_token(logits, temperature, (i + 0.5) / 1200).token for i in range(1200)]
        assert np.bincount(tokens, minlength=4) / 1200 == pytest.approx(np.array(expected), abs=0.002)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(n: int) -> None:
    probabilities = (np.arange(n) % 7 + 1) / (np.arange(n) % 7 + 1).sum()
    edges = probabilities.cumsum()
    for token in range(n):  # in the middle of each token's share
        uniform = float(edges[token] - probabilities[token] / 2)
        assert draw_token(np.log(probabilities).astype(np.float32), 1.0, uniform).token == token


def test_likelihoods_are_the_models_own_at_any_temperature() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32)) + 100
    for temperature in (0.3, 1.0, 2.0):
        drawn = draw_token(logits, temperature, 0.0)
        assert drawn.log_likelihood == pytest.approx(np.log(0.5), abs=1e-5)
        assert drawn.entropy == pytest.approx(1.5 * np.log(2), abs=1e-5)


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    assert {draw_token(logits, 1.0, uniform).token for uniform in (1e-9, 0.5, 1 - 2**-53)} == {1}
    assert draw_token(logits, 1.0, 0.5).entropy == pytest.approx(0.0, abs=1e-6)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def alone(model: Model, prompt: list[int], answer: tuple[int, ...]) -> list[Floats]:
    """Logits before each token of an answer, from a context of one sequence, token by token."""
    piece = Slice(model, 0, model.n_layer, OPTIONS)
    found = []
    for position, token in enumerate([*prompt, *answer[:-1]]):
        piece.decode_tokens([token], position, want=[0])
        if position >= len(prompt) - 1:
            found.append(piece.logits(0).copy())
    piece.close()
    return found


def test_answers_side_by_side_are_those_of_the_model(model: Model, sampler: AnswerSampler) -> None:
    samples = sampler.draw(PROMPT, range(4), SETTINGS)
    assert len({sample.tokens for sample in samples}) > 1
    for sample in samples:
        # a sum's last bit can make a draw fall on a token's neighbour, so the tokens are taken as they are
        rows = np.array(alone(model, PROMPT, sample.tokens), np.float64)
        logs = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
        likely = logs[np.arange(len(rows)), sample.tokens]
        assert likely == pytest.approx(np.array(sample.log_likelihoods), abs=0.02)
        assert -(np.exp(logs) * logs).sum(axis=1).mean() == pytest.approx(sample.mean_entropy, abs=0.02)
        assert sample.log_likelihood == pytest.approx(sum(sample.log_likelihoods))
        assert sample.mean_log_likelihood == pytest.approx(sample.log_likelihood / len(sample.tokens))


def test_the_prompt_is_computed_once(sampler: AnswerSampler) -> None:
    first = sampler.draw(PROMPT, range(4), SETTINGS)
    generated = sum(len(sample.tokens) - 1 for sample in first)
    assert sampler.rows == len(PROMPT) + generated
    second = sampler.draw(PROMPT, range(4, 8), SETTINGS)
    generated += sum(len(sample.tokens) - 1 for sample in second)
    assert sampler.rows == len(PROMPT) + generated
    rows = sampler.rows
    sampler.next_logits([*PROMPT[:30], 9, 9])
    assert sampler.rows == rows + 2  # thirty tokens in common


@pytest.mark.usefixtures("sturdy_draws")
def test_what_was_drawn_before_makes_no_difference(model: Model, sampler: AnswerSampler) -> None:
    expected = sampler.draw(PROMPT, range(4), SETTINGS)
    sampler.draw(PROMPT[:35], range(2), SETTINGS)
    sampler.next_logits(PROMPT[10:])
    assert [s.tokens for s in sampler.draw(PROMPT, range(4), SETTINGS)] == [s.tokens for s in expected]
    with opened(model, 2) as other:
        halves = [*other.draw(PROMPT, range(2), SETTINGS), *other.draw(PROMPT, range(2, 4), SETTINGS)]
    assert [s.tokens for s in halves] == [s.tokens for s in expected]
    different = sampler.draw(PROMPT, range(4), replace(SETTINGS, seed=6))
    assert [s.tokens for s in different] != [s.tokens for s in expected]


@pytest.mark.usefixtures("sturdy_draws")
def test_it_goes_on_after_a_failure(sampler: AnswerSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampler.draw(PROMPT, range(4), SETTINGS)
    decode = Slice.decode_tokens
    for fail_at in (1, 3, 4, 6):  # 35 tokens of a prompt are three batches, and then come the answers
        calls = 0

        def failing(*arguments: Any, fail_at: int = fail_at, **named: Any) -> None:
            nonlocal calls
            calls += 1
            decode(*arguments, **named)
            if calls == fail_at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Slice, "decode_tokens", failing)
            with pytest.raises(KeyboardInterrupt):
                sampler.draw(PROMPT[5:], range(4), SETTINGS)
        assert [s.tokens for s in sampler.draw(PROMPT, range(4), SETTINGS)] == [s.tokens for s in expected]


def test_a_prompt_that_leaves_no_room(sampler: AnswerSampler) -> None:
    longest = [5] * (128 - 4 * 5)  # an answer's last token is not computed
    assert len(sampler.draw(longest, range(4), SETTINGS)) == 4
    with pytest.raises(PromptError, match="context of 129"):
        sampler.draw([*longest, 5], range(4), SETTINGS)
    with pytest.raises(PromptError, match="empty"):
        sampler.draw([], range(4), SETTINGS)
    with pytest.raises(PromptError):
        sampler.next_logits([5] * 129)
    with pytest.raises(UsageError, match="5 answers"):
        sampler.draw(PROMPT, range(5), SETTINGS)


def test_what_cannot_be_opened_or_drawn(model: Model) -> None:
    with pytest.raises(UsageError, match="no room"):
        AnswerSampler(model, 32, OPTIONS)
    for wrong in ({"temperature": 0.0}, {"temperature": float("nan")}, {"max_tokens": 0}, {"seed": -1}):
        with pytest.raises(UsageError):
            SampleSettings(**wrong)  # type: ignore[arg-type]


class _Written:
    """A model that ends at token 0, and stands for a text at each other."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self.pieces = pieces

    def is_end(self, token: int) -> bool:
        return token == 0

    def piece(self, token: int) -> bytes:
        return self.pieces[token]


@pytest.mark.parametrize(
    ("pieces", "text", "ended"),
    [
        ([b"\n", b" Par", b"is.", b"\nIt"], "Paris.", True),
        ([b"\xe6\x9d", b"\xb1", None], "東", True),
        ([b"\xe6\x9d", None], "", True),
        ([None], "", True),
        ([b" \n", None], "", True),
        ([b"a", b"b", b"c", b"d", b"e", b"f"], "abcdef", False),
    ],
)
def test_an_answer_ends_with_its_line(
    sampler: AnswerSampler, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes | None], text: str, ended: bool
) -> None:
    tokens = [0 if piece is None else i + 1 for i, piece in enumerate(pieces)]
    written = iter(tokens)

    def draw(logits: Floats, temperature: float, uniform: float) -> object:
        return replace(draw_token(logits, temperature, uniform), token=next(written))

    monkeypatch.setattr("edge_runtime.semantic.sampler.draw_token", draw)
    monkeypatch.setattr(sampler, "_model", _Written({i + 1: piece or b"" for i, piece in enumerate(pieces)}))
    (sample,) = sampler.draw(PROMPT, [0], SETTINGS)
    assert (sample.text, sample.ended, sample.tokens) == (text, ended, tuple(tokens))


# ── entailment ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Words:
    """A vocabulary in which each of these words is a token."""

    def __init__(self, words: str) -> None:
        self.words = words.split()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [self.words.index(text.strip())] if text.strip() in self.words else [len(self.words)]


def test_entailment_is_asked_both_ways() -> None:
    asked: list[str] = []

    def prompt_tokens(message: str) -> list[int]:
        asked.append(message)
        return [len(asked) - 1]

    def next_logits(prompt: list[int]) -> Floats:
        _, _, given, other, _ = asked[prompt[0]].splitlines()
        yes = 0.9 if given.endswith("Paris, France") else 0.2 if other.endswith("Lyon") else 0.6
        return np.log(np.array([yes, 1 - yes, 5.0, 5.0], np.float32))

    judge = Entailment(_Words("Yes No"), prompt_tokens, next_logits)  # type: ignore[arg-type]
    similarity = judge.about("Where?")
    near = similarity(["Paris, France", "Paris", "Lyon"])
    assert near == pytest.approx(np.array([[1, 0.6, 0.6], [0.6, 1, 0.2], [0.6, 0.2, 1]]), abs=1e-5)
    assert len(asked) == 6
    np.testing.assert_array_equal(similarity(["Lyon", "Paris"]), near[:0:-1, :0:-1])
    assert len(asked) == 6  # no pair is asked about twice
    assert ByMeaning(judge.about("Where?"), 0.5).groups(["Lyon", "Paris", "Paris, France"]) == [[0, 2], [1]]


def test_yes_and_no_must_differ() -> None:
    with pytest.raises(UnsupportedModelError):
        Entailment(_Words("Maybe"), list, lambda _prompt: np.zeros(2, np.float32))  # type: ignore[arg-type]


# ── the demo model ──────────────────────────────────────────────────────────────────────────────────────────────────


def chat_tokens(model: Model, question: str) -> list[int]:
    template = ChatTemplate.of(model)
    assert template is not None
    rendered = template.render([Message("user", question)])
    return model.tokenize(rendered, add_special=False, parse_special=True)


@pytest.mark.model
def test_eight_samples_share_the_prompt(demo_model: Model) -> None:
    prompt = chat_tokens(demo_model, "What is the capital of France?")
    settings = ConfidenceSettings(step=8, sampling=SampleSettings(temperature=0.7, max_tokens=12, seed=1))
    with AnswerSampler(demo_model, 8, replace(OPTIONS, n_ctx=512, n_batch=64)) as sampler:
        first = estimate(sampler, prompt, settings)
        again = estimate(sampler, prompt, settings)
        other = estimate(sampler, prompt, replace(settings, sampling=replace(settings.sampling, seed=2)))
    n_answers = sum(len(sample.tokens) - 1 for sample in first.samples)
    assert len(first.samples) == 8
    assert first.cost.rows == len(prompt) + n_answers
    assert again.cost.rows == n_answers
    assert again.samples == first.samples
    assert again.clusters == first.clusters
    assert [s.tokens for s in other.samples] != [s.tokens for s in first.samples]
    assert any("Paris" in sample.text for sample in (*first.samples, *other.samples))


@pytest.mark.model
def test_the_demo_model_can_be_asked_for_entailment(demo_model: Model) -> None:
    with AnswerSampler(demo_model, 1, replace(OPTIONS, n_ctx=256, n_batch=64)) as sampler:
        judge = Entailment(demo_model, lambda text: chat_tokens(demo_model, text), sampler.next_logits)
        near = judge.about("What is the capital of France?")(["Paris", "It is Paris."])
    assert near.shape == (2, 2)
    assert near[0, 1] == near[1, 0]
    assert 0 < near[0, 1] < 1
