"""Options about how sure an answer is, as Typer sees them, and what they come to."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .errors import ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from .encoder import SentenceEncoder
    from .resolve import RunOptions
    from .semantic import ConfidenceSettings

DEFAULT_SAMPLES, MAX_SAMPLES = 8, 64
SAMPLE_TOKENS = 32


@dataclass(frozen=True)
class ConfidenceArguments:
    """How sure an answer is to be: options of `generate`, one field each."""

    confidence: Annotated[
        bool,
        typer.Option(
            "--confidence",
            help="Say how sure the model is, for questions with a short answer: more answers to the same prompt are "
            "drawn, at temperature 0.5, and compared. Of each, the first line counts, at most 32 tokens. 1: all say "
            "the same, 0: no two do. Of long answers it knows only how they begin, and a model can be sure and wrong.",
        ),
    ] = False
    abstain_above: Annotated[
        float | None,
        typer.Option(
            "--abstain-above",
            help="Give no answer, and exit with code 3, if the normalised semantic entropy of the samples is above "
            "this, or most of them are empty. 0: all say the same, 1: no two do; it is 1 - confidence. Includes "
            "--confidence, which is then found first.",
            metavar="ENTROPY",
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", help="With --confidence: draw so many at most, 8 at once, until it is clear.", show_default="8"
        ),
    ] = None
    same_by: Annotated[
        Literal["form", "meaning", "entailment"] | None,
        typer.Option(
            "--same-by",
            help="With --confidence: which samples say the same. form: those spelt alike, but for case, articles and "
            "punctuation. meaning: those that a sentence encoder finds near. entailment: those of which the model says "
            "that each follows from the other, which takes many passes more.",
            show_default="meaning if an encoder is built, else form",
        ),
    ] = None
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            help="Name or path of a sentence encoder (.onnx), for --same-by meaning. minilm-l6 knows English.",
            show_default="minilm-l6",
            metavar="ENCODER",
        ),
    ] = None
    show_clusters: Annotated[
        bool, typer.Option("--show-clusters", help="With --confidence: list what the samples say, on stderr.")
    ] = False


@dataclass(frozen=True, slots=True)
class ConfidencePlan:
    """What is to be found out about an answer, checked before the model is loaded."""

    settings: ConfidenceSettings
    same_by: str
    encoder: SentenceEncoder | None  # for same_by "meaning"
    abstain_above: float | None  # normalised semantic entropy
    show_clusters: bool
    why: str  # how samples are compared, and why so, if nobody said


def plan_confidence(arguments: ConfidenceArguments, options: RunOptions, max_tokens: int) -> ConfidencePlan | None:
    """What `arguments` ask for in a run with `options`; None if nothing. Opens the encoder if one is needed.

    Raises UsageError for what cannot be meant, and as `SentenceEncoder` does.
    """
    if not arguments.confidence and arguments.abstain_above is None:
        for name in ("samples", "same_by", "encoder", "show_clusters"):
            if getattr(arguments, name) not in (None, False):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} means nothing without --confidence", "add --confidence")
        return None
    from .encoder import DEFAULT_ENCODER, SentenceEncoder
    from .semantic import ConfidenceSettings, SampleSettings

    above, n_samples = arguments.abstain_above, arguments.samples
    if above is not None and not 0 <= above <= 1:
        raise UsageError(f"{above} is no normalised semantic entropy", "give one from 0 to 1: --abstain-above 0.5")
    n_samples = DEFAULT_SAMPLES if n_samples is None else n_samples
    if n_samples == 1:
        raise UsageError("one sample cannot agree with another", "give --samples 2 or more")
    if not 2 <= n_samples <= MAX_SAMPLES:
        raise UsageError(f"{n_samples} samples cannot be drawn", f"allowed: --samples from 2 to {MAX_SAMPLES}")
    if arguments.encoder is not None and arguments.same_by not in (None, "meaning"):
        raise UsageError(f"--encoder means nothing with --same-by {arguments.same_by}", "drop one of them")
    same_by: str = arguments.same_by or "meaning"
    why = ""
    if arguments.same_by is None and arguments.encoder is None:
        same_by, why = _usual_same_by(DEFAULT_ENCODER)
    return ConfidencePlan(
        ConfidenceSettings(
            samples=n_samples,
            threshold=None if above is None else 1 - above,
            sampling=SampleSettings(max_tokens=min(SAMPLE_TOKENS, max_tokens), seed=options.sampling.seed),
        ),
        same_by,
        SentenceEncoder(arguments.encoder or DEFAULT_ENCODER) if same_by == "meaning" else None,
        above,
        arguments.show_clusters,
        why,
    )


def _usual_same_by(encoder: str) -> tuple[str, str]:
    """How samples are compared if nobody says so, and a note that says why."""
    from .encoder.libraries import USE_HINT
    from .encoder.recipes import find_encoder

    try:
        find_encoder(encoder)
    except ModelNotFoundError as error:
        return "form", f"note: samples are compared by their form, since {error.message}: {error.hint}"
    for library in ("onnxruntime", "tokenizers"):
        if importlib.util.find_spec(library) is None:
            return "form", f"note: samples are compared by their form, since there is no {library}: {USE_HINT}"
    return "meaning", f"note: samples are compared by meaning, with the encoder {encoder}"
