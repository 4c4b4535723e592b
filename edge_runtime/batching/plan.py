"""What goes into one batch: decisions as pure functions of counts, chances and costs.

Each sequence has a cache of its own, and llama.cpp computes a batch of several in passes over the weights. A pass takes
sequences whose numbers follow one another, and as many rows of each as the shortest has; what is left goes into later
passes. So rows are worth their cost only where a pass is a rectangle without gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count, pairwise, takewhile
from typing import overload

from ..ngram import GAIN


def cost_of(costs: Sequence[float], rows: int) -> float:
    """c(rows) in batches of one, from `costs` c(1), c(2), …; beyond the last in proportion to it."""
    return costs[rows - 1] if rows <= len(costs) else costs[-1] * rows / len(costs)


def prompt_shares(due: Sequence[int], room: int) -> list[int]:
    """Rows for each prompt that has `due` rows to compute: `room` shared out evenly, at least one each.

    What short prompts do not need goes to the others, so a short prompt never waits for a long one.
    """
    shares = [0] * len(due)
    by_need = sorted(range(len(due)), key=lambda i: due[i])
    for n_before, i in enumerate(by_need):
        shares[i] = min(due[i], max(1, room // (len(due) - n_before)))
        room -= shares[i]
    return shares


def bridges(active: Sequence[int], costs: Sequence[float]) -> list[int]:
    """The sequences between `active` ones, increasing, that are worth a row of their own: one pass instead of two."""
    groups: list[list[int]] = []
    for number in active:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    found: list[int] = []
    n_rows = len(groups[0]) if groups else 0
    for left, right in pairwise(groups):
        gap = range(left[-1] + 1, right[0])
        joined = n_rows + len(gap) + len(right)
        if cost_of(costs, joined) < cost_of(costs, n_rows) + cost_of(costs, len(right)):
            found += gap
            n_rows = joined
        else:
            n_rows = len(right)
    return found


def best_width(
    chances: Sequence[Sequence[float]], n_sequences: int, costs: Sequence[float], widest: int, gain: float = GAIN
) -> int:
    """Rows of each sequence with which most tokens are published in a time; 1 where no drafts promise `gain` more.

    `chances[i][j]` is the probability that draft j of text i is right if those before it are; `n_sequences` rows
    stand side by side, those without a text or draft counted.
    """
    survival = [1.0] * len(chances)
    expected = float(len(chances))
    best, best_rate = 1, (1 + gain) * expected / cost_of(costs, n_sequences)
    for width in range(2, widest + 1):
        for i, of_text in enumerate(chances):
            survival[i] *= of_text[width - 2] if width - 2 < len(of_text) else 0.0
            expected += survival[i]
        rate = expected / cost_of(costs, n_sequences * width)
        if rate > best_rate:
            best, best_rate = width, rate
    return best


class CompanyCosts(Sequence[float]):
    """What 1, 2, … rows of each of `n_sequences` cost, in batches of one row of each: what a draft costs in company.

    Follows the costs it is made from, and `n_sequences` where that is set anew.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self._costs = costs
        self.n_sequences = 1

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...

    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return cost_of(self._costs, self.n_sequences * (index + 1)) / cost_of(self._costs, self.n_sequences)

    def __len__(self) -> int:
        return max(1, len(self._costs) // self.n_sequences)


def passes(rows: Mapping[int, int]) -> list[int]:
    """Rows of each pass that llama.cpp makes of a batch with `rows[number]` ≥ 1 rows of some sequences."""
    left = dict(sorted(rows.items()))
    found: list[int] = []
    while left:
        first = next(iter(left))
        together = list(takewhile(lambda number: number in left, count(first)))
        width = min(left[number] for number in together)
        found.append(width * len(together))
        for number in together:
            left[number] -= width
            if not left[number]:
                del left[number]
    return found


def padded(
    rows: Mapping[int, int], width: int, n_batch: int, costs: Sequence[float], fits: Callable[[int, int], bool]
) -> dict[int, int]:
    """Rows of each sequence in a batch, by number, padding included, so that what `rows` asks for takes least time.

    Either nothing is padded, or all that have fewer rows than `width`, or the sequences between them, too, which
    `rows` does not name. `fits(number, n)` says whether a sequence has room for n rows.
    """
    asked = dict(sorted(rows.items()))
    if len(asked) == 1:
        return asked
    wide = {number: max(n, width) for number, n in asked.items()}
    bridged = {number: wide.get(number, width) for number in range(min(asked), max(asked) + 1)}
    best, best_cost = asked, _time_of(asked, costs)
    for shape in (wide, bridged):
        if sum(shape.values()) <= n_batch and all(fits(number, n) for number, n in shape.items()):
            cost = _time_of(shape, costs)
            if cost < best_cost:
                best, best_cost = shape, cost
    return best


def _time_of(rows: Mapping[int, int], costs: Sequence[float]) -> float:
    return sum(cost_of(costs, n) for n in passes(rows))
