"""Thresholds that are found in the values themselves. Arithmetic: knows no rows, no policies.

Each function takes (N,) finite values, of which the large ones are to be dropped, and returns the largest value to
keep. A new threshold is a function here and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WHISKER = 1.5  # times the interquartile range (Tukey, Exploratory Data Analysis, 1977)


def otsu(values: np.ndarray) -> float:
    """The split into the two groups with the largest variance between them (Otsu, 1979).

    Exact: every split of the sorted values is tried, without a histogram.
    """
    ordered = np.sort(values)
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered - ordered.mean())[:-1]  # of the values below; the sum above is its negative
    between = np.where(np.diff(ordered) > 0, sums**2 / (below * (len(ordered) - below)), -1.0)
    return float(ordered[between.argmax()]) if len(between) and between.max() >= 0 else float(ordered[-1])


def iqr(values: np.ndarray) -> float:
    """`Q3 + 1.5 (Q3 - Q1)`: larger values are outliers (Tukey, 1977)."""
    return beyond_quartiles(*np.quantile(values, [0.25, 0.75]))


def beyond_quartiles(first: float, third: float) -> float:
    """The threshold of `iqr`, from the quartiles."""
    return float(third + WHISKER * (third - first))


def knee(values: np.ndarray) -> float:
    """The bend of the sorted values: farthest below the chord from the largest to the smallest (Kneedle, 2011)."""
    falling = -np.sort(-values)
    span = falling[0] - falling[-1]
    if span == 0:
        return float(falling[0])
    chord = 1 - np.arange(len(falling)) / (len(falling) - 1)
    return float(falling[(chord - (falling - falling[-1]) / span).argmax()])


RULES: dict[str, Callable[[np.ndarray], float]] = {"otsu": otsu, "iqr": iqr, "knee": knee}
