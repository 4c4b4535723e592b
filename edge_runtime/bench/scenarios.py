"""Machines and what happens to them, for the simulator: all of it plain data, drawn from seeds.

The machines' values are typical of boards in their usual cases; none was fitted to one board.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass, field

from ..control import BatteryPolicy, Ladder, Rung, Targets, ladder_of
from ..types import Mode

KINDS = ("heat wave", "battery", "background load", "dead sensor", "easy and hard", "shift", "everything")
_EACH = 20
_BUDGET = 0.02
_SPARE_C = 4.0  # below the ceiling, what the most saving rung can hold in the worst weather


@dataclass(frozen=True, slots=True)
class MachineModel:
    """A board: a heat capacity behind a thermal resistance, the chip on it, power by busy cores, and a thermostat."""

    name: str
    cores: int
    static_w: float
    core_w: float  # of a busy core at full frequency
    resistance_c_per_w: float  # from the chip to the air
    capacity_j_per_c: float
    throttle_c: float
    full_ms: float  # per token at full depth, on all cores
    serial: float = 0.15  # share of one core's time per token that more cores do not shorten
    throttle_gap_c: float = 5.0  # below `throttle_c`, where full frequency returns
    throttled_speed: float = 0.6
    chip_share: float = 0.15  # of the resistance, what lies between chip and board
    temp_step_c: float = 0.5  # resolution of the sensor
    measures_power: bool = True

    @property
    def ceiling_c(self) -> float:
        """The ceiling a profile would ask for, below throttling."""
        return self.throttle_c - 3

    @property
    def chip_c_per_w(self) -> float:
        return self.resistance_c_per_w * self.chip_share

    @property
    def board_c_per_w(self) -> float:
        return self.resistance_c_per_w * (1 - self.chip_share)

    @property
    def most_w(self) -> float:
        return self.static_w + self.core_w * self.cores

    def full_ms_on(self, threads: int) -> float:
        """Time per token at full depth on some of the cores, by Amdahl's law."""
        return (
            self.full_ms * (self.serial + (1 - self.serial) / threads) / (self.serial + (1 - self.serial) / self.cores)
        )


MACHINES = {
    m.name: m
    for m in (
        MachineModel("pi4", 4, 2.7, 0.95, 8.2, 15, 80, 190, measures_power=False),
        MachineModel("pi5", 4, 3.2, 1.7, 5.4, 20, 82, 75),
        MachineModel("jetson-nano", 4, 2.4, 1.5, 7.6, 30, 90, 210),
        MachineModel("jetson-orin-nano", 6, 4.5, 1.4, 5.0, 40, 92, 60),
        MachineModel("apple-silicon", 8, 2.5, 2.6, 3.1, 60, 98, 14, temp_step_c=0.1),
        MachineModel("x86-64", 6, 6.0, 4.0, 2.2, 70, 92, 30, temp_step_c=1.0),
        MachineModel("generic", 4, 4.0, 2.5, 4.3, 40, 86, 55, temp_step_c=1.0),
    )
}


@dataclass(frozen=True, slots=True)
class Mix:
    """What a mode does to the time per token: a factor on easy and on hard text; between them, what is predicted."""

    name: str
    mode: Mode
    easy: float
    hard: float
    disagreement: float = 0.0
    easy_exits: float = 0.0  # share of tokens that leave early
    hard_exits: float = 0.0

    @property
    def predicted(self) -> float:
        return (self.easy + self.hard) / 2

    def factor(self, hard: float) -> float:
        return self.easy + (self.hard - self.easy) * hard

    def exits(self, hard: float) -> float:
        return self.easy_exits + (self.hard_exits - self.easy_exits) * hard


MIXES = {
    m.name: m
    for m in (
        Mix("full", Mode.FULL, 1.0, 1.0),
        Mix("verified", Mode.VERIFIED, 0.8, 1.06),
        Mix("exit 1%", Mode.EXIT, 0.76, 0.93, 0.01, 0.35, 0.1),
        Mix("exit 2%", Mode.EXIT, 0.64, 0.88, 0.02, 0.55, 0.18),
        Mix("exit 5%", Mode.EXIT, 0.5, 0.8, 0.05, 0.75, 0.3),
    )
}


def mix_of(rung: Rung) -> Mix:
    return MIXES[rung.name.rsplit(" ", 1)[0]]


def machine_ladder(machine: MachineModel) -> Ladder:
    """Each mode on all cores, on quarters of them and on one, and on one core that rests half of the time."""
    cores = machine.cores
    threads = sorted({1, *(max(1, round(cores * share)) for share in (0.25, 0.5, 0.75, 1.0))}, reverse=True)
    ways = [(n, 0.0, f"{n}t") for n in threads] + [(1, 0.5, "rest")]
    return ladder_of(
        Rung(
            name=f"{mix.name} {way}",
            mode=mix.mode,
            time_per_token_ms=machine.full_ms_on(n) * mix.predicted / (1 - rest),
            power_w=machine.static_w + machine.core_w * n * (1 - rest),
            n_threads=n,
            disagreement=mix.disagreement,
            rest=rest,
        )
        for mix in MIXES.values()
        for n, rest, way in ways
    )


