"""Which policy writes, and the engine that is open for it: one text, one model, one sampler, changing policies."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

from .auto import Chooser, Round, rounds
from .batch_costs import CostKey, LiveCosts
from .engine import Engine
from .errors import PromptError
from .exits.costs import Costs
from .exits.forecast import kept_part_costs, predicted_time
from .exits.pack import ExitPack
from .exits.probe_file import ProbeFile
from .exits.prompt_policy import FullDepthIfUncertain, PromptWatch, watch_prompts
from .exits.settings import DEFAULT_DISAGREEMENT, certified_rung
from .exits.source import PackHeads
from .native import Model
from .opening import Measured, batch_costs, draft_source, head_files
from .prefix import common_prefix
from .resolve import POLICIES, RunOptions, context_options, engine_settings, n_outputs, thresholds_of
from .sampling import Sampler
from .slices import close_slices, default_threads, open_slices
from .types import EngineStats, Mode, Step, Thresholds

Say = Callable[[str], None]


def files_for(policies: Mapping[str, RunOptions], pack: ExitPack | None, model_path: str) -> dict[int, Path]:
    """Files of the pack's heads by layer, if a policy needs them. Raises as `head_files`."""
    if pack is None or not any(p.mode is not Mode.FULL and p.head == "pack" for p in policies.values()):
        return {}
    return head_files(pack, model_path)


