"""A run with an exit pack: which boundaries, signal and thresholds it uses, and that its heads are what guesses."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.chat import ChatSession
from edge_runtime.errors import BoundaryError, PackError, UsageError
from edge_runtime.exits.pack import ExitPack
from edge_runtime.exits.settings import certified_rung, exit_settings
from edge_runtime.exits.thresholds import Rung
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.options import RunArguments, run_options
from edge_runtime.resolve import DEFAULT_THRESHOLD, HEADS
from edge_runtime.types import SIGNALS, Mode

from .cli_helpers import RunCli, runner
from .conftest import TinyMaker
from .exit_fakes import random_pack

N = 12


def rung(bound: float, *, signal: str = "entropy", risk: str = "exits", holds: bool = True, **changes: Any) -> Rung:
    certificate = {"kind": f"disagreement of {risk}", "bound": bound, "n": 40, "risk": 0.01, "holds": holds}
    thresholds = (bound * 10, bound * 20) if holds else (0.0, 0.0)
    fields = {"prompts_needed": None if holds else 900, "prompts_minimum": 0 if holds else 150, **changes}
    return Rung(signal, risk, bound, 0.05, thresholds, certificate, 0.5, **fields)


RUNGS = (
    rung(0.01, holds=False),
    rung(0.05),
    rung(0.1),
    rung(0.05, risk="acceptance"),
    rung(0.02, method="crc", risk="tokens"),
    rung(0.02, signal="margin"),
    rung(0.02, signal="margin", risk="tokens"),
    rung(0.02, signal="clusters", risk="tokens"),
    rung(0.02, signal="top1", holds=False, prompts_needed=None),
)


@pytest.fixture(scope="module")
def model_path(tiny_path: TinyMaker) -> Path:
    return tiny_path("llama", tokenizer=True)


@pytest.fixture(scope="module")
def pack(model_path: Path) -> ExitPack:
    return random_pack(model_path, (2, 4), rungs=RUNGS, verify_thresholds=(0.5, 3.0))


@pytest.fixture(autouse=True)
def pack_path(pack: ExitPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    pack.save(tmp_path / "pack.gguf")
    return tmp_path / "pack.gguf"


@pytest.fixture
def options(model_path: Path, pack_path: Path) -> RunOptions:
    return RunOptions(model=str(model_path), mode=Mode.EXIT, n_ctx=256, n_threads=1, pack=str(pack_path))


# ── what is chosen ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("signal", "bound", "found"),
    [
        ("entropy", 0.05, RUNGS[1]),
        ("entropy", 0.07, RUNGS[1]),  # what holds at 5% holds at 7%
        ("entropy", 0.5, RUNGS[2]),
        ("margin", 0.02, RUNGS[5]),  # a bound on what exits says more than one on all tokens
        ("clusters", 0.02, RUNGS[7]),
    ],
)
def test_the_rung_of_a_bound(pack: ExitPack, signal: str, bound: float, found: Rung) -> None:
    assert certified_rung(pack, signal, bound) == found


@pytest.mark.parametrize(
    ("signal", "bound", "why"),
    [
        ("entropy", 0.02, r"at a disagreement of 0\.02 by entropy.*about 900 prompts are needed, at least 150"),
        ("top1", 0.02, "no number of prompts would do"),
        ("entropy", 0.001, "it was not calibrated for that"),
        ("gate", 0.05, "it was not calibrated for that"),
    ],
)
def test_what_is_not_certified_says_what_is_missing_and_what_there_is(
    pack: ExitPack, signal: str, bound: float, why: str
) -> None:
    with pytest.raises(PackError, match=why) as error:
        certified_rung(pack, signal, bound)
    assert "0.02 by clusters, 0.02 by margin, 0.05 by entropy, 0.1 by entropy" in error.value.hint
    with pytest.raises(PackError) as error:
        certified_rung(dataclasses.replace(pack, rungs=(RUNGS[0],)), "entropy", 0.05)
    assert "more prompts" in error.value.hint


def test_without_choices_the_pack_chooses(pack: ExitPack) -> None:
    verified = exit_settings(pack, Mode.VERIFIED)
    assert (verified.boundaries, verified.signal, verified.thresholds) == ((2, 4), "entropy", (0.5, 3.0))
    assert verified.rung is None
    with pytest.raises(PackError, match=r"certifies no exits at a disagreement of 0\.02"):
        exit_settings(pack, Mode.EXIT)
    by_margin = exit_settings(pack, Mode.EXIT, signal="margin")
    assert (by_margin.signal, by_margin.thresholds, by_margin.rung) == ("margin", (0.2, 0.4), RUNGS[5])
    assert exit_settings(pack, Mode.VERIFIED, (4,)).thresholds == (3.0,)
    assert exit_settings(pack, Mode.VERIFIED, thresholds=(1.0,), signal="gate").thresholds == (1.0,)
    assert exit_settings(pack, Mode.FULL).thresholds == (0.0,)


def test_choices_that_a_pack_cannot_meet(pack: ExitPack) -> None:
    with pytest.raises(BoundaryError, match="has no head behind layer 1, 3") as error:
        exit_settings(pack, Mode.VERIFIED, (1, 2, 3))
    assert "2,4" in error.value.hint
    with pytest.raises(UsageError, match="for all of its boundaries, 2,4"):
        exit_settings(pack, Mode.EXIT, (2,), max_disagreement=0.05)
    with pytest.raises(UsageError, match="by entropy, not by margin"):
        exit_settings(pack, Mode.VERIFIED, signal="margin")
    with pytest.raises(UsageError, match="compares each boundary with the one before"):
        exit_settings(pack, Mode.EXIT, (4,), (1.0,), "stability")


# ── what runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def tokens_of(options: RunOptions) -> tuple[list[int], Runtime]:
    with Runtime(options) as runtime:
        chunks = list(runtime.stream(runtime.text_tokens("Once upon a time"), N))
        return [c.step.token for c in chunks], runtime


def test_verified_with_a_pack_publishes_what_full_depth_does(options: RunOptions) -> None:
    full, runtime = tokens_of(dataclasses.replace(options, mode=Mode.FULL))
    assert runtime.summary.boundaries == ()
    assert (runtime.summary.pack, runtime.summary.head, runtime.summary.signal) == ("random", None, None)
    for thresholds in (None, (math.inf,)):
        found, runtime = tokens_of(dataclasses.replace(options, mode=Mode.VERIFIED, thresholds=thresholds))
        assert found == full
        assert runtime.summary.drafted > 0
    summary = runtime.summary
    assert (summary.boundaries, summary.pack, summary.head, summary.signal) == ((2, 4), "random", "pack", "entropy")


def test_what_leaves_early_is_of_the_shortlist(options: RunOptions, pack: ExitPack) -> None:
    changes: dict[str, Any] = {"thresholds": (0.0, math.inf), "signal": "gate"}
    with Runtime(dataclasses.replace(options, **changes)) as runtime:
        steps = [c.step for c in runtime.stream(runtime.text_tokens("Once upon"), 20)]
    exits = [step for step in steps if step.boundary is not None]
    assert {step.boundary for step in exits} == {4}
    assert {step.token for step in exits} <= set(pack.shortlist.tolist())
    assert all(0 < signals.gate < 1 for step in exits for _, signals in step.signals)


def test_a_weaker_certificate_is_told(options: RunOptions) -> None:
    for signal, n_notes in (("margin", 0), ("clusters", 1)):
        notes: list[str] = []
        with Runtime(dataclasses.replace(options, signal=signal), notes.append) as runtime:
            assert runtime.options.thresholds == (0.2, 0.4)
            assert runtime.options.signal == signal
        assert len(notes) == n_notes
    assert "disagreement of tokens at most 0.02" in notes[0]


def test_a_rung_is_chosen_by_its_bound(options: RunOptions) -> None:
    with Runtime(dataclasses.replace(options, max_disagreement=0.1)) as runtime:
        assert runtime.options.thresholds == (1.0, 2.0)


def test_the_shared_head_needs_no_pack_and_takes_of_one_the_boundaries(options: RunOptions, pack: ExitPack) -> None:
    shared = dataclasses.replace(options, head="shared", thresholds=(math.inf,), signal="top1")
    found, runtime = tokens_of(shared)
    assert runtime.options.boundaries == (2, 4)
    assert runtime.summary.head == "shared"
    assert tokens_of(dataclasses.replace(shared, pack=None, boundaries=(2, 4)))[0] == found
    assert tokens_of(dataclasses.replace(shared, signal="stability"))[1].summary.exits > 0
    plain = RunOptions(model=options.model, mode=Mode.EXIT, n_ctx=256, n_threads=1)
    with Runtime(plain) as runtime:
        assert runtime.options.thresholds == (DEFAULT_THRESHOLD,)
        assert (runtime.summary.pack, runtime.summary.head, runtime.summary.signal) == (None, "shared", "entropy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": None, "head": "pack"}, "no pack was given"),
        ({"pack": None, "max_disagreement": 0.1}, "needs the heads of an exit pack"),
        ({"head": "shared", "max_disagreement": 0.1}, "needs the heads of an exit pack"),
        ({"head": "shared", "signal": "gate", "thresholds": (1.0,)}, "needs an exit pack's heads"),
        ({"head": "shared", "signal": "margin"}, "no default threshold for the signal 'margin'"),
        ({"thresholds": (1.0,), "max_disagreement": 0.1}, "both given"),
        ({"max_disagreement": math.nan}, "is no bound on disagreement"),
        ({"max_disagreement": 1.5}, "is no bound on disagreement"),
        ({"signal": "mood"}, "no signal 'mood'"),
        ({"head": "bare"}, "no heads 'bare'"),
        ({"thresholds": (1.0, 2.0, 3.0)}, "3 thresholds were given for 2 boundaries"),
        ({"boundaries": (3,), "thresholds": (1.0,)}, "no head behind layer 3"),
    ],
)
def test_choices_that_exclude_each_other(options: RunOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Runtime(dataclasses.replace(options, **changes))


def test_a_pack_of_another_model_is_refused(options: RunOptions, tiny_path: TinyMaker) -> None:
    other = str(tiny_path("llama", tokenizer=True, n_layer=6))
    for mode in Mode:
        with pytest.raises(PackError, match="is for"):
            Runtime(dataclasses.replace(options, model=other, mode=mode))


def test_a_mode_may_be_changed_and_what_was_left_open_is_chosen_again(options: RunOptions) -> None:
    arguments = RunArguments(model=options.model, pack=options.pack, ctx=256, threads=1)
    with Runtime(run_options(arguments)) as runtime:
        session = ChatSession(runtime, arguments, lambda _text: None)
        session.take("/mode verified")
        assert (runtime.options.boundaries, runtime.options.thresholds) == ((2, 4), (0.5, 3.0))
        with pytest.raises(PackError, match="certifies no exits"):
            session.take("/mode exit")
        session.take("Once upon")  # and goes on as before
        assert runtime.summary.mode == "verified"
        session.take("/mode full")
        assert runtime.options.boundaries == ()
        session.take("Once upon")


def test_a_bound_on_disagreement_waits_for_mode_exit(options: RunOptions) -> None:
    arguments = RunArguments(model=options.model, mode="exit", pack=options.pack, max_disagreement=0.1, threads=1)
    with Runtime(run_options(arguments)) as runtime:
        session = ChatSession(runtime, arguments, lambda _text: None)
        found = []
        for mode in ("verified", "full", "exit"):
            session.take(f"/mode {mode}")
            found.append(runtime.options.thresholds)
    assert found == [(0.5, 3.0), (0.0,), (1.0, 2.0)]
    with pytest.raises(UsageError, match="in mode verified"):
        run_options(dataclasses.replace(arguments, mode="verified"))


def test_the_choices_on_the_command_line_are_the_runtimes() -> None:
    hints = typing.get_type_hints(RunArguments, include_extras=True)
    for name, known in (("signal", SIGNALS), ("head", HEADS)):
        choice, _none = typing.get_args(typing.get_args(hints[name])[0])
        assert typing.get_args(choice) == known


def test_the_command_line(
    options: RunOptions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: RunCli = runner(capsys, monkeypatch)
    common = ["generate", "-m", options.model, "--pack", options.pack, "-n", 6, "--threads", 1, "--ctx", 256]
    done = run(*common, "--mode", "exit", "--max-disagreement", 0.1, "--json", "Once upon")
    assert done.code == 0, done.err
    summary = json.loads(done.out.splitlines()[-1])["summary"]
    assert (summary["pack"], summary["head"], summary["signal"]) == ("random", "pack", "entropy")
    done = run(*common, "--mode", "exit", "--signal", "margin", "--threshold", "0.5,inf", "Once upon")
    assert done.code == 0, done.err
    done = run(*common, "--mode", "exit", "Once upon")
    assert done.code == 1
    assert "about 900 prompts are needed" in done.err
    for option, value in (("--signal", "margin"), ("--head", "shared"), ("--max-disagreement", 0.1)):
        done = run(*common, "--mode", "full", option, value, "Once upon")
        assert done.code == 2
        assert f"{option} means nothing in mode full" in done.err
