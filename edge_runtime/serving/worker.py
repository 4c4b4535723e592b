"""The engine's thread: takes requests in, steps while there is work, and sleeps when there is none."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..batch_costs import LiveCosts
from ..batching import Conversations, Event, Failed, Finished, Request, Token
from ..errors import EdgeError
from ..pilot import Pilot
from ..sensors.sampler import Sampler
from ..service.watchdog import Watchdog
from ..steering import Plan
from ..summary import Finish
from .answers import Answer, End
from .errors import ApiError
from .holding import SteeredEngine, held
from .metrics import Metrics

logger = logging.getLogger("edge_runtime.serving")

_STUCK_S = 120.0  # without a step while there is work: not ready
_TICK_S = 1.0  # between signs of life in a rest
_RETRY_S = 60  # the longest that a client is told to wait


@dataclass(frozen=True, slots=True)
class Opened:
    """What a thread works with; it closes it at its end."""

    engine: Conversations
    costs: LiveCosts | None  # that learn from each batch
    close: Callable[[], None]
    steered: SteeredEngine | None = None  # the engine, as targets see it; None: nothing can be held
    sampler: Sampler | None = None  # what they look at


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the thread is."""

    waiting: int = 0
    running: int = 0
    held: int = 0  # conversations in the KV cache


