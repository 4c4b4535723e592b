"""Text in, a stream of chunks out: a model opened in slices, its chat template, and answers.

with Runtime(RunOptions(mode=Mode.VERIFIED)) as runtime:
    for chunk in runtime.stream(runtime.chat_tokens([Message("user", "Hello")]), max_tokens=100):
        print(chunk.text, end="")
    print(runtime.summary)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from .energy.request import Meter, RequestEnergy, Work, weights_gb
from .engine import Engine
from .errors import EdgeError, ModelError, UnsupportedModelError
from .native import Model
from .opening import Measured
from .playing import Player, files_for
from .resolve import (
    RunOptions,
    check_memory,
    checked_header,
    context_options,
    load_pack,
    load_probe,
    n_outputs,
    policies_of,
    resolved_draft,
    resolved_n_ctx,
)
from .sampling import Sampler
from .summary import Clock, Finish, Summary, copy_stats, energy_fields, number, rate, stats_since
from .templates import ChatTemplate, Message
from .text import Assembler
from .types import EngineStats, Mode, Step, Thresholds

__all__ = ["Chunk", "Message", "RunOptions", "Runtime"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token and the text that became certain with it: "" inside a character or a stop string, and at the end."""

    text: str
    step: Step
    finish: Finish | None = None  # set on the last chunk

    @property
    def finish_reason(self) -> str | None:
        return self.finish.reason if self.finish else None


