"""Text in, a stream of chunks out: a model opened in slices, its chat template, and answers.

with Runtime(RunOptions(mode=Mode.VERIFIED)) as runtime:
    for chunk in runtime.stream(runtime.chat_tokens([Message("user", "Hello")]), max_tokens=100):
        print(chunk.text, end="")
    print(runtime.summary)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from .draft import SharedHead
from .engine import Engine
from .errors import ModelError, ModelUnreadableError, PromptError, UnsupportedModelError, UsageError
from .memory import check_need, estimate_need, machine_memory
from .models import DEMO_MODEL, find_model
from .native import ContextOptions, KvType, Model, load, read_header
from .sampling import Sampler
from .slices import close_slices, open_slices
from .summary import Clock, Finish, Summary, copy_stats, number, rate, stats_since
from .templates import ChatTemplate, Message
from .text import Assembler
from .types import EngineSettings, EngineStats, Mode, ModelHeader, SamplingSettings, Step, Thresholds, check_boundaries

DEFAULT_N_CTX = 2048
# plain heads of a stock model are worth little before its last quarter, and only where they are quite sure
_DEFAULT_SHARES = (0.75, 0.9)
DEFAULT_THRESHOLD = 0.3


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything that decides how a model runs."""

    model: str = DEMO_MODEL
    mode: Mode = Mode.FULL
    boundaries: tuple[int, ...] | None = None  # None: none in mode full, else a late split
    thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,)  # nats; one for all boundaries or one for each
    n_ctx: int = 0  # 0: what the model was trained for, at most DEFAULT_N_CTX
    n_batch: int = 128
    n_threads: int = 0  # 0: all physical cores
    kv_type: KvType = KvType.F16
    flash_attention: bool | None = None  # None: llama.cpp decides
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    cap: int = 8
    audit_rate: float = 0.1


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
    """A model opened in slices, and one conversation's KV cache. Not thread-safe."""

    def __init__(self, options: RunOptions, note: Callable[[str], None] = lambda _text: None) -> None:
        """Check, load and open; `note` gets warnings, before the slow part begins.

        Raises a ModelError, MemoryLimitError, UsageError or LibraryError, each before anything large is allocated.
        """
        self.header = checked_header(options.model)
        options = _resolve(options, self.header, note)
        n_slices = len(options.boundaries or ()) + 1
        check_memory(self.header, _context_options(options), n_slices, _n_outputs(options), note)
        self.options = options
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(self.header.path, header=self.header))
            if not self.model.has_tokenizer:
                raise UnsupportedModelError(f"{self.header.path} has no tokenizer, so it cannot read text")
            template = ChatTemplate.of(self.model)
            self._open()
            opened.pop_all()
        self.template = template
        self._clock = Clock(time.perf_counter())
        self._before = EngineStats()
        self._finish = Finish.INTERRUPTED
        self._n_prompt = self._n_reused = 0

    def _open(self) -> None:
        options = self.options
        boundaries = options.boundaries or ()
        self._slices = open_slices(self.model, boundaries, _context_options(options), n_outputs_max=_n_outputs(options))
        self._sampler = Sampler(options.sampling, self.model.n_vocab)
        thresholds = _thresholds(options)
        settings = EngineSettings(options.mode, options.cap, options.audit_rate, audit_seed=options.sampling.seed)
        self.engine = Engine(
            self._slices,
            self._sampler,
            settings,
            lambda: thresholds,
            None if options.mode is Mode.FULL else SharedHead(),
            n_ctx=options.n_ctx,
        )

    def reopen(self, options: RunOptions) -> None:
        """Go on with other options of the same model; the KV cache starts empty."""
        options = _resolve(options, self.header, lambda _text: None)
        self._close_engine()
        self.options = options
        self._open()

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
        with closing(self.engine.generate(max_tokens)) as steps:
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
        engine = self.engine
        if not tokens:
            raise PromptError("the prompt is empty", "give some text")
        if len(tokens) >= engine.n_ctx:
            raise PromptError(
                f"the prompt is {len(tokens)} tokens long, the context holds {engine.n_ctx} and an answer needs room",
                "shorten the prompt, or give a larger --ctx",
            )
        common = common_prefix(engine.tokens, tokens)
        # the newest token is always run again, for its logits
        self._n_reused = min(common, len(tokens) - 1, engine.n_computed)
        self._n_prompt = len(tokens)
        self._finish = Finish.INTERRUPTED
        self._before = copy_stats(engine.stats)
        self._clock = Clock(time.perf_counter())
        engine.rollback(common)
        engine.extend(tokens[common:])

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
        stats, clock, options = stats_since(self._before, self.engine.stats), self._clock, self.options
        return Summary(
            mode=options.mode.value,
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
            audited=stats.audited,
            disagreed=stats.disagreed,
            disagreement=number(stats.disagreement),
            seed=options.sampling.seed,
        )

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _close_engine(self) -> None:
        self._sampler.close()
        close_slices(self._slices)

    def close(self) -> None:
        self._close_engine()
        self.model.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts share from their beginning."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def default_boundaries(mode: Mode, n_layer: int) -> tuple[int, ...]:
    """No boundary in mode full; else two late ones, fewer in a model of very few layers."""
    if mode is Mode.FULL:
        return ()
    return tuple(sorted({round(share * n_layer) for share in _DEFAULT_SHARES} & set(range(1, n_layer))))


