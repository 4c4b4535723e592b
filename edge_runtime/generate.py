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
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

from .auto import Chooser, Round, rounds
from .batch_costs import BatchCosts, CostKey, LiveCosts
from .energy.request import Meter, RequestEnergy, Work, weights_gb
from .engine import Engine
from .errors import EdgeError, ModelError, PromptError, UnsupportedModelError
from .exits.costs import Costs
from .exits.forecast import kept_part_costs, predicted_time
from .exits.settings import DEFAULT_DISAGREEMENT, certified_rung
from .exits.source import PackHeads
from .native import Model
from .opening import batch_costs, draft_source, head_files
from .prefix import common_prefix
from .resolve import (
    POLICIES,
    RunOptions,
    check_memory,
    checked_header,
    context_options,
    engine_settings,
    load_pack,
    n_outputs,
    policies_of,
    resolved_draft,
    resolved_n_ctx,
    thresholds_of,
)
from .sampling import Sampler
from .slices import close_slices, default_threads, open_slices
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

    `asked` are the options it was made with, `options` those of the policy that writes: in mode auto, these change.
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
        self._measured: dict[tuple[CostKey, tuple[int, ...]], BatchCosts] = {}
        n_ctx = resolved_n_ctx(options.n_ctx, self.header, note)
        policies = policies_of(options, self.header, n_ctx, self._pack, note)
        self._head_files = self._split_heads(policies)
        for policy in policies.values():
            n_slices = len(policy.boundaries or ()) + 1
            check_memory(self.header, context_options(policy), n_slices, n_outputs(policy), note)
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(self.header.path, header=self.header, kernels=options.kernels))
            if not self.model.has_tokenizer:
                raise UnsupportedModelError(f"{self.header.path} has no tokenizer, so it cannot read text")
            template = ChatTemplate.of(self.model)
            self._start(policies)
            opened.pop_all()
        self.template = template

    def _split_heads(self, policies: Mapping[str, RunOptions]) -> dict[int, Path]:
        """Files of a pack's heads by layer, if a policy needs them."""
        if self._pack is None or not any(p.mode is not Mode.FULL and p.head == "pack" for p in policies.values()):
            return {}
        return head_files(self._pack, self.header.path)

    def _start(self, policies: dict[str, RunOptions]) -> None:
        """Open the first of the policies, and see which of the others may take its place."""
        self._policies, self._chooser = policies, None
        self._written: Counter[str] = Counter()  # tokens of the latest answer, by policy
        first, *others = policies
        with ExitStack() as opened:
            options = policies[first]
            self._sampler = opened.enter_context(closing(Sampler(options.sampling, self.model.n_vocab)))
            self._open(options)
            opened.callback(self._close_slices)
            # without arithmetic that is the same in every batch, drafts could change a text at a near-tie
            names = [name for name in others if self.options.mode is Mode.VERIFIED or policies[name].mode is Mode.EXIT]
            if names:
                self._chooser = self._choose_among(first, names)
            self._playing = first
            self._opened = opened.pop_all()
        self._start_counts(0)

    def _choose_among(self, first: str, names: Sequence[str]) -> Chooser:
        """A chooser that knows what policies in slices are thought to take, by the measured times of their parts."""
        assert self._pack is not None
        layers = self._policies[names[0]].boundaries or ()
        n_threads = self.options.n_threads or default_threads()
        heads = [self._head_files[layer] for layer in layers] if self._head_files else None
        cost_key = CostKey.of(self.model, context_options(self.options))
        key = {**asdict(cost_key), "pack": self._pack.digest, "layers": layers}
        costs = kept_part_costs(key, self.model, layers, heads, n_threads, self._say)
        self._refill = costs.full[-1] / len(costs.full) / costs.full[0]
        predicted = {name: self._predicted(self._policies[name], costs) for name in names}
        self._say(
            "auto: thought to take, in times of full depth: "
            + ", ".join(f"{POLICIES[name]} {value:.2f}" for name, value in predicted.items())
        )
        return Chooser({first: 1.0, **predicted}, costs.full[0] / 1e3)

    def _predicted(self, policy: RunOptions, costs: Costs) -> float:
        pack, cap = self._pack, policy.cap or 1
        assert pack is not None
        if policy.mode is Mode.EXIT:
            bound = DEFAULT_DISAGREEMENT if policy.max_disagreement is None else policy.max_disagreement
            rung = certified_rung(pack, policy.signal or pack.default_signal, bound)
            return predicted_time(pack, policy.mode, costs, rung, cap)
        return predicted_time(pack, policy.mode, costs, cap=cap)

    def _open(self, options: RunOptions, stats: EngineStats | None = None) -> None:
        """Open slices and the engine for one policy, which counts on in `stats`. What was open must be closed."""
        started, measured_s = time.perf_counter(), 0.0
        boundaries, self._thresholds = options.boundaries or (), thresholds_of(options)
        with ExitStack() as opened:
            slices = open_slices(self.model, boundaries, context_options(options), n_outputs_max=n_outputs(options))
            opened.callback(close_slices, slices)
            self._live: LiveCosts | None = None
            if options.mode is not Mode.FULL and options.draft == "ngram":
                before = time.perf_counter()
                costs = batch_costs(self.model, options, slices, self._measured, self._say)
                measured_s = time.perf_counter() - before
                if self.asked.mode is Mode.AUTO and not costs.invariant:
                    options = dataclasses.replace(options, mode=Mode.FULL, draft=None)
                elif self.asked.mode is Mode.AUTO:
                    self._live = LiveCosts(costs.up_to(n_outputs(options)), costs.one_s)
                source = draft_source(self.model, options, None, {}, self._live or costs.up_to(n_outputs(options)))
            else:
                source = draft_source(self.model, options, self._pack, self._head_files)
            self._heads = source if isinstance(source, PackHeads) else None
            if self._heads is not None:
                opened.callback(self._heads.close)
            closed = Thresholds((0.0,) * len(boundaries))

            def now() -> Thresholds:
                return closed if self._chooser is not None and self._chooser.probing else self._thresholds

            settings = engine_settings(options)
            engine = Engine(slices, self._sampler, settings, now, source, n_ctx=options.n_ctx)
            engine.stats = stats or engine.stats
            self._engine = engine
            self._slices_opened = opened.pop_all()
        self.options = options
        self._open_s = time.perf_counter() - started - measured_s

    @property
    def engine(self) -> Engine:
        """What runs the policy that writes; opened here if a change of policy was interrupted."""
        if not self._playing and self._chooser is not None:
            self._play(self._chooser.current)
        return self._engine

    @property
    def thresholds(self) -> Thresholds:
        """Below which uncertainty the next token may exit, by boundary; may be changed between tokens.

        Raises UsageError, when set, if there are not as many as boundaries, or one for all.
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds_of(dataclasses.replace(self.options, thresholds=thresholds.exit_below))

    def reopen(self, options: RunOptions) -> None:
        """Go on with other options of the same model and pack; the KV cache starts empty.

        `asked` with a change or two keeps what the options before left open. Raises as the constructor does; what can
        be checked before anything is closed is.
        """
        n_ctx = resolved_n_ctx(options.n_ctx, self.header, lambda _text: None)
        policies = policies_of(options, self.header, n_ctx, self._pack, self._note)
        before = self.asked, self._head_files, self._policies
        self._head_files = self._split_heads(policies)
        self._opened.close()
        self.asked = options
        try:
            self._start(policies)
        except EdgeError:
            self.asked, self._head_files, policies = before
            self._start(policies)
            raise

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from the next token on, heads among it; a change of policy undoes it."""
        for piece in self.engine.slices:
            piece.set_threads(n_threads)
        if self._heads is not None:
            self._heads.set_threads(n_threads)

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
        with closing(self._steps(max_tokens)) as steps:
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
        engine = self.engine
        if not tokens:
            raise PromptError("the prompt is empty", "give some text")
        if len(tokens) >= engine.n_ctx:
            raise PromptError(
                f"the prompt is {len(tokens)} tokens long, the context holds {engine.n_ctx} and an answer needs room",
                "shorten the prompt, or give a larger --ctx",
            )
        common = common_prefix(engine.tokens, tokens)
        if self._chooser is not None and self._playing != self._chooser.begin(self._change_cost(common)):
            self._play(self._chooser.current)
            engine, common = self.engine, 0
        # the newest token is always run again, for its logits
        self._n_reused = min(common, len(tokens) - 1, engine.n_computed)
        engine.rollback(common)
        engine.extend(tokens[common:])

    def _start_counts(self, n_prompt: int) -> None:
        """Begin the account of an answer, or of none."""
        self._n_prompt, self._n_reused, self._finish = n_prompt, 0, Finish.INTERRUPTED
        self._written.clear()
        self._left: str | None = None
        self._before = copy_stats(self._engine.stats)
        self._clock: Clock = Clock(time.perf_counter())

    # ── mode auto ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _steps(self, max_tokens: int) -> Generator[Step, None, None]:
        """The steps of whichever engine is to write. What rounds take is told to those who decide by it."""
        left = max_tokens
        while left > 0:
            with closing(self.engine.generate(left)) as steps:
                for step, round_ in rounds(steps, self.engine.stats):
                    left -= 1
                    if round_ is not None:
                        self._count(round_)
                    self._written[self._playing] += 1
                    yield step
                    if round_ is not None and self._chooser is not None and self._chooser.losing:
                        break
                else:
                    return
            self._fall_back()

    def _count(self, done: Round) -> None:
        if self._live is not None and 1 <= done.rows <= len(self._live):
            self._live.observe(done.rows, done.seconds)
        if self._chooser is not None:
            asked = self.options.boundaries and not self._chooser.probing
            self._chooser.observe(done.tokens, done.seconds, alone=done.rows == 1 and not asked)

    def _change_cost(self, n_lost: int) -> float:
        """Token times that another policy costs, if `n_lost` tokens of the text must be computed again for it."""
        one_s = self._chooser.one_s if self._chooser else 0.0
        return (self._open_s / one_s if one_s else 0.0) + self._refill * n_lost

    def _fall_back(self) -> None:
        """Leave slices for the whole model in the middle of an answer: the text is computed again, as a prompt is."""
        assert self._chooser is not None
        engine, name = self.engine, self._playing
        taken, base = self._chooser.latest, self._chooser.estimate(next(iter(self._policies)))
        self._left = f"{POLICIES[name]} took {taken:.2f} times plain full depth's time, without them it is {base:.2f}"
        self._play(self._chooser.fall_back(self._change_cost(len(engine.tokens))))
        self.engine.adopt(engine)

    def _play(self, name: str) -> None:
        """Open another policy, with an empty KV cache; the sampler's random numbers go on."""
        self._playing = ""  # interrupted from here on, nothing is open
        self._close_slices()
        self._sampler.rewind(())
        self._open(self._policies[name], self._engine.stats)
        self._playing = name

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
        stats, clock, options = stats_since(self._before, self._engine.stats), self._clock, self.options
        return Summary(
            mode=self.asked.mode.value,
            played=options.mode.value,
            policies=dict(self._written) if self.asked.mode is Mode.AUTO else None,
            left=self._left,
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

    def _close_slices(self) -> None:
        self._slices_opened.close()

    def close(self) -> None:
        self._opened.close()
        self.model.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
