"""One prompt in, one answer out, and how sure it is: what `edge-run generate` does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from . import display
from .confidence_options import ConfidenceArguments, plan_confidence
from .confidence_run import ConfidenceRun
from .errors import PromptError, UsageError
from .generate import Chunk, Runtime
from .options import RunArguments, run_options, start_library
from .sensing import Steered, plan_sensing, sensing
from .sensing_options import SensingArguments
from .templates import Message
from .text import check_text, decode_prompt


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, and in which form the answer is wanted."""

    prompt: str | None  # None or "-": from a pipe
    file: Path | None
    raw: bool
    json: bool


def complete(
    request: Request, arguments: RunArguments, sensed: SensingArguments, confidence: ConfidenceArguments
) -> bool:
    """Answer on stdout, the rest on stderr; False if there is no answer because the model is unsure.

    Raises KeyboardInterrupt after the footer of an interrupted answer.
    """
    if request.json and arguments.show_exits:
        raise UsageError("--json and --show-exits exclude each other", "each JSON object has its token's depth")
    if request.json and confidence.show_clusters:
        raise UsageError("--json and --show-clusters exclude each other", "the JSON has the clusters")
    if request.raw and arguments.system is not None:
        raise UsageError("--system needs the chat template that --raw leaves out", "write it into the prompt")
    options = run_options(arguments)
    say: Callable[[str], None] = (lambda _text: None) if arguments.quiet else display.tell
    plan = plan_sensing(sensed, arguments.device, options, say)
    prompt = read_prompt(request.prompt, request.file)
    wanted = plan_confidence(confidence, options, arguments.max_tokens)
    start_library(verbose=arguments.verbose)
    with (
        sensing(plan, say) as sensors,
        Runtime(options, lambda text: say(f"warning: {text}"), say, sensors.meter) as runtime,
        ExitStack() as opened,
    ):
        tokens = _tokens(runtime, prompt, request.raw, arguments.system, say)
        confident = None
        if wanted is not None:
            confident = opened.enter_context(ConfidenceRun(wanted, runtime, prompt, sensors.meter, say))
            if not confident.allows(tokens):
                _tell_unsure(confident, json=request.json)
                return False
        if arguments.show_exits:
            say(painter_of(runtime).legend())
        write = _json_writer if request.json else text_writer(runtime, arguments.show_exits)
        with Steered(sensors, runtime) as steered:
            said, write = _kept(write)
            interrupted = not answer(runtime, tokens, arguments, write, steered.token)
        summary = runtime.summary
        if not request.json:
            for line in display.footer(summary, seeded=arguments.temperature > 0):
                say(line)
        if confident is not None and not interrupted:
            interrupted = not confident.finish(tokens, said)
        if request.json:
            record = {} if confident is None else {"confidence": confident.record()}
            display.write_json({"summary": dataclasses.asdict(summary), **record})
        elif confident is not None:
            confident.tell()
        sensors.tell_gaps(summary)
    if interrupted:
        raise KeyboardInterrupt
    return True


def answer(
    runtime: Runtime,
    tokens: list[int],
    arguments: RunArguments,
    write: Callable[[Chunk | None], None],
    after: Callable[[], None] = lambda: None,
) -> bool:
    """Stream the answer into `write`, calling `after` behind each token, then None; False if Ctrl-C ended it."""
    try:
        with closing(runtime.stream(tokens, arguments.max_tokens, arguments.stop)) as chunks:
            for chunk in chunks:
                write(chunk)
                after()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        write(None)


def _kept(write: Callable[[Chunk | None], None]) -> tuple[list[str], Callable[[Chunk | None], None]]:
    """A list of the texts that are written, and the function that writes them."""
    texts: list[str] = []

    def write_and_keep(chunk: Chunk | None) -> None:
        if chunk is not None:
            texts.append(chunk.text)
        write(chunk)

    return texts, write_and_keep


def _tell_unsure(confident: ConfidenceRun, *, json: bool) -> None:
    if json:
        display.write_json({"summary": None, "confidence": confident.record()})
    else:
        confident.tell()


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the command line, a file or a pipe. Raises PromptError, or UsageError if it is given twice."""
    if prompt is not None and file is not None:
        raise UsageError("a prompt and --file were both given", "give one of them")
    if file is not None and str(file) != "-":
        text = decode_prompt(_read_file(file), str(file))
    elif prompt is not None and prompt != "-":
        text = check_text(prompt, "the prompt")
    else:
        if sys.stdin is None or (prompt is None and file is None and sys.stdin.isatty()):
            raise UsageError("there is no prompt", 'give it as in: edge-run generate "Why is the sky blue?"')
        text = decode_prompt(sys.stdin.buffer.read(), "the prompt on stdin")
    if not text:
        raise PromptError("the prompt is empty", "give some text")
    return text


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PromptError(f"{file} cannot be read: {error.strerror}", "name a text file, or - for stdin") from error


def _tokens(runtime: Runtime, prompt: str, raw: bool, system: str | None, say: Callable[[str], None]) -> list[int]:
    if raw:
        return runtime.text_tokens(prompt)
    if runtime.template is None:
        if system is not None:
            raise UsageError("the model has no chat template for --system", "write it into the prompt")
        say("note: the model has no chat template: it continues the prompt as it stands")
        return runtime.text_tokens(prompt)
    messages = [Message("user", check_text(prompt, "the prompt"))]
    if system is not None:
        messages.insert(0, Message("system", check_text(system, "--system")))
    return runtime.chat_tokens(messages)


def text_writer(runtime: Runtime, show_exits: bool) -> Callable[[Chunk | None], None]:
    """A function that prints chunks as they come and, for None, ends the line."""
    out = sys.stdout
    clean = display.harmless if out.isatty() else str
    painter = painter_of(runtime)
    at_line_start = True

    def write(chunk: Chunk | None) -> None:
        nonlocal at_line_start
        if chunk is None:
            out.write("" if at_line_start else "\n")
        elif chunk.text:
            chunk = dataclasses.replace(chunk, text=clean(chunk.text))
            out.write(painter.paint(chunk) if show_exits else chunk.text)
            at_line_start = chunk.text.endswith("\n")
        out.flush()

    return write


def painter_of(runtime: Runtime) -> display.ExitPainter:
    """The painter that fits the runtime's boundaries and what stdout can show."""
    return display.ExitPainter(
        runtime.options.mode,
        runtime.options.boundaries or (),
        runtime.model.n_layer,
        colour=display.wants_colour(sys.stdout),
        unicode=display.speaks_unicode(sys.stdout),
    )


def _json_writer(chunk: Chunk | None) -> None:
    if chunk is not None:
        display.write_json(display.chunk_record(chunk))
