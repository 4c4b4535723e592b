"""The benchmark of exit packs: prompts kept apart, the judge, what audits and replay must agree on, drafts, reasons."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bench.exit_costs import drafting, explain, head_shares, measure_verified, part_costs
from edge_runtime.bench.exit_prompts import pack_requests
from edge_runtime.bench.exit_quality import (
    Replay,
    Replayer,
    Setting,
    binomial_interval,
    perplexities,
    rate,
    settings_for,
    study_exits,
)
from edge_runtime.bench.exit_runs import Hearing, Listener, Rig, answer, hear, held_out_requests
from edge_runtime.bench.stock import StockProcess
from edge_runtime.certify import binomial_p_value
from edge_runtime.exits.costs import Costs
from edge_runtime.exits.head import HeadWeights, final_norm, lens_shape
from edge_runtime.exits.packed_head import PackedHead
from edge_runtime.exits.prompts import Request, builtin_requests
from edge_runtime.exits.thresholds import Rung
from edge_runtime.native import ContextOptions, Model
from edge_runtime.slices import Slice
from edge_runtime.types import Mode, SamplingSettings

from .conftest import DATA, ROOT, TinyMaker
from .exit_fakes import n_vocab_of, random_pack

LAYERS = (4, 5)
OPTIONS = ContextOptions(n_ctx=256, n_batch=64, n_threads=1, flash_attention=True)
PROMPTS = [[1 + (i * k) % 250 for i in range(5 + 3 * k)] for k in (3, 5, 7)] + [[7] * 40]
NEAR_TIES = 0.03  # share of tokens whose two likeliest may swap, as sums in batches round differently
DRAWN = SamplingSettings(temperature=0.7, seed=3)


def lens(path: Path, layer: int, n_rows: int) -> PackedHead:
    """The model's own norm and output: it agrees with full depth now and then, as a random head would not."""
    norm = final_norm(path)
    shape = lens_shape(len(norm), n_rows)
    tensors = {name: np.zeros(size, np.float32) for name, size in shape.matrices.items()}
    tensors |= {name: np.ones(shape.n_embd, np.float32) for name in shape.norms}
    tensors |= {"output_norm.weight": norm, "other": np.zeros(shape.n_embd, np.float32)}
    return PackedHead.of(HeadWeights(layer, shape, tensors, np.eye(shape.n_embd, dtype=np.float32)), "Q8_0")


