"""Power of a board without a sensor, from what it does.

Cores and memory are what changes with the work of a model: power = static + active × busy cores + joule per GB × GB/s
of weights. The first two terms, linear in the utilisation, are the model of Fan, Weber and Barroso, "Power provisioning
for a warehouse-sized computer" (ISCA 2007).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..profiles import Profile
from ..sensors.reading import PowerSource, Reading


@dataclass(frozen=True, slots=True)
class PowerModel:
    """Coefficients of one board, none of them negative."""

    static_w: float  # idle
    active_w_per_core: float  # more for a core that is busy all the time
    joule_per_gb: float  # more for 10⁹ bytes of weights read
    label: PowerSource = PowerSource.ESTIMATED  # CALIBRATED after a fit; never MEASURED

    @classmethod
    def of(cls, profile: Profile) -> PowerModel | None:
        """The model with the profile's coefficients; None if it has none."""
        power = profile.power
        if power is None:
            return None
        return cls(power.static_w, power.active_w_per_core, power.joule_per_gb, PowerSource(power.label))

    def __post_init__(self) -> None:
        """Raises ValueError for a model that claims to measure."""
        if self.label is PowerSource.MEASURED:
            raise ValueError("a modelled power is not measured")

    def power_w(self, load: float, n_cores: int, gb_per_s: float = 0.0) -> float:
        """Power with `load`, 0 to 1, of `n_cores` busy and weights read at `gb_per_s`."""
        return self.static_w + self.active_w_per_core * n_cores * load + self.joule_per_gb * gb_per_s

    def fill(self, readings: Sequence[Reading], n_cores: int, gb_per_s: float = 0.0) -> list[Reading]:
        """Readings of which the power is modelled; it stays None where the load is not known."""
        return [
            dataclasses.replace(r, power_w=self.power_w(r.load, n_cores, gb_per_s), power_source=self.label, rails=())
            if r.load is not None
            else dataclasses.replace(r, power_w=None, power_source=None, rails=())
            for r in readings
        ]
