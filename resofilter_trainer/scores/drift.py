"""Scores measured while the weights move, made comparable. Knows arrays, no model.

A sample measured late in an epoch meets a model that has learnt from the others: its loss is smaller, and so, mostly,
is its score. Where the order is random, the rows measured around any moment are a random sample of all rows. A change
of their distribution is then a change of the model, not of the rows, and is removed: a score at some quantile of the
scores measured around it moves to that quantile of all scores.

    corrected = Q_all(F_moment(score)), with F and Q linear between the quantiles in LEVELS

In the first and the last half of a window, where one side has too few rows, the quantiles are extrapolated linearly.
Below the lowest quantile scores keep their ratio to it; above the highest they keep their distance, stretched as the
middle is.
"""

from __future__ import annotations

import numpy as np

LEVELS = np.array([0.05, 0.15, 0.25, 0.35, 0.5, 0.65, 0.75, 0.85, 0.95])
SMALLEST_WINDOW = 50  # rows: quantiles of fewer are noise, and removing noise adds noise
WINDOWS = 10  # otherwise a tenth of the rows


def without_drift(scores: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The scores as if all had been measured at the same moment.

    Args:
        scores: (N,) the scores; those that are not finite are returned as they are and are not used.
        moments: (N,) the moment at which each was measured, in any unit, such as the step.

    Returns:
        (N,) in the unit of `scores`. Fewer than 100 finite scores are returned as they are.
    """
    finite = np.flatnonzero(np.isfinite(scores))
    if len(finite) < 2 * SMALLEST_WINDOW:
        return scores.copy()
    order = finite[np.argsort(moments[finite], kind="stable")]
    window = max(SMALLEST_WINDOW, len(order) // WINDOWS)
    starts = np.unique(np.linspace(0, len(order) - window, 4 * WINDOWS).astype(int))
    around = np.array([np.quantile(scores[order[i : i + window]], LEVELS) for i in starts])
    centres = starts + (window - 1) / 2
    knots = np.array([_line(centres, column, len(order)) for column in around.T])
    corrected = scores.copy()
    corrected[order] = _mapped(scores[order], np.maximum.accumulate(knots), np.quantile(scores[order], LEVELS))
    return corrected


def on_scale_of(scores: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """Scores of one epoch on the scale of an earlier one, from the rows that were measured in both.

    Args:
        scores: (N,) the scores of this epoch, NaN where a row was not measured.
        earlier: (N,) the scores of earlier epochs, NaN likewise.

    Returns:
        (N,) scores, in which the common rows have the median and interquartile range of `earlier`.
    """
    common = np.isfinite(scores) & np.isfinite(earlier)
    if not common.any():
        return scores.copy()
    low, middle, high = np.quantile(scores[common], [0.25, 0.5, 0.75])
    first, median, third = np.quantile(earlier[common], [0.25, 0.5, 0.75])
    stretch = (third - first) / (high - low) if high > low and third > first else 1.0
    return median + (scores - middle) * stretch


def drop_rate_by_moment(dropped: np.ndarray, moments: np.ndarray, bins: int = 10) -> np.ndarray:
    """The share of rows dropped in each of some equal bins of an epoch, early to late; (bins,). Flat without bias."""
    order = np.argsort(moments, kind="stable")
    return np.array([dropped[some].mean() for some in np.array_split(order, bins)])


def _mapped(values: np.ndarray, knots: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Each value moved as the knots around it move to the targets.

    Args:
        values: (N,) the values to move.
        knots: (L, N) the knots around each value, ascending.
        targets: (L,) the values that the knots move to, ascending.
    """
    place, every = (knots <= values).sum(axis=0), np.arange(len(values))
    below, above = np.clip(place - 1, 0, len(targets) - 1), np.clip(place, 0, len(targets) - 1)
    low, high = knots[below, every], knots[above, every]
    moved = targets[below] + (values - low) * _ratio(targets[above] - targets[below], high - low)
    over, under = place == len(targets), place == 0
    stretch = _ratio(targets[-2] - targets[1], knots[-2] - knots[1])
    moved[over] = (targets[-1] + (values - knots[-1]) * stretch)[over]
    shrunk = np.where(knots[0] > 0, targets[0] * _ratio(values, knots[0]), values - knots[0] + targets[0])
    moved[under] = shrunk[under]
    return moved


def _line(centres: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """(length,) the line through the values at the centres, extrapolated at both ends."""
    positions = np.arange(length)
    line = np.interp(positions, centres, values)
    reach = int(np.searchsorted(centres, 2 * centres[0]))  # as far in as the end is far out
    if 0 < reach < len(centres):
        first, last = positions < centres[0], positions > centres[-1]
        line[first] += (positions[first] - centres[0]) * (values[reach] - values[0]) / (centres[reach] - centres[0])
        back = len(centres) - 1 - reach
        slope = (values[-1] - values[back]) / (centres[-1] - centres[back])
        line[last] += (positions[last] - centres[-1]) * slope
    return line


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`; 1 where `below` is not positive."""
    return np.divide(above, below, out=np.ones(np.broadcast(above, below).shape), where=below > 0)
