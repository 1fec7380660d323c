"""Scores measured while the weights move, made comparable. Knows nothing of models: sees arrays.

A sample that is measured late in an epoch meets a model that has learnt from the others: its loss is smaller, and so,
mostly, is its score. Where the order is random, the rows measured around any one moment are a random sample of all
rows. So a change of their median or spread is a change of the model, not of the rows, and it is taken out:

    corrected = median + (score - median at that moment) * spread / spread at that moment

The median and the spread (the interquartile range) at a moment are those of the rows measured around it; in the first
and the last half of a window, where there are not rows enough on either side, their straight continuation.
"""

from __future__ import annotations

import numpy as np

SMALLEST_WINDOW = 50  # rows: the median of fewer is noise, and taking out noise adds noise
WINDOWS = 10  # otherwise a tenth of the rows


def without_drift(scores: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The scores as if all had been measured at the same moment.

    Args:
        scores: (N,) finite or not; what is not finite stays as it is and counts for nothing.
        moments: (N,) when each was measured, in any unit; the update, say.

    Returns:
        (N,) in the unit of `scores`. Fewer than 100 finite scores are returned as they are.
    """
    finite = np.flatnonzero(np.isfinite(scores))
    if len(finite) < 2 * SMALLEST_WINDOW:
        return scores.copy()
    order = finite[np.argsort(moments[finite], kind="stable")]
    window = max(SMALLEST_WINDOW, len(order) // WINDOWS)
    starts = np.unique(np.linspace(0, len(order) - window, 4 * WINDOWS).astype(int))
    quartiles = np.array([np.quantile(scores[order[i : i + window]], [0.25, 0.5, 0.75]) for i in starts])
    centres = starts + (window - 1) / 2
    low, middle, high = (_line(centres, column, len(order)) for column in quartiles.T)
    first, median, third = np.quantile(scores[order], [0.25, 0.5, 0.75])
    corrected = scores.copy()
    corrected[order] = median + (scores[order] - middle) * _ratio(third - first, high - low)
    return corrected


def on_scale_of(scores: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """Scores of one epoch on the scale of an earlier one, by the rows that were measured in both.

    Args:
        scores: (N,) of this epoch, NaN where a row was not measured.
        earlier: (N,) of earlier epochs, NaN likewise.

    Returns:
        (N,) with the median and the interquartile range of the common rows moved to what they were.
    """
    common = np.isfinite(scores) & np.isfinite(earlier)
    if not common.any():
        return scores.copy()
    low, middle, high = np.quantile(scores[common], [0.25, 0.5, 0.75])
    first, median, third = np.quantile(earlier[common], [0.25, 0.5, 0.75])
    return median + (scores - middle) * _ratio(third - first, high - low)


def drop_rate_by_moment(dropped: np.ndarray, moments: np.ndarray, parts: int = 10) -> np.ndarray:
    """The share of rows dropped in each part of an epoch, early to late; (parts,). Flat where there is no bias."""
    order = np.argsort(moments, kind="stable")
    return np.array([dropped[part].mean() for part in np.array_split(order, parts)])


def _line(centres: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """(length,) through the values at the centres, and straight on at both ends."""
    positions = np.arange(length)
    line = np.interp(positions, centres, values)
    reach = np.searchsorted(centres, centres[0] + centres[0])  # as far in as the end is far out
    if 0 < reach < len(centres):
        first, last = positions < centres[0], positions > centres[-1]
        line[first] += (positions[first] - centres[0]) * (values[reach] - values[0]) / (centres[reach] - centres[0])
        back = len(centres) - 1 - reach
        slope = (values[-1] - values[back]) / (centres[-1] - centres[back])
        line[last] += (positions[last] - centres[-1]) * slope
    return line


def _ratio(spread: np.ndarray | float, at_the_moment: np.ndarray | float) -> np.ndarray:
    """One where a spread is zero: nothing to stretch."""
    spread, at_the_moment = np.asarray(spread, float), np.asarray(at_the_moment, float)
    return np.divide(spread, at_the_moment, out=np.ones_like(at_the_moment), where=(at_the_moment > 0) & (spread > 0))
