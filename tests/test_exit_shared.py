"""Exits through the model's own output head: calibrated without training, certified, and run by what the pack says."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from edge_runtime.draft import BoundaryView, SharedHead
from edge_runtime.errors import BoundaryError, PackError, UnsupportedModelError, UsageError
from edge_runtime.exits import calibrate as pipeline
from edge_runtime.exits import costs, shared
from edge_runtime.exits.baselines import logit_lens
from edge_runtime.exits.collect import CollectOptions, Collector, Prompt, collect
from edge_runtime.exits.corpus import Corpus, Text
from edge_runtime.exits.costs import measure_costs
from edge_runtime.exits.head import final_norm, output_rows
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.report import draw, report_lines
from edge_runtime.exits.split import split
from edge_runtime.exits.splits import prompts_for
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.identity import identify
from edge_runtime.native import ContextOptions, Model
from edge_runtime.slices import Slice, close_slices, open_slices
from edge_runtime.types import Mode, Signals

from .cli_helpers import Result, RunCli, assert_clean, runner
from .conftest import TinyMaker
from .exit_fakes import random_pack
from .test_calibrate import failing, fixed_costs

READY = 3  # layers of the exit-ready model that do anything
PROMPTS = ("--text", "own.txt", "--no-builtin")


@pytest.fixture(scope="module")
def plain_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture(scope="module")
def ready_path(plain_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers behind the third add nothing, so that its head says the same behind each of them."""
    path = tmp_path_factory.mktemp("ready") / "ready.gguf"
    shutil.copy(plain_path, path)
    for tensor in GGUFReader(path, "r+").tensors:
        _, layer, kind, *_ = (*tensor.name.split("."), "", "")
        if kind in ("attn_output", "ffn_down") and int(layer) >= READY:
            tensor.data[:] = 0
            tensor.data.flush()
    return path


@pytest.fixture(scope="module")
def packs(
    plain_path: Path, ready_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, pytest.MonkeyPatch, RunCli], tuple[Path, Result]]:
    """packs("ready" | "all" | "plain", …): a pack by the command line, made once, and what was printed.

    "all" is of all boundaries, the others of those that pay.
    """
    folder = tmp_path_factory.mktemp("packs")
    (folder / "own.txt").write_text("".join(f"What is ship {i}?\n" for i in range(60)))
    made: dict[str, tuple[Path, Result]] = {}

    def make(name: str, monkeypatch: pytest.MonkeyPatch, run: RunCli) -> tuple[Path, Result]:
        if name not in made:
            model = plain_path if name == "plain" else ready_path
            options = ["--max-tokens", 8, "--threads", 1, "--boundaries", "2,3,5", "--json", "--quiet"]
            options += ["--pack-all"] if name == "all" else []
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                patch.setenv("EDGE_RUNTIME_CACHE", str(folder / "cache"))
                patch.setattr(pipeline, "measure_costs", fixed_costs)
                out = f"{name}.exits.gguf"
                result = run("calibrate", "-m", model, "--head", "shared", *PROMPTS, *options, "--out", out)
            assert_clean(result, 0)
            made[name] = folder / out, result
        return made[name]

    return make


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def ready_pack(packs: Any, monkeypatch: pytest.MonkeyPatch, run: RunCli) -> Path:
    return packs("ready", monkeypatch, run)[0]


@pytest.fixture
def options(ready_path: Path, ready_pack: Path) -> RunOptions:
    return RunOptions(str(ready_path), Mode.EXIT, n_ctx=256, n_threads=1, pack=str(ready_pack), audit_rate=1.0)


# ── calibration ─────────────────────────────────────────────────────────────────────────────────────────────────────


def certified(report: dict[str, Any]) -> set[float]:
    """Bounds on the disagreement of exits that hold."""
    return {c["bound"] for c in report["certificates"] if c["holds"] and c["kind"] == "disagreement of exits"}