def checked_header(model: str) -> ModelHeader:
    """Header of a model by name or path. Raises a ModelError for what could not be run, before it is loaded."""
    header = read_header(str(find_model(model)))
    supported = load().supported_architectures
    if header.architecture not in supported:
        raise UnsupportedModelError(
            f"{header.path} is of architecture '{header.architecture}', which cannot be run in slices",
            f"supported: {', '.join(supported)}",
        )
    if not header.n_layer or not header.n_embd:
        raise ModelUnreadableError(
            f"{header.path} is damaged: its header gives {header.n_layer} layers of width {header.n_embd}",
            "convert or download the model again",
        )
    return header


def check_memory(
    header: ModelHeader, options: ContextOptions, n_slices: int, n_outputs: int, note: Callable[[str], None]
) -> None:
    """Note a tight fit. Raises MemoryLimitError for a model that cannot fit."""
    warning = check_need(estimate_need(header, options, n_slices, n_outputs), machine_memory())
    if warning:
        note(warning)


def resolved_n_ctx(n_ctx: int, header: ModelHeader, note: Callable[[str], None]) -> int:
    """The context asked for, else what the model was trained for, at most DEFAULT_N_CTX."""
    trained = header.n_ctx_train or DEFAULT_N_CTX
    if n_ctx > trained:
        note(f"a context of {n_ctx} tokens is more than the {trained} this model was trained for")
    return n_ctx or min(DEFAULT_N_CTX, trained)


def _resolve(options: RunOptions, header: ModelHeader, note: Callable[[str], None]) -> RunOptions:
    """Fill in what depends on the model, and check all that can be checked without loading it."""
    boundaries = options.boundaries
    if boundaries is None:
        boundaries = default_boundaries(options.mode, header.n_layer)
    check_boundaries(boundaries, header.n_layer)
    options = dataclasses.replace(options, boundaries=boundaries, n_ctx=resolved_n_ctx(options.n_ctx, header, note))
    _thresholds(options)
    if options.mode is not Mode.FULL and not boundaries:
        raise UsageError(f"mode {options.mode.value} needs a boundary to leave at", "give --boundaries")
    return options


def _thresholds(options: RunOptions) -> Thresholds:
    """One threshold per boundary. Raises UsageError if as many were not given."""
    n_boundaries, given = len(options.boundaries or ()), options.thresholds
    if len(given) == 1:
        return Thresholds(given * n_boundaries)
    if len(given) != n_boundaries:
        raise UsageError(
            f"{len(given)} thresholds were given for {n_boundaries} boundaries",
            "give one --threshold for all, or one for each boundary",
        )
    return Thresholds(given)


def _context_options(options: RunOptions) -> ContextOptions:
    return ContextOptions(
        n_ctx=options.n_ctx,
        n_batch=options.n_batch,
        n_threads=options.n_threads,
        flash_attention=options.flash_attention,
        kv_type=options.kv_type,
    )


def _n_outputs(options: RunOptions) -> int:
    """Rows of logits the last slice gives: verifying and auditing need one per waiting token and one more."""
    return 1 if options.mode is Mode.FULL else options.cap + 1
