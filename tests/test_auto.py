"""Mode auto chooses what takes least time, tries little, and leaves what loses; its text is full depth's."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import opening, playing
from edge_runtime.auto import BUDGET, TRIAL, Chooser, Round, rounds
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.display import footer
from edge_runtime.errors import MemoryLimitError, PackError, UsageError
from edge_runtime.exits.costs import Costs
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.thresholds import Rung
from edge_runtime.generate import Message, RunOptions, Runtime
from edge_runtime.playing import Player
from edge_runtime.types import EngineStats, Mode, SamplingSettings, Step

from .conftest import TinyMaker
from .exit_fakes import random_pack

ONE_S = 0.01  # what a token at full depth takes


def play(chooser: Chooser, takes: dict[str, float], answers: int, tokens: int = 100, cost: float = 0.0) -> list[str]:
    """Answers with policies that take so many token times per token; who wrote each token."""
    wrote: list[str] = []
    for _ in range(answers):
        chooser.begin(cost)
        for _ in range(tokens):
            alone = chooser.probing
            wrote.append(chooser.current)
            chooser.observe(1, ONE_S * (1.0 if alone else takes[chooser.current]), alone)
            if chooser.losing:
                chooser.fall_back(cost)
    return wrote


# ── choosing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_promises_more_begins() -> None:
    chooser = Chooser({"text": 1.0, "heads": 0.8, "exit": 0.7}, ONE_S)
    assert chooser.current == "text"
    assert chooser.begin() == "exit"


def test_a_change_must_be_worth_what_it_costs() -> None:
    assert Chooser({"text": 1.0, "heads": 0.8}, ONE_S).begin(20) == "heads"
    assert Chooser({"text": 1.0, "heads": 0.8}, ONE_S).begin(30) == "text"  # 128 tokens save 25.6
    assert Chooser({"text": 1.0, "heads": 0.99}, ONE_S).begin(0) == "text"  # next to nothing


def test_what_wins_stays() -> None:
    wrote = play(Chooser({"text": 1.0, "heads": 0.8}, ONE_S), {"text": 1.0, "heads": 0.8}, 5)
    assert set(wrote) == {"heads"}


@pytest.mark.parametrize("takes", [1.02, 1.2, 3.0])
def test_what_loses_is_left_within_its_trial_and_not_taken_up_again(takes: float) -> None:
    wrote = play(Chooser({"text": 1.0, "heads": 0.8}, ONE_S), {"text": 1.0, "heads": takes}, 20)
    lost = [len(list(run)) for name, run in itertools.groupby(wrote) if name == "heads"]
    probes = 2
    assert all(n <= TRIAL + probes for n in lost)
    assert wrote.count("heads") * (takes - 1) <= 2 * BUDGET * len(wrote)


def test_what_is_right_for_a_text_is_measured_against_the_drafts_that_the_text_gives() -> None:
    chooser = Chooser({"text": 1.0, "heads": 0.8}, ONE_S)
    play(chooser, {"text": 0.5, "heads": 0.8}, 1)  # heads are thought to be better, and are
    for _ in range(300):
        if chooser.current == "heads":
            chooser.fall_back()
        chooser.observe(2, 0.5 * 2 * ONE_S, alone=False)  # a text that repeats itself
    assert chooser.begin() == "text"


@given(
    st.lists(st.floats(0.7, 3.0), min_size=1, max_size=3),
    st.lists(st.floats(0.3, 3.0), min_size=3, max_size=3),
    st.floats(0, 60),
)
def test_trials_stay_within_their_budget(predicted: list[float], takes: list[float], cost: float) -> None:
    """However wrong predictions are: what is thought to be worse than plain full depth gets 2% of the time."""
    names = ["heads", "exit", "other"][: len(predicted)]
    worse = {name: max(1.0, value) for name, value in zip(names, predicted, strict=True)}
    losing = {name: max(1.0, value) for name, value in zip(names, takes, strict=False)}
    chooser = Chooser({"text": 1.0, **worse}, ONE_S)
    play(chooser, {"text": 1.0, **losing}, 30, cost=cost)
    # a trial is planned with what was predicted; what it takes may be up to three times that, once per policy
    assert chooser.spent <= BUDGET + len(names) * 2 * TRIAL / 3000


def test_what_was_thought_worse_is_found_out_to_be_better() -> None:
    wrote = play(Chooser({"text": 1.0, "heads": 1.1}, ONE_S), {"text": 1.0, "heads": 0.7}, 60, cost=5)
    assert wrote[0] == "text"
    assert wrote[-1000:].count("heads") > 900


def test_what_has_been_silent_for_long_is_tried_again() -> None:
    chooser = Chooser({"text": 1.0, "heads": 0.8}, ONE_S)
    takes = {"text": 1.0, "heads": 0.85}
    for _ in range(10):  # the text wrote in long rounds once, so that it is known best
        chooser.observe(40, 40 * ONE_S, alone=False)
    assert play(chooser, takes, 20).count("heads") > 1800
    wrote = play(chooser, {"text": 0.4, "heads": 0.85}, 300)
    assert wrote[-2000:].count("text") > 1900


def test_a_machine_that_gets_slower_changes_no_verdict() -> None:
    chooser = Chooser({"text": 1.0, "heads": 0.8}, ONE_S)
    assert chooser.begin() == "heads"
    for factor in (1.0, 1.5, 2.0, 3.0):
        for _ in range(200):
            chooser.observe(1, factor * ONE_S * (1.0 if chooser.probing else 0.8), chooser.probing)
            assert not chooser.losing or factor > 1  # it takes a few probes to see
    assert chooser.estimate("heads") == pytest.approx(0.8, abs=0.1)


def test_full_depth_is_probed_now_and_then_and_only_in_slices() -> None:
    chooser = Chooser({"text": 1.0, "heads": 0.8}, ONE_S)
    assert not chooser.probing
    chooser.begin()
    probes = 0
    for _ in range(240):
        probes += chooser.probing
        chooser.observe(1, ONE_S, chooser.probing)
    assert 8 <= probes <= 11


def test_without_any_time_nothing_is_concluded() -> None:
    chooser = Chooser({"text": 1.0, "heads": 0.8})
    chooser.begin()
    for _ in range(100):
        chooser.observe(1, 5.0, alone=False)
    assert not chooser.losing
    assert math.isnan(chooser.latest)


# ── rounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rounds_are_timed_without_their_readers() -> None:
    stats, now = EngineStats(), [0.0]

    def steps() -> Iterator[Step]:
        now[0] += 7.0  # the prompt
        stats.settled_rows += 30
        yield Step(1, 30, 4)
        now[0] += 1.0
        stats.settled_rows += 3
        yield Step(2, 31, 4, drafted=True, accepted=True)
        now[0] += 0.5
        yield Step(3, 32, 4, drafted=True, accepted=True)
        yield Step(4, 33, 4)
        now[0] += 2.0
        stats.settled_rows += 1
        yield Step(5, 34, 4)

    found = []
    for step, round_ in rounds(steps(), stats, lambda: now[0]):
        found.append((step.token, round_))
        now[0] += 100.0
    assert found == [(1, None), (2, None), (3, None), (4, Round(3, 3, 1.5)), (5, Round(1, 1, 2.0))]


# ── a runtime in mode auto ──────────────────────────────────────────────────────────────────────────────────────────

CERTIFIED = Rung(
    "entropy", "exits", 0.1, 0.05, (2.0, 4.0), {"kind": "x", "bound": 0.1, "n": 40, "risk": 0.01, "holds": True}, 0.5
)
COSTS = Costs((2, 4), ((1.0, 1.2),) * 3, (1.0, 1.2), ((0.1, 0.1),) * 2, (3.0, 3.3))
SAMPLINGS = [SamplingSettings(), SamplingSettings(temperature=0.9, seed=3, repeat_penalty=1.2)]
PROMPTS = ("Once upon", "a b a b a b a", "the the the")


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture
def options(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        opening, "measure_batch_costs", lambda *_: BatchCosts((1, 16), (1.0, 1.3), 0.001, invariant=True)
    )
    return RunOptions(str(model_path), n_ctx=256, n_threads=1)


@pytest.fixture
def pack_path(model_path: Path, tmp_path: Path) -> str:
    pack: ExitPack = random_pack(model_path, (2, 4), rungs=(CERTIFIED,), verify_thresholds=(2.0, 4.0))
    pack.save(tmp_path / "pack.gguf")
    return str(tmp_path / "pack.gguf")


def predict(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    monkeypatch.setattr(playing, "kept_part_costs", lambda *_: COSTS)
    monkeypatch.setattr(playing, "predicted_time", lambda *_, **__: times)


def texts(options: RunOptions, n: int = 40, **changes: Any) -> list[list[int]]:
    with Runtime(dataclasses.replace(options, **changes)) as runtime:
        return [[c.step.token for c in runtime.stream(runtime.text_tokens(p), n)] for p in PROMPTS]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_text_is_that_of_full_depth(options: RunOptions, sampling: SamplingSettings) -> None:
    full = texts(options, mode=Mode.FULL, sampling=sampling)
    assert texts(options, sampling=sampling) == full


def test_auto_is_the_default_and_says_what_it_came_to(options: RunOptions) -> None:
    assert RunOptions().mode is Mode.AUTO
    with Runtime(options) as runtime:
        list(runtime.stream(runtime.text_tokens("the the the the"), 30))
        assert (runtime.summary.mode, runtime.summary.played) == ("auto", "verified")
        assert runtime.summary.policies == {"text": 30}
        assert len(runtime.engine.slices) == 1


@pytest.mark.parametrize("kernels", ["edge", "stock"])
def test_where_batches_change_the_arithmetic_nothing_is_drafted(
    options: RunOptions, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = BatchCosts((1, 16), (1.0, 1.0), 0.001, invariant=False)
    monkeypatch.setattr(opening, "measure_batch_costs", lambda *_: costs)
    with Runtime(dataclasses.replace(options, kernels=kernels)) as runtime:
        list(runtime.stream(runtime.text_tokens("the the the the"), 20))
        assert (runtime.summary.mode, runtime.summary.played, runtime.summary.drafted) == ("auto", "full", 0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_heads_that_lose_are_left_in_the_middle_of_an_answer(
    options: RunOptions, pack_path: str, sampling: SamplingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = texts(options, n=80, mode=Mode.FULL, sampling=sampling)
    predict(monkeypatch, 0.5)
    slow(monkeypatch, lambda player: 3.0 if player.options.boundaries else 1.0)
    left: list[str] = []
    with Runtime(dataclasses.replace(options, pack=pack_path, sampling=sampling)) as runtime:
        for prompt, expected in zip(PROMPTS, full, strict=True):
            assert [c.step.token for c in runtime.stream(runtime.text_tokens(prompt), 80)] == expected
            assert runtime.summary.generated_tokens == 80
            left += [line for line in footer(runtime.summary, seeded=False) if line.startswith("left: ")]
        written = runtime.summary.policies
        assert runtime.options.boundaries == ()
        assert runtime.engine.stats.published == 240
    assert written is not None
    assert written.get("heads", 0) <= TRIAL + 2
    assert "drafts of heads took" in left[0]


def test_heads_that_win_stay(options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = texts(options, n=80, mode=Mode.FULL)
    predict(monkeypatch, 0.5)
    slow(monkeypatch, lambda player: 0.5)
    with Runtime(dataclasses.replace(options, pack=pack_path)) as runtime:
        for prompt, expected in zip(PROMPTS, full, strict=True):
            assert [c.step.token for c in runtime.stream(runtime.text_tokens(prompt), 80)] == expected
            assert runtime.summary.policies == {"heads": 80}


def test_heads_that_are_thought_to_lose_are_not_opened(
    options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(monkeypatch, 1.05)
    with Runtime(dataclasses.replace(options, pack=pack_path)) as runtime:
        list(runtime.stream(runtime.text_tokens("Once upon"), 30))
        assert runtime.summary.policies == {"text": 30}


def test_exits_need_a_bound(options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(monkeypatch, 0.5)
    slow(monkeypatch, lambda player: 0.5)
    with Runtime(dataclasses.replace(options, pack=pack_path, max_disagreement=0.1)) as runtime:
        assert list(runtime.player.policies) == ["text", "heads", "exit"]
        list(runtime.stream(runtime.text_tokens("Once upon"), 30))
        assert runtime.summary.policies in ({"heads": 30}, {"exit": 30})
    with pytest.raises(PackError, match="certifies no exits"):
        Runtime(dataclasses.replace(options, pack=pack_path, max_disagreement=0.01))


def test_exits_that_are_left_are_audited_like_all_others(
    options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(monkeypatch, 0.5)
    monkeypatch.setattr(playing, "predicted_time", lambda _pack, mode, *_, **__: 0.5 if mode is Mode.EXIT else 2.0)
    slow(monkeypatch, lambda player: 3.0)
    asked = dataclasses.replace(options, pack=pack_path, max_disagreement=0.1, audit_rate=1.0, cap=40)
    with Runtime(asked) as runtime:
        steps = [c.step for c in runtime.stream(runtime.text_tokens("Once upon"), 60)]
        exits = [step.position for step in steps if step.depth < runtime.model.n_layer]
        assert exits  # with such a cap, none of them had been at full depth when they were left
        assert [audit.position for step in steps for audit in step.audits] == exits
        assert runtime.summary.policies is not None
        assert set(runtime.summary.policies) == {"exit", "text"}
        assert runtime.summary.audited == len(exits)


def test_an_interrupted_change_is_made_up_for(
    options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(options, mode=Mode.FULL)[0]
    predict(monkeypatch, 0.5)
    with Runtime(dataclasses.replace(options, pack=pack_path)) as runtime:
        with monkeypatch.context() as patch:
            patch.setattr(playing, "open_slices", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(runtime.stream(runtime.text_tokens(PROMPTS[0]), 40))
        assert [c.step.token for c in runtime.stream(runtime.text_tokens(PROMPTS[0]), 40)] == expected


def test_counts_go_on_through_changes(options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(monkeypatch, 0.5)
    slow(monkeypatch, lambda player: 3.0)
    with Runtime(dataclasses.replace(options, pack=pack_path)) as runtime:
        for prompt in PROMPTS:
            list(runtime.stream(runtime.text_tokens(prompt), 60))
        assert runtime.engine.stats.published == 180
        runtime.reopen(runtime.asked)
        summary = runtime.summary
        assert (summary.generated_tokens, summary.drafted, summary.accepted, summary.exits) == (0, 0, 0, 0)


def test_after_an_interrupted_change_all_else_works_too(
    options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(monkeypatch, 0.5)
    with Runtime(dataclasses.replace(options, pack=pack_path)) as runtime:
        with monkeypatch.context() as patch:
            patch.setattr(playing, "open_slices", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(runtime.stream(runtime.text_tokens(PROMPTS[0]), 40))
        assert runtime.summary.generated_tokens == 0
        runtime.engine.reset()
        runtime.set_threads(1)
        assert len(list(runtime.stream(runtime.text_tokens(PROMPTS[0]), 10))) == 10


def test_a_reopening_that_fails_leaves_what_there_was(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with Runtime(options) as runtime:
        expected = [c.step.token for c in runtime.stream(runtime.text_tokens(PROMPTS[0]), 20)]
        real, asked = playing.open_slices, runtime.asked

        def fail_once(*arguments: Any, **named: Any) -> Any:
            monkeypatch.setattr(playing, "open_slices", real)
            raise MemoryLimitError("no room")

        monkeypatch.setattr(playing, "open_slices", fail_once)
        with pytest.raises(MemoryLimitError):
            runtime.reopen(dataclasses.replace(asked, mode=Mode.EXIT, boundaries=(2,)))
        assert runtime.asked is asked
        assert [c.step.token for c in runtime.stream(runtime.text_tokens(PROMPTS[0]), 20)] == expected


def test_what_cannot_be_measured_steadily_is_measured_once_in_a_run(
    options: RunOptions, pack_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def measure(*_: object) -> BatchCosts:
        calls.append(None)
        return BatchCosts((1, 16), (1.0, 1.3), 0.001, invariant=True, steady=False)

    monkeypatch.setattr(opening, "measure_batch_costs", measure)
    predict(monkeypatch, 0.5)
    slow(monkeypatch, lambda player: 3.0)
    with Runtime(dataclasses.replace(options, pack=pack_path)) as runtime:
        for prompt in PROMPTS:
            list(runtime.stream(runtime.text_tokens(prompt), 60))
    assert len(calls) == 1


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def slow(monkeypatch: pytest.MonkeyPatch, takes: Callable[[Player], float]) -> None:
    """Rounds take so many token times per token; a token at full depth alone takes one."""
    count = Player._count

    def counted(self: Player, done: Round) -> None:
        probing = self._chooser is None or self._chooser.probing or not self.options.boundaries
        seconds = ONE_S * done.tokens * (1.0 if probing else takes(self))
        count(self, dataclasses.replace(done, seconds=seconds))

    monkeypatch.setattr(Player, "_count", counted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": (2,)}, "--boundaries means nothing in mode auto"),
        ({"thresholds": (1.0,)}, "--threshold means nothing in mode auto"),
        ({"signal": "top1"}, "--signal means nothing in mode auto"),
        ({"head": "shared"}, "--head means nothing in mode auto"),
        ({"draft": "ngram"}, "--draft means nothing in mode auto"),
        ({"max_disagreement": 0.1}, "needs an exit pack"),
        ({"cap": 0}, "cap 0 is too small"),
    ],
)
def test_what_auto_chooses_cannot_be_given(options: RunOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Runtime(dataclasses.replace(options, **changes))


@pytest.mark.model
def test_a_real_model_with_its_pack(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    question = [Message("user", "Repeat this line word for word: The cat sat on the mat, and the dog sat on the log.")]
    options = RunOptions(str(demo_path), n_ctx=512, n_threads=1)
    with Runtime(dataclasses.replace(options, mode=Mode.FULL)) as runtime:
        full = [c.step.token for c in runtime.stream(runtime.chat_tokens(question), 60)]
    for pack in (None, "smollm2-135m"):
        with Runtime(dataclasses.replace(options, pack=pack)) as runtime:
            assert [c.step.token for c in runtime.stream(runtime.chat_tokens(question), 60)] == full
            if pack:
                chooser = runtime.player._chooser
                predicted = {name: chooser.estimate(name) for name in ("heads",)} if chooser else {}
                assert 0.1 < predicted["heads"] < 10
