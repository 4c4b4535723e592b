"""How sure a runtime's model is of an answer: short answers to the same prompt, drawn beside it and compared.

with Runtime(RunOptions()) as runtime, Confident(runtime) as confident:
    found = confident.ask("What is the capital of France?")
    print(found.answer, found.score)
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from .encoder import DEFAULT_ENCODER, SentenceEncoder
from .energy.request import Meter, Work, weights_gb
from .errors import MemoryLimitError, PromptError, UnsupportedModelError, UsageError
from .generate import Message, Runtime
from .memory import estimate_need, machine_memory
from .resolve import context_options
from .semantic import (
    AnswerSampler,
    ByForm,
    ByMeaning,
    Confidence,
    ConfidenceSettings,
    Cost,
    Entailment,
    Grouping,
    Sample,
    SampleSettings,
    embedding_similarity,
    estimate,
)
from .semantic.entailment import entailment_prompt
from .semantic.grouping import Encode
from .types import Floats

SAME_BY = ("form", "meaning", "entailment")
MEANING_THRESHOLD = 0.65  # of minilm-l6: a wrong answer is seldom so near to a right one
ENTAILMENT_THRESHOLD = 0.5
_CELLS = 256  # llama.cpp rounds a context up to this
_THINKING = "<think>"


class Confident:
    """Draws short answers of a runtime's model and says how much they agree. Not thread-safe.

    Meant for questions with a short answer: of a sample, the first line counts, at most `settings.sampling.max_tokens`.
    The answers are drawn in a context of their own, which is opened with the first question; the runtime's
    conversation stays as it is. `same_by` says which answers mean the same: "form", those spelt alike but for case,
    articles, punctuation and how a number is written; "meaning", those whose embeddings by `encoder` are near;
    "entailment", those of which the model itself says that each follows from the other.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: ConfidenceSettings | None = None,
        same_by: str = "form",
        encoder: str | os.PathLike[str] | Encode = DEFAULT_ENCODER,
        *,
        meter: Meter | None = None,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """`meter` is where the energy is read, `note` gets warnings. Close it, or use it in a `with`.

        `encoder`, for "meaning" only: a name, a path, or a function from texts to their vectors of unit length.
        Raises UsageError for settings that cannot be meant, UnsupportedModelError for a model that cannot say yes or
        no, and as `SentenceEncoder` does; onnxruntime is imported for "meaning" and a name or path, and else never.
        """
        self.settings = settings or ConfidenceSettings()
        if self.settings.samples < 2:
            raise UsageError("one sample cannot agree with another", "draw 2 or more")
        if same_by not in SAME_BY:
            raise UsageError(f"answers cannot be the same by '{same_by}'", f"they can by {', '.join(SAME_BY)}")
        self.same_by = same_by
        self._runtime, self._meter = runtime, meter
        with ExitStack() as opened:
            n_parallel = min(self.settings.step, self.settings.samples)
            self._answers = opened.enter_context(_Beside(runtime, n_parallel, note))
            self._judge = opened.enter_context(_Beside(runtime, 1, note))
            self._grouping_about = self._groupings(encoder)
            self._opened = opened.pop_all()
        self._latest: tuple[str, Grouping] | None = None

    def _groupings(self, encoder: str | os.PathLike[str] | Encode) -> Callable[[str], Grouping]:
        """What puts answers to a question together."""
        if self.same_by == "meaning":
            encode = encoder if callable(encoder) else SentenceEncoder(encoder).encode
            return lambda question: ByMeaning(embedding_similarity(encode, question), MEANING_THRESHOLD)
        if self.same_by == "entailment":
            entailment = Entailment(self._runtime.model, self._prompt_of, self._judge.next_logits)
            return lambda question: ByMeaning(entailment.about(question), ENTAILMENT_THRESHOLD)
        return lambda _question: ByForm()

    def _prompt_of(self, text: str) -> list[int]:
        if self._runtime.template is None:
            return self._runtime.text_tokens(f"{text}\n")
        return self._runtime.chat_tokens([Message("user", text)])

    def ask(self, question: str) -> Confidence:
        """The confidence in the answer to a question, asked as a user's message. Raises as `of` does."""
        return self.of(self._prompt_of(question), question)

    def check(self, prompt: Sequence[int], question: str) -> None:
        """Raises PromptError for a prompt that leaves no room for samples, or a question none to compare them."""
        longest = self.settings.sampling.max_tokens
        self._answers.check(len(prompt), longest)
        if self.same_by == "entailment":
            self._judge.check(len(self._prompt_of(entailment_prompt(question, "", ""))) + 2 * longest, 1)

    def of(self, prompt: Sequence[int], question: str) -> Confidence:
        """The confidence in the answer to a prompt. `question`, its plain text, matters unless answers go by form.

        Raises PromptError for a prompt that is empty or leaves no room for samples, MemoryLimitError if there is no
        memory for them, UnsupportedModelError for a model that thinks aloud first, DecodeError if computing fails.
        """
        beside = (self._answers, self._judge)
        rows, batches = sum(each.rows for each in beside), sum(each.batches for each in beside)
        start = time.perf_counter()
        found = estimate(self._answers, prompt, self.settings, self._grouping(question))
        end = time.perf_counter()
        if any(sample.text.startswith(_THINKING) for sample in found.samples):
            raise UnsupportedModelError(
                f"{self._runtime.header.path} thinks aloud before it answers, and of samples the first line counts",
                "ask it without confidence, or tell it not to think",
            )
        rows, batches = sum(each.rows for each in beside) - rows, sum(each.batches for each in beside) - batches
        return dataclasses.replace(found, cost=self._with_energy(found.cost, start, end, rows, batches))

    def agrees(self, found: Confidence, question: str, answer: str) -> bool:
        """Whether the first line of `answer` means what most samples do, or as many as of any other meaning.

        What this takes is not in the cost of `found`.
        """
        lines = answer.strip().splitlines()
        texts = [*(sample.text for sample in found.samples), lines[0].strip() if lines else ""]
        groups = self._grouping(question).groups(texts)
        own = set(next(group for group in groups if len(texts) - 1 in group))
        largest = [c.members for c in found.clusters if c.share == found.consistency]
        return any(2 * len(own.intersection(members)) > len(members) for members in largest)

    def _grouping(self, question: str) -> Grouping:
        if self._latest is None or self._latest[0] != question:
            self._latest = question, self._grouping_about(question)
        return self._latest[1]

    def _with_energy(self, cost: Cost, start_s: float, end_s: float, rows: int, batches: int) -> Cost:
        """`cost` with the rows that a judge computed, and what all of it used."""
        cost = dataclasses.replace(cost, rows=rows)
        if self._meter is None:
            return cost
        size = weights_gb(self._runtime.header.file_bytes, batches, batches)
        energy = self._meter.account(Work(start_s, end_s, end_s, decoded=0, prefill_gb=size))
        if energy is None:
            return cost
        return dataclasses.replace(
            cost, joules=energy.gross_j, energy_source=energy.source.value, energy_covered=energy.covered
        )

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Confident:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Beside:
    """A context beside the runtime's, opened when it is first needed, and anew for a prompt that it does not hold."""

    def __init__(self, runtime: Runtime, n_parallel: int, note: Callable[[str], None]) -> None:
        self._runtime, self._n_parallel, self._note = runtime, n_parallel, note
        self._sampler: AnswerSampler | None = None
        self._closed_rows = self._closed_batches = 0  # of samplers that are closed

    @property
    def rows(self) -> int:
        return self._closed_rows + (self._sampler.rows if self._sampler else 0)

    @property
    def batches(self) -> int:
        return self._closed_batches + (self._sampler.batches if self._sampler else 0)

    def draw(self, prompt: Sequence[int], numbers: Sequence[int], settings: SampleSettings) -> list[Sample]:
        return self._for(len(prompt), settings.max_tokens).draw(prompt, numbers, settings)

    def next_logits(self, prompt: Sequence[int]) -> Floats:
        return self._for(len(prompt), 1).next_logits(prompt)

    def check(self, n_prompt: int, max_tokens: int) -> None:
        """Raises PromptError for a prompt that with one answer is longer than the runtime's context."""
        n_ctx, needed = self._runtime.options.n_ctx, n_prompt + max_tokens - 1  # an answer's last token is not computed
        if needed > n_ctx:
            raise PromptError(
                f"the question is {n_prompt} tokens long; with a sample of {max_tokens} it needs a context of "
                f"{needed}, and this one holds {n_ctx}",
                "shorten the question, or give a larger --ctx",
            )

    def _for(self, n_prompt: int, max_tokens: int) -> AnswerSampler:
        self.check(n_prompt, max_tokens)
        needed = n_prompt + self._n_parallel * (max_tokens - 1)
        if self._sampler is None or self._sampler.n_ctx < needed:
            self.close()
            self._sampler = self._open(-(-needed // _CELLS) * _CELLS)
        return self._sampler

    def _open(self, n_ctx: int) -> AnswerSampler:
        options = context_options(self._runtime.options)
        options = dataclasses.replace(options, n_ctx=n_ctx, n_batch=max(options.n_batch, self._n_parallel))
        need = dataclasses.replace(estimate_need(self._runtime.header, options, 1, self._n_parallel), weights=0)
        machine, size = machine_memory(), f"{need.total / 2**20:.0f} MiB"
        if need.total > machine.total:
            raise MemoryLimitError(f"samples need {size}, more than this machine has", "shorten the question")
        if need.total > machine.available:
            self._note(f"samples need {size}, only {machine.available / 2**20:.0f} MiB are free now: expect swapping")
        return AnswerSampler(self._runtime.model, self._n_parallel, options)

    def close(self) -> None:
        if self._sampler is not None:
            self._closed_rows, self._closed_batches = self.rows, self.batches
            self._sampler.close()
            self._sampler = None

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
