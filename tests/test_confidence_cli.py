"""`edge-run generate --confidence`: the answer and how sure it is, no answer where it is unsure, mistakes explained."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.confidence_options import ConfidenceArguments, plan_confidence
from edge_runtime.confident import SAME_BY
from edge_runtime.errors import UsageError
from edge_runtime.resolve import RunOptions
from edge_runtime.sensors.reading import PowerSource, Reading
from edge_runtime.sensors.recording import Recorder

from .cli_helpers import RunCli, assert_clean, finish, program, runner, start
from .confidence_fakes import scripted
from .conftest import TinyMaker
from .encoder_helpers import INT64, need_libraries, write_lookup_encoder

AGREED = ["Paris"] * 8
MIXED = ["Paris", "paris.", "Lyon", "The Paris", "Paris", "Paris!", "Paris", "Paris"]
ALL_DIFFER = list("abcdefgh")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No encoder is built, and what batches cost is kept in a place of its own."""
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def model(tiny_path: TinyMaker) -> tuple[object, ...]:
    """A tiny model that answers at length, in mode full: nothing is measured first."""
    return "generate", "-m", tiny_path("llama", tokenizer=True), "--threads", 1, "--mode", "full", "-n", 9


def record_of(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.splitlines()[-1])["confidence"]
    return found


# ── the answer and its confidence ───────────────────────────────────────────────────────────────────────────────────


def test_the_answer_stays_as_it_is_and_the_confidence_goes_to_stderr(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = scripted(monkeypatch, MIXED)
    plain = run(*model, "Where?")
    result = run(*model, "--confidence", "Where?")
    assert_clean(result, 0)
    assert result.out == plain.out
    assert (
        "\nconfidence 0.82: 7 of 8 samples say the same, the answer says something else (semantic entropy 0.38 nats, "
        "16 tokens, " in result.err
    )
    assert result.err.count("note: samples are compared by their form, since the encoder minilm-l6 is not built: ") == 1
    assert "clusters" not in result.err
    quiet = run(*model, "--confidence", "--quiet", "Where?")
    assert quiet.out == plain.out
    assert [line.partition(":")[0] for line in quiet.err.splitlines()] == ["confidence 0.82"]
    assert len(set(prompts)) == 1
    assert len(prompts[0]) > len("Where?")  # the chat template, too


def test_clusters_are_listed_on_request(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, ["Пари́ж", "東京\x1b[2J", "", "Пари́ж", "東京\x1b[2J", "Пари́ж", "Rom", "Пари́ж"])
    result = run(*model, "--confidence", "--show-clusters", "--quiet", "Где?")
    assert_clean(result, 0)
    head, *rest = result.err.splitlines()
    assert head.startswith("confidence 0.42: 4 of 8 samples say the same")
    assert rest == ["   4 of 8  Пари́ж", "   2 of 8  東京�[2J", "   1 of 8  (empty)", "   1 of 8  Rom"]


def test_of_a_long_answer_as_much_counts_as_of_a_sample(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = "".join(json.loads(line).get("text", "") for line in run(*model, "-n", 32, "--json", "x").out.splitlines())
    scripted(monkeypatch, [begins] * 8)
    for length in (32, 60):
        assert record_of(run(*model, "-n", length, "--confidence", "--json", "x").out)["agrees"] is True


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (AGREED, "confidence 1.00: all 8 samples say the same, the answer says something else (semantic entropy 0.00 "),
        (ALL_DIFFER, "confidence 0.00: no two of 8 samples say the same (semantic entropy 2.08 nats, "),
        ([""] * 8, "confidence 1.00: 8 of 8 samples are empty"),
    ],
)
def test_what_is_said_of_samples(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, texts: list[str], said: str
) -> None:
    scripted(monkeypatch, texts)
    result = run(*model, "--confidence", "--quiet", "x")
    assert_clean(result, 0)
    assert result.err.startswith(said)


def test_samples_that_were_cut_are_noted(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, AGREED, ended=False)
    result = run(*model, "--confidence", "--quiet", "x")
    assert result.err.splitlines()[1] == "note: 8 of 8 samples were cut after 2 tokens: this is about how answers begin"


def test_so_many_samples_as_asked_for(run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["a", "b"])
    result = run(*model, "--confidence", "--samples", 2, "--quiet", "x")
    assert "no two of 2 samples say the same" in result.err


