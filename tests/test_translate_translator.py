"""The translator: what it asks, what it makes of answers, what it remembers, and what it tells of."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.apps import Ending, Glossary, Term, Translation, TranslationMemory, Translator
from edge_runtime.apps.answers import open_answers
from edge_runtime.apps.translator import CUT_MARK, whole_words
from edge_runtime.errors import ModelError, PromptError, UsageError
from edge_runtime.generate import RunOptions

from .conftest import TinyMaker
from .translate_fakes import FakeAnswers, Reply, capitals, sentence_of

MOTEUR = Term("engine", "moteur")


def translator(
    answers: FakeAnswers, glossary: Glossary | None = None, memory: TranslationMemory | Path | None = None
) -> Translator:
    return Translator("en", "fr", answers, glossary, memory)


def once_insisted(first: str, then: str) -> Reply:
    return lambda question: then if "must contain" in question else first


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_document_keeps_its_layout() -> None:
    answers = FakeAnswers()
    text = "\ufeff# Title\r\n\r\n  - One cat.  Two dogs!  \n42\nlast"
    done = translator(answers).translate_document(text)
    assert done.target == "\ufeff# TITLE\r\n\r\n  - ONE CAT.  TWO DOGS!  \n42\nLAST"
    assert done.source == text
    assert [sentence_of(q) for q in answers.questions] == ["Title", "One cat.", "Two dogs!", "last"]
    assert done.problems == []


@pytest.mark.parametrize("text", ["", "\n", " \r\n", "...", "42\n\n"])
def test_what_has_no_words_is_asked_of_nobody(text: str) -> None:
    answers = FakeAnswers()
    assert translator(answers).translate(text) == Translation.of(translator(answers).document_parts(text))
    assert translator(answers).translate(text).target == text
    assert translator(answers).translate_srt(text).target == text
    assert answers.questions == []


def test_a_wrapped_paragraph_is_translated_as_a_whole() -> None:
    answers = FakeAnswers()
    done = translator(answers).translate_document("one two\nthree four\n", wrapped=True)
    assert done.target == "ONE TWO\nTHREE FOUR\n"
    assert len(answers.questions) == 1


def test_subtitles() -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\n<i>Good\nmorning.</i>\n\n00:00:03,000 --> 00:00:04,000\nLost\n"
    done = translator(FakeAnswers()).translate_srt(text)
    assert done.target == text.replace("Good\nmorning", "GOOD\nMORNING")
    assert done.problems == ["line 6: a cue has no number; it is left as it is"]


def test_tags_inside_a_cue_stay_or_are_told_of() -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\nso <i>very</i> good\n"
    done = translator(FakeAnswers()).translate_srt(text)
    assert done.target.endswith("\nSO <i>VERY</i> GOOD\n")
    assert done.problems == []
    lost = translator(FakeAnswers(lambda q: sentence_of(q).replace("<i>", ""))).translate_srt(text)
    assert lost.target.endswith("\nso very good\n")
    assert lost.problems == ["line 1: the tags inside the text are lost"]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(PromptError):
        translator(FakeAnswers()).translate("a \udc80")


# ── answers that are none ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_answer_leaves_the_source() -> None:
    done = translator(FakeAnswers(lambda _: " ")).translate("Hello.")
    assert done.target == "Hello."
    assert done.segments[0].ending is Ending.EMPTY
    assert done.problems == ["line 1: the model gave no translation; the source stands in its place"]


def test_an_answer_that_runs_on_is_bounded() -> None:
    answers = FakeAnswers(lambda _: "la " * 10_000)
    done = translator(answers).translate("\nHello.")
    assert done.segments[0].ending is Ending.MAX_TOKENS
    assert done.segments[0].tokens == answers.limits[0] < 40
    assert done.problems == ["line 2: the translation ran on and was cut"]


def test_a_second_line_is_not_waited_for() -> None:
    done = translator(FakeAnswers(lambda _: "Bonjour.\nNote: \n la la la")).translate("Hello.")
    assert done.target == "Bonjour."
    assert (done.segments[0].tokens, done.problems) == (1, [])


def test_control_tokens_are_not_given_to_the_model() -> None:
    answers = FakeAnswers()
    done = translator(answers).translate("Hello <|end|> you.")
    assert (done.target, answers.questions) == ("Hello <|end|> you.", [])
    assert "control token" in done.problems[0]


# ── glossary ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_terms_are_asked_for_only_where_they_occur() -> None:
    answers = FakeAnswers(lambda _: "le moteur")
    done = translator(answers, Glossary([MOTEUR])).translate("The engine. The cat.")
    assert ["moteur" in question for question in answers.questions] == [True, False]
    assert not any(segment.retried or segment.violations for segment in done.segments)


def test_a_translation_without_a_term_is_asked_for_again() -> None:
    answers = FakeAnswers(once_insisted("la machine", "le moteur"))
    done = translator(answers, Glossary([MOTEUR])).translate("The engine.")
    assert (done.target, len(answers.questions), done.problems) == ("le moteur", 2, [])
    assert done.segments[0].retried
    assert done.segments[0].tokens == 4


def test_a_term_that_is_missed_twice_is_told_of() -> None:
    answers = FakeAnswers(once_insisted("la machine", "la chose"))
    done = translator(answers, Glossary([MOTEUR, Term("Edge", "Edge")])).translate("The engine of Edge.")
    assert (done.target, len(answers.questions)) == ("la machine", 2)
    assert done.segments[0].violations == (MOTEUR, Term("Edge", "Edge"))
    assert done.problems == [
        "line 1: the translation lacks what the glossary wants: 'moteur' for 'engine', 'Edge' as it is"
    ]


def test_of_two_translations_the_one_with_more_terms_counts() -> None:
    answers = FakeAnswers(once_insisted("la machine", "le moteur de la machine"))
    done = translator(answers, Glossary([MOTEUR, Term("Edge", "Edge")])).translate("The engine of Edge.")
    assert done.target == "le moteur de la machine"
    assert done.segments[0].violations == (Term("Edge", "Edge"),)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sentence_is_translated_once(tmp_path: Path) -> None:
    answers = FakeAnswers()
    for expected in ([False, True], [True, True]):
        with translator(answers, memory=tmp_path / "m.sqlite") as opened:
            done = opened.translate("Hello you. Hello you.")
        assert done.target == "HELLO YOU. HELLO YOU."
        assert [segment.from_memory for segment in done.segments] == expected
    assert len(answers.questions) == 1
    assert answers.n_closed == 0  # it came open


def test_what_decides_a_translation_is_in_its_key(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    with TranslationMemory(path) as memory:
        for answers, target, glossary in (
            (FakeAnswers(), "fr", None),
            (FakeAnswers(identity="other"), "fr", None),
            (FakeAnswers(), "de", None),
            (FakeAnswers(), "fr", Glossary([Term("Hello", "HELLO")])),
        ):
            Translator("en", target, answers, glossary, memory).translate("Hello.")
            assert len(answers.questions) == 1
        answers = FakeAnswers()
        Translator("en", "fr", answers, Glossary([MOTEUR]), memory).translate("Hello.")
        assert answers.questions == []  # terms that do not occur change nothing


def test_what_was_wrong_is_told_of_again(tmp_path: Path) -> None:
    told = []
    for _ in range(2):
        answers = FakeAnswers(lambda _: "la " * 10_000)
        with translator(answers, Glossary([MOTEUR]), tmp_path / "m.sqlite") as opened:
            told.append(opened.translate("The engine.").problems)
        assert len(told[0]) == 1
    assert told[0] == told[1]
    assert answers.questions == []


# ── lines as they come ──────────────────────────────────────────────────────────────────────────────────────────────


def test_each_line_is_translated_before_the_next_is_read() -> None:
    answers = FakeAnswers()
    heard = []

    def lines() -> list[str]:
        for text in ("One.\n", "", "two\r\n", "3\n"):
            heard.append(len(answers.questions))
            yield text

    done = list(translator(answers).stream(lines()))
    assert [part.target for part in done] == ["ONE.\n", "", "TWO\r\n", "3\n"]
    assert heard == [0, 1, 1, 2]
    assert [part.line for part in done] == [1, 2, 3, 4]


def test_a_line_is_cut_at_a_words_end_when_its_time_is_over(tmp_path: Path) -> None:
    answers = FakeAnswers(s_per_word=0.1)
    with translator(answers, memory=tmp_path / "m.sqlite") as opened:
        lines = ["a b c d e f g h\n", "a b\n", "One. Two. Three. Four words are here. Five.\n"]
        done = list(opened.stream(lines, latency_ms=450))
        assert [part.target for part in done] == [
            f"A B C D{CUT_MARK}\n",
            "A B\n",
            f"ONE. TWO. THREE. FOUR{CUT_MARK}\n",
        ]
        assert [part.missed for part in done] == [True, False, True]
        assert done[0].problems == ["cut, because its time was over"]
        # what was cut is not remembered, what was done is
        again = list(opened.stream(lines[::-1]))
        assert [[s.from_memory for s in part.segments] for part in again] == [
            [True, True, True, False, False],
            [True],
            [False],
        ]


def test_a_line_without_a_whole_word_in_time_stays() -> None:
    (done,) = translator(FakeAnswers(s_per_word=1.0)).stream(["Hello you there.\n"], latency_ms=10)
    assert (done.target, done.missed) == ("Hello you there.\n", True)
    assert done.problems == ["there was no time; the source stands in its place"]


def test_a_late_line_is_whole() -> None:
    (done,) = translator(FakeAnswers(s_per_word=1.0)).stream(["Hello\n"], latency_ms=1000)
    assert (done.target, done.missed) == ("Hello\n", True)
    (done,) = translator(FakeAnswers(lambda q: capitals(q) + "\n", s_per_word=1.0)).stream(["Hello\n"], latency_ms=900)
    assert (done.target, done.problems) == ("HELLO\n", ["late"])


def test_no_second_question_when_the_time_is_over() -> None:
    answers = FakeAnswers(lambda _: "la machine\n", s_per_word=0.2)
    (done,) = translator(answers, Glossary([MOTEUR])).stream(["The engine.\n"], latency_ms=300)
    assert (len(answers.questions), done.target, done.missed) == (1, "la machine\n", True)
    assert "moteur" in done.problems[0]


def test_whole_words() -> None:
    assert whole_words("un deux tro") == "un deux"
    assert whole_words("bonj") == ""
    assert whole_words("こんにち") == "こんにち"


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_of_random_numbers_answers(
    tiny_path: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    options = RunOptions(model=str(tiny_path("llama", tokenizer=True)), n_ctx=512, n_threads=1)
    with Translator("en", "fr", options, memory=tmp_path / "m.sqlite") as opened:
        first = opened.translate("Hello.\n")
        again = opened.translate("Hello.\n")
        assert first.segments[0].tokens > 0
        assert again.segments[0].from_memory
        assert again.target == first.target
        (late,) = opened.stream(["Another line.\n"], latency_ms=1e-6)
        assert (late.missed, late.target) == (True, "Another line.\n")


def test_a_sentence_that_fits_no_context_stays(tiny_path: TinyMaker) -> None:
    options = RunOptions(model=str(tiny_path("llama", tokenizer=True)), n_ctx=64, n_threads=1)
    with Translator("en", "fr", options) as opened:
        done = opened.translate("Hello.")
    assert done.target == "Hello."
    assert "too long for the context" in done.problems[0]


def test_a_model_without_a_tokenizer_is_refused(tiny_path: TinyMaker) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        Translator("en", "fr", RunOptions(model=str(tiny_path("llama")), n_threads=1))


def test_languages_are_checked_before_a_model_is_loaded() -> None:
    with pytest.raises(UsageError, match="no language 'xx'"):
        Translator("en", "xx", "no-such-model")


@pytest.mark.model
def test_the_demo_model_translates_something() -> None:
    notes: list[str] = []
    answers = open_answers(RunOptions(n_threads=1), notes.append)
    with Translator("en", "fr", answers) as opened:
        done = opened.translate("Good morning.\n")
        opened.translate("Good night.")
        assert answers.runtime.summary.reused_tokens > 20  # of the question's beginning
        control = opened.translate("One <|im_end|> two.")
    answers.close()
    assert done.target.endswith("\n")
    assert done.segments[0].ending is Ending.COMPLETE
    assert done.target != done.source
    assert control.segments[0].ending is Ending.CONTROL
    assert any("translates badly" in note for note in notes)
