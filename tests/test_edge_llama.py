"""`EdgeLlama` in the place of `Llama`: what is computed, what is kept, and what is refused, in words."""

from __future__ import annotations

import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LlamaRAMCache, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from edge_runtime import opening
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.errors import BoundaryError, LibraryError, PackError, UsageError
from edge_runtime.llama import EdgeLlama, Llama
from edge_runtime.llama_plan import left_to_llama

pytestmark = pytest.mark.model

ROOT = Path(__file__).parent.parent
ARGUMENTS: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
LINES = "".join(f"def get_{name}(self):\n    return self.{name}\n\n" for name in ("red", "green", "blue", "white"))
COPIED = (LINES * 2)[:-20]  # what follows is in it

Opener = Callable[..., EdgeLlama]


@pytest.fixture(scope="module")
def open_llama(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    """Opens models with batches that cost nothing more, so that there are many drafts; closed at the end."""
    opened: list[EdgeLlama] = []

    def open_(**arguments: Any) -> EdgeLlama:
        opened.append(EdgeLlama(str(demo_path), **{**ARGUMENTS, **arguments}))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(opening, "measure_batch_costs", lambda *_: BatchCosts((1, 16), (1.0, 1.01), invariant=True))
        yield open_
    for llama in opened:
        llama.close()


@pytest.fixture(scope="module", params=["n-grams", "heads", "full"])
def kept(request: pytest.FixtureRequest, open_llama: Opener) -> EdgeLlama:
    wish: dict[str, dict[str, Any]] = {
        "n-grams": {"mode": "verified"},
        "heads": {"mode": "verified", "boundaries": (24,), "thresholds": 2.5},
        "full": {"mode": "full"},
    }
    return open_llama(**wish[request.param])


@pytest.fixture
def llm(kept: EdgeLlama) -> EdgeLlama:
    """With an empty text, and no cache."""
    kept.reset()
    kept.set_cache(None)
    return kept


@pytest.fixture(scope="module")
def theirs(demo_path: Path) -> Iterator[Llama]:
    """`Llama` itself, on stock kernels."""
    llama = Llama(str(demo_path), **ARGUMENTS, logits_all=True)
    yield llama
    llama.close()


def first(count: int, tokens: Generator[int, Any, None]) -> list[int]:
    found = list(islice(tokens, count))
    tokens.close()
    return found


def text(llm: Any, prompt: Any, max_tokens: int = 16, **arguments: Any) -> str:
    answer = llm(prompt, max_tokens=max_tokens, **{"temperature": 0.0, **arguments})
    return str(answer["choices"][0]["text"])


# ── mode auto ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("invariant", [True, False])
def test_auto_drafts_only_where_a_batch_changes_no_sums(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    costs = BatchCosts((1, 16), (1.0, 1.01), invariant=invariant)
    monkeypatch.setattr(opening, "measure_batch_costs", lambda *_: costs)
    with EdgeLlama(str(demo_path), **ARGUMENTS) as llama:
        assert llama.mode == "auto"
        text(llama, COPIED)
        assert (llama.stats.drafted > 0) == invariant


# ── one text, computed once ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_turn_computes_only_what_is_new(llm: EdgeLlama) -> None:
    messages = [{"role": "user", "content": "Name three rivers of France. " * 4}]
    first = llm.create_chat_completion(messages, max_tokens=12, temperature=0.0)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Shorter, please."}]
    before, rows = llm.n_tokens, llm.stats.settled_rows
    llm.create_chat_completion(messages, max_tokens=1, temperature=0.0)
    n_new = llm.n_tokens - before
    assert n_new < 20 < before
    # the answer's last token was never computed, and its text may be other tokens at the seam
    assert n_new <= llm.stats.settled_rows - rows <= n_new + 3


def test_the_same_prompt_again_costs_one_token_and_its_drafts(llm: EdgeLlama) -> None:
    answer = text(llm, LINES)
    rows = llm.stats.settled_rows
    assert answer.startswith(text(llm, LINES, 1))
    assert llm.stats.settled_rows - rows <= 1 + 15


def test_the_logits_at_hand_are_used_as_they_are(llm: EdgeLlama) -> None:
    tokens = llm.tokenize(LINES.encode())
    llm.eval(tokens)
    rows = llm.stats.settled_rows
    chosen = llm.sample(temp=0.0)
    assert next(llm.generate(tokens, temp=0.0)) == chosen
    assert next(llm.generate([], temp=0.0, reset=False)) == chosen
    assert llm.stats.settled_rows == rows


def test_the_account_of_the_text_is_that_of_llama(llm: EdgeLlama, theirs: Llama) -> None:
    theirs.reset()
    tokens = llm.tokenize(COPIED.encode())
    seen: list[list[Any]] = []
    for llama in (llm, theirs):
        generator = llama.generate(tokens, temp=0.0)
        seen.append([(token, llama.n_tokens, list(llama.eval_tokens)) for token in islice(generator, 20)])
        generator.close()
    assert seen[0] == seen[1]


def test_a_stream_closed_half_way_leaves_no_trace(llm: EdgeLlama) -> None:
    expected = text(llm, COPIED, 24)
    llm.reset()
    stream = llm(COPIED, max_tokens=24, temperature=0.0, stream=True)
    for _ in range(5):
        next(stream)
    stream.close()
    assert text(llm, COPIED, 24) == expected
    assert text(llm, COPIED + " return", 8) == text(llm, COPIED + " return", 8)


def test_a_stream_that_was_overtaken_says_so(llm: EdgeLlama) -> None:
    expected = text(llm, LINES, 8)
    stream = llm(COPIED, max_tokens=24, temperature=0.0, stream=True)
    next(stream)
    assert text(llm, LINES, 8) == expected
    with pytest.raises(UsageError, match="another call"):
        list(stream)
    assert text(llm, LINES, 8) == expected


def test_tokens_that_are_sent_into_a_generator_are_added_to_the_text(llm: EdgeLlama) -> None:
    tokens = llm.tokenize(LINES.encode())
    generator = llm.generate(tokens, temp=0.0)
    first = next(generator)
    extra = llm.tokenize(b"class Other:\n    def get", add_bos=False)
    then = generator.send(extra)
    generator.close()
    assert list(llm.eval_tokens) == [*tokens, first, *extra]
    llm.reset()
    assert next(llm.generate([*tokens, first, *extra], temp=0.0)) == then


def test_n_tokens_set_by_hand_shortens_the_text(llm: EdgeLlama) -> None:
    tokens = llm.tokenize(COPIED.encode())
    llm.eval(tokens)
    llm.n_tokens = 40
    rows = llm.stats.settled_rows
    llm.eval(tokens[40:])
    assert llm.stats.settled_rows - rows == len(tokens) - 40
    assert list(llm.eval_tokens) == tokens
    llm.n_tokens = 40  # and the logits at hand are not those of the shorter text
    follows = next(llm.generate(tokens[:40], temp=0.0))
    llm.reset()
    assert next(llm.generate(tokens[:40], temp=0.0)) == follows


def test_reset_forgets_and_all_is_computed_again(llm: EdgeLlama) -> None:
    expected = text(llm, LINES, 4)
    llm.reset()
    assert llm.n_tokens == 0
    rows = llm.stats.settled_rows
    assert text(llm, LINES, 4) == expected
    assert llm.stats.settled_rows - rows >= len(llm.tokenize(LINES.encode()))


# ── saving and loading ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_saved_state_continues_as_before(llm: EdgeLlama) -> None:
    prompt = llm.tokenize(COPIED.encode())
    llm.eval(prompt)
    state = llm.save_state()
    expected = first(16, llm.generate(prompt, temp=0.0))
    text(llm, "Something else.", 4)
    llm.load_state(state)
    assert list(llm.eval_tokens) == prompt
    rows = llm.stats.settled_rows
    assert first(16, llm.generate(prompt, temp=0.0)) == expected
    if not llm.boundaries:
        assert llm.stats.settled_rows - rows < len(prompt) / 2


def test_a_state_saved_in_the_middle_of_an_answer_holds_the_text_so_far(llm: EdgeLlama) -> None:
    prompt = llm.tokenize(COPIED.encode())
    generator = llm.generate(prompt, temp=0.0)
    begun = [next(generator) for _ in range(6)]
    state = llm.save_state()
    rest = [next(generator) for _ in range(6)]
    generator.close()
    llm.reset()
    llm.load_state(state)
    text_so_far = [*prompt, *begun]
    assert list(llm.eval_tokens) == text_so_far[:-1]
    assert first(6, llm.generate(text_so_far, temp=0.0)) == rest


def test_states_are_exchanged_with_llama(open_llama: Opener, demo_path: Path) -> None:
    ours = open_llama(mode="full", kernels="stock", n_ctx=300)  # llama.cpp makes it 512
    llama = Llama(str(demo_path), **ARGUMENTS)
    expected = text(llama, LINES, 12)
    ours.load_state(llama.save_state())
    assert ours.n_tokens == llama.n_tokens
    assert len(ours.input_ids) == ours.n_ctx() == 512
    rows = ours.stats.settled_rows
    assert text(ours, LINES + expected, 1) == text(llama, LINES + expected, 1)
    assert ours.stats.settled_rows - rows < 6
    llama.load_state(ours.save_state())
    assert text(llama, LINES, 12) == expected
    llama.close()


def test_a_state_that_does_not_fit_is_refused_and_the_text_is_empty(open_llama: Opener) -> None:
    llm = open_llama(mode="full")
    llm.eval(llm.tokenize(LINES.encode()))
    state = llm.save_state()
    expected = text(llm, LINES, 4)
    state.llama_state = state.llama_state[:40]
    state.llama_state_size = 40
    with pytest.raises((RuntimeError, ValueError)):
        llm.load_state(state)
    assert llm.n_tokens == 0
    assert text(llm, LINES, 4) == expected
    state.n_tokens = 10_000
    with pytest.raises(RuntimeError, match="do not fit"):
        llm.load_state(state)


def test_a_cache_brings_back_earlier_prompts(open_llama: Opener) -> None:
    llm = open_llama(mode="verified", n_ctx=256, n_batch=64)
    llm.set_cache(LlamaRAMCache())
    expected = text(llm, LINES, 4)
    text(llm, "Something else entirely.", 4)
    rows = llm.stats.settled_rows
    assert text(llm, LINES, 4) == expected
    assert llm.stats.settled_rows - rows < len(llm.tokenize(LINES.encode())) / 2
    llm.set_cache(None)


# ── requests that need every token's logits ─────────────────────────────────────────────────────────────────────────


def test_a_logits_processor_is_shown_every_token_once(llm: EdgeLlama) -> None:
    plain = llm.tokenize(text(llm, COPIED, 12).encode(), add_bos=False)
    shown: list[int] = []

    def ban(tokens: Any, logits: Any) -> Any:
        shown.append(len(tokens))
        logits[plain[2]] = -np.inf
        return logits

    n_prompt = len(llm.tokenize(COPIED.encode()))
    answer = text(llm, COPIED, 12, logits_processor=LogitsProcessorList([ban]))
    assert plain[2] not in llm.tokenize(answer.encode(), add_bos=False)
    assert shown == list(range(n_prompt, n_prompt + 12))


def test_stopping_criteria_see_the_text_before_the_new_token(llm: EdgeLlama) -> None:
    n_prompt = len(llm.tokenize(COPIED.encode()))
    criteria = StoppingCriteriaList([lambda tokens, _: len(tokens) >= n_prompt + 5])
    answer = llm(COPIED, max_tokens=30, temperature=0.0, stopping_criteria=criteria)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_end_an_answer_in_the_same_place(llm: EdgeLlama, theirs: Llama) -> None:
    stops = ["white", "self.gr"]
    assert text(llm, COPIED, 40, stop=stops) == text(theirs, COPIED, 40, stop=stops)
    streamed = llm(COPIED, max_tokens=40, temperature=0.0, stop=stops, stream=True)
    assert "".join(c["choices"][0]["text"] for c in streamed) == text(theirs, COPIED, 40, stop=stops)


@pytest.mark.parametrize("wish", [{"mode": "exit"}, {"mode": "margin", "theta": 0.01}], ids=["exit", "margin"])
def test_a_grammar_holds_where_a_mode_would_change_tokens(wish: dict[str, Any], open_llama: Opener) -> None:
    if wish["mode"] == "exit":
        wish = {**wish, "boundaries": (24,), "thresholds": (9.0,)}
    llm = open_llama(**wish)
    grammar = LlamaGrammar.from_string('root ::= ("yes" | "no") " " [0-9]+ "."', verbose=False)
    answer = text(llm, COPIED, 12, grammar=grammar)
    assert answer.startswith(("yes ", "no "))
    count = "exits" if wish["mode"] == "exit" else "relaxed"
    assert getattr(llm.stats, count) == 0
    assert llm.notes == ["grammar: such answers come from full depth"]
    text(llm, COPIED, 12)
    if wish["mode"] == "exit":
        assert llm.stats.exits > 0
    text(llm, COPIED, 2, logit_bias={3: 1.0})
    assert len(llm.notes) == 2


def test_mode_exit_leaves_a_text_that_can_be_continued_at_full_depth(open_llama: Opener) -> None:
    llm = open_llama(mode="exit", boundaries=(24,), thresholds=9.0)
    prompt = llm.tokenize(COPIED.encode())
    tokens = first(12, llm.generate(prompt, temp=0.0))
    assert llm.stats.exits > 6
    llm.eval([tokens[-1]])
    assert list(llm.eval_tokens) == [*prompt, *tokens]
    chosen = llm.sample(temp=0.0)
    assert chosen == open_llama(mode="full").generate([*prompt, *tokens], temp=0.0).__next__()


def test_logprobs_are_those_of_llama(open_llama: Opener, theirs: Llama) -> None:
    llm = open_llama(logits_all=True, kernels="stock")
    assert llm.without_engine == "logits_all"
    theirs.reset()
    for arguments in ({"echo": True}, {"stream": True}):
        found, expected = (
            x("Once upon", max_tokens=2, temperature=0.0, logprobs=3, **arguments) for x in (llm, theirs)
        )
        if "stream" in arguments:
            assert [c["choices"] for c in found] == [c["choices"] for c in expected]
        else:
            assert found["choices"] == expected["choices"]
            assert len(found["choices"][0]["logprobs"]["top_logprobs"]) == 3
    with pytest.raises(ValueError, match="logits_all"):
        open_llama(mode="full")(LINES, logprobs=3)


def test_embeddings_are_those_of_llama(open_llama: Opener, demo_path: Path) -> None:
    llm = open_llama(embedding=True, kernels="stock")
    llama = Llama(str(demo_path), **ARGUMENTS, embedding=True)
    texts = ["Hello, world!", "Goodbye, world!"]
    assert llm.create_embedding(texts)["data"] == llama.create_embedding(texts)["data"]
    assert llm.embed("Hello", normalize=True) == llama.embed("Hello", normalize=True)
    with pytest.raises(RuntimeError, match="embedding=True"):
        open_llama(mode="full").embed("Hello")
    llama.close()


def test_a_vocabulary_alone_can_be_loaded(open_llama: Opener, theirs: Llama) -> None:
    llm = open_llama(vocab_only=True)
    assert llm.tokenize(b"Hello, world!") == theirs.tokenize(b"Hello, world!")
    assert llm.detokenize(llm.tokenize(b"Hello")) == b"Hello"
    assert llm.without_engine == "vocab_only"


def test_a_draft_model_drafts_if_no_other_mode_was_asked_for(open_llama: Opener) -> None:
    # with a batch as long as the context: Llama keeps as many logits, and needs those of the whole text for this
    llm = open_llama(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4), n_batch=512)
    assert (llm.without_engine, llm.mode) == ("draft_model", "full")
    assert text(llm, LINES, 12) == text(open_llama(mode="full", flash_attn=False), LINES, 12)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_longer_than_the_context_is_refused_as_llama_does(llm: EdgeLlama) -> None:
    tokens = llm.tokenize(LINES.encode())
    expected = text(llm, LINES, 4)
    too_many = tokens * 20
    with pytest.raises(ValueError, match="exceed context window of 512"):
        llm(too_many)
    for compute in (lambda: llm.eval(too_many), lambda: next(llm.generate(too_many))):
        llm.reset()
        with pytest.raises(RuntimeError, match=f"llama_decode returned 1: {len(too_many)} tokens"):
            compute()
    assert text(llm, LINES, 4) == expected


def test_a_generator_ends_where_llamas_does(llm: EdgeLlama, theirs: Llama) -> None:
    prompt = (llm.tokenize(LINES.encode()) * 10)[:500]
    theirs.reset()
    found: list[list[int]] = []
    for llama in (llm, theirs):
        tokens: list[int] = []
        with pytest.raises(RuntimeError, match="llama_decode returned 1"):
            tokens.extend(_each(llama.generate(prompt, temp=0.0), tokens))
        found.append(tokens)
        assert llama.n_tokens == 512
    assert len(found[0]) == len(found[1]) == 13
    assert text(llm, LINES, 4) == text(llm, LINES, 4)


def _each(generator: Iterator[int], into: list[int]) -> list[int]:
    """Put a generator's tokens into a list, one by one, so that they survive an exception."""
    for token in generator:
        into.append(token)
    return []


@pytest.mark.parametrize(
    ("wish", "error", "match"),
    [
        ({"mode": "fast"}, UsageError, "no mode 'fast'"),
        ({"kernels": "slow"}, UsageError, "no kernels 'slow'"),
        ({"mode": "verified", "draft_model": LlamaPromptLookupDecoding()}, UsageError, "mode='verified'.*draft_model"),
        ({"mode": "exit", "logits_all": True}, UsageError, "mode='exit'.*logits_all"),
        ({"mode": "exit", "rope_freq_base": 1e6}, UsageError, "rope_freq_base"),
        ({"mode": "full", "boundaries": (12,), "lora_path": "x"}, UsageError, "boundaries.*lora_path"),
        ({"mode": "verified", "type_k": 8}, UsageError, "type_v"),
        ({"boundaries": (12,)}, UsageError, "boundaries means nothing in mode 'auto'"),
        ({"mode": "full", "thresholds": 0.3}, UsageError, "thresholds means nothing in mode 'full'"),
        ({"mode": "verified", "theta": 0.5}, UsageError, "theta means nothing"),
        ({"mode": "verified", "max_disagreement": 0.1}, UsageError, "max_disagreement means nothing"),
        ({"mode": "exit", "boundaries": (99,)}, BoundaryError, "99"),
        ({"mode": "exit", "boundaries": (12,), "thresholds": (0.1, 0.2)}, UsageError, "2 thresholds"),
        ({"mode": "exit", "boundaries": "12"}, UsageError, "'12' are no whole numbers"),
        ({"mode": "exit", "boundaries": 12, "thresholds": "low"}, UsageError, "'low' are no numbers"),
        ({"mode": "exit", "pack": "nothing"}, PackError, "nothing"),
        ({"cap": 0}, UsageError, "cap 0"),
        ({"model_path": "/nowhere.gguf"}, ValueError, "does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused_in_words(
    wish: dict[str, Any], error: type[Exception], match: str, demo_path: Path
) -> None:
    with pytest.raises(error, match=match):
        EdgeLlama(**{"model_path": str(demo_path), **ARGUMENTS, **wish})


def test_a_chat_handler_that_comes_late_is_refused(open_llama: Opener) -> None:
    llm = open_llama(mode="full")
    llm.chat_handler = lambda **arguments: arguments["llama"].create_completion("Hello")
    with pytest.raises(UsageError, match="chat handler"):
        llm.create_chat_completion([{"role": "user", "content": "Hello"}])
    early = open_llama(chat_handler=lambda **arguments: arguments["llama"].create_completion("Hello", max_tokens=2))
    assert early.without_engine == "chat_handler"
    assert early.create_chat_completion([{"role": "user", "content": "Hello"}])["usage"]["completion_tokens"] == 2


def test_a_closed_model_is_an_error_and_not_a_crash(open_llama: Opener) -> None:
    with open_llama(mode="full") as llm:
        text(llm, LINES, 2)
    llm.close()
    for use in (lambda: llm.tokenize(b"x"), lambda: llm.eval([1]), lambda: text(llm, LINES), llm.n_ctx):
        with pytest.raises(UsageError, match="closed"):
            use()


# ── arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_methods_have_the_signatures_of_llama() -> None:
    for name, method in inspect.getmembers(Llama, inspect.isfunction):
        if not name.startswith("__"):
            ours = list(inspect.signature(getattr(EdgeLlama, name)).parameters)
            assert ours == list(inspect.signature(method).parameters), name


def test_defaults_of_llama_leave_room_for_the_engine() -> None:
    defaults = {name: p.default for name, p in inspect.signature(Llama.__init__).parameters.items()}
    assert left_to_llama(defaults) is None
    assert left_to_llama({**defaults, "type_k": 8, "type_v": 8}) is None
    assert left_to_llama({**defaults, "type_k": 8}) == "type_v"
    assert left_to_llama({**defaults, "type_k": 2, "type_v": 2}) == "type_k"
    assert left_to_llama({**defaults, "swa_full": False}) == "swa_full"


def test_a_quantised_cache_and_tiny_batches_work(open_llama: Opener) -> None:
    expected = text(open_llama(mode="full"), COPIED, 12)
    llm = open_llama(mode="verified", n_batch=4, type_k=8, type_v=8)
    assert len(text(llm, COPIED, 12)) > 5
    assert open_llama(type_k=2, type_v=2, flash_attn=True).without_engine == "type_k"
    small = open_llama(mode="verified", n_batch=64, n_ubatch=4)
    assert text(small, COPIED, 12) == expected
    assert small.stats.accepted > 3
    assert text(open_llama(mode="verified", n_batch=1), LINES, 2) != ""


def test_the_context_is_the_models_if_none_is_given(open_llama: Opener) -> None:
    assert open_llama(n_ctx=0, mode="full").n_ctx() == 8192


def test_a_pickle_holds_the_arguments(open_llama: Opener) -> None:
    llm = open_llama(mode="exit", boundaries=(24,), thresholds=9.0, kernels="stock")
    again = pickle.loads(pickle.dumps(llm))
    assert again.__getstate__() == llm.__getstate__()
    assert (again.mode, again.boundaries, again.kernels) == ("exit", (24,), "stock")
    assert text(again, LINES, 8) == text(llm, LINES, 8)
    again.close()


def test_arguments_without_effect_are_spoken_of(open_llama: Opener, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="edge_runtime"):
        llm = open_llama(n_gpu_layers=-1, f16_kv=True, embedding=True)
    said = [record.getMessage() for record in caplog.records]
    assert any("f16_kv" in line for line in said)
    assert any("n_gpu_layers" in line for line in said)
    assert said[0].startswith("embedding: every token comes from full depth")
    assert llm.notes == [said[0]]


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────────

_MEMORY = """
import sys
import psutil
from edge_runtime.llama import EdgeLlama, Llama
kind, path, boundaries = sys.argv[1:]
wish = {"kernels": "stock", "mode": "full"} if kind == "EdgeLlama" else {}
if boundaries:
    wish["boundaries"] = [int(boundaries)]
wish.update(n_ctx=8192, n_threads=1, n_threads_batch=1, verbose=False)
model = {"EdgeLlama": EdgeLlama, "Llama": Llama}[kind](path, **wish)
model("Once upon a time", max_tokens=4, temperature=0)
print(psutil.Process().memory_info().rss)
"""


def _resident_bytes(kind: str, path: Path, boundaries: str = "") -> int:
    command = [sys.executable, "-c", _MEMORY, kind, str(path), boundaries]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout)


def test_there_is_one_kv_cache(demo_path: Path) -> None:
    """For 8,192 tokens it takes 180 MiB; that of `Llama`, which opened one first, is gone."""
    llama = _resident_bytes("Llama", demo_path)
    for boundaries in ("", "15"):
        assert _resident_bytes("EdgeLlama", demo_path, boundaries) < llama + 60 * 2**20


def test_bindings_that_were_imported_with_another_library_are_refused(tmp_path: Path) -> None:
    program = (
        "import sys, types\n"
        "fake = types.ModuleType('llama_cpp.llama_cpp')\n"
        f"fake._base_path = {str(tmp_path)!r}\n"
        "sys.modules['llama_cpp.llama_cpp'] = fake\n"
        "import edge_runtime.llama\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert LibraryError.__name__ in done.stderr
    assert "import edge_runtime first" in done.stderr
