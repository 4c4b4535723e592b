"""Bytes of tokens become whole characters, and stop strings never show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import PromptError
from edge_runtime.text import Assembler, check_text, decode_prompt


def run(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[tuple[int, str]], bool]:
    """All that comes out, by token number, and whether a stop string ended it."""
    assembler = Assembler[int](stop)
    found: list[tuple[int, str]] = []
    for number, piece in enumerate(pieces):
        found += assembler.push(number, piece)
        if assembler.stopped:
            break
    return found + assembler.rest(), assembler.stopped


@given(st.text(), st.lists(st.integers(0, 40), max_size=8))
def test_text_survives_any_cutting_into_tokens(text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(c for c in cuts if c <= len(data))})
    pieces = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    found, stopped = run(pieces)
    assert "".join(part for _, part in found) == text
    assert [number for number, _ in found] == list(range(len(pieces)))
    assert not stopped


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_where_the_earliest_stop_string_begins(text: str, stop: list[str]) -> None:
    found, stopped = run([c.encode() for c in text], tuple(stop))
    shown = "".join(part for _, part in found)
    # the slow way: the first prefix that ends in a stop string decides
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    expected = text if not ends else text[: min(text[: ends[0]].find(s) for s in stop if s in text[: ends[0]])]
    assert shown == expected
    assert stopped == bool(ends)


def test_a_character_comes_whole_with_its_last_token() -> None:
    assert run([b"\xe2", b"\x82", b"\xac!"])[0] == [(0, ""), (1, ""), (2, "€!")]


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    assert run([b"a", b"\xe2\x82"])[0] == [(0, "a"), (1, "")]


def test_bytes_that_are_no_character_are_marked() -> None:
    assert run([b"\xff", b"a"])[0] == [(0, "\N{REPLACEMENT CHARACTER}"), (1, "a")]


def test_a_stop_string_may_be_spread_over_tokens_and_begin_within_one() -> None:
    found, stopped = run([b"Hello E", b"N", b"D of it"], ("END",))
    assert found == [(0, "Hello "), (1, ""), (2, "")]
    assert stopped


def test_what_only_looked_like_a_stop_string_is_shown_late_but_whole() -> None:
    assembler = Assembler[int](("END",))
    assert assembler.push(0, b"E") == []
    assert assembler.push(1, b"N") == []
    assert assembler.push(2, b"O") == [(0, "E"), (1, "N"), (2, "O")]


def test_an_empty_stop_string_stops_nothing() -> None:
    assert run([b"a"], ("",)) == ([(0, "a")], False)


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"hi\n", "hi"), (b"hi\r\n", "hi"), (b"hi\n\n", "hi\n"), (b"\xef\xbb\xbfhi", "hi"), (b"a\nb", "a\nb"), (b"", "")],
)
def test_a_prompt_loses_its_mark_and_one_newline(data: bytes, text: str) -> None:
    assert decode_prompt(data, "it") == text


def test_a_prompt_that_is_not_utf8_is_told_where() -> None:
    with pytest.raises(PromptError, match=r"notes\.txt is not valid UTF-8: byte 0xe9 at offset 3"):
        decode_prompt(b"caf\xe9", "notes.txt")


def test_an_argument_that_the_shell_could_not_decode() -> None:
    assert check_text("café", "the prompt") == "café"
    with pytest.raises(PromptError, match="the prompt is not valid UTF-8 at character 1"):
        check_text("a\udcff", "the prompt")
