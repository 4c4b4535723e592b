"""Text in, a stream of chunks out: a model opened in slices, its chat template, and answers.

with Runtime(RunOptions(mode=Mode.VERIFIED)) as runtime:
    for chunk in runtime.stream(runtime.chat_tokens([Message("user", "Hello")]), max_tokens=100):
        print(chunk.text, end="")
    print(runtime.summary)
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from .batch_costs import BatchCosts, CostKey, kept_batch_costs, machine_name, measurable_sizes, measure_batch_costs
from .cache import model_hash
from .draft import DraftSource, SharedHead
from .energy.request import Meter, RequestEnergy, Work, weights_gb
from .engine import Engine
from .errors import ModelError, ModelUnreadableError, PromptError, UnsupportedModelError, UsageError
from .exits.pack import ExitPack
from .exits.packs import find_exit_pack
from .exits.settings import exit_settings
from .exits.source import PackHeads
from .exits.split import split
from .identity import identify
from .memory import check_need, estimate_need, machine_memory
from .models import DEMO_MODEL, find_model
from .native import ContextOptions, KvType, Model, library_hash, load, read_header
from .ngram import NGrams
from .sampling import Sampler
from .slices import Slice, close_slices, default_threads, open_slices
from .summary import Clock, Finish, Summary, copy_stats, energy_fields, number, rate, stats_since
from .templates import ChatTemplate, Message
from .text import Assembler
from .types import (
    DEFAULT_THETA,
    SIGNALS,
    EngineSettings,
    EngineStats,
    Mode,
    ModelHeader,
    SamplingSettings,
    Step,
    Thresholds,
    check_boundaries,
)

DEFAULT_N_CTX = 2048
# plain heads of a stock model are worth little before its last quarter, and only where they are quite sure
_DEFAULT_SHARES = (0.75, 0.9)
DEFAULT_THRESHOLD = 0.3
DRAFTS = ("ngram", "heads")  # what proposes drafts: the text so far, or heads at boundaries
DEFAULT_CAP = 8
NGRAM_CAP = 15  # these drafts cost nothing to make, and long ones pay where a text is copied
HEADS = ("pack", "shared")  # what guesses at a boundary: the exit pack's heads, or the model's own output head


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything that decides how a model runs."""

    model: str = DEMO_MODEL
    mode: Mode = Mode.FULL
    draft: str | None = None  # one of DRAFTS, where drafts are verified; None: "heads" if anything of them is given
    theta: float = DEFAULT_THETA  # mode margin: a second choice more than this times as likely as the first is accepted
    # None: none in mode full and for n-grams, else the pack's, or a late split
    boundaries: tuple[int, ...] | None = None
    # bounds on the signal's uncertainty, one for all boundaries or one for each; None: the pack's, or DEFAULT_THRESHOLD
    thresholds: tuple[float, ...] | None = None
    pack: str | None = None  # name or path of an exit pack
    head: str | None = None  # one of HEADS; None: "pack" if there is one
    signal: str | None = None  # one of types.SIGNALS; None: the pack's choice, or entropy
    max_disagreement: float | None = None  # mode exit: thresholds certified for this share of exits, by the pack
    n_ctx: int = 0  # 0: what the model was trained for, at most DEFAULT_N_CTX
    n_batch: int = 128
    n_threads: int = 0  # 0: all physical cores
    kv_type: KvType = KvType.F16
    flash_attention: bool | None = None  # None: llama.cpp decides
    kernels: str = "edge"  # what multiplies weights, as `native.resolve_kernels` takes it; for good once loaded
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    cap: int | None = None  # None: NGRAM_CAP or DEFAULT_CAP
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
        _resolved_draft(options)  # refuses what excludes a pack, before there is a word about the pack
        self._pack = _load_pack(options.pack, self.header)
        n_ctx = resolved_n_ctx(options.n_ctx, self.header, note)
        options = _resolve(options, self.header, n_ctx, self._pack, note)
        head_files = self._head_files(options)
        n_slices = len(options.boundaries or ()) + 1
        check_memory(self.header, _context_options(options), n_slices, _n_outputs(options), note)
        self.options = options
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(self.header.path, header=self.header, kernels=options.kernels))
            if not self.model.has_tokenizer:
                raise UnsupportedModelError(f"{self.header.path} has no tokenizer, so it cannot read text")
            template = ChatTemplate.of(self.model)
            self._open(head_files)
            opened.pop_all()
        self.template = template
        self._clock = Clock(time.perf_counter())
        self._before = EngineStats()
        self._finish = Finish.INTERRUPTED
        self._n_prompt = self._n_reused = 0

    def _head_files(self, options: RunOptions) -> tuple[Path, ...]:
        """Files of the heads at the boundaries, if they are a pack's."""
        if options.mode is Mode.FULL or options.head != "pack" or self._pack is None:
            return ()
        files = dict(zip(self._pack.boundaries, split(self._pack, self.header.path), strict=True))
        return tuple(files[layer] for layer in options.boundaries or ())

    def _open(self, head_files: tuple[Path, ...]) -> None:
        options = self.options
        boundaries, thresholds = options.boundaries or (), _thresholds(options)
        settings = _engine_settings(options)
        with ExitStack() as opened:
            slices = open_slices(self.model, boundaries, _context_options(options), n_outputs_max=_n_outputs(options))
            opened.callback(close_slices, slices)
            sampler = opened.enter_context(closing(Sampler(options.sampling, self.model.n_vocab)))
            source = self._source(options, head_files, slices)
            if isinstance(source, PackHeads):
                opened.callback(source.close)
            self.engine = Engine(slices, sampler, settings, lambda: thresholds, source, n_ctx=options.n_ctx)
            self._opened = opened.pop_all()

    def _source(self, options: RunOptions, head_files: tuple[Path, ...], slices: Sequence[Slice]) -> DraftSource | None:
        """What guesses at boundaries, or before the first of `slices`, whose caches are empty and stay so."""
        if options.mode is Mode.FULL:
            return None
        if options.draft == "ngram":
            return NGrams(self._batch_costs(options, slices))
        signal, pack = options.signal or "entropy", self._pack
        if not head_files or pack is None:
            return _shared_head(options, pack)
        layers = options.boundaries or ()
        places = [pack.boundaries.index(layer) for layer in layers]
        return PackHeads(
            head_files,
            layers,
            pack.shortlist,
            pack.cluster_starts,
            [pack.gates[i] for i in places],
            signal,
            [pack.askers[i] for i in places if pack.askers],
            n_embd=self.header.n_embd,
            n_ctx=options.n_ctx,
            n_threads=options.n_threads,
            kernels=self.model.kernels,
        )

    def _batch_costs(self, options: RunOptions, slices: Sequence[Slice]) -> tuple[float, ...]:
        """c(1), c(2), … for the largest batch that verifies drafts; measured, if they never were."""
        n_rows = _n_outputs(options)
        sizes = measurable_sizes(min(n_rows, slices[0].n_batch))
        key = CostKey(
            model_sha256=model_hash(Path(self.header.path)),
            library=library_hash(),
            n_threads=options.n_threads or default_threads(),
            kv_type=options.kv_type.value,
            flash_attention=options.flash_attention,
            kernels=self.model.kernels,
            machine=machine_name(),
        )

        def measure() -> BatchCosts:
            self._say("measure the cost of small batches, once for this model and machine")
            return measure_batch_costs(slices, sizes)

        return kept_batch_costs(key, sizes, measure).up_to(n_rows)

    def reopen(self, options: RunOptions) -> None:
        """Go on with other options of the same model and pack; the KV cache starts empty.

        `asked` with a change or two keeps what the options before left open. Raises as the constructor does; what can
        be checked before anything is closed is.
        """
        n_ctx = resolved_n_ctx(options.n_ctx, self.header, lambda _text: None)
        resolved = _resolve(options, self.header, n_ctx, self._pack, self._note)
        head_files = self._head_files(resolved)
        self._close_engine()
        self.asked, self.options = options, resolved
        self._open(head_files)

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

    def _close_engine(self) -> None:
        self._opened.close()

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


