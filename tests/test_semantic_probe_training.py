"""`edge-run calibrate --probe`: a probe that tells easy prompts from hard ones, through interruptions and mistakes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import calibrate_probe
from edge_runtime.exits import probe_training
from edge_runtime.exits.calibrate import default_boundaries
from edge_runtime.exits.probe_file import ProbeFile
from edge_runtime.exits.probe_training import ProbePrompt, held_out, report_lines
from edge_runtime.identity import identify
from edge_runtime.semantic import AnswerSampler, Sample, SampleSettings

from .cli_helpers import Result, RunCli, assert_clean, runner
from .conftest import TinyMaker

Verb = Callable[..., Result]

EASY, HARD = "What is ship {}?", "Tell all of them about it again {}!"
COMMON = ("--threads", 1, "--boundaries", "2,5", "--no-builtin", "--text", "own.txt", "--out", "a.probe.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program runs."""
    path = tmp_path / "work"
    path.mkdir()
    lines = [text.format(i) for i in range(36) for text in (EASY, HARD)]
    (path / "own.txt").write_text("\n".join(lines))
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True, weights="Q8_0")


class Answers:
    """Stands in for sampled answers, which a random model cannot give: hard prompts get some, easy ones hardly."""

    def __init__(self) -> None:
        self.drawn = 0
        self.error: tuple[int, BaseException] | None = None
        self.vary = True

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        if self.error is not None and self.drawn >= self.error[0]:
            raise self.error[1]
        self.drawn += 1
        is_hard = 5 + ord("!") in prompt  # a token is a byte behind five special ones
        n_meanings = (5 if is_hard else 1 + prompt[-20] % 2) if self.vary else 1
        return [Sample(f"ship {number % n_meanings}", (1,), (-1.0,), 1.0, True) for number in numbers]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    found = Answers()
    monkeypatch.setattr(AnswerSampler, "draw", lambda _self, *arguments: found.draw(*arguments))
    return found


@pytest.fixture
def verb(run: RunCli, folder: Path, model_path: Path, answers: Answers) -> Verb:
    """verb(*options): the command line on a tiny model, its answers played."""

    def verb(*options: object, model: object = model_path) -> Result:
        return run("calibrate", "--probe", "-m", model, *COMMON, *options)

    return verb


# ── probes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_probe_is_made_that_tells_hard_prompts_from_easy_ones(verb: Verb, folder: Path, model_path: Path) -> None:
    result = verb()
    assert_clean(result, 0)
    made = ProbeFile.load(folder / "a.probe.json")
    made.check_model(identify(model_path))
    assert made.name == "a"
    assert [probe.layer for probe in made.probes] == [2, 5]
    assert result.out.splitlines() == report_lines(made.report)
    assert "the probe is in a.probe.json" in result.err
    for found in made.report["probes"]:
        value, low, high = found["auroc"]
        assert value == pytest.approx(1.0)
        assert 0 <= low <= value <= high <= 1
    assert not np.array_equal(made.probes[0].mean, made.probes[1].mean), "each reads its own boundary's states"
    assert made.chosen == min(made.probes, key=lambda probe: probe.loss).layer


def test_the_report_says_what_was_found(verb: Verb, folder: Path) -> None:
    result = verb("--json", "--quiet")
    assert_clean(result, 0)
    assert result.err == ""
    found = json.loads(result.out)
    assert found["probe"] == "a.probe.json"
    assert found["bytes"] == (folder / "a.probe.json").stat().st_size
    assert (found["prompts"], found["train"], found["test"]) == (72, 48, 24)
    assert (found["samples"], found["temperature"], found["max_tokens"]) == (8, 0.5, 32)
    assert found["grouped_by"] == "form"
    assert np.log(2) < found["threshold"] < np.log(5)
    assert len(found["first_token"]) == 3
    assert found["kind"] == [0.5, 0.5, 0.5], "all are the user's"


