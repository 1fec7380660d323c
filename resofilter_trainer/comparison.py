"""How well numbers tell rows apart. Knows numpy, not where the numbers come from."""

from __future__ import annotations

import numpy as np
import pandas as pd


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
