"""What is shown of tokens and answers."""

from __future__ import annotations

import io
import json
import math

import pytest

from edge_runtime.display import ExitPainter, footer, harmless, json_line, speaks_unicode, wants_colour
from edge_runtime.generate import Chunk
from edge_runtime.summary import Finish, Summary
from edge_runtime.types import Mode, Step

FULL = Step(token=1, position=5, depth=30)
LEFT = Step(token=1, position=5, depth=16, boundary=16)
ACCEPTED = Step(token=1, position=5, depth=16, boundary=16, drafted=True, accepted=True)
RELAXED = Step(token=1, position=5, depth=30, boundary=16, drafted=True, accepted=True, relaxed=True)
COPIED = Step(token=1, position=5, depth=30, boundary=0, drafted=True, accepted=True)
CORRECTED = Step(token=1, position=5, depth=30, drafted=True, corrected=True)


def painter(mode: Mode = Mode.EXIT, *, colour: bool = False, unicode: bool = True) -> ExitPainter:
    return ExitPainter(mode, (8, 16), 30, colour=colour, unicode=unicode)


@pytest.mark.parametrize(
    ("step", "mode", "shown"),
    [
        (FULL, Mode.EXIT, " fox"),
        (LEFT, Mode.EXIT, " fox⌄16"),
        (ACCEPTED, Mode.VERIFIED, " fox✓16"),
        (CORRECTED, Mode.VERIFIED, " fox✗"),
        (ACCEPTED, Mode.MARGIN, " fox✓16"),
        (RELAXED, Mode.MARGIN, " fox≈"),
        (CORRECTED, Mode.MARGIN, " fox✗"),
    ],
)
def test_marks_can_be_read_without_colour(step: Step, mode: Mode, shown: str) -> None:
    assert painter(mode).paint(Chunk(" fox", step)) == shown
    assert shown.isascii() or shown.strip(" fox1268")[0] in painter(mode).legend()


def test_marks_exist_for_terminals_without_unicode() -> None:
    assert painter(unicode=False).paint(Chunk("a", LEFT)) == "a^16"
    assert painter(Mode.MARGIN, unicode=False).legend().isascii()
    assert painter(Mode.MARGIN, unicode=False).paint(Chunk("a", RELAXED)) == "a~"


def test_drafts_of_the_text_so_far_have_no_layer() -> None:
    plain = ExitPainter(Mode.VERIFIED, (), 30, colour=False, unicode=True)
    assert plain.paint(Chunk("a", COPIED)) == "a✓"
    assert plain.legend().startswith("✓ drafted by the text so far and accepted; ✗")
    assert "✓" not in ExitPainter(Mode.FULL, (), 30, colour=False, unicode=True).legend()


def test_a_mark_stands_before_a_line_end() -> None:
    assert painter().paint(Chunk("a\n\n", LEFT)) == "a⌄16\n\n"
    assert painter(colour=True).paint(Chunk("\n", LEFT)).endswith("\x1b[0m\n")


def test_a_token_without_text_has_no_mark() -> None:
    assert painter().paint(Chunk("", LEFT)) == ""


def test_colours_differ_by_boundary_and_outcome() -> None:
    colours = {painter(colour=True).paint(Chunk("a", Step(1, 5, d, boundary=d))) for d in (8, 16)}
    colours |= {painter(Mode.MARGIN, colour=True).paint(Chunk("a", step)) for step in (CORRECTED, RELAXED)}
    assert len(colours) == 4
    assert painter(colour=True).paint(Chunk("a", FULL)) == "a"
    before_the_first_layer = Step(1, 5, 0, boundary=0, drafted=True, accepted=True)
    assert "a" in painter(Mode.VERIFIED, colour=True).paint(Chunk("a", before_the_first_layer))


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colour_is_for_terminals_unless_told_otherwise(environment: dict[str, str], colour: bool) -> None:
    assert wants_colour(io.StringIO(), environment) is colour


def test_what_a_stream_can_show_depends_on_its_encoding() -> None:
    assert speaks_unicode(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert not speaks_unicode(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))


def test_a_model_cannot_command_the_terminal() -> None:
    assert (
        harmless("a\x1b[2Jb\x07\r\n\tc") == "a\N{REPLACEMENT CHARACTER}[2Jb" + 2 * "\N{REPLACEMENT CHARACTER}" + "\n\tc"
    )


