"""`edge-run translate`: files, pipes and subtitles in, their translations out, and what became of each sentence."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from . import display
from .apps.answers import open_answers
from .apps.glossary import Glossary
from .apps.languages import find_pair
from .apps.memory import TranslationMemory, default_memory
from .apps.segments import split_lines
from .apps.translator import Part, Segment, Translator
from .errors import EdgeError, PromptError, UsageError
from .generate import RunOptions
from .options import start_library
from .progress import reporting
from .reporter import Reporter
from .summary import rate
from .types import Mode

MAX_BYTES = 2**26  # of a file
MAX_LINE = 2**20  # bytes of a line from a pipe

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TranslateRequest:
    """What the verb was asked for."""

    source: str
    target: str
    model: str
    file: Path | None = None  # None or -: lines from a pipe
    out: Path | None = None  # None: stdout
    form: str = "auto"  # text, srt, or auto: by the file's name
    wrapped: bool = False
    glossary: Path | None = None
    memory: Path | None = None  # None: the default one
    use_memory: bool = True
    latency_ms: float | None = None
    json: bool = False
    mode: str = "auto"
    pack: str | None = None
    ctx: int = 0
    threads: int = 0
    quiet: bool = False
    verbose: bool = False


@dataclass(slots=True)
class Tally:
    """Counts of a run so far."""

    parts: int = 0
    segments: int = 0
    from_memory: int = 0
    retried: int = 0
    violations: int = 0  # of the glossary
    problems: int = 0  # parts and sentences with one
    missed: int = 0  # lines not done in time
    tokens: int = 0
    seconds: float = 0.0  # spent on translating

    def add(self, part: Part) -> None:
        self.parts += 1
        self.segments += len(part.segments)
        self.from_memory += sum(segment.from_memory for segment in part.segments)
        self.retried += sum(segment.retried for segment in part.segments)
        self.violations += sum(len(segment.violations) for segment in part.segments)
        self.problems += len(part.problems)
        self.missed += part.missed
        self.tokens += sum(segment.tokens for segment in part.segments)
        self.seconds += sum(segment.ms for segment in part.segments) / 1e3

    def lines(self) -> list[str]:
        """The counts in words."""
        speed = rate(self.segments, self.seconds)
        parts = [f"{self.segments:,} sentence{'' if self.segments == 1 else 's'}"]
        parts += [f"{self.from_memory:,} of them from memory"] if self.from_memory else []
        parts += [f"{speed:,.1f} sentences/s"] if speed else []
        parts += [f"{self.tokens:,} tokens"] if self.tokens else []
        counts = {
            "asked twice because of the glossary": self.retried,
            "glossary terms missing": self.violations,
            "lines not in time": self.missed,
            "problems": self.problems,
        }
        told = [f"{what}: {n:,}" for what, n in counts.items() if n]
        return [", ".join(parts), *([", ".join(told)] if told else [])]

    def record(self) -> dict[str, Any]:
        """The counts for JSON."""
        return {**asdict(self), "sentences_per_s": rate(self.segments, self.seconds)}


def translate_text(request: TranslateRequest) -> None:
    """Translations on stdout or in `out`, the rest on stderr.

    Raises UsageError for requests and PromptError for texts that cannot be meant, EdgeError where `out` cannot be
    written, and KeyboardInterrupt after the summary of an interrupted run.
    """
    find_pair(request.source, request.target)
    _check(request)
    glossary = Glossary.load(request.glossary) if request.glossary else Glossary()
    text = _read_text(request)
    say: Say = (lambda _text: None) if request.quiet else display.tell
    tally, interrupted = Tally(), False
    with contextlib.ExitStack() as opened:
        memory = opened.enter_context(_memory(request, say)) if request.use_memory else None
        start_library(verbose=request.verbose)
        answers = open_answers(_options(request), lambda note: say(f"warning: {note}"), say)
        opened.callback(answers.close)
        translator = Translator(request.source, request.target, answers, glossary, memory)
        out = opened.enter_context(_output(request))
        report = opened.enter_context(_progress(request, text))
        if text is not None:
            report.say(f"translate from {translator.source.name} to {translator.target.name}")
        try:
            done = 0
            for part in _parts(request, translator, text):
                tally.add(part)
                if out is not None:
                    _write(out, part.target, request.out)
                if request.json:
                    _write_records(part)
                for problem in part.problems:
                    say(f"warning: line {part.line}: {problem}")
                done += len(part.source)
                report.progress(done, len(text or ""))
        except KeyboardInterrupt:
            interrupted = True
    if request.json:
        display.write_json({"summary": tally.record()})
    else:
        for line in tally.lines():
            say(line)
    if interrupted:
        if text is not None and request.use_memory:
            say("interrupted; the same command goes on where it was, with what is in the translation memory")
        raise KeyboardInterrupt


def _options(request: TranslateRequest) -> RunOptions:
    return RunOptions(
        model=request.model,
        mode=Mode(request.mode),
        pack=request.pack,
        n_ctx=request.ctx,
        n_threads=request.threads,
    )


def _memory(request: TranslateRequest, say: Say) -> TranslationMemory:
    return TranslationMemory(request.memory or default_memory(), lambda note: say(f"warning: {note}"))


def _parts(request: TranslateRequest, translator: Translator, text: str | None) -> Iterator[Part]:
    if text is None:
        return translator.stream(read_lines(), request.latency_ms)
    if _is_srt(request):
        return translator.srt_parts(text)
    return translator.document_parts(text, wrapped=request.wrapped)


def _progress(request: TranslateRequest, text: str | None) -> contextlib.AbstractContextManager[Reporter]:
    """A bar where it disturbs nothing, for texts whose length is known."""
    beside = request.out is None and sys.stdout.isatty()
    return reporting(quiet=request.quiet or text is None or beside)


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(request: TranslateRequest) -> None:
    if request.memory is not None and not request.use_memory:
        raise UsageError("--memory and --no-memory exclude each other", "drop one of them")
    if request.wrapped and _is_srt(request):
        raise UsageError("--wrapped means nothing for subtitles", "drop it")
    if request.latency_ms is not None and not request.latency_ms > 0:
        raise UsageError(f"{request.latency_ms:g} ms is no time for a line", "give milliseconds, as in --latency 800")
    if request.latency_ms is not None and not _is_live(request):
        raise UsageError("--latency is for lines from a pipe", "drop it, or drop the file")
    # whoever asks for stdin may type lines; who gives nothing has forgotten them
    if _reads_stdin(request) and (sys.stdin is None or (request.file is None and sys.stdin.isatty())):
        raise UsageError("there is no text", "give a file, - to type lines, or a pipe")
    if request.out is not None and request.file is not None and _same_file(request.out, request.file):
        raise UsageError(f"{request.out} is the text itself", "give another file with --out")


def _is_srt(request: TranslateRequest) -> bool:
    by_name = request.file is not None and request.file.suffix.lower() == ".srt"
    return request.form == "srt" or (request.form == "auto" and by_name)


def _reads_stdin(request: TranslateRequest) -> bool:
    return request.file is None or str(request.file) == "-"


def _is_live(request: TranslateRequest) -> bool:
    """Whether lines are translated as they come."""
    return _reads_stdin(request) and not _is_srt(request) and not request.wrapped


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _read_text(request: TranslateRequest) -> str | None:
    """The whole text; None if its lines come one by one."""
    if _is_live(request):
        return None
    if _reads_stdin(request):
        return decode(sys.stdin.buffer.read(MAX_BYTES + 1), "the text on stdin")
    path = request.file or Path("-")
    try:
        with path.open("rb") as file:
            if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
                raise IsADirectoryError
            return decode(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        why = error.strerror or "it is a folder"
        raise UsageError(f"{path} cannot be read: {why}", "name a text file, or - for stdin") from error


def decode(data: bytes, name: str, line: int = 1, limit: int = MAX_BYTES) -> str:
    """The text of `data`, which begins with `line`. Raises PromptError for what is too long, binary or not UTF-8."""
    if len(data) > limit:
        raise PromptError(f"{name} is longer than {limit // 2**20} MiB", "split it")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PromptError(f"{name} is UTF-16, not UTF-8", "convert it with `iconv -f utf-16 -t utf-8`")
    if b"\0" in data:
        number = line + data.count(b"\n", 0, data.index(b"\0"))
        raise PromptError(f"{name} is no text: line {number} holds a zero byte", "give a text file or subtitles (.srt)")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise PromptError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} in line {number}",
            "convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from None


def read_lines() -> Iterator[str]:
    """Lines from stdin with their ends, each when it is there. Waits in one blocking read. Raises PromptError."""
    number = 0
    while data := sys.stdin.buffer.readline(MAX_LINE + 1):
        number += 1
        yield from ("".join(line) for line in split_lines(decode(data, "the text on stdin", number, MAX_LINE)))


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _output(request: TranslateRequest) -> Iterator[TextIO | None]:
    """Where translations go; None if only their records are wanted."""
    if request.out is None:
        yield None if request.json else sys.stdout
        return
    try:
        file = request.out.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{request.out} cannot be written: {error.strerror}", "name another file") from error
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # every part was flushed, and told of if that failed
            file.close()


def _write(out: TextIO, text: str, path: Path | None) -> None:
    """Write a part at once, so that what there is of an output is always whole parts. Raises EdgeError."""
    if path is None:
        out.write(display.harmless(text.replace("\r\n", "\n")) if out.isatty() else text)
        out.flush()
        return
    try:
        out.write(text)
        out.flush()
    except OSError as error:
        hint = "make room, and give the same command again: it goes on with what is in the translation memory"
        raise EdgeError(f"{path} cannot be written: {error.strerror}", hint) from error


def _write_records(part: Part) -> None:
    for segment in part.segments:
        display.write_json(segment_record(segment, part))


def segment_record(segment: Segment, part: Part) -> dict[str, Any]:
    """A sentence for JSON."""
    return {
        "line": part.line,
        "source": segment.source,
        "target": segment.target,
        "finish": segment.ending.value,
        "from_memory": segment.from_memory,
        "retried": segment.retried,
        "violations": [asdict(term) for term in segment.violations],
        "missed": part.missed,
        "tokens": segment.tokens,
        "ms": segment.ms,
    }
