"""Prompts and texts from files of every kind, and the prompts that come with the program."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from edge_runtime.bench.exit_prompts import pack_requests
from edge_runtime.errors import PromptError, UsageError
from edge_runtime.exits.languages import language_shares
from edge_runtime.exits.prompts import Request, builtin_requests, read_requests


def write(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ── built in ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_builtin_requests_are_different_and_repeatable() -> None:
    some = builtin_requests(500)
    assert len(set(some)) == 500
    assert some == builtin_requests(500)
    assert some[:100] == builtin_requests(100)
    assert some != builtin_requests(500, seed=1)
    assert not any("{" in request.text or not request.text.strip() for request in builtin_requests(10_000))


def test_more_than_there_are_gives_all() -> None:
    assert 3000 < len(builtin_requests(10**6)) < 5000


# ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_a_prompt(tmp_path: Path) -> None:
    path = write(tmp_path, "\N{BYTE ORDER MARK}What is rain?\r\n\n  Why?  \nWhat is rain?\n")
    assert read_requests(path) == [Request("What is rain?", "user"), Request("Why?", "user")]


def test_a_long_line_becomes_passages(tmp_path: Path) -> None:
    path = write(tmp_path, "Why?\n" + " ".join(f"word{i}" for i in range(300)))
    first, *passages = read_requests(path)
    assert not first.given
    assert [len(p.text.split()) for p in passages] == [120, 120, 60]
    assert all(p.given and p.group == "text" for p in passages)


def test_scripts_without_spaces_are_cut_too(tmp_path: Path) -> None:
    passages = read_requests(write(tmp_path, "".join(chr(0x4E00 + i) for i in range(3000))))
    assert [len(p.text) for p in passages] == [1200, 1200, 600]
    assert all(p.given for p in passages)


PROSE = """It was a bright cold day in the harbour and all the
ships were lying still, for the wind had gone down in
the night and nobody thought that it would come back
before the evening. The captain walked along the pier
and looked at the sky, which was of a pale and watery
blue, and wondered what to do with all these hours of
waiting. He had read his book to the end and written
all the letters that he owed, and there was no one in
the whole town whom he wished to see."""


def test_prose_in_short_lines_is_read_as_paragraphs(tmp_path: Path) -> None:
    first, second = read_requests(write(tmp_path, f"{PROSE}\n\nThen it rained.\n"))
    assert first == Request(" ".join(PROSE.split()), "text", given=True)
    assert second == Request("Then it rained.", "text", given=True)


def test_prompts_of_any_length_are_not_taken_for_prose(tmp_path: Path) -> None:
    lines = [f"Write a short story about {'very ' * (i % 5)}old ships and the harbour {i}" for i in range(30)]
    assert [r.text for r in read_requests(write(tmp_path, "\n".join(lines)))] == lines
    short = [f"write about ship {i}" for i in range(10, 40)]
    assert not any(r.given for r in read_requests(write(tmp_path, "\n".join(short))))


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jsonl_says_which_is_which(tmp_path: Path) -> None:
    # the line separator may stand in a JSON string as it is
    lines = ['{"prompt": "One\N{LINE SEPARATOR}two?"}', "", '{"text": "Read this."}', '{"prompt": " ", "id": 3}']
    path = write(tmp_path, "\n".join(lines), "a.jsonl")
    assert read_requests(path) == [
        Request("One\N{LINE SEPARATOR}two?", "user"),
        Request("Read this.", "text", given=True),
    ]


def test_half_a_character_does_no_harm(tmp_path: Path) -> None:
    (request,) = read_requests(write(tmp_path, '{"prompt": "a \\ud800 b"}', "a.jsonl"))
    assert request.text == "a ? b"


@pytest.mark.parametrize(
    "line", ["{", "[]", "5", '{"prompt": 5}', '{"text": null}', '{"question": "a"}', "[" * 100_000, '"prompt"']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f'{{"prompt": "good"}}\n{line}\n', "a.jsonl")
    with pytest.raises(PromptError, match=r"line 2 of .*a.jsonl is no prompt"):
        read_requests(path)


# ── nothing, and rubbish ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", ["", "\n\n  \n", "\N{BYTE ORDER MARK}"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(PromptError, match="holds no text"):
        read_requests(write(tmp_path, content))


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 20, b"GGUF\0\0", "Größe".encode("utf-16"), ("é" * 300).encode("latin1")]
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(PromptError, match="is no text in UTF-8"):
        read_requests(write(tmp_path, content))


def test_a_single_bad_byte_is_forgiven(tmp_path: Path) -> None:
    (request,) = read_requests(write(tmp_path, b"What is an \xe9clair? " + b"a" * 100))
    assert "\N{REPLACEMENT CHARACTER}clair" in request.text


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_requests(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="cannot be read"):
        read_requests(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(PromptError, match="1024 MiB"):
        read_requests(tmp_path / "huge.txt")


# ── languages ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the history of the city and its harbour?", "English"),
        ("Quelle est la capitale de la France et pourquoi est-elle si grande ?", "French"),
        ("Was ist der Unterschied zwischen einem Hund und einer Katze?", "German"),
        ("¿Cuál es la capital de España y por qué es tan grande?", "Spanish"),
        ("Почему небо голубое?", "Cyrillic script"),
        ("天空为什么是蓝色的？", "Chinese"),
        ("空はなぜ青いのですか。", "Japanese"),
        ("لماذا السماء زرقاء؟", "Arabic script"),
    ],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    assert language_shares([text]) == {language: 1.0}


def test_shares_are_of_texts_that_say_something() -> None:
    texts = ["What is the sky?", "Où est le chat et la souris ?", "42", "", "Xylophon"]
    assert language_shares(texts) == {"English": 0.5, "French": 0.5}
    assert language_shares(["17 + 4 = ?"]) == {}
    assert language_shares([r.text for r in builtin_requests(300)])["English"] > 0.97


# ── the demo model's pack ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with little in it."""
    news = [{"title": f"Title {i}", "text": " ".join(f"n{i}w{j}" for j in range(50 + i))} for i in range(100)]
    maths = [{"question": f"What is {i} and {i}?"} for i in range(40)]
    files = {
        "wikinews/wikinews-5000.jsonl.gz": "\n".join(map(json.dumps, news)),
        "gsm8k/train.jsonl.gz": "\n".join(map(json.dumps, maths)),
        "tatoeba/eng-fra.tsv.gz": "\n".join(f"Sentence {i}.\tPhrase {i}.\tx" for i in range(50)),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    return tmp_path


@pytest.mark.parametrize("n", [1, 7, 100])
def test_pack_requests_are_as_many_as_asked_for(data: Path, n: int) -> None:
    requests = pack_requests(data, n)
    assert len(requests) == n
    assert requests == pack_requests(data, n)
    assert n < 100 or len({request.group for request in requests}) == 7


def test_too_many_pack_requests_are_refused(data: Path) -> None:
    with pytest.raises(UsageError, match="too few texts for 1,000 requests"):
        pack_requests(data, 1000)