def test_a_model_made_for_exits_is_certified(packs: Any, monkeypatch: pytest.MonkeyPatch, run: RunCli) -> None:
    path, result = packs("ready", monkeypatch, run)
    pack, report = ExitPack.load(path), json.loads(result.out)
    assert pack.shared
    assert set(pack.boundaries) <= {3, 5}  # the second layer is one too early
    assert certified(report) >= {0.1, 0.2}
    assert report["head"] == "shared"
    agreement = {found["layer"]: found["agreement"][0] for found in report["quality"]}
    assert agreement[2] < 0.9 < 0.95 < min(agreement[3], agreement[5])
    # nothing is learned, so that the prompts for it certify
    assert report["text"]["splits"]["train"] == 0
    assert report["text"]["splits"]["certify"] > 40
    assert not any("was not trained to exit" in note for note in report["notes"])
    names = {row["name"] for row in report["baselines"]}
    assert names == {"head", "cosine stability", "fixed exits"}
    assert (report["quantisation"], report["asking"], report["variants"]) == ({}, {}, [])
    assert pack.default_signal in ("entropy", "top1", "margin", "stability", "gate")


def test_the_report_says_whose_head_it_is(ready_pack: Path, tmp_path: Path) -> None:
    report = ExitPack.load(ready_pack).report
    lines = report_lines(report)
    assert any("the model's own output head: nothing was trained" in line for line in lines)
    assert not any(word in line for line in lines for word in ("shortlist", "before quant", "SLERP", "nan"))
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_stock_model_is_not(packs: Any, monkeypatch: pytest.MonkeyPatch, run: RunCli, plain_path: Path) -> None:
    path, result = packs("plain", monkeypatch, run)
    report = json.loads(result.out)
    assert certified(report) == set()
    agreement = max(found["agreement"][0] for found in report["quality"])
    assert any(f"agrees with full depth on {agreement:.0%} of the tokens at most" in note for note in report["notes"])
    changes: dict[str, Any] = {"max_disagreement": 0.05}
    with pytest.raises(PackError, match="certifies no exits") as error:
        Runtime(RunOptions(str(plain_path), Mode.EXIT, pack=str(path), n_threads=1, **changes))
    assert error.value.hint


def test_a_second_run_computes_nothing_again(
    packs: Any, ready_path: Path, ready_pack: Path, monkeypatch: pytest.MonkeyPatch, run: RunCli, tmp_path: Path
) -> None:
    monkeypatch.chdir(ready_pack.parent)
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(ready_pack.parent / "cache"))
    for module, name in ((pipeline, "measure_costs"), (shared, "logit_lens")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr(Collector, "texts", lambda *_: pytest.fail("collected again"))
    common = ("--max-tokens", 8, "--threads", 1, "--boundaries", "2,3,5", "--out", tmp_path / "ready.exits.gguf")
    result = run("calibrate", "-m", ready_path, "--head", "shared", *PROMPTS, *common)
    assert_clean(result, 0)
    assert ExitPack.load(tmp_path / "ready.exits.gguf").digest == ExitPack.load(ready_pack).digest


def test_an_interrupted_run_ends_as_one_that_was_not(
    ready_path: Path, ready_pack: Path, monkeypatch: pytest.MonkeyPatch, run: RunCli, tmp_path: Path
) -> None:
    monkeypatch.chdir(ready_pack.parent)
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "measure_costs", fixed_costs)
    out = tmp_path / "ready.exits.gguf"
    common = ("--max-tokens", 8, "--threads", 1, "--boundaries", "2,3,5", "--quiet", "--out", out)
    stages = (
        (Collector, "_run", 20),
        (shared, "logit_lens", 4),
        (pipeline, "measure_costs", 0),
        (pipeline, "certify", 1),
    )
    for module, name, times in stages:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), KeyboardInterrupt(), times))
            result = run("calibrate", "-m", ready_path, "--head", "shared", *PROMPTS, *common)
        assert result.code == 130, name
        assert not out.exists()
    assert_clean(run("calibrate", "-m", ready_path, "--head", "shared", *PROMPTS, *common), 0)
    assert ExitPack.load(out).digest == ExitPack.load(ready_pack).digest