class Player:
    """Writes a text with the policy that is best, as far as there are several. Not thread-safe.

    `options` are those of the policy that writes: in mode auto, these change, and with them `engine`.
    """

    def __init__(
        self,
        model: Model,
        policies: Mapping[str, RunOptions],
        pack: ExitPack | None,
        files: Mapping[int, Path],
        sampler: Sampler,
        measured: Measured,
        say: Say = lambda _text: None,
        *,
        auto: bool,
        n_threads_batch: int | None = None,
        probes: ProbeFile | None = None,
    ) -> None:
        """Open the first of `policies`, results of `policies_of`, and see which others may take its place.

        `files` are those of `files_for`; `measured` as in `batch_costs`. With `auto`, nothing is drafted where a
        token's logits depend on the batch it is in. `n_threads_batch`: None: as many as for single tokens. `probes`
        say before an answer whether its tokens may exit. Raises what opening slices and heads does, UsageError for
        probes that read no state at an exit's boundary.
        """
        self.model, self.policies, self.sampler = model, policies, sampler
        self._pack, self._files, self._measured, self._say = pack, files, measured, say
        self._auto, self._n_threads_batch, self._probes = auto, n_threads_batch, probes
        for policy in policies.values():
            if probes is not None and policy.mode is Mode.EXIT:
                probes.at(policy.boundaries or ())  # refuses one that sees no state there
        self._chooser: Chooser | None = None
        self._said: float | None = None  # by the probe, of a prompt whose answer another policy went on with
        self._opened = ExitStack()
        self.start_counts()
        first, *others = policies
        self._open(policies[first])
        try:
            # without arithmetic that is the same in every batch, drafts could change a text at a near-tie
            names = [name for name in others if self.options.mode is Mode.VERIFIED or policies[name].mode is Mode.EXIT]
            if names:
                self._chooser = self._choose_among(first, names)
        except BaseException:
            self.close()
            raise
        self._playing = first

    def start_counts(self) -> None:
        """Begin the account of an answer."""
        self.written: Counter[str] = Counter()  # tokens of the latest answer, by policy
        self.left: str | None = None  # why another policy was left in the middle of it, in words

    def _choose_among(self, first: str, names: Sequence[str]) -> Chooser:
        """A chooser that knows what policies in slices are thought to take, by the measured times of their parts."""
        assert self._pack is not None
        layers = self.policies[names[0]].boundaries or ()
        n_threads = self.options.n_threads or default_threads()
        heads = [self._files[layer] for layer in layers] if self._files else None
        cost_key = CostKey.of(self.model, context_options(self.options))
        key = {**asdict(cost_key), "pack": self._pack.digest, "layers": layers}
        costs = kept_part_costs(key, self.model, layers, heads, n_threads, self._say)
        self._refill = costs.full[-1] / len(costs.full) / costs.full[0]
        predicted = {name: self._predicted(self.policies[name], costs) for name in names}
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
            if self._n_threads_batch is not None:
                for piece in slices:
                    piece.set_threads(options.n_threads or default_threads(), self._n_threads_batch)
            self._live: LiveCosts | None = None
            costs: Sequence[float] = ()
            if options.mode is not Mode.FULL and options.draft == "ngram":
                before = time.perf_counter()
                found = batch_costs(self.model, options, slices, self._measured, self._say, self._n_threads_batch)
                measured_s = time.perf_counter() - before
                costs = found.up_to(n_outputs(options))
                if self._auto and not found.invariant:
                    options = dataclasses.replace(options, mode=Mode.FULL, draft=None)
                elif self._auto:
                    costs = self._live = LiveCosts(costs, found.one_s)
            source = draft_source(self.model, options, self._pack, self._files, costs)
            self._heads = source if isinstance(source, PackHeads) else None
            if self._heads is not None:
                opened.callback(self._heads.close)
            self._watch: PromptWatch | None = None
            if self._probes is not None and source is not None and options.mode is Mode.EXIT:
                policy = FullDepthIfUncertain(options.probe_limit)
                source = self._watch = watch_prompts(source, self._probes, boundaries, policy)
            closed = Thresholds((0.0,) * len(boundaries))

            def now() -> Thresholds:
                if self._chooser is not None and self._chooser.probing:
                    return closed
                return self._thresholds if self._watch is None else self._watch.scaled(self._thresholds)

            engine = Engine(slices, self.sampler, engine_settings(options), now, source, n_ctx=options.n_ctx)
            engine.stats = stats or engine.stats
            self._engine = engine
            self._opened = opened.pop_all()
        self.options = options
        self._open_s = time.perf_counter() - started - measured_s

    @property
    def engine(self) -> Engine:
        """What runs the policy that writes; opened here if a change of policy was interrupted."""
        if not self._playing and self._chooser is not None:
            self._play(self._chooser.current)
        return self._engine

    @property
    def stats(self) -> EngineStats:
        """Counts since the player was made, whichever policy wrote."""
        return self._engine.stats

    @property
    def thresholds(self) -> Thresholds:
        """Below which uncertainty the next token may exit, by boundary; may be changed between tokens.

        Raises UsageError, when set, if there are not as many as boundaries, or one for all.
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds_of(dataclasses.replace(self.options, thresholds=thresholds.exit_below))

    def use(self, sampler: Sampler) -> None:
        """Choose tokens with another sampler from now on, whichever policy writes."""
        self.sampler = self.engine.sampler = sampler

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from the next token on, heads among it; a change of policy undoes it."""
        for piece in self.engine.slices:
            piece.set_threads(n_threads)
        if self._heads is not None:
            self._heads.set_threads(n_threads)

    # ── an answer ───────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, tokens: Sequence[int]) -> int:
        """Make `tokens` the text, with the policy that is to answer; how many the KV cache holds of them.

        Raises PromptError if there are none, or they leave no room in the context.
        """
        engine = self.engine
        if not tokens:
            raise PromptError("the prompt is empty", "give some text")
        if len(tokens) >= engine.n_ctx:
            raise PromptError(
                f"the prompt is {len(tokens)} tokens long, the context holds {engine.n_ctx} and an answer needs room",
                "shorten the prompt, or give a larger --ctx",
            )
        common = common_prefix(engine.tokens, tokens)
        if self.choose(common):
            engine, common = self.engine, 0
        # the newest token is always run again, for its logits
        n_reused = min(common, len(tokens) - 1, engine.n_computed)
        engine.rollback(common)
        self.sampler.rewind(engine.tokens)  # whatever was interrupted
        engine.extend(tokens[common:])
        self._said = None
        if self._watch is not None:
            self._watch.begin(len(tokens))
        return n_reused

    @property
    def prompt_uncertainty(self) -> float | None:
        """Probability of high semantic entropy that a probe gave the latest prompt; None without one, or not yet."""
        return self._said if self._watch is None else self._watch.probability

    def choose(self, n_held: int) -> bool:
        """Before an answer to a text of which `n_held` tokens are held: whether another policy, with none, plays."""
        if self._chooser is None or self._playing == self._chooser.begin(self._change_cost(n_held)):
            return False
        self._play(self._chooser.current)
        return True

    def steps(self, max_tokens: int) -> Generator[Step, None, None]:
        """The steps of whichever engine is to write, as `Engine.generate`. Those who decide hear what rounds take."""
        left = max_tokens
        while left > 0:
            with closing(self.engine.generate(left)) as steps:
                for step, round_ in rounds(steps, self.engine.stats):
                    left -= 1
                    if round_ is not None:
                        self._count(round_)
                    self.written[self._playing] += 1
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
        taken, base = self._chooser.latest, self._chooser.estimate(next(iter(self.policies)))
        self.left = f"{POLICIES[name]} took {taken:.2f} times plain full depth's time, without them it is {base:.2f}"
        self._said = self.prompt_uncertainty
        if self.options.mode is Mode.EXIT:
            engine.settle()  # what exited and still waits is audited, as it would have been
        self._play(self._chooser.fall_back(self._change_cost(len(engine.tokens))))
        self.engine.adopt(engine)

    def _play(self, name: str) -> None:
        """Open another policy, with an empty KV cache; the sampler's random numbers go on."""
        self._playing = ""  # interrupted from here on, nothing is open
        self.close()
        self.sampler.rewind(())
        self._open(self.policies[name], self._engine.stats)
        self._playing = name

    def close(self) -> None:
        """Close slices and heads; the model and the sampler are others' to close."""
        self._opened.close()
