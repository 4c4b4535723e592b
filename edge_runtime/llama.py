"""`EdgeLlama`: llama-cpp-python's `Llama` on this project's engine, for programs that change one import.

    from edge_runtime import EdgeLlama as Llama

What `Llama` offers stays as it is, with its own code: prompts, chat formats, stop strings, grammars, streams. Only what
computes tokens is replaced: `eval`, and `generate`, with `Llama`'s own chain of samplers on the engine's logits. There
is one KV cache, the engine's, and `Llama`'s account of the text (`n_tokens`, `input_ids`) is the one that counts. Like
`Llama`, not thread-safe.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Engine
from .errors import DecodeError, EdgeError, UnsupportedModelError, UsageError
from .llama_model import BoundModel
from .llama_plan import Wish, left_to_llama
from .llama_sampling import ChainSampler, is_plain_greedy, needs_full_depth
from .llama_targets import defaults_of, held, plan_targets
from .native import Candidates, KvType, load, read_header, resolve_kernels
from .native.interrupt import interrupt_deferred
from .native.kernels import kernels_for_loading
from .native.library import Closed
from .pilot import Pilot
from .playing import Player, files_for
from .resolve import RunOptions, engine_settings, load_pack, policies_of
from .sampling import Sampler
from .slices import default_threads
from .steering import Plan
from .types import EngineStats, Mode, SamplingSettings

load()  # the bindings take the patched library, or this says why they cannot

from llama_cpp.llama import Llama, LlamaState  # noqa: E402

_logger = logging.getLogger("edge_runtime")
_GENERATE = inspect.signature(Llama.generate)
_CHAIN = set(inspect.signature(Llama._init_sampler).parameters) - {"self"}
_KNOWN = set(inspect.signature(Llama.__init__).parameters) - {"self", "kwargs"}
# for modes that may publish what full depth would not: the one for requests that only full depth can serve
_EXACT = {Mode.EXIT: Mode.FULL, Mode.MARGIN: Mode.VERIFIED}


class EdgeLlama(Llama):  # type: ignore[misc]
    """`Llama`, computing less than the whole model for a token, or several tokens at once, where that pays.

    `notes` are the limits met, as told to the logger "edge_runtime", each once. `without_engine` names what made this a
    plain `Llama`, or is None.
    """

    n_tokens: int
    input_ids: NDArray[np.intc]
    _context: Any
    _model: Any
    _player: Player | None = None
    _pilot: Pilot | None = None  # where there are targets
    _tokens: Generator[int, None, None] | None = None  # of the generator under way
    _turn = 0  # counts what takes the text over, so that an older generator notices

    def __init__(
        self,
        model_path: str,
        *,
        mode: str | None = None,
        boundaries: int | Sequence[int] | None = None,
        pack: str | None = None,
        thresholds: float | Sequence[float] | None = None,
        max_disagreement: float | None = None,
        theta: float | None = None,
        cap: int | None = None,
        audit_rate: float | None = None,
        kernels: str = "edge",
        profile: str | None = None,
        targets: str | Mapping[str, float] | None = None,
        **arguments: Any,
    ) -> None:
        """Load a model; `arguments` are `Llama`'s, with its defaults except for the following.

        n_threads, n_threads_batch: the physical cores. flash_attn: with the edge kernels, where the model allows it.
        Batches are of n_ubatch tokens where that is less than n_batch.

        mode: "auto" (the default: drafts copied from the text where they pay and change nothing, else full depth),
        "full", "verified", "exit" or "margin", as in `edge-run generate`; so are boundaries, pack, thresholds,
        max_disagreement, theta, cap and audit_rate. kernels: "edge" or "stock". With a pack, mode auto may draft with
        its heads, with max_disagreement it may let tokens exit, each where that is predicted and measured to pay.

        profile: name or path of a device's; its threads and batch are the defaults. targets: the name of one of the
        profile's (of the device that this is, without one), or a dict with any of power_cap_w, ceiling_c (°C) and
        latency_ms (per token): what answers hold by changing threads, rests and, in mode exit, exits. It reads the
        device's sensors in a thread of its own until `close`.

        What wants each token's logits, other states or a context of its own (logits_all, embedding, vocab_only,
        draft_model, chat_handler, lora_path, arguments of rope and YaRN, two types of cache, offload_kqv, …) is left to
        `Llama`'s own loop, and so are models that cannot be run in slices; see `without_engine`.

        Raises UsageError, or UnsupportedModelError, if that meets an argument of ours, other errors of this package for
        packs and memory, and what `Llama` raises.
        """
        self.notes: list[str] = []
        self._wish = Wish(
            mode,
            boundaries,
            pack,
            thresholds,
            max_disagreement,
            theta,
            cap,
            audit_rate,
            kernels,
            profile,
            dict(targets) if isinstance(targets, Mapping) else targets,
        )
        self._flash_attn = arguments.get("flash_attn")
        usual = defaults_of(profile)
        if usual is not None and left_to_llama(arguments) is None:
            arguments = {"n_ubatch": usual.n_batch, **arguments}
        most = (usual.n_threads if usual else 0) or default_threads()
        n_threads = arguments.get("n_threads") or most
        threads = {"n_threads": n_threads, "n_threads_batch": arguments.get("n_threads_batch") or most}
        self.kernels = resolve_kernels(kernels)
        options = self._wish.options(model_path, n_threads, self.kernels != "stock", arguments)
        self.mode = options.mode.value
        self.without_engine: str | None = None
        self._leave_to_llama(left_to_llama(arguments), UsageError)
        plan = plan_targets(targets, profile, options)
        self._warn(arguments)
        if self.without_engine is None and options.kv_type is KvType.Q8_0 and options.flash_attention is None:
            arguments = {**arguments, "flash_attn": True}  # such a cache needs it
        load().log.verbose = bool(arguments.get("verbose", True))
        with interrupt_deferred(), kernels_for_loading(self.kernels):
            super().__init__(model_path, **{**arguments, **threads})
        if self.without_engine is None:
            try:
                self._replace_context(options, plan)
            except BaseException:
                self.close()
                raise

    def _replace_context(self, options: RunOptions, plan: Plan | None) -> None:
        """Open slices in the place of the context that `Llama` has opened, unless they would not do."""
        model = BoundModel(self._model, self.kernels)
        self._leave_to_llama(model.why_not_sliced, UnsupportedModelError)
        if self.without_engine is not None:
            return
        header = read_header(self.model_path)
        n_batch = min(self.n_batch, self.context_params.n_ubatch)
        options = dataclasses.replace(options, n_batch=n_batch)
        pack = load_pack(options.pack, header)
        policies = policies_of(options, header, self._n_ctx, pack, self._note)
        files = files_for(policies, pack, self.model_path)
        self._ctx.close()  # its KV cache goes before ours comes
        self._stack.callback(model.close)
        self._idle = Sampler(SamplingSettings(), model.n_vocab)
        self._stack.callback(self._idle.close)
        player = Player(
            model,
            policies,
            pack,
            files,
            self._idle,
            {},
            _logger.info,
            auto=options.mode is Mode.AUTO,
            n_threads_batch=self.n_threads_batch,
        )
        self._stack.callback(player.close)
        self._player = player
        if plan is not None:
            self._pilot = self._stack.enter_context(held(plan, player, header.file_bytes))
        self._all = Candidates(self._n_vocab)
        self._fit_input_ids()

    @property
    def _engine(self) -> Engine | None:
        """What runs the policy that writes."""
        return None if self._player is None else self._player.engine

    @property
    def _ctx(self) -> Any:
        """`Llama`'s context; where there is an engine, that of its slice that gives logits."""
        context, engine = self._context, self._engine
        if engine is not None and context.ctx != engine.slices[-1].handle:
            context.ctx = engine.slices[-1].handle
            context.memory = load().c.llama_get_memory(context.ctx)
        return context

    @_ctx.setter
    def _ctx(self, context: Any) -> None:
        self._context = context

    def _leave_to_llama(self, why: str | None, error: type[EdgeError]) -> None:
        """Let `Llama`'s own loop run because of `why`. Raises `error` if an argument of ours wants the engine."""
        if why is None:
            return
        insists = self._wish.insists
        if insists is not None:
            raise error(f"{insists} cannot be had together with {why}", 'drop one of the two, or take mode="full"')
        self.without_engine, self.mode = why, Mode.FULL.value
        self._note(f"{why}: every token comes from full depth, by the loop of llama-cpp-python")

    def _warn(self, arguments: Mapping[str, Any]) -> None:
        """Speak of arguments that have no effect."""
        unknown = sorted(set(arguments) - _KNOWN)
        if unknown:
            _logger.warning("llama-cpp-python does not know, and ignores: %s", ", ".join(unknown))
        if arguments.get("n_gpu_layers") and not load().c.llama_supports_gpu_offload():
            _logger.warning("n_gpu_layers has no effect: the library is built without support for a GPU")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            _logger.info(text)

    @property
    def stats(self) -> EngineStats:
        """Counts since the model was loaded; all zero without the engine."""
        return EngineStats() if self._player is None else self._player.stats

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layers behind which a token may leave."""
        return () if self._engine is None else tuple(piece.end for piece in self._engine.slices[:-1])

    # ── Llama's methods that compute ────────────────────────────────────────────────────────────────────────────────

    def reset(self) -> None:
        """Forget the text."""
        super().reset()
        if self._engine is not None:
            self._take_over()
            self._engine.rollback(0)

    def eval(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text and compute them; the logits that follow are those of full depth."""
        if self._engine is None:
            super().eval(tokens)
            return
        self._take_over()
        engine = self._follow()
        if len(tokens):
            self._extend(tokens)
            self._requires_eval = True  # until it is done: what was at hand is overwritten
            with _errors_of_llama():
                engine.settle()
            self._sync()
            self._requires_eval = False

    @functools.wraps(Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        request = _GENERATE.bind(self, *args, **kwargs)
        request.apply_defaults()
        if self._player is None:
            return super().generate(*args, **kwargs)  # type: ignore[no-any-return]
        return self._generate(self._player, request.arguments)

    def _generate(self, player: Player, request: Mapping[str, Any]) -> Generator[int, Sequence[int] | None, None]:
        """`Llama.generate`: the tokens that follow the prompt; those that are sent in are added to the text."""
        self._take_over()
        turn, stops = self._turn, request["stopping_criteria"]
        live = self._begin([int(token) for token in request["tokens"]], request["reset"])
        if self._pilot is not None:
            self._pilot.begin()
        chain = self._chain(player, request)
        tokens = self._tokens = self._published(player, chain, live)
        try:
            with _errors_of_llama():
                while True:
                    token = next(tokens)
                    # as in Llama, the new token is not yet among them, and the scores are those of logits_all
                    if stops is not None and stops(self._input_ids, self._scores[0, :]):
                        return
                    sent = yield token
                    if self._turn != turn:
                        raise UsageError("another call has gone on with the text", "close a stream before the next")
                    if sent is not None:
                        tokens.close()
                        self._extend(sent)
                        tokens = self._tokens = self._published(player, chain, False)
        finally:
            tokens.close()
            chain.close()

    def _published(self, player: Player, chain: ChainSampler, live: bool) -> Generator[int, None, None]:
        """Tokens without end. With `live` logits the first is chosen from those. RuntimeError in a full context."""
        if live:
            token = chain.sample(player.engine.slices[-1].logits(-1))
            chain.accept(token)
            if len(player.engine.tokens) < self._n_ctx:
                player.engine.extend([token])
            yield token
        self._requires_eval = True  # as long as something is computed
        player.use(chain)
        try:
            with closing(player.steps(self._n_ctx)) as steps:
                for step in steps:
                    # behind a draft's row there are others, and the logits at hand are theirs
                    self._requires_eval = step.drafted or step.boundary is not None
                    if self._pilot is not None:
                        self._pilot.token()
                    left_s = time.perf_counter()
                    yield step.token
                    self._requires_eval = True
                    if self._pilot is not None:
                        self._pilot.resume(time.perf_counter() - left_s)
            if self.n_tokens < self._n_ctx:
                token = chain.sample(player.engine.settle())
                self._requires_eval = False
                yield token
        finally:
            player.use(self._idle)
        raise _does_not_fit(self._n_ctx + 1, self._n_ctx)

    def _chain(self, player: Player, request: Mapping[str, Any]) -> ChainSampler:
        """The request's samplers, and the mode that can serve it."""
        reason, mode = needs_full_depth(request), player.options.mode
        if reason is not None and mode in _EXACT:
            self._note(f"{reason}: such answers come from full depth")
            mode = _EXACT[mode]
        player.engine.settings = dataclasses.replace(engine_settings(player.options), mode=mode)
        self._sampler = self._init_sampler(**{name: request[name] for name in _CHAIN})
        return ChainSampler(
            self._sampler,
            self._all,
            self._sync,
            greedy=is_plain_greedy(request, self.last_n_tokens_size),
            may_draft=reason is None,
        )

    # ── one text, in two places ─────────────────────────────────────────────────────────────────────────────────────

    def _take_over(self) -> None:
        """End the generator under way, if there is one. Raises UsageError for a chat handler that came too late."""
        if self.chat_handler is not None:
            raise UsageError("a chat handler may write into the context", "give it as chat_handler when loading")
        self._turn += 1
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None

    def _follow(self) -> Engine:
        """Make the engine's text the one that `Llama` knows."""
        engine = self._engine
        assert engine is not None
        text = self._input_ids.tolist()
        common = self.longest_token_prefix(engine.tokens, text)
        if common < max(len(text), engine.n_computed):
            self._requires_eval = True  # the logits at hand are those of what goes, or was never computed
        engine.rollback(common)
        self._extend(text[common:])
        return engine

    def _begin(self, tokens: list[int], reset: bool) -> bool:
        """Add a prompt, keeping what the text shares with it if `reset`; whether its logits are at hand."""
        assert self._player is not None
        engine = self._follow()
        common = self.longest_token_prefix(engine.tokens, tokens) if reset else 0
        rest = tokens[common:]
        unchanged = not rest and (not reset or common == self.n_tokens)
        if unchanged and self.n_tokens and not self._requires_eval:
            return True
        if reset:
            engine.rollback(common)
            self.n_tokens = common
        self._requires_eval = True
        if self._player.choose(len(engine.tokens)):
            self._player.engine.extend(engine.tokens)
        self._extend(rest)
        return False

    def _extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the engine's text. Raises RuntimeError, as `Llama` does, if they do not fit the context."""
        assert self._engine is not None
        engine = self._engine
        length = len(engine.tokens) + len(tokens)
        if length > self._n_ctx:
            raise _does_not_fit(length, self._n_ctx)
        engine.extend([int(token) for token in tokens])

    def _sync(self) -> None:
        """Let `Llama` know the engine's text."""
        assert self._engine is not None
        text, known = self._engine.tokens, self.n_tokens
        self.input_ids[known : len(text)] = text[known:]
        self.n_tokens = len(text)

    def _fit_input_ids(self) -> None:
        """Give `input_ids` room for the context: llama.cpp rounds its size up, a saved state may be of another."""
        if len(self.input_ids) != self._n_ctx:
            room = np.zeros(self._n_ctx, self.input_ids.dtype)
            room[: self.n_tokens] = self.input_ids[: self.n_tokens]
            self.input_ids = room

    # ── saving, loading, the end ────────────────────────────────────────────────────────────────────────────────────

    def save_state(self) -> LlamaState:
        """The text and its KV cache; with boundaries the text alone, to be computed again."""
        if not self.boundaries:
            return super().save_state()
        return LlamaState(
            input_ids=self.input_ids.copy(),
            scores=self._scores.copy(),
            n_tokens=self.n_tokens,
            llama_state=b"",
            llama_state_size=0,
            seed=self._seed,
        )

    def load_state(self, state: LlamaState) -> None:
        """Go on from a saved state, of this object or another of the same model."""
        engine = self._engine
        if engine is None:
            super().load_state(state)
            return
        if state.n_tokens > self._n_ctx:
            raise _does_not_fit(state.n_tokens, self._n_ctx)
        self.reset()
        if not self.boundaries and state.llama_state_size:
            try:
                super().load_state(state)
            except BaseException:
                self.reset()
                engine.slices[0].clear()
                raise
            engine.restore(self._input_ids.tolist())
        else:
            self.input_ids, self.n_tokens, self._seed = state.input_ids.copy(), state.n_tokens, state.seed
        self._fit_input_ids()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **dataclasses.asdict(self._wish), "flash_attn": self._flash_attn}

    def close(self) -> None:
        """Free the model and its KV cache."""
        if "_stack" not in self.__dict__:
            return  # it was never opened
        if self._tokens is not None:
            self._tokens.close()
        self._player = self._tokens = None
        super().close()
        self._model = self._ctx = self.tokenizer_ = Closed("this model")

    def __enter__(self) -> EdgeLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _does_not_fit(length: int, n_ctx: int) -> RuntimeError:
    return RuntimeError(f"llama_decode returned 1: {length} tokens do not fit the context of {n_ctx}")


@contextmanager
def _errors_of_llama() -> Iterator[None]:
    """A failed decode is a RuntimeError, as in `Llama`."""
    try:
        yield
    except DecodeError as error:
        raise RuntimeError(str(error)) from error
