"""Has a stream of messages become unlike the training messages? Compared by quantiles, over a sliding window."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from ..types import Floats

WINDOW = 500
_FALSE_ALARM = 0.001  # per look at a full window
_MIN_SHIFT = 0.1  # smaller shifts are no news, however certain


@dataclass(frozen=True, slots=True)
class Reference:
    """Some quantiles of a quantity in held-out messages, and the share of them at or below each."""

    values: Floats
    shares: Floats
    n: int  # held-out messages it is of


def reference_of(quantity: Floats) -> Reference:
    """Deciles of a quantity (n,), those that differ."""
    values = np.unique(np.quantile(quantity, np.linspace(0.1, 0.9, 9), method="lower"))
    shares = [float((quantity <= value).mean()) for value in values]
    return Reference(values.astype(np.float32), np.array(shares, np.float32), len(quantity))


@dataclass(frozen=True, slots=True)
class Drift:
    """Of the last `n` messages, a `share` has a `quantity` of `value` or less; of the training messages, `expected`."""

    quantity: str
    value: float
    share: float
    expected: float
    n: int

    def sentence(self) -> str:
        return (
            f"the messages drift from the training data: {self.share:.0%} of the last {self.n} have a {self.quantity} "
            f"of {self.value:.2f} or less, in training {self.expected:.0%}"
        )


class DriftMonitor:
    """Watches one quantity; `add` gives a Drift when a shift is certain, and then not before a whole new window.

    A window of n messages is far from the reference when their shares differ by more than the bound of Dvoretzky,
    Kiefer and Wolfowitz (Massart 1990), which chance exceeds once in a thousand windows, and by 0.1 at least.
    """

    def __init__(self, quantity: str, reference: Reference, window: int = WINDOW) -> None:
        self._quantity, self._reference = quantity, reference
        self._values: deque[float] = deque(maxlen=window)
        self._since = 0
        self._limit = max(_MIN_SHIFT, math.sqrt(math.log(2 / _FALSE_ALARM) / 2 * (1 / window + 1 / reference.n)))

    def add(self, value: float) -> Drift | None:
        """Take in one message's quantity."""
        self._values.append(value)
        self._since += 1
        # looks at windows that do not overlap: the chance of a false alarm is per look
        if self._since < (self._values.maxlen or 0) or not len(self._reference.values):
            return None
        self._since = 0
        seen = np.array(self._values, np.float32)
        shares = (seen[:, None] <= self._reference.values).mean(axis=0)
        worst = int(np.abs(shares - self._reference.shares).argmax())
        if abs(shares[worst] - self._reference.shares[worst]) <= self._limit:
            return None
        value_there, expected = float(self._reference.values[worst]), float(self._reference.shares[worst])
        return Drift(self._quantity, value_there, float(shares[worst]), expected, len(seen))
