"""Columns of a table of scores as arrays, whatever the table has. Knows no page, no chart and no model."""

from __future__ import annotations

import numpy as np

from ..scores.score_table import ScoreTable
from ..scores.statistics import rank_correlation


def column_or_nan(scores: ScoreTable, name: str) -> np.ndarray:
    """A column as float64; all NaN where the table has no such column."""
    if name not in scores.table.column_names:
        return np.full(len(scores), np.nan)
    return scores.column(name).astype(np.float64)


def with_finite_score(scores: ScoreTable) -> np.ndarray:
    """(N,) bool, the rows whose score is a finite number."""
    return scores.scored & np.isfinite(scores.column("score"))


def correlation_with_score(scores: ScoreTable, name: str) -> float | None:
    """The rank correlation of the score with a column; None for fewer than three rows that have both."""
    values = column_or_nan(scores, name)
    both = with_finite_score(scores) & np.isfinite(values)
    return rank_correlation(scores.column("score")[both], values[both]) if both.sum() > 2 else None


def finite(value: float | None) -> float | None:
    """The value; None for infinity and NaN, which JSON does not have."""
    return None if value is None or not np.isfinite(value) else value
