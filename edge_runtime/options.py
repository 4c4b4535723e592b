"""The options that several verbs share, as Typer sees them and as the runtime wants them.

Nothing here imports numpy or llama_cpp before a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import platform
import secrets
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import BoundaryError, UsageError
from .models import DEMO_MODEL
from .profiles import choose_profile, run_defaults, usable_cores
from .sensors.machine import Machine

if TYPE_CHECKING:
    from .resolve import RunOptions

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Name or path of a GGUF model.", metavar="MODEL")]
BoundariesOption = Annotated[
    str | None,
    typer.Option("--boundaries", help="Layers after which a token may leave, as in 8,16.", show_default="by the model"),
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, max=512, help="CPU threads; 0: all physical cores.", show_default="0")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but results and errors.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's own log.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Device profile: a name, or a .toml file.", show_default="the one that fits"),
]


@dataclass(frozen=True)
class RunArguments:
    """How a model answers: the options of `generate` and `chat`, one field each."""

    model: ModelOption = DEMO_MODEL
    mode: Annotated[
        Literal["auto", "full", "exit", "verified", "margin"],
        typer.Option(
            help="auto: full depth's text, by whatever is fastest here and now. full: every layer. exit: sure tokens "
            "leave early. verified: drafts, checked at full depth. margin: as verified, but where full depth is "
            "undecided its second choice may stand."
        ),
    ] = "auto"
    draft: Annotated[
        Literal["ngram", "heads"] | None,
        typer.Option(
            help="What proposes drafts, in modes verified and margin. ngram: the text so far. heads: guesses at "
            "boundaries.",
            show_default="ngram; heads if any of their options is given",
        ),
    ] = None
    theta: Annotated[
        float | None,
        typer.Option(
            help="In mode margin: a second choice stands if it is more than this times as likely as the first.",
            show_default="0.9",
            metavar="RATIO",
        ),
    ] = None
    boundaries: BoundariesOption = None
    threshold: Annotated[
        str | None,
        typer.Option(
            help="A token may leave where its guess is less uncertain than this, by the signal; one number, or one per "
            "boundary, as in 0.2,0.5. Entropies are in nats. 0: never, inf: always.",
            show_default="the pack's, or 0.3",
            metavar="BOUND",
        ),
    ] = None
    pack: Annotated[
        str | None, typer.Option(help="Name or path of an exit pack: trained heads for the model.", metavar="PACK")
    ] = None
    head: Annotated[
        Literal["pack", "shared"] | None,
        typer.Option(
            help="What guesses at a boundary. pack: the exit pack's heads. shared: the model's own output head.",
            show_default="pack if one is given",
        ),
    ] = None
    signal: Annotated[
        Literal["entropy", "top1", "margin", "clusters", "stability", "gate"] | None,
        typer.Option(help="What a threshold bounds.", show_default="the pack's, or entropy"),
    ] = None
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Exits may disagree with full depth by this share, which the pack certifies: in mode exit, and in "
            "mode auto, where they pay.",
            show_default="0.02 in mode exit",
            metavar="SHARE",
        ),
    ] = None
    cap: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Exited tokens, or drafts, that may wait for their other layers.",
            show_default="8; 15 with n-grams",
        ),
    ] = None
    audit_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of exits compared with full depth, in mode exit.")
    ] = 0.1
    probe: Annotated[
        str | None,
        typer.Option(
            help="With exits: answer prompts at full depth that this probe finds uncertain, before the first token; "
            "`edge-run calibrate --probe` makes it.",
            metavar="FILE",
        ),
    ] = None
    probe_limit: Annotated[
        float | None,
        typer.Option(
            help="With --probe: a prompt is uncertain from this probability on that its answers differ in meaning.",
            show_default="0.5",
            metavar="P",
        ),
    ] = None
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Length of an answer at most.")] = 512
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None
    stop: Annotated[list[str], typer.Option(help="End before this text; repeatable.", metavar="TEXT")] = field(
        default_factory=list
    )
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; 0: all.")] = 40
    top_p: Annotated[float, typer.Option(help="… from the likeliest that make up this probability.")] = 0.95
    min_p: Annotated[float, typer.Option(help="… from those at least this likely, relative to the likeliest.")] = 0.05
    repeat_penalty: Annotated[float, typer.Option(help="Above 1, recent tokens become less likely.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="Of the sampling.", show_default="random")] = None
    ctx: Annotated[
        int, typer.Option("--ctx", min=0, max=2**31 - 1, help="Tokens the context holds.", show_default="2048 at most")
    ] = 0
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Prompt tokens computed at once.", show_default="by the device, or 128"),
    ] = None
    threads: Annotated[
        int,
        typer.Option(
            "--threads", min=0, max=512, help="CPU threads; 0: by the device, or all physical cores.", show_default="0"
        ),
    ] = 0
    device: DeviceOption = None
    kv_type: Annotated[Literal["f16", "f32", "q8_0"], typer.Option(help="Storage of the KV cache.")] = "f16"
    flash_attn: Annotated[
        bool | None, typer.Option("--flash-attn/--no-flash-attn", help="Flash attention.", show_default="if it can")
    ] = None
    kernels: Annotated[
        Literal["edge", "stock"],
        typer.Option(
            help="What multiplies weights. edge: a token's sums are the same in every batch, and small batches cost "
            "little more than one token. stock: llama.cpp's own."
        ),
    ] = "edge"
    show_exits: Annotated[bool, typer.Option("--show-exits", help="Mark each token with the depth it is from.")] = False
    quiet: QuietOption = False
    verbose: VerboseOption = False


def expand_arguments(verb: Callable[..., None]) -> Callable[..., None]:
    """Let Typer see each field of `verb`'s parameters that are dataclasses as an option of its own."""
    hints = _annotations(verb)
    grouped: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    fields = {name: _field_parameters(group) for name, group in grouped.items()}
    own = [p.replace(annotation=hints[n]) for n, p in inspect.signature(verb).parameters.items() if n not in grouped]

    @functools.wraps(verb)
    def expanded(**values: Any) -> None:
        groups = {
            name: group(**{field.name: values.pop(field.name) for field in fields[name]})
            for name, group in grouped.items()
        }
        verb(**values, **groups)

    del expanded.__wrapped__  # or Typer would look through it
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters += [field for name in grouped for field in fields[name]]
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass, as parameters of a function."""
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
        for f in dataclasses.fields(group)
    ]


def _annotations(verb: Callable[..., None]) -> dict[str, Any]:
    """The parameters' annotations, without the Optional that Python 3.10 puts around those whose default is None."""
    hints = typing.get_type_hints(verb, include_extras=True)
    return {
        name: next((part for part in typing.get_args(hint) if typing.get_origin(part) is Annotated), hint)
        for name, hint in hints.items()
    }


