"""AUROC of rows that depend on each other, with its interval. Knows NumPy, not where the numbers come from.

A copy depends on the row that it was made of. So rows of one cluster, the row and its copies, vary together:

    A   = sum_p won_p / pairs         over the pairs p of a positive and a negative row in the same stratum
    e_c = (won_c - A pairs_c) / pairs      won_c, pairs_c: those with a row of cluster c, each pair once
    Var = C / (C - 1) sum_c e_c^2

This is the variance of Obuchowski (Biometrics 53, 1997) for clustered data, summed over strata.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..scores.statistics import NORMAL975, ranks
from ..selecting.combining import residual


@dataclass(frozen=True)
class Auroc:
    """An AUROC and how far it is known. NaN without a pair.

    Attributes:
        value: the probability that a positive row has a larger value than a negative one of its stratum.
        influence: (C,) how far each cluster moves it.
        clusters: the number of clusters with a pair.
        least: the part of the variance that stays where every pair is won.
        positives, negatives: the number of rows with a partner.
        pairs: the number of pairs.
    """

    value: float
    influence: np.ndarray
    clusters: int
    least: float
    positives: int
    negatives: int
    pairs: int

    @property
    def error(self) -> float:
        """The standard error; NaN for fewer than two clusters with a pair."""
        if self.clusters < 2:
            return math.nan
        return math.sqrt(self.clusters / (self.clusters - 1) * float((self.influence**2).sum()) + self.least)

    @property
    def low(self) -> float:
        """The lower bound of the 95 % interval, at least 0."""
        return float(np.maximum(self.value - NORMAL975 * self.error, 0))

    @property
    def high(self) -> float:
        """The upper bound of the 95 % interval, at most 1."""
        return float(np.minimum(self.value + NORMAL975 * self.error, 1))


NOTHING = Auroc(math.nan, np.zeros(0), 0, 0.0, 0, 0, 0)


def clustered_auroc(
    values: np.ndarray, positive: np.ndarray, clusters: np.ndarray, strata: np.ndarray | None = None, count: int = 0
) -> Auroc:
    """The AUROC of rows in clusters, over the pairs within strata. Ties count half.

    Args:
        values: (N,) the detector's values; infinite ones are the largest or smallest.
        positive: (N,) bool, the rows to detect.
        clusters: (N,) the number of each row's cluster, from 0.
        strata: (N,) the number of each row's stratum, from 0; by default all rows are in one.
        count: C, the number of clusters, where some have no row here.

    The variance has a last term, 1 / (2M)^2 + 1 / (2N)^2 for M positive and N negative rows: what one more row of each
    kind at chance would change. So a perfect AUROC of few rows has an interval.
    """
    strata = np.zeros(len(values), int) if strata is None else strata
    count = max(count, int(clusters.max(initial=-1)) + 1)
    won, pairs = _partners(values, positive, strata)
    total = int(pairs[positive].sum())
    if total == 0:
        return NOTHING
    both = strata * count + clusters
    won_within, pairs_within = _partners(values, positive, np.unique(both, return_inverse=True)[1])
    twice = positive.astype(float)  # a pair within a cluster counts for both of its rows: once too often
    value = float(won[positive].sum()) / total
    of_row = won - twice * won_within - value * (pairs - twice * pairs_within)
    influence = np.bincount(clusters, of_row, minlength=count) / total
    positives, negatives = int((pairs[positive] > 0).sum()), int((pairs[~positive] > 0).sum())
    least = 1 / (2 * positives) ** 2 + 1 / (2 * negatives) ** 2
    return Auroc(value, influence, len(np.unique(clusters[pairs > 0])), least, positives, negatives, total)


def mean_of(parts: Sequence[Auroc]) -> Auroc:
    """The mean of several AUROCs of the same clusters, each with the same weight; those without a pair do not count."""
    parts = [each for each in parts if each.pairs]
    if not parts:
        return NOTHING
    return Auroc(
        value=float(np.mean([each.value for each in parts])),
        influence=np.mean([each.influence for each in parts], axis=0),
        clusters=max(each.clusters for each in parts),
        least=sum(each.least for each in parts) / len(parts) ** 2,
        positives=sum(each.positives for each in parts),
        negatives=max(each.negatives for each in parts),
        pairs=sum(each.pairs for each in parts),
    )


def length_out(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(N,) the ranks of the values minus their least-squares fit to the ranks of the lengths."""
    return residual(np.stack([values, lengths], axis=1))


def rank_correlations(columns: Sequence[np.ndarray]) -> np.ndarray:
    """(K, K) Spearman's rank correlation of each two columns over the rows where both are numbers.

    It is 0 where all values of one of them are equal, and NaN for fewer than three rows.
    """
    found = np.eye(len(columns))
    for i, a in enumerate(columns):
        for j, b in enumerate(columns[:i]):
            known = ~(np.isnan(a) | np.isnan(b))
            found[i, j] = found[j, i] = _correlation(ranks(a[known]), ranks(b[known]))
    return found


def alike(correlations: np.ndarray, names: Sequence[str], above: float) -> list[list[str]]:
    """The groups of columns that are linked by rank correlations above a bound, in either direction; no single ones."""
    group = list(range(len(names)))
    for i, j in np.argwhere(np.abs(np.nan_to_num(correlations)) > above).tolist():
        group = [group[i] if each == group[j] else each for each in group]
    members = [[name for name, own in zip(names, group, strict=True) if own == each] for each in dict.fromkeys(group)]
    return [each for each in members if len(each) > 1]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3:
        return math.nan
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(a, b)[0, 1])


def _partners(values: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, (N,): the pairs with rows of the other kind in its group that the positive row wins, and all."""
    frame = pd.Series(values, dtype=float)
    size = np.bincount(groups, minlength=1)
    positives = np.bincount(groups, positive, minlength=len(size))
    others = np.where(positive, (size - positives)[groups], positives[groups])
    within = frame.groupby(groups).rank().to_numpy()
    own_kind = frame.groupby([groups, positive]).rank().to_numpy()
    below = within - own_kind  # rows of the other kind with a smaller value, ties half
    return np.where(positive, below, others - below), others
