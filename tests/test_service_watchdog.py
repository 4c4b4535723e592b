"""The watchdog is fed by progress alone: time is a number here, and systemd a clock that runs out."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from edge_runtime.service.watchdog import Watchdog, watchdog_interval_s, watching

INTERVAL_S = 10.0


@dataclass
class Pings:
    n: int = 0

    def __call__(self) -> None:
        self.n += 1


@pytest.fixture
def pings() -> Pings:
    return Pings()


@pytest.fixture
def watchdog(pings: Pings) -> Watchdog:
    return Watchdog(pings, INTERVAL_S)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "٣"}, None),
    ],
)
def test_the_interval_is_for_one_process(environment: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval_s(environment, pid=7) == expected


def test_idle_pings(watchdog: Watchdog, pings: Pings) -> None:
    assert watchdog.idle
    assert [watchdog.check() for _ in range(3)] == [True] * 3
    assert pings.n == 3


def test_work_pings_while_it_gets_on_and_not_when_it_hangs(watchdog: Watchdog, pings: Pings) -> None:
    with watchdog.work():
        assert not watchdog.idle
        assert watchdog.check()  # it has just begun
        watchdog.tick()
        watchdog.tick()
        assert watchdog.check()
        assert [watchdog.check() for _ in range(5)] == [False] * 5
        assert pings.n == 2
        watchdog.tick()  # late, but there: it does not wait for the next check
        assert pings.n == 3
        watchdog.tick()
        assert pings.n == 3
    assert watchdog.check()


def test_other_work_does_not_hide_a_hang(watchdog: Watchdog, pings: Pings) -> None:
    with watchdog.work():
        watchdog.check()
        before = pings.n
        for _ in range(5):
            with watchdog.work():
                pass
            assert not watchdog.check()
        assert pings.n == before


def test_the_end_of_late_work_is_heard_at_once(watchdog: Watchdog, pings: Pings) -> None:
    with watchdog.work():
        watchdog.check()
        assert not watchdog.check()
        before = pings.n
    assert pings.n == before + 1
    assert watchdog.idle


def test_work_that_fails_ends(watchdog: Watchdog) -> None:
    with pytest.raises(ZeroDivisionError), watchdog.work():
        _ = 1 / 0
    assert watchdog.idle


def test_the_timer_runs_at_half_the_interval_until_it_is_over(watchdog: Watchdog, pings: Pings) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 4

    watchdog.run(wait)
    assert waits == [INTERVAL_S / 2] * 4
    assert pings.n == 3


def test_a_thread_checks_and_ends() -> None:
    first = Pings()
    with watching(Watchdog(first, 3600.0)):
        pass
    assert first.n == 0


@dataclass
class Systemd:
    """Measures the longest silence."""

    now_s: float = 0.0
    heard_s: float = 0.0
    silence_s: float = 0.0

    def ping(self) -> None:
        self.silence_s = max(self.silence_s, self.now_s - self.heard_s)
        self.heard_s = self.now_s


def simulate(progress_s: list[float], until_s: float) -> Systemd:
    """Work from 0 on that makes progress at these times; checks fall where they must."""
    systemd = Systemd()
    watchdog = Watchdog(systemd.ping, INTERVAL_S)
    checks = [i * watchdog.period_s for i in range(1, int(until_s / watchdog.period_s))]
    events = sorted([(t, True) for t in progress_s] + [(t, False) for t in checks])
    with watchdog.work():
        for time_s, is_progress in events:
            systemd.now_s = time_s
            watchdog.tick() if is_progress else watchdog.check()
        systemd.now_s = until_s
        systemd.silence_s = max(systemd.silence_s, until_s - systemd.heard_s)
        return replace(systemd)  # as it is before the end of the work is heard


@pytest.mark.parametrize("seed", range(20))
def test_progress_within_the_interval_is_always_enough(seed: int) -> None:
    draw, times = random.Random(seed), [0.01]
    while times[-1] < 300:
        times.append(times[-1] + draw.uniform(0.01, 0.99) * INTERVAL_S)
    assert simulate(times[:-1], times[-2] + 0.01).silence_s < INTERVAL_S


@pytest.mark.parametrize("seed", range(20))
def test_a_hang_is_noticed_within_one_and_a_half_intervals(seed: int) -> None:
    draw = random.Random(seed)
    hang_s = draw.uniform(50, 60)
    times = [t for t in (draw.uniform(0, 60) for _ in range(300)) if t < hang_s]
    systemd = simulate(times, 200)
    assert systemd.heard_s + INTERVAL_S <= max(times) + 1.5 * INTERVAL_S
