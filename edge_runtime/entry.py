"""The console script: exit codes and last words. Standard library only, so that Ctrl-C is safe while the rest loads."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> NoReturn:
    """Run `edge-run` and exit: 0 done, 1 failed, 2 the request was wrong, 3 unsure (`generate`), 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code. No expected failure leaves this function as an exception."""
    try:
        _prepare_streams()
        code = _run_command(arguments or ["--help"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("\n")
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except MemoryError:
        _say("error: memory ran out\nhint: try a smaller --ctx, --batch or --cap\n")
        return 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        _say(f"error: {what}\n")
        return 1
    finally:
        _silence_broken_streams()


def _run_command(arguments: Sequence[str]) -> int:
    from .errors import EdgeError

    try:
        from .cli import app_command, exit_code_of

        command = app_command()
        # not command.main(): it has ways of its own with interruptions and broken pipes
        with command.make_context("edge-run", list(arguments)) as context:
            command.invoke(context)
        return 0
    except EdgeError as error:
        _say(f"error: {error}\n")
        return error.exit_code
    except Exception as error:
        code, usage = exit_code_of(error), _usage_error(error)
        if code is None and usage is None:
            raise
        _say(usage or "")
        return 2 if code is None else code


def _usage_error(error: Any) -> str | None:
    """What to say of a command line that cannot be parsed; None for any other exception.

    Recognised by its shape, because Typer raises classes of its own or of click, depending on its version.
    """
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "edge-run"
    what = (
        error.format_message().rstrip(".").replace("Value error, ", "")
    )  # typer's validation puts that before its words
    return f"error: {what}\nhint: `{command} --help` lists what can be given\n"


def _prepare_streams() -> None:
    """Make output safe: a closed stream takes and drops it, a character that a terminal lacks becomes '?'."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as we live
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _say(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass  # nobody is left to be told


def _silence_broken_streams() -> None:
    """Keep the interpreter from complaining, as it exits, about what can no longer be written."""
    streams: list[TextIO] = [sys.stdout, sys.stderr]
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
