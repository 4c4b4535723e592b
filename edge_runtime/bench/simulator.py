"""A simulated machine under the real controller: heat, power, throttling, battery, other programs, and text.

The clock is the simulation's own. A board with heat capacity C warms up behind a resistance R to the ambient air,
C·dT/dt = P - (T - ambient) / R, and the chip, whose sensor is read, is warmer than the board by a share of R·P, within
seconds of any change of power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..control import AuditCounts, Controller, ControlSettings, Event, Ladder, Observation, Rung
from ..sensors.reading import Battery, PowerSource, Reading
from ..types import Mode
from .scenarios import MachineModel, Scenario, machine_ladder, mix_of

PERIOD_S = 0.5  # between two looks of the controller
_STEP_S = 0.25  # of the heat equation
_CHIP_S = 3.0  # in which the chip follows its power
_TEMP_NOISE_C = 0.3
_RELATIVE_NOISE = 0.03  # of power and of time per token
_DROPPED = 0.02  # readings lost at random

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Physics:
    """A machine's physical state."""

    board_c: float
    chip_c: float
    battery_j: float = 0.0
    throttled: bool = False


def physics_at_rest(machine: MachineModel, ambient_c: float, battery_j: float = 0.0) -> Physics:
    """A machine that has been idle for long."""
    board_c = ambient_c + machine.static_w * machine.board_c_per_w
    return Physics(board_c, board_c + machine.static_w * machine.chip_c_per_w, battery_j)


def pass_time(
    state: Physics, machine: MachineModel, busy_cores: float, ambient_c: float, core_w: float, gb_per_s: float = 0.0
) -> tuple[Physics, float]:
    """The state one period later, and the mean power in W, with `busy_cores` at work on average.

    `core_w` and `gb_per_s`, of weights read, are those at full frequency.
    """
    board_c, chip_c, throttled, energy_j = state.board_c, state.chip_c, state.throttled, 0.0
    followed = -math.expm1(-_STEP_S / _CHIP_S)
    for _ in range(round(PERIOD_S / _STEP_S)):
        throttled = chip_c >= machine.throttle_c - (machine.throttle_gap_c if throttled else 0.0)
        # voltage falls with frequency, so that power falls with more than its square
        speed = machine.throttled_speed if throttled else 1.0
        power_w = machine.static_w + core_w * min(busy_cores, machine.cores) * speed**2.5
        power_w += machine.power.joule_per_gb * gb_per_s * speed
        flow_w = power_w - (board_c - ambient_c) / machine.board_c_per_w
        board_c += flow_w * _STEP_S / machine.capacity_j_per_c
        chip_c += (board_c + power_w * machine.chip_c_per_w - chip_c) * followed
        energy_j += power_w * _STEP_S
    return Physics(board_c, chip_c, max(0.0, state.battery_j - energy_j), throttled), energy_j / PERIOD_S


