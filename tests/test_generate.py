"""A runtime answers: modes agree, the KV cache is reused, every end has its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edge_runtime import generate, opening, resolve
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.energy.model import PowerModel
from edge_runtime.energy.request import Meter
from edge_runtime.errors import BoundaryError, MemoryLimitError, ModelError, PromptError, UsageError
from edge_runtime.generate import Chunk, RunOptions, Runtime
from edge_runtime.memory import MachineMemory
from edge_runtime.native import Model
from edge_runtime.prefix import common_prefix
from edge_runtime.resolve import default_boundaries
from edge_runtime.sensors.reading import Reading
from edge_runtime.summary import Finish
from edge_runtime.templates import ChatTemplate, Message
from edge_runtime.types import Mode, SamplingSettings

from .conftest import TinyMaker
from .fakes import ENGINE_MODES

PROMPT = "Once upon"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What batches cost is kept there, of models that are gone after the test."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(tiny_path: TinyMaker) -> RunOptions:
    return RunOptions(str(tiny_path("llama", tokenizer=True)), Mode.FULL, n_ctx=256, n_threads=1)


@pytest.fixture
def runtime(options: RunOptions) -> Iterator[Runtime]:
    with Runtime(options) as opened:
        yield opened


def run(runtime: Runtime, prompt: str = PROMPT, n: int = 20, stop: tuple[str, ...] = ()) -> list[Chunk]:
    return list(runtime.stream(runtime.text_tokens(prompt), n, stop))


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [chunk.step.token for chunk in chunks]


@pytest.mark.parametrize("threshold", [0.0, 2.0, 4.0])
def test_verified_publishes_what_full_depth_does(options: RunOptions, runtime: Runtime, threshold: float) -> None:
    verified = dataclasses.replace(options, mode=Mode.VERIFIED, boundaries=(2, 5), thresholds=(threshold,))
    with Runtime(verified) as other:
        assert tokens_of(run(other)) == tokens_of(run(runtime))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cheap", [True, False])
def test_ngrams_publish_what_full_depth_does(
    options: RunOptions, temperature: float, cheap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over turns that share a beginning, and after an answer that was stopped in the middle of a draft."""
    costs = BatchCosts((1, 16), (1.0, 1.0 if cheap else 16.0))
    monkeypatch.setattr(opening, "measure_batch_costs", lambda *_: costs)
    options = dataclasses.replace(options, sampling=SamplingSettings(temperature=temperature, top_k=2, seed=5))
    text = "one two three one two three one two three one two"
    found = []
    for mode in (Mode.FULL, Mode.VERIFIED):
        with Runtime(dataclasses.replace(options, mode=mode)) as runtime:
            first = run(runtime, text, 60)
            longer = runtime.engine.tokens + runtime.text_tokens(" one two three one")
            again = list(runtime.stream(longer, 30))
            with closing(runtime.stream(runtime.text_tokens(text), 30)) as chunks:
                stopped = [next(chunks) for _ in range(7)]
            found.append([tokens_of(first), tokens_of(again), tokens_of(stopped), tokens_of(run(runtime, text, 20))])
            stats = runtime.engine.stats
    assert found[0] == found[1]
    assert (stats.drafted > 20) == cheap
    assert runtime.summary.draft == "ngram"
    assert (runtime.summary.head, runtime.summary.signal, runtime.summary.boundaries) == (None, None, ())


def test_costs_of_batches_are_measured_once_and_the_cache_is_empty_afterwards(options: RunOptions) -> None:
    said: list[str] = []
    verified = dataclasses.replace(options, mode=Mode.VERIFIED)
    with Runtime(verified, say=said.append) as runtime:
        assert runtime.engine.slices[0].last_position() == -1
        assert len(said) == 1
        assert "cost of small batches" in said[0]
        assert runtime.options.cap == 15
        assert runtime.engine.slices[0].n_outputs_max == 16
        runtime.reopen(dataclasses.replace(runtime.asked, mode=Mode.FULL))
        runtime.reopen(dataclasses.replace(runtime.asked, mode=Mode.EXIT))
        assert runtime.options.cap == 8
    for heads in (dataclasses.replace(verified, draft="heads"), dataclasses.replace(verified, boundaries=(3,))):
        with Runtime(heads, say=said.append) as runtime:
            assert (runtime.options.cap, runtime.summary.draft, runtime.summary.head) == (8, "heads", "shared")
            assert runtime.options.boundaries
    assert len(said) <= 2  # twice if the machine was too busy to believe the first time
    with Runtime(dataclasses.replace(verified, cap=2, n_batch=2)) as runtime:
        assert tokens_of(run(runtime))


