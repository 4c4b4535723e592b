"""What the translator makes of texts before a model sees them, and after: layout, sentences, cues, terms, answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.apps.glossary import Glossary, Term, violations
from edge_runtime.apps.languages import LANGUAGES, find_language, find_pair
from edge_runtime.apps.prompt import clean, is_enough, max_answer, question
from edge_runtime.apps.segments import LONGEST, Unit, sentences, split_lines, text_units
from edge_runtime.apps.srt import spread, srt_units
from edge_runtime.bench.translation_sample import SENTENCES, pairs
from edge_runtime.errors import PromptError, UsageError

EN, FR = find_pair("en", "fr")
SRT = """\
1
00:00:01,000 --> 00:00:02,500
<i>Good morning,
my friend.</i>

2
00:00:03,000 --> 00:00:04,000 X1:40
- Who is there?
- Me.

"""


def same(unit: Unit) -> str:
    """The unit laid out with its bodies as they are."""
    return unit.lay_out(unit.bodies)


def bodies(text: str, *, wrapped: bool = False) -> list[str]:
    return [body for unit in text_units(text, wrapped=wrapped) for body in unit.bodies]


# ── languages ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wanted", ["pt-br", "PT_BR", "brazilian portuguese", " pt-BR "])
def test_a_language_has_a_code_and_a_name(wanted: str) -> None:
    assert find_language(wanted).name == "Brazilian Portuguese"


def test_no_two_languages_share_a_code_or_a_name() -> None:
    assert len({language.code.lower() for language in LANGUAGES}) == len(LANGUAGES)
    assert len({language.name.lower() for language in LANGUAGES}) == len(LANGUAGES)
    assert not find_language("ru").latin


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("eng", "en (English)"),
        ("fr-CH", "fr (French)"),
        ("Frensh", "fr (French)"),
        ("deutsch", "de (German)"),
        ("日本語", "ja (Japanese)"),
        ("klingon!", "give a code"),
        ("", "give a code"),
    ],
)
def test_an_unknown_language_comes_with_a_hint(wanted: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_language(wanted)
    assert hint in caught.value.hint


def test_two_languages_are_needed() -> None:
    with pytest.raises(UsageError, match="from English to English"):
        find_pair("en", "english")


# ── layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.text(alphabet="aB. \t\n\r-*1)#>\ufeff!?é\u2028\x0b", max_size=40), st.booleans())
def test_units_joined_are_the_text(text: str, wrapped: bool) -> None:
    assert "".join(unit.source for unit in text_units(text, wrapped=wrapped)) == text
    assert "".join(same(unit) for unit in text_units(text)) == text


@given(st.text(max_size=60))
def test_cues_joined_are_the_text(text: str) -> None:
    assert "".join(unit.source for unit in srt_units(text)) == text


@given(st.text(alphabet='ab. A1!?…。"»\n', max_size=60))
def test_sentences_joined_are_the_line(text: str) -> None:
    found = sentences(text)
    assert "".join(sentence + gap for sentence, gap in found) == text
    assert all(not gap.strip() for _, gap in found)


def test_layout_stays_apart() -> None:
    text = "\ufeff# A title\r\n\r\n  - one  \n\t1. [x] two\n> quoted\n-----\n42\nhttps://example.org/a\na@b.org\n@last"
    assert bodies(text) == ["A title", "one", "two", "quoted", "@last"]
    assert [unit.line for unit in text_units(text)] == list(range(1, 11))


def test_only_line_ends_end_lines() -> None:
    assert split_lines("a\r\nb\rc\n\nd\x0be\u2028") == [
        ("a", "\r\n"),
        ("b", "\r"),
        ("c", "\n"),
        ("", "\n"),
        ("d\x0be\u2028", ""),
    ]


def test_a_wrapped_paragraph_is_one_text_and_is_filled_anew() -> None:
    text = "* one two\n  three four\n* five\n\nsix seven\neight"
    assert bodies(text, wrapped=True) == ["one two three four", "five", "six seven eight"]
    first, *_ = text_units(text, wrapped=True)
    assert first.lay_out(["aaaa bbbb cccc dddd"]) == "* aaaa bbbb\n  cccc dddd\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello. How are you? Fine!", ["Hello.", "How are you?", "Fine!"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("Dr. Smith and Mr. J. Brown, e.g. at 5 p.m. today.", ["Dr. Smith and Mr. J. Brown, e.g. at 5 p.m. today."]),
        ("Am 3. Oktober. Dann z. B. Mai.", ["Am 3. Oktober.", "Dann z. B. Mai."]),
        ("« Quoi ? » dit-il. Rien.", ["« Quoi ? » dit-il.", "Rien."]),
        ("Version 1.2 of a.b is out… Really?", ["Version 1.2 of a.b is out…", "Really?"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [sentence for sentence, _ in sentences(text)] == expected


@pytest.mark.parametrize("text", ["word, " * 400, "word " * 400, "x" * 2000, "." * 2000])
def test_no_sentence_is_too_long(text: str) -> None:
    found = sentences(text)
    assert max(len(sentence) for sentence, _ in found) <= LONGEST
    assert "".join(sentence + gap for sentence, gap in found) == text


# ── subtitles ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cue(text: str) -> Unit:
    (unit,) = srt_units("7\n00:00:01,000 --> 00:00:02,000\n" + text)
    return unit


def laid_out(text: str, *translated: str) -> str:
    return cue(text).lay_out(translated).split("\n", 2)[2]


def test_numbers_times_and_outer_tags_stay_apart() -> None:
    first, gap, second, _ = srt_units(SRT)
    assert first.bodies == ("Good morning, my friend.",)
    assert second.bodies == ("Who is there?", "Me.")
    assert (gap.source, second.line) == ("\n", 6)
    assert first.lay_out(["Bonjour, mon ami."]) == ("1\n00:00:01,000 --> 00:00:02,500\n<i>Bonjour,\nmon ami.</i>\n")
    assert second.lay_out(["Qui est là ?", "Moi."]).endswith("\n- Qui est là ?\n- Moi.\n")


@pytest.mark.parametrize(
    ("text", "body", "result"),
    [
        ("<i>One</i>\n<i>two</i>", "One two", "<i>AAA\nBBB</i>"),
        (r"{\an8}<b>One</b>", "One", r"{\an8}<b>AAA BBB</b>"),
        (r"{\an8}so <i>very</i> good", "so <i>very</i> good", r"{\an8}AAA BBB"),
        ("<i>One</i> and <i>two</i>", "<i>One</i> and <i>two</i>", "AAA BBB"),
        ('<font color="red">One two</font>', "One two", '<font color="red">AAA BBB</font>'),
        ("♪ La la ♪\r\n", "♪ La la ♪", "AAA BBB\r\n"),
    ],
)
def test_tags(text: str, body: str, result: str) -> None:
    assert cue(text).bodies == (body,)
    assert laid_out(text, "AAA BBB") == result


def test_a_cue_without_words_stays() -> None:
    for text in ("...", "<i></i>", "♪ ♪\n♪"):
        assert cue(text).bodies == ()
        assert same(cue(text)) == cue(text).source


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("00:00:01,000 --> 00:00:02,000\nHello\n", "no number"),
        ("1\nHello\n", "no times"),
        ("1\n", "no times"),
        ("1\n00:00:01,000 -> 00:00:02,000\nHello\n", "no times"),
        ("Hello\n", "no cue"),
    ],
)
def test_a_malformed_cue_is_told_of_and_stays(text: str, problem: str) -> None:
    unit = list(srt_units("\ufeff" + SRT + text))[-1]
    assert unit.problem is not None
    assert problem in unit.problem
    assert (unit.line, same(unit)) == (11, text)


def test_a_byte_order_mark_disturbs_nothing() -> None:
    assert [unit.problem for unit in srt_units("\ufeff" + SRT)] == [None] * 4
    assert next(iter(srt_units("\ufeff" + SRT))).lay_out(["A"]).startswith("\ufeff1\n")


@pytest.mark.parametrize(
    ("text", "n", "rows"),
    [
        ("aa bb cc dd", 2, ["aa bb", "cc dd"]),
        ("aa bb", 3, ["aa", "bb"]),
        ("字幕字幕", 2, ["字幕字幕"]),
        ('<font color="red">aa bb', 2, ['<font color="red">aa', "bb"]),
    ],
)
def test_lines_of_about_the_same_length(text: str, n: int, rows: list[str]) -> None:
    assert spread(text, n) == rows


# ── glossary ────────────────────────────────────────────────────────────────────────────────────────────────────────


def terms(glossary: Glossary, sentence: str) -> list[str]:
    return [term.term for term in glossary.terms_in(sentence)]


def test_terms_are_whole_words_and_the_longer_one_counts() -> None:
    glossary = Glossary([Term("engine", "moteur"), Term("steam engine", "machine à vapeur"), Term("US", "États-Unis")])
    assert terms(glossary, "The Steam  Engine is old.") == ["steam engine"]
    assert terms(glossary, "An ENGINE, a steam engine.") == ["engine", "steam engine"]
    assert terms(glossary, "Engineers told us.") == []
    assert terms(glossary, "The US.") == ["US"]


def test_terms_of_other_scripts_and_signs() -> None:
    glossary = Glossary([Term("东京", "Tokio"), Term("C++", "C++"), Term("l'eau", "water"), Term("straße", "street")])
    assert terms(glossary, "我在东京住。") == ["东京"]
    assert terms(glossary, "C++ is old.") == ["C++"]
    assert terms(glossary, "De l’eau, Straße") == ["l'eau", "straße"]
    assert terms(Glossary([Term("is", "ist")]), "ıs İs iſ") in ([], ["is"])  # whatever it is, it is no failure


def test_terms_are_looked_for_in_translations() -> None:
    motor, kept = Term("engine", "moteur"), Term("EdgeRun", "EdgeRun")
    assert violations([motor, kept], "Les Moteurs de EdgeRun") == ()
    assert violations([motor, kept], "La machine de edgerun") == (motor, kept)
    assert Term("a", "l'eau").is_in("De l’eau")


def test_glossary_files(tmp_path: Path) -> None:
    tsv, toml = tmp_path / "a.tsv", tmp_path / "a.toml"
    tsv.write_bytes("\ufeff# mine\r\nengine\tmoteur\r\n\r\nEdgeRun\r\n".encode())
    toml.write_text('keep = ["EdgeRun"]\n[terms]\nengine = "moteur"\n')
    expected = {Term("engine", "moteur"), Term("EdgeRun", "EdgeRun")}
    assert set(Glossary.load(tsv).terms) == set(Glossary.load(toml).terms) == expected
    tsv.write_text("")
    assert Glossary.load(tsv).terms_in("anything") == ()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", b"a\tb\tc", "line 1: there are 3 columns"),
        ("a.tsv", b"\n\tb", "line 2: there is no term"),
        ("a.tsv", b"a\tb\na\tc", "'a' in two ways: 'b' and 'c'"),
        ("a.tsv", b"\xff", "not valid UTF-8"),
        ("a.tsv", b"a\0b", "no text file"),
        ("a.toml", b"a", "is not TOML"),
        ("a.toml", b"a = 1", "'a' means nothing"),
        ("a.toml", b"keep = 1", "to be a list"),
        ("a.toml", b"keep = [1]", "1 is no term"),
        ("a.toml", b"[terms]\na = ''", "'' is no term"),
    ],
)
def test_a_glossary_that_cannot_be_meant(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises((UsageError, PromptError), match=r".") as caught:
        Glossary.load(tmp_path / name)
    assert message in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint


def test_a_glossary_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Glossary.load(tmp_path / "a.tsv")


# ── questions and answers ───────────────────────────────────────────────────────────────────────────────────────────


def test_questions_begin_alike_and_name_the_terms() -> None:
    plain = question("Hello.", EN, FR)[0].content
    asked = question("Hello.", EN, FR, [Term("engine", "moteur"), Term("EdgeRun", "EdgeRun")])[0].content
    firmer = question("Hello.", EN, FR, [Term("engine", "moteur")], insist=True)[0].content
    assert plain.removesuffix("Hello.") == asked[: len(plain) - len("Hello.")]
    assert "- engine: moteur\n- EdgeRun: keep it as it is\n" in asked
    assert "must contain" in firmer
    assert plain.endswith("\n\nHello.")


@pytest.mark.parametrize(
    ("answer", "sentence", "expected"),
    [
        (" Bonjour. \n", "Hello.", "Bonjour."),
        ('"Bonjour."', "Hello.", "Bonjour."),
        ('"Bonjour."', '"Hello."', '"Bonjour."'),
        ("« Bonjour. »", "Hello.", "Bonjour."),
        ('"Oui" et "non"', "Yes and no", '"Oui" et "non"'),
        ("'C'est moi'", "It is me", "C'est moi"),
        ("Translation: Bonjour.", "Hello.", "Bonjour."),
        ("Translation: bonjour", "Translation: hello", "Translation: bonjour"),
        ("**French:** Bonjour.", "Hello.", "Bonjour."),
        ('Sure! Here is the translation:\n\n"Bonjour."\n\nI hope it helps.', "Hello.", "Bonjour."),
        ("The French translation of this is: Bonjour.", "Hello.", "Bonjour."),
        ("Here is the translation:", "Hello.", ""),
        ("Attention : feu", "Warning: fire", "Attention : feu"),
        ("Voici : feu", "Fire", "Voici : feu"),
        ("", "Hello.", ""),
        ('"', "Hello.", '"'),
    ],
)
def test_answers_are_cleaned(answer: str, sentence: str, expected: str) -> None:
    assert clean(answer, sentence, EN, FR) == expected


def test_a_line_of_translation_is_enough() -> None:
    assert not is_enough("\nBonjour", "Hello", EN, FR)
    assert not is_enough("Here is the translation:\n", "Hello", EN, FR)
    assert is_enough("Here is the translation:\nBonjour\n", "Hello", EN, FR)


def test_an_answer_is_bounded_by_the_sentence() -> None:
    assert max_answer(10, FR) < max_answer(20, FR) < max_answer(20, find_language("hi"))


def test_the_sample_is_whole() -> None:
    assert len(set(SENTENCES)) == 60
    assert all(text == text.strip() and text for row in SENTENCES for text in row)
    assert pairs("de", "en")[0] == ("Guten Morgen.", "Good morning.")
