"""Several indicators as one number per row. Arithmetic: knows no rows, no policies.

Each takes (N, K) finite values in which large is bad, and gives (N,) in which large is bad.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from ..scores.statistics import ranks

ROUNDING = 9  # decimals of a rank: below lies numerical noise, which would order rows of which nothing is left


def mean_rank(values: np.ndarray) -> np.ndarray:
    """The mean of a row's ranks, from 1 to N (Borda's count)."""
    return np.stack([ranks(column) for column in values.T], axis=1).mean(1)


def topsis(values: np.ndarray) -> np.ndarray:
    """How far from the best and how near to the worst, from 0 to 1 (Hwang and Yoon, 1981).

        v = x / ||x|| of each indicator, best = min v, worst = max v
        d / (d + d'), d and d' the distances of a row's v from the best and from the worst

    Equal weights; 0 for all where nothing differs.
    """
    norms = np.linalg.norm(values, axis=0)
    scaled = values / np.where(norms > 0, norms, 1)
    from_best = np.linalg.norm(scaled - scaled.min(0), axis=1)
    from_worst = np.linalg.norm(scaled - scaled.max(0), axis=1)
    whole = from_best + from_worst
    return np.divide(from_best, whole, out=np.zeros(len(values)), where=whole > 0)


def pareto(values: np.ndarray) -> np.ndarray:
    """Which front a row is on, from 1 for those that no row is better than; within a front, by mean rank.

    A row is better than another if nothing of it is larger and something is smaller (non-dominated sorting: Deb et al.,
    NSGA-II, 2002).
    """
    points, place = np.unique(values, axis=0, return_inverse=True)  # what is better comes before
    front = (_fronts_of_two if points.shape[1] == 2 else _fronts)(points)
    return front[place.ravel()] + mean_rank(values) / (len(values) + 1)


def residual(values: np.ndarray) -> np.ndarray:
    """What the first indicator says beyond the others: its ranks less their least-squares fit to the others' ranks."""
    ranked = np.stack([ranks(column) for column in values.T], axis=1)
    others = np.column_stack([np.ones(len(ranked)), ranked[:, 1:]])
    fit, *_ = np.linalg.lstsq(others, ranked[:, 0], rcond=None)
    return (ranked[:, 0] - others @ fit).round(ROUNDING)


def _fronts_of_two(points: np.ndarray) -> np.ndarray:
    """The fronts of (N, 2) different points in order: each front's last point has its smallest second value."""
    front, last = np.empty(len(points)), list[float]()
    for i, second in enumerate(points[:, 1].tolist()):
        number = bisect_right(last, second)  # fronts that hold a better point
        if number == len(last):
            last.append(second)
        else:
            last[number] = second
        front[i] = number + 1
    return front


def _fronts(points: np.ndarray) -> np.ndarray:
    """The fronts of (N, K) different points in order; N^2 comparisons, so for some 10,000 rows at most."""
    front, members = np.zeros(len(points)), list[list[int]]()
    for i, point in enumerate(points):
        better_in = ((points[some] <= point).all(1).any() for some in members)
        number = next((n for n, better in enumerate(better_in) if not better), len(members))
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
