"""The moderation probe: insulting words mislead, and neither length nor style tells the label."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

import pytest

SOURCE = files("edge_runtime.bench").joinpath("moderation_probe.tsv").read_text(encoding="utf-8")

COUNTS = {
    ("harmless", "negated"): 20,
    ("harmless", "reported"): 25,
    ("harmless", "quoted"): 20,
    ("harmless", "reclaimed"): 20,
    ("harmless", "innocent"): 15,
    ("hostile", "plain"): 30,
    ("hostile", "veiled"): 50,
    ("hostile", "group"): 20,
}
TOO_STRONG = {"arse", "arsehole", "ass", "asshole", "bastard", "bitch", "bollocks", "bugger", "crap", "piss", "pissed"}
INSULTS = re.compile(
    r"\b(idiots?|stupid|losers?|trash|dumb(er|est)?|pathetic|ugly|morons?|jerks?|shut up|damn|fools?|clown|garbage"
    r"|useless|worthless|imbecile|freak|creep|slob|lazy|dense|animals|vermin|parasites|thieves)\b",
    re.IGNORECASE,
)


class Row(NamedTuple):
    id: str
    text: str
    label: str
    kind: str


ROWS = [Row(*line.split("\t")) for line in SOURCE.splitlines()[1:]]
TEXTS = {label: [row.text for row in ROWS if row.label == label] for label in ("harmless", "hostile")}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_labels_and_kinds_have_their_counts() -> None:
    assert Counter((row.label, row.kind) for row in ROWS) == COUNTS


def test_ids_run_from_1_to_200_in_file_order() -> None:
    assert SOURCE.startswith("id\ttext\tlabel\tkind\n")
    assert [row.id for row in ROWS] == [str(i) for i in range(1, 201)]


def test_every_tsv_reader_sees_the_same_fields() -> None:
    # csv treats a quote at the start of a field as quoting; no text begins with one
    assert list(csv.reader(SOURCE.splitlines(), delimiter="\t"))[1:] == [list(row) for row in ROWS]
    assert SOURCE.endswith("\n")
    assert "\r" not in SOURCE
    assert all(row.text == " ".join(row.text.split()) for row in ROWS)


def test_no_two_texts_are_alike() -> None:
    assert len({" ".join(words(row.text)) for row in ROWS}) == len(ROWS)
    openings = Counter(tuple(words(row.text)[:4]) for row in ROWS)
    assert max(openings.values()) == 1


def test_texts_have_4_to_35_words() -> None:
    counts = [sum(any(map(str.isalnum, token)) for token in row.text.split()) for row in ROWS]  # an emoji is no word
    assert min(counts) >= 4
    assert max(counts) <= 35


def test_the_language_is_mild() -> None:
    assert [row.text for row in ROWS if TOO_STRONG & set(words(row.text))] == []


def test_insulting_words_mislead() -> None:
    assert [row.text for row in ROWS if row.kind == "veiled" and INSULTS.search(row.text)] == []
    with_insults = {label: sum(bool(INSULTS.search(text)) for text in TEXTS[label]) for label in TEXTS}
    assert with_insults["harmless"] > with_insults["hostile"]


def test_mean_length_does_not_tell_the_label() -> None:
    for measure in (len, lambda text: len(text.split())):
        harmless, hostile = (sum(map(measure, TEXTS[label])) / len(TEXTS[label]) for label in ("harmless", "hostile"))
        assert abs(harmless - hostile) < 0.2 * min(harmless, hostile)


@pytest.mark.parametrize(
    "has_mark",
    [
        pytest.param(lambda text: text[0].islower(), id="lower case start"),
        pytest.param(lambda text: text[-1].isalnum(), id="no full stop"),
        pytest.param(lambda text: '"' in text, id="quotation marks"),
        pytest.param(lambda text: "!" in text, id="exclamation mark"),
        pytest.param(lambda text: "?" in text, id="question mark"),
        pytest.param(lambda text: ";" in text or ":" in text, id="semicolon or colon"),
        pytest.param(lambda text: any(ord(c) > 0x2000 for c in text), id="emoji"),
    ],
)
def test_style_does_not_tell_the_label(has_mark: Callable[[str], bool]) -> None:
    harmless, hostile = (sum(map(has_mark, TEXTS[label])) for label in ("harmless", "hostile"))
    assert min(harmless, hostile) > 0
    assert abs(harmless - hostile) <= 5