def test_margin_counts_what_it_changes(options: RunOptions, runtime: Runtime) -> None:
    changes = {"boundaries": (5,), "thresholds": (float("inf"),), "mode": Mode.MARGIN}
    with Runtime(dataclasses.replace(options, theta=1.0, **changes)) as same:  # type: ignore[arg-type]
        assert tokens_of(run(same, n=60)) == tokens_of(run(runtime, n=60))
        assert (same.summary.relaxed, same.summary.changed, same.summary.theta) == (0, 0.0, 1.0)
    with Runtime(dataclasses.replace(options, theta=0.01, **changes)) as other:  # type: ignore[arg-type]
        chunks = run(other, n=60)
        assert other.summary.relaxed == sum(c.step.relaxed for c in chunks) > 0
        assert other.summary.changed == other.summary.relaxed / 60
        assert other.summary.accepted >= other.summary.relaxed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": "guesses"}, "no drafts 'guesses'"),
        ({"draft": "ngram", "boundaries": (3,)}, "--boundaries means nothing with --draft ngram"),
        ({"draft": "ngram", "thresholds": (1.0,)}, "--threshold means nothing with --draft ngram"),
        ({"draft": "ngram", "head": "shared"}, "--head means nothing with --draft ngram"),
        ({"draft": "ngram", "signal": "top1"}, "--signal means nothing with --draft ngram"),
        ({"theta": 0.0}, "theta 0.0"),
        ({"theta": 1.5}, "theta 1.5"),
        ({"cap": 0}, "cap 0"),
    ],
)
def test_drafts_that_cannot_be_meant(
    options: RunOptions, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "Model", None)  # found before anything large is loaded
    with pytest.raises(UsageError, match=message) as failure:
        Runtime(dataclasses.replace(options, mode=Mode.MARGIN, **changes))  # type: ignore[arg-type]
    assert failure.value.hint


def test_exits_are_counted(options: RunOptions) -> None:
    early = dataclasses.replace(options, mode=Mode.EXIT, boundaries=(3,), thresholds=(float("inf"),), audit_rate=1.0)
    with Runtime(early) as runtime:
        chunks = run(runtime)
        found = runtime.summary
    assert found.exits == sum(c.step.boundary == 3 for c in chunks) > 0
    assert found.audited == sum(len(c.step.audits) for c in chunks) > 0
    assert found.mean_depth == sum(c.step.depth for c in chunks) / len(chunks)
    assert found.disagreement == found.disagreed / found.audited


def test_the_last_chunk_says_why_it_is_the_last(runtime: Runtime) -> None:
    chunks = run(runtime, n=7)
    assert [c.finish for c in chunks] == [None] * 6 + [Finish.MAX_TOKENS]
    assert chunks[-1].finish_reason == runtime.summary.finish_reason == "length"
    assert runtime.summary.generated_tokens == 7


def test_an_answer_that_fills_the_context_says_so(runtime: Runtime) -> None:
    prompt = runtime.text_tokens(PROMPT)
    chunks = list(runtime.stream(prompt, 10_000))
    assert chunks[-1].finish is Finish.CONTEXT_FULL
    assert len(prompt) + len(chunks) == 256
    # … and the next answer finds everything in order
    assert tokens_of(list(runtime.stream(prompt, 10))) == tokens_of(chunks[:10])


