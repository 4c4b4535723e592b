"""`edge-run labels run` and `show`: messages from arguments, files, pipes or a growing log, and a line for each."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from . import display
from .errors import UsageError
from .labels.classifier import ClassifierOptions, LabelClassifier
from .labels.decision import Decision
from .labels.drift import Drift
from .labels.pack import LabelPack
from .labels.packs import find_pack
from .options import start_library
from .summary import rate

MAX_LINE = 2**20  # bytes of a line that are read; the rest is dropped
_PIECE = 2**16  # bytes
_BATCH = 64
_POLL_S = 0.25
_SHOWN = 100  # characters of a message in the table

Say = Callable[[str], None]
Sleep = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the verb was asked for."""

    pack: str
    model: str
    texts: tuple[str, ...] = ()
    file: Path | None = None
    follow: Path | None = None
    from_start: bool = False
    json: bool = False
    unsure_below: float | None = None  # None: as the pack says
    unsure_unfamiliar: bool = False
    use_ngrams: bool = True
    threads: int = 0
    quiet: bool = False
    verbose: bool = False


@dataclass(slots=True)
class Tally:
    """Counts of a run so far."""

    messages: int = 0
    unsure: int = 0
    unfamiliar: int = 0
    cut: int = 0  # messages longer than the pack takes
    empty: int = 0  # lines without a message
    by_layer: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0  # spent on deciding, loading the model included, waiting for messages not
    drifts: list[Drift] = field(default_factory=list)

    def add(self, decisions: Sequence[Decision]) -> None:
        self.messages += len(decisions)
        self.unsure += sum(d.unsure for d in decisions)
        self.unfamiliar += sum(d.unfamiliar for d in decisions)
        self.cut += sum(d.n_cut > 0 for d in decisions)
        self.by_layer.update(d.layer for d in decisions)

    @property
    def mean_layer(self) -> float | None:
        """Layers behind a message."""
        return sum(layer * n for layer, n in self.by_layer.items()) / self.messages if self.messages else None


def run_labels(request: RunRequest, sleep: Sleep = time.sleep) -> None:
    """Decisions on stdout, the rest on stderr; `sleep` waits between two looks at a file that is followed.

    Raises UsageError unless there is exactly one source of messages, PackError for a pack that cannot be used, and
    KeyboardInterrupt after the summary of an interrupted run.
    """
    _check_source(request)
    say: Say = (lambda _text: None) if request.quiet else display.tell
    start_library(verbose=request.verbose)
    pack = LabelPack.load(find_pack(request.pack))
    options = ClassifierOptions(
        unsure_below=request.unsure_below,
        unsure_unfamiliar=request.unsure_unfamiliar,
        use_ngrams=request.use_ngrams,
        n_threads=request.threads,
    )
    tally, cutter = Tally(), LineCutter()
    interrupted = False
    with LabelClassifier(pack, request.model, options) as classifier:
        record = _json_record if request.json else _table_row
        try:
            with _messages(request, cutter, say, sleep) as parts:
                for part in parts:
                    for start in range(0, len(part), _BATCH):
                        _decide(classifier, part[start : start + _BATCH], tally, record, say)
        except KeyboardInterrupt:
            interrupted = True
    if request.json:
        display.write_json({"summary": _summary_record(tally, cutter.n_long)})
    else:
        for line in summary_lines(tally, cutter.n_long, pack):
            say(line)
    if interrupted:
        raise KeyboardInterrupt


def _check_source(request: RunRequest) -> None:
    given = [bool(request.texts), request.file is not None, request.follow is not None]
    if sum(given) > 1:
        raise UsageError("messages were given in more than one way", "give texts, --file or --follow, one of them")
    if request.from_start and request.follow is None:
        raise UsageError("--from-start means nothing without --follow", "name a file with --follow")
    # whoever asks for stdin may type messages; who gives nothing has forgotten them
    if _reads_stdin(request) and (sys.stdin is None or (not any(given) and sys.stdin.isatty())):
        raise UsageError("there are no messages", "give them as arguments, with --file or --follow, or through a pipe")


def _reads_stdin(request: RunRequest) -> bool:
    if request.follow is not None:
        return False
    return request.texts in ((), ("-",)) if request.file is None else str(request.file) == "-"