class EngineThread:
    """Owns an engine. `submit`, `cancel` and `stop` may be called from any thread, and none of them waits."""

    def __init__(
        self,
        open_engine: Callable[[], Opened],
        watchdog: Watchdog,
        metrics: Metrics,
        queue_length: int,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`queue_length` requests may wait for a place; it may be set anew. `open_engine` is called by the thread.

        `changed` is called when the engine is open, and at the thread's end; `opened` and `failure` say which it is.
        """
        self.queue_length = queue_length
        self.failure: BaseException | None = None
        self.opened: Opened | None = None
        self.draining = False  # no new requests
        self._open, self._watchdog, self._metrics = open_engine, watchdog, metrics
        self._tell_changed = changed
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Answer, bool]] = deque()  # True: take in, False: give up
        self._targets: list[Plan | None] = []  # the newest, if they are still to be put into force
        self._held = ExitStack()
        self.pilot: Pilot | None = None  # where targets are held
        self._n_open = 0  # requests taken in and not yet ended
        self._stopping = False
        self._answers: dict[Request, Answer] = {}
        self._stepped_s = time.monotonic()
        self._mean_s = 1.0  # that an answer took
        self._thread = threading.Thread(target=self._run, name="edge-engine", daemon=True)

    # ── any thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Take a request in. Raises ApiError 503 while nothing can be answered, 429 if too many wait."""
        with self._changed:
            if self.draining or self._stopping:
                raise ApiError(503, "the server is shutting down", retry_after_s=10)
            if self.opened is None:
                raise ApiError(503, "the model is being loaded", retry_after_s=5)
            n_places = len(self.opened.engine.pool.sequences)
            if self._n_open >= n_places + self.queue_length:
                rounds = 1 + self.queue_length / n_places
                retry_s = min(_RETRY_S, max(1, round(self._mean_s * rounds)))
                raise ApiError(429, "too many requests wait already", code="queue_full", retry_after_s=retry_s)
            self._n_open += 1
            self._inbox.append((answer, True))
            self._changed.notify()

    def cancel(self, answer: Answer) -> None:
        """Give a request up; it ends as interrupted before another token of it is computed."""
        with self._changed:
            self._inbox.append((answer, False))
            self._changed.notify()

    def hold(self, targets: Plan | None) -> None:
        """Hold these from the next batch on, and no others; None: nothing."""
        with self._changed:
            self._targets = [targets]
            self._changed.notify()

    def stop(self) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded, and the thread makes progress where there is work."""
        if self.opened is None or not self._thread.is_alive() or self.draining:
            return False
        return self._n_open == 0 or time.monotonic() - self._stepped_s < _STUCK_S

    @property
    def n_open(self) -> int:
        """Requests that wait or are answered."""
        return self._n_open

    @property
    def load(self) -> Load:
        if self.opened is None:
            return Load()
        sequences = self.opened.engine.pool.sequences
        running = sum(sequence.busy for sequence in sequences)
        held = sum(sequence.busy or bool(sequence.held) for sequence in sequences)
        return Load(max(0, self._n_open - running), running, held)

    # ── its own thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            opened = self._open()
        except BaseException as error:
            self.failure = error
            self._tell_changed()
            return
        try:
            self._take_targets(opened)
            self.opened = opened
            self._tell_changed()
            self._serve(opened)
        except BaseException as error:  # the engine itself failed, not a request
            logger.error("the engine stopped: %s\n%s", type(error).__name__, _where(error))
            self.failure = error
        finally:
            self.opened = None
            for request in self._answers:
                opened.engine.cancel(request)
            self._end_all(ApiError(503, "the server is shutting down", retry_after_s=10))
            self._stop_holding()
            opened.close()
            self._tell_changed()

    def _serve(self, opened: Opened) -> None:
        while self._wait(opened):
            with self._watchdog.work():
                if self.pilot is not None and not opened.engine.idle:
                    self.pilot.begin()
                while not opened.engine.idle:
                    self._step(opened)
                    self._watchdog.tick()
                    if not self._take_in(opened):
                        return

    def _wait(self, opened: Opened) -> bool:
        """Sleep until there is something to do; False if that is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._targets or self._stopping)
            self._stepped_s = time.monotonic()
        self._take_targets(opened)
        return self._take_in(opened)

    def _take_in(self, opened: Opened) -> bool:
        engine = opened.engine
        with self._changed:
            inbox, stopping = list(self._inbox), self._stopping
            self._inbox.clear()
        steered = opened.steered
        if self._targets and steered is not None and steered.times is not None:
            self._take_targets(opened)
        if self._targets:  # times are to be measured first, which needs an idle engine: nobody new until then
            kept = [entry for entry in inbox if entry[0].request is None]
            inbox = [entry for entry in inbox if entry[0].request is not None]
            with self._changed:
                self._inbox.extendleft(reversed(kept))
        for answer, wanted in inbox:
            if not wanted:
                if answer.request is not None:
                    engine.cancel(answer.request)
                continue
            try:
                answer.request = engine.submit(answer.question())
                self._answers[answer.request] = answer
            except Exception as error:
                self._end(answer, End(Finish.INTERRUPTED, error))
        return not stopping

    def _take_targets(self, opened: Opened) -> None:
        """Put new targets into force, if there are any."""
        steered, sampler = opened.steered, opened.sampler
        with self._changed:
            found, self._targets = self._targets, []
        if not found:
            return
        self._stop_holding()
        if steered is None or sampler is None:
            return
        try:
            self.pilot = self._held.enter_context(held(found[0], steered, sampler, self._rest))
        except EdgeError as error:
            logger.error("the targets are not held: %s", error.message)

    def _stop_holding(self) -> None:
        self.pilot = None
        self._held.close()

    def _rest(self, seconds: float) -> None:
        """Compute nothing for a while; that is no lack of progress, and the end ends it."""
        until_s = time.monotonic() + seconds
        with self._changed:
            while not self._stopping and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(min(left_s, _TICK_S))
                self._watchdog.tick()
        self._stepped_s = time.monotonic()

    def _step(self, opened: Opened) -> None:
        engine, stats = opened.engine, opened.engine.stats
        batches, rows, start = stats.batches, stats.rows, time.perf_counter()
        events = engine.step()
        now = time.perf_counter()
        self._stepped_s = time.monotonic()
        n_rows = stats.rows - rows
        if opened.costs is not None and stats.batches == batches + 1 and n_rows <= len(opened.costs):
            opened.costs.observe(n_rows, now - start)
        self._tell(events, now)
        if self.pilot is not None:
            self.pilot.batch(now - start, _tokens_each(engine, events))

    def _tell(self, events: Iterable[Event], now: float) -> None:
        grown: dict[Request, int] = {}
        for event in events:
            request = event.request
            if isinstance(event, Token):
                grown[request] = grown.get(request, 0) + 1
                continue
            n_new = grown.pop(request, 0)
            self._metrics.tokens(request, n_new, now)
            if isinstance(event, Finished):
                end = End(event.finish)
            else:
                end = End(Finish.INTERRUPTED, event.error)
                self._log_failure(event)
            answer = self._answers.pop(request, None)
            if answer is not None:
                self._end(answer, end)
        for request, n_new in grown.items():
            self._metrics.tokens(request, n_new, now)
            self._answers[request].publish()

    def _end(self, answer: Answer, end: End) -> None:
        with self._changed:
            self._n_open -= 1
        if answer.request is not None:
            clock = answer.request.stats.clock
            self._mean_s += 0.2 * (time.perf_counter() - clock.start - self._mean_s)
            self._metrics.ended(answer.request)
        answer.publish(end)

    def _log_failure(self, event: Failed) -> None:
        if isinstance(event.error, EdgeError):
            logger.warning("an answer failed: %s", event.error.message)
        else:  # its text may quote a prompt
            logger.error("an answer failed: %s\n%s", type(event.error).__name__, _where(event.error))

    def _end_all(self, error: ApiError) -> None:
        with self._changed:
            self._stopping = True
            inbox = [answer for answer, wanted in self._inbox if wanted]
            self._inbox.clear()
        rest: Sequence[Answer] = [*self._answers.values(), *inbox]
        self._answers.clear()
        for answer in rest:
            self._end(answer, End(Finish.INTERRUPTED, error))


def _tokens_each(engine: Conversations, events: Iterable[Event]) -> float:
    """Tokens that each answer got in a step, on average; 0 for a step in which prompts were computed."""
    got = Counter(event.request for event in events if isinstance(event, Token))
    begun = any(len(request.answer) == n for request, n in got.items())
    return 0.0 if not got or begun or engine.n_reading else got.total() / len(got)


def _where(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()
