"""Moderate a chat log: a label, a confidence and the line, as soon as each line is there.

example:
  tail -f chat.log | python examples/moderate_log.py --hide

Columns are separated by tabs. Lines that the classifier is not sure about, or that are unlike what it was trained
with, are labelled "unsure" and name the likeliest label for a human to decide; they are never hidden.

exit codes: 0 nothing harmful was seen, 3 something was, 1 or 2 an error, 130 interrupted
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from edge_runtime.errors import EdgeError
from edge_runtime.labels import UNSURE, ClassifierOptions, Decision, LabelClassifier, LabelPack, find_pack

HARMLESS = "neither"  # of the pack's labels; the others are "hate" and "offensive"
HARM_SEEN = 3
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Label lines until they end; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=0, help="the log; without it, lines come from stdin")
    parser.add_argument("--hide", action="store_true", help="write [hidden] instead of harmful lines")
    parser.add_argument("--unsure-below", type=float, default=0.6, metavar="P", help="probability (default: 0.6)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all physical cores")
    arguments = parser.parse_args(argv)
    seen: Counter[str] = Counter()
    try:
        options = ClassifierOptions(arguments.unsure_below, unsure_unfamiliar=True, n_threads=arguments.threads)
        pack = LabelPack.load(find_pack("moderation"))
        with (
            open(arguments.file, encoding="utf-8", errors="replace") as lines,
            LabelClassifier(pack, options=options) as classifier,
        ):
            moderate(lines, classifier, hide=arguments.hide, seen=seen)
    except (EdgeError, OSError) as error:  # OSError: the log cannot be read
        tell(f"error: {error}")
        return error.exit_code if isinstance(error, EdgeError) else 1
    except KeyboardInterrupt:
        tell(summary(seen))
        return INTERRUPTED
    tell(summary(seen))
    return HARM_SEEN if any(is_harmful(label) for label in seen) else 0


def moderate(lines: Iterable[str], classifier: LabelClassifier, *, hide: bool, seen: Counter[str]) -> None:
    """Write each line with its label at once, blank ones left out, and count the labels in `seen`.

    The classifier asks its stages in turn and stops at the first that is sure: for most lines, before the network.
    """
    for line in map(str.rstrip, lines):
        if line:
            (decision,) = classifier.predict([line])
            seen[decision.label] += 1
            print(row(decision, line, hide=hide), flush=True)


def row(decision: Decision, line: str, *, hide: bool) -> str:
    """Label, confidence and line, with tabs between them."""
    if decision.unsure:
        line = f"[for a human: {decision.likeliest}?] {line}"
    elif hide and is_harmful(decision.label):
        line = "[hidden]"
    return f"{decision.label}\t{decision.confidence:.2f}\t{line}"


def is_harmful(label: str) -> bool:
    return label not in (HARMLESS, UNSURE)


def summary(seen: Counter[str]) -> str:
    return ", ".join(f"{n} {label}" for label, n in seen.most_common()) or "no lines"


def tell(text: str) -> None:
    """A line for the person, not for a program."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other filters: `… | head` ends it without a word
    sys.exit(main())
