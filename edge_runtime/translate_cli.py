"""The verb `edge-run translate`. It imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .models import DEMO_MODEL
from .options import JsonOption, ModelOption, QuietOption, ThreadsOption, VerboseOption

TRANSLATE_EPILOG = """\b
Examples:
  edge-run translate --from en --to fr --model ./model.gguf letter.txt --out letter.fr.txt
  edge-run translate --from en --to de --model ./model.gguf --glossary terms.tsv film.srt --out film.de.srt
  edge-run translate --from es --to en --model ./model.gguf --wrapped notes.txt
  some-captions | edge-run translate --from en --to fr --model ./model.gguf --latency 1500
  edge-run translate --from en --to fr --model ./model.gguf --json letter.txt | jq .target

\b
Any instruct model will do. The demo model, which is taken without --model, has 135 million parameters and translates
badly: it shows how things work, not how good they can be.
Texts keep their layout: indentation, bullets, empty lines, line ends. Subtitles keep numbers, times and tags.
Without a file, each line from the pipe is translated when it comes. --latency counts from when a line is taken up;
what there is of it then is cut at a word's end and marked with …, and the summary says how many lines that were.
A glossary is TSV (term, tab, translation; or the term alone, to keep it as it is) or TOML (keep = [...] and a table
[terms]). Terms without capitals are found in any case. A translation that lacks one is asked for a second time; if it
lacks it still, that is reported.
Sentences translated before, with the same model and terms, come from the translation memory. So, interrupted, the same
command goes on where it was.
What is wrong with a line goes to stderr with its number. With --json: an object per sentence, then {"summary": ...}."""


def translate(
    source: Annotated[str, typer.Option("--from", help="Language of the text: en, de, French, …", metavar="LANGUAGE")],
    target: Annotated[str, typer.Option("--to", help="Language to translate to.", metavar="LANGUAGE")],
    file: Annotated[
        Path | None, typer.Argument(help="A text, or subtitles (.srt); - or nothing: lines from a pipe.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="stdout")] = None,
    form: Annotated[
        Literal["auto", "text", "srt"], typer.Option("--format", help="What the text is; auto: by the file's name.")
    ] = "auto",
    wrapped: Annotated[
        bool,
        typer.Option("--wrapped", help="Paragraphs go over several lines: translate them whole, and fill them anew."),
    ] = False,
    glossary: Annotated[Path | None, typer.Option("--glossary", "-g", help="TSV or TOML file of terms.")] = None,
    memory: Annotated[
        Path | None, typer.Option("--memory", help="The translation memory.", show_default="in the cache directory")
    ] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Neither use nor keep translations.")] = False,
    latency: Annotated[
        float | None, typer.Option("--latency", help="Lines from a pipe: time for each.", metavar="MS")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    mode: Annotated[
        Literal["auto", "full", "exit", "verified", "margin"],
        typer.Option(help="How the model runs, as in `generate`; auto, full and verified give the same translations."),
    ] = "auto",
    pack: Annotated[
        str | None, typer.Option(help="Name or path of an exit pack: trained heads for the model.", metavar="PACK")
    ] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", min=0, max=2**31 - 1, help="Tokens the context holds.", show_default="2048 at most")
    ] = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Translate a text, subtitles, or lines as they come."""
    from .translate_run import TranslateRequest, translate_text

    translate_text(
        TranslateRequest(
            source=source,
            target=target,
            model=model,
            file=file,
            out=out,
            form=form,
            wrapped=wrapped,
            glossary=glossary,
            memory=memory,
            use_memory=not no_memory,
            latency_ms=latency,
            json=as_json,
            mode=mode,
            pack=pack,
            ctx=ctx,
            threads=threads,
            quiet=quiet,
            verbose=verbose,
        )
    )