def test_real_samples_of_a_tiny_model(run: RunCli, model: tuple[object, ...]) -> None:
    for same_by in ("form", "entailment"):
        options = ("--confidence", "--same-by", same_by, "--json", "--ctx", 800, "--samples", 4)
        result = run(*model, *options, stdin="東京はどこ？".encode())
        assert_clean(result, 0)
        record = record_of(result.out)
        assert (record["grouping"], len(record["samples"])) == (same_by, 4)
        assert all(1 <= sample["tokens"] <= 9 for sample in record["samples"])  # as long as -n allows
        again = record_of(run(*model, *options, stdin="東京はどこ？".encode()).out)
        assert again["samples"] == record["samples"]
    other = record_of(run(*model, *options, "--seed", 7, stdin="東京はどこ？".encode()).out)
    assert other["samples"] != record["samples"]


# ── as JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_json_stands_beside_the_summary(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, MIXED)
    plain = run(*model, "--json", "x").out.splitlines()
    result = run(*model, "--json", "--confidence", "x")
    assert_clean(result, 0)
    *tokens, last = result.out.splitlines()
    assert tokens == plain[:-1]
    assert set(json.loads(last)) == {"summary", "confidence"}
    assert json.loads(last)["summary"]["generated_tokens"] == len(tokens)
    record = record_of(result.out)
    cost = record.pop("cost")
    ms = cost.pop("ms")
    assert ms > 0
    assert cost == {
        "prompt_tokens": json.loads(last)["summary"]["prompt_tokens"],
        "generated_tokens": 16,
        "rows": 16,
        "joules": None,
        "energy_source": None,
        "energy_covered": None,
    }
    clusters, samples = record.pop("clusters"), record.pop("samples")
    assert record == {
        "score": pytest.approx(0.8188, abs=1e-4),
        "entropy": pytest.approx(0.3768, abs=1e-4),
        "normalised_entropy": pytest.approx(0.1812, abs=1e-4),
        "likelihood_entropy": pytest.approx(0.3768, abs=1e-4),
        "consistency": 0.875,
        "answer": "Paris",
        "agrees": False,
        "abstain_above": None,
        "abstained": False,
        "grouping": "form",
        "stopped": "all",
        "planned": 8,
    }
    assert clusters[1] == {
        "answer": "Lyon",
        "members": [2],
        "share": 0.125,
        "likelihood": pytest.approx(0.125),
    }
    assert [sample["text"] for sample in samples] == MIXED
    assert samples[0] == {
        "text": "Paris",
        "tokens": 2,
        "ended": True,
        "mean_log_likelihood": -0.75,
        "mean_entropy": 0.5,
    }