@pytest.mark.parametrize(
    "given",
    [("--trainer", "ridge"), ("--compare",), ("--labels", "hard"), ("--shortlist", 99), ("--quantisation", "q8_0")],
)
def test_options_of_training_are_refused(
    given: Sequence[object], run: RunCli, plain_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("calibrate", "-m", plain_path, "--head", "shared", *given)
    assert_clean(result, 2)
    assert f"{given[0]} is for heads that are trained" in result.err
    assert f"leave out {given[0]}" in result.err


def test_texts_to_be_read_are_left_out(
    run: RunCli, plain_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"Harbour {i}."}) + "\n" for i in range(50)))
    result = run("calibrate", "-m", plain_path, "--head", "shared", "--text", "own.jsonl", "--no-builtin")
    assert result.code == 2
    assert "no prompt" in result.err


def test_a_head_that_is_more_than_a_matrix_is_refused(
    run: RunCli, tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tiny_path("gemma2", tokenizer=True)
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        shared.check_model(path)
    result = run("calibrate", "-m", path, "--head", "shared", "--threads", 1, "--quiet")
    assert_clean(result, 1)
    assert "leave out --head shared" in result.err


def test_fewer_prompts_are_needed_where_nothing_is_trained() -> None:
    assert prompts_for(0.02, 0.05, trained=False) < prompts_for(0.02, 0.05) / 5


# ── the lens is the head ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def collected(
    request: pytest.FixtureRequest, tiny_path: TinyMaker, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Text]]:
    """Texts of a random model, with states behind layers 2 and 4."""
    path = tiny_path("llama", tokenizer=True, weights=request.param)
    prompts = [Prompt(i, tuple(range(10 + i, 22 + i)), 0.7) for i in range(8)]
    corpus = Corpus(tmp_path_factory.mktemp("corpus"), {})
    with Model(str(path)) as model:
        shards = collect(model, prompts, CollectOptions((2, 4), max_tokens=16, n_threads=1), corpus, lambda *_: None)
    return path, [text for shard in shards for text in shard.texts()]


def test_the_lens_says_what_a_slice_says(collected: tuple[Path, list[Text]]) -> None:
    """States were kept as float16, and llama.cpp rounds them to 8 bits where the output matrix is quantised."""
    path, texts = collected
    full = np.concatenate([text.targets("top_ids")[:, 0] for text in texts])
    agree, entropy, margin = [], [], []
    with Model(str(path)) as model:
        rows = output_rows(path, np.arange(model.n_vocab, dtype=np.int32))
        found = logit_lens(texts, 4, final_norm(path), rows, previous_layer=2)
        slices = open_slices(model, (4,), ContextOptions(n_ctx=256, n_threads=1))
        try:
            for text in texts:
                tokens = [int(t) for t in text.shard["tokens"][text.start : text.end]]
                targets = set(text.target_rows.tolist())
                slices[0].remove(0)
                for position, token in enumerate(tokens):
                    slices[0].decode_tokens([token], position, (0,))
                    if position in targets:
                        logits = slices[0].logits(0).astype(np.float64)
                        p = np.exp(logits - logits.max())
                        p /= p.sum()
                        agree.append(int(p.argmax()))
                        entropy.append(-(p * np.log(p)).sum())
                        margin.append(np.subtract(*np.sort(p)[[-1, -2]]))
        finally:
            close_slices(slices)
    assert len(found) == len(agree) > 50
    same = found.agree == (np.array(agree) == full)
    assert same.mean() >= 0.98
    assert (np.array(margin)[~same] < 0.01).all()  # near-ties alone
    tolerance = 0.01 if "F32" in path.name or "weights" not in path.name else 0.05
    assert found.values["entropy"] == pytest.approx(entropy, abs=tolerance)
    assert found.values["margin"] == pytest.approx(margin, abs=tolerance)
    assert found.in_shortlist.all()
    assert found.guessed.all()
    assert np.isnan(found.values["clusters"]).all()