@dataclass(frozen=True, slots=True)
class Moment:
    """What was true in one period."""

    time_s: float
    temp_c: float  # of the chip, at its end
    power_w: float
    ambient_c: float
    background: float
    time_per_token_ms: float
    rung: int  # place on the ladder
    tokens: int
    exits: int
    wrong: int  # exits that full depth would have chosen otherwise, audited or not
    throttled: bool
    battery_percent: float


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole run."""

    scenario: Scenario
    ladder: Ladder
    moments: tuple[Moment, ...]
    events: tuple[Event, ...] = ()

    def column(self, name: str) -> Numbers:
        """One field of all moments (n,)."""
        return np.array([getattr(moment, name) for moment in self.moments], np.float64)


def simulate(scenario: Scenario, settings: ControlSettings | None = None) -> Trace:
    """Run the controller through the scenario."""
    ladder = machine_ladder(scenario.machine)
    return _Run(scenario, ladder).all(Controller(scenario.targets, ladder, settings=settings))


def full_depth_alone(scenario: Scenario) -> Trace:
    """The same scenario with plain full depth on all cores, and nobody who looks at sensors."""
    return _Run(scenario, machine_ladder(scenario.machine)).all(None)


class _Run:
    """One pass through a scenario; all that is random is drawn from its seed."""

    def __init__(self, scenario: Scenario, ladder: Ladder) -> None:
        self._scenario, self._machine, self._ladder = scenario, scenario.machine, ladder
        self._places = {rung.name: i for i, rung in enumerate(ladder.rungs)}
        self._random = np.random.default_rng([scenario.seed, *scenario.name.encode()])
        charge_j = scenario.battery_j * scenario.battery_percent / 100
        self._physics = physics_at_rest(scenario.machine, scenario.ambient_c.at(0.0), charge_j)
        self._told_w = scenario.machine.static_w  # power in the last period, as a sensor or the profile's model has it
        self._started = 0.0  # share of the next token that is done
        self._counts = AuditCounts()

    def all(self, controller: Controller | None) -> Trace:
        n = round(self._scenario.duration_s / PERIOD_S)
        noise = self._random.standard_normal((n, 3)).tolist()
        lost = (self._random.random((n, 2)) < _DROPPED).tolist()
        rung = next(rung for rung in self._ladder.rungs if rung.mode is Mode.FULL)
        moments: list[Moment] = []
        events: list[Event] = []
        audit_rate = 1.0
        for i in range(n):
            if controller is not None:
                last = moments[-1] if moments else None
                decision = controller.observe(self._observation(i * PERIOD_S, last, noise[i], lost[i]), self._counts)
                rung, audit_rate = decision.rung, decision.audit_rate
                events += decision.events
            moments.append(self._period(i * PERIOD_S, rung, audit_rate))
        return Trace(self._scenario, self._ladder, tuple(moments), tuple(events))

    def _period(self, time_s: float, rung: Rung, audit_rate: float) -> Moment:
        scenario, machine = self._scenario, self._machine
        others, hard, ambient_c = (c.at(time_s) for c in (scenario.background, scenario.hard, scenario.ambient_c))
        crowd = max(1.0, (rung.n_threads + others) / machine.cores)
        speed = machine.throttled_speed if self._physics.throttled else 1.0
        working_ms = machine.full_ms_on(rung.n_threads) * mix_of(rung).factor(hard) * scenario.speed_error
        token_ms = working_ms * crowd / speed / (1 - rung.rest)
        busy = min(machine.cores, rung.n_threads * (1 - rung.rest) + others)
        gb_per_s = machine.gb_per_s(rung.n_threads) * (1 - rung.rest) / crowd / scenario.speed_error
        core_w = machine.core_w * scenario.power_error
        self._physics, power_w = pass_time(self._physics, machine, busy, ambient_c, core_w, gb_per_s)
        estimate_w = machine.power.power_w(busy / machine.cores, machine.cores, gb_per_s * speed)
        self._told_w = power_w if machine.measures_power else estimate_w
        tokens, exits, wrong = self._publish(rung, token_ms, hard, audit_rate, scenario.wrong.at(time_s))
        return Moment(
            time_s=time_s,
            temp_c=self._physics.chip_c,
            power_w=power_w,
            ambient_c=ambient_c,
            background=others,
            time_per_token_ms=token_ms,
            rung=self._places[rung.name],
            tokens=tokens,
            exits=exits,
            wrong=wrong,
            throttled=self._physics.throttled,
            battery_percent=100 * self._physics.battery_j / scenario.battery_j if scenario.battery_j else 100.0,
        )

    def _publish(
        self, rung: Rung, token_ms: float, hard: float, audit_rate: float, wrong_factor: float
    ) -> tuple[int, int, int]:
        """Tokens, exits and wrong exits of a period; those audited go to the controller with its next look."""
        self._started += PERIOD_S * 1000 / token_ms
        tokens = int(self._started)
        self._started -= tokens
        self._counts = AuditCounts(tokens)
        if not tokens or rung.lossless:
            return tokens, 0, 0
        exits = int(self._random.binomial(tokens, mix_of(rung).exits(hard)))
        audited = int(self._random.binomial(exits, audit_rate))
        chance = min(0.9, rung.disagreement * wrong_factor)
        found = int(self._random.binomial(audited, chance))
        self._counts = AuditCounts(tokens, exits, audited, found, audit_rate)
        return tokens, exits, found + int(self._random.binomial(exits - audited, chance))

    def _observation(
        self, time_s: float, last: Moment | None, noise: Sequence[float], lost: Sequence[bool]
    ) -> Observation:
        """What the machine's sensors say, with noise, in steps, and not always."""
        scenario, machine, state = self._scenario, self._machine, self._physics
        gone = {sensor for sensor, start, end in scenario.dead if start <= time_s < end}
        reading = Reading(
            time_s,
            temp_c=round((state.chip_c + _TEMP_NOISE_C * noise[0]) / machine.temp_step_c) * machine.temp_step_c,
            power_w=self._told_w * (1 + _RELATIVE_NOISE * noise[1]),
            power_source=PowerSource.MEASURED if machine.measures_power else machine.power.label,
            throttled_now=frozenset({"throttled"} if state.throttled else ()),
            battery=Battery(100 * state.battery_j / scenario.battery_j, charging=False) if scenario.battery_j else None,
        )
        if "temp" in gone or lost[0]:
            reading = replace(reading, temp_c=None)
        if "power" in gone or lost[1]:
            reading = replace(reading, power_w=None, power_source=None)
        ms = last.time_per_token_ms * (1 + _RELATIVE_NOISE * noise[2]) if last and last.tokens else None
        return Observation(time_s, reading, ms)