class Runtime:
    """A model opened in slices, and one conversation's KV cache. Not thread-safe.

    `asked` are the options it was made with; `player` writes, in mode auto with one policy or another.
    """

    def __init__(
        self,
        options: RunOptions,
        note: Callable[[str], None] = lambda _text: None,
        say: Callable[[str], None] = lambda _text: None,
        meter: Meter | None = None,
    ) -> None:
        """Check, load and open; `note` gets warnings, before the slow part begins, `say` what takes a while.

        `meter` is where the energy of answers is read; without it, none is known.
        Raises a ModelError, PackError, MemoryLimitError, UsageError or LibraryError, each before anything large is
        allocated.
        """
        self.header = checked_header(options.model)
        self.asked, self._note, self._say, self._meter = options, note, say, meter
        resolved_draft(options)  # refuses what excludes a pack, before there is a word about the pack
        self._pack = load_pack(options.pack, self.header)
        self._probes = load_probe(options, self.header)
        self._measured: Measured = {}
        n_ctx = resolved_n_ctx(options.n_ctx, self.header, note)
        policies = policies_of(options, self.header, n_ctx, self._pack, note)
        files = files_for(policies, self._pack, self.header.path)
        for policy in policies.values():
            n_slices = len(policy.boundaries or ()) + 1
            check_memory(self.header, context_options(policy), n_slices, n_outputs(policy), note)
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(self.header.path, header=self.header, kernels=options.kernels))
            if not self.model.has_tokenizer:
                raise UnsupportedModelError(f"{self.header.path} has no tokenizer, so it cannot read text")
            template = ChatTemplate.of(self.model)
            self._start(policies, files)
            opened.pop_all()
        self.template = template

    def _start(self, policies: Mapping[str, RunOptions], files: Mapping[int, Path]) -> None:
        """Open what may write, with a sampler of its own."""
        asked, model = self.asked, self.model
        with ExitStack() as opened:
            sampler = opened.enter_context(closing(Sampler(asked.sampling, model.n_vocab)))
            auto = asked.mode is Mode.AUTO
            self.player = Player(
                model, policies, self._pack, files, sampler, self._measured, self._say, auto=auto, probes=self._probes
            )
            opened.callback(self.player.close)
            self._opened = opened.pop_all()
        self._files = files
        self._start_counts(0)

    @property
    def engine(self) -> Engine:
        """What runs the policy that writes."""
        return self.player.engine

    @property
    def options(self) -> RunOptions:
        """Those of the policy that writes."""
        return self.player.options

    @property
    def thresholds(self) -> Thresholds:
        """As `Player.thresholds`."""
        return self.player.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Thresholds) -> None:
        self.player.thresholds = thresholds

    def set_threads(self, n_threads: int) -> None:
        """As `Player.set_threads`."""
        self.player.set_threads(n_threads)

    def reopen(self, options: RunOptions) -> None:
        """Go on with other options of the same model and pack; the KV cache starts empty.

        `asked` with a change or two keeps what the options before left open. Raises as the constructor does; what can
        be checked before anything is closed is.
        """
        n_ctx = resolved_n_ctx(options.n_ctx, self.header, lambda _text: None)
        policies: Mapping[str, RunOptions] = policies_of(options, self.header, n_ctx, self._pack, self._note)
        files: Mapping[int, Path] = files_for(policies, self._pack, self.header.path)
        before = self.asked, self.player.policies, self._files
        self._opened.close()
        self.asked = options
        try:
            self._start(policies, files)
        except EdgeError:
            self.asked, policies, files = before
            self._start(policies, files)
            raise

    # ── text → tokens ───────────────────────────────────────────────────────────────────────────────────────────────

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as tokens, up to where the assistant begins. Raises ModelError without a usable template."""
        if self.template is None:
            raise ModelError(f"{self.header.path} has no chat template", "use `edge-run generate --raw`")
        text = self.template.render(messages)
        bos = self.model.special_text("bos")
        # the tokenizer adds its own
        return self.text_tokens(text.removeprefix(bos) if self.model.adds_bos else text)

    def text_tokens(self, text: str) -> list[int]:
        """A text as tokens; names of special tokens in it stand for them."""
        return self.model.tokenize(text, add_special=True, parse_special=True)

    # ── tokens → text ───────────────────────────────────────────────────────────────────────────────────────────────

    def stream(self, tokens: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> Generator[Chunk, None, None]:
        """Answer a prompt, one chunk per token, the last with `finish`. What the KV cache holds of it is not run again.

        Stopping early, by `close` or an exception, leaves a runtime that can go on. Raises PromptError if the prompt
        is empty or leaves no room in the context; DecodeError if llama.cpp fails.
        """
        self._begin(tokens)
        assembler = Assembler[Step](stop)
        with closing(self.player.steps(max_tokens)) as steps:
            for step in steps:
                self._clock.tick(time.perf_counter())
                ends = self.model.is_end(step.token)
                ready = assembler.push(step, b"" if ends else self.model.piece(step.token))
                finish = self._finish_of(step, ends, assembler.stopped, max_tokens)
                if finish is None:
                    yield from (Chunk(text, step) for step, text in ready)
                    continue
                *others, (step, text) = ready + assembler.rest()
                yield from (Chunk(text, step) for step, text in others)
                self._finish = finish
                yield Chunk(text, step, finish)
                return

    def _begin(self, tokens: Sequence[int]) -> None:
        """Keep what the KV cache shares with the prompt, add the rest, start the counts."""
        self._start_counts(len(tokens))
        self._n_reused = self.player.begin(tokens)

    def _start_counts(self, n_prompt: int) -> None:
        """Begin the account of an answer, or of none."""
        self._n_prompt, self._n_reused, self._finish = n_prompt, 0, Finish.INTERRUPTED
        self.player.start_counts()
        self._before = copy_stats(self.player.stats)
        self._clock: Clock = Clock(time.perf_counter())

    def _finish_of(self, step: Step, ends: bool, stopped: bool, max_tokens: int) -> Finish | None:
        if ends:
            return Finish.END_OF_TURN
        if stopped:
            return Finish.STOP_STRING
        if step.position + 1 >= self.engine.n_ctx:
            return Finish.CONTEXT_FULL
        return Finish.MAX_TOKENS if self._clock.tokens >= max_tokens else None

    @property
    def summary(self) -> Summary:
        """Of the latest answer, or of as much of it as there is; `interrupted` until it has ended by itself."""
        stats, clock, options = stats_since(self._before, self.player.stats), self._clock, self.options
        return Summary(
            mode=self.asked.mode.value,
            played=options.mode.value,
            policies=dict(self.player.written) if self.asked.mode is Mode.AUTO else None,
            left=self.player.left,
            boundaries=options.boundaries or (),
            finish_reason=self._finish.reason,
            finish=self._finish.value,
            prompt_tokens=self._n_prompt,
            reused_tokens=self._n_reused,
            generated_tokens=clock.tokens,
            time_to_first_token_ms=None if clock.first_token_s is None else clock.first_token_s * 1e3,
            prefill_tokens_per_s=rate(self._n_prompt - self._n_reused, clock.first_token_s),
            decode_tokens_per_s=rate(clock.tokens - 1, clock.decode_s),
            mean_depth=number(stats.mean_depth),
            n_layer=self.model.n_layer,
            exits=stats.exits,
            drafted=stats.drafted,
            accepted=stats.accepted,
            acceptance=number(stats.acceptance),
            relaxed=stats.relaxed,
            changed=number(stats.changed),
            audited=stats.audited,
            disagreed=stats.disagreed,
            disagreement=number(stats.disagreement),
            seed=options.sampling.seed,
            pack=self._pack.name if self._pack else None,
            kernels=self.model.kernels,
            draft=options.draft,
            theta=options.theta if options.mode is Mode.MARGIN else None,
            head=None if options.mode is Mode.FULL else options.head,
            signal=None if options.mode is Mode.FULL else options.signal,
            prompt_uncertainty=self.player.prompt_uncertainty,
            **energy_fields(self._energy(stats)),
        )

    def _energy(self, stats: EngineStats) -> RequestEnergy | None:
        """What the answer that `stats` count has used so far."""
        clock, boundaries = self._clock, self.options.boundaries
        if self._meter is None or clock.first is None or clock.latest is None:
            return None
        n_new, n_decoded = self._n_prompt - self._n_reused, clock.tokens - 1
        n_prefill = min(stats.settles, math.ceil(n_new / self.options.n_batch))
        share = boundaries[0] / self.model.n_layer if boundaries else 0.0
        size = self.header.file_bytes
        return self._meter.account(
            Work(
                start_s=clock.start,
                first_s=clock.first,
                end_s=clock.latest,
                decoded=n_decoded,
                prefill_gb=weights_gb(size, n_prefill, n_prefill),
                decode_gb=weights_gb(size, n_decoded, stats.settles - n_prefill, share),
            )
        )

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        self._opened.close()
        self.model.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
