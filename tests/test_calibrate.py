"""`edge-run calibrate`: from a model to a pack that runs, through every interruption, and every mistake explained."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_runtime import calibrate_run
from edge_runtime.calibrate_run import MAX_PROMPT_TOKENS, parse_budget, tokenised
from edge_runtime.errors import PromptError, UsageError
from edge_runtime.exits import calibrate as pipeline
from edge_runtime.exits import findings
from edge_runtime.exits.calibrate import default_boundaries
from edge_runtime.exits.collect import Collector, Prompt
from edge_runtime.exits.costs import Costs
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.prompts import Request
from edge_runtime.exits.report import draw, report_lines
from edge_runtime.exits.split import split
from edge_runtime.exits.splits import SPLITS, prompts_for, split_prompts
from edge_runtime.exits.trainer import TrainedHead
from edge_runtime.identity import identify
from edge_runtime.native import Model
from edge_runtime.reporter import Reporter

from .cli_helpers import Result, RunCli, assert_clean, runner
from .conftest import TinyMaker

Verb = Callable[..., Result]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program runs."""
    path = tmp_path / "work"
    path.mkdir()
    (path / "own.txt").write_text("".join(f"What is ship {i}?\n" for i in range(48)))
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True, weights="Q8_0")


def fixed_costs(_model: object, layers: tuple[int, ...], heads: list[object], **_: object) -> Costs:
    """Times as of a model of which the boundaries pay: what is measured differs between runs."""
    one = tuple(1.0 + 0.1 * k for k in range(8))
    small = tuple(0.01 + 0.001 * k for k in range(8))
    return Costs(
        layers=tuple(layers),
        slices=(small,) * len(layers) + (one,),
        verify=one,
        heads=(small,) * len(layers),
        full=tuple(1.5 + 0.2 * k for k in range(8)),
    )


