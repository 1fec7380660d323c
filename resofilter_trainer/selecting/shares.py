"""Which values to drop for a given share to keep, and how many. Arithmetic: knows no rows, no policies."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np

Side = Literal["largest", "smallest"]
Drop = Literal["largest", "smallest", "both"]


def drop_share(values: np.ndarray, keep: float, drop: Drop) -> np.ndarray:
    """Which of `values` to keep when `floor(N * (1 - keep))` of them are dropped.

    As in ResoFilter's released code, rows are sorted by value, descending and stably, and the first ones are dropped:
    of equal values, the earlier row is dropped first. `"smallest"` sorts ascending; `"both"` drops half from either
    end, and the odd one from the largest.

    Returns:
        (N,) bool, True for a value to keep.
    """
    return drop_count(values, number_dropped(len(values), keep), drop)


def drop_count(values: np.ndarray, count: int, drop: Drop) -> np.ndarray:
    """Which of `values` to keep when `count` of them are dropped in the order of `drop_order`; (N,) bool."""
    keep = np.ones(len(values), dtype=bool)
    if drop == "both" or not 0 < count < len(values) or np.isnan(values).any():
        keep[drop_order(values, drop)[:count]] = False
        return keep
    last = count - 1 if drop == "smallest" else len(values) - count
    bound = np.partition(values, last)[last]  # of the last value to drop: ten million rows need no sorting
    keep[values < bound if drop == "smallest" else values > bound] = False
    ties = np.flatnonzero(values == bound)
    keep[ties[: count - np.count_nonzero(~keep)]] = False
    return keep


def outside(values: np.ndarray, band: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Which of `values` have a rank below and above a band, (N,) bool each.

    `floor(N * low)` values are below and `floor(N * (1 - high))` above; of equal values, as for `drop_share`.
    """
    above = ~drop_share(values, band[1], "largest")
    rest, below = np.flatnonzero(~above), np.zeros(len(values), dtype=bool)
    count = number_dropped(len(values), complement(band[0]))
    below[rest[~drop_count(values[rest], count, "smallest")]] = True
    return below, above


def complement(share: float) -> float:
    """One minus the share as it was written."""
    return float(1 - _exact(share))


def drop_order(values: np.ndarray, drop: Drop) -> np.ndarray:
    """(N,) positions in the order in which they are dropped: whatever the share, the first ones are dropped."""
    descending = np.argsort(-values, kind="stable")
    if drop == "largest":
        return descending
    ascending = np.argsort(values, kind="stable")
    if drop == "smallest":
        return ascending
    turns = np.empty((len(values), 2), dtype=np.int64)  # one of the largest, one of the smallest, and so on
    turns[:, 0], turns[:, 1] = descending, ascending
    order, first = np.unique(turns.ravel(), return_index=True)
    return order[np.argsort(first, kind="stable")]


def number_dropped(rows: int, keep: float) -> int:
    """How many of `rows` are dropped for a share to keep: `floor(N * (1 - keep))` (ResoFilter, released code)."""
    return math.floor(rows * (1 - _exact(keep)))


def share_reason(keep: float, drop: str, what: str = "score", group: str = "") -> str:
    """The reason for dropping a share, as text: `largest 50 %`, `smallest 25 % of group easy by loss`.

    Args:
        keep: the share to keep.
        drop: the dropped end.
        what: the ranked column, left out where it is the score.
        group: ` of group <name>`, or nothing.
    """
    ends = "largest and smallest" if drop == "both" else drop
    return f"{ends} {percent_dropped(keep)}{group}{'' if what == 'score' else f' by {what}'}"


def percent_dropped(keep: float) -> str:
    """The dropped share as text: `50 %`."""
    return f"{float(100 - 100 * _exact(keep)):.4g} %"


def _exact(share: float) -> Fraction:
    """The share as it was written: 1 - 0.9 is a tenth, not a little less."""
    return Fraction(repr(float(share)))