@pytest.fixture(scope="module")
def rig(tiny_path: TinyMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    path = tiny_path("llama", tokenizer=True, n_layer=6)
    n_ids = n_vocab_of(path)
    heads = tuple(lens(path, layer, n_ids + 1) for layer in LAYERS)
    pack = random_pack(path, LAYERS, n_ids + 1, heads=heads, default_signal="entropy")
    with pytest.MonkeyPatch.context() as patch:  # not for longer: the stock library lies in the usual cache
        patch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Rig(path, pack, OPTIONS)
    with made:
        yield made


@pytest.fixture(scope="module")
def replayer(rig: Rig) -> Iterator[Replayer]:
    with Replayer(rig.path, OPTIONS) as made:
        yield made


@pytest.fixture(scope="module")
def medium(rig: Rig) -> tuple[float, ...]:
    """Thresholds that let some tokens exit, and not all."""
    return tuple(float(np.nanmedian(item.uncertainty)) for item in hear(rig, PROMPTS, 32))


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_questions_that_were_seen_are_left_out() -> None:
    seen = builtin_requests(1500, seed=0)
    kept = held_out_requests(None, 20, seen, seed=1)
    assert list(kept) == ["chat"]
    assert len(kept["chat"]) == 20
    assert not {r.text for r in seen} & {r.text for r in kept["chat"]}
    # what the test before could not see if the two seeds had nothing in common
    assert {r.text for r in seen} & {r.text for r in builtin_requests(320, seed=1)}


@pytest.mark.skipif(not DATA.exists(), reason="set EDGE_RUNTIME_DATA to the folder with the data sets")
def test_articles_that_were_seen_are_left_out() -> None:
    seen = pack_requests(DATA, 2000, 0)
    kept = held_out_requests(DATA, 12, seen, seed=1)
    assert {kind: len(requests) for kind, requests in kept.items()} == {"chat": 12, "summarize": 12, "rewrite": 12}
    # the last 12 words of the shortest passage stand in every longer one of the same article
    everything = " ".join(" ".join(r.text.split()) for r in seen)
    for request in kept["summarize"] + kept["rewrite"]:
        assert " ".join(request.text.split()[12:24]) not in everything
    with_seen = held_out_requests(DATA, 12, [*seen, *kept["rewrite"]], seed=1)
    assert not set(kept["rewrite"]) & set(with_seen["rewrite"])


def test_another_task_on_a_text_that_was_seen_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    passage = " ".join(f"w{i}" for i in range(20))
    drawn = [Request(f"Rewrite: {passage} and more", "rewrite"), Request("Rewrite: other words", "rewrite")]
    monkeypatch.setattr("edge_runtime.bench.exit_runs.pack_requests", lambda data, n, seed: drawn)
    kept = held_out_requests(Path("unused"), 5, [Request(f"Summarize this. {passage}", "summarize")], seed=1)
    assert kept == {"chat": [], "summarize": [], "rewrite": [drawn[1]]}


# ── the judge ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_prompt", [1, 31, 32, 33, 70])
def test_a_replay_is_the_plain_loop(rig: Rig, replayer: Replayer, n_prompt: int) -> None:
    prompt, text = [1 + (i * 37) % 250 for i in range(n_prompt)], [5, 9, 9, 200] * 10
    argmax, logp = [], []
    with Model(str(rig.path)) as model:
        piece = Slice(model, 0, model.n_layer, OPTIONS)
        tokens = prompt + text
        for position, token in enumerate(tokens[:-1]):
            piece.decode_tokens([token], position, (0,))
            if position >= n_prompt - 1:
                weights = np.exp(piece.logits(0).astype(np.float64))
                argmax.append(int(weights.argmax()))
                logp.append(math.log(weights[tokens[position + 1]] / weights.sum()))
    found = replayer(prompt, text)
    # sums in batches round otherwise than token by token
    assert (found.argmax == argmax).mean() > 0.95
    assert found.logp == pytest.approx(logp, abs=0.02)
    again = replayer(prompt, text)
    assert np.array_equal(again.logp, found.logp)


def test_full_depth_replays_as_itself(rig: Rig, replayer: Replayer) -> None:
    texts = [answer(rig.full(), prompt, 24, rig.model.is_end).tokens for prompt in PROMPTS]
    same = [replayer(prompt, text).argmax == text for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert np.concatenate(same).mean() > 1 - NEAR_TIES


# ── mode exit ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampling", [SamplingSettings(), DRAWN], ids=["greedy", "drawn"])
def test_where_everything_is_audited_replay_says_the_same(
    rig: Rig, replayer: Replayer, medium: tuple[float, ...], sampling: SamplingSettings
) -> None:
    setting = Setting(0.5, medium, False, "the median")
    found = study_exits(rig, replayer, PROMPTS, setting, sampling, max_tokens=48, audit_rate=1.0)
    assert found.audit.n == found.replay.n == round(found.exits.value * found.n_tokens) > 20
    assert found.contradicted <= NEAR_TIES * found.audit.n
    assert abs(found.audit.errors - found.replay.errors) <= found.contradicted
    assert 0 < found.audit.errors < found.audit.n
    assert found.within is True
    assert rig.model.n_layer > found.mean_depth > LAYERS[0]
    assert found.same_texts < len(PROMPTS)
    assert 0 < found.same_tokens.value < 1
    assert found.perplexity.exits.value > found.perplexity.full.value or sampling is DRAWN


def test_an_audited_share_is_judged_like_all(rig: Rig, replayer: Replayer, medium: tuple[float, ...]) -> None:
    setting = Setting(0.5, medium, False, "")
    found = study_exits(rig, replayer, PROMPTS, setting, SamplingSettings(), max_tokens=48, audit_rate=0.4)
    assert 0.2 * found.replay.n < found.audit.n < 0.6 * found.replay.n
    assert found.contradicted <= NEAR_TIES * found.replay.n


def test_without_exits_the_text_is_full_depths(rig: Rig, replayer: Replayer) -> None:
    setting = Setting(0.01, (0.0, 0.0), False, "")
    found = study_exits(rig, replayer, PROMPTS, setting, DRAWN, max_tokens=16, audit_rate=1.0)
    assert (found.exits.value, found.mean_depth, found.same_texts) == (0, rig.model.n_layer, len(PROMPTS))
    assert found.same_tokens.value == 1
    assert found.audit.n == 0
    assert found.within is None
    assert math.isnan(found.replay.value)
    assert found.perplexity.ratio.value == pytest.approx(1)


def test_a_wrong_audit_would_be_seen(
    rig: Rig, replayer: Replayer, medium: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the equality above can see: a judge that reads another text contradicts the audits."""
    monkeypatch.setattr(
        Replayer, "__call__", lambda self, prompt, text: Replay(np.zeros(len(text), np.int32), np.zeros(len(text)))
    )
    setting = Setting(0.5, medium, False, "")
    found = study_exits(rig, replayer, PROMPTS, setting, SamplingSettings(), max_tokens=32, audit_rate=1.0)
    assert found.contradicted > 3 * NEAR_TIES * found.audit.n
    assert found.replay.errors > found.audit.errors


def test_perplexity_is_e_to_the_mean_surprise() -> None:
    def replay(*probabilities: float) -> Replay:
        return Replay(np.zeros(len(probabilities), np.int32), np.log(probabilities))

    found = perplexities([replay(0.5, 0.5), replay(0.25, 0.25, 0.25, 0.25)], [replay(0.5), replay(0.5)])
    assert found.exits_by_prompt == pytest.approx([2, 4])
    assert found.exits.value == pytest.approx(2 ** (10 / 6))
    assert found.full.value == pytest.approx(2)
    assert found.ratio.value == pytest.approx(2 ** (10 / 6) / 2)
    assert found.full.low == pytest.approx(found.full.high)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1, 2))


def test_exact_limits_of_a_share() -> None:
    low, high = binomial_interval(3, 40)
    assert (low, high) == pytest.approx((0.01574, 0.20386), abs=1e-4)  # tables of Clopper and Pearson
    assert binomial_p_value(3, 40, high) == pytest.approx(0.025, rel=1e-6)
    assert binomial_interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert binomial_interval(10, 10) == pytest.approx((0.025**0.1, 1))


def test_a_rate_without_errors_still_has_a_width() -> None:
    found = rate([0, 0, 1, 1, 2], [False] * 5)
    assert (found.value, found.by_prompt.high) == (0, 0)
    assert found.holds(0.3)
    assert not found.holds(0.6)
    assert math.isnan(rate([], []).value)


# ── thresholds ──────────────────────────────────────────────────────────────────────────────────────────────────────


def heard(n: int = 400) -> list[Hearing]:
    """Two boundaries; disagreement falls as certainty grows, and none where the uncertainty is below 0.2."""
    random = np.random.default_rng(0)
    prompts = np.repeat(np.arange(n // 20, dtype=np.int32), 20)
    made = []
    for _ in LAYERS:
        unsure = random.random(n).astype(np.float32)
        made.append(Hearing(prompts, ~((unsure > 0.2) & (random.random(n) < unsure)), unsure))
    return made


def rung(bound: float, risk: str, threshold: float, **changes: Any) -> Rung:
    seen = {"kind": "disagreement", "n": 99, "risk": 0.0, "holds": True}
    return Rung(**{"signal": "entropy", "risk": risk, "bound": bound, "delta": 0.05} | changes, certificate=seen,
                thresholds=(threshold,) * 2)  # fmt: skip


def test_certified_thresholds_come_before_selected_ones(rig: Rig) -> None:
    import dataclasses

    rungs = (
        rung(0.02, "tokens", 0.5),
        rung(0.02, "exits", 0.3),
        rung(0.02, "acceptance", 0.9),
        rung(0.05, "tokens", 0.7, signal="margin"),
        rung(0.05, "tokens", 0.8, method="crc"),
    )
    pack = dataclasses.replace(rig.pack, rungs=rungs)
    one, two, five = settings_for(pack, "entropy", heard(), (0.01, 0.02, 0.05))
    assert two.certified
    assert two.thresholds == (0.3, 0.3)
    assert two.origin.startswith("risk exits")
    assert not one.certified
    assert not five.certified
    assert "selected on 20 other prompts" in five.origin
    assert 0.05 < one.thresholds[0] <= five.thresholds[0] < 0.9


def test_where_no_policy_is_good_enough_nothing_exits(rig: Rig) -> None:
    wrong = [Hearing(h.prompts, np.zeros_like(h.agree), h.uncertainty) for h in heard()]
    (found,) = settings_for(rig.pack, "margin", wrong, (0.05,))
    assert found.thresholds == (0, 0)
    assert "no policy" in found.origin


def test_hearing_is_full_depth_text_and_every_boundary(rig: Rig) -> None:
    said = hear(rig, PROMPTS, 24)
    full = [answer(rig.full(), prompt, 24, rig.model.is_end).tokens for prompt in PROMPTS]
    assert [len(item.prompts) for item in said] == [sum(map(len, full))] * 2
    listener = Listener(rig.heads, mute=True)
    engine = rig.exits(Mode.EXIT, (math.inf, math.inf), listener=listener)
    text = answer(engine, PROMPTS[0], 24, rig.model.is_end)
    assert text.tokens == full[0]
    tops = [listener.said.get(s.position, {}).get(2, (0, -1))[1] for s in text.steps]
    assert [top == token for top, token in zip(tops, text.tokens, strict=True)] == said[1].agree[: len(tops)].tolist()
    assert said[1].agree.mean() > 0


# ── mode verified ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampling", [SamplingSettings(), DRAWN], ids=["greedy", "drawn"])
def test_verified_texts_are_full_depths(rig: Rig, medium: tuple[float, ...], sampling: SamplingSettings) -> None:
    found = measure_verified(rig, "chat", PROMPTS, medium, sampling, max_tokens=32)
    d = found.drafting
    assert found.differing == 0
    assert found.against_full is found.against_stock is found.differing_from_stock is None
    assert 0 < d.accepted < d.drafted
    assert d.rounds <= d.settles
    assert d.draft_length == d.drafted / d.rounds >= d.drafts_per_settle > 0
    # one token of its own with every settle, but for a text that ends with an accepted draft
    assert d.settles <= d.n_tokens <= d.settles + d.accepted
    assert d.acceptance == d.accepted / d.drafted


def test_drafts_are_counted_as_the_engine_counts_them(rig: Rig) -> None:
    engine = rig.exits(Mode.VERIFIED, (0.0, math.inf))
    found = [answer(engine, prompt, 32, rig.model.is_end) for prompt in PROMPTS]
    counted = drafting(found)
    assert counted.drafted == engine.stats.drafted
    assert counted.accepted == engine.stats.accepted
    # every settle begins with drafts, up to the cap; of the last one's some are left when there are tokens enough
    assert counted.rounds == counted.settles
    assert rig.cap - len(PROMPTS) * rig.cap / counted.settles < counted.draft_length <= rig.cap


def test_speeds_are_compared_pair_by_pair(rig: Rig, medium: tuple[float, ...]) -> None:
    found = measure_verified(rig, "chat", PROMPTS[:2], medium, max_tokens=6, repeats=2)
    assert found.against_full is not None
    assert found.against_full.ratio.n == 2
    assert found.against_full.ours.low > 0


@pytest.mark.stock
def test_stock_is_the_other_side(rig: Rig, medium: tuple[float, ...], stock: StockProcess) -> None:
    stock.open(rig.path, n_ctx=256, n_batch=64, n_threads=1, flash_attention=True)
    found = measure_verified(rig, "chat", PROMPTS, medium, max_tokens=12, repeats=1, stock=stock)
    assert found.differing_from_stock == 0
    assert found.against_stock is not None
    assert found.against_stock.ratio.n == 1
    drawn = measure_verified(rig, "chat", PROMPTS[:1], medium, DRAWN, max_tokens=4, stock=stock)
    assert drawn.differing_from_stock is None


# ── why ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def made_costs(factor: float) -> Costs:
    """Slices of 4 + 1 + 1 ms; a batch of k costs `factor` · (k - 1) more."""

    def batch(ms: float) -> tuple[float, ...]:
        return tuple(ms * (1 + factor * k) for k in range(9))

    return Costs(LAYERS, (batch(2), batch(2), batch(2)), batch(2), (batch(0.1), batch(0.1)), batch(6))


@pytest.mark.parametrize(
    ("agreement", "factor", "words"),
    [(1.0, 0.1, "pays: "), (0.1, 0.1, "too few drafts"), (1.0, 1.0, "batches cost too much")],
)
def test_a_verdict_names_what_is_to_blame(rig: Rig, agreement: float, factor: float, words: str) -> None:
    random = np.random.default_rng(0)
    prompts, unsure = np.repeat(np.arange(4, dtype=np.int32), 100), np.zeros(400, np.float32)
    heads = [Hearing(prompts, random.random(400) < agreement, unsure) for _ in LAYERS]
    reason = explain(rig, heads, (1.0, 0.0), made_costs(factor))
    assert reason.sentence().startswith("pays: ") == (words == "pays: ")
    assert words in reason.sentence()
    assert reason.flat.ms_per_token <= reason.predicted.ms_per_token
    assert reason.all_agreed.ms_per_token <= reason.predicted.ms_per_token


def test_parts_and_heads_are_timed(rig: Rig) -> None:
    costs = part_costs(rig, n_repeats=1)
    assert costs.layers == LAYERS
    assert {len(times) for times in (*costs.slices, *costs.heads, costs.full)} == {rig.cap + 1}
    shares = head_shares(rig, 1, repeats=2, n_tokens=3)
    assert list(shares) == list(LAYERS)
    assert all(share.ratio.n == 2 and share.ratio.low > 0 for share in shares.values())


# ── the script ──────────────────────────────────────────────────────────────────────────────────────────────────────


def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "bench_exits"), run_name="bench_exits")


def test_help_needs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_exits"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--quick" in done.stdout
    assert "examples:" in done.stdout


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_exits"), "--pack", str(tmp_path / "none.gguf")],
        capture_output=True,
        text=True,
        env={**os.environ, "EDGE_RUNTIME_CACHE": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_tables_and_json_show_every_figure(
    rig: Rig, replayer: Replayer, medium: tuple[float, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    made = script()
    drawn = measure_verified(rig, "rewrite", PROMPTS[:2], medium, DRAWN, max_tokens=8)
    said = hear(rig, PROMPTS, 8)
    reason = explain(rig, said, medium, made_costs(0.5))
    setting = Setting(0.05, medium, False, "selected somewhere")
    exits = study_exits(rig, replayer, PROMPTS[:2], setting, DRAWN, max_tokens=8, audit_rate=1.0, repeats=1)
    shares = {1: head_shares(rig, 1, repeats=1, n_tokens=2)}
    made["show_verified"]([drawn], {"rewrite": reason})
    made["show_exits"]([exits])
    made["show_heads"](shares)
    shown = capsys.readouterr().out
    for table in (line for line in shown.split("\n\n") if line.startswith("|")):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    for words in ("rewrite", "0.7", "does not pay" if not reason.predicted.pays else "pays", "selected somewhere"):
        assert words in shown
    data = json.loads(json.dumps(made["as_data"]({"exits": [exits], "verified": [drawn], "heads": shares})))
    assert data["exits"][0]["replay"]["n"] == exits.replay.n
    assert data["exits"][0]["setting"]["thresholds"] == list(medium)
    assert data["verified"][0]["drafting"]["acceptance"] == pytest.approx(drawn.drafting.acceptance)
