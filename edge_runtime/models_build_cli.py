"""The verbs `edge-run models` and `edge-run models build`. They import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOption, QuietOption

if TYPE_CHECKING:
    from .encoder.build import Built

models_app = typer.Typer(
    help="List the models that have a name, and where they are looked for; or build an encoder.",
    epilog="""\b
Examples:
  edge-run models
  EDGE_RUNTIME_MODELS=~/models:/srv/models edge-run models --json
  edge-run models build minilm-l6""",
    rich_markup_mode=None,
)


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the models that have a name, and where they are looked for; or build an encoder."""
    from .errors import UsageError
    from .listing import list_models

    if context.invoked_subcommand is None:
        list_models(as_json=as_json)
    elif as_json:
        verb = context.invoked_subcommand
        raise UsageError("--json is given before the verb", f"edge-run models {verb} ... --json")


@models_app.command(
    epilog="""\b
Examples:
  edge-run models build minilm-l6
  edge-run models build minilm-l6 --json | jq .cosines
  edge-run models build minilm-l6 --out ./minilm-l6

\b
minilm-l6 is all-MiniLM-L6-v2, from the weights in a Python package, which must be installed; nothing is downloaded.
It becomes two ONNX files, float32 and int8, which are compared with a plain forward pass on sentences in several
scripts before they are kept. encoder.json beside them says how alike they are, and of which files they were made."""
)
def build(
    name: Annotated[str, typer.Argument(help="The encoder to build: minilm-l6.", metavar="NAME")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder to write to.", show_default="NAME in the user's models"),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Build a sentence encoder for onnxruntime."""
    from . import display
    from .encoder.build import build_encoder
    from .encoder.recipes import RECIPES, home_of
    from .errors import UsageError
    from .progress import reporting

    if name not in RECIPES:
        raise UsageError(f"no encoder is named '{name}'", f"it can be one of: {', '.join(RECIPES)}")
    folder = out.expanduser().absolute() if out is not None else home_of(name)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "name a folder with --out")
    with reporting(quiet=quiet) as reporter:
        built = build_encoder(RECIPES[name], folder, reporter)
    if as_json:
        display.write_json({"folder": str(built.folder), "was_there": built.was_there, **built.record})
        return
    _print(built)
    if built.was_there and not quiet:
        display.tell("it was there already, and whole")


def _print(built: Built) -> None:
    """A line per file; what is compared comes with how alike it is."""
    record = built.record
    for file, said in record["outputs"].items():
        found = record["cosines"].get(file)
        alike = f"  cosine with the reference: {found['least']:.4f} at least, {found['mean']:.4f} mean" if found else ""
        print(f"{file:<14} {said['bytes'] / 2**20:6.1f} MiB{alike}")
    print(f"{record['name']} is in {built.folder}")