def _default(argument: dataclasses.Field[Any]) -> Any:
    return argument.default if argument.default is not dataclasses.MISSING else []


def run_options(arguments: RunArguments) -> RunOptions:
    """What the runtime is to do, by the device's profile where nothing is said.

    Raises UsageError for values that cannot be meant, and for an unknown device.
    """
    from .exits.prompt_policy import DEFAULT_LIMIT
    from .native import KvType
    from .resolve import RunOptions
    from .types import DEFAULT_THETA, Mode, SamplingSettings

    mode = Mode(arguments.mode)
    for name in ("threshold", "head", "signal", "max_disagreement"):
        if mode is Mode.FULL and getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} means nothing in mode full", "add --mode exit or --mode verified")
    if arguments.max_disagreement is not None and mode.verifies:
        raise UsageError(
            f"--max-disagreement means nothing in mode {mode.value}: full depth is asked about all of it", "drop it"
        )
    if arguments.draft is not None and not mode.verifies:
        raise UsageError(f"--draft means nothing in mode {mode.value}", "add --mode verified or --mode margin")
    if arguments.theta is not None and mode is not Mode.MARGIN:
        raise UsageError(f"--theta means nothing in mode {mode.value}", "add --mode margin")
    if arguments.probe_limit is not None and arguments.probe is None:
        raise UsageError("--probe-limit means nothing without --probe", "add --probe FILE")
    seed = arguments.seed
    if seed is None:
        # greedy choices need none; a random one is reported, so that the run can be repeated
        seed = secrets.randbelow(2**32 - 1) if arguments.temperature > 0 else 0
    profile = choose_profile(Machine(), platform.system(), platform.machine(), arguments.device).profile
    defaults = run_defaults(profile, usable_cores())
    return RunOptions(
        model=arguments.model,
        mode=mode,
        draft=arguments.draft,
        theta=DEFAULT_THETA if arguments.theta is None else arguments.theta,
        boundaries=parse_boundaries(arguments.boundaries),
        thresholds=None if arguments.threshold is None else parse_thresholds(arguments.threshold),
        pack=arguments.pack,
        head=arguments.head,
        signal=arguments.signal,
        max_disagreement=arguments.max_disagreement,
        n_ctx=arguments.ctx,
        n_batch=arguments.batch or defaults.n_batch,
        n_threads=arguments.threads or defaults.n_threads,
        kv_type=KvType(arguments.kv_type),
        flash_attention=arguments.flash_attn,
        kernels=arguments.kernels,
        sampling=SamplingSettings(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repeat_penalty=arguments.repeat_penalty,
            seed=seed,
        ),
        cap=arguments.cap,
        audit_rate=arguments.audit_rate,
        probe=arguments.probe,
        probe_limit=DEFAULT_LIMIT if arguments.probe_limit is None else arguments.probe_limit,
    )


def start_library(*, verbose: bool) -> None:
    """Load llama.cpp as a program wants it: its log shown or not, and last words instead of a core dump."""
    from .native import exit_on_abort, load

    load().log.verbose = verbose
    exit_on_abort()


def parse_boundaries(text: str | None) -> tuple[int, ...] | None:
    """`8,16` → (8, 16); None stays. Raises BoundaryError; whether they fit the model is checked later."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        hint = "separate them by commas: --boundaries 8,16"
        raise BoundaryError(f"boundaries '{text}' are not layer numbers", hint) from None


def parse_thresholds(text: str) -> tuple[float, ...]:
    """`0.2,inf` → (0.2, inf). Raises UsageError for what bounds no uncertainty."""
    from .types import Thresholds

    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"threshold '{text}' is not a number", "give numbers: --threshold 0.5, or 0.2,0.5") from None
    return Thresholds(values).exit_below
