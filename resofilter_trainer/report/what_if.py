"""What a selector would keep at another share. Knows scores and selectors; knows no page, no chart and no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..scores.score_table import ScoreTable
from ..selecting.data_selector import DataSelector
from ..selecting.selection import Selection
from ..selecting.shares import Drop, drop_order, number_dropped
from .columns import column_or_nan

SHARES = [percent / 100 for percent in range(1, 101)]
LISTED_GROUPS = 50


@dataclass(frozen=True)
class WhatIf:
    """What `DataSelector(keep=..., drop=..., by=...)` would keep, for every share of a whole per cent.

    Attributes:
        by, drop: what is ranked, and which end is dropped.
        keep: (S,) the shares.
        rows: (S,) the number of rows kept.
        tokens: (S,) the number of learnt tokens kept; None where tokens were not counted.
        dropped_of_groups: for each of the largest groups, (S,) the number of its rows dropped, including those
            without a score.
        unscored: the number of rows without a score, which are always dropped.
        kept_from: (N,) int, the smallest share in per cent that keeps each row; 101 for a row that none keeps.
    """

    by: str
    drop: Drop
    keep: list[float]
    rows: list[int]
    tokens: list[int] | None
    dropped_of_groups: dict[str, list[int]]
    unscored: int
    kept_from: np.ndarray


def what_if(selector: DataSelector, scores: ScoreTable, groups: Sequence[str] | None) -> WhatIf:
    """Count what a selector would keep at every share, over all rows together.

    Args:
        selector: the selector; its own share is not used.
        scores: the scores of N rows.
        groups: (N,) the group of each row, or None.
    """
    values = selector.values(scores)
    rows = np.flatnonzero(scores.scored & np.isfinite(values))
    end = selector.end(scores)
    order = rows[drop_order(values[rows], end)]  # the first to be dropped comes first
    dropped = [number_dropped(len(rows), share) for share in SHARES]
    tokens = np.nan_to_num(column_or_nan(scores, "num_tokens")).astype(np.int64)
    kept_from = np.full(len(scores), len(SHARES) + 1)
    kept_from[order] = 1 + len(SHARES) - np.searchsorted(dropped[::-1], np.arange(len(rows)), side="right")
    dropped_tokens = np.concatenate([[0], np.cumsum(tokens[order])])
    return WhatIf(
        by=selector.what,
        drop=end,
        keep=SHARES,
        rows=[len(rows) - count for count in dropped],
        tokens=(tokens[rows].sum() - dropped_tokens[dropped]).tolist() if _has_tokens(scores) else None,
        dropped_of_groups={} if groups is None else _dropped_of_groups(groups, rows, order, dropped),
        unscored=len(scores) - len(rows),
        kept_from=kept_from,
    )


def selector_of(selection: Selection) -> DataSelector:
    """A selector that ranks as the policy of a selection did; `DataSelector()` for a policy of another kind."""
    policies = (selection.policy, selection.policy.get("selector"), selection.policy.get("keep"))
    for policy in policies:  # the settings of a training run contain those of its policy
        if isinstance(policy, Mapping) and {"by", "drop", "combine"} <= policy.keys():
            ranking = {name: policy[name] for name in ("drop", "by", "combine", "length_out") if name in policy}
            return DataSelector(**ranking)
    return DataSelector()


def _has_tokens(scores: ScoreTable) -> bool:
    return "num_tokens" in scores.table.column_names


def _dropped_of_groups(
    groups: Sequence[str], rows: np.ndarray, order: np.ndarray, dropped: Sequence[int]
) -> dict[str, list[int]]:
    """The number of dropped rows of the largest groups, for each number of dropped rows in all."""
    names = np.array([str(group) for group in groups], dtype=object)
    unscored = Counter(np.delete(names, rows).tolist())
    found = {}
    for name, _ in Counter(names.tolist()).most_common(LISTED_GROUPS):
        counts = unscored[name] + np.concatenate([[0], np.cumsum(names[order] == name)])
        found[name] = counts[dropped].tolist()
    return found
