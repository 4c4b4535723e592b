"""The benchmark of mode auto: its prompts, what is compared with what, and all sides on a model of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.bench.auto_costs import AutoRig, measure_auto, open_stock, summarise_auto
from edge_runtime.bench.auto_prompts import HELPFUL, HOSTILE, KINDS, user_texts
from edge_runtime.bench.draft_costs import TimedAnswer
from edge_runtime.bench.stock import StockProcess
from edge_runtime.generate import RunOptions
from edge_runtime.types import Mode

from .conftest import TinyMaker
from .exit_fakes import random_pack

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [100, 101, 102, 100, 101]]


def quiet(_text: str) -> None:
    pass


@pytest.fixture
def options(tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    path = tiny_path("llama", n_layer=2, weights="Q8_0", tokenizer=True)
    return RunOptions(str(path), n_ctx=128, n_batch=32, n_threads=1, flash_attention=True)


@pytest.fixture
def rig(options: RunOptions) -> Iterator[AutoRig]:
    with AutoRig(options, quiet) as made:
        yield made


def test_every_kind_has_four_texts_that_are_the_same_each_time() -> None:
    assert set(HOSTILE) | set(HELPFUL) == set(KINDS)
    for kind in KINDS:
        assert len(set(user_texts(kind))) == 4
        assert user_texts(kind) == user_texts(kind)
    assert user_texts("strings", 1) != user_texts("strings", 2)
    assert min(map(len, user_texts("long chat"))) > 3000


def test_auto_is_compared_with_stock_and_with_the_best_of_its_policies() -> None:
    def answer(seconds: float, tokens: tuple[int, ...] = (1, 2, 3)) -> TimedAnswer:
        return TimedAnswer(tokens, seconds / 2, seconds / 2, 4, 2)

    sides = {"stock": 2.0, "full": 1.5, "verified": 1.0, "auto": 1.25}
    found = summarise_auto("chat", [{side: [answer(s)] * 3 for side, s in sides.items()}] * 2, ("verified", "auto"))
    assert (found.n_prompts, found.n_tokens, found.drafted, found.accepted) == (2, 6, 8, 4)
    assert {side: ratio.median for side, ratio in found.over_stock.items()} == pytest.approx(
        {"full": 4 / 3, "verified": 2.0, "auto": 1.6}
    )
    assert found.best == "verified"
    assert found.over_best.median == pytest.approx(0.8)
    assert found.unlike_full == 0


def test_a_text_unlike_full_depth_is_counted_for_every_lossless_side() -> None:
    same, other = TimedAnswer((1, 2), 1.0, 1.0), TimedAnswer((1, 9), 1.0, 1.0)
    answers = {"stock": [same] * 2, "full": [same] * 2, "verified": [same, other], "exit": [other] * 2}
    found = summarise_auto("chat", [{**answers, "auto": [other] * 2}], ("full", "verified", "auto"))
    assert found.unlike_full == 2


def test_each_policy_is_a_side(rig: AutoRig, options: RunOptions, tmp_path: Path) -> None:
    assert rig.policies == ("full", "verified")
    assert [runtime.asked.mode for runtime in rig.runtimes.values()] == [Mode.FULL, Mode.VERIFIED, Mode.AUTO]
    texts = {name: [rig.answer(name, prompt, 20).tokens for prompt in PROMPTS * 2] for name in rig.runtimes}
    assert texts["auto"] == texts["verified"] == texts["full"]
    assert [len(text) for text in texts["full"]] == [20] * 4
    path = tmp_path / "pack.gguf"
    random_pack(Path(options.model), (1,), verify_thresholds=(1.0,)).save(path)
    with AutoRig(RunOptions(options.model, n_ctx=128, n_threads=1, pack=str(path)), quiet) as with_pack:
        assert with_pack.policies == ("full", "verified", "heads")
        assert with_pack.lossless == ("full", "verified", "heads", "auto")
        assert with_pack.answer("heads", PROMPTS[0], 20).tokens == texts["full"][0]


@pytest.mark.stock
def test_all_sides_answer(rig: AutoRig, stock_library: Path) -> None:
    said: list[str] = []
    with StockProcess(stock_library) as stock:
        open_stock(stock, rig)
        found = measure_auto(rig, {"chat": PROMPTS}, stock, max_tokens=8, repeats=2, say=said.append)
    assert [result.kind for result in found] == ["chat"]
    assert found[0].unlike_full == 0
    assert set(found[0].over_stock) == {"full", "verified", "auto"}
    assert all(speed > 0 for speed in found[0].per_second.values())
    assert "24 of 24" in said[-1]
