"""Ways to combine several columns into one number per row. Arithmetic: knows no policies.

Each function takes (N, K) finite values, where large is bad, and returns (N,) values, where large is bad too. A new
combination is a function here and a line in `COMBINATIONS`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from ..scores.statistics import ranks

ROUNDING = 9  # decimals of residuals and weighted ranks: smaller differences are noise, and must not order rows


def mean_rank(values: np.ndarray) -> np.ndarray:
    """The mean of a row's ranks, from 1 to N (Borda count)."""
    return np.stack([ranks(column) for column in values.T], axis=1).mean(1)


def weighted_rank(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of a row's ranks: `sum_k w_k rank_k / sum_k w_k`, with (K,) weights, not all zero."""
    ranked = np.stack([ranks(column) for column in values.T], axis=1)
    return ((ranked * weights).sum(1) / weights.sum()).round(ROUNDING)


def topsis(values: np.ndarray) -> np.ndarray:
    """TOPSIS: 0 for the best values of all columns, 1 for the worst (Hwang and Yoon, 1981).

        v = x / ||x|| for each column, best = min v, worst = max v
        d / (d + d'), where d and d' are the distances of a row's v from the best and from the worst

    All columns weigh the same. The result is 0 for all rows if all rows are equal.
    """
    norms = np.linalg.norm(values, axis=0)
    scaled = values / np.where(norms > 0, norms, 1)
    from_best = np.linalg.norm(scaled - scaled.min(0), axis=1)
    from_worst = np.linalg.norm(scaled - scaled.max(0), axis=1)
    whole = from_best + from_worst
    return np.divide(from_best, whole, out=np.zeros(len(values)), where=whole > 0)


def pareto(values: np.ndarray) -> np.ndarray:
    """The number of a row's Pareto front, from 1 for the rows that no row dominates; within a front, by mean rank.

    A row dominates another if none of its values is larger and at least one is smaller (non-dominated sorting: Deb et
    al., NSGA-II, 2002).
    """
    points, index = np.unique(values, axis=0, return_inverse=True)  # sorted: a point comes after those dominating it
    front = (_fronts_of_two if points.shape[1] == 2 else _fronts)(points)
    return front[index.ravel()] + mean_rank(values) / (len(values) + 1)


def residual(values: np.ndarray) -> np.ndarray:
    """The ranks of the first column minus their least-squares fit to the ranks of the other columns."""
    ranked = np.stack([ranks(column) for column in values.T], axis=1)
    others = np.column_stack([np.ones(len(ranked)), ranked[:, 1:]])
    fit, *_ = np.linalg.lstsq(others, ranked[:, 0], rcond=None)
    return (ranked[:, 0] - others @ fit).round(ROUNDING)


def _fronts_of_two(points: np.ndarray) -> np.ndarray:
    """The fronts of (N, 2) different points, sorted: the last point of a front has its smallest second value."""
    front, last = np.empty(len(points)), list[float]()
    for i, second in enumerate(points[:, 1].tolist()):
        number = bisect_right(last, second)  # fronts with a point that dominates this one
        if number == len(last):
            last.append(second)
        else:
            last[number] = second
        front[i] = number + 1
    return front


def _fronts(points: np.ndarray) -> np.ndarray:
    """The fronts of (N, K) different points, sorted; N^2 comparisons, so for about 10,000 rows at most."""
    front, members = np.zeros(len(points)), list[list[int]]()
    for i, point in enumerate(points):
        dominated = ((points[some] <= point).all(1).any() for some in members)
        number = next((n for n, by_front in enumerate(dominated) if not by_front), len(members))
        if number == len(members):
            members.append([])
        members[number].append(i)
        front[i] = number + 1
    return front


COMBINATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ranks": mean_rank,
    "topsis": topsis,
    "pareto": pareto,
    "residual": residual,
}