def test_json_has_no_nan() -> None:
    assert json.loads(json_line({"a": [math.nan, 1.5, (math.inf,)]})) == {"a": [None, 1.5, [None]]}


def summary(**changes: object) -> Summary:
    values: dict[str, object] = {
        "mode": "full", "boundaries": (), "finish_reason": "stop", "finish": "end-of-turn", "prompt_tokens": 10,
        "reused_tokens": 0, "generated_tokens": 5, "time_to_first_token_ms": 100.0, "prefill_tokens_per_s": 100.0,
        "decode_tokens_per_s": 20.0, "mean_depth": 30.0, "n_layer": 30, "exits": 0, "drafted": 0, "accepted": 0,
        "acceptance": None, "audited": 0, "disagreed": 0, "disagreement": None, "seed": 3,
    }  # fmt: skip
    return Summary(**{**values, **changes})  # type: ignore[arg-type]


def test_a_plain_answer_has_its_speed_and_depth() -> None:
    assert footer(summary(), seeded=True) == [
        "5 tokens, first after 100 ms, prefill 100.0 tokens/s of 10, decode 20.0 tokens/s, seed 3",
        "mode full: mean depth 30.0 of 30 layers",
    ]


def test_acceptance_and_disagreement_come_with_their_counts() -> None:
    verified = summary(mode="verified", drafted=8, accepted=6, acceptance=0.75, mean_depth=20.0)
    assert footer(verified, seeded=False)[1].endswith("6 of 8 drafts accepted (75%)")
    margin = summary(mode="margin", drafted=8, accepted=6, acceptance=0.75, relaxed=1, changed=0.2)
    assert footer(margin, seeded=False)[1].endswith(
        "6 of 8 drafts accepted (75%), 1 of 5 tokens (20.0%) are full depth's second choice"
    )
    audited = summary(mode="exit", exits=9, audited=4, disagreed=1, disagreement=0.25)
    assert footer(audited, seeded=False)[1].endswith("9 left early, full depth disagreed with 1 of 4 audited (25%)")
    assert "none of them compared" in footer(summary(mode="exit", exits=9), seeded=False)[1]


def test_energy_comes_with_its_source_and_with_what_is_known_of_it() -> None:
    used = {"energy_j": 12.34, "prefill_energy_j": 2.1, "decode_energy_j": 10.24, "energy_source": "measured"}
    per_token = {"energy_per_token_j": 0.1604, "net_energy_per_token_j": 0.1111, "energy_covered": 1.0}
    assert footer(summary(**used, **per_token), seeded=False)[-1] == (
        "energy 12.3 J measured (0.16 J per token, 0.11 above idle; prefill 2.1 J)"
    )
    per_token |= {"net_energy_per_token_j": None, "energy_covered": 0.5}
    assert footer(summary(**used, **per_token), seeded=False)[-1] == (
        "energy 12.3 J measured (0.16 J per token; prefill 2.1 J; the power was known for 50% of the time)"
    )
    large = summary(energy_j=12345.6, energy_per_token_j=123.4, energy_source="measured", net_energy_per_token_j=-0.25)
    assert footer(large, seeded=False)[-1] == "energy 12346 J measured (123 J per token, -0.25 above idle)"
    idle = summary(energy_j=2.0, energy_per_token_j=0.5, energy_source="measured", net_energy_per_token_j=1.1e-19)
    assert "0 above idle" in footer(idle, seeded=False)[-1]  # 4 W minus 4 W, but for the last bit
    one_token = summary(energy_j=2.0, prefill_energy_j=2.0, energy_source="estimated", energy_covered=1.0)
    assert footer(one_token, seeded=False)[-1] == "energy 2 J estimated (prefill 2 J)"


@pytest.mark.parametrize(
    ("finish", "words"),
    [(Finish.MAX_TOKENS, "--max-tokens"), (Finish.CONTEXT_FULL, "--ctx"), (Finish.INTERRUPTED, "interrupted")],
)
def test_an_end_that_is_not_the_answers_own_is_said_in_words(finish: Finish, words: str) -> None:
    assert words in footer(summary(finish=finish.value), seeded=False)[-1]


def test_an_answer_that_never_began() -> None:
    nothing = summary(
        generated_tokens=0, time_to_first_token_ms=None, prefill_tokens_per_s=None, decode_tokens_per_s=None,
        mean_depth=None, mode="exit", finish="interrupted",
    )  # fmt: skip
    assert footer(nothing, seeded=False) == ["0 tokens", "the answer was interrupted"]
