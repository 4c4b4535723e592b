"""The command line: each verb parses its options and calls one function. Verbs import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .calibrate_cli import CALIBRATE_EPILOG, calibrate
from .confidence_options import ConfidenceArguments
from .config_cli import CONFIG_EPILOG, show_config
from .energy_cli import energy_app
from .labels_cli import MODERATE_EPILOG, labels_app, moderate
from .models import DEMO_MODEL
from .models_build_cli import models_app
from .options import (
    BoundariesOption,
    JsonOption,
    ModelOption,
    RunArguments,
    ThreadsOption,
    VerboseOption,
    expand_arguments,
)
from .sensing_options import SensingArguments
from .sensors_cli import SENSORS_EPILOG, sensors
from .serve_cli import SERVE_EPILOG, serve
from .service_cli import service_app
from .translate_cli import TRANSLATE_EPILOG, translate

UNSURE = 3  # exit code of `generate` where it abstains

app = typer.Typer(
    name="edge-run",
    help="Run GGUF language models with a depth that adapts per token.",
    epilog="""\b
Examples:
  edge-run generate "Why is the sky blue?"
  edge-run generate --mode verified --show-exits "Why is the sky blue?"
  edge-run chat --model ./model.gguf
  edge-run moderate "You are an idiot."
  edge-run doctor""",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def app_command() -> Any:
    """The whole command line as one click command."""
    return typer.main.get_command(app)


def exit_code_of(error: Exception) -> int | None:
    """The code of a verb's or `--help`'s wish to exit, None for other exceptions."""
    return error.exit_code if isinstance(error, typer.Exit) else None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edge-run {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""\b
Examples:
  edge-run generate "Why is the sky blue?"
  edge-run generate --temperature 0.8 --seed 7 --max-tokens 200 "A poem on rain"
  edge-run generate --mode exit --boundaries 24,28 --threshold 0.3 --show-exits "Tell me about Paris."
  edge-run generate --raw --stop "." "Once upon a time"
  edge-run generate --json --file prompt.txt | jq .depth
  edge-run generate --energy "Why is the sky blue?"
  edge-run generate --confidence "What is the capital of France?"
  edge-run generate --abstain-above 0.5 "Who wrote Faust?"; [ $? = 3 ] && ask-a-larger-model
  edge-run generate --power-cap 5 --temp-ceiling 70 --explain "Tell me about Paris."
  edge-run generate --target quiet --explain --replay heat.jsonl "Tell me about Paris."
  git diff | edge-run generate --system "Summarise this change."

\b
The answer goes to stdout, all else to stderr. A prompt from a file or pipe loses one newline at its end.
With --json: one object per token, whose texts joined are the answer, then {"summary": ...}, and beside it
"confidence" if that was asked for. Exit code 3: --abstain-above found the model unsure; there is no answer then, and
the summary is null."""
)
@expand_arguments
def generate(
    run: RunArguments,
    sensing: SensingArguments,
    confidence: ConfidenceArguments,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing: from a pipe.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without the chat template.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt."""
    from .completion import Request, complete

    if not complete(Request(prompt, file, raw, as_json), run, sensing, confidence):
        raise typer.Exit(UNSURE)


@app.command(
    epilog="""\b
Examples:
  edge-run chat
  edge-run chat --mode verified --show-exits --system "Answer briefly."
  edge-run chat --energy --temp-ceiling 70 --explain
  printf 'Hello\\nWho was Ada Lovelace?\\n' | edge-run chat --quiet

\b
/help lists what can be typed. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does. What was said stays
computed between turns. When the context is full, the oldest turns are dropped, and a note says so."""
)
@expand_arguments
def chat(run: RunArguments, sensing: SensingArguments) -> None:
    """Talk with a model."""
    from .chat import chat

    chat(run, sensing)


@app.command(
    epilog="""\b
Examples:
  edge-run lens "The capital of France is"
  edge-run lens --boundaries 10,20,25 --png lens.png "The capital of France is"
  edge-run lens --json --file text.txt

\b
A table: for each token of the text, the next token that each depth would choose and its entropy in nats."""
)
def lens(
    text: Annotated[str | None, typer.Argument(help="The text; - or nothing: from a pipe.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the text from a file.")] = None,
    model: ModelOption = DEMO_MODEL,
    boundaries: BoundariesOption = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw a picture into this file.")] = None,
    as_json: JsonOption = False,
    threads: ThreadsOption = 0,
    verbose: VerboseOption = False,
) -> None:
    """Show what each depth of a model would say next."""
    from .lens_view import LensRequest, show_lens

    show_lens(LensRequest(text, file, model, boundaries, threads, png, as_json, verbose))


@app.command(
    epilog="""\b
Examples:
  edge-run doctor
  edge-run doctor --model ./model.gguf
  edge-run doctor --replay day.jsonl
  edge-run doctor --json

\b
Exit code 1 if something needed is missing."""
)
def doctor(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Also check this model.", metavar="MODEL")] = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="Look at this recording of sensors instead of the machine's.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the installation."""
    from .doctor import doctor

    if not doctor(model, as_json=as_json, replay=replay):
        raise typer.Exit(1)


app.command(epilog=CALIBRATE_EPILOG)(calibrate)
app.command(epilog=SENSORS_EPILOG)(sensors)
app.command(epilog=MODERATE_EPILOG)(moderate)
app.command(epilog=SERVE_EPILOG)(serve)
app.command("config", epilog=CONFIG_EPILOG)(show_config)
app.command(epilog=TRANSLATE_EPILOG)(translate)
app.add_typer(models_app, name="models")
app.add_typer(labels_app, name="labels")
app.add_typer(energy_app, name="energy")
app.add_typer(service_app, name="service")
