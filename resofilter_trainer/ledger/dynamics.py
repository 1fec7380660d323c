"""Criteria of learning dynamics: a number for each row from its losses in all epochs. Knows arrays and tables, no file.

x_1 ... x_k are the losses of a row at its k visits, one in each epoch that trained it, in nats; s_1 ... s_k are their
steps, e_1 ... e_k their epochs. A criterion of how a loss changes needs two visits, and is missing for a row with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from ..config import InputError
from ..scores.drift import without_drift
from ..scores.score_table import CLUSTER, ScoreTable
from .trajectories import Trajectories, clusters_of, filled, trajectories_of


@dataclass(frozen=True)
class Dynamic:
    """What a criterion is.

    Attributes:
        of: a function from the trajectories of N rows to a number for each, (N,), NaN for a missing one.
        formula: the formula, as text.
        source: where it comes from.
        drop: the end of its values to drop by default; None where they are names, which have no order.
        unit: the unit of its values.
        least: the number of visits that it needs; it is missing for a row with fewer.
    """

    of: Callable[[Trajectories], np.ndarray]
    formula: str
    source: str
    drop: Literal["largest", "smallest"] | None = "largest"
    unit: str = "nats"
    least: int = 1

    @property
    def metadata(self) -> dict[str, str]:
        """What a table of scores says of the column."""
        said = {"unit": self.unit, "formula": self.formula, "source": self.source}
        return said if self.drop is None else {"direction": self.drop, **said}


def visits(of: Trajectories) -> np.ndarray:
    """(N,) the number of epochs that trained each row."""
    counts: np.ndarray = np.isfinite(of.loss).sum(axis=1)
    return counts


def mean_loss(of: Trajectories) -> np.ndarray:
    """(N,) the mean of the losses."""
    return _mean(of.loss)


def loss_slope(of: Trajectories) -> np.ndarray:
    """(N,) the slope of the least-squares line through the losses by epoch."""
    known = np.isfinite(of.loss)
    epochs = np.where(known, np.arange(of.loss.shape[1], dtype=float), np.nan)
    apart = np.where(known, epochs - _mean(epochs)[:, None], 0.0)
    return _ratio((apart * np.where(known, of.loss, 0.0)).sum(axis=1), (apart**2).sum(axis=1))


def loss_std(of: Trajectories) -> np.ndarray:
    """(N,) the standard deviation of the losses."""
    return np.where(visits(of) > 1, np.sqrt(_mean((of.loss - mean_loss(of)[:, None]) ** 2)), np.nan)


def forgetting(of: Trajectories) -> np.ndarray:
    """(N,) how far a loss rises above the lowest one before it, at most; 0 for a row whose loss never rises."""
    rise = of.loss[:, 1:] - np.fmin.accumulate(of.loss, axis=1)[:, :-1]
    most = np.fmax.reduce(rise, axis=1, initial=0.0)
    return np.where(visits(of) > 1, most, np.nan)


def loss_area(of: Trajectories) -> np.ndarray:
    """(N,) the mean of the loss over the steps from the first visit to the last, linear between visits."""
    loss, step = filled(of.loss), filled(of.step)
    width = np.diff(step, axis=1)  # 0 where a row was not trained
    return _ratio((width * (loss[:, 1:] + loss[:, :-1]) / 2).sum(axis=1), width.sum(axis=1))


def loss_drop(of: Trajectories) -> np.ndarray:
    """(N,) the loss at the first visit minus that at the last, each as if its epoch had met all rows at one moment."""
    level = filled(np.stack([without_drift(*each) for each in zip(of.loss.T, of.step.T, strict=True)], axis=1))
    return np.where(visits(of) > 1, level[:, 0] - level[:, -1], np.nan)


CARTOGRAPHY = "Dataset Cartography, arXiv 2009.10795, for losses"
DYNAMICS = {
    "visits": Dynamic(visits, "k", "this package", "smallest", "epochs"),
    "mean_loss": Dynamic(mean_loss, "mean_i x_i", CARTOGRAPHY),
    "loss_slope": Dynamic(
        loss_slope,
        "sum_i (e_i - mean e) x_i / sum_i (e_i - mean e)^2",
        "this package",
        unit="nats per epoch",
        least=2,
    ),
    "loss_std": Dynamic(loss_std, "sqrt(mean_i (x_i - mean x)^2)", CARTOGRAPHY, "smallest", least=2),
    "forgetting": Dynamic(
        forgetting,
        "max(0, max_{i<j} x_j - x_i)",
        "example forgetting, arXiv 1812.05159, for losses: nats, not events",
        least=2,
    ),
    "loss_area": Dynamic(
        loss_area,
        "sum_i (s_{i+1} - s_i) (x_i + x_{i+1}) / 2 / (s_k - s_1)",
        "AUM, arXiv 2001.10528, for losses",
        least=2,
    ),
    "loss_drop": Dynamic(
        loss_drop,
        "y_1 - y_k, y_i = Q_all(F_moment(x_i)) of epoch i (scores/drift.py)",
        "this package",
        "smallest",
        least=2,
    ),
}
TRAJECTORY = Dynamic(visits, "the cluster of (x_1 ... x_k) by k-means", "S2L, arXiv 2403.07384", None, CLUSTER)
S2L = Dynamic(
    visits,
    "the place of the row in its cluster, in random order: keeping the smallest takes equally from all clusters",
    "S2L, arXiv 2403.07384",
    unit="place",
)
RANKED = {**DYNAMICS, "s2l": S2L}  # the columns that rows can be ranked by


def dynamics_of(tables: Iterable[pa.Table], scores: ScoreTable, clusters: int, seed: int) -> ScoreTable:
    """The scores with a column for each criterion, `trajectory` and `s2l`.

    Args:
        tables: the lines of the run, see `trajectories_of`.
        scores: the scores of the run.
        clusters: the number of clusters of trajectories.
        seed: the seed of the clusters, and of the order of rows within them.

    Raises:
        InputError: the ledger is of another run than the scores, or no row was trained.
    """
    ids = scores.table["sample_id"].to_numpy()
    found = trajectories_of(tables, scores.provenance.rows)
    found = Trajectories(found.loss[ids], found.step[ids])
    if not visits(found).any():
        raise InputError("The ledger has no row with a finite loss: there is nothing to tell of how rows are learnt.")
    columns = {name: (each, each.of(found)) for name, each in DYNAMICS.items()}
    cluster, place = balanced(found.loss, clusters, seed)
    columns |= {"trajectory": (TRAJECTORY, cluster), "s2l": (S2L, place)}
    table = scores.table.drop_columns([name for name in columns if name in scores.table.column_names])
    for name, (what, values) in columns.items():
        field = pa.field(name, pa.float64(), metadata=what.metadata)
        table = table.append_column(field, pa.array(values.astype(np.float64), from_pandas=True))
    return ScoreTable(table, scores.provenance)


def balanced(loss: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each trajectory, and its place in a random order of its cluster, from 0; ties broken at random.

    A row without a visit has neither; a missing visit has the loss of the one before.

    Args:
        loss: (N, E), see `Trajectories`.
        clusters: the number of clusters.
        seed: the seed.

    Returns:
        (N,) and (N,), NaN for a row that was never trained.
    """
    cluster, place = np.full(len(loss), np.nan), np.full(len(loss), np.nan)
    trained = np.flatnonzero(np.isfinite(loss).any(axis=1))
    own = clusters_of(filled(loss[trained]), clusters, seed)
    tie = np.random.default_rng(seed).random(len(trained))
    order = np.lexsort((tie, own))
    starts = np.searchsorted(own[order], own[order])
    cluster[trained] = own
    place[trained[order]] = np.arange(len(order)) - starts + tie[order]
    return cluster, place


def _mean(values: np.ndarray) -> np.ndarray:
    """(N,) the mean of the finite values of each row; NaN without one."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`; NaN where `below` is 0."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