def test_the_energy_is_that_of_the_sensors(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """4 W for longer than any test."""
    scripted(monkeypatch, MIXED)
    with Recorder(tmp_path / "board.jsonl", "A Board") as recorder:
        for time_s in (0.0, 1e5):
            recorder.append(Reading(time_s, power_w=4.0, power_source=PowerSource.MEASURED, sensors=("pmic",)))
    sensors = ("--energy", "--replay", tmp_path / "board.jsonl", "--idle-power", 1)
    cost = record_of(run(*model, *sensors, "--confidence", "--json", "x").out)["cost"]
    assert cost["joules"] >= 4 * cost["ms"] / 1e3 > 0
    assert (cost["energy_source"], cost["energy_covered"]) == ("measured", pytest.approx(1))
    assert " J measured)" in run(*model, *sensors, "--confidence", "--quiet", "x").err


# ── no answer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unsure_model_gives_no_answer(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, MIXED)
    unsure = run(*model, "--abstain-above", 0.18, "--quiet", "x")
    assert_clean(unsure, 3)
    assert unsure.out == ""
    assert unsure.err.startswith("unsure: 7 of 8 samples say the same; normalised semantic entropy 0.181 is above 0.18")
    listed = run(*model, "--abstain-above", 0.18, "--quiet", "--show-clusters", "x")
    assert listed.out == ""
    assert listed.err.splitlines()[-1] == "   1 of 8  Lyon"
    sure = run(*model, "--abstain-above", 0.19, "--quiet", "x")
    assert_clean(sure, 0)
    assert sure.out == run(*model, "--quiet", "x").out
    assert sure.err.startswith("confidence 0.82: 7 of 8 samples say the same, the answer says something else")


@pytest.mark.parametrize(
    ("texts", "above", "code"),
    [(AGREED, 0, 0), (ALL_DIFFER, 1, 0), (ALL_DIFFER, 0.99, 3), (MIXED, 0, 3), ([""] * 8, 1, 3), (["?", ""] * 4, 1, 3)],
)
def test_the_edges_of_unsure(
    run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, texts: list[str], above: float, code: int
) -> None:
    scripted(monkeypatch, texts)
    result = run(*model, "--abstain-above", above, "x")
    assert_clean(result, code)
    assert bool(result.out) == (code == 0)


def test_an_unsure_model_in_json(run: RunCli, model: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [f"{number} x" for number in range(16)])
    result = run(*model, "--abstain-above", 0.5, "--samples", 16, "--json", "--quiet", "x")
    assert_clean(result, 3)
    (line,) = result.out.splitlines()
    assert json.loads(line)["summary"] is None
    record = record_of(result.out)
    assert (record["abstained"], record["abstain_above"], record["answer"], record["agrees"]) == (True, 0.5, None, None)
    assert record["stopped"] == "settled"
    assert len(record["samples"]) == 8  # whatever the others are, more than half of the entropy is there
    sure = run(*model, "--abstain-above", 1, "--json", "--quiet", "x")
    assert_clean(sure, 0)
    assert record_of(sure.out)["abstained"] is False


# ── Ctrl-C ──────────────────────────────────────────────────────────────────────────────────────────────────────────

INTERRUPT_AT_SAMPLING = """
import os, signal
from edge_runtime.semantic import AnswerSampler
draw = AnswerSampler.draw
def interrupting(self, *args):
    os.kill(os.getpid(), signal.SIGINT)
    return draw(self, *args)
AnswerSampler.draw = interrupting
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_while_samples_are_drawn(run: RunCli, model: tuple[object, ...], as_json: bool) -> None:
    form = ("--json",) if as_json else ()
    result = finish(start(program(*model, "--confidence", *form, "x", script=INTERRUPT_AT_SAMPLING)))
    assert_clean(result, 130)
    plain = run(*model, *form, "x").out.splitlines()
    *tokens, last = result.out.splitlines()
    assert tokens == plain[:-1]
    assert json.loads(last)["confidence"] is None if as_json else last == plain[-1]
    assert "confidence 0" not in result.err
    withheld = finish(start(program(*model, "--abstain-above", 1, *form, "x", script=INTERRUPT_AT_SAMPLING)))
    assert_clean(withheld, 130)
    assert withheld.out == ""


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--samples", 4), "--samples means nothing without --confidence"),
        (("--same-by", "form"), "--same-by means nothing without --confidence"),
        (("--encoder", "minilm-l6"), "--encoder means nothing without --confidence"),
        (("--show-clusters",), "--show-clusters means nothing without --confidence"),
        (("--confidence", "--samples", 1), "one sample cannot agree with another"),
        (("--confidence", "--samples", 0), "0 samples cannot be drawn"),
        (("--confidence", "--samples", 65), "65 samples cannot be drawn"),
        (("--confidence", "--samples", "few"), "Invalid value for '--samples'"),
        (("--confidence", "--same-by", "sense"), "Invalid value for '--same-by'"),
        (("--confidence", "--same-by", "form", "--encoder", "x.onnx"), "--encoder means nothing with --same-by form"),
        (("--confidence", "--json", "--show-clusters"), "--json and --show-clusters exclude each other"),
        (("--abstain-above", 1.5), "1.5 is no normalised semantic entropy"),
        (("--abstain-above", -0.1), "-0.1 is no normalised semantic entropy"),
        (("--abstain-above", "nan"), "nan is no normalised semantic entropy"),
    ],
)
def test_what_cannot_be_meant_is_said_before_a_model_is_looked_for(
    run: RunCli, arguments: tuple[object, ...], said: str
) -> None:
    result = run("generate", "-m", "nowhere.gguf", *arguments, "x")
    assert_clean(result, 2)
    assert result.out == ""
    assert result.err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (("--same-by", "meaning"), "the encoder minilm-l6 is not built", "edge-run models build minilm-l6"),
        (("--encoder", "minilm-l6"), "the encoder minilm-l6 is not built", "edge-run models build minilm-l6"),
        (("--encoder", "other"), "no encoder is named 'other'", "build one of: minilm-l6"),
        (("--encoder", "./none.onnx"), "there is no encoder none.onnx", "check its path"),
    ],
)
def test_an_encoder_that_is_missing(run: RunCli, arguments: tuple[str, ...], said: str, hint: str) -> None:
    result = run("generate", "-m", "nowhere.gguf", "--confidence", *arguments, "x")
    assert_clean(result, 1)
    assert result.err.startswith(f"error: {said}\nhint: ")
    assert hint in result.err


def test_a_question_longer_than_the_context(run: RunCli, model: tuple[object, ...]) -> None:
    for option in (("--confidence",), ("--abstain-above", 0.5)):
        result = run(*model, *option, "--quiet", "--ctx", 64, "x" * 100)
        assert_clean(result, 2)
        assert result.out == ""
        assert "tokens long; with a sample of 9 it needs a context of" in result.err
    empty = run(*model, "--confidence", stdin=b"\n")
    assert_clean(empty, 2)
    assert "the prompt is empty" in empty.err


# ── the encoder ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_onnx_file_with_other_inputs_says_which_are_expected(run: RunCli, tmp_path: Path) -> None:
    need_libraries()
    path = write_lookup_encoder(tmp_path, inputs={"pixel_values": (INT64, ["n", "n_tokens"])})
    result = run("generate", "-m", "nowhere.gguf", "--confidence", "--encoder", path, "x")
    assert_clean(result, 1)
    assert "has the inputs pixel_values" in result.err
    assert "input_ids, attention_mask and possibly token_type_ids" in result.err
    path.write_bytes(b"nonsense")
    damaged = run("generate", "-m", "nowhere.gguf", "--confidence", "--encoder", path, "x")
    assert_clean(damaged, 1)
    assert "cannot be loaded" in damaged.err


def test_an_encoder_that_is_built_is_used_and_only_then_imported(model: tuple[object, ...], tmp_path: Path) -> None:
    need_libraries()
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('onnxruntime' in sys.modules, 'tokenizers' in sys.modules, file=sys.stderr))"
    )

    def told(*options: object) -> tuple[str, str]:
        result = finish(start(program(*model, "--json", *options, "x", script=script)))
        assert_clean(result, 0)
        return result.err, json.loads(result.out.splitlines()[-1])["confidence"]["grouping"]

    err, grouping = told("--confidence")
    assert err.endswith("False False\n")
    assert grouping == "form"
    (tmp_path / "models").mkdir()
    built = write_lookup_encoder(tmp_path / "models" / "minilm-l6")
    built.rename(built.with_name("int8.onnx"))
    err, grouping = told("--confidence")
    assert "note: samples are compared by meaning, with the encoder minilm-l6" in err
    assert err.endswith("True True\n")
    assert grouping == "meaning"
    err, grouping = told("--confidence", "--same-by", "form")
    assert "note: samples" not in err
    assert err.endswith("False False\n")


def test_without_the_libraries_a_built_encoder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "minilm-l6").mkdir(parents=True)
    (tmp_path / "models" / "minilm-l6" / "int8.onnx").touch()
    find_spec: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find_spec(name))
    plan = plan_confidence(ConfidenceArguments(confidence=True), RunOptions(), 512)
    assert plan is not None
    assert (plan.same_by, plan.encoder) == ("form", None)
    assert "there is no tokenizers: pip install" in plan.why


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_ways_to_compare_are_those_of_the_package() -> None:
    for same_by in ("form", "entailment"):
        plan = plan_confidence(ConfidenceArguments(confidence=True, same_by=same_by), RunOptions(), 512)
        assert plan is not None
        assert plan.same_by in SAME_BY
    with pytest.raises(UsageError):
        plan_confidence(ConfidenceArguments(samples=4), RunOptions(), 512)
    assert plan_confidence(ConfidenceArguments(), RunOptions(), 512) is None


def test_a_sample_is_no_longer_than_an_answer_may_be() -> None:
    for max_tokens, expected in ((5, 5), (512, 32)):
        plan = plan_confidence(ConfidenceArguments(abstain_above=0.25), RunOptions(), max_tokens)
        assert plan is not None
        assert plan.settings.sampling.max_tokens == expected
        assert (plan.settings.threshold, plan.settings.samples) == (0.75, 8)


@pytest.mark.model
def test_the_demo_model_answers_what_it_knows_and_abstains_from_nonsense(run: RunCli) -> None:
    asked = "Capital of France: Paris\nCapital of Italy: Rome\nCapital of Egypt: Cairo\nCapital of {}:"
    options = ("generate", "--raw", "--quiet", "--threads", 1, "--mode", "full", "--stop", "\n", "--abstain-above", 0.5)
    known = run(*options, asked.format("Japan"))
    assert_clean(known, 0)
    assert known.out.strip() == "Tokyo"
    assert known.err.startswith("confidence 1.00: all 8 samples say the same (")
    nonsense = run(*options, asked.format("Vorenia"))
    assert_clean(nonsense, 3)
    assert nonsense.out == ""
