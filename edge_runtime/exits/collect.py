"""The model answers prompts, many at once, and its hidden states and distributions are kept.

Prompts and answers run through slices in batches of 32 rows, the newest token of each answer and parts of prompts side
by side. With flash attention llama.cpp's sums for a row do not depend on the other rows up to that width; each text has
KV cells of its own (where texts share them, sums depend on the order in which cells were freed) and draws from random
numbers of its own. So an answer does not depend on its company, and a collection that was interrupted goes on as if it
had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, PromptError, UsageError
from ..native import ContextOptions, Model
from ..slices import Slice, close_slices, open_slices
from ..types import Floats
from .corpus import Array, Corpus, Shard

N_BATCH = 32
SHARD_PROMPTS = 64
_FLOAT16_MAX = 65504.0
_SAMPLED_FROM = 40  # as llama.cpp's usual top-k


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to be answered, or, with `answered`, a text whose every token is a target."""

    number: int  # position in the list of prompts: decides the shard and the random numbers
    tokens: tuple[int, ...]
    temperature: float = 0.0
    answered: bool = False  # True: a given text; nothing is generated
    group: str = ""  # what kind of prompt this is, for reports


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How answers are collected. `n_parallel` texts are in flight at once."""

    layers: tuple[int, ...]  # boundaries whose states are kept
    max_tokens: int = 160  # of an answer
    top_k: int = 32  # tokens of a distribution that are kept one by one
    n_parallel: int = 12
    n_threads: int = 0  # 0: all physical cores
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("no boundary is given to collect states at", "give one as in --boundaries 16,20")
        if min(self.max_tokens, self.top_k, self.n_parallel) < 1:
            raise UsageError("answers, kept tokens and texts in flight must be at least 1")

    def identity(self) -> dict[str, object]:
        """All that decides what is collected from a prompt."""
        return {"layers": self.layers, "max_tokens": self.max_tokens, "top_k": self.top_k, "seed": self.seed}


@dataclass(slots=True)
class _Running:
    """A text on its way through the slices."""

    prompt: Prompt
    random: np.random.Generator
    tokens: list[int]
    n_done: int = 0
    finished: bool = False
    states: list[list[NDArray[np.float16]]] = field(default_factory=list)  # per layer, batch by batch
    rows: list[int] = field(default_factory=list)
    final: list[NDArray[np.float16]] = field(default_factory=list)
    top_ids: list[NDArray[np.int32]] = field(default_factory=list)
    top_logp: list[NDArray[np.float16]] = field(default_factory=list)


class Collector:
    """Slices of `model`, open for many texts at once."""

    def __init__(self, model: Model, options: CollectOptions, longest: int) -> None:
        """`longest` is the number of tokens of the longest prompt. Raises MemoryLimitError or LibraryError."""
        self.options = options
        self._model = model
        context = ContextOptions(
            n_ctx=options.n_parallel * (longest + options.max_tokens),
            n_batch=N_BATCH,
            n_seq_max=options.n_parallel,
            n_threads=options.n_threads,
            flash_attention=True,
            kv_unified=False,
        )
        self._slices: list[Slice] = open_slices(
            model, options.layers, context, n_outputs_max=N_BATCH, want_last_hidden=True
        )

    def close(self) -> None:
        close_slices(self._slices)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def texts(self, prompts: Sequence[Prompt], advance: Callable[[int, int], None]) -> dict[str, Array]:
        """Run prompts to their end and give a shard's arrays.

        `advance(rows, texts)` is told after each batch how many rows were computed in it, and texts ended.
        Raises ModelError if the model computes what is not a number.
        """
        waiting = list(reversed(prompts))
        slots: list[_Running | None] = [None] * self.options.n_parallel
        done: dict[int, _Running] = {}
        while waiting or any(slots):
            for i, text in enumerate(slots):
                if text is None and waiting:
                    slots[i] = self._begin(waiting.pop())
            batch = list(_cut(slots))
            self._run(slots, batch)
            n_before = len(done)
            for i, text in enumerate(slots):
                if text is not None and text.finished:
                    done[text.prompt.number] = text
                    slots[i] = None
                    for piece in self._slices:
                        piece.remove(0, i)
            advance(sum(count for _, count in batch), len(done) - n_before)
        return _arrays([done[p.number] for p in prompts], self.options)

    def _begin(self, prompt: Prompt) -> _Running:
        if not prompt.tokens:
            raise PromptError(f"prompt {prompt.number} is empty", "give some text")
        random = np.random.default_rng([self.options.seed, prompt.number])
        return _Running(prompt, random, list(prompt.tokens), states=[[] for _ in self.options.layers])

    def _run(self, slots: Sequence[_Running | None], batch: Sequence[tuple[int, int]]) -> None:
        """One batch, (slot, rows) each, through all slices; the texts grow by what was chosen."""
        tokens: list[int] = []
        positions: list[int] = []
        seq_ids: list[int] = []
        want: list[int] = []
        asked: list[_Running] = []
        for slot, count in batch:
            text = _running(slots[slot])
            for position in range(text.n_done, text.n_done + count):
                if _is_target(text, position):
                    want.append(len(tokens))
                    asked.append(text)
                    text.rows.append(position)
                tokens.append(text.tokens[position])
                positions.append(position)
                seq_ids.append(slot)
        states: Floats | None = None
        for level, piece in enumerate(self._slices):
            outputs = want if piece.is_last else ()
            if states is None:
                piece.decode_tokens(tokens, 0, outputs, seq_ids, positions)
            else:
                piece.decode_states(states, 0, outputs, seq_ids, positions)
            if piece.is_last:
                break
            states = np.array(piece.hidden(len(tokens)))
            start = 0
            for slot, count in batch:
                _running(slots[slot]).states[level].append(_halves(states[start : start + count]))
                start += count
        for slot, count in batch:
            _running(slots[slot]).n_done += count
        if want:
            self._choose(asked, want)
        for slot, _ in batch:
            text = _running(slots[slot])
            text.finished = text.n_done == len(text.tokens)

    def _choose(self, asked: Sequence[_Running], want: Sequence[int]) -> None:
        """Keep the targets of `asked` texts; those that are being answered get their next token."""
        last = self._slices[-1]
        hidden = last.hidden(len(want))
        if not np.isfinite(hidden).all():
            raise ModelError("the model computes hidden states that are no numbers", "its file may be damaged")
        final = _halves(hidden)
        for i, (text, row) in enumerate(zip(asked, want, strict=True)):
            ids, logp = top_of(last.logits(row), max(self.options.top_k, _SAMPLED_FROM))
            text.final.append(final[i])
            text.top_ids.append(ids[: self.options.top_k])
            text.top_logp.append(logp[: self.options.top_k].astype(np.float16))
            n_answer = len(text.tokens) - len(text.prompt.tokens)
            if text.prompt.answered or text.rows[-1] + 1 < len(text.tokens):
                continue
            token = _sample(ids, logp, text.prompt.temperature, text.random)
            # the token that ends a turn is a target, but never a row
            if not self._model.is_end(token) and n_answer < self.options.max_tokens:
                text.tokens.append(token)


def _running(text: _Running | None) -> _Running:
    assert text is not None
    return text


def _is_target(text: _Running, position: int) -> bool:
    if text.prompt.answered:
        return position + 1 < len(text.tokens)
    return position + 1 >= len(text.prompt.tokens)


def _cut(slots: Sequence[_Running | None]) -> Iterator[tuple[int, int]]:
    """(slot, rows) of the next batch: the newest token of each answer, then as much of the prompts as fits."""
    room = N_BATCH
    by_need = sorted((len(text.tokens) - text.n_done, i) for i, text in enumerate(slots) if text is not None)
    chosen = []
    for need, slot in by_need:
        count = min(need, room)
        if count:
            chosen.append((slot, count))
            room -= count
    yield from sorted(chosen)


def top_of(logits: Floats, k: int) -> tuple[NDArray[np.int32], Floats]:
    """Ids (k,) and log-probabilities (k,) of the likeliest tokens of logits (n_vocab,), likeliest first."""
    k = min(k, len(logits))
    ids = np.argpartition(logits, -k)[-k:]
    ids = ids[np.lexsort((ids, -logits[ids]))]
    best = logits[ids[0]]
    total = np.log(np.exp(np.maximum(logits - best, np.float32(-80))).sum(dtype=np.float64))
    return ids.astype(np.int32), (logits[ids] - best - np.float32(total)).astype(np.float32)


def _sample(ids: NDArray[np.int32], logp: Floats, temperature: float, random: np.random.Generator) -> int:
    if temperature <= 0:
        return int(ids[0])
    weights = np.exp((logp[:_SAMPLED_FROM] - logp[0]).astype(np.float64) / temperature)
    return int(ids[random.choice(len(weights), p=weights / weights.sum())])


def _halves(states: Floats) -> NDArray[np.float16]:
    return np.clip(states, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


def _arrays(texts: Sequence[_Running], options: CollectOptions) -> dict[str, Array]:
    """A shard's arrays. Takes the texts' states away as it goes, so that no more than one layer is held twice."""
    starts = np.cumsum([0, *(text.n_done for text in texts)])
    n_embd, k = texts[0].states[0][0].shape[1], options.top_k
    arrays: dict[str, Array] = {
        "tokens": np.concatenate([np.asarray(text.tokens[: text.n_done], np.int32) for text in texts]),
        "offsets": starts.astype(np.int64),
        "prompts": np.asarray([text.prompt.number for text in texts], np.int32),
        "rows": np.concatenate([np.asarray(t.rows, np.int64) + s for t, s in zip(texts, starts, strict=False)]),
        "final": _stacked((row for text in texts for row in text.final), n_embd, np.float16),
        "top_ids": _stacked((row for text in texts for row in text.top_ids), k, np.int32),
        "top_logp": _stacked((row for text in texts for row in text.top_logp), k, np.float16),
    }
    for level, layer in enumerate(options.layers):
        arrays[f"layer_{layer}"] = np.concatenate([part for text in texts for part in text.states[level]])
        for text in texts:
            text.states[level].clear()
    return arrays


def _stacked(rows: Iterable[Array], width: int, kind: type) -> Array:
    """Rows (n, width); a vocabulary may be narrower than `width`."""
    found = list(rows)
    return np.stack(found).astype(kind, copy=False) if found else np.empty((0, width), kind)


def row_bytes(options: CollectOptions, n_embd: int) -> tuple[int, int]:
    """Bytes on disk of a row, and of a target besides."""
    return 2 * n_embd * len(options.layers) + 4, 2 * n_embd + 6 * options.top_k + 8


def most_bytes(prompts: Sequence[Prompt], options: CollectOptions, n_embd: int) -> int:
    """Bytes on disk that collecting `prompts` takes at most, answers as long as they may be."""
    per_row, per_target = row_bytes(options, n_embd)
    n_rows = sum(len(p.tokens) + (0 if p.answered else options.max_tokens) for p in prompts)
    n_targets = sum(len(p.tokens) if p.answered else options.max_tokens + 1 for p in prompts)
    return n_rows * per_row + n_targets * per_target


def collect(
    model: Model,
    prompts: Sequence[Prompt],
    options: CollectOptions,
    corpus: Corpus,
    progress: Callable[[int, int], None],
    shards: Sequence[int] | None = None,
) -> list[Shard]:
    """The shards of `prompts`, those that the corpus does not hold yet collected now; `shards` restricts the work.

    A shard that is damaged, or holds other prompts, is collected again. `progress(rows done, rows in all)` is called
    after each batch; how many there will be in all is estimated by the answers so far. Interrupted, it loses the shard
    it is at. Raises EdgeError if the disk is full or will be, PromptError for an empty prompt, ModelError if the model
    computes what is not a number.
    """
    if [p.number for p in prompts] != list(range(len(prompts))):
        raise ValueError("prompts must be numbered in order")
    wanted = list(range(-(-len(prompts) // SHARD_PROMPTS)) if shards is None else shards)
    found = {index: shard for index in wanted if (shard := _kept(corpus, prompts, index)) is not None}
    missing = [index for index in wanted if index not in found]
    if missing:
        todo = [prompt for index in missing for prompt in part_of(prompts, index)]
        corpus.check_room(most_bytes(todo, options, model.n_embd))
        count = _Count(todo, options, sum(shard.n_rows for shard in found.values()), progress)
        with Collector(model, options, max(len(prompt.tokens) for prompt in prompts)) as collector:
            for index in missing:
                corpus.write(index, collector.texts(part_of(prompts, index), count.advance))
                found[index] = corpus.read(index)
    return [found[index] for index in wanted]


def _kept(corpus: Corpus, prompts: Sequence[Prompt], index: int) -> Shard | None:
    """A sound shard of just these prompts; any other is dropped."""
    for shard in corpus.sound([index]):
        if shard["prompts"].tolist() == [prompt.number for prompt in part_of(prompts, index)]:
            return shard
        corpus.drop(index)
    return None


class _Count:
    """How many rows are computed, and are to be: answers to come are taken to be as long as those before."""

    def __init__(
        self, todo: Sequence[Prompt], options: CollectOptions, n_before: int, progress: Callable[[int, int], None]
    ) -> None:
        self._n_done, self._n_before, self._progress = 0, n_before, progress
        self._n_ended, self._n_texts = 0, len(todo)
        self._most = sum(len(p.tokens) + (0 if p.answered else options.max_tokens) for p in todo)

    def advance(self, n_rows: int, n_ended: int) -> None:
        self._n_done += n_rows
        self._n_ended += n_ended
        expected = self._most
        if self._n_ended >= SHARD_PROMPTS // 2:
            expected = min(expected, round(self._n_done / self._n_ended * self._n_texts))
        self._progress(self._n_before + self._n_done, self._n_before + max(expected, self._n_done))


def part_of(prompts: Sequence[Prompt], index: int) -> Sequence[Prompt]:
    return prompts[index * SHARD_PROMPTS : (index + 1) * SHARD_PROMPTS]