def _load_pack(wanted: str | None, header: ModelHeader) -> ExitPack | None:
    """The pack of a name or path. Raises PackError if it cannot be used with this model and build."""
    if wanted is None:
        return None
    pack = ExitPack.load(find_exit_pack(wanted))
    pack.check_model(identify(Path(header.path)))
    return pack


def _resolve(
    options: RunOptions, header: ModelHeader, n_ctx: int, pack: ExitPack | None, note: Callable[[str], None]
) -> RunOptions:
    """Fill in what depends on the model and the pack, and check all that can be checked without loading them."""
    draft = _resolved_draft(options)
    cap = (NGRAM_CAP if draft == "ngram" else DEFAULT_CAP) if options.cap is None else options.cap
    options = dataclasses.replace(options, n_ctx=n_ctx, draft=draft, cap=cap)
    _engine_settings(options)  # refuses what is out of range
    if draft == "ngram":
        return dataclasses.replace(options, boundaries=(), thresholds=())
    own = pack is not None and not pack.shared
    options = dataclasses.replace(options, head=options.head or ("pack" if own else "shared"))
    if options.boundaries is not None:
        check_boundaries(options.boundaries, header.n_layer)
    _check_choices(options, pack)
    if pack is None or (own and options.head == "shared"):
        options = _resolve_shared(options, header, pack)
    else:
        given = options.boundaries, options.thresholds, options.signal, options.max_disagreement
        found = exit_settings(pack, options.mode, *given)
        if found.rung is not None and found.rung.risk != "exits":
            note(f"no bound on the disagreement of exits is certified; used: {found.rung.sentence()}")
        boundaries = options.boundaries or () if options.mode is Mode.FULL else found.boundaries
        options = dataclasses.replace(options, boundaries=boundaries, signal=found.signal, thresholds=found.thresholds)
    _thresholds(options)
    if options.mode is not Mode.FULL and options.head == "shared":
        _shared_head(options, pack)  # refuses what it cannot give
    if options.mode is not Mode.FULL and not options.boundaries:
        raise UsageError(f"mode {options.mode.value} needs a boundary to leave at", "give --boundaries")
    return options


