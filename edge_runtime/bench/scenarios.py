"""Machines and what happens to them, for the simulator: all of it plain data, drawn from seeds.

A machine is a device profile, which says what it draws, bears and shall hold, and what a profile cannot know.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..control import BatteryPolicy, Ladder, Rung, Targets, ladder_of
from ..energy.model import PowerModel
from ..errors import UsageError
from ..profiles import Profile, load_profile, profile_names
from ..profiles import Targets as ProfileTargets
from ..types import Mode

# what happens → the profile's targets that are to be held then, taken in turn
_ASKED = {
    "heat wave": ("fast", "balanced", "quiet"),
    "battery": ("battery",),
    "background load": ("battery", "fast", "balanced"),
    "dead sensor": ("battery", "fast", "balanced"),
    "easy and hard": ("fast",),
    "shift": ("fast",),
    "everything": ("fast",),
}
KINDS = tuple(_ASKED)
_EACH = 20
_SPARE_C = 4.0  # below the ceiling, what the most saving rung can hold in the worst weather
_ROOM_C = 20.0  # what other programs take is such that it holds the ceiling in so cool a room
_REST = 0.5  # of the most saving rung

# sensors that tell the power of the board or of its processor; without them it is the profile's model that tells it
_POWER_SENSORS = frozenset({"jetson-ina3221", "macmon", "rapl", "raspberry-pi-pmic"})


# ── machines ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Board:
    """What a profile cannot know of its board, and of the model that runs on it."""

    resistance_c_per_w: float  # from the chip to the air
    capacity_j_per_c: float
    one_thread_ms: float  # per token at full depth
    temp_step_c: float = 0.5  # resolution of the sensor
    cores: int = 0  # physical ones, for a profile that leaves the number of threads to the processor


# None of this was fitted to one board.
# Resistance: of a case so tight that full depth for long throttles in 33 to 36 °C of air, which no room has and a heat
# wave does; with a fan that is large enough there would be nothing to control. Capacity: for time constants of two to
# three minutes, as small boards have; larger ones take longer, in which nothing happens. Time per token: about what a
# model of half a billion parameters at eight bits takes there. Cores: of a common machine.
BOARDS = {
    "apple-silicon": Board(1.8, 90, 55, temp_step_c=0.1, cores=8),
    "generic": Board(4.7, 35, 150, temp_step_c=1.0, cores=4),
    "jetson-nano": Board(10.0, 18, 580),
    "jetson-orin-nano": Board(6.4, 28, 205),
    "pi4": Board(8.0, 15, 520),
    "pi5": Board(5.6, 20, 205),
    "x86-64": Board(1.3, 110, 103, temp_step_c=1.0, cores=6),
}
_GB_PER_TOKEN = 0.5  # weights of that model


@dataclass(frozen=True, slots=True)
class MachineModel:
    """A board: a heat capacity behind a thermal resistance, the chip on it, power by work, and a thermostat."""

    name: str
    cores: int
    power: PowerModel  # as the profile predicts it
    throttle_c: float
    ceiling_c: float
    targets: Mapping[str, ProfileTargets]
    resistance_c_per_w: float  # from the chip to the air
    capacity_j_per_c: float
    one_thread_ms: float  # per token at full depth
    temp_step_c: float = 0.5  # resolution of the sensor
    measures_power: bool = True
    serial: float = 0.15  # share of the time per token that more threads do not shorten
    throttle_gap_c: float = 5.0  # below `throttle_c`, where full frequency returns
    throttled_speed: float = 0.6
    chip_share: float = 0.15  # of the resistance, what lies between chip and board

    @property
    def static_w(self) -> float:
        return self.power.static_w

    @property
    def core_w(self) -> float:
        """Of a busy core at full frequency."""
        return self.power.active_w_per_core

    @property
    def chip_c_per_w(self) -> float:
        return self.resistance_c_per_w * self.chip_share

    @property
    def board_c_per_w(self) -> float:
        return self.resistance_c_per_w * (1 - self.chip_share)

    @property
    def most_w(self) -> float:
        """Of full depth on all cores."""
        return self.power.power_w(1.0, self.cores, self.gb_per_s(self.cores))

    def full_ms_on(self, threads: int) -> float:
        """Time per token at full depth on some of the cores, by Amdahl's law."""
        return self.one_thread_ms * (self.serial + (1 - self.serial) / threads)

    def gb_per_s(self, threads: int) -> float:
        """Weights read while some of the cores compute; a mode that takes less time per token reads less for it."""
        return 1e3 * _GB_PER_TOKEN / self.full_ms_on(threads)

    def least_w(self, others: float, power_error: float) -> float:
        """True power of the most saving rung beside `others` cores that other programs keep busy."""
        busy = min(self.cores, others + 1 - _REST)
        read_w = self.power.joule_per_gb * self.gb_per_s(1) * (1 - _REST)
        return self.static_w + self.core_w * power_error * busy + read_w


