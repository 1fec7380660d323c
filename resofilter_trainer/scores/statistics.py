"""Ranks, rank correlation, AUROC and confidence intervals. Knows NumPy, not where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

LAYER = "layer_"  # layer_27, layer_28, ...: a column of scores for each measured layer
# The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom, and of the normal distribution
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL975 = 1.960


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, counted from 1. Equal values share their mean rank."""
    return pd.Series(values).rank().to_numpy()


def layer_vote(layers: np.ndarray) -> np.ndarray:
    """The mean over the layers of a row's rank among all rows, over their number, (N,); `layers` are scores, (N, L)."""
    return np.mean([ranks(scores) for scores in layers.T], axis=0) / max(len(layers), 1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 if all values of one side are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(np.stack([ranks(a), ranks(b)]))[0, 1])


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive row has a larger value than a negative one: Mann-Whitney's U over all pairs.

    Args:
        values: (N,) the detector's values. Ties count half.
        positive: (N,) bool, the rows to detect: at least one, and not all.
    """
    count = int(positive.sum())
    above = ranks(values)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(values) - count)))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval by Student's t: `(mean, low, high)`. The bounds are NaN for fewer than two values.

    Beyond 30 degrees of freedom, t = z + (z^3 + z) / (4 df), the first terms of its expansion around the normal z.
    """
    if not values:
        return math.nan, math.nan, math.nan
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.nan, math.nan
    freedom = count - 1
    t = T975[freedom - 1] if freedom <= len(T975) else NORMAL975 + (NORMAL975**3 + NORMAL975) / (4 * freedom)
    half = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half
