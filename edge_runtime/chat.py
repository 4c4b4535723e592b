"""A conversation on the terminal or through a pipe: what `edge-run chat` does."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import display
from .completion import answer, painter_of, text_writer
from .energy.account import worst
from .errors import EdgeError, ModelError, UsageError
from .generate import Chunk, Runtime
from .options import RunArguments, run_options, start_library
from .sensing import Sensing, SensingPlan, Steered, plan_sensing, sensing
from .sensing_options import SensingArguments
from .sensors.reading import PowerSource
from .summary import Summary
from .templates import Message
from .text import check_text, decode_prompt
from .types import Mode

HELP = """\
/help           this list
/stats          how full the context is, how the answers came about, and their energy
/reset          forget the conversation, keep the system message
/system TEXT    another system message from here on; none without TEXT
/mode NAME      auto, full, exit, verified or margin
/quit           leave; so do Ctrl-D, and Ctrl-C at the prompt
Ctrl-C          stops an answer; what there is of it stays
A message that begins with / needs a space in front."""


@dataclass(slots=True)
class Conversation:
    """Who said what; the oldest turns go when the context is full."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def fit(self, tokens_of: Callable[[Sequence[Message]], list[int]], room: int) -> tuple[list[int], int]:
        """Tokens of the conversation, and how many messages had to be dropped to make them `room` at most.

        Questions go together with their answers; the newest question always stays.
        """
        n_before = len(self.turns)
        tokens = tokens_of(self.messages())
        while len(tokens) > room and len(self.turns) > 2:
            del self.turns[:2]
            tokens = tokens_of(self.messages())
        return tokens, n_before - len(self.turns)


@dataclass(slots=True)
class EnergySum:
    """The energy of several answers, as far as it is known."""

    gross_j: float = 0.0
    n_known: int = 0  # answers
    n_answers: int = 0
    sources: set[PowerSource] = field(default_factory=set)

    def add(self, summary: Summary) -> None:
        """Count an answer, also one that was stopped; none that has not begun."""
        if summary.generated_tokens == 0:
            return
        self.n_answers += 1
        if summary.energy_j is not None and summary.energy_source is not None:
            self.gross_j += summary.energy_j
            self.n_known += 1
            self.sources.add(PowerSource(summary.energy_source))

    def __str__(self) -> str:
        known = f"{self.n_known} of {self.n_answers} answers" if self.n_known < self.n_answers else "all answers"
        return f"{self.gross_j:,.2f} J {worst(self.sources).value}, of {known}"


def chat(arguments: RunArguments, sensed: SensingArguments) -> None:
    """Talk until the input ends."""
    options = run_options(arguments)
    say: Callable[[str], None] = (lambda _text: None) if arguments.quiet else display.tell
    plan = plan_sensing(sensed, arguments.device, options, say)
    start_library(verbose=arguments.verbose)
    with (
        sensing(plan, say) as sensors,
        Runtime(options, lambda text: say(f"warning: {text}"), say, sensors.meter) as runtime,
    ):
        if runtime.template is None:
            raise ModelError(f"{runtime.header.path} has no chat template", "use `edge-run generate --raw`")
        with Steered(sensors, runtime) as steered:
            _talk(ChatSession(runtime, arguments, say, steered), say)


def _talk(session: ChatSession, say: Callable[[str], None]) -> None:
    """Take lines until they end; on a terminal, go on after mistakes."""
    runtime, on_terminal = session.runtime, _on_terminal()
    if on_terminal:
        name, mode = runtime.header.name or session.arguments.model, runtime.options.mode.value
        say(f"{name}, mode {mode}. /help lists what can be typed.")
    read = _terminal_reader() if on_terminal else _read_pipe
    while (line := _read_line(read, on_terminal)) is not None:
        try:
            if not session.take(line):
                return
        except EdgeError as error:
            if not on_terminal:
                raise
            display.tell(f"error: {error}")


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _read_line(read: Callable[[], str | None], on_terminal: bool) -> str | None:
    try:
        return read()
    except EdgeError as error:
        if not on_terminal:
            raise
        display.tell(f"error: {error}")
        return ""


def _terminal_reader() -> Callable[[], str | None]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history

    def read() -> str | None:
        prompt = "> "
        if not sys.stdout.isatty():
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        try:
            return check_text(input(prompt), "the message")
        except EOFError:
            display.tell("")
            return None

    return read


def _read_pipe() -> str | None:
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    return decode_prompt(line, "the message on stdin") if line else None


