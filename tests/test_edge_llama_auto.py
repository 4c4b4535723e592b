"""`EdgeLlama` in mode auto with an exit pack, and under targets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LlamaGrammar

from edge_runtime import opening, playing, steering
from edge_runtime.auto import Round
from edge_runtime.batch_costs import BatchCosts
from edge_runtime.errors import PackError, UsageError
from edge_runtime.exits.costs import Costs
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.llama import EdgeLlama
from edge_runtime.native.context import Context
from edge_runtime.pilot import Pilot, TokenTimes
from edge_runtime.playing import Player
from edge_runtime.types import Mode, SamplingSettings

pytestmark = pytest.mark.model

ONE_S = 0.001
COSTS = Costs((16, 20), ((1.0, 1.2),) * 3, (1.0, 1.2), ((0.1, 0.1),) * 2, (3.0, 3.3))
PROMPTS = ("Once upon a time", "Tom, Tom, the piper's son, Tom, Tom,", "The capital of France is")
N = 48

Opener = Callable[..., EdgeLlama]


@pytest.fixture
def open_llama(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    costs = BatchCosts((1, 16), (1.0, 1.3), ONE_S, invariant=True)
    monkeypatch.setattr(opening, "measure_batch_costs", lambda *_: costs)
    monkeypatch.setattr(playing, "kept_part_costs", lambda *_: COSTS)

    def open_(**arguments: Any) -> EdgeLlama:
        usual = {"n_ctx": 512, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        return EdgeLlama(str(demo_path), **{**usual, **arguments})

    return open_


def predict(monkeypatch: pytest.MonkeyPatch, heads: float, exits: float = 2.0) -> None:
    monkeypatch.setattr(playing, "predicted_time", lambda _pack, mode, *_, **__: exits if mode is Mode.EXIT else heads)


def slices_take(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Rounds in slices take so many token times per token; a token at full depth alone takes one."""
    count = Player._count

    def counted(self: Player, done: Round) -> None:
        probing = self._chooser is None or self._chooser.probing or not self.options.boundaries
        count(self, dataclasses.replace(done, seconds=ONE_S * done.tokens * (1.0 if probing else times)))

    monkeypatch.setattr(Player, "_count", counted)


def answers(llama: EdgeLlama, **arguments: Any) -> list[str]:
    usual = {"max_tokens": N, "temperature": 0.0}
    return [str(llama(prompt, **{**usual, **arguments})["choices"][0]["text"]) for prompt in PROMPTS]


def shallow(llama: EdgeLlama) -> int:
    """Tokens that left before the last layer."""
    return sum(n for depth, n in llama.stats.by_depth.items() if depth < 30)


SAMPLED = {"temperature": 0.8, "seed": 5, "repeat_penalty": 1.1}


@pytest.fixture
def full(open_llama: Opener) -> dict[str, list[str]]:
    with open_llama(mode="full") as llama:
        return {"greedy": answers(llama), "sampled": answers(llama, **SAMPLED)}


