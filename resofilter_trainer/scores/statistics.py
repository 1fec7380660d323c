"""Ranks, rank correlation, AUROC and confidence intervals. Knows numpy, not where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

# Student's t, 97.5 %, for 1 to 30 degrees of freedom; beyond, from the normal distribution's
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL975 = 1.960


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    return pd.Series(values).rank().to_numpy()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where all values of a side are equal, which ranks nothing."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(np.stack([ranks(a), ranks(b)]))[0, 1])


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive row has the larger value (ties count half): Mann-Whitney's U over the pairs.

    Args:
        values: (N,) what is to detect.
        positive: (N,) bool, what is to be detected; some of each kind.
    """
    count = int(positive.sum())
    above = ranks(values)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(values) - count)))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of it over seeds by Student's t; NaN bounds for fewer than two values."""
    if not values:
        return math.nan, math.nan, math.nan
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.nan, math.nan
    freedom = count - 1
    t = T975[freedom - 1] if freedom <= len(T975) else NORMAL975 + (NORMAL975**3 + NORMAL975) / (4 * freedom)
    half = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half
