"""The verbs `edge-run labels …` and `edge-run moderate`. They import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .models import DEMO_MODEL
from .options import JsonOption, ModelOption, QuietOption, ThreadsOption, VerboseOption

labels_app = typer.Typer(
    help="Sort messages by labels, each with as few layers as it needs.",
    epilog="""\b
Examples:
  edge-run labels train --data tickets.csv --text body --label topic --out topics.labels.gguf
  edge-run labels eval --pack topics.labels.gguf --data later.csv --text body --label topic
  edge-run labels run --pack topics.labels.gguf --file new.txt
  edge-run labels run --pack moderation "You are an idiot."
  edge-run labels show moderation

\b
A label pack holds what was learned from labelled messages, in at most 2 MB beside the model.""",
    rich_markup_mode=None,
)

TextArguments = Annotated[
    list[str] | None,
    typer.Argument(
        help="Messages, one per argument; - or nothing: lines from a pipe.", metavar="TEXT", show_default=False
    ),
]
FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read messages from a file, one per line; -: from stdin.")
]
FollowOption = Annotated[
    Path | None, typer.Option("--follow", help="Read messages from a log file as they are written, one per line.")
]
FromStartOption = Annotated[
    bool, typer.Option("--from-start", help="With --follow: also the lines that are there already.")
]
UnsureBelowOption = Annotated[
    float | None,
    typer.Option(
        "--unsure-below",
        min=0.0,
        max=1.0,
        help="A label less probable than this becomes 'unsure'.",
        show_default="by the pack",
    ),
]
UnsureUnfamiliarOption = Annotated[
    bool,
    typer.Option("--unsure-unfamiliar", help="So does the label of a message unlike the training messages."),
]
NoNgramsOption = Annotated[
    bool, typer.Option("--no-ngrams", help="Let no message leave before the network, by its words alone.")
]

_OUTPUT = """\b
Each message gives one line, its columns separated by tabs: label, probability, layers computed, remarks or -, and the
beginning of the message. Layer 0 is before the network: words alone decided. Remarks: the likeliest label where the
answer is unsure, and whether the message is unlike the training messages. The summary goes to stderr.
With --json: one object per message, then {"summary": ...}.
Lines end at a newline and are read as UTF-8; empty ones are left out. Lines from a pipe are answered as they come.
--follow goes on until Ctrl-C, and through rotation and truncation of the file."""


@labels_app.command(
    "run",
    epilog=f"""\b
Examples:
  edge-run labels run --pack moderation "You are an idiot." "See you tomorrow."
  edge-run labels run --pack ./topics.labels.gguf --file messages.txt > labelled.tsv
  edge-run labels run --pack moderation --follow chat.log --unsure-below 0.8
  cat messages.txt | edge-run labels run --pack moderation | cut -f 1 | sort | uniq -c

{_OUTPUT}""",
)
def run_verb(
    pack: Annotated[
        str, typer.Option("--pack", "-p", help="Path of a label pack, or name of a bundled one.", metavar="PACK")
    ],
    texts: TextArguments = None,
    file: FileOption = None,
    follow: FollowOption = None,
    from_start: FromStartOption = False,
    model: ModelOption = DEMO_MODEL,
    as_json: JsonOption = False,
    unsure_below: UnsureBelowOption = None,
    unsure_unfamiliar: UnsureUnfamiliarOption = False,
    no_ngrams: NoNgramsOption = False,
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Label messages from arguments, a file, a pipe or a growing log."""
    from .labels_run import RunRequest, run_labels

    run_labels(
        RunRequest(
            pack=pack,
            model=model,
            texts=tuple(texts or ()),
            file=file,
            follow=follow,
            from_start=from_start,
            json=as_json,
            unsure_below=unsure_below,
            unsure_unfamiliar=unsure_unfamiliar,
            use_ngrams=not no_ngrams,
            threads=threads,
            quiet=quiet,
            verbose=verbose,
        )
    )


