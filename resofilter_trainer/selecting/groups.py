"""What a selection keeps of each group of rows, in words. Knows masks and reasons, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..config import InputError
from ..scores.score_table import OF_GROUP, count_reasons

LISTED, REASONS = 20, 3  # groups, and reasons of each


def group_lines(keep: np.ndarray, reason: Sequence[str], groups: Sequence[Any]) -> list[str]:
    """A line for each group, the largest first: its kept rows, all its rows, and why the others are dropped.

    Args:
        keep: (N,) bool, the rows to keep.
        reason: N reasons.
        groups: (N,) the group of each row.

    Raises:
        InputError: the number of groups is not N.
    """
    if len(groups) != len(keep):
        raise InputError(f"There are {len(keep)} rows and {len(groups)} groups: every row needs one.")
    codes, names = pd.factorize(np.array([str(each) for each in groups], dtype=object))
    totals = np.bincount(codes, minlength=len(names))
    order = np.argsort(-totals, kind="stable")
    why = np.array([each.split(OF_GROUP)[0] for each in reason], dtype=object)
    lines = []
    for group in order[:LISTED].tolist():
        mine = codes == group
        counts = count_reasons(why[mine & ~keep].tolist(), REASONS)
        dropped = "; dropped: " + ", ".join(f"{count:,} {each}" for each, count in counts) if counts else ""
        lines.append(f"  {names[group]}: {int(keep[mine].sum()):,} of {int(totals[group]):,} rows kept{dropped}")
    left = order[LISTED:]
    if len(left):
        kept = int(keep[np.isin(codes, left)].sum())
        lines.append(f"  {len(left):,} other groups: {kept:,} of {int(totals[left].sum()):,} rows kept")
    return lines
