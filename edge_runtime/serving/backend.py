"""The model behind the service: opened by configuration, with what it knows of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..batch_costs import BatchCosts, CostKey, LiveCosts, kept_batch_costs, measurable_sizes, measure_batch_costs
from ..batching import BatchEngine, Conversations, ExitBatchEngine, OwnSources
from ..config import Config
from ..errors import ModelError, UnsupportedModelError, UsageError
from ..exits.pack import ExitPack
from ..exits.source import BatchHeads
from ..memory import check_need, estimate_need, machine_memory
from ..models import DEMO_MODEL
from ..native import ContextOptions, KvType, Model
from ..opening import head_files, pack_heads
from ..resolve import (
    NGRAM_CAP,
    RunOptions,
    checked_header,
    context_options,
    engine_settings,
    load_pack,
    n_outputs,
    policies_of,
    resolved_n_ctx,
    shared_head,
    thresholds_of,
)
from ..sensors.sampler import Sampler
from ..slices import Slice, default_threads
from ..templates import ChatTemplate, Message
from ..types import Mode, ModelHeader, Thresholds
from .answers import Vocabulary
from .errors import ApiError, bad_request, utf8
from .holding import SteeredEngine
from .worker import Opened

N_BATCH = 128  # prompt tokens computed at once, which is how long answers beside it wait
_MOST_CELLS = 2**31 - 1
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be opened, checked as far as it can be before anything is loaded."""

    header: ModelHeader
    name: str  # by which clients ask for it
    n_ctx: int  # of each conversation
    options: ContextOptions
    run: RunOptions  # resolved
    pack: ExitPack | None = None


def plan_backend(config: Config, note: Note) -> Plan:
    """Raises UsageError for what cannot be served, a ModelError, PackError or MemoryLimitError for what cannot run."""
    wanted, n = config.model, config.limits.max_conversations
    mode = Mode(wanted.mode)
    for name in ("pack", "max_disagreement"):
        if mode is not Mode.EXIT and getattr(wanted, name) is not None:
            raise UsageError(
                f"model.{name} means nothing to a server in mode {mode.value}, whose drafts are copied from the text",
                f"set model.mode to exit, or drop model.{name}",
            )
    header = checked_header(wanted.name)
    n_ctx = resolved_n_ctx(wanted.ctx, header, note)
    if n_ctx * n > _MOST_CELLS:
        raise UsageError(f"{n} conversations of {n_ctx} tokens are too many", "lower model.ctx")
    pack = load_pack(wanted.pack, header)
    asked = RunOptions(
        model=wanted.name,
        mode=mode,
        pack=wanted.pack,
        max_disagreement=wanted.max_disagreement,
        n_threads=wanted.threads or default_threads(),
        kv_type=KvType(wanted.kv_type),
        kernels=wanted.kernels,
        audit_rate=wanted.audit_rate,
    )
    run = next(iter(policies_of(asked, header, n_ctx, pack, note).values()))
    n_rows = n_outputs(run)
    if mode is Mode.EXIT and n_ctx < n_rows:
        raise UsageError(
            f"a context of {n_ctx} tokens is too small for mode exit", f"set model.ctx to {n_rows} or more"
        )
    options = replace(
        context_options(run),
        n_ctx=n_ctx * n,
        n_batch=max(N_BATCH, n * (n_rows if mode is Mode.EXIT else 1)),
        n_seq_max=n,
    )
    need = estimate_need(
        header, options, len(run.boundaries or ()) + 1, n * n_rows if mode is Mode.EXIT else max(n, n_rows)
    )
    warning = check_need(need, machine_memory())
    if warning:
        note(warning)
    name = DEMO_MODEL if wanted.name == DEMO_MODEL else Path(wanted.name).stem if _is_path(wanted.name) else wanted.name
    return Plan(header, name, n_ctx, options, run, pack)


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(".gguf")