def _decide(
    classifier: LabelClassifier,
    part: Sequence[str],
    tally: Tally,
    record: Callable[[str, Decision, tuple[str, ...]], str],
    say: Say,
) -> None:
    """Decide and print a batch."""
    texts = [text for text in part if text.strip()]
    tally.empty += len(part) - len(texts)
    if not texts:
        return
    start = time.perf_counter()
    decisions = classifier.predict(texts)
    tally.seconds += time.perf_counter() - start
    tally.add(decisions)
    labels = classifier.pack.labels
    sys.stdout.write("".join(record(*pair, labels) for pair in zip(texts, decisions, strict=True)))
    sys.stdout.flush()
    drifts = classifier.take_drifts()
    tally.drifts += drifts
    for drift in drifts:
        say(f"warning: {drift.sentence()}")


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


class LineCutter:
    """Bytes as they come → whole lines as text, without their ends."""

    def __init__(self) -> None:
        self.n_long = 0  # lines longer than MAX_LINE, whose ends were dropped
        self._line = bytearray()
        self._dropped = False

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            self._extend(end)
            lines.append(self._finish())
        self._extend(rest)
        return lines

    def end(self) -> list[str]:
        """The last line, if no newline ends it."""
        return [self._finish()] if self._line else []

    def clear(self) -> None:
        """Forget the line begun."""
        self._line.clear()
        self._dropped = False

    def _extend(self, data: bytes) -> None:
        room = MAX_LINE - len(self._line)
        self._line += data[:room]
        self._dropped |= len(data) > room

    def _finish(self) -> str:
        self.n_long += self._dropped
        text = bytes(self._line).removesuffix(b"\r").decode("utf-8", "replace")
        self.clear()
        return text


@contextlib.contextmanager
def _messages(request: RunRequest, cutter: LineCutter, say: Say, sleep: Sleep) -> Iterator[Iterator[list[str]]]:
    """The messages asked for, in lists of those that are there at once. Raises UsageError for an unreadable file."""
    if request.follow is not None:
        with contextlib.closing(follow(request.follow, cutter, say, sleep, from_start=request.from_start)) as parts:
            yield parts
    elif _reads_stdin(request):
        # read1 gives what a pipe holds, and waits only while it holds nothing
        yield _all_lines(cast(io.BufferedReader, sys.stdin.buffer).read1, cutter)
    elif request.file is not None:
        with _open(request.file) as stream, _progress(stream, request) as advance:
            yield _all_lines(stream.read, cutter, advance)
    else:
        # bytes that the shell could not decode arrive as lone surrogates
        yield iter([[t.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for t in request.texts]])


def _all_lines(
    read: Callable[[int], bytes], cutter: LineCutter, advance: Callable[[int], None] = lambda _: None
) -> Iterator[list[str]]:
    """Lines to the end of a file; `advance` is told how many bytes were done with."""
    while data := read(_PIECE):
        yield cutter.feed(data)
        advance(len(data))
    yield cutter.end()


def _open(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "name a text file, or - for stdin") from error


@contextlib.contextmanager
def _progress(stream: io.FileIO, request: RunRequest) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, where it disturbs nothing and the file's size is known."""
    status = os.fstat(stream.fileno())
    if request.quiet or not stat.S_ISREG(status.st_mode) or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("labelling"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn())
    # decisions go to stdout while the bar is shown: it must not catch them
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=status.st_size)
        yield lambda n: bar.advance(task, n)


# ── a file that grows ───────────────────────────────────────────────────────────────────────────────────────────────


def follow(
    path: Path, cutter: LineCutter, say: Say, sleep: Sleep, *, from_start: bool
) -> Generator[list[str], None, None]:
    """Whole lines as they are written to the file at `path`, without end.

    Starts with the line being written, or `from_start`, which a file that appears only later is always read from. A
    file that another replaces at `path` is read to its end first; one that becomes shorter is read from its start,
    and the line begun is forgotten. Raises UsageError for a file that cannot be read.
    """
    stream = _open_followed(path)
    if stream is None:
        say(f"note: waiting for {path}, which is not there yet")
        from_start = True
        while stream is None:
            sleep(_POLL_S)
            stream = _open_followed(path)
    try:
        if not from_start:
            _seek_last_line(stream)
        while True:
            yield from _new_lines(stream, cutter)
            sleep(_POLL_S)
            successor = _successor(path, stream)
            if successor is not None:
                old, stream = stream, successor
                with old:
                    yield from _new_lines(old, cutter)
                yield cutter.end()
            elif os.fstat(stream.fileno()).st_size < stream.tell():
                stream.seek(0)
                cutter.clear()
    finally:
        stream.close()


