"""Describe camera events, one sentence each, by a deadline.

examples:
  detector | python examples/camera_events.py --deadline 3
  python examples/camera_events.py --mqtt localhost --topic-in cameras/events --topic-out cameras/sentences

An event is a line, or an MQTT message: {"camera": "front door", "time": "21:14", "detections": ["person", "dog"]}

The newest event is described first. A sentence that is not finished --deadline seconds after its event came is cut at
the end of a word and marked with "…"; an event whose turn has not come by then is dropped and counted. MQTT needs the
package paho-mqtt; a broker that goes away is waited for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from edge_runtime.errors import EdgeError, UsageError
from edge_runtime.generate import Message, RunOptions, Runtime
from edge_runtime.types import Mode

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage

SYSTEM = Message("system", "You watch security cameras. Say in one short sentence what is seen.")
NAME = re.compile(r"[\w .:+-]{1,32}")  # of cameras and things: nothing that a chat template could take for its own
SENTENCE = re.compile(r".*?\D[.!?](?= )")
MAX_DETECTIONS, MAX_TOKENS = 10, 60
INTERRUPTED = 130

Arrivals: TypeAlias = "SimpleQueue[tuple[float, str] | None]"  # when a line came, and the line; None behind the last
Publish: TypeAlias = Callable[[str], object]


@dataclass(frozen=True)
class Event:
    due_s: float  # when its sentence must be out, on the describer's clock
    name: str
    question: str


def parse(line: str, due_s: float) -> Event:
    """The event in a line. Raises ValueError if it holds none."""
    try:
        record = json.loads(line)
        camera, at, detections = record["camera"], record["time"], record["detections"]
        named = all(NAME.fullmatch(name) for name in (camera, at, *detections))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not (named and isinstance(detections, list) and 1 <= len(detections) <= MAX_DETECTIONS):
        raise ValueError(f"wanted are 1 to {MAX_DETECTIONS} detections, and names such as 'front door'")
    return Event(due_s, f"{at} {camera}", f"Camera: {camera}. Time: {at}. Seen: {', '.join(detections)}.")


def in_time(
    arrivals: Arrivals, deadline_s: float, counts: Counter[str], clock: Callable[[], float] = time.monotonic
) -> Iterator[Event]:
    """The newest event that waits, again and again, until None has arrived; counts lines that never get there."""
    waiting: list[Event] = []  # the oldest first
    ended = False
    while waiting or not ended:
        while not ended and (not waiting or not arrivals.empty()):
            arrival = arrivals.get()
            if arrival is None:
                ended = True
                continue
            came_s, line = arrival
            try:
                waiting.append(parse(line, came_s + deadline_s))
            except ValueError as error:
                counts["malformed"] += 1
                tell(f"skipped {line[:80]!r}: {error}")
        while waiting and waiting[0].due_s <= clock():
            counts["dropped"] += 1
            tell(f"dropped, too late: {waiting.pop(0).name}")
        if waiting:
            yield waiting.pop()


def describe(runtime: Runtime, event: Event, clock: Callable[[], float] = time.monotonic) -> str:
    """The model's first sentence about an event, or the whole words that there are when it is due, and "…"."""
    text = ""
    tokens = runtime.chat_tokens([SYSTEM, Message("user", event.question)])
    with closing(runtime.stream(tokens, MAX_TOKENS)) as chunks:
        for chunk in chunks:
            text = (text + chunk.text).replace("\n", " ").lstrip()
            if whole := SENTENCE.match(text):
                return whole.group()
            if chunk.finish_reason == "stop":
                return text.rstrip()
            if clock() >= event.due_s:
                break
    return f"{text.rpartition(' ')[0]} …".lstrip()


def read(lines: Iterable[str], arrivals: Arrivals) -> None:
    """Note when each line comes, until they end."""
    for line in filter(str.strip, lines):
        arrivals.put((time.monotonic(), line))
    arrivals.put(None)


def connect(host: str, port: int, topic: str, arrivals: Arrivals) -> Client:
    """A client that takes messages of a topic; its thread connects, and again whenever the broker was away.

    Raises UsageError without paho-mqtt, and for what is no topic.
    """
    try:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion
    except ImportError:
        raise UsageError("MQTT needs the package paho-mqtt", "pip install paho-mqtt") from None

    def on_connect(client: Client, *_: object) -> None:
        tell(f"connected to {host}:{port}")
        client.subscribe(topic)  # a subscription ends with its connection

    def on_message(_client: Client, _data: object, message: MQTTMessage) -> None:
        arrivals.put((time.monotonic(), message.payload.decode("utf-8", "replace")))

    client = Client(CallbackAPIVersion.VERSION2)
    client.on_connect, client.on_message = on_connect, on_message
    client.on_connect_fail = client.on_disconnect = lambda *_: tell(f"not connected to {host}:{port}, trying again")
    try:
        client.subscribe(topic)  # before there is a connection, this checks the name
        client.connect_async(host, port)
    except ValueError as error:
        raise UsageError(f"cannot take {topic!r} from {host}:{port}: {error}", "name a broker and a topic") from None
    client.loop_start()
    return client


def main(argv: Sequence[str] | None = None) -> int:
    """Describe events until they end; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=5.0, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument("--mqtt", metavar="HOST", help="of a broker; without it, stdin and stdout are used")
    parser.add_argument("--port", type=int, default=1883, help="default: %(default)s")
    parser.add_argument("--topic-in", default="cameras/events", metavar="TOPIC", help="default: %(default)s")
    parser.add_argument("--topic-out", default="cameras/sentences", metavar="TOPIC", help="default: %(default)s")
    parser.add_argument("--model", default="smollm2-135m", help="name or path of a GGUF (default: %(default)s)")
    parser.add_argument("--mode", default="auto", choices=[mode.value for mode in Mode], help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all physical cores")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[^+#]+", arguments.topic_out):
        parser.error("--topic-out takes one topic, without wildcards")
    options = RunOptions(arguments.model, Mode(arguments.mode), n_threads=arguments.threads)
    arrivals: Arrivals = SimpleQueue()
    counts = Counter(described=0, dropped=0, malformed=0)
    publish: Publish = partial(print, flush=True)
    try:
        # not sys.stdin, which Python closes at its end, though the thread may still be reading it
        lines = None if arguments.mqtt else open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        with Runtime(options) as runtime:
            if lines is None:
                client = connect(arguments.mqtt, arguments.port, arguments.topic_in, arrivals)
                publish = partial(client.publish, arguments.topic_out, qos=1)
            else:
                threading.Thread(target=read, args=(lines, arrivals), daemon=True).start()
            for event in in_time(arrivals, arguments.deadline, counts):
                publish(f"{event.name}: {describe(runtime, event)}")
                counts["described"] += 1
    except (EdgeError, OSError) as error:  # OSError: no stdin, or nobody reads stdout any more
        tell(f"error: {error}")
        return error.exit_code if isinstance(error, EdgeError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        tell(", ".join(f"{n} {what}" for what, n in counts.items()))
    return 0


def tell(text: str) -> None:
    """A line for the person, not for a program."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
