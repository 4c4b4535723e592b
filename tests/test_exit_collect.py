"""Collected answers, states and distributions are those of a model run alone, whatever runs beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import EdgeError, ModelError, PromptError, UsageError
from edge_runtime.exits import collect as module
from edge_runtime.exits.collect import (
    CollectOptions,
    Collector,
    Prompt,
    collect,
    most_bytes,
    top_of,
)
from edge_runtime.exits.corpus import Array, Corpus
from edge_runtime.native import ContextOptions, Model
from edge_runtime.slices import close_slices, open_slices

from .conftest import TinyMaker

LAYERS = (2, 5)
OPTIONS = CollectOptions(LAYERS, max_tokens=12, top_k=8, n_parallel=5, n_threads=1)


@pytest.fixture(scope="module")
def model(tiny_path: TinyMaker) -> Iterator[Model]:
    with Model(str(tiny_path("llama", tokenizer=True, weights="Q8_0"))) as model:
        yield model


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Short and long ones (some longer than a batch), greedy and sampled, some of them texts to be read."""
    random = np.random.default_rng(1)
    return [
        Prompt(i, tuple(random.integers(5, 260, 3 + 7 * (i % 8)).tolist()), 0.9 if i % 2 else 0.0, answered=i % 5 == 4)
        for i in range(20)
    ]


def gather(model: Model, prompts: Sequence[Prompt], options: CollectOptions = OPTIONS) -> dict[str, Array]:
    with Collector(model, options, max(len(p.tokens) for p in prompts)) as collector:
        return collector.texts(prompts, lambda _rows, _texts: None)


@pytest.fixture(scope="module")
def found(model: Model, prompts: list[Prompt]) -> dict[str, Array]:
    return gather(model, prompts)


@pytest.fixture
def corpus(tmp_path: Path, model: Model, prompts: list[Prompt]) -> Corpus:
    return Corpus(tmp_path, {"options": OPTIONS.identity()})


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_PROMPTS", 8)


def ignore(_done: int, _total: int) -> None:
    pass


def alone(model: Model, tokens: Sequence[int]) -> tuple[list[Array], Array, Array]:
    """States at LAYERS, last states and logits of each row of a text, one row at a time in plain slices."""
    slices = open_slices(
        model, LAYERS, ContextOptions(n_ctx=256, n_threads=1, flash_attention=True), want_last_hidden=True
    )
    states: list[list[Array]] = [[] for _ in LAYERS]
    final, logits = [], []
    for position, token in enumerate(tokens):
        slices[0].decode_tokens([token], position)
        for level, piece in enumerate(slices[1:]):
            state = np.array(slices[level].hidden(1))
            states[level].append(state[0])
            piece.decode_states(state, position, [0] if piece.is_last else ())
        final.append(np.array(slices[-1].hidden(1)[0]))
        logits.append(np.array(slices[-1].logits(0)))
    close_slices(slices)
    return [np.stack(s) for s in states], np.stack(final), np.stack(logits)


def test_all_is_what_a_run_alone_gives(model: Model, prompts: list[Prompt], found: dict[str, Array]) -> None:
    targets = np.searchsorted(found["rows"], found["offsets"])
    for i, prompt in enumerate(prompts):
        part = slice(found["offsets"][i], found["offsets"][i + 1])
        tokens = found["tokens"][part].tolist()
        assert tuple(tokens[: len(prompt.tokens)]) == prompt.tokens
        states, final, logits = alone(model, tokens)
        for level, layer in enumerate(LAYERS):
            # a row's sums are the same in any batch: only the rounding to 16 bits is between them
            assert np.array_equal(found[f"layer_{layer}"][part], states[level].astype(np.float16))
        of_text = slice(targets[i], targets[i + 1])
        rows = found["rows"][of_text] - found["offsets"][i]
        first = 0 if prompt.answered else len(prompt.tokens) - 1
        assert rows.tolist() == list(range(first, len(tokens) - prompt.answered))
        assert np.array_equal(found["final"][of_text], final[rows].astype(np.float16))
        for ids, logp, row in zip(found["top_ids"][of_text], found["top_logp"][of_text], logits[rows], strict=True):
            expected = row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64))
            assert ids.tolist() == np.argsort(-row, kind="stable")[:8].tolist()
            assert np.allclose(logp, expected[ids], atol=5e-3, rtol=1e-3)  # 16 bits