def test_an_end_token_ends_the_turn_and_does_not_show(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    fourth = tokens_of(run(runtime))[3]
    assert fourth not in tokens_of(run(runtime))[:3]
    monkeypatch.setattr(runtime.model, "is_end", lambda token: token == fourth)
    chunks = run(runtime)
    assert (len(chunks), chunks[-1].text, chunks[-1].finish) == (4, "", Finish.END_OF_TURN)
    assert runtime.summary.finish_reason == "stop"


def test_a_stop_string_ends_the_answer_before_it(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = iter(b"wordsENDmore")
    monkeypatch.setattr(runtime.model, "piece", lambda _token: bytes([next(letters)]))
    chunks = run(runtime, stop=("END",))
    assert "".join(c.text for c in chunks) == "words"
    assert chunks[-1].finish is Finish.STOP_STRING
    assert len(chunks) == 8  # the stop string's tokens are there, without text


@pytest.mark.parametrize(
    ("mode", "boundaries", "batches"), [(Mode.FULL, None, 19), (Mode.VERIFIED, (2, 5), None), (Mode.EXIT, (2,), None)]
)
def test_the_energy_of_an_answer_is_modelled_where_no_sensor_is(
    options: RunOptions, mode: Mode, boundaries: tuple[int, ...] | None, batches: int | None
) -> None:
    """Static power by the time, traffic by the batches that went through the weights: here 19, and 3 of the prompt."""
    options = dataclasses.replace(options, mode=mode, boundaries=boundaries, n_batch=16)

    def readings(since_s: float) -> list[Reading]:
        return [Reading(since_s + i, load=0.0) for i in range(60)]

    energies = []
    for model in (PowerModel(2.0, 1.0, 0.0), PowerModel(0.0, 0.0, 1.0)):
        with Runtime(options, meter=Meter(readings, model=model)) as runtime:
            assert runtime.summary.energy_j is None
            chunks = list(runtime.stream(list(range(10, 50)), 20))
            size_gb = runtime.header.file_bytes / 1e9
            energies.append(runtime.summary)
    assert len(chunks) == 20
    static, traffic = energies
    seconds = 19 / (static.decode_tokens_per_s or 0) + (static.time_to_first_token_ms or 0) / 1e3
    assert static.energy_j == pytest.approx(2 * seconds)
    assert (static.energy_source, static.energy_covered) == ("estimated", pytest.approx(1))
    assert static.net_energy_per_token_j == pytest.approx(0)
    assert traffic.prefill_energy_j == pytest.approx(3 * size_gb)
    decode_j = traffic.decode_energy_j or 0
    assert decode_j == pytest.approx(batches * size_gb) if batches else 0 < decode_j < 2 * 19 * size_gb


def test_without_a_meter_there_is_no_energy(runtime: Runtime) -> None:
    run(runtime)
    assert runtime.summary.energy_j is runtime.summary.energy_source is runtime.summary.energy_covered is None


def test_the_summary_of_a_stopped_answer_says_interrupted(runtime: Runtime) -> None:
    with closing(runtime.stream(runtime.text_tokens(PROMPT), 20)) as chunks:
        first = next(chunks)
    assert runtime.summary.finish == Finish.INTERRUPTED.value
    assert runtime.summary.generated_tokens == 1
    assert runtime.engine.tokens[-1] == first.step.token


@pytest.mark.parametrize("mode", ENGINE_MODES)
def test_a_conversation_is_computed_once_and_gives_the_same(options: RunOptions, mode: Mode) -> None:
    options = dataclasses.replace(options, mode=mode, boundaries=(2, 5), thresholds=(2.0,))
    with Runtime(options) as runtime, Runtime(options) as fresh:
        first = run(runtime)
        longer = runtime.engine.tokens + runtime.text_tokens(" and")
        again = tokens_of(list(runtime.stream(longer, 20)))
        assert runtime.summary.reused_tokens >= len(longer) - 20
        if mode in (Mode.FULL, Mode.VERIFIED):  # elsewhere, which tokens wait together differs
            assert again == tokens_of(list(fresh.stream(longer, 20)))
        assert len(first) == len(again) == 20


def test_a_changed_beginning_is_computed_again(runtime: Runtime) -> None:
    expected = tokens_of(run(runtime, "Another text"))
    run(runtime, "An old text")
    assert tokens_of(run(runtime, "Another text")) == expected
    assert runtime.summary.reused_tokens == len(runtime.text_tokens("An"))


def test_an_answer_can_be_repeated_and_then_all_but_a_token_is_reused(runtime: Runtime) -> None:
    expected = tokens_of(run(runtime))
    assert tokens_of(run(runtime)) == expected
    assert runtime.summary.reused_tokens == len(runtime.text_tokens(PROMPT)) - 1


def test_a_seed_repeats_a_sampled_answer(options: RunOptions) -> None:
    answers = []
    for seed in (1, 1, 2):
        sampled = dataclasses.replace(options, sampling=SamplingSettings(temperature=1.5, seed=seed))
        with Runtime(sampled) as runtime:
            answers.append(tokens_of(run(runtime)))
            assert runtime.summary.seed == seed
    assert answers[0] == answers[1] != answers[2]


def test_reopening_in_another_mode(runtime: Runtime) -> None:
    expected = tokens_of(run(runtime))
    runtime.reopen(dataclasses.replace(runtime.options, mode=Mode.VERIFIED, boundaries=None))
    assert runtime.summary.mode == "verified"
    assert tokens_of(run(runtime)) == expected
    with pytest.raises(BoundaryError):
        runtime.reopen(dataclasses.replace(runtime.options, boundaries=(99,)))
    assert tokens_of(run(runtime)) == expected


def test_prompts_that_cannot_be_answered(runtime: Runtime) -> None:
    with pytest.raises(PromptError, match="empty"):
        list(runtime.stream([], 5))
    with pytest.raises(PromptError, match=r"256 tokens long, the context holds 256"):
        list(runtime.stream([5] * 256, 5))
    assert len(list(runtime.stream([5] * 255, 5))) == 1


@pytest.mark.parametrize("boundaries", [(0,), (7,), (-1,), (5, 2), (3, 3)])
def test_boundaries_are_checked_before_the_model_is_loaded(
    options: RunOptions, boundaries: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "Model", None)
    with pytest.raises(BoundaryError):
        Runtime(dataclasses.replace(options, boundaries=boundaries))


@pytest.mark.parametrize(
    "changes",
    [{"thresholds": (1.0, 2.0, 3.0), "boundaries": (2, 5)}, {"boundaries": ()}, {"cap": 0}, {"audit_rate": 2.0}],
)
def test_options_that_do_not_go_together(options: RunOptions, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Runtime(dataclasses.replace(options, mode=Mode.EXIT, **changes))  # type: ignore[arg-type]


def test_a_model_that_cannot_fit_is_not_loaded(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "Model", None)
    monkeypatch.setattr(resolve, "machine_memory", lambda: MachineMemory(1000, 1000))
    with pytest.raises(MemoryLimitError):
        Runtime(options)


def test_a_tight_fit_and_a_stretched_context_are_noted(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "machine_memory", lambda: MachineMemory(2**40, 0))
    notes: list[str] = []
    with Runtime(dataclasses.replace(options, n_ctx=4096), notes.append):
        pass
    assert "trained for" in notes[0]
    assert "swapping" in notes[1]


def test_default_boundaries_lie_within_any_model() -> None:
    assert default_boundaries(Mode.FULL, 30) == ()
    assert default_boundaries(Mode.EXIT, 30) == (22, 27)
    assert all(0 < b < n for n in range(1, 40) for b in default_boundaries(Mode.EXIT, n))


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0


# ── chat templates ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_renders_a_conversation(runtime: Runtime) -> None:
    assert runtime.template is not None
    text = runtime.template.render([Message("system", "Be brief."), Message("user", "Hi")])
    assert text == "<|turn|>system\nBe brief.<|end|><|turn|>user\nHi<|end|><|turn|>assistant\n"


def test_a_beginning_of_text_is_not_doubled(runtime: Runtime) -> None:
    bos = runtime.text_tokens("")[0]
    runtime.template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", "<s>", "</s>")
    assert runtime.chat_tokens([Message("user", "Hi")]).count(bos) == 1


def test_a_template_that_cannot_be_parsed() -> None:
    with pytest.raises(ModelError, match="chat template is broken"):
        ChatTemplate("{% for %}", "", "")


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no system role') }}", "{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ ''.x.y }}"]
)
def test_a_template_that_fails(source: str) -> None:
    with pytest.raises(ModelError, match="refused the conversation") as failure:
        ChatTemplate(source, "", "").render([Message("system", "x")])
    assert "--system" in failure.value.hint


def test_a_model_without_a_template(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.model, "meta", lambda _key: "")
    assert ChatTemplate.of(runtime.model) is None
    runtime.template = None
    with pytest.raises(ModelError, match="no chat template"):
        runtime.chat_tokens([Message("user", "Hi")])


def test_a_model_without_a_tokenizer(tiny_path: TinyMaker, options: RunOptions) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        Runtime(dataclasses.replace(options, model=str(tiny_path("llama"))))


# ── the real thing ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.model
def test_the_demo_model_answers_a_question(demo_path: Path) -> None:
    question = [Message("user", "What is the capital of France? Answer with one word.")]
    texts = []
    for mode, draft in ((Mode.FULL, None), (Mode.VERIFIED, "heads"), (Mode.VERIFIED, "ngram")):
        with Runtime(RunOptions(model=str(demo_path), mode=mode, draft=draft, n_ctx=256, n_threads=1)) as runtime:
            texts.append("".join(c.text for c in runtime.stream(runtime.chat_tokens(question), 12)))
    assert "Paris" in texts[0]
    assert texts == [texts[0]] * 3


@pytest.mark.model
def test_the_bundled_exit_pack_is_for_this_model_and_build(demo_path: Path) -> None:
    options = RunOptions(model=str(demo_path), mode=Mode.EXIT, pack="smollm2-135m", n_threads=1)
    with Runtime(options) as runtime:
        prompt = runtime.chat_tokens([Message("user", "Name three colours.")])
        assert "".join(chunk.text for chunk in runtime.stream(prompt, max_tokens=16))
        assert runtime.summary.exits


@pytest.mark.model
def test_characters_of_several_tokens_come_whole(demo_model: Model, demo_path: Path) -> None:
    text = "東京 🦊"
    tokens = demo_model.tokenize(text, add_special=False, parse_special=False)
    assert len(tokens) > len(text)
    with Runtime(RunOptions(str(demo_path), Mode.FULL, n_ctx=256, n_threads=1)) as runtime:
        pieces = [runtime.model.piece(t) for t in tokens]
    assert b"".join(pieces).decode() == text
