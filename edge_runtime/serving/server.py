"""`edge-run serve`: from a configuration to a server that runs until it is told to stop.

Loading happens behind an open port, so that clients and the service manager hear early that it goes on. SIGTERM and
Ctrl-C let answers come to their end; a second one ends the process at once. SIGHUP reads the configuration again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..config import Config
from ..config_load import LoadedConfig, Sources, read_api_key, reload_config
from ..energy.model import PowerModel
from ..errors import EdgeError, UsageError
from ..sensors.detect import detect
from ..sensors.machine import Machine
from ..sensors.reading import Reading
from ..sensors.sampler import Sampler, Timing
from ..service.journal import JournalFormatter, goes_to_journal
from ..service.notify import Notifier, forget_socket, notifier
from ..service.state import StateFile
from ..service.watchdog import Watchdog, watchdog_interval_s
from .app import Application
from .backend import Backend, plan_backend
from .connections import Http, WhileLoading
from .guard import Rules
from .holding import NOW, plan_targets
from .listening import address_of, has_unix, is_local, open_listeners
from .metrics import Energy, Metrics
from .moderation import Moderation
from .routes import Service
from .worker import EngineThread, Opened

logger = logging.getLogger("edge_runtime.serving")

_GRACE_S = 30.0  # for answers under way when the end has come
_LEAVE_S = 10.0  # for the engine's thread, which may be in the middle of a batch
_GONE_S = 2.0  # for what answers clients that are gone
_STATUS_S = 10.0
_SAVE_S = 600.0
_SAVE_AGAIN_S = 60.0  # after it failed
_SENSORS_S = 1.0
_BODY_S = 60.0
_LOADING_S = 30.0  # that a request waits for the model, which is less than most proxies wait for us
_NEVER_S = 1e6  # nobody asks for signs of life


class Server:
    """Everything of one process that serves. `run` once."""

    def __init__(self, loaded: LoadedConfig, sources: Sources) -> None:
        """Raises UsageError or EdgeError for what cannot be served, before anything large is loaded."""
        self._loaded, self._sources = loaded, sources
        config = loaded.config
        self._plan = plan_backend(config, logger.warning)
        self._mode, self._device = config.model.mode, config.device.profile  # of this process, whatever is read later
        targets = plan_targets(loaded, self._plan.run, self._plan.pack, config.device.profile)
        self._listeners = open_listeners(config.server.host, config.server.port, os.environ)
        rules = self._rules(config)
        self._notifier: Notifier = notifier(os.environ)
        forget_socket(os.environ)
        interval_s = watchdog_interval_s(os.environ)
        self._watched = interval_s is not None
        self._watchdog = Watchdog(self._notifier.watchdog, interval_s or _NEVER_S)
        self._metrics = Metrics(Energy())
        self._state = StateFile(config.service.state_dir / "serve.json", "serve")
        self._problem = ""  # why state cannot be saved
        self._signals = 0
        self._counted = (time.monotonic(), 0)  # tokens at that time, for the rate
        self._thread = EngineThread(
            self._open, self._watchdog, self._metrics, config.limits.queue_length, self._engine_changed
        )
        self._thread.hold(targets)
        moderation = Moderation(self._served, self._watchdog, self._metrics, self._plan.options.n_threads)
        self.service = Service(self._thread, self._metrics, moderation, config.limits)
        show = is_local(self._listeners)
        self.application = Application(self.service, rules, config.server.cors_origins, show_document=show)
        self._metrics.load = lambda: self._thread.load
        self._metrics.rung = lambda: None if self._thread.pilot is None else self._thread.pilot.rung
        self._metrics.engine = lambda: None if self._thread.opened is None else self._thread.opened.engine.stats

    def _rules(self, config: Config) -> Rules:
        """Raises UsageError for a key that cannot be read, and for a server open to others without one."""
        path = config.server.api_key_file
        key = None if path is None else read_api_key(path)
        if key is None and not is_local(self._listeners):
            raise UsageError(
                f"others can reach {config.server.host}, and there is no API key",
                "set server.api_key_file, or serve on 127.0.0.1",
            )
        names_only = key is None and not has_unix(self._listeners)
        return Rules(key, config.limits.max_body_bytes, min(config.limits.deadline_s or _BODY_S, _BODY_S), names_only)

    def _served(self) -> Any:
        return None if self.service.backend is None else self.service.backend.model

    # ── the engine's thread ─────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> Opened:
        saved = self._state.load()
        if saved.reason:
            logger.warning("nothing was learnt before: %s", saved.reason)
        backend = Backend(self._plan, logger.warning, (saved.value or {}).get("backend"))
        self.service.backend = backend
        self._metrics.exits, self._metrics.depths = lambda: backend.exits, backend.depths
        return backend.opened(self._sampler)

    def _engine_changed(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is over
            self._loop.call_soon_threadsafe(self._news.set)

    # ── the event loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Serve until a signal says stop. Raises what the model's loading or the engine failed with."""
        with ExitStack() as opened:
            opened.enter_context(self._sensors())
            asyncio.run(self._main())
        failure = self._thread.failure
        if failure is not None:
            raise failure if isinstance(failure, EdgeError) else EdgeError(f"the engine failed: {failure!r}")

    @contextmanager
    def _sensors(self) -> Iterator[None]:
        """Read sensors while inside; where none has a power, by the profile's model of it."""
        profile, energy, n_cores = self._loaded.profile, self._metrics.energy, os.cpu_count() or 1
        model = PowerModel.of(profile)

        def hear(reading: Reading) -> None:
            if reading.power_w is None and model is not None:
                (reading,) = model.fill([reading], n_cores)
            energy(reading)

        timing = Timing(now=NOW)
        sensors = detect(Machine(), profile)
        with Sampler(sensors, _SENSORS_S, listeners=[hear], warn=logger.warning, timing=timing) as self._sampler:
            yield

    async def _main(self) -> None:
        self._loop, self._saving = asyncio.get_running_loop(), asyncio.Lock()
        self._news, self._decided, self._over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        with self._handled_signals():
            self._notifier.status(f"loading {self._plan.name}")
            self._thread.start()
            application = WhileLoading(self.application, self._decided, _LOADING_S)
            http = Http(application, self._over, lambda: self.service.limits.stall_s)
            serving = asyncio.create_task(http.serve(self._listeners))
            serving.add_done_callback(lambda _task: self._over.set())
            keeping = asyncio.create_task(self._keep_house())
            for listener in self._listeners:
                logger.info("listening on %s", address_of(listener))
            living = asyncio.create_task(self._live())
            await self._over.wait()
            living.cancel()
            await self._leave(http, serving)
            keeping.cancel()

    async def _live(self) -> None:
        """From loading to the end of the engine."""
        await self._news.wait()
        self._news.clear()
        self._decided.set()
        if self._thread.opened is not None:
            await self._save()
            logger.info("ready: %s, %d conversations of %d tokens", self._plan.name, *self._room)
            self._notifier.ready(self._status())
            await self._news.wait()
        self._over.set()  # it could not be opened, or it failed

    @property
    def _room(self) -> tuple[int, int]:
        return self._plan.options.n_seq_max, self._plan.n_ctx

    async def _leave(self, http: Http, serving: asyncio.Task[None]) -> None:
        """Let answers come to their end, for a while; then end what is left, and let go of clients that do not read."""
        self._thread.draining = True
        self._decided.set()
        n_open = self._thread.n_open
        logger.info("stopping, answers under way: %d", n_open)
        self._notifier.stopping(f"stopping, answers under way: {n_open}")
        _, late = await asyncio.wait([serving], timeout=_GRACE_S)
        await self._save()
        await asyncio.to_thread(self.service.moderation.close)
        self._thread.stop()
        if late:
            _, late = await asyncio.wait(late, timeout=_LEAVE_S)
        if late:
            http.abandon()
            await asyncio.wait(late, timeout=_GONE_S)
        if not await asyncio.to_thread(self._thread.join, _LEAVE_S):
            logger.warning("the engine is left in the middle of its work")
            logging.shutdown()
            os._exit(0)  # a model that is still being loaded cannot be told to stop

    @contextmanager
    def _handled_signals(self) -> Iterator[None]:
        stops = (signal.SIGTERM, signal.SIGINT)
        for number in stops:
            self._loop.add_signal_handler(number, self._on_stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (*stops, signal.SIGHUP):
                self._loop.remove_signal_handler(number)

    def _on_stop(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)
        self._over.set()

    # ── meanwhile ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _reload(self) -> None:
        """Take a changed configuration over, as far as a running server can; a wrong one changes nothing."""
        announced = self._thread.opened is not None
        if announced:
            self._notifier.reloading()
        found = reload_config(self._loaded, self._sources)
        try:
            if found.error is not None:
                raise found.error
            config = found.loaded.config
            rules = self._rules(config)
            targets = plan_targets(found.loaded, self._plan.run, self._plan.pack, self._device)
        except EdgeError as error:
            logger.error("the configuration stays as it was: %s", error.message)
        else:
            self._loaded = found.loaded
            self.service.limits = config.limits
            self._thread.queue_length = config.limits.queue_length
            if any(name.startswith("device.") for name in found.changed):
                self._thread.hold(targets)
            self.application.set_rules(rules, config.server.cors_origins)
            logging.getLogger("edge_runtime").setLevel(config.service.log_level.upper())
            logger.info("configuration read again, changed: %s", ", ".join(found.changed) or "nothing")
            if found.needs_restart:
                logger.warning("only a restart puts into force: %s", ", ".join(found.needs_restart))
        if announced:
            self._notifier.ready(self._status())

    async def _keep_house(self) -> None:
        """Signs of life, a line for people, and from time to time what was learnt."""
        periods: dict[Callable[[], Awaitable[None]], float] = {self._save: _SAVE_S, self._save_again: _SAVE_AGAIN_S}
        if self._watched:
            periods[self._check] = self._watchdog.period_s
        if self._notifier.listening:
            periods[self._say_status] = _STATUS_S
        await asyncio.gather(*(_every(period_s, call) for call, period_s in periods.items()))

    async def _check(self) -> None:
        if not self._watchdog.check():
            logger.error("the engine makes no progress")

    async def _say_status(self) -> None:
        if self._thread.opened is not None and not self._over.is_set():
            self._notifier.status(self._status())

    def _status(self) -> str:
        opened, load, reading = self._thread.opened, self._thread.load, self._metrics.energy.latest
        now, n_tokens = time.monotonic(), 0 if opened is None else opened.engine.stats.published
        (before, n_before), self._counted = self._counted, (now, n_tokens)
        speed = (n_tokens - n_before) / max(now - before, 1e-3)
        parts = [self._plan.name, self._mode, f"{speed:.1f} tokens/s"]
        parts += [f"{load.running} running", f"{load.waiting} waiting"]
        if reading is not None and reading.temp_c is not None:
            parts.append(f"{reading.temp_c:.0f} °C")
        return ", ".join(parts) + (f"; nothing learnt is saved: {self._problem}" if self._problem else "")

    async def _save(self) -> None:
        """What was learnt. A disk that is full or read-only is told of, and served on; a slow one holds nobody up."""
        backend = self.service.backend
        if backend is None:
            return
        async with self._saving:
            problem = await asyncio.to_thread(self._state.save, {"backend": backend.learnt})
        if problem and not self._problem:
            logger.warning("nothing learnt is saved: %s", problem)
        elif self._problem and not problem:
            logger.info("what was learnt is saved again")
        self._problem, self._metrics.state_saved = problem, not problem

    async def _save_again(self) -> None:
        if self._problem:
            await self._save()


async def _every(period_s: float, call: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(period_s)
        await call()


def serve(loaded: LoadedConfig, sources: Sources) -> None:
    """Serve by `loaded` until a signal says stop. Raises UsageError or another EdgeError."""
    _prepare_log(loaded.config.service.log_level)
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    Server(loaded, sources).run()


def _prepare_log(level: str) -> None:
    handler = logging.StreamHandler()
    if goes_to_journal(os.environ):
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, lowest in (("edge_runtime", level.upper()), ("uvicorn", "WARNING")):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(lowest)
