"""Slow and obvious selection rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def number_dropped(rows: int, keep: float) -> int:
    """floor(N * (1 - keep)), with keep as it was written: 10 * (1 - 0.9) is 1."""
    return math.floor(rows * (1 - Fraction(str(keep))))


def papers_rule(values: Sequence[float], keep: float, drop_largest: bool = True) -> list[bool]:
    """Sort by score, drop the first rows, restore the order, as in the released code."""
    order = sorted(range(len(values)), key=lambda row: values[row], reverse=drop_largest)
    kept = sorted(order[number_dropped(len(values), keep) :])
    return [row in kept for row in range(len(values))]
