"""The lens tells what each depth would say; its last reading is the model's own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from edge_runtime import lens_view
from edge_runtime.errors import BoundaryError, PromptError, UsageError
from edge_runtime.generate import RunOptions, Runtime
from edge_runtime.lens import MAX_TOKENS, read_lens, spaced_boundaries
from edge_runtime.types import Mode

from .cli_helpers import RunCli, assert_clean, runner
from .conftest import TinyMaker


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    return runner(capsys, monkeypatch)


@pytest.fixture
def model(tiny_path: TinyMaker) -> str:
    return str(tiny_path("llama", tokenizer=True))


TEXT = "A text of more tokens than go through a slice at once, cut into batches."


def test_the_last_reading_is_what_the_model_says_next(model: str) -> None:
    lens = read_lens(model, TEXT, (2, 5), n_threads=1)
    assert lens.layers == (2, 5, 7)
    with Runtime(RunOptions(model, Mode.FULL, n_ctx=256, n_threads=1)) as runtime:
        tokens = runtime.text_tokens(TEXT)
        assert [row.token for row in lens.rows] == tokens
        for end in (1, 31, 32, 33, len(tokens)):
            (chunk,) = runtime.stream(tokens[:end], 1)
            assert lens.rows[end - 1].final.token == chunk.step.token


def test_a_reading_does_not_depend_on_the_other_boundaries(model: str) -> None:
    alone, among = read_lens(model, TEXT, (3,), n_threads=1), read_lens(model, TEXT, (1, 3, 6), n_threads=1)
    assert [r.readings[0].token for r in alone.rows] == [r.readings[1].token for r in among.rows]


def test_spaced_boundaries_lie_within_any_model() -> None:
    assert spaced_boundaries(30) == (5, 10, 15, 20, 25)
    assert spaced_boundaries(1) == ()
    assert all(0 < b < n for n in range(1, 40) for b in spaced_boundaries(n))


def test_texts_and_boundaries_that_cannot_be_read(model: str) -> None:
    with pytest.raises(BoundaryError):
        read_lens(model, "hi", (7,))
    with pytest.raises(PromptError, match=f"takes 1 to {MAX_TOKENS}"):
        read_lens(model, "x" * (MAX_TOKENS + 1))


def test_the_table_has_a_line_per_token(run: RunCli, model: str) -> None:
    result = run("lens", "-m", model, "--threads", 1, "--boundaries", "2,5", "abc")
    assert_clean(result, 0)
    lines = result.out.splitlines()
    assert lines[0].split() == ["token", "after", "2", "after", "5", "after", "7,", "all"]
    assert len(lines) == 1 + 4  # a beginning of text, then three bytes
    assert "=" in result.err


def test_json(run: RunCli, model: str) -> None:
    result = run("lens", "-m", model, "--threads", 1, "--json", "ab")
    found = json.loads(result.out)
    assert len(found["rows"]) == 3
    assert [r["layer"] for r in found["rows"][0]["readings"]] == found["layers"]


def test_the_picture_is_a_png_even_of_awkward_text(run: RunCli, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lens.png"
    assert_clean(run("lens", "-m", model, "--threads", 1, "--png", path, "$x_1$ 東京 \x07 %s"), 0)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(run: RunCli, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("lens", "-m", model, "--threads", 1, "--png", tmp_path / "no" / "x.png", "a").code == 1


def test_a_text_too_long_for_a_picture(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lens = read_lens(model, "a", n_threads=1)
    long = dataclasses.replace(lens, rows=lens.rows * lens_view.MAX_PLOT_TOKENS)
    with pytest.raises(UsageError, match="a picture shows"):
        lens_view.draw(long, tmp_path / "x.png")


def test_drawing_without_matplotlib_says_how_to_get_it(
    run: RunCli, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("lens", "-m", model, "--png", tmp_path / "x.png", "a")
    assert_clean(result, 1)
    assert "hint: pip install 'edge-runtime[plot]'" in result.err


@pytest.mark.parametrize(
    ("text", "shown"), [(" a", "·a"), ("\n", "⏎"), ("\t", "⇥"), ("", "(empty)"), ("\x1b", "\\x1b"), ("\xa0", "\\xa0")]
)
def test_white_space_can_be_seen(text: str, shown: str) -> None:
    assert lens_view.visible(text) == shown