class Backend:
    """A loaded model: text to tokens and back, and the costs of its batches. The engine belongs to its thread."""

    def __init__(self, plan: Plan, note: Note, learnt: Mapping[str, Any] | None = None) -> None:
        """`learnt` is what `learnt` of an earlier one was. Raises as Model and ChatTemplate do."""
        self.plan = plan
        self._note = note
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(plan.header.path, header=plan.header, kernels=plan.run.kernels))
            if not self.model.has_tokenizer:
                raise UnsupportedModelError(f"{plan.header.path} has no tokenizer, so it cannot read text")
            self._template = ChatTemplate.of(self.model)
            self._adds_bos, self._bos = self.model.adds_bos, self.model.special_text("bos")
            pieces = (len(self.model.piece(token, special=True)) for token in range(self.model.n_vocab))
            self._most_bytes = plan.n_ctx * max(pieces)  # no longer text fits
            self.vocabulary = Vocabulary(self.model.is_end, self.model.piece)
            self._cost_key = CostKey.of(self.model, plan.options)
            self.key = asdict(self._cost_key)
            self.costs = self._live_costs(learnt or {})
            self.thresholds = thresholds_of(plan.run)  # of exits; may be changed between steps
            self.engine = opened.enter_context(self._engine(opened))
            self._opened = opened.pop_all()

    def _engine(self, opened: ExitStack) -> Conversations:
        """The engine of the plan's mode; `opened` closes what it needs besides."""
        plan, run = self.plan, self.plan.run
        if run.mode is not Mode.EXIT:
            return BatchEngine(
                self.model, plan.options, self.costs, theta=run.theta if run.mode is Mode.MARGIN else None
            )
        n, sources = plan.options.n_seq_max, None
        if run.head == "pack" and plan.pack is not None:
            one = replace(run, n_ctx=plan.n_ctx)
            files = head_files(plan.pack, self.model.path)
            sources = opened.enter_context(closing(pack_heads(BatchHeads, self.model, one, plan.pack, files, n)))
        return ExitBatchEngine(
            self.model,
            plan.options,
            run.boundaries or (),
            lambda: self.thresholds,
            sources or OwnSources(lambda: shared_head(run, plan.pack), n),
            engine_settings(run),
            costs=self.costs,
        )

    def _live_costs(self, learnt: Mapping[str, Any]) -> LiveCosts:
        """Costs of batches as measured here, or as learnt before with the same model, build and machine."""
        largest = NGRAM_CAP + 1
        sizes = measurable_sizes(largest)
        options = replace(self.plan.options, n_ctx=largest, n_batch=largest, n_seq_max=1)

        def measure() -> BatchCosts:
            self._note("measure the cost of small batches, once for this model and machine")
            whole = Slice(self.model, 0, self.model.n_layer, options, n_outputs_max=largest)
            try:
                return measure_batch_costs([whole], sizes)
            finally:
                whole.close()

        measured = kept_batch_costs(self._cost_key, sizes, measure)
        # without arithmetic that is the same in every batch, drafts could change a text at a near-tie
        run = self.plan.run
        self.drafts = run.draft == "ngram" and (measured.invariant or run.mode is Mode.MARGIN)
        if learnt.get("key") == self.key and len(learnt.get("costs", ())) == largest:
            return LiveCosts(learnt["costs"], learnt["one_s"])
        return LiveCosts(measured.up_to(largest), measured.one_s)

    @property
    def learnt(self) -> dict[str, Any]:
        """What another start with the same model need not find out again, as JSON takes it."""
        costs = [round(cost, 3) for cost in self.costs[:]]
        return {"key": self.key, "costs": costs, "one_s": round(self.costs.one_s, 6)}

    def opened(self, sampler: Sampler) -> Opened:
        """For the engine's thread, which holds targets by what `sampler` reads."""
        plan = self.plan
        steered = SteeredEngine(self.engine, self.model, plan.run, plan.header.file_bytes, self._set_thresholds)
        costs = None if plan.run.mode is Mode.EXIT else self.costs  # where a step is several batches, one says nothing
        return Opened(self.engine, costs, self.close, steered, sampler)

    def _set_thresholds(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers that a token can take."""
        return (*(self.plan.run.boundaries or ()), self.model.n_layer)

    @property
    def exits(self) -> dict[int, float]:
        """Thresholds in force, by layer."""
        return dict(zip(self.plan.run.boundaries or (), self.thresholds.exit_below, strict=True))

    def close(self) -> None:
        self._opened.close()

    # ── text → tokens ───────────────────────────────────────────────────────────────────────────────────────────────

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as tokens, up to where the assistant begins. Raises ApiError for one that cannot be had."""
        self._check_size(sum(len(message.content) for message in messages), "messages")
        if self._template is None:
            raise bad_request("the model has no chat template: use /v1/completions", "messages")
        try:
            text = self._template.render(messages)
        except ModelError:  # its words may quote the conversation
            raise bad_request("the model's chat template refuses this order of messages", "messages") from None
        # the tokenizer adds its own
        return self._tokens(text.removeprefix(self._bos) if self._adds_bos else text, "messages")

    def text_tokens(self, text: str) -> list[int]:
        """A text as tokens; names of special tokens in it stand for them. Raises ApiError for one that is too long."""
        return self._tokens(text, "prompt")

    def _tokens(self, text: str, param: str) -> list[int]:
        self._check_size(len(text), param)
        tokens = self.model.tokenize(utf8(text, param), add_special=True, parse_special=True)
        return self.check_tokens(tokens, param)

    def check_tokens(self, tokens: list[int], param: str) -> list[int]:
        """Raises ApiError for what does not fit a conversation's context, or is no token."""
        if not tokens:
            raise bad_request("the prompt is empty", param)
        if len(tokens) >= self.plan.n_ctx:
            raise self._too_long(f"the prompt is {len(tokens)} tokens long", param)
        if not all(0 <= token < self.model.n_vocab for token in tokens):
            raise bad_request(f"tokens of this model are from 0 to {self.model.n_vocab - 1}", param)
        return tokens

    def _check_size(self, n_characters: int, param: str) -> None:
        """Refuse what must be too long before any time is spent on it."""
        if n_characters > self._most_bytes:
            raise self._too_long(f"a prompt of {n_characters} characters is too long", param)

    def _too_long(self, what: str, param: str) -> ApiError:
        message = f"{what}; a conversation holds {self.plan.n_ctx} tokens and an answer needs room"
        return bad_request(message, param, "context_length_exceeded")