def _resolved_draft(options: RunOptions) -> str | None:
    """What proposes drafts; None in modes without. Raises UsageError for choices that exclude each other."""
    if not options.mode.verifies:
        return None
    if options.draft not in (None, *DRAFTS):
        raise UsageError(f"there are no drafts '{options.draft}'", f"there are {', '.join(DRAFTS)}")
    of_heads = ("pack", "head", "boundaries", "signal", "thresholds", "max_disagreement")
    given = [name for name in of_heads if getattr(options, name) is not None]
    if options.draft == "ngram" and given:
        name = given[0].replace("thresholds", "threshold").replace("_", "-")
        raise UsageError(f"--{name} means nothing with --draft ngram: it is for heads", "drop one of the two")
    return options.draft or ("heads" if given else "ngram")


def _check_choices(options: RunOptions, pack: ExitPack | None) -> None:
    """Raise UsageError for choices that exclude each other."""
    if options.head not in HEADS:
        raise UsageError(f"there are no heads '{options.head}'", f"there are {', '.join(HEADS)}")
    if options.signal is not None and options.signal not in SIGNALS:
        raise UsageError(f"there is no signal '{options.signal}'", f"there are {', '.join(SIGNALS)}")
    if options.head == "pack" and pack is None:
        raise UsageError("heads of an exit pack were asked for, and no pack was given", "give one with --pack")
    if options.head == "pack" and pack is not None and pack.shared:
        raise UsageError(
            f"the exit pack '{pack.name}' has no heads: it is for the model's own output head", "leave --head out"
        )
    if options.max_disagreement is None:
        return
    if not 0 < options.max_disagreement < 1:
        raise UsageError(f"{options.max_disagreement} is no bound on disagreement", "allowed: above 0, below 1")
    if options.thresholds is not None:
        raise UsageError("--threshold and --max-disagreement were both given", "give one of them")
    if options.head == "shared" and (pack is None or not pack.shared):
        raise UsageError(
            "--max-disagreement needs the heads of an exit pack, or a pack made for the model's own output head",
            "leave --head out, or make one with `edge-run calibrate --head shared`"
            if pack
            else "give a pack with --pack",
        )


def _resolve_shared(options: RunOptions, header: ModelHeader, pack: ExitPack | None) -> RunOptions:
    """What the model's own output head uses; of a pack for other heads only the boundaries."""
    boundaries, signal, thresholds = options.boundaries, options.signal or "entropy", options.thresholds
    if boundaries is None:
        late = default_boundaries(options.mode, header.n_layer)
        boundaries = pack.boundaries if pack and options.mode is not Mode.FULL else late
    if thresholds is None and options.mode is not Mode.FULL and signal != "entropy":
        raise UsageError(f"there is no default threshold for the signal '{signal}'", "give a --threshold")
    return dataclasses.replace(
        options, boundaries=boundaries, signal=signal, thresholds=thresholds or (DEFAULT_THRESHOLD,)
    )


def _shared_head(options: RunOptions, pack: ExitPack | None) -> SharedHead:
    """The model's own output head, with a pack's gates if they are for it. Raises UsageError as SharedHead."""
    gates = dict(zip(pack.boundaries, pack.gates, strict=True)) if pack is not None and pack.shared else {}
    chosen = [gates[layer].probability for layer in options.boundaries or () if layer in gates]
    return SharedHead(options.signal or "entropy", chosen)


def _thresholds(options: RunOptions) -> Thresholds:
    """One threshold per boundary. Raises UsageError if as many were not given."""
    n_boundaries, given = len(options.boundaries or ()), options.thresholds or ()
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


def _engine_settings(options: RunOptions) -> EngineSettings:
    """Raises UsageError for settings out of range."""
    cap = DEFAULT_CAP if options.cap is None else options.cap
    return EngineSettings(options.mode, cap, options.audit_rate, options.sampling.seed, options.theta)


def _n_outputs(options: RunOptions) -> int:
    """Rows of logits the last slice gives: verifying and auditing need one per waiting token and one more."""
    return 1 if options.mode is Mode.FULL else _engine_settings(options).cap + 1
