"""A voice assistant's loop: lines are what a speech recogniser heard, answers are spoken sentence by sentence.

examples:
  python examples/voice_loop.py                                   # type, read; type again to interrupt an answer
  recogniser | python examples/voice_loop.py --speak espeak-ng    # any command that speaks what it reads from stdin

A new line stops the answer that is being given, within one token, and is answered next. The conversation keeps the
sentences that were begun, not what nobody heard; a question to which nothing was said is forgotten. /quit leaves, and
so does the end of the input, once everything is answered.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from queue import Queue

from edge_runtime.errors import EdgeError
from edge_runtime.generate import Chunk, Message, RunOptions, Runtime
from edge_runtime.types import Mode

SYSTEM = Message("system", "You are a voice assistant. Answer in short, plain sentences.")
SENTENCE_END = re.compile(r"(?<=[^\d\s][.!?…])\s+|\n+")  # the number of a list's entry ends none
CONTEXT, MAX_TOKENS = 2048, 200
QUIT = "/quit"
POLL_S = 0.02
INTERRUPTED = 130


def listen(lines: Iterable[str], heard: Queue[str]) -> None:
    """Put lines into `heard` as they come; behind the last, once all are answered, /quit."""
    for line in map(str.strip, lines):
        if line:
            heard.put(line)
    heard.join()
    heard.put(QUIT)


class Voice:
    """Says sentences one after the other: on stdout, and through a command if there is one."""

    def __init__(self, heard: Queue[str], command: Sequence[str] = ()) -> None:
        self._heard, self._command = heard, command
        self._process: subprocess.Popen[str] | None = None

    def say(self, sentence: str) -> bool:
        """Begin a sentence once the one before is over; False if someone speaks first."""
        if not self.finish():
            return False
        print(sentence, flush=True)
        if self._command:
            process = self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True)
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # the command need not read
                process.stdin.write(f"{sentence}\n")
        return True

    def finish(self) -> bool:
        """Wait for the end of the sentence; False if someone speaks first, who silences it."""
        while self._process is not None and self._process.poll() is None:
            if not self._heard.empty():
                self._process.kill()
            time.sleep(POLL_S)
        return self._heard.empty()


def converse(runtime: Runtime, heard: Queue[str], voice: Voice) -> list[Message]:
    """Answer what is heard until /quit; the conversation as the model knows it then."""
    history = [SYSTEM]
    while (line := heard.get()) != QUIT:
        history.append(Message("user", line))
        said = answer(runtime, history, heard, voice)
        if said:
            history.append(Message("assistant", " ".join(said)))
        else:
            history.pop()
        heard.task_done()
    return history


def answer(runtime: Runtime, history: list[Message], heard: Queue[str], voice: Voice) -> list[str]:
    """Say the answer to the latest question; its sentences, as far as they were begun."""
    # the oldest question and answer are forgotten where they leave no room for another answer
    while len(tokens := runtime.chat_tokens(history)) > CONTEXT - MAX_TOKENS and len(history) > 2:
        del history[1:3]
    said = []
    with closing(runtime.stream(tokens, MAX_TOKENS)) as chunks:
        for sentence in sentences(chunks, heard):
            if not voice.say(sentence):
                break
            said.append(sentence)
    voice.finish()
    return said


def sentences(chunks: Iterable[Chunk], heard: Queue[str]) -> Iterator[str]:
    """Sentences as soon as they are whole, at last what is left; nothing more once someone speaks."""
    text = ""
    for chunk in chunks:
        if not heard.empty():
            return
        *whole, text = SENTENCE_END.split(text + chunk.text)
        yield from filter(None, map(str.strip, whole))
    if text.strip():
        yield text.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until /quit; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speak", type=shlex.split, default=(), metavar="COMMAND", help="reads sentences from stdin")
    parser.add_argument("--model", default="smollm2-135m", help="name or path of a GGUF (default: %(default)s)")
    parser.add_argument("--mode", default="auto", choices=[mode.value for mode in Mode], help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all physical cores")
    arguments = parser.parse_args(argv)
    options = RunOptions(arguments.model, Mode(arguments.mode), n_ctx=CONTEXT, n_threads=arguments.threads)
    heard: Queue[str] = Queue()
    try:
        # not sys.stdin, which Python closes at its end, though the thread may still be reading it
        lines = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        threading.Thread(target=listen, args=(lines, heard), daemon=True).start()
        with Runtime(options) as runtime:
            converse(runtime, heard, Voice(heard, arguments.speak))
    except (EdgeError, OSError) as error:  # OSError: no stdin, or no such command
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, EdgeError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
