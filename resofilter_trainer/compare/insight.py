"""How a selector's scores relate to length, loss and the known wrong rows. Knows arrays; does not know selectors."""

from __future__ import annotations

import numpy as np

from ..scores.score_table import ScoreTable
from ..scores.statistics import auroc, rank_correlation


def wrong_kept(kept: np.ndarray, wrong: np.ndarray) -> float:
    """The share of wrong rows among the kept.

    Args:
        kept: (N,) how much of each row is kept.
        wrong: (N,) bool, which rows are wrong.
    """
    return float(kept[wrong].sum() / kept.sum())


def relations(values: np.ndarray, losses: ScoreTable, wrong: np.ndarray | None) -> dict[str, float]:
    """`length_correlation` and `loss_correlation` (Spearman) and, where wrong rows are known, `auroc`.

    Args:
        values: (N,) a value for each row, larger where it is dropped first; NaN where a row has none.
        losses: each row's learnt tokens and loss before the training.
        wrong: (N,) bool, which rows are wrong; None if unknown.
    """
    rows = np.isfinite(values) & losses.scored
    values = values[rows]
    found = {
        "length_correlation": rank_correlation(values, losses.column("num_tokens")[rows]),
        "loss_correlation": rank_correlation(values, losses.column("score")[rows]),
    }
    if wrong is not None and 0 < wrong[rows].sum() < rows.sum():
        found["auroc"] = auroc(values, wrong[rows])
    return found