@pytest.mark.parametrize("takes", [0.5, 3.0])
def test_heads_write_what_full_depth_would(
    open_llama: Opener, full: dict[str, list[str]], takes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(monkeypatch, 0.5)
    slices_take(monkeypatch, takes)
    with open_llama(pack="smollm2-135m") as llama:
        assert answers(llama) == full["greedy"]
        assert bool(llama.boundaries) == (takes < 1)  # left in the middle of an answer where they lose
        assert answers(llama, **SAMPLED) == full["sampled"]
        assert llama.n_ctx() == 512
        saved = llama.save_state()
        after = next(llama.generate([], temp=0.0, reset=False))
        llama.reset()
        llama.load_state(saved)
        assert next(llama.generate([], temp=0.0, reset=False)) == after


def test_a_change_in_the_middle_is_seen_by_llama_at_once(
    open_llama: Opener, full: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(monkeypatch, 0.5)
    slices_take(monkeypatch, 3.0)
    with open_llama(pack="smollm2-135m") as llama:
        text, seen = "", set()
        for chunk in llama(PROMPTS[0], max_tokens=N, temperature=0.0, stream=True):
            text += chunk["choices"][0]["text"]
            seen.add(llama.boundaries)
            assert llama.n_ctx() == 512
        assert text == full["greedy"][0]
        assert len(seen) == 2


def test_exits_are_only_for_who_allows_them(open_llama: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(monkeypatch, heads=2.0, exits=0.5)
    slices_take(monkeypatch, 0.5)
    with open_llama(pack="smollm2-135m") as llama:
        answers(llama)
        assert shallow(llama) == 0
    with pytest.raises(PackError):
        open_llama(pack="smollm2-135m", max_disagreement=1e-6)
    bound = 0.2
    with open_llama(pack="smollm2-135m", max_disagreement=bound) as llama:
        answers(llama)
        before = shallow(llama)
        assert before > 0
        grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
        answer = llama("Is water wet?", max_tokens=4, temperature=0.0, grammar=grammar)
        assert answer["choices"][0]["text"] in ("yes", "no")
        assert shallow(llama) == before
        assert any(note.startswith("grammar: such answers come from full depth") for note in llama.notes)


def test_an_interrupted_change_is_made_up_for(
    open_llama: Opener, full: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(monkeypatch, 0.5)
    slices_take(monkeypatch, 0.5)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with open_llama(pack="smollm2-135m") as llama:
        with monkeypatch.context() as patch:
            patch.setattr(playing, "open_slices", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llama(PROMPTS[0], max_tokens=N)
        assert llama.n_ctx() == 512
        assert answers(llama) == full["greedy"]


@pytest.mark.parametrize("mode", ["full", "auto"])
@pytest.mark.parametrize("what", ["eval", "generate"])
def test_logits_that_an_interrupted_decode_has_overwritten_are_not_used(
    open_llama: Opener, mode: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_llama(mode=mode) as llama, open_llama(mode="full") as other:
        tokens = llama.tokenize(b"Once upon a time there was a fox")
        stream = llama.generate(tokens, temp=0.0)
        for _ in range(5):
            next(stream)
        decode = Context._decode

        def interrupted(self: Context, *arguments: Any) -> None:
            decode(self, *arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Context, "_decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(stream) if what == "generate" else llama.eval(llama.tokenize(b" and a dog", add_bos=False))
        text = llama._input_ids.tolist()
        assert next(llama.generate([], temp=0.0, reset=False)) == next(other.generate(text, temp=0.0))


def test_what_is_closed_is_an_error_and_no_crash(demo_path: Path) -> None:
    with Runtime(RunOptions(str(demo_path), n_ctx=256, sampling=SamplingSettings(0.8, repeat_penalty=1.2))) as runtime:
        next(runtime.stream([5, 6], 5))
    with pytest.raises(UsageError, match="closed"):
        next(runtime.stream([5, 6], 5))


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_targets_are_held_and_change_no_text(
    open_llama: Opener, full: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {1: TokenTimes(20.0), 2: TokenTimes(12.0)}
    monkeypatch.setattr(steering, "measure_token_times", lambda *_: (times, False))
    told, token, before = [], Pilot.token, threading.active_count()
    monkeypatch.setattr(Pilot, "token", lambda self: (told.append(self._rung.n_threads), token(self)))
    with open_llama(targets={"latency_ms": 60_000.0}, profile="pi5", n_threads=2, n_threads_batch=2) as llama:
        assert answers(llama) == full["greedy"]
        assert threading.active_count() > before
    assert set(told) == {1}  # nothing asks for more
    assert len(told) > N
    assert threading.active_count() == before


def test_a_profile_sets_what_is_not_said(open_llama: Opener) -> None:
    with open_llama(mode="full", profile="pi5", n_threads=None, n_threads_batch=None) as llama:
        assert llama.n_threads >= 1
        assert llama.context_params.n_ubatch <= 512
    with open_llama(mode="full", profile="pi5", n_ubatch=32) as llama:
        assert llama._player is not None
        assert llama._player.options.n_batch == 32


def test_a_profiles_batch_is_not_for_what_llama_does_itself(open_llama: Opener) -> None:
    with (
        open_llama(embedding=True, pooling_type=2, profile="x86-64") as llama,
        open_llama(embedding=True, pooling_type=2) as plain,
    ):
        text = "word " * 300
        assert llama.embed(text) == plain.embed(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "nonsense"}, "there is no target 'nonsense'"),
        ({"targets": {}}, r"these are no targets: \{\}"),
        ({"targets": 5}, "these are no targets: 5"),
        ({"targets": {"watts": 5.0}}, "these are no targets: watts=5.0"),
        ({"targets": {"power_cap_w": "5"}}, "these are no targets: power_cap_w='5'"),
        ({"targets": {"power_cap_w": -5.0}}, "a power cap of -5.0 W cannot be held"),
        ({"targets": "quiet", "profile": "pi5", "mode": "margin"}, "targets cannot be held in mode margin"),
        ({"targets": "quiet", "profile": "pi5", "logits_all": True}, "targets cannot be had together with logits_all"),
        ({"targets": {"latency_ms": True}}, "these are no targets: latency_ms=True"),
        ({"profile": "no-such-board"}, "no-such-board"),
        ({"profile": ""}, "'' is no profile"),
        ({"profile": 5}, "5 is no profile"),
    ],
)
def test_targets_that_are_none_are_refused(open_llama: Opener, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_llama(**arguments)