def test_a_run_interrupted_anywhere_ends_as_one_that_was_not(
    verb: Verb, folder: Path, cache: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_clean(verb(), 0)
    expected = (folder / "a.probe.json").read_bytes()
    (folder / "a.probe.json").unlink()
    shutil.rmtree(cache)
    drawn = []
    for n_before in (20, 40):
        answers.drawn, answers.error = 0, (n_before, KeyboardInterrupt())
        result = verb()
        assert result.code == 130
        assert "the same command goes on from there" in result.err
        drawn.append(answers.drawn)
    answers.drawn, answers.error = 0, None
    with monkeypatch.context() as patch:
        patch.setattr(probe_training, "fit_probe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert verb().code == 130
    assert answers.drawn == 72 - 16 - 32, "two batches of 16 and one of 16 were kept"
    assert not (folder / "a.probe.json").exists()
    assert_clean(verb(), 0)
    assert answers.drawn == 72 - 16 - 32
    assert (folder / "a.probe.json").read_bytes() == expected


def test_damaged_results_are_made_again(verb: Verb, folder: Path, cache: Path) -> None:
    assert_clean(verb(), 0)
    expected = (folder / "a.probe.json").read_bytes()
    results = list(cache.glob("probes/*.npz"))
    assert len(results) == 5
    for i, path in enumerate(results):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data[: len(data) // 2] if i % 2 else data)
    assert_clean(verb(), 0)
    assert (folder / "a.probe.json").read_bytes() == expected


@pytest.mark.parametrize(
    "options", [("--seed", 1), ("--temperature", 0.7), ("--max-tokens", 8), ("--boundaries", "2,4")]
)
def test_another_request_takes_no_answers_over(verb: Verb, answers: Answers, options: tuple[object, ...]) -> None:
    assert_clean(verb(), 0)
    assert answers.drawn == 72
    assert_clean(verb(*options), 0)
    assert answers.drawn == 144


def test_without_boundaries_probes_are_made_where_packs_would_be(verb: Verb, run: RunCli, model_path: Path) -> None:
    result = run("calibrate", "--probe", "-m", model_path, *COMMON[:2], *COMMON[4:], "--json", "--quiet")
    assert_clean(result, 0)
    assert tuple(found["layer"] for found in json.loads(result.out)["probes"]) == default_boundaries(7)


def test_answers_can_be_grouped_by_meaning(
    verb: Verb, folder: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder to which ships 0 and 1 are the same, and all others; answers are not drawn anew for it."""

    class Encoder:
        def __init__(self, name: str) -> None:
            self.path = Path(name) / "int8.onnx"

        def encode(self, texts: list[str]) -> Any:
            kinds = [int(text.split()[-1]) // 2 for text in texts]
            return np.eye(4, dtype=np.float32)[kinds]

    monkeypatch.setattr("edge_runtime.encoder.SentenceEncoder", Encoder)
    monkeypatch.setattr("edge_runtime.semantic.grouping.contradict", lambda _a, _b: False)
    plain = json.loads(verb("--json", "--quiet").out)
    found = json.loads(verb("--encoder", "toy", "--json", "--quiet").out)
    assert found["grouped_by"] == "meaning (toy)"
    assert found["mean_entropy"] < plain["mean_entropy"]
    assert answers.drawn == 72


def test_answers_that_differ_nearly_everywhere_are_remarked_on(verb: Verb, folder: Path) -> None:
    lines = [text.format(i) for i in range(60) for text in ([EASY, HARD] if i < 8 else [HARD])]
    (folder / "own.txt").write_text("\n".join(lines))
    assert "group them by meaning with --encoder" in verb().err


def test_builtin_questions_are_asked_for_a_few_words() -> None:
    asked, _ = calibrate_probe._requests(request(builtin=True))
    assert len(asked) == len({entry.text for entry in asked}) == 300
    assert all(entry.text.endswith("? Answer in a few words.") for entry in asked)
    assert len({entry.group for entry in asked}) == 5
    few, _ = calibrate_probe._requests(request(builtin=True, prompts=70))
    assert few == asked[:70]


def test_only_so_many_prompts_are_used(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("\n".join(EASY.format(i) for i in range(2100)))
    asked, notes = calibrate_probe._requests(request(texts=(tmp_path / "many.txt",)))
    assert len(asked) == 2000
    assert notes == ["the first 2,000 prompts are used, of 2,100"]
    assert not calibrate_probe._requests(request(texts=(tmp_path / "many.txt",), prompts=70))[1]


def test_what_the_kind_alone_says_is_known_from_the_other_prompts() -> None:
    prompts = [ProbePrompt("", (), group) for group in "aaabbbc"]
    high, held = (np.array(list(map(bool, flags))) for flags in ([1, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1]))
    found = probe_training._shares_by_kind(prompts, high, held)
    assert found.tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 0.5]


def request(**changes: Any) -> calibrate_probe.ProbeRequest:
    values: dict[str, Any] = dict.fromkeys(calibrate_probe.ProbeRequest.__dataclass_fields__)
    return calibrate_probe.ProbeRequest(**(values | {"texts": (), "seed": 0, "threads": 1} | changes))


def test_a_third_of_each_group_is_held_out() -> None:
    groups = ["b", "a", "a"] * 30
    held = held_out(groups, 0)
    assert held.sum() == 30
    assert sum(group == "a" for group, one in zip(groups, held, strict=True) if one) == 20
    assert held.tolist() == held_out(groups, 0).tolist() != held_out(groups, 1).tolist()


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refuse(result: Result, folder: Path, said: str, code: int = 2) -> None:
    assert_clean(result, code)
    assert said in " ".join(result.err.split()), result.err
    assert not (folder / "a.probe.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompts", 59), "59 prompts are too few"),
        (("--text", "none.txt"), "none.txt cannot be read"),
        (("--boundaries", "7"), "boundary 7 is outside this model's 7 layers"),
        (("--boundaries", "5,2"), "not in order"),
        (("--temperature", 0), "cannot be drawn at temperature 0"),
        (("--max-tokens", 3000), "do not fit the model's context"),
        (("--out", "nowhere/a.probe.json"), "a probe cannot be written to nowhere"),
        (("--budget", "1h"), "--budget is for exit packs"),
        (("--max-disagreement", 0.02), "--max-disagreement is for exit packs"),
        (("--pack-all",), "--pack-all is for exit packs"),
        (("--encoder", "nonesuch"), "nonesuch"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_work(
    verb: Verb, folder: Path, answers: Answers, options: tuple[object, ...], said: str
) -> None:
    result = verb(*options, "--quiet")
    refuse(result, folder, said, code=1 if "--encoder" in options else 2)
    assert answers.drawn == 0


def test_an_encoder_is_for_probes(run: RunCli, folder: Path, model_path: Path) -> None:
    refuse(run("calibrate", "-m", model_path, "--encoder", "minilm-l6"), folder, "--encoder is for probes")


def test_there_must_be_prompts(run: RunCli, folder: Path) -> None:
    refuse(run("calibrate", "--probe", "--no-builtin", "--quiet"), folder, "there are no prompts")


def test_the_probe_must_not_take_the_models_place(verb: Verb, folder: Path, model_path: Path) -> None:
    shutil.copy(model_path, folder / "m.gguf")
    before = (folder / "m.gguf").read_bytes()
    refuse(verb("--quiet", "--out", "m.gguf", model=folder / "m.gguf"), folder, "would take the place of")
    assert (folder / "m.gguf").read_bytes() == before


def test_answers_that_are_all_equally_uncertain(verb: Verb, folder: Path, answers: Answers) -> None:
    answers.vary = False
    refuse(verb("--quiet"), folder, "the answers to all prompts are equally uncertain")


def test_prompts_held_out_that_are_all_easy(folder: Path, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_easy(groups: Sequence[str], _seed: int) -> Any:
        hard = [i for i, entry in enumerate(seen) if 5 + ord("!") in entry]
        return np.array([i not in hard and i % 3 == 0 for i in range(len(groups))])

    seen: list[tuple[int, ...]] = []
    real = probe_training.collect

    def collect(model: Any, layers: Any, prompts: Any, *rest: Any) -> Any:
        seen.extend(prompt.tokens for prompt in prompts)
        return real(model, layers, prompts, *rest)

    monkeypatch.setattr(probe_training, "collect", collect)
    monkeypatch.setattr(probe_training, "held_out", all_easy)
    refuse(verb("--quiet"), folder, "for all prompts held out")


def test_a_full_disk_is_explained_and_costs_nothing_done(
    verb: Verb, folder: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, savez = 0, np.savez

    def full(*arguments: Any, **arrays: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(*arguments, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        refuse(verb("--quiet"), folder, "No space left on device", code=1)
    answers.drawn = 0
    assert_clean(verb(), 0)
    assert answers.drawn == 72 - 32
