"""Where to cut when nobody says how much: thresholds found in the values. Arithmetic: knows no rows, no policies.

Each takes (N,) finite values of which the large ones go, and gives the largest value that stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WHISKER = 1.5  # of the interquartile range (Tukey, Exploratory Data Analysis, 1977)


def otsu(values: np.ndarray) -> float:
    """Between the two groups that differ most: the largest variance between them (Otsu, 1979).

    Exact, over every split of the sorted values instead of a histogram's.
    """
    ordered = np.sort(values)
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered - ordered.mean())[:-1]  # of what is below; what is above has its negative
    between = np.where(np.diff(ordered) > 0, sums**2 / (below * (len(ordered) - below)), -1.0)
    return float(ordered[between.argmax()]) if len(between) and between.max() >= 0 else float(ordered[-1])


def iqr(values: np.ndarray) -> float:
    """`Q3 + 1.5 (Q3 - Q1)`: beyond it lie outliers (Tukey, 1977)."""
    first, third = np.quantile(values, [0.25, 0.75])
    return float(third + WHISKER * (third - first))


def knee(values: np.ndarray) -> float:
    """Where the sorted values bend most: farthest below the chord from the largest to the smallest (Kneedle, 2011)."""
    falling = -np.sort(-values)
    span = falling[0] - falling[-1]
    if span == 0:
        return float(falling[0])
    chord = 1 - np.arange(len(falling)) / (len(falling) - 1)
    return float(falling[(chord - (falling - falling[-1]) / span).argmax()])


RULES: dict[str, Callable[[np.ndarray], float]] = {"otsu": otsu, "iqr": iqr, "knee": knee}