@dataclass(frozen=True, slots=True)
class Course:
    """A quantity over time, by (seconds, value) in rising order: linear between them, or in steps."""

    points: tuple[tuple[float, float], ...]
    linear: bool = False
    _times: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_times", tuple(time_s for time_s, _ in self.points))

    def at(self, time_s: float) -> float:
        i = bisect_right(self._times, time_s)
        if i == 0:
            return self.points[0][1]
        if i == len(self.points) or not self.linear:
            return self.points[i - 1][1]
        (t0, v0), (t1, v1) = self.points[i - 1 : i + 1]
        return v0 + (v1 - v0) * (time_s - t0) / (t1 - t0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens to a machine while it generates without a pause."""

    kind: str
    seed: int
    machine: MachineModel
    targets: Targets
    duration_s: float
    ambient_c: Course
    background: Course  # cores that other programs keep busy
    hard: Course  # 0: easy text, 1: hard
    wrong: Course  # factor on a rung's certified disagreement; what is above 1 breaks its promise
    dead: tuple[tuple[str, float, float], ...] = ()  # sensors "temp" or "power", gone from … to, in seconds
    battery_j: float = 0.0  # capacity; 0: on the mains
    battery_percent: float = 100.0  # at the start
    power_error: float = 1.0  # true power of a core ÷ predicted
    speed_error: float = 1.0  # true time per token ÷ predicted

    @property
    def name(self) -> str:
        return f"{self.machine.name} {self.seed:02d} {self.kind}"

    @property
    def disturbances_s(self) -> tuple[float, ...]:
        """When something outside changes at once; the controller may then take time to settle."""
        steps = [time_s for course in (self.background, self.hard, self.wrong) for time_s, _ in course.points]
        return tuple(sorted({0.0, *steps, *(edge for _, start, end in self.dead for edge in (start, end))}))


def scenarios_for(machine: MachineModel, n: int = _EACH) -> tuple[Scenario, ...]:
    """`n` scenarios of all kinds in turn, the same ones in every run."""
    return tuple(scenario(machine, KINDS[seed % len(KINDS)], seed) for seed in range(n))


def scenario(machine: MachineModel, kind: str, seed: int, duration_s: float = 600.0) -> Scenario:
    """One scenario of a kind. What can happen is drawn such that the most saving rung can bear it."""
    draw = random.Random(f"{machine.name} {kind} {seed}")
    everything = kind == "everything"
    power_error, speed_error = draw.uniform(0.9, 1.1), draw.uniform(0.95, 1.1)
    background: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    if everything or kind == "background load":
        start = draw.uniform(100, 160)
        most = machine.cores / 4 if everything else machine.cores / 2
        background = ((0.0, 0.0), (start, draw.uniform(0.6, 1.0) * most), (start + draw.uniform(90, 150), 0.0))
    ambient = _ambient(machine, draw, kind, duration_s, power_error, max(cores for _, cores in background))
    hard: tuple[tuple[float, float], ...] = ((0.0, draw.uniform(0.2, 0.8)),)
    if everything or kind == "easy and hard":
        length_s = draw.uniform(60, 90)
        hard = tuple((i * length_s, float(i % 2)) for i in range(int(duration_s / length_s) + 1))
    usual = draw.uniform(0.5, 0.75)
    wrong: tuple[tuple[float, float], ...] = ((0.0, usual),)
    if everything or kind == "shift":
        wrong = ((0.0, usual), (draw.uniform(0.05, 0.6) * duration_s, draw.uniform(2, 25)))
    floor_w = machine.static_w + machine.core_w
    cap_w = draw.uniform(0.4, 0.7) * (machine.most_w - floor_w) + floor_w
    wanted_ms = draw.uniform(0.82, 0.9) * machine.full_ms * speed_error
    capped, hurried = kind in ("background load", "dead sensor"), everything or kind in ("easy and hard", "shift")
    battery = everything or kind == "battery"
    return Scenario(
        kind=kind,
        seed=seed,
        machine=machine,
        targets=Targets(
            latency_ms=wanted_ms if hurried else None,
            power_cap_w=cap_w if capped else None,
            ceiling_c=machine.ceiling_c,
            battery=BatteryPolicy() if battery else None,
            max_disagreement=_BUDGET,
        ),
        duration_s=duration_s,
        ambient_c=ambient,
        background=Course(background),
        hard=Course(hard),
        wrong=Course(wrong),
        dead=_dead(draw, duration_s) if everything or kind == "dead sensor" else (),
        battery_j=machine.most_w * duration_s / 0.45 if battery else 0.0,
        battery_percent=draw.uniform(34, 44) if battery else 100.0,
        power_error=power_error,
        speed_error=speed_error,
    )


def _ambient(
    machine: MachineModel, draw: random.Random, kind: str, duration_s: float, power_error: float, background: float
) -> Course:
    """A room, or a heat wave that full depth alone would not survive without throttling, where the rest allows it."""
    usual = draw.uniform(20, 26)
    least_w = machine.static_w + machine.core_w * (0.5 + background) * power_error
    bearable = machine.ceiling_c - _SPARE_C - machine.resistance_c_per_w * least_w
    if kind not in ("heat wave", "everything", "dead sensor"):
        return Course(((0.0, min(usual, bearable)),))
    peak = min(bearable, usual + draw.uniform(14, 22))
    start = draw.uniform(0.1, 0.25) * duration_s
    top = start + draw.uniform(60, 120)
    points = ((0.0, min(usual, peak)), (start, min(usual, peak)), (top, peak), (duration_s * 0.85, peak))
    return Course((*points, (duration_s, min(usual, peak))), linear=True)


def _dead(draw: random.Random, duration_s: float) -> tuple[tuple[str, float, float], ...]:
    start = draw.uniform(0.35, 0.5) * duration_s
    end = start + draw.uniform(60, 0.3 * duration_s) if draw.random() < 0.6 else duration_s
    return tuple((sensor, start, end) for sensor in draw.choice((("temp",), ("power",), ("temp", "power"))))
