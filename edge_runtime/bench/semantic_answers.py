"""Answers to the benchmark's questions: a greedy one and several drawn ones for each, kept in a file as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..cache import model_hash
from ..errors import UsageError
from ..native import Model
from ..semantic import AnswerSource, Sample, SampleSettings
from ..templates import ChatTemplate, Message
from .questions import BenchQuestion, Kind

FORMAT = 1
GREEDY_TEMPERATURE = 1e-4  # so low that chance has no part in it
N_AT_ONCE = 8
# what is neither yes nor no cannot be judged
_YES_NO_SENTENCE = " Answer in one short sentence that begins with yes or no."
_WISHES = {"sentence": " Answer in one short sentence.", "words": " Answer with a number or a few words only."}
WORDINGS = ("sentence", "words", "lines", "turns", "bare")
# one for each kind of question, none of them asked; the last cannot be answered
_EXAMPLES = (
    ("What is the capital of Bolivia?", "Sucre"),
    ("What is 31 plus 18?", "49"),
    ("Is iron a metal?", "Yes"),
    ('What is the French word for "window"?', "fenêtre"),
    ("Can a stone sing?", "No"),
    ("What is written on the note in my pocket?", "I don't know"),
)


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How each question is asked, and how many answers are drawn beside the greedy one."""

    wording: str = "sentence"
    samples: int = 8
    sampling: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise UsageError(f"there is no wording '{self.wording}'", f"one of {', '.join(WORDINGS)}")
        if self.samples < 2:
            raise UsageError(f"{self.samples} samples have no entropy", "draw 2 or more")


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, the greedy answer to it, and those drawn."""

    question: BenchQuestion
    greedy: Sample
    samples: tuple[Sample, ...]


class Replay:
    """Draws again what was drawn before: an `AnswerSource` of one question's kept samples."""

    rows = 0

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        return [self._samples[number] for number in numbers]


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Tokenizer(Protocol):
    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...


def prompt_of(question: BenchQuestion, wording: str, model: _Tokenizer, template: ChatTemplate | None) -> list[int]:
    """The tokens that ask a question, by default as a user would.

    "sentence" and "words" wish for as much, "bare" for nothing; "turns" comes behind a chat about other questions, and
    "lines" behind the same as plain text, without the chat template, as all do where the model has none.
    """
    turns = list(_EXAMPLES) if wording in ("lines", "turns") else []
    is_yes_no = question.kind is Kind.YES_NO and wording == "sentence"
    asked = question.text + (_YES_NO_SENTENCE if is_yes_no else _WISHES.get(wording, ""))
    if template is None or wording == "lines":
        lines = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in turns]
        text = "".join(lines) + f"Question: {asked}\nAnswer:"
        return model.tokenize(text, add_special=True, parse_special=False)
    messages = [m for q, a in turns for m in (Message("user", q), Message("assistant", a))]
    rendered = template.render([*messages, Message("user", asked)])
    return model.tokenize(rendered, add_special=False, parse_special=True)


def spread_out(asked: Sequence[BenchQuestion], n: int) -> list[BenchQuestion]:
    """`n` of the questions, evenly from all of them and so of every kind. Raises UsageError."""
    if not 2 <= n <= len(asked):
        raise UsageError(f"there are no {n} questions to compare", f"give --questions 2 to {len(asked)}")
    return [asked[i * len(asked) // n] for i in range(n)]


def answer_all(
    asked: Sequence[BenchQuestion],
    source: AnswerSource,
    prompt: Callable[[BenchQuestion], Sequence[int]],
    plan: AnswerPlan,
    keeper: Keeper | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """Answers to all questions, those that `keeper` has among them; it is given each new one at once.

    `done` is called after each question that had to be asked. Raises as the source and the keeper do.
    """
    found = []
    for question in asked:
        answered = keeper.find(question) if keeper else None
        if answered is None:
            answered = _answer(question, source, prompt(question), plan)
            if keeper:
                keeper.add(answered)
            done()
        found.append(answered)
    return found


def _answer(question: BenchQuestion, source: AnswerSource, prompt: Sequence[int], plan: AnswerPlan) -> Answered:
    (greedy,) = source.draw(prompt, [0], replace(plan.sampling, temperature=GREEDY_TEMPERATURE))
    samples: list[Sample] = []
    while len(samples) < plan.samples:
        end = min(len(samples) + N_AT_ONCE, plan.samples)
        samples += source.draw(prompt, range(len(samples), end), plan.sampling)
    return Answered(question, greedy, tuple(samples))


# ── keeping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Keeper:
    """A file of answers, a line of JSON each, behind a line that says how they came about. Use it in a `with`.

    What an interrupted run left is used again; a last line that is cut short is written anew.
    """

    def __init__(self, path: Path, plan: AnswerPlan, model: Model) -> None:
        """Raises UsageError for a file that is something else, or holds other answers than `plan` would give."""
        self.path = path
        self._heading = heading(plan, model)
        self._known: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UsageError(f"answers cannot be kept in {path}: {error.strerror}", "name another file") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    @property
    def n_known(self) -> int:
        return len(self._known)

    def find(self, question: BenchQuestion) -> Answered | None:
        """The kept answers to a question."""
        record = self._known.get(question.text)
        if record is None:
            return None
        return Answered(question, _sample(record["greedy"]), tuple(map(_sample, record["samples"])))

    def add(self, answered: Answered) -> None:
        record = {
            "question": answered.question.text,
            "greedy": asdict(answered.greedy),
            "samples": [asdict(sample) for sample in answered.samples],
        }
        self._known[answered.question.text] = record
        self._write(record)

    def _read(self) -> None:
        self._file.seek(0)
        *lines, cut = self._file.read().split(b"\n")
        if not lines and (not cut or _text(self._heading).startswith(cut)):
            self._file.truncate(0)
            self._write(self._heading)
            return
        try:
            found, *records = [json.loads(line) for line in lines]
            if found["answers"] != FORMAT:
                raise ValueError
            known = {record["question"]: record for record in records}
            for record in records:
                _check(record)
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"{self.path} holds no answers of this benchmark", "name another file") from None
        if found != self._heading:
            other = ", ".join(key for key in self._heading if found.get(key) != self._heading[key])
            raise UsageError(f"{self.path} holds answers that came about otherwise: {other}", "name another file")
        self._file.truncate(sum(len(line) + 1 for line in lines))
        self._known = known

    def _write(self, record: Mapping[str, object]) -> None:
        try:
            self._file.write(_text(record) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}", "free some space") from error

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def heading(plan: AnswerPlan, model: Model) -> dict[str, object]:
    """All that answers depend on."""
    return {
        "answers": FORMAT,
        "model": model_hash(Path(model.path)),
        "kernels": model.kernels,
        "wording": plan.wording,
        "samples": plan.samples,
        **asdict(plan.sampling),
    }


def _text(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def _check(record: Mapping[str, Any]) -> None:
    """Raises KeyError or TypeError for a record that is none."""
    for values in (record["greedy"], *record["samples"]):
        _sample(values)


def _sample(values: Mapping[str, Any]) -> Sample:
    return Sample(
        values["text"],
        tuple(values["tokens"]),
        tuple(values["log_likelihoods"]),
        values["mean_entropy"],
        values["ended"],
    )
