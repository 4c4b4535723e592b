"""Who hears how far long work is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reporter:
    """Hears how far the work is: `say` what begins, `progress(done, all)` of what is counted."""

    say: Callable[[str], None] = lambda _text: None
    progress: Callable[[int, int], None] = lambda _done, _all: None
