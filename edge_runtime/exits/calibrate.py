"""From prompts to an exit pack: collect, shortlist, train, predict, weigh signals, choose boundaries, certify, pack.

Each stage is a module of its own; here they follow one another, and each has texts of its own: heads learn from the
train split; gates, the signal, the boundaries and the families of thresholds are chosen on tune; the certificates are
from certify; every figure of the report is from test. All stages keep their results. For the model's own output head
(`shared`) there is no shortlist and no training.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cache import cache_dir
from ..errors import UsageError
from ..identity import ModelIdentity
from ..metrics import auroc
from ..native import Model
from ..reporter import Reporter
from ..types import SIGNALS, Floats, TokenIds, check_boundaries
from . import findings, shared
from .asking import Asker, fit_asker, likely_exits
from .choose import Choice, choose
from .clusters import cluster_tokens, order_by_cluster
from .collect import SHARD_PROMPTS, CollectOptions, Prompt, collect
from .corpus import Corpus, Shard, Text
from .costs import Costs, measure_costs
from .evaluate import Predictions, cosines, predict
from .gate import Gate, fit_gate, held_out_probabilities
from .head import HeadContext, HeadWeights, final_norm, output_rows
from .pack import ExitPack, this_library
from .packed_head import PackedHead
from .ridge import fit_ridge
from .shortlist import choose_shortlist
from .splits import SPLITS, check_enough, split_prompts
from .stages import (
    Stages,
    predictions_from_arrays,
    predictions_to_arrays,
    weights_from_arrays,
    weights_to_arrays,
)
from .thresholds import BOUNDS, Rung, certify
from .trainer import TrainOptions, torch_problem, train_head
from .trunk_block import start_head

_DEPTHS = (0.4, 0.53, 0.67, 0.8, 0.9)
_COLLECT_SHARE, _TRAIN_SHARE = 0.45, 0.40  # of a budget; the rest is for predictions and their figures
_COLLECT_SHARE_RIDGE = 0.75
_NOT_OF_OUTCOME = ("seconds", "device", "n_threads")  # how long and where, not what is learned
_ASK_AT = 0.1  # heads are asked where they may exit at this disagreement of exits
_CHOOSE_AT = 0.05  # disagreement of tokens, as a policy that boundaries are chosen for may have


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How a pack is made; None leaves a choice to the model and the device."""

    head: Literal["trained", "shared"] = "trained"  # heads of the pack, or the model's own output head
    boundaries: tuple[int, ...] | None = None  # candidates
    n_prompts: int | None = None  # use the first so many
    max_tokens: int = 160
    budget: float | None = None  # seconds
    trainer: Literal["torch", "ridge"] = "torch"
    labels: Literal["soft", "hard"] = "soft"
    epochs: int = 4
    device: str = "cpu"
    quantisation: str = "Q4_0"
    n_shortlist: int = 12_288
    bounds: tuple[float, ...] = BOUNDS
    delta: float = 0.05
    temperature: float = 0.7  # at which acceptance is bounded
    compare: bool = False  # also train the deepest head by other ways
    pack_all: bool = False  # pack all candidates, whether or not they pay
    n_threads: int = 0
    seed: int = 0
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A pack, with its report in it, and where the work is kept."""

    pack: ExitPack
    folder: Path
    notes: tuple[str, ...]


def default_boundaries(n_layer: int) -> tuple[int, ...]:
    """Candidates at like depths for models of any size."""
    return tuple(sorted({min(max(round(share * n_layer), 1), n_layer - 1) for share in _DEPTHS}))


def calibrate(
    name: str,
    model: Model,
    identity: ModelIdentity,
    prompts: Sequence[Prompt],
    options: CalibrateOptions,
    reporter: Reporter,
    notes: Sequence[str] = (),
    corpus: Corpus | None = None,
    other_text: Sequence[Sequence[int]] = (),
) -> Calibrated:
    """Make a pack called `name` from `prompts`, numbered in order, those to be answered and texts to be read.

    `other_text` is more text of the kind expected, as tokens, whose words count for the shortlist alone. `notes` go
    into the report; `corpus` is one that was collected from these prompts before, by default one in the
    cache that is found by them. Raises UsageError for too few prompts or options that cannot be met, EdgeError if the
    disk is full, and what the stages raise.
    """
    return _Calibration(name, model, identity, prompts, options, reporter, list(notes), corpus, other_text).run()


class _Calibration:
    def __init__(
        self,
        name: str,
        model: Model,
        identity: ModelIdentity,
        prompts: Sequence[Prompt],
        options: CalibrateOptions,
        reporter: Reporter,
        notes: list[str],
        corpus: Corpus | None,
        other_text: Sequence[Sequence[int]],
    ) -> None:
        self.name, self.model, self.identity, self.options = name, model, identity, options
        self.reporter, self.notes, self.prompts = reporter, notes, prompts
        self.layers = default_boundaries(model.n_layer) if options.boundaries is None else options.boundaries
        check_boundaries(self.layers, model.n_layer)
        if not self.layers:
            raise UsageError("no boundary is given", "give one as in --boundaries 16,20")
        self.trainer = options.trainer if options.head == "trained" else "none"
        if self.trainer == "torch" and (problem := torch_problem()):
            raise UsageError(problem, "pip install 'edge-runtime[train]', or use --trainer ridge")
        self.path, self.other_text = Path(model.path), other_text
        if self.trainer == "none":
            shared.check_model(self.path)
        self.n_most = min(options.n_prompts or len(prompts), len(prompts))
        check_enough(prompts[: self.n_most], options.delta, trained=self.trainer != "none")
        self.collecting = CollectOptions(
            self.layers, max_tokens=options.max_tokens, n_threads=options.n_threads, seed=options.seed
        )
        described = {"model": identity.sha256, "build": this_library(), "prompts": _digest(prompts)}
        place = (options.cache or cache_dir()) / "exits"
        self.corpus = corpus or Corpus(place, {**described, **self.collecting.identity()})
        self.begun = time.monotonic()

    def run(self) -> Calibrated:
        shards = self.collect()
        texts = [text for shard in shards for text in shard.texts()]
        n = len(texts)
        self.stages = Stages(self.corpus.folder / "stages", {"prompts": n, "seed": self.options.seed})
        self._split(texts)
        if self.trainer == "none":
            return self._finish(shared.SharedLens(self).hear, None)
        self.reporter.say("choosing the tokens that heads can name")
        self._choose_shortlist()
        self.norm = final_norm(self.path)
        ridges = [self._ridge(layer) for layer in self.layers]
        trained = [self._train(i, ridge) for i, ridge in enumerate(ridges)]
        packed = [PackedHead.of(weights, self.options.quantisation) for weights, _ in trained]
        with tempfile.TemporaryDirectory(dir=self.corpus.folder, prefix=".heads-") as folder:
            made = findings.Trained(ridges, trained, packed, Path(folder))

            def hear(layer: int, split: str) -> Predictions:
                return self.predict(packed[self.layers.index(layer)], self.trainer, split, made.folder)

            return self._finish(hear, made)

    # ── collection and splits ───────────────────────────────────────────────────────────────────────────────────────

    def collect(self) -> list[Shard]:
        say, progress = self.reporter.say, self.reporter.progress
        n = self._n_prompts()
        say(f"the model answers {n:,} prompts")
        return collect(self.model, self.prompts[:n], self.collecting, self.corpus, progress)

    def _n_prompts(self) -> int:
        """How many prompts the budget allows, by the time that the first take."""
        budget = self.options.budget
        if budget is None:
            return self.n_most

        def measure() -> int:
            self.reporter.say("measuring how fast the model answers")
            prompts = self.prompts[: self.n_most]
            first = next((i for i in range(-(-len(prompts) // SHARD_PROMPTS)) if not self.corpus.has(i)), None)
            if first is None:
                return len(prompts)
            begin = time.monotonic()
            collect(self.model, prompts, self.collecting, self.corpus, self.reporter.progress, [first])
            share = _COLLECT_SHARE if self.trainer == "torch" else _COLLECT_SHARE_RIDGE
            more = (budget * share) / max(time.monotonic() - begin, 1e-6)
            # whole shards, and those that were there before cost nothing
            return min(len(prompts), (first + max(1, int(more))) * SHARD_PROMPTS)

        depends = {"budget": budget, "trainer": self.trainer, "most": self.n_most}
        return int(Stages(self.corpus.folder / "stages", {}).record("plan", depends, measure))

    def _split(self, texts: Sequence[Text]) -> None:
        """Answers into all splits; texts that were only read are learned from, and nothing is certified on them."""
        answered = [text for text in texts if not self.prompts[text.prompt].answered]
        given = [text for text in texts if self.prompts[text.prompt].answered]
        self.groups = {text.prompt: self.prompts[text.prompt].group for text in texts}
        names = split_prompts([self.groups[text.prompt] for text in answered], self.options.seed)
        self.splits = {split: [t for t, s in zip(answered, names, strict=True) if s == split] for split in SPLITS}
        self.given = given
        if self.trainer == "none":
            self.splits = shared.without_training(self.splits)
        for split, found in self.splits.items():
            if (split != "train" or self.trainer != "none") and not any(text.last > text.first for text in found):
                raise UsageError(f"there is no text left for the part '{split}'", "give more prompts")

    # ── shortlist and heads ─────────────────────────────────────────────────────────────────────────────────────────

    def _choose_shortlist(self) -> None:
        def make() -> tuple[dict[str, Any], None]:
            texts = [*self.splits["train"], *self.given]
            ids = choose_shortlist(texts, self.model.n_vocab, self.options.n_shortlist, self.other_text)
            pieces = [self.model.piece(int(i)) for i in ids]
            clusters = cluster_tokens(pieces, output_rows(self.path, ids))
            ordered, starts = order_by_cluster(ids, clusters)
            return {"ids": ordered, "starts": starts}, None

        counted = hashlib.sha256()
        for tokens in self.other_text:
            counted.update(np.asarray(tokens, np.int32).tobytes())
        depends = {"n": self.options.n_shortlist, "other text": counted.hexdigest()}
        found, _ = self.stages.arrays("shortlist", depends, make)
        self.shortlist: TokenIds = found["ids"]
        self.starts: TokenIds = found["starts"]
        self.listed = hashlib.sha256(self.shortlist.tobytes()).hexdigest()  # heads and what they say depend on it
        self.rows = output_rows(self.path, self.shortlist)

    def _ridge(self, layer: int) -> HeadWeights:
        def make() -> tuple[dict[str, Any], Any]:
            self.reporter.say(f"linear head behind layer {layer}")
            texts = [*self.splits["train"], *self.given]
            return weights_to_arrays(fit_ridge(texts, layer, self.norm, self.rows, self.shortlist))

        depends = {"layer": layer, "shortlist": self.listed}
        return weights_from_arrays(*self.stages.arrays(f"ridge-{layer}", depends, make))

    def _train(self, i: int, ridge: HeadWeights) -> tuple[HeadWeights, dict[str, Any]]:
        if self.options.trainer == "ridge":
            return ridge, {"stopped": "", "history": []}
        texts = [*self.splits["train"], *self.given]
        return self.train_variant(ridge, texts, self.options.labels, len(self.layers) - i)

    def train_variant(
        self, ridge: HeadWeights, texts: Sequence[Text], labels: Literal["soft", "hard"], n_to_come: int
    ) -> tuple[HeadWeights, dict[str, Any]]:
        """A trained head and how its training went; `n_to_come` heads share what is left of the budget."""
        options, layer = self.options, ridge.layer
        chosen = TrainOptions(
            labels=labels,
            epochs=options.epochs,
            seconds=self._seconds_per_head(n_to_come),
            seed=options.seed,
            device=options.device,
            n_threads=options.n_threads,
        )
        depends = {
            **{key: value for key, value in asdict(chosen).items() if key not in _NOT_OF_OUTCOME},
            "layer": layer,
            "shortlist": self.listed,
            "texts": len(texts),
            "budget": options.budget,
        }
        checkpoint = self.stages.path(f"training-{layer}", depends)
        others = [p for p in self.stages.folder.glob(f"training-{layer}-*.npz") if p != checkpoint]

        def make() -> tuple[dict[str, Any], Any]:
            self.reporter.say(f"training the head behind layer {layer}")
            if others and not checkpoint.exists():
                self.notes.append(f"layer {layer}: a training begun with other options is left aside")
            start = start_head(self.path, ridge, options.seed)
            found = train_head(
                texts,
                self.splits["tune"],
                start,
                self.shortlist,
                self.rows,
                self.norm,
                chosen,
                checkpoint,
                self.reporter,
            )
            arrays, described = weights_to_arrays(found.weights)
            return arrays, {**described, "stopped": found.stopped, "history": found.history}

        arrays, described = self.stages.arrays(f"head-{layer}", depends, make)
        checkpoint.unlink(missing_ok=True)
        return weights_from_arrays(arrays, described), {key: described[key] for key in ("stopped", "history")}

    def _seconds_per_head(self, n_to_come: int) -> float | None:
        if self.options.budget is None:
            return None
        until = self.begun + self.options.budget * (_COLLECT_SHARE + _TRAIN_SHARE)
        # an interrupted run has time of its own again
        return max(until - time.monotonic(), self.options.budget * 0.05) / n_to_come

    # ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def predict(
        self, head: PackedHead, kind: str, split: str, folder: Path, texts: Sequence[Text] | None = None
    ) -> Predictions:
        """What a head, run natively, says of a split; stability is filled in by `with_previous`."""
        texts = self.splits[split] if texts is None else texts
        digest = hashlib.sha256(head.projection.tobytes())
        for tensor in head.weights.tensors.values():
            digest.update(tensor.tobytes())

        def make() -> tuple[dict[str, Any], Any]:
            self.reporter.say(f"what the head behind layer {head.layer} says ({split})")
            path = self._head_file(head, kind, folder)
            total, done = sum(text.end - text.start for text in texts), 0

            def advance(n_rows: int) -> None:
                nonlocal done
                done += n_rows
                self.reporter.progress(done, total)

            return predictions_to_arrays(
                predict(
                    path,
                    texts,
                    head.layer,
                    self.shortlist,
                    self.starts,
                    temperature=self.options.temperature,
                    groups=self.groups,
                    n_threads=self.options.n_threads,
                    advance=advance,
                )
            )

        depends = {
            "head": digest.hexdigest(),
            "quantisation": head.quantisation,
            "split": split,
            "texts": len(texts),
            "shortlist": self.listed,
            "temperature": self.options.temperature,
        }
        return predictions_from_arrays(*self.stages.arrays(f"said-{kind}-{head.layer}-{split}", depends, make))

    def _head_file(self, head: PackedHead, kind: str, folder: Path) -> Path:
        path = folder / f"{kind}-{head.layer}-{head.quantisation}.gguf"
        if not path.exists():
            head.write(path, self.rows)
        return path

    def with_previous(self, found: Sequence[Predictions], split: str) -> list[Predictions]:
        """The same with stability: each boundary's states against those of the boundary before in the list."""
        chained = list(found[:1])
        for before, now in zip(found, found[1:], strict=False):
            parts = []
            for text in self.splits[split]:
                rows = text.target_rows
                parts.append(cosines(text.states(now.layer)[rows], text.states(before.layer)[rows]))
            chained.append(replace(now, values={**now.values, "stability": np.concatenate(parts)}))
        return chained

    # ── choices, certificates, pack ─────────────────────────────────────────────────────────────────────────────────

    def _finish(self, hear: Callable[[int, str], Predictions], made: findings.Trained | None) -> Calibrated:
        """`hear` gives what the head behind a layer says of a split; `made` is None for the model's own head."""
        said = {split: [hear(layer, split) for layer in self.layers] for split in ("tune", "test")}
        self.reporter.say("measuring times on this device")
        costs = self._costs(made)
        self.reporter.say("choosing signal and boundaries")
        choice, *_ = self._choose(costs, said["tune"])
        chosen = self._chosen(choice)
        places = [self.layers.index(layer) for layer in chosen]
        again, signal, tune, gates, askers = self._choose(costs.keep(places), [said["tune"][i] for i in places])
        said["certify"] = [hear(layer, "certify") for layer in chosen]
        said["test of chosen"] = [said["test"][i] for i in places]
        held, test = (
            [p.with_gate(gate) for p, gate in zip(self.with_previous(found, s), gates, strict=True)]
            for s, found in (("certify", said["certify"]), ("test", said["test of chosen"]))
        )
        held, met = self._asked(held, askers, "certify"), self._asked(test, askers, "test")
        self.reporter.say("certifying thresholds")
        rungs = self._certify(tune, held)
        all_test = self.with_previous(said["test"], "test")
        self.notes += shared.notes(all_test) if made is None else []
        self.reporter.say("comparing")
        report = findings.report_of(
            self,
            findings.Found(
                made,
                said["tune"],
                all_test,
                test,
                met,
                rungs,
                costs,
                choice,
                again,
                signal,
                chosen,
            ),
        )
        verify = dict(zip(again.verified.layers, again.verified.thresholds, strict=True)) if again.verified else {}
        pack = ExitPack(
            name=self.name,
            model=self.identity,
            library=this_library(),
            boundaries=chosen,
            shortlist=self.shortlist if made else np.empty(0, np.int32),
            cluster_starts=self.starts if made else np.empty(0, np.int32),
            heads=tuple(made.packed[i] for i in places) if made else (),
            gates=tuple(gates),
            rungs=tuple(rungs),
            default_signal=signal,
            verify_thresholds=tuple(verify.get(layer, 0.0) for layer in chosen),
            report=report,
            askers=tuple(askers),
        )
        return Calibrated(pack, self.corpus.folder, tuple(self.notes))

    def _choose(
        self, costs: Costs, found: Sequence[Predictions]
    ) -> tuple[Choice, str, list[Predictions], list[Gate], list[Asker]]:
        """Plans by the best signal, what they rest on: that signal, predictions with gates as asked, gates, askers."""
        gated, gates = self._gated(found, "tune")
        signal = best_signal(gated)
        if self.trainer == "none":  # the model's own head runs with its slice, asked or not
            columns = [p.uncertainty(signal) for p in gated]
            choice = choose(costs, gated, columns, _CHOOSE_AT, signal=signal, seed=self.options.seed)
            return choice, signal, gated, gates, []
        states = [self._states(p.layer, "tune") for p in gated]
        exits = [likely_exits(p.uncertainty(signal), ~p.agree, _ASK_AT) for p in gated]
        askers = [fit_asker(s, e) for s, e in zip(states, exits, strict=True)]
        marks = [a.marks(s) for a, s in zip(askers, states, strict=True)]
        asked = [p.asked(m) for p, m in zip(gated, marks, strict=True)]
        shares = [float(m.mean()) for m in marks]
        columns = [p.uncertainty(signal) for p in asked]
        choice = choose(costs.asking(shares), asked, columns, _CHOOSE_AT, signal=signal, seed=self.options.seed)
        return choice, signal, asked, gates, askers

    def _states(self, layer: int, split: str) -> NDArray[np.float16]:
        """States (m, n_embd) behind `layer` of a split's targets."""
        return np.concatenate([text.states(layer)[text.target_rows] for text in self.splits[split]])

    def _asked(self, found: Sequence[Predictions], askers: Sequence[Asker], split: str) -> list[Predictions]:
        """The same where heads are asked only where an exit is likely; always without askers."""
        if not askers:
            return list(found)
        return [p.asked(a.marks(self._states(p.layer, split))) for p, a in zip(found, askers, strict=True)]

    def _gated(self, found: Sequence[Predictions], split: str) -> tuple[list[Predictions], list[Gate]]:
        """Predictions with stability and a gate's probability, by a gate fitted to other prompts; and the gates."""
        chained = self.with_previous(found, split)
        gates = [fit_gate(p.values, ~p.agree, p.prompts) for p in chained]
        with_gates = []
        for p, gate in zip(chained, gates, strict=True):
            held = held_out_probabilities(p.values, ~p.agree, p.prompts)
            # a split of one prompt has no other
            column = held if np.isfinite(held).any() else gate.probabilities(p.values)
            with_gates.append(replace(p, values={**p.values, "gate": column}))
        return with_gates, gates

    def _costs(self, made: findings.Trained | None) -> Costs:
        """Times of slices and heads; None: of the model's own head."""

        def make() -> Any:
            with ExitStack() as stack:
                heads = None
                if made is not None:
                    paths = [self._head_file(head, self.trainer, made.folder) for head in made.packed]
                    heads = [stack.enter_context(HeadContext(path, 128, self.options.n_threads)) for path in paths]
                return asdict(measure_costs(self.model, self.layers, heads, n_threads=self.options.n_threads))

        depends = {
            "device": [platform.node(), platform.machine(), platform.processor()],
            "threads": self.options.n_threads,
            "shapes": [asdict(head.shape) for head in made.packed] if made else [],
            "quantisation": self.options.quantisation if made else "",
        }
        found = self.stages.record("costs", depends, make)
        return Costs(
            layers=tuple(found["layers"]),
            slices=tuple(map(tuple, found["slices"])),
            verify=tuple(found["verify"]),
            heads=tuple(map(tuple, found["heads"])),
            full=tuple(found["full"]),
        )

    def _chosen(self, choice: Choice) -> tuple[int, ...]:
        """The boundaries that pay; where none does, those that lose least, and the report says so."""
        if not choice.boundaries():
            self.notes.append("no boundary pays on this device: full depth is as fast")
        if self.options.pack_all:
            return self.layers
        if choice.boundaries():
            return choice.boundaries()
        plans = [plan for plan in (choice.exit, choice.verified) if plan is not None]
        return min(plans, key=lambda plan: plan.pace.ms_per_token).layers if plans else self.layers[-1:]

    def _certify(self, tune: Sequence[Predictions], held: Sequence[Predictions]) -> list[Rung]:
        rungs: list[Rung] = []
        for i, signal in enumerate(SIGNALS):
            if not any(signal in p.signals for p in tune):
                continue
            columns = [p.uncertainty(signal) for p in tune], [p.uncertainty(signal) for p in held]
            rungs += certify(
                signal,
                (tune, columns[0]),
                (held, columns[1]),
                bounds=self.options.bounds,
                delta=self.options.delta,
                seed=self.options.seed,
            )
            self.reporter.progress(i + 1, len(SIGNALS))
        return rungs


def best_signal(found: Sequence[Predictions]) -> str:
    """The signal that tells best, on average over boundaries, where full depth disagrees; one that all have."""

    def quality(signal: str) -> float:
        values = [_auroc(p.uncertainty(signal), ~p.agree) for p in found]
        return float(np.mean(values))

    common = [signal for signal in SIGNALS if all(signal in p.signals for p in found)]
    return max(common, key=quality)


def _auroc(uncertainty: Floats, wrong: Any) -> float:
    found = auroc(wrong, np.nan_to_num(uncertainty, nan=np.inf))
    return 0.5 if np.isnan(found) else found


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.tokens} {prompt.temperature} {prompt.answered};".encode())
    return digest.hexdigest()
