"""What a selection keeps of each group of rows, in words. Knows masks and reasons, not where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import pandas as pd

from ..config import InputError
from ..scores.score_table import OF_GROUP, count_reasons

LISTED, REASONS = 20, 3  # groups, and reasons of each


def check_groups(groups: Any, rows: int) -> None:
    """Raise InputError unless there is a group for each of the rows."""
    if isinstance(groups, str):
        raise InputError(f"groups={groups!r} is one text, and every row needs a group: pass dataset[{groups!r}].")
    if not isinstance(groups, Sized) or isinstance(groups, Mapping) or not hasattr(groups, "__getitem__"):
        what = repr(groups) if isinstance(groups, int | float) else f"a {type(groups).__name__}"
        raise InputError(f"groups must be a list with the group of each row, got {what}: pass dataset['source'].")
    if len(groups) != rows:
        raise InputError(f"There are {rows} rows and {len(groups)} groups: every row needs one.")


def group_lines(keep: np.ndarray, reason: Sequence[str], groups: Sequence[Any]) -> list[str]:
    """A line for each group, the largest first: its kept rows, all its rows, and why the others are dropped.

    Args:
        keep: (N,) bool, the rows to keep.
        reason: N reasons.
        groups: (N,) the group of each row.

    Raises:
        InputError: there are not N groups.
    """
    check_groups(groups, len(keep))
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