class ChatSession:
    """Takes lines, one after the other: commands and messages."""

    def __init__(
        self,
        runtime: Runtime,
        arguments: RunArguments,
        say: Callable[[str], None],
        steered: Steered | None = None,
    ) -> None:
        """`steered` holds the targets and knows the sensors, if there are any."""
        self.runtime, self.arguments, self.say = runtime, arguments, say
        self._steered = steered or Steered(Sensing(SensingPlan(), say), runtime)
        self._energy = EnergySum()
        system = arguments.system
        self._show_legend()
        self.conversation = Conversation(None if system is None else check_text(system, "--system"))

    def take(self, line: str) -> bool:
        """Do what a line says; False if it says to leave. Raises EdgeError and goes on from the state before."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._reply(line)
            return True
        command, _, rest = line.strip().partition(" ")
        actions: dict[str, Callable[[str], None]] = {
            "/help": lambda _: display.tell(HELP),
            "/stats": lambda _: self._show_stats(),
            "/reset": lambda _: self._reset(),
            "/system": self._set_system,
            "/mode": self._set_mode,
        }
        if command in ("/quit", "/exit"):
            return False
        if command not in actions:
            raise UsageError(f"there is no command {command}", "/help lists them; a message needs a space before its /")
        actions[command](rest.strip())
        return True

    def _reply(self, line: str) -> None:
        turns = self.conversation.turns
        turns.append(Message("user", line.strip()))
        try:
            tokens = self._fitting_tokens()
            text = self._stream(tokens)
        except BaseException:
            turns.pop()
            raise
        if text:
            turns.append(Message("assistant", text))
        else:
            # two questions in a row are more than some templates take
            turns.pop()
            self.say("note: there was no answer; the message is forgotten")

    def _fitting_tokens(self) -> list[int]:
        n_ctx = self.runtime.options.n_ctx
        # an answer of some length must fit, or dropping would begin again with every message
        reserve = min(self.arguments.max_tokens, n_ctx // 4)
        tokens, dropped = self.conversation.fit(self.runtime.chat_tokens, n_ctx - reserve)
        if dropped:
            self.say(
                f"note: the conversation outgrew the context of {n_ctx} tokens: the model no longer sees its oldest "
                f"{dropped} messages. /reset starts over, a larger --ctx holds more"
            )
        return tokens

    def _stream(self, tokens: list[int]) -> str:
        print_chunk = text_writer(self.runtime, self.arguments.show_exits)
        parts: list[str] = []

        def write(chunk: Chunk | None) -> None:
            if chunk is not None:
                parts.append(chunk.text)
            print_chunk(chunk)

        self._steered.begin()
        whole = answer(self.runtime, tokens, self.arguments, write, self._steered.token)
        summary = self.runtime.summary
        self._energy.add(summary)
        for text in display.footer(summary, seeded=False) if whole else ["stopped"]:
            self.say(f"[{text}]")
        self._steered.sensing.tell_gaps(summary)
        return "".join(parts)

    def _show_stats(self) -> None:
        engine, stats = self.runtime.engine, self.runtime.engine.stats
        display.tell(f"context: {len(engine.tokens)} of {engine.n_ctx} tokens")
        display.tell(f"messages: {len(self.conversation.turns)}, generated tokens: {stats.published}")
        if stats.published:
            display.tell(f"mean depth: {stats.mean_depth:.1f} of {self.runtime.model.n_layer} layers")
        display.tell(f"left early: {stats.exits}, drafts accepted: {stats.accepted} of {stats.drafted}")
        if stats.relaxed:
            display.tell(f"accepted as full depth's second choice: {stats.relaxed} ({stats.changed:.1%} of the tokens)")
        display.tell(f"audited exits that full depth disagreed with: {stats.disagreed} of {stats.audited}")
        if self._energy.n_known:
            display.tell(f"energy: {self._energy}")
        display.tell(f"seed: {self.runtime.options.sampling.seed}")

    def _reset(self) -> None:
        self.conversation.turns.clear()
        self.runtime.engine.reset()
        self.say("the conversation is forgotten")

    def _set_system(self, text: str) -> None:
        self.conversation.system = text or None
        self.say("the system message is set" if text else "there is no system message now")

    def _set_mode(self, name: str) -> None:
        modes = [mode.value for mode in Mode]
        if name not in modes:
            raise UsageError(f"there is no mode '{name}'", f"give one of {', '.join(modes)}")
        self._steered.reopen(dataclasses.replace(self.runtime.asked, mode=Mode(name)))
        self.say(f"mode {name}")
        self._show_legend()

    def _show_legend(self) -> None:
        if self.arguments.show_exits:
            self.say(painter_of(self.runtime).legend())
