"""What Prometheus is told, from a registry of its own. Counts are of this process; a restart begins anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..batching import BatchStats, Request
from ..control import Rung
from ..sensors.reading import Reading

if TYPE_CHECKING:
    from .worker import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "edge_runtime"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_LONGEST_GAP_S = 60.0  # between two readings that a power is taken to have lasted


class Energy:
    """Joules so far, by how their power came about; hears a sampler's readings on that sampler's thread."""

    def __init__(self) -> None:
        self.latest: Reading | None = None
        self.joules: dict[str, float] = {}

    def __call__(self, reading: Reading) -> None:
        before, self.latest = self.latest, reading
        if before is None or before.power_w is None or before.power_source is None:
            return
        seconds = reading.time_s - before.time_s
        if 0 < seconds <= _LONGEST_GAP_S:
            source = before.power_source.value
            self.joules = {**self.joules, source: self.joules.get(source, 0.0) + before.power_w * seconds}


class Metrics:
    """Counts and times; each method may be called from any thread."""

    def __init__(self, energy: Energy | None = None) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.energy = energy or Energy()
        self.load: Callable[[], Load] | None = None
        self.engine: Callable[[], BatchStats | None] = lambda: None
        self.exits: Callable[[], Mapping[int, float]] = dict  # thresholds in force, by layer
        self.depths: tuple[int, ...] = ()  # layers that a token can take
        self.rung: Callable[[], Rung | None] = lambda: None  # the setting in force where targets are held
        self.thresholds: dict[tuple[str, str], float] = {}  # of the label pack, by stage and label
        self.state_saved = True
        self._latest: dict[Request, float] = {}  # when the newest token of an answer came
        self._lock = threading.Lock()
        named: Any = {"namespace": _PREFIX, "registry": self.registry}
        self.requests = Counter("requests", "Requests by endpoint and status", ["endpoint", "status"], **named)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the request to its first token", buckets=_SECONDS, **named
        )
        self.per_token = Histogram(
            "token_seconds",
            "Between tokens of an answer; of several at once, a share",
            buckets=_SECONDS,
            **named,
        )
        self.depth = Counter("decisions_by_depth", "Moderated texts by the layers they took", ["layers"], **named)
        self.drifts = Counter("moderation_drifts", "Times that moderated texts became unlike the pack's", **named)
        self.registry.register(_Now(self))

    def tokens(self, request: Request, n_new: int, now: float) -> None:
        """`n_new` tokens of a request came."""
        clock = request.stats.clock
        if n_new == 0:
            return
        with self._lock:
            before = self._latest.get(request)
            self._latest[request] = now
        if before is None:
            self.first_token.observe(max(0.0, now - clock.start))
            return
        for _ in range(n_new):
            self.per_token.observe(max(0.0, now - before) / n_new)

    def ended(self, request: Request) -> None:
        with self._lock:
            self._latest.pop(request, None)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What is looked up when somebody asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._of_engine()
        yield from self._of_control()
        yield from self._of_machine()
        yield _gauge("state_saved", "1 if what was learnt could be saved", float(self._metrics.state_saved))
        thresholds = GaugeMetricFamily(
            f"{_PREFIX}_moderation_threshold",
            "Confidence from which on a text leaves at a stage",
            labels=["stage", "label"],
        )
        for key, value in self._metrics.thresholds.items():
            if value <= 1:  # above, none leaves there
                thresholds.add_metric(key, value)
        yield thresholds

    def _of_engine(self) -> Iterator[Metric]:
        metrics, stats = self._metrics, self._metrics.engine()
        if metrics.load is not None:
            load = metrics.load()
            yield _gauge("queue_length", "Requests that wait for a place", load.waiting)
            yield _gauge("running", "Requests that are answered", load.running)
            yield _gauge("conversations_held", "Conversations in the KV cache", load.held)
        if stats is None:
            return
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
            ("reused_prompt_tokens", "Tokens of prompts that the KV cache held already", stats.reused_tokens),
            ("generated_tokens", "Tokens of answers", stats.published),
            ("drafted_tokens", "Tokens proposed", stats.drafted),
            ("accepted_tokens", "Proposed tokens that were accepted", stats.accepted),
            ("relaxed_tokens", "Accepted tokens that were full depth's second choice", stats.relaxed),
            ("audited_exits", "Early exits compared with full depth", stats.audited),
            ("disagreed_exits", "Audited exits where full depth would have chosen otherwise", stats.disagreed),
            ("cancelled_requests", "Requests given up before their end", stats.cancelled),
            ("failed_requests", "Requests that the engine could not answer", stats.failed),
            ("batches", "Passes through the model", stats.batches),
            ("evicted_conversations", "Conversations given up for another", stats.evicted),
        ):
            yield _counter(name, text, value)
        yield _depths({**dict.fromkeys(metrics.depths, 0), **stats.by_depth})

    def _of_control(self) -> Iterator[Metric]:
        exits = GaugeMetricFamily(
            f"{_PREFIX}_exit_threshold", "Uncertainty below which a token may exit", labels=["layer"]
        )
        for layer, threshold in self._metrics.exits().items():
            exits.add_metric([str(layer)], threshold)
        yield exits
        rung = self._metrics.rung()
        if rung is not None:
            yield _gauge("threads", "Threads that compute, by the targets held", rung.n_threads)
            yield _gauge("rest_share", "Share of the time in which nothing is computed, by the targets held", rung.rest)

    def _of_machine(self) -> Iterator[Metric]:
        energy, reading = self._metrics.energy, self._metrics.energy.latest
        joules = CounterMetricFamily(
            f"{_PREFIX}_energy_joules", "Energy of the machine since the server began", labels=["source"]
        )
        for source, value in energy.joules.items():
            joules.add_metric([source], value)
        yield joules
        if reading is None:
            return
        if reading.power_w is not None and reading.power_source is not None:
            power = GaugeMetricFamily(f"{_PREFIX}_power_watts", "Power of the machine", labels=["source"])
            power.add_metric([reading.power_source.value], reading.power_w)
            yield power
        if reading.temp_c is not None:
            yield _gauge("temperature_celsius", "The hottest of what matters to the processor", reading.temp_c)
        if reading.throttled_now is not None:
            yield _gauge("throttled", "1 if the machine slows itself down", float(bool(reading.throttled_now)))


def _depths(by_depth: Mapping[int, int]) -> Metric:
    """Layers that the tokens of answers took, as a histogram."""
    counts = [(str(float(depth)), by_depth[depth]) for depth in sorted(by_depth)]
    cumulative = list(zip([le for le, _ in counts], accumulate(n for _, n in counts), strict=True))
    total = cumulative[-1][1] if cumulative else 0
    found = HistogramMetricFamily(f"{_PREFIX}_token_depth_layers", "Layers that a token of an answer took")
    found.add_metric([], [*cumulative, ("+Inf", total)], sum(depth * n for depth, n in by_depth.items()))
    return found


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)