def test_greedy_answers_are_the_likeliest_tokens(prompts: list[Prompt], found: dict[str, Array]) -> None:
    targets = np.searchsorted(found["rows"], found["offsets"])
    for i, prompt in enumerate(prompts):
        tokens = found["tokens"][found["offsets"][i] : found["offsets"][i + 1]]
        answer = tokens[len(prompt.tokens) :].tolist()
        likeliest = found["top_ids"][targets[i] : targets[i + 1], 0].tolist()
        if prompt.answered:
            assert not answer
        elif prompt.temperature:
            assert answer
        else:
            assert answer == likeliest[: len(answer)]


def test_sampled_answers_depend_on_the_seed_alone(model: Model, prompts: list[Prompt]) -> None:
    sampled = [replace(prompts[1], number=0)]
    first = gather(model, sampled)["tokens"].tolist()
    assert first == gather(model, sampled)["tokens"].tolist()
    assert first != gather(model, sampled, replace(OPTIONS, seed=1))["tokens"].tolist()


@pytest.mark.parametrize("n_parallel", [1, 2, 9])
def test_company_changes_nothing(model: Model, prompts: list[Prompt], found: dict[str, Array], n_parallel: int) -> None:
    other = gather(model, prompts, replace(OPTIONS, n_parallel=n_parallel))
    for name, array in found.items():
        assert np.array_equal(array, other[name]), name