@pytest.fixture
def verb(run: RunCli, folder: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """verb(*options): the command line on a tiny model, small enough for a test."""
    monkeypatch.setattr(pipeline, "measure_costs", fixed_costs)
    common = ("--max-tokens", 8, "--threads", 1, "--boundaries", "2,5", "--trainer", "ridge", "--out", "a.exits.gguf")

    def verb(*options: object, model: object = model_path) -> Result:
        return run("calibrate", "-m", model, *common, *options)

    return verb


# short ones: bytes are tokens here
PROMPTS = ("--text", "own.txt", "--no-builtin")


# ── packs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pack_is_made_and_fits_its_model(verb: Verb, folder: Path, model_path: Path) -> None:
    result = verb(*PROMPTS)
    assert_clean(result, 0)
    pack = ExitPack.load(folder / "a.exits.gguf")
    assert pack.name == "a"
    pack.check_model(identify(model_path))
    assert set(pack.boundaries) <= {2, 5}
    assert len(split(pack, model_path)) == len(pack.boundaries)
    assert sorted(pack.shortlist.tolist()) == list(range(512))
    assert [line for line in result.out.splitlines() if line.startswith("48 answered prompts (")]
    assert result.out.splitlines() == report_lines(pack.report)
    assert "the pack is in a.exits.gguf" in result.err


def test_the_report_says_what_was_found(verb: Verb, folder: Path) -> None:
    result = verb(*PROMPTS, "--json", "--quiet")
    assert_clean(result, 0)
    assert result.err == ""
    found = json.loads(result.out)
    assert found["pack"] == "a.exits.gguf"
    assert found["bytes"] == (folder / "a.exits.gguf").stat().st_size
    assert found["candidates"] == [2, 5]
    assert sum(found["text"]["splits"].values()) == found["text"]["prompts"] == 48
    assert [quality["layer"] for quality in found["quality"]] == [2, 5]
    for quality in found["quality"]:
        value, low, high = quality["agreement"]
        assert 0 <= low <= value <= high <= 1
        assert quality["in_shortlist"][0] == 1.0  # all of the vocabulary
    chosen = [quality for quality in found["quality"] if quality["layer"] in found["boundaries"]]
    assert all("gate" in quality["signals"] for quality in chosen)
    assert {entry["bound"] for entry in found["certificates"]} == {0.01, 0.02, 0.05, 0.1, 0.2}
    names = {row["name"] for row in found["baselines"]}
    assert {"head", "logit lens", "cosine stability", "fixed exits", "SLERP 0.5"} <= names
    assert any("linear" in note for note in found["notes"])


def test_a_second_run_computes_nothing_again(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_clean(verb(*PROMPTS), 0)
    for module, name in ((pipeline, "choose_shortlist"), (pipeline, "fit_ridge"), (pipeline, "predict")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr(Collector, "texts", lambda *_: pytest.fail("collected again"))
    assert_clean(verb(*PROMPTS), 0)


def failing(function: Callable[..., Any], error: BaseException, times_before: int = 0) -> Callable[..., Any]:
    """`function`, which fails after some calls."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > times_before:
            raise error
        return function(*arguments, **options)

    return wrapped


STAGES = [
    (Collector, "_run", 20),
    (pipeline, "choose_shortlist", 0),
    (pipeline, "fit_ridge", 1),
    (pipeline, "predict", 3),
    (pipeline, "measure_costs", 0),
    (pipeline, "fit_gate", 1),
    (pipeline, "choose", 1),
    (pipeline, "certify", 1),
    (findings, "logit_lens", 0),
    (ExitPack, "save", 0),
]


def test_a_run_interrupted_in_every_stage_ends_as_one_that_was_not(
    verb: Verb, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_clean(verb(*PROMPTS), 0)
    expected = ExitPack.load(folder / "a.exits.gguf").digest
    (folder / "a.exits.gguf").unlink()
    shutil.rmtree(cache)
    for module, name, times in STAGES:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), KeyboardInterrupt(), times))
            result = verb(*PROMPTS)
        assert result.code == 130, name
        if name != "save":
            assert "the same command goes on from there" in result.err
        assert not (folder / "a.exits.gguf").exists()
        assert not list(cache.glob("exits/*/.heads-*"))
    assert_clean(verb(*PROMPTS), 0)
    assert ExitPack.load(folder / "a.exits.gguf").digest == expected


def test_damaged_results_are_made_again(verb: Verb, folder: Path, cache: Path) -> None:
    assert_clean(verb(*PROMPTS), 0)
    expected = ExitPack.load(folder / "a.exits.gguf").digest
    results = list(cache.glob("exits/*/stages/*.npz"))
    assert len(results) > 8
    for i, path in enumerate(results):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data[: len(data) // 2] if i % 2 else data)
    assert_clean(verb(*PROMPTS), 0)
    assert ExitPack.load(folder / "a.exits.gguf").digest == expected


def test_another_request_takes_nothing_over(verb: Verb, folder: Path, cache: Path) -> None:
    """The answers are the same; all that is made of them is not."""
    other = (*PROMPTS, "--shortlist", 300, "--quantisation", "q8_0", "--temperature", 0.7)
    assert_clean(verb(*PROMPTS), 0)
    assert_clean(verb(*other), 0)
    pack = ExitPack.load(folder / "a.exits.gguf")
    assert len(list(cache.glob("exits/*/"))) == 1
    assert len(pack.shortlist) == 300
    assert {head.quantisation for head in pack.heads} == {"Q8_0"}
    shutil.rmtree(cache)
    assert_clean(verb(*other), 0)
    assert ExitPack.load(folder / "a.exits.gguf").digest == pack.digest


def test_another_text_to_count_takes_no_heads_over(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and what they say belong to one shortlist, however long it is."""
    monkeypatch.setattr(pipeline, "measure_costs", fixed_costs)
    with Model(str(model_path)) as model:
        prompts = [
            Prompt(i, tuple(model.tokenize(f"What is ship {i}?", add_special=True, parse_special=False)))
            for i in range(48)
        ]

        def made(cache: str, other_text: list[list[int]]) -> ExitPack:
            options = pipeline.CalibrateOptions(
                boundaries=(2, 5), max_tokens=8, trainer="ridge", n_shortlist=300, n_threads=1, cache=tmp_path / cache
            )
            identity = identify(model_path)
            return pipeline.calibrate("a", model, identity, prompts, options, Reporter(), other_text=other_text).pack

        rare = [[token] * 1000 for token in range(400, 512)]
        plain = made("one", [])
        changed = made("one", rare)
        assert set(changed.shortlist.tolist()) != set(plain.shortlist.tolist())
        assert changed.digest == made("two", rare).digest


def test_more_prompts_go_on_from_fewer(verb: Verb, cache: Path) -> None:
    assert_clean(verb("--prompts", 64), 0)
    (shard,) = cache.glob("exits/*/00000/shard.json")
    written = shard.stat().st_mtime_ns
    assert_clean(verb("--prompts", 70), 0)
    assert shard.stat().st_mtime_ns == written
    assert len(list(cache.glob("exits/*/0*"))) == 2


def test_a_picture_is_drawn(verb: Verb, folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    assert_clean(verb(*PROMPTS, "--png", "a.png"), 0)
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_trained_heads(verb: Verb, folder: Path) -> None:
    pytest.importorskip("torch", reason="training needs PyTorch")
    result = verb(*PROMPTS, "--trainer", "torch", "--epochs", 1, "--compare", "--json", "--quiet")
    assert_clean(result, 0)
    found = json.loads(result.out)
    assert all(len(went["history"]) == 2 for went in found["training"]["heads"].values())
    assert {row["name"] for row in found["variants"]} == {"soft labels", "hard labels"}
    assert "ridge lens" in {row["name"] for row in found["baselines"]}


def test_a_loss_that_is_no_number_is_reported(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is played, so that this runs without it."""
    monkeypatch.setattr(pipeline, "torch_problem", lambda: None)
    monkeypatch.setattr(calibrate_run, "torch_problem", lambda: None)
    why = "the loss became nan in epoch 2; the best state before it is kept"
    monkeypatch.setattr(pipeline, "train_head", lambda _texts, _tune, start, *_: TrainedHead(start, [], why))
    result = verb(*PROMPTS, "--trainer", "torch")
    assert_clean(result, 0)
    assert f"warning: the head behind layer 5: {why}" in result.out


def test_without_pytorch_heads_are_linear_and_the_report_says_what_is_lost(
    run: RunCli, folder: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_run, "torch_problem", lambda: "PyTorch is not installed (no module)")
    common = ("calibrate", "-m", model_path, *PROMPTS, "--max-tokens", 8, "--threads", 1, "--boundaries", "4")
    result = run(*common)
    assert_clean(result, 0)
    assert "note: PyTorch is not installed (no module): heads are linear" in result.out
    assert (folder / f"{model_path.stem}.exits.gguf").exists()
    result = run(*common, "--trainer", "torch", "--quiet")
    assert_clean(result, 2)
    assert "--trainer ridge" in result.err


def test_all_candidates_can_be_packed(verb: Verb, folder: Path) -> None:
    assert_clean(verb(*PROMPTS, "--pack-all", "--boundaries", "1,3,6"), 0)
    pack = ExitPack.load(folder / "a.exits.gguf")
    assert pack.boundaries == (1, 3, 6)
    assert len(pack.verify_thresholds) == 3


def test_a_budget_decides_how_many_prompts(verb: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard takes 10 seconds by this clock, and three quarters of the budget are for collection."""
    now = [0.0]
    texts = Collector.texts

    def slow(self: Collector, *arguments: Any) -> Any:
        now[0] += 10.0
        return texts(self, *arguments)

    monkeypatch.setattr(Collector, "texts", slow)
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=lambda: now[0]))
    result = verb("--budget", "28s", "--json", "--quiet")
    assert_clean(result, 0)
    assert json.loads(result.out)["text"]["prompts"] == 128


def test_texts_are_read_but_nothing_is_certified_on_them(verb: Verb, folder: Path) -> None:
    lines = [{"text": f"The harbour number {i} was quiet."} for i in range(20)]
    lines += [{"prompt": f"What is ship {i}?"} for i in range(50)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = verb("--text", "own.jsonl", "--no-builtin", "--json", "--quiet")
    assert_clean(result, 0)
    text = json.loads(result.out)["text"]
    assert (text["prompts"], text["read"]) == (50, 20)
    assert sum(text["splits"].values()) == 50


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refuse(result: Result, folder: Path, said: str, code: int = 2) -> None:
    assert_clean(result, code)
    assert said in " ".join(result.err.split()), result.err
    assert not (folder / "a.exits.gguf").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompts", 20), "20 prompts to be answered are too few: 40 are the least"),
        (("--no-builtin",), "there are no prompts"),
        (("--text", "none.txt"), "none.txt cannot be read"),
        (("--budget", "soon"), "budget 'soon' is no time"),
        (("--budget", "10"), "give it as in --budget 10m"),
        (("--boundaries", "7"), "boundary 7 is outside this model's 7 layers"),
        (("--boundaries", "5,2"), "not in order"),
        (("--boundaries", "x"), "not layer numbers"),
        (("--temperature", 2), "temperature 2.0 is out of range"),
        (("--confidence", 1), "confidence 1.0 is not a probability"),
        (("--max-disagreement", 0), "disagreement 0.0 is not a share"),
        (("--out", "nowhere/a.exits.gguf"), "a pack cannot be written to nowhere"),
        (("--out", "."), "a pack cannot be written to ."),
        (("--png", "nowhere/a.png"), "a picture cannot be written to nowhere"),
        (("--compare",), "--compare is for trained heads"),
        (("--device", "cuda"), "--device is for trained heads"),
        (("--max-tokens", 3000), "do not fit the model's context"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_work(
    verb: Verb, folder: Path, options: tuple[object, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collector, "texts", lambda *_: pytest.fail("work was done"))
    refuse(verb(*options, "--quiet"), folder, said)


def test_too_little_text_says_how_much_is_needed(verb: Verb, folder: Path) -> None:
    (folder / "few.txt").write_text("Why?\nHow?\n")
    result = verb("--text", "few.txt", "--no-builtin", "--quiet")
    refuse(result, folder, f"{prompts_for(0.02, 0.05):,} for 2%")
    assert 1200 < prompts_for(0.02, 0.05) < 1300


def test_the_pack_must_not_take_the_models_place(verb: Verb, folder: Path, model_path: Path) -> None:
    shutil.copy(model_path, folder / "m.gguf")
    before = (folder / "m.gguf").read_bytes()
    refuse(verb(*PROMPTS, "--quiet", "--out", "m.gguf", model=folder / "m.gguf"), folder, "would take the place of")
    assert (folder / "m.gguf").read_bytes() == before


def test_a_model_without_a_tokenizer(verb: Verb, folder: Path, tiny_path: TinyMaker) -> None:
    refuse(verb(*PROMPTS, "--quiet", model=tiny_path("llama")), folder, "has no tokenizer", code=1)


def test_a_model_without_a_template_continues_prompts(
    verb: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_run.ChatTemplate, "of", lambda _model: None)
    result = verb(*PROMPTS)
    assert_clean(result, 0)
    assert "the model has no chat template: it continues prompts as they stand" in result.out


def test_one_language_is_warned_of(verb: Verb, folder: Path) -> None:
    result = verb(*PROMPTS)
    assert "note: nearly all of the text is in one language (English)" in result.err
    (folder / "some.txt").write_text("".join(f"Où est le chat et la souris {i} ?\n" for i in range(30)))
    assert "one language" not in verb(*PROMPTS, "--text", "some.txt").err


def test_a_full_disk_is_explained_and_costs_nothing_done(
    verb: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", failing(np.savez, full, 2))
        refuse(verb(*PROMPTS, "--quiet"), folder, "No space left on device", code=1)
    monkeypatch.setattr(Collector, "texts", lambda *_: pytest.fail("collected again"))
    assert_clean(verb(*PROMPTS), 0)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(
    verb: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    monkeypatch.setattr(Collector, "texts", lambda *_: pytest.fail("work was done"))
    refuse(verb(*PROMPTS, "--quiet"), folder, "hidden states will take about", code=1)


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_go_through_the_template_and_texts_as_they_are(model_path: Path) -> None:
    with Model(str(model_path)) as model:
        asked, given = [Request("Hi", "user"), Request("Hi</s>", "text", given=True)]
        prompts, notes = tokenised(model, [asked, given, asked], 0.5, 8)
        texts = [model.detokenize(prompt.tokens, special=True) for prompt in prompts]
    assert notes == []
    # the token for "begin" once, and none made of what a text says
    assert texts == [turn := "<s><|turn|>user\nHi<|end|><|turn|>assistant\n", "<s>Hi</s>", turn]
    assert len(prompts[1].tokens) == 1 + len("Hi</s>")
    assert [(p.number, p.temperature, p.answered) for p in prompts] == [
        (0, 0.0, False),
        (1, 0.5, True),
        (2, 0.0, False),
    ]


def test_long_prompts_are_left_out_and_long_texts_cut(model_path: Path) -> None:
    with Model(str(model_path)) as model:
        requests = [Request("a" * 600, "user"), Request("b" * 600, "text", given=True), Request("c", "user")]
        prompts, notes = tokenised(model, requests, 0.0, 8)
        with pytest.raises(PromptError, match="no prompt is left"):
            tokenised(model, requests[:1], 0.0, 8)
    assert [prompt.number for prompt in prompts] == [0, 1]
    assert len(prompts[0].tokens) == MAX_PROMPT_TOKENS
    assert notes == ["1 prompts of more than 512 tokens are left out"]


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2H ", 7200), (None, None)])
def test_budgets(text: str | None, seconds: float | None) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "0s", "1d", "1e9h", "nan", "١m", "9" * 400 + "h"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        parse_budget(text)


@pytest.mark.parametrize(("n_layer", "expected"), [(30, (12, 16, 20, 24, 27)), (7, (3, 4, 5, 6)), (2, (1,))])
def test_default_boundaries(n_layer: int, expected: tuple[int, ...]) -> None:
    assert default_boundaries(n_layer) == expected


def test_splits_have_their_shares_in_every_group() -> None:
    groups = ["chat"] * 500 + ["maths"] * 100 + ["text"] * 50
    found = np.array(split_prompts(groups, 0))
    for group, n in (("chat", 500), ("maths", 100), ("text", 50)):
        part = found[np.array(groups) == group]
        for name, share in zip(SPLITS, (0.70, 0.08, 0.12, 0.10), strict=True):
            assert abs((part == name).sum() - share * n) <= 3
    assert found.tolist() == split_prompts(groups, 0)
    assert found.tolist() != split_prompts(groups, 1)


@pytest.mark.parametrize("n", [40, 41, 50, 64, 1500])
@pytest.mark.parametrize("seed", range(5))
def test_no_split_is_ever_empty(n: int, seed: int) -> None:
    assert set(split_prompts([""] * n, seed)) == set(SPLITS)


def test_a_picture_that_cannot_be_written(verb: Verb, folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    found = json.loads(verb(*PROMPTS, "--json", "--quiet").out)
    with pytest.raises(UsageError, match="cannot be written"):
        draw(found, folder)