def _new_lines(stream: io.FileIO, cutter: LineCutter) -> Iterator[list[str]]:
    while data := stream.read(_PIECE):
        yield cutter.feed(data)


def _open_followed(path: Path) -> io.FileIO | None:
    """None if there is no file yet."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} is no regular file", "read a pipe or device with --file")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def _seek_last_line(stream: io.FileIO) -> None:
    """Go to where the last line begins: behind the last newline."""
    start = max(0, stream.seek(0, os.SEEK_END) - MAX_LINE)
    stream.seek(start)
    stream.seek(start + stream.read(MAX_LINE).rfind(b"\n") + 1)


def _successor(path: Path, stream: io.FileIO) -> io.FileIO | None:
    """The file that has taken the place of `stream` at `path`, if one has."""
    try:
        if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return None
        return _open_followed(path)
    except (OSError, UsageError):
        return None  # moved away, and the next one is not ready yet


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table_row(text: str, decision: Decision, _labels: tuple[str, ...]) -> str:
    """One line of five columns separated by tabs."""
    remarks = []
    if decision.unsure:
        remarks.append(f"likeliest {one_line(decision.likeliest)}")
    if decision.unfamiliar:
        remarks.append("unfamiliar")
    cells = (
        one_line(decision.label),
        f"{decision.confidence:.2f}",
        f"layer {decision.layer}",
        ", ".join(remarks) or "-",
        one_line(text, _SHOWN),
    )
    return "\t".join(cells) + "\n"


def one_line(text: str, limit: int | None = None) -> str:
    """`text` with tabs and newlines as escapes, without other control characters, and of `limit` characters at most."""
    shown = text[:limit]
    for sign, escape in (("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r")):
        shown = shown.replace(sign, escape)
    more = ""
    if limit is not None and len(text) > limit:
        more = "…" if display.speaks_unicode(sys.stdout) else "..."
    return display.harmless(shown) + more


def _json_record(text: str, decision: Decision, labels: tuple[str, ...]) -> str:
    probabilities = dict(zip(labels, decision.probabilities, strict=True))
    return display.json_line({"text": text, **dataclasses.asdict(decision), "probabilities": probabilities})


def _summary_record(tally: Tally, n_long: int) -> dict[str, Any]:
    return {
        "messages": tally.messages,
        "unsure": tally.unsure,
        "unfamiliar": tally.unfamiliar,
        "cut": tally.cut,
        "empty": tally.empty,
        "long_lines": n_long,
        "by_layer": {str(layer): tally.by_layer[layer] for layer in sorted(tally.by_layer)},
        "mean_layer": tally.mean_layer,
        "messages_per_s": rate(tally.messages, tally.seconds),
        "drifts": [dataclasses.asdict(drift) for drift in tally.drifts],
    }


def summary_lines(tally: Tally, n_long: int, pack: LabelPack) -> list[str]:
    """The summary in words."""
    speed = rate(tally.messages, tally.seconds)
    lines = [_count(tally.messages, "message") + (f", {speed:,.1f} messages/s" if speed else "")]
    if tally.mean_layer is not None:
        places = [
            f"{n:,} ({n / tally.messages:.0%}) {f'after layer {layer}' if layer else 'before the network'}"
            for layer, n in sorted(tally.by_layer.items())
        ]
        lines.append(f"decided: {', '.join(places)}; mean {tally.mean_layer:.1f} of {pack.model.n_layer} layers")
    if tally.unsure or tally.unfamiliar:
        lines.append(f"{tally.unsure:,} unsure, {tally.unfamiliar:,} unlike the training messages")
    if tally.cut:
        lines.append(_ends_not_read(tally.cut, "message", f"{pack.max_tokens} tokens"))
    if n_long:
        lines.append(_ends_not_read(n_long, "line", f"{MAX_LINE // 2**20} MiB"))
    if tally.empty:
        lines.append(f"{_count(tally.empty, 'empty message')} left out")
    return lines


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _ends_not_read(n: int, noun: str, limit: str) -> str:
    verb, ends = ("was", "its end was") if n == 1 else ("were", "their ends were")
    return f"{_count(n, noun)} {verb} longer than {limit}: {ends} not read"


# ── what a pack is ──────────────────────────────────────────────────────────────────────────────────────────────────


def show_pack(wanted: str, *, as_json: bool) -> None:
    """Print what is in a pack. Raises PackError."""
    start_library(verbose=False)
    path = find_pack(wanted)
    pack = LabelPack.load(path)
    record = pack_record(pack, path)
    if as_json:
        display.write_json(record)
        return
    for line in _pack_lines(pack, record):
        print(one_line(line))


def pack_record(pack: LabelPack, path: Path) -> dict[str, Any]:
    """A pack for JSON. A threshold is null where no message leaves."""
    stages = []
    for layer, thresholds, pools in zip(
        pack.layers, pack.thresholds, ((), *(probe.pools for probe in pack.probes)), strict=True
    ):
        limits = [float(t) if t <= 1 else None for t in thresholds]
        stages.append({"layer": layer, "pools": pools, "thresholds": dict(zip(pack.labels, limits, strict=True))})
    return {
        "name": pack.name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "labels": pack.labels,
        "model": dataclasses.asdict(pack.model),
        "instruction": pack.instruction,
        "max_tokens": pack.max_tokens,
        "ngram_buckets": 2**pack.ngrams.bits,
        "stages": stages,
        "unsure_below": pack.unsure_below,
        "weights": dict(zip(pack.labels, map(float, pack.weights), strict=True)),
        "watched": list(pack.references),
        "report": pack.report,
    }


def _pack_lines(pack: LabelPack, record: dict[str, Any]) -> Iterator[str]:
    yield f"name         {pack.name}"
    yield f"file         {record['file']} ({record['bytes'] / 1024:.0f} KiB)"
    yield f"labels       {', '.join(pack.labels)}"
    yield f"model        {pack.model}"
    yield f"sha256       {pack.model.sha256}"
    yield f"instruction  {json.dumps(pack.instruction, ensure_ascii=False)}"
    yield f"messages     up to {pack.max_tokens} tokens, the rest is cut"
    yield f"unsure       {f'below probability {pack.unsure_below:.3f}' if pack.unsure_below > 0 else 'never'}"
    yield f"watched      {', '.join(pack.references) or 'nothing'}"
    if any(weight != 1 for weight in record["weights"].values()):
        yield f"weights      {_pairs(record['weights'])}"
    yield "stages, and the confidence from which a message leaves there"
    *earlier, last = record["stages"]
    for stage in earlier:
        limits = {k: "never" if t is None else f"{t:.3f}" for k, t in stage["thresholds"].items()}
        yield f"  {_stage_name(stage, pack)}: {_pairs(limits)}"
    yield f"  {_stage_name(last, pack)}: all that are left"
    if pack.report:
        yield "report"
        yield from _tree(pack.report, "  ")


def _stage_name(stage: dict[str, Any], pack: LabelPack) -> str:
    if not stage["layer"]:
        return f"before the network, n-grams in {2**pack.ngrams.bits:,} buckets"
    return f"after layer {stage['layer']}, pooled by {' and '.join(stage['pools'])}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_scalar(value)}" for key, value in values.items())


def _tree(value: Any, indent: str) -> Iterator[str]:
    """Nested dicts and lists as indented lines."""
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for key, inner in items:
        if isinstance(inner, list) and not any(isinstance(part, (dict, list)) for part in inner):
            yield f"{indent}{key}: {', '.join(map(_scalar, inner)) or '-'}"
        elif isinstance(inner, (dict, list)):
            yield f"{indent}{key}"
            yield from _tree(inner, indent + "  ")
        else:
            yield f"{indent}{key}: {_scalar(inner)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
