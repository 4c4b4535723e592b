"""What one answer used, its prompt and its tokens apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..sensors.reading import PowerSource, Reading
from .account import MAX_GAP_S, Energy, integrate, worst
from .model import PowerModel


@dataclass(frozen=True, slots=True)
class Work:
    """An answer's times, of the clock that readings have, and how much of the weights it read in 10⁹ bytes."""

    start_s: float
    first_s: float  # when the first token was there: the end of prefill
    end_s: float
    decoded: int  # tokens after the first
    prefill_gb: float = 0.0
    decode_gb: float = 0.0


def weights_gb(file_bytes: int, n_tokens: int, n_batches: int, early_share: float = 0.0) -> float:
    """About how much of the weights was read, in 10⁹ bytes.

    The layers before the first boundary, a share of `early_share`, are read once for each of `n_tokens`, the others
    once for each of `n_batches` through the last slice.
    """
    return file_bytes / 1e9 * (early_share * n_tokens + (1 - early_share) * n_batches)


@dataclass(frozen=True, slots=True)
class RequestEnergy:
    """Energy of an answer; `decode`, the tokens after the first, is None where there are none."""

    prefill: Energy
    decode: Energy | None
    decoded: int

    @property
    def _parts(self) -> list[Energy]:
        return [self.prefill] if self.decode is None else [self.prefill, self.decode]

    @property
    def gross_j(self) -> float:
        return sum(part.gross_j for part in self._parts)

    @property
    def source(self) -> PowerSource:
        return worst({part.source for part in self._parts})

    @property
    def covered(self) -> float:
        """Share of the time that readings were near enough to."""
        return sum(p.covered * p.seconds for p in self._parts) / sum(p.seconds for p in self._parts)

    @property
    def per_token_j(self) -> float | None:
        """Gross, of a token after the first."""
        return self.decode.gross_j / self.decoded if self.decode and self.decoded else None

    @property
    def net_per_token_j(self) -> float | None:
        """The same above idling; None if the idle power is not known."""
        net_j = self.decode.net_j if self.decode else None
        return net_j / self.decoded if net_j is not None and self.decoded else None


@dataclass(frozen=True, slots=True)
class Meter:
    """Where the energy of answers is read: readings since a moment of `time.perf_counter`, and what goes with them."""

    readings: Callable[[float], Sequence[Reading]]
    idle_w: float | None = None
    model: PowerModel | None = None  # used where no reading has a power
    n_cores: int = 1  # of the machine, for the model

    def account(self, work: Work) -> RequestEnergy | None:
        """Energy of `work`; None unless something is known of each of its parts."""
        readings = self.readings(work.start_s - MAX_GAP_S)
        prefill = self._energy(readings, work.start_s, work.first_s, work.prefill_gb)
        if prefill is None or work.end_s <= work.first_s:
            return None if prefill is None else RequestEnergy(prefill, None, 0)
        decode = self._energy(readings, work.first_s, work.end_s, work.decode_gb)
        return None if decode is None else RequestEnergy(prefill, decode, work.decoded)

    def _energy(self, readings: Sequence[Reading], start_s: float, end_s: float, gb: float) -> Energy | None:
        model, idle_w = self.model, self.idle_w
        if model is not None and end_s > start_s and all(r.power_w is None for r in readings):
            readings = model.fill(readings, self.n_cores, gb / (end_s - start_s))
            idle_w = model.static_w if idle_w is None else idle_w
        return integrate(readings, start_s, end_s, idle_w=idle_w)