def test_the_cost_of_the_own_head_is_what_a_slice_takes_longer(
    plain_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock for which a layer takes a second per token, and a row of logits ten."""
    now = [0.0]

    def timed(decode: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(part: Slice, rows: Sequence[Any], first: int, want: Sequence[int] = (), **options: Any) -> Any:
            now[0] += (part.end - part.start) * len(rows) + 10 * len(want)
            return decode(part, rows, first, want, **options)

        return wrapped

    for name in ("decode_tokens", "decode_states"):
        monkeypatch.setattr(Slice, name, timed(getattr(Slice, name)))
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with Model(str(plain_path)) as model:
        found = measure_costs(model, (2, 5), None, n_threads=1, largest=3, n_repeats=1)
        assert not model.contexts
    assert found.heads == ((10_000, 10_000, 10_000),) * 2
    assert found.slices == ((2000, 4000, 6000), (3000, 6000, 9000), (12_000, 14_000, 16_000))
    assert found.full == (17_000, 34_000, 51_000)


# ── what runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_certified_exits_agree_with_full_depth(options: RunOptions, ready_pack: Path) -> None:
    pack = ExitPack.load(ready_pack)
    for head in (None, "shared"):
        chosen = dataclasses.replace(options, max_disagreement=0.2, head=head)
        with Runtime(chosen) as runtime:
            list(runtime.stream(runtime.text_tokens("Once upon a time"), 40))
            summary, used = runtime.summary, runtime.options
        assert summary.exits > 10
        assert summary.audited > 0
        assert summary.disagreed == 0
        assert (summary.head, summary.pack) == ("shared", "ready")
        assert (used.boundaries, summary.signal) == (pack.boundaries, pack.default_signal)


@pytest.fixture
def all_pack(packs: Any, monkeypatch: pytest.MonkeyPatch, run: RunCli) -> Path:
    return packs("all", monkeypatch, run)[0]


def test_the_gate_decides_by_all_signals_of_its_boundary(options: RunOptions, all_pack: Path) -> None:
    pack = ExitPack.load(all_pack)
    assert pack.boundaries == (2, 3, 5)
    chosen = dataclasses.replace(options, pack=str(all_pack), signal="gate", max_disagreement=0.2)
    with Runtime(chosen) as runtime:
        steps = [c.step for c in runtime.stream(runtime.text_tokens("Once upon"), 40)]
        assert runtime.summary.exits > 10
        assert runtime.summary.disagreed == 0
    said = [(layer, s) for step in steps for layer, s in step.signals]
    assert {layer for layer, _ in said} >= {2, 3}
    for layer, signals in said:
        assert signals.gate == pack.gates[pack.boundaries.index(layer)].probability(signals)
        assert 0 < signals.gate < 1
        assert math.isnan(signals.stability) == (layer == 2)


def test_some_of_the_boundaries_by_thresholds_of_ones_own(options: RunOptions, all_pack: Path) -> None:
    chosen = dataclasses.replace(options, pack=str(all_pack), boundaries=(3,), signal="margin", thresholds=(math.inf,))
    with Runtime(chosen) as runtime:
        list(runtime.stream(runtime.text_tokens("Once upon"), 12))
        assert (runtime.summary.boundaries, runtime.summary.disagreed) == ((3,), 0)
        assert runtime.summary.exits > 5
    for changes, message in (({"thresholds": None}, "for all of its boundaries"), ({"signal": "gate"}, "one before")):
        with pytest.raises(UsageError, match=message):
            Runtime(dataclasses.replace(chosen, **changes))


def test_verified_publishes_what_full_depth_does(options: RunOptions) -> None:
    found = []
    for mode in (Mode.FULL, Mode.VERIFIED):
        with Runtime(dataclasses.replace(options, mode=mode)) as runtime:
            found.append([c.step.token for c in runtime.stream(runtime.text_tokens("Once upon"), 16)])
    assert found[0] == found[1]


def test_the_command_line(
    ready_path: Path, ready_pack: Path, run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("generate", "-m", ready_path, "--pack", ready_pack, "-n", 12, "--threads", 1, "--ctx", 256)
    done = run(*common, "--mode", "exit", "--max-disagreement", 0.2, "--json", "Once upon")
    assert done.code == 0, done.err
    summary = json.loads(done.out.splitlines()[-1])["summary"]
    assert (summary["head"], summary["pack"]) == ("shared", "ready")
    assert summary["exits"] > 0


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"head": "pack"}, UsageError, "has no heads: it is for the model's own output head"),
        ({"boundaries": (1,), "thresholds": (1.0,)}, BoundaryError, "has no gate behind layer 1"),
        ({"signal": "clusters", "thresholds": (1.0,)}, UsageError, "needs an exit pack's heads"),
        ({"signal": "clusters"}, PackError, "certifies no exits"),
        ({"max_disagreement": 1e-9}, PackError, "certifies no exits"),
    ],
)
def test_what_such_a_pack_cannot_do(
    options: RunOptions, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        Runtime(dataclasses.replace(options, **changes))
    assert error.value.hint  # type: ignore[attr-defined]


def test_a_pack_with_heads_certifies_nothing_for_the_own_head(ready_path: Path, tmp_path: Path) -> None:
    random_pack(ready_path).save(tmp_path / "heads.gguf")
    options = RunOptions(
        str(ready_path), Mode.EXIT, n_ctx=256, n_threads=1, pack=str(tmp_path / "heads.gguf"), head="shared"
    )
    with pytest.raises(UsageError, match="made for the model's own output head") as error:
        Runtime(dataclasses.replace(options, max_disagreement=0.2))
    assert "calibrate --head shared" in error.value.hint
    with pytest.raises(UsageError, match="calibrate --head shared"):
        Runtime(dataclasses.replace(options, signal="gate", thresholds=(1.0,)))
    with Runtime(dataclasses.replace(options, thresholds=(math.inf,))) as runtime:
        list(runtime.stream(runtime.text_tokens("Once upon"), 8))
        assert runtime.summary.exits > 0


def test_such_a_pack_is_for_one_model(options: RunOptions, plain_path: Path) -> None:
    with pytest.raises(PackError, match="is for") as error:
        Runtime(dataclasses.replace(options, model=str(plain_path), max_disagreement=0.2))
    assert error.value.hint


def test_the_source_gives_the_gate_what_it_reads() -> None:
    heard: list[Signals] = []

    def gate(signals: Signals) -> float:
        heard.append(signals)
        return 0.25

    head = SharedHead("gate", [gate, gate])
    assert head.wants_states
    state, logits = np.float32([1, 2]), np.float32([0, 1, 4])
    head.observe(1, 0, state[None])
    for boundary in (1, 2):
        guess = head.guess(BoundaryView(boundary, [7], state, logits))
        assert guess is not None
        assert (guess.uncertainty, guess.signals.gate) == (0.25, 0.25)
    assert math.isnan(heard[0].stability)
    assert heard[1].stability == pytest.approx(1)
    with pytest.raises(UsageError):
        SharedHead("gate")
    with pytest.raises(UsageError):
        SharedHead("clusters", [gate])


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pack_without_heads_is_kept_and_read(ready_pack: Path, ready_path: Path, tmp_path: Path) -> None:
    pack = ExitPack.load(ready_pack)
    assert pack.save(tmp_path / "again.gguf") == (tmp_path / "again.gguf").stat().st_size
    again = ExitPack.load(tmp_path / "again.gguf")
    assert again.digest == pack.digest
    assert (again.shortlist.shape, again.cluster_starts.shape, again.heads, again.askers) == ((0,), (0,), (), ())
    assert (again.gates, again.rungs, again.boundaries) == (pack.gates, pack.rungs, pack.boundaries)
    assert split(again, ready_path) == ()
    again.check_model(identify(ready_path))
    data = bytearray(ready_pack.read_bytes())
    place = data.index(b'"boundaries"')
    data[place + 1] ^= 1
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(PackError, match="is damaged"):
        ExitPack.load(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("field", "message"),
    [("shortlist", "a shortlist, but no heads"), ("cluster_starts", "clusters, but no"), ("askers", "askers, but no")],
)
def test_parts_of_heads_without_heads_are_refused(ready_path: Path, field: str, message: str) -> None:
    whole, empty = random_pack(ready_path), np.empty(0, np.int32)
    parts = {"heads": (), "shortlist": empty, "cluster_starts": empty, "askers": ()}
    assert dataclasses.replace(whole, **parts).shared
    parts.pop(field)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(whole, **parts)


def test_clusters_need_a_shortlist(ready_path: Path) -> None:
    empty = np.empty(0, np.int32)
    with pytest.raises(ValueError, match="clusters of tokens, but has none"):
        random_pack(ready_path, heads=(), shortlist=empty, cluster_starts=empty, askers=(), default_signal="clusters")
