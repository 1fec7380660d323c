"""Where a ranking is cut: which values are dropped, and of equal ones how many. Knows numbers, no rows and no tables.

`shares` and `thresholds` decide over values in memory; this is the same decision over values that fit none, from a few
order statistics. The earlier of equal values is dropped first, so ties are numbered in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..scores.order_statistics import Placed, Read, order_statistics, quantiles
from .shares import Drop, complement, number_dropped
from .thresholds import RULES, beyond_quartiles

NONE = range(0)


@dataclass(frozen=True)
class Cut:
    """Values to drop at one end.

    Attributes:
        bound: the last value to keep, or where some of the equal ones are dropped, the first to drop.
        above: whether the values above the bound are dropped, or those below it.
        ties: which of the values equal to the bound are dropped, counted from 0 in the order of the rows.
    """

    bound: float
    above: bool
    ties: range = NONE

    def drops(self, values: np.ndarray, ties_before: int) -> np.ndarray:
        """(N,) bool, which of the next values are dropped.

        Args:
            values: (N,) finite values.
            ties_before: the number of values equal to the bound in earlier rows.
        """
        dropped: np.ndarray = values > self.bound if self.above else values < self.bound
        if self.ties:
            equal = np.flatnonzero(values == self.bound)
            first, end = (min(max(each - ties_before, 0), len(equal)) for each in (self.ties.start, self.ties.stop))
            dropped[equal[first:end]] = True
        return dropped


def cuts_of_share(read: Read, keep: float, drop: Drop) -> list[Cut]:
    """The cuts of `drop_share`: one, or two for both ends; none where nothing is dropped."""

    def counts(rows: int) -> tuple[int, int]:
        count = number_dropped(rows, keep)
        smallest = {"largest": 0, "smallest": count, "both": count // 2}[drop]  # the odd one is of the largest
        return count - smallest, smallest

    high, low = _bounds(read, counts)
    if high is not None and low is not None and high[0].value == low[0].value:  # the ends meet among equal values
        (placed, largest), (_, smallest) = high, low
        ties = range(largest + smallest - placed.above - placed.below)
        return [Cut(placed.value, True, ties), Cut(placed.value, False)]
    return _apart(high, low)


def cuts_of_band(read: Read, band: tuple[float, float]) -> list[Cut]:
    """The cuts of `outside`: above the band, and below it among the other rows."""

    def counts(rows: int) -> tuple[int, int]:
        return number_dropped(rows, band[1]), number_dropped(rows, complement(band[0]))

    high, low = _bounds(read, counts)
    cuts = _apart(high, low)
    if high is not None and low is not None and high[0].value == low[0].value:
        above, below = cuts
        start = above.ties.stop
        return [above, Cut(below.bound, False, range(start, start + len(below.ties)))]
    return cuts


def bound_of_rule(read: Read, rule: str) -> float:
    """The threshold that a rule of `thresholds` finds: the quartiles' from order statistics, others from all values."""
    if rule == "iqr":
        return beyond_quartiles(*quantiles(read, [0.25, 0.75]))
    return RULES[rule](np.concatenate(list(read())))


Bound = tuple[Placed, int]  # the last value to drop at an end, and how many are dropped there


def _bounds(read: Read, counts: Callable[[int], tuple[int, int]]) -> tuple[Bound | None, Bound | None]:
    """The bounds of the largest and of the smallest values to drop; None for an end where nothing is dropped."""

    def places(rows: int) -> Sequence[int]:
        largest, smallest = counts(rows)
        return [*([rows - largest] if largest else []), *([smallest - 1] if smallest else [])]

    rows, placed = order_statistics(read, places)
    largest, smallest = counts(rows)
    found = iter(placed)
    high = (next(found), largest) if largest else None
    return high, (next(found), smallest) if smallest else None


def _apart(high: Bound | None, low: Bound | None) -> list[Cut]:
    cuts = []
    if high is not None:
        cuts.append(Cut(high[0].value, True, range(high[1] - high[0].above)))
    if low is not None:
        cuts.append(Cut(low[0].value, False, range(low[1] - low[0].below)))
    return cuts