def test_an_answer_ends_with_the_turn(model: Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that ends it is a target, but no row."""
    greedy = [replace(prompts[0], number=0)]
    before = gather(model, greedy)
    n_prompt = len(greedy[0].tokens)
    end = int(before["tokens"][n_prompt + 4])
    first = before["tokens"][n_prompt:].tolist().index(end)
    monkeypatch.setattr(model, "is_end", lambda token: token == end)
    after = gather(model, greedy)
    assert after["tokens"].tolist() == before["tokens"][: n_prompt + first].tolist()
    assert after["top_ids"][-1, 0] == end
    assert len(after["rows"]) == first + 1


def test_an_answer_is_no_longer_than_allowed(prompts: list[Prompt], found: dict[str, Array]) -> None:
    lengths = np.diff(found["offsets"]) - [len(p.tokens) for p in prompts]
    assert lengths.max() == OPTIONS.max_tokens


def test_texts_of_one_token_have_no_targets(model: Model) -> None:
    arrays = gather(model, [Prompt(0, (7,), answered=True), Prompt(1, (8,), answered=True)])
    assert arrays["tokens"].tolist() == [7, 8]
    assert arrays["top_ids"].shape == (0, 8)
    assert arrays["final"].shape == (0, model.n_embd)


# ── many shards ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_collection_goes_on(
    model: Model, prompts: list[Prompt], corpus: Corpus, found: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Collector._run
    n_batches = 0

    def interrupting(self: Collector, *arguments: Any) -> None:
        nonlocal n_batches
        n_batches += corpus.has(0)
        if n_batches == 5:  # within the second shard
            raise KeyboardInterrupt
        run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "_run", interrupting)
        with pytest.raises(KeyboardInterrupt):
            collect(model, prompts, OPTIONS, corpus, ignore)
    assert [corpus.has(i) for i in range(3)] == [True, False, False]
    kept = (corpus.folder / "00000" / "shard.json").stat().st_mtime_ns
    shards = collect(model, prompts, OPTIONS, corpus, ignore)
    assert (corpus.folder / "00000" / "shard.json").stat().st_mtime_ns == kept
    for name in ("tokens", "layer_2", "final", "top_ids", "top_logp"):
        assert np.array_equal(np.concatenate([shard[name] for shard in shards]), found[name]), name


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_or_foreign_shard_is_collected_again(model: Model, prompts: list[Prompt], corpus: Corpus) -> None:
    first = [shard["tokens"].tolist() for shard in collect(model, prompts[:10], OPTIONS, corpus, ignore)]
    (corpus.folder / "00000" / "tokens.npy").write_bytes(b"")
    shards = collect(model, prompts, OPTIONS, corpus, ignore)  # the second shard had two prompts, and has eight now
    assert [len(shard["prompts"]) for shard in shards] == [8, 8, 4]
    assert shards[0]["tokens"].tolist() == first[0]
    assert shards[1]["tokens"].tolist()[: len(first[1])] == first[1]


@pytest.mark.usefixtures("small_shards")
def test_progress_is_of_rows_and_ends_at_all(model: Model, prompts: list[Prompt], corpus: Corpus) -> None:
    heard: list[tuple[int, int]] = []
    shards = collect(model, prompts, OPTIONS, corpus, lambda done, total: heard.append((done, total)))
    n_rows = sum(shard.n_rows for shard in shards)
    assert heard[-1] == (n_rows, n_rows)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert all(0 < done <= total for done, total in heard)
    assert len(heard) > 3 * len(shards)
    heard.clear()
    collect(model, prompts, OPTIONS, corpus, lambda done, total: heard.append((done, total)))
    assert heard == []
    corpus.drop(1)
    collect(model, prompts, OPTIONS, corpus, lambda done, total: heard.append((done, total)))
    assert heard[0][0] > n_rows - shards[1].n_rows  # what was there counts as done
    assert heard[-1] == (n_rows, n_rows)


@pytest.mark.usefixtures("small_shards")
def test_a_part_of_the_shards_can_be_collected(model: Model, prompts: list[Prompt], corpus: Corpus) -> None:
    (shard,) = collect(model, prompts, OPTIONS, corpus, ignore, [1])
    assert shard["prompts"].tolist() == list(range(8, 16))
    assert not corpus.has(0)


def test_disk_use_is_estimated_from_above(model: Model, prompts: list[Prompt], corpus: Corpus) -> None:
    (shard,) = collect(model, prompts, OPTIONS, corpus, ignore)
    used = sum(file.stat().st_size for file in shard.path.iterdir())
    assert used < most_bytes(prompts, OPTIONS, model.n_embd) + 8192
    assert used > 0.5 * most_bytes(prompts, OPTIONS, model.n_embd)


def test_too_little_room_is_noticed_before_any_work(
    model: Model, prompts: list[Prompt], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "most_bytes", lambda *_: 2**60)
    monkeypatch.setattr(Collector, "texts", lambda *_: pytest.fail("work was done"))
    with pytest.raises(EdgeError, match="has only"):
        collect(model, prompts, OPTIONS, corpus, ignore)


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_prompt_is_refused(model: Model, prompts: list[Prompt], corpus: Corpus) -> None:
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        collect(model, [prompts[0], Prompt(1, ())], OPTIONS, corpus, ignore)


def test_prompts_are_numbered_in_order(model: Model, prompts: list[Prompt], corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="numbered"):
        collect(model, prompts[1:], OPTIONS, corpus, ignore)


@pytest.mark.parametrize("make", [lambda: CollectOptions(()), lambda: replace(OPTIONS, max_tokens=0)])
def test_options_that_cannot_be_meant(make: Callable[[], CollectOptions]) -> None:
    with pytest.raises(UsageError):
        make()


def test_a_model_of_no_numbers_is_refused(model: Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = module.Slice.hidden

    def broken(self: module.Slice, n_rows: int) -> Array:
        return hidden(self, n_rows) * np.nan if self.is_last else hidden(self, n_rows)

    monkeypatch.setattr(module.Slice, "hidden", broken)
    with pytest.raises(ModelError, match="no numbers"):
        gather(model, prompts)


# ── distributions ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_top_of_is_sorted_and_breaks_ties_by_number() -> None:
    ids, logp = top_of(np.array([1, 3, 2, 3, -np.inf], np.float32), 4)
    assert ids.tolist() == [1, 3, 2, 0]
    weights = np.exp([3.0, 3.0, 2.0, 1.0])
    assert np.allclose(logp, np.log(weights / weights.sum()), atol=1e-6)
    ids, _ = top_of(np.array([1, 3], np.float32), 9)
    assert ids.tolist() == [1, 0]