def machine_of(profile: Profile) -> MachineModel:
    """The machine that the profile is of. Raises UsageError with what it, or the table of boards, does not say."""
    name, power, thermal, board = profile.name, PowerModel.of(profile), profile.thermal, BOARDS.get(profile.name)
    lacks = {
        "[power]": power is None,
        "[thermal]": thermal is None,
        "power_cap_w in [targets.battery]": profile.targets["battery"].power_cap_w is None,
        "max_disagreement in [targets.fast]": not profile.targets["fast"].max_disagreement,
    }
    if power is None or thermal is None or any(lacks.values()):
        missing = ", ".join(what for what, is_missing in lacks.items() if is_missing)
        raise UsageError(
            f"the device profile '{name}' cannot be simulated: it lacks {missing}", "add that, or name another profile"
        )
    n_cores = profile.n_threads or (board.cores if board else 0)
    if board is None or not n_cores:
        what = "its name" if board is None else "its number of cores"
        hint = f"add {what} to BOARDS in edge_runtime/bench/scenarios.py"
        raise UsageError(f"the device profile '{name}' cannot be simulated: BOARDS does not have {what}", hint)
    return MachineModel(
        name=name,
        cores=n_cores,
        power=power,
        throttle_c=thermal.throttle_c,
        ceiling_c=thermal.ceiling_c,
        targets=profile.targets,
        resistance_c_per_w=board.resistance_c_per_w,
        capacity_j_per_c=board.capacity_j_per_c,
        one_thread_ms=board.one_thread_ms,
        temp_step_c=board.temp_step_c,
        measures_power=not _POWER_SENSORS.isdisjoint(profile.sensors),
    )


def machines(folder: Path | None = None) -> tuple[MachineModel, ...]:
    """Machines of all profiles in `folder`, or of the project's own.

    One that says nothing of power and heat, as `native` does, stands for any machine and is left out. Raises UsageError
    for one that says something, but not enough.
    """
    found = (load_profile(name, folder) for name in profile_names(folder))
    return tuple(machine_of(profile) for profile in found if profile.power or profile.thermal)


# ── what the controller chooses from ────────────────────────────────────────────────────────────────────────────────


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
    ways = [(n, 0.0, f"{n}t") for n in threads] + [(1, _REST, "rest")]
    return ladder_of(
        Rung(
            name=f"{mix.name} {way}",
            mode=mix.mode,
            time_per_token_ms=machine.full_ms_on(n) * mix.predicted / (1 - rest),
            power_w=machine.power.power_w(1 - rest, n, machine.gb_per_s(n) * (1 - rest)),
            n_threads=n,
            disagreement=mix.disagreement,
            rest=rest,
        )
        for mix in MIXES.values()
        for n, rest, way in ways
    )