@labels_app.command(
    "train",
    epilog="""\b
Examples:
  edge-run labels train --data tickets.csv --text body --label topic
  edge-run labels train --data spam.jsonl.gz --text text --label is_spam --max-error 0.02 --out spam.labels.gguf
  edge-run labels train --data tweets.tsv --text tweet --label class --boundaries 4,8 --no-full-depth --max-rows 4000

\b
The file: CSV or TSV with a header, or JSONL; each also as .gz. It is streamed; --max-rows of its messages stay, rare
labels whole. Of these, 70% train the stages, 15% certify the thresholds, 15% test; duplicates are left out before.
Most of the time goes into hidden states, which are kept on disk: interrupted, the same command goes on where it was.
The pack's thresholds are set as bold as can be certified:
  --max-loss 0.01    accuracy at most 0.01 below that of the whole model (needs full depth computed)
  --max-error 0.05   of the labels given, at most 0.05 wrong; to keep that, the pack may answer 'unsure'
  --max-harm 0.005   and, whatever could be certified, no bolder than this: early exits are compared with the last stage
If nothing can be certified, it says so, and how many messages are missing.""",
)
def train_verb(
    data: Annotated[Path, typer.Option("--data", "-d", help="Labelled messages: CSV, TSV or JSONL, also .gz.")],
    text: Annotated[str, typer.Option("--text", help="Column with the message.", metavar="COLUMN")],
    label: Annotated[str, typer.Option("--label", help="Column with the label.", metavar="COLUMN")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The pack to write.", show_default="NAME.labels.gguf")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Text before each message, as the model is to see it, special tokens and all.",
            show_default="a question naming the labels, in the model's chat template",
            metavar="TEXT",
        ),
    ] = None,
    boundaries: Annotated[
        str | None,
        typer.Option(
            help="Layers to try as exits, as in 4,8,12; those that gain too little are dropped.",
            show_default="by the model",
        ),
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option("--max-loss", help="Accuracy that may be lost.", show_default="0.01")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Error rate that is allowed.", show_default="no bound")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.95,
    max_harm: Annotated[
        float,
        typer.Option("--max-harm", min=0.0, max=1.0, help="Share of early exits that may be lost by it, in training."),
    ] = 0.005,
    objective: Annotated[
        Literal["accuracy", "macro-f1"] | None,
        typer.Option(help="What labels are chosen for.", show_default="macro-f1 if some label is rare"),
    ] = None,
    full_depth: Annotated[
        bool,
        typer.Option("--full-depth/--no-full-depth", help="Also compute the whole model, to compare with."),
    ] = True,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Messages to use at most.")] = 20_000,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=8192, help="Of a message; what is longer is cut at its end.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice and the split of messages.", min=0)] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Where hidden states are kept.", show_default="the cache directory")
    ] = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a label pack from labelled messages."""
    from .labels_train import TrainRequest, train_labels

    train_labels(
        TrainRequest(
            data=data,
            text=text,
            label=label,
            model=model,
            out=out,
            instruction=instruction,
            boundaries=boundaries,
            objective=objective,
            max_loss=max_loss,
            max_error=max_error,
            confidence=confidence,
            max_harm=max_harm,
            full_depth=full_depth,
            max_rows=max_rows,
            max_tokens=max_tokens,
            seed=seed,
            cache=cache,
            threads=threads,
            json=as_json,
            quiet=quiet,
            verbose=verbose,
        )
    )


@labels_app.command(
    "eval",
    epilog="""\b
Examples:
  edge-run labels eval --pack moderation --data comments.csv --text comment --label kind
  edge-run labels eval --pack ./topics.labels.gguf --data test.jsonl.gz --text body --label topic --png curves.png
  edge-run labels eval --pack moderation --data test.tsv --text text --label label --no-full-depth --json | jq .cascade

\b
Tables: the quality of each stage alone and of the cascade; precision, recall and AUROC by label; the confusion matrix;
and speed, also against computing all layers of the model for up to 200 of the messages, which is slow.
Macro-F1 is over the labels that the file has. calib. error: how far confidence is from accuracy, on average.
--png draws quality by depth, and accuracy by speed as the thresholds go from no exits to the boldest.
Rows without text or label, and messages seen before, are left out. Also as .gz: .csv, .tsv, .jsonl or .ndjson.""",
)
def eval_verb(
    pack: Annotated[
        str, typer.Option("--pack", "-p", help="Path of a label pack, or name of a bundled one.", metavar="PACK")
    ],
    data: Annotated[Path, typer.Option("--data", "-d", help="File with a labelled message per row.")],
    text: Annotated[str, typer.Option("--text", help="Column with the messages.", metavar="COLUMN")],
    label: Annotated[str, typer.Option("--label", help="Column with the labels.", metavar="COLUMN")],
    model: ModelOption = DEMO_MODEL,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Messages evaluated at most, drawn at random.")
    ] = 5000,
    png: Annotated[Path | None, typer.Option("--png", help="Draw curves into this file.")] = None,
    full_depth: Annotated[
        bool, typer.Option("--full-depth/--no-full-depth", help="Also time all layers of the model.")
    ] = True,
    as_json: JsonOption = False,
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure how good and how fast a label pack is on labelled messages."""
    from .labels_eval import EvalRequest, evaluate_labels

    evaluate_labels(
        EvalRequest(pack, data, text, label, model, max_rows, png, full_depth, as_json, threads, quiet, verbose)
    )


MODERATE_EPILOG = f"""\b
Examples:
  edge-run moderate "You are an idiot." "See you tomorrow."
  edge-run moderate --file messages.txt --unsure-below 0.8 > moderated.tsv
  edge-run moderate --follow /var/log/chat.log --json

\b
The same as `edge-run labels run --pack moderation`; `edge-run labels show moderation` says what the pack is.

{_OUTPUT}"""


def moderate(
    texts: TextArguments = None,
    file: FileOption = None,
    follow: FollowOption = None,
    from_start: FromStartOption = False,
    model: ModelOption = DEMO_MODEL,
    as_json: JsonOption = False,
    unsure_below: UnsureBelowOption = None,
    unsure_unfamiliar: UnsureUnfamiliarOption = False,
    no_ngrams: NoNgramsOption = False,
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Label messages with the bundled moderation pack."""
    from .labels.packs import MODERATION

    run_verb(
        pack=MODERATION,
        texts=texts,
        file=file,
        follow=follow,
        from_start=from_start,
        model=model,
        as_json=as_json,
        unsure_below=unsure_below,
        unsure_unfamiliar=unsure_unfamiliar,
        no_ngrams=no_ngrams,
        threads=threads,
        quiet=quiet,
        verbose=verbose,
    )


@labels_app.command(
    "show",
    epilog="""\b
Examples:
  edge-run labels show moderation
  edge-run labels show ./topics.labels.gguf --json | jq .report""",
)
def show_verb(
    pack: Annotated[str, typer.Argument(help="Path of a label pack, or name of a bundled one.", metavar="PACK")],
    as_json: JsonOption = False,
) -> None:
    """Show what is in a label pack, and how it was trained."""
    from .labels_run import show_pack

    show_pack(pack, as_json=as_json)
