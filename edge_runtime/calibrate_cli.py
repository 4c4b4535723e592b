"""The verb `edge-run calibrate`. It imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .errors import UsageError
from .models import DEMO_MODEL
from .options import JsonOption, ModelOption, QuietOption, ThreadsOption, VerboseOption

CALIBRATE_EPILOG = """\b
Examples:
  edge-run calibrate --model ./model.gguf --budget 1h
  edge-run calibrate --model ./model.gguf --text questions.txt --text manual.jsonl --out mine.exits.gguf --png mine.png
  edge-run calibrate --text prompts.txt --no-builtin --boundaries 16,20 --max-disagreement 0.02
  edge-run calibrate --budget 10m --trainer ridge --json | jq .plans
  edge-run calibrate --model ./layerskip.gguf --head shared
  edge-run calibrate --probe --encoder minilm-l6 --text questions.txt

\b
The model answers many prompts; heads behind some of its layers learn to say what it would say; what they may decide
alone is certified on prompts held out. The report goes to stdout: agreement, signals, certificates, times.
--text: one prompt per line, or .jsonl with {"prompt": ...} to be answered or {"text": ...} to be read. Longer passages
are read, too: heads learn from them, but nothing is certified on them.
--head shared is for checkpoints trained to exit through their own output head (LayerSkip): nothing is trained, the pack
holds certificates alone, and nearly all prompts certify. On other models that head agrees with full depth too seldom.
All stages are kept in the cache: interrupted, the same command goes on where it was, on another machine, too, if the
folder is copied. --budget is shared out among the stages; without it, 1,500 prompts are answered.
--probe makes no pack, but MODEL.probe.json: from a prompt's own hidden state, it says how likely answers to it are to
differ in meaning, before there is one. Each prompt is answered 8 times; by default, these are 300 questions that come
with the program. Which answers mean the same is decided by their form, or better, with --encoder, by their meaning.
To certify a disagreement of 2% takes some 1,250 prompts even if nothing goes wrong, and more if exits are rare."""

_FOR_PACKS = (
    *("budget", "head", "trainer", "labels", "epochs", "compare", "pack_all", "quantisation", "shortlist"),
    *("max_disagreement", "confidence", "device", "png"),
)
_FOR_PROBES = ("encoder",)
_MAX_TOKENS, _TEMPERATURE = 160, 0.7  # of answers that a pack is made from


def calibrate(
    context: typer.Context,
    model: ModelOption = DEMO_MODEL,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Prompts or texts to learn from; repeatable.", metavar="FILE")
    ] = None,
    builtin: Annotated[
        bool, typer.Option("--builtin/--no-builtin", help="Also ask questions that come with the program.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write.", show_default="MODEL.exits.gguf or .probe.json"),
    ] = None,
    boundaries: Annotated[
        str | None,
        typer.Option(
            help="Layers to try, as in 16,20; those that pay are packed.", show_default="five, by the model's depth"
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for all of it, as in 90s, 10m or 1h.", show_default="none")
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts to use at most.", show_default="1500, or by the budget; all with --probe"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=4, max=4096, help="Of an answer, at most.", show_default="160; 32 with --probe"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of every second answer, the others are greedy; with --probe of all.",
            show_default="0.7; 0.5 with --probe",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make a probe that says of prompts how uncertain answers will be; no pack.")
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(help="With --probe: group answers by meaning, with this sentence encoder.", show_default="none"),
    ] = None,
    head: Annotated[
        Literal["trained", "shared"],
        typer.Option(help="What is to exit. trained: heads of the pack. shared: the model's own output head."),
    ] = "trained",
    trainer: Annotated[
        Literal["torch", "ridge"] | None,
        typer.Option(help="What trains heads; ridge is linear, needs no PyTorch.", show_default="torch if installed"),
    ] = None,
    labels: Annotated[
        Literal["soft", "hard"], typer.Option(help="Learn the model's probabilities, or its likeliest token.")
    ] = "soft",
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the text, at most.")] = 4,
    compare: Annotated[bool, typer.Option("--compare", help="Also train by other ways, and compare them.")] = False,
    pack_all: Annotated[
        bool, typer.Option("--pack-all", help="Pack all boundaries that were tried, whether or not they pay.")
    ] = False,
    quantisation: Annotated[Literal["q4_0", "q8_0"], typer.Option(help="Of the heads.")] = "q4_0",
    shortlist: Annotated[int, typer.Option(min=16, max=2**20, help="Tokens that heads can name.")] = 12_288,
    max_disagreement: Annotated[
        list[float] | None,
        typer.Option(
            "--max-disagreement",
            help="Share of exits that may be wrong, to certify; repeatable.",
            show_default="0.01, 0.02, 0.05, 0.1, 0.2",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the certificates.")] = 0.95,
    cache: Annotated[
        Path | None, typer.Option(help="Where the work is kept.", show_default="the cache directory")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where heads are trained.")] = "cpu",
    png: Annotated[Path | None, typer.Option("--png", help="Draw the report into this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of answers, splits and training.")] = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make an exit pack for a model, or a probe."""
    if probe:
        _refuse(context, _FOR_PACKS, "is for exit packs", "or --probe")
        from .calibrate_probe import ProbeRequest, calibrate_probe

        calibrate_probe(
            ProbeRequest(
                model=model,
                texts=tuple(text or ()),
                builtin=builtin,
                out=out,
                boundaries=boundaries,
                prompts=prompts,
                max_tokens=max_tokens,
                temperature=temperature,
                encoder=encoder,
                cache=cache,
                seed=seed,
                threads=threads,
                json=as_json,
                quiet=quiet,
                verbose=verbose,
            )
        )
        return
    _refuse(context, _FOR_PROBES, "is for probes", "or add --probe")
    from .calibrate_run import CalibrateRequest, calibrate_model

    calibrate_model(
        CalibrateRequest(
            model=model,
            texts=tuple(text or ()),
            builtin=builtin,
            out=out,
            boundaries=boundaries,
            budget=budget,
            prompts=prompts,
            max_tokens=_MAX_TOKENS if max_tokens is None else max_tokens,
            temperature=_TEMPERATURE if temperature is None else temperature,
            head=head,
            trainer=trainer,
            labels=labels,
            epochs=epochs,
            compare=compare,
            pack_all=pack_all,
            quantisation=quantisation,
            shortlist=shortlist,
            max_disagreement=tuple(max_disagreement or ()),
            confidence=confidence,
            cache=cache,
            device=device,
            png=png,
            seed=seed,
            threads=threads,
            json=as_json,
            quiet=quiet,
            verbose=verbose,
        )
    )


def _refuse(context: typer.Context, names: tuple[str, ...], why: str, otherwise: str) -> None:
    """Raise UsageError for options, of these names, that were given and mean nothing here."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {why}", f"leave out {option}, {otherwise}")
