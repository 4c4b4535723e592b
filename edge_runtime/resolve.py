"""What a run is to be, and what that comes to for a model: options, filled in and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .draft import SharedHead
from .errors import ModelUnreadableError, UnsupportedModelError, UsageError
from .exits.pack import ExitPack
from .exits.packs import find_exit_pack
from .exits.probe_file import ProbeFile
from .exits.prompt_policy import DEFAULT_LIMIT, FullDepthIfUncertain
from .exits.settings import exit_settings
from .identity import identify
from .memory import check_need, estimate_need, machine_memory
from .models import DEMO_MODEL, find_model
from .native import ContextOptions, KvType, load, read_header
from .types import (
    DEFAULT_THETA,
    SIGNALS,
    EngineSettings,
    Mode,
    ModelHeader,
    SamplingSettings,
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
POLICIES = {  # of mode auto, and what they are to people; the first is the one to fall back to
    "text": "drafts from the text",
    "heads": "drafts of heads",
    "exit": "exits",
}
_NOT_AUTO = "leave it out, or name the mode with --mode"
HEADS = ("pack", "shared")  # what guesses at a boundary: the exit pack's heads, or the model's own output head


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything that decides how a model runs."""

    model: str = DEMO_MODEL
    mode: Mode = Mode.AUTO
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
    # file of a semantic entropy probe: prompts that it finds uncertain are answered without exits; None: all may exit
    probe: str | None = None
    probe_limit: float = DEFAULT_LIMIT  # probability of high semantic entropy from which on a prompt is uncertain

    @property
    def lossless(self) -> bool:
        """Whether the text is full depth's, token for token."""
        return self.mode in (Mode.FULL, Mode.VERIFIED) or (self.mode is Mode.AUTO and self.max_disagreement is None)


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


def load_pack(wanted: str | None, header: ModelHeader) -> ExitPack | None:
    """The pack of a name or path. Raises PackError if it cannot be used with this model and build."""
    if wanted is None:
        return None
    pack = ExitPack.load(find_exit_pack(wanted))
    pack.check_model(identify(Path(header.path)))
    return pack


def load_probe(options: RunOptions, header: ModelHeader) -> ProbeFile | None:
    """The probe that exits depend on. Raises UsageError where there are none, PackError if it cannot be used."""
    FullDepthIfUncertain(options.probe_limit)  # refuses what is no probability
    if options.probe is None:
        return None
    if options.mode is not Mode.EXIT and (options.mode is not Mode.AUTO or options.max_disagreement is None):
        raise UsageError("--probe decides on exits, and there are none", "use --mode exit, or --max-disagreement")
    probes = ProbeFile.load(Path(options.probe).expanduser())
    probes.check_model(identify(Path(header.path)))
    return probes


def policies_of(
    options: RunOptions, header: ModelHeader, n_ctx: int, pack: ExitPack | None, note: Callable[[str], None]
) -> dict[str, RunOptions]:
    """What may write, by name: in mode auto one or more of POLICIES, the first to begin with; else one, the mode's.

    Fills in what depends on the model and the pack, and checks all that can be checked without loading them. Raises as
    `Runtime` does.
    """
    if options.mode is not Mode.AUTO:
        return {options.mode.value: resolve(options, header, n_ctx, pack, note)}
    for name in ("draft", "head", "boundaries", "signal", "thresholds"):
        if getattr(options, name) is not None:
            option = name.replace("thresholds", "threshold")
            raise UsageError(f"--{option} means nothing in mode auto, which chooses by itself", _NOT_AUTO)
    if options.max_disagreement is not None and pack is None:
        raise UsageError("--max-disagreement needs an exit pack", "give one with --pack")
    # stock's arithmetic depends on how many tokens are in a batch: drafts could change a text at a near-tie
    invariant = options.kernels == "edge"
    alone = dataclasses.replace(options, mode=Mode.VERIFIED if invariant else Mode.FULL, pack=None)
    alone = dataclasses.replace(alone, max_disagreement=None)
    found = {"text": resolve(alone, header, n_ctx, None, note)}
    if pack is not None and invariant:
        heads = dataclasses.replace(options, mode=Mode.VERIFIED, draft="heads", max_disagreement=None)
        found["heads"] = resolve(heads, header, n_ctx, pack, note)
    if options.max_disagreement is not None:
        found["exit"] = resolve(dataclasses.replace(options, mode=Mode.EXIT), header, n_ctx, pack, note)
    return found


def resolve(
    options: RunOptions, header: ModelHeader, n_ctx: int, pack: ExitPack | None, note: Callable[[str], None]
) -> RunOptions:
    draft = resolved_draft(options)
    cap = (NGRAM_CAP if draft == "ngram" else DEFAULT_CAP) if options.cap is None else options.cap
    options = dataclasses.replace(options, n_ctx=n_ctx, draft=draft, cap=cap)
    engine_settings(options)  # refuses what is out of range
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
    thresholds_of(options)
    if options.mode is not Mode.FULL and options.head == "shared":
        shared_head(options, pack)  # refuses what it cannot give
    if options.mode is not Mode.FULL and not options.boundaries:
        raise UsageError(f"mode {options.mode.value} needs a boundary to leave at", "give --boundaries")
    return options


def resolved_draft(options: RunOptions) -> str | None:
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


def shared_head(options: RunOptions, pack: ExitPack | None) -> SharedHead:
    """The model's own output head, with a pack's gates if they are for it. Raises UsageError as SharedHead."""
    gates = dict(zip(pack.boundaries, pack.gates, strict=True)) if pack is not None and pack.shared else {}
    chosen = [gates[layer].probability for layer in options.boundaries or () if layer in gates]
    return SharedHead(options.signal or "entropy", chosen)


def thresholds_of(options: RunOptions) -> Thresholds:
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


def context_options(options: RunOptions) -> ContextOptions:
    return ContextOptions(
        n_ctx=options.n_ctx,
        n_batch=options.n_batch,
        n_threads=options.n_threads,
        flash_attention=options.flash_attention,
        kv_type=options.kv_type,
    )


def engine_settings(options: RunOptions) -> EngineSettings:
    """Raises UsageError for settings out of range."""
    cap = DEFAULT_CAP if options.cap is None else options.cap
    return EngineSettings(options.mode, cap, options.audit_rate, options.sampling.seed, options.theta)


def n_outputs(options: RunOptions) -> int:
    """Rows of logits the last slice gives: verifying and auditing need one per waiting token and one more."""
    return 1 if options.mode is Mode.FULL else engine_settings(options).cap + 1