# ── what happens ────────────────────────────────────────────────────────────────────────────────────────────────────


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
    target: str  # name of the profile's targets
    targets: Targets  # these, and what else is asked
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
    def title(self) -> str:
        """The same for all machines, though what is drawn depends on them."""
        return f"{self.seed:02d} {self.kind}"

    @property
    def name(self) -> str:
        return f"{self.machine.name} {self.title}"

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
    target = _ASKED[kind][seed // len(KINDS) % len(_ASKED[kind])]
    targets = _targets(machine, target, kind, draw, speed_error)
    ceiling_c = targets.ceiling_c or machine.ceiling_c
    background: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    if everything or kind == "background load":
        start = draw.uniform(100, 160)
        cores = draw.uniform(0.6, 1.0) * machine.cores / (4 if everything else 2)
        cores = min(cores, _bearable_cores(machine, ceiling_c, power_error))
        background = ((0.0, 0.0), (start, cores), (start + draw.uniform(90, 150), 0.0))
    least_w = machine.least_w(max(cores for _, cores in background), power_error)
    bearable_c = ceiling_c - _SPARE_C - machine.resistance_c_per_w * least_w
    hard: tuple[tuple[float, float], ...] = ((0.0, draw.uniform(0.2, 0.8)),)
    if everything or kind == "easy and hard":
        length_s = draw.uniform(60, 90)
        hard = tuple((i * length_s, float(i % 2)) for i in range(int(duration_s / length_s) + 1))
    usual = draw.uniform(0.5, 0.75)
    wrong: tuple[tuple[float, float], ...] = ((0.0, usual),)
    if everything or kind == "shift":
        wrong = ((0.0, usual), (draw.uniform(0.05, 0.6) * duration_s, draw.uniform(2, 25)))
    battery = targets.battery is not None
    usable_w = min(machine.most_w, targets.power_cap_w or machine.most_w)
    return Scenario(
        kind=kind,
        seed=seed,
        machine=machine,
        target=target,
        targets=targets,
        duration_s=duration_s,
        ambient_c=_ambient(draw, kind, duration_s, bearable_c),
        background=Course(background),
        hard=Course(hard),
        wrong=Course(wrong),
        dead=_dead(draw, duration_s) if everything or kind == "dead sensor" else (),
        battery_j=usable_w * duration_s / 0.45 if battery else 0.0,
        battery_percent=draw.uniform(34, 44) if battery else 100.0,
        power_error=power_error,
        speed_error=speed_error,
    )


def _targets(machine: MachineModel, target: str, kind: str, draw: random.Random, speed_error: float) -> Targets:
    """The profile's targets for what happens; where a cap is due and they have none, a cap as a person would add.

    A speed that the profile asks for is left out, as it is not meant for this model: where one is due, it is drawn.
    """
    asked = machine.targets[target]
    one_core_w = machine.static_w + machine.core_w
    own_cap_w = one_core_w + draw.uniform(0.4, 0.7) * (machine.most_w - one_core_w)
    wanted_ms = draw.uniform(0.82, 0.9) * machine.full_ms_on(machine.cores) * speed_error
    return Targets(
        latency_ms=wanted_ms if kind in ("everything", "easy and hard", "shift") else None,
        power_cap_w=asked.power_cap_w or (own_cap_w if kind in ("background load", "dead sensor") else None),
        ceiling_c=machine.ceiling_c if asked.temp_ceiling_c is None else asked.temp_ceiling_c,
        battery=BatteryPolicy() if kind in ("everything", "battery") else None,
        max_disagreement=asked.max_disagreement,
    )


def _bearable_cores(machine: MachineModel, ceiling_c: float, power_error: float) -> float:
    """How many cores other programs can keep busy in a cool room, so that the most saving rung holds the ceiling."""
    spare_w = (ceiling_c - _SPARE_C - _ROOM_C) / machine.resistance_c_per_w - machine.least_w(0.0, power_error)
    return max(0.0, spare_w / (machine.core_w * power_error))


def _ambient(draw: random.Random, kind: str, duration_s: float, bearable_c: float) -> Course:
    """A room, or a heat wave that full depth alone would not survive without throttling, where the rest allows it."""
    usual = min(draw.uniform(20, 26), bearable_c)
    if kind not in ("heat wave", "everything", "dead sensor"):
        return Course(((0.0, usual),))
    peak = min(bearable_c, usual + draw.uniform(14, 22))
    start = draw.uniform(0.1, 0.25) * duration_s
    top = start + draw.uniform(60, 120)
    points = ((0.0, usual), (start, usual), (top, peak), (duration_s * 0.85, peak))
    return Course((*points, (duration_s, usual)), linear=True)


def _dead(draw: random.Random, duration_s: float) -> tuple[tuple[str, float, float], ...]:
    start = draw.uniform(0.35, 0.5) * duration_s
    end = start + draw.uniform(60, 0.3 * duration_s) if draw.random() < 0.6 else duration_s
    return tuple((sensor, start, end) for sensor in draw.choice((("temp",), ("power",), ("temp", "power"))))
