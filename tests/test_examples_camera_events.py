"""The event describer: deadlines on a clock of our own, drops, bad lines; and MQTT with a real broker."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any

import pytest

from .cli_helpers import assert_clean, finish, start
from .conftest import TinyMaker
from .example_helpers import FakeRuntime, example, load_example

camera_events = load_example("camera_events")
WAIT_S = 60.0
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


@dataclass
class FakeClock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def tick(self, _n_tokens: int) -> None:
        """A second for each token."""
        self.now_s += 1


def line(camera: str = "yard", **changes: Any) -> str:
    return json.dumps({"camera": camera, "time": "21:14", "detections": ["person", "dog"], **changes})


def arrivals(*items: tuple[float, str]) -> SimpleQueue[tuple[float, str] | None]:
    queue: SimpleQueue[tuple[float, str] | None] = SimpleQueue()
    for item in (*items, None):
        queue.put(item)
    return queue


def described(text: str, deadline_s: float) -> str:
    """What becomes of an answer that takes a second per word."""
    clock = FakeClock()
    runtime = FakeRuntime(text, on_token=clock.tick)
    return str(camera_events.describe(runtime, camera_events.parse(line(), deadline_s), clock))


# ── sentences and deadlines ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "deadline_s", "sentence"),
    [
        ("A dog barks.", 100, "A dog barks."),
        ("A dog barks. It is loud.", 100, "A dog barks."),
        ("At 3.5 meters, a dog! Oh", 100, "At 3.5 meters, a dog!"),
        ("A dog\nbarks", 100, "A dog barks"),
        ("A dog barks.", 3, "A dog …"),  # whether the third word is whole is not known when it comes
        ("A dog barks.", 2, "A …"),
        ("A dog barks.", 1, "…"),
        ("A dog barks. It is loud.", 4, "A dog barks."),
    ],
)
def test_a_sentence_is_whole_or_cut_behind_a_word_when_it_is_due(text: str, deadline_s: float, sentence: str) -> None:
    assert described(text, deadline_s) == sentence


def test_nothing_is_computed_behind_the_deadline() -> None:
    clock = FakeClock()
    runtime = FakeRuntime("one two three four five six", on_token=clock.tick)
    camera_events.describe(runtime, camera_events.parse(line(), 2), clock)
    assert (runtime.n_tokens, runtime.n_closed) == (2, 1)


def test_an_answer_without_end_is_cut() -> None:
    sentence = described("bla " * 1000, 1e9)
    assert sentence == " ".join(["bla"] * (camera_events.MAX_TOKENS - 1)) + " …"


def test_the_model_is_told_what_was_seen() -> None:
    runtime = FakeRuntime("Yes.")
    camera_events.describe(runtime, camera_events.parse(line(), 9), FakeClock())
    assert runtime.asked[0][-1].content == "Camera: yard. Time: 21:14. Seen: person, dog."


# ── which events, and which lines ───────────────────────────────────────────────────────────────────────────────────


def names_in_time(
    clock: FakeClock, queue: Any, deadline_s: float, seconds_each: float
) -> tuple[list[str], Counter[str]]:
    """Cameras in the order in which they are described, if each takes so long."""
    counts: Counter[str] = Counter()
    cameras = []
    for event in camera_events.in_time(queue, deadline_s, counts, clock):
        cameras.append(event.name.removeprefix("21:14 "))
        clock.now_s += seconds_each
    return cameras, counts


def test_events_in_time_are_all_described_the_newest_first() -> None:
    queue = arrivals((0, line("a")), (1, line("b")), (2, line("c")))
    assert names_in_time(FakeClock(2), queue, 10, 1) == (["c", "b", "a"], Counter())


def test_who_falls_behind_drops_the_oldest_and_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    queue = arrivals(*((t, line(f"camera {t}")) for t in range(6)))
    cameras, counts = names_in_time(FakeClock(5), queue, 5, 2)
    # 0 is due at once; by 7, 1 and 2 are; by 9, 3 and 4 are
    assert cameras == ["camera 5", "camera 4"]
    assert counts == {"dropped": 4}
    assert capsys.readouterr().err.count("dropped, too late: ") == 4


def test_what_comes_during_a_description_goes_first() -> None:
    queue: SimpleQueue[tuple[float, str] | None] = SimpleQueue()
    queue.put((0, line("first")))
    queue.put((0, line("second")))
    events = camera_events.in_time(queue, 10, Counter(), FakeClock())
    assert next(events).name.endswith("second")
    queue.put((1, line("third")))
    queue.put(None)
    assert [event.name for event in events] == ["21:14 third", "21:14 first"]


@pytest.mark.parametrize(
    "bad",
    [
        "person",
        "[]",
        "[" * 100_000,
        "null",
        "{}",
        line(time=3),
        line(detections="dog"),
        line(detections=[]),
        line(detections=["dog"] * 11),
        line(detections=[["dog"]]),
        line(detections=[""]),
        line("x" * 33),
        line("<|im_end|>"),
        line("two\nlines"),
        line("\ud800"),
    ],
    ids=range(15),
)
def test_lines_that_hold_no_event_are_reported_and_skipped(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    cameras, counts = names_in_time(FakeClock(), arrivals((0, bad), (0, line("good"))), 10, 1)
    assert (cameras, counts) == (["good"], {"malformed": 1})
    said = capsys.readouterr().err
    assert said.startswith("skipped '")
    assert said.count("\n") == 1
    assert len(said) < 300


def test_lines_are_read_to_their_end() -> None:
    queue: SimpleQueue[tuple[float, str] | None] = SimpleQueue()
    camera_events.read(["one\n", "\n", "two\n"], queue)
    items = [queue.get() for _ in range(3)]
    assert [item and item[1] for item in items] == ["one\n", "two\n", None]


# ── the program ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mistakes_end_it_with_a_word(tmp_path: Path) -> None:
    result = finish(start(example("camera_events", "--model", tmp_path / "none.gguf")))
    assert_clean(result, 1)
    with pytest.raises(SystemExit, match="2"):
        camera_events.main(["--topic-out", "a/#"])


def test_ctrl_c_ends_it_with_the_counts(tiny_path: TinyMaker) -> None:
    model = tiny_path("llama", tokenizer=True)
    with start(example("camera_events", "--model", model, "--deadline", 1000)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{line()}\n".encode())
        assert process.stdout.readline().startswith(b"21:14 yard: ")
        process.send_signal(signal.SIGINT)
        process.wait(120)
        result = finish(process)
    assert_clean(result, 130)
    assert result.err.endswith(" 0 dropped, 0 malformed\n")


@pytest.mark.model
def test_the_program_describes_events_from_a_pipe() -> None:
    with start(example("camera_events", "--deadline", 1000)) as process:
        assert process.stdin is not None
        process.stdin.write(f"{line('front door')}\nnonsense\n{line('yard')}\n".encode())
        result = finish(process)
    assert_clean(result, 0)
    assert sorted(row.partition(": ")[0] for row in result.out.splitlines()) == ["21:14 front door", "21:14 yard"]
    assert all(row.partition(": ")[2] for row in result.out.splitlines())
    assert result.err.endswith("2 described, 0 dropped, 1 malformed\n")


# ── MQTT ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def broker(folder: Path, port: int) -> Iterator[None]:
    """A real broker, listening."""
    assert MOSQUITTO is not None
    config = folder / "mosquitto.conf"
    config.write_text("allow_anonymous true\npersistence false\n" + f"listener {port} 127.0.0.1\nlog_dest stderr\n")
    process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for row in process.stderr:  # to its end, if it does not start
            said.append(row)
            if row.rstrip().endswith("running"):
                break
        else:
            pytest.fail(f"mosquitto did not start: {''.join(said)}")
        yield
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


@contextmanager
def watcher(port: int) -> Iterator[tuple[Any, Queue[str]]]:
    """A client, and what it gets of the sentences."""
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion

    client, sentences = Client(CallbackAPIVersion.VERSION2), Queue[str]()
    ready = threading.Event()
    client.on_connect = lambda client, *_: client.subscribe("sentences", qos=1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda _client, _data, message: sentences.put(message.payload.decode())
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        assert ready.wait(WAIT_S)
        yield client, sentences
    finally:
        client.disconnect()
        client.loop_stop()


needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (Debian: mosquitto)")


@needs_broker
def test_mqtt_goes_on_whenever_the_broker_is_back(tmp_path: Path, tiny_path: TinyMaker) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    port = free_port()
    model = tiny_path("llama", tokenizer=True)
    arguments = ("--mqtt", "127.0.0.1", "--port", port, "--topic-in", "events/+", "--topic-out", "sentences")
    with start(example("camera_events", "--model", model, "--deadline", 1000, *arguments)) as process:
        try:
            # three lives: it is there before the broker, and again after each of its absences
            for n in range(3):
                with broker(tmp_path, port), watcher(port) as (client, sentences):
                    # retained, so that it is delivered whenever the program has subscribed
                    client.publish("events/a", b"\xff nonsense", qos=1)
                    client.publish("events/b", line(f"camera {n}"), qos=1, retain=True)
                    assert sentences.get(timeout=WAIT_S).startswith(f"21:14 camera {n}: ")
        finally:
            process.send_signal(signal.SIGINT)
        process.wait(120)
        result = finish(process)
    assert_clean(result, 130)
    assert result.err.count(f"connected to 127.0.0.1:{port}\n") >= 3


def test_without_paho_it_says_what_to_install(
    tiny_path: TinyMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    assert camera_events.main(["--mqtt", "127.0.0.1", "--model", str(tiny_path("llama", tokenizer=True))]) == 2
    assert "hint: pip install paho-mqtt\n" in capsys.readouterr().err


def test_a_topic_that_is_none_is_refused(tiny_path: TinyMaker, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    model = str(tiny_path("llama", tokenizer=True))
    assert camera_events.main(["--mqtt", "127.0.0.1", "--model", model, "--topic-in", "a/#/b"]) == 2
    assert "error: cannot take 'a/#/b'" in capsys.readouterr().err
