"""The loss of each row at each epoch, from lines read a piece at a time; clusters of rows. Knows arrays, no file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..config import InputError

READ = ("epoch", "sample_id", "loss", "num_tokens")  # columns, beside `step`
MOST_ROWS = 100_000  # that centres are found from
ROUNDS = 50  # of Lloyd's algorithm, at most
CHUNK = 1 << 16  # rows whose distances to all centres are in memory at once


@dataclass(frozen=True)
class Trajectories:
    """The visits of N rows in E epochs; NaN where a row was not trained.

    Attributes:
        loss: (N, E) the mean over the learnt tokens of all pieces and repeats of the row in the epoch, in nats.
        step: (N, E) the first step at which the epoch trained the row.
    """

    loss: np.ndarray
    step: np.ndarray


def trajectories_of(tables: Iterable[pa.Table], rows: int) -> Trajectories:
    """Collect the visits.

    Args:
        tables: the lines, with `step` and the columns in `READ`; those without a learnt token are no visits.
        rows: the number of rows of the dataset.

    Raises:
        InputError: a line is of a row that the dataset does not have.
    """
    sums: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    first: list[np.ndarray] = []
    for table in tables:
        of = {name: table[name].to_numpy() for name in ("step", *READ)}
        learnt = of["num_tokens"] > 0
        of = {name: values[learnt] for name, values in of.items()}
        ids = of["sample_id"]
        if len(ids) and not 0 <= ids.min() <= ids.max() < rows:
            other = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(
                f"The ledger has row {other}, and the scores are of {rows:,} rows: they are of different runs."
            )
        while len(of["epoch"]) and len(sums) <= of["epoch"].max():
            sums.append(np.zeros(rows))
            tokens.append(np.zeros(rows))
            first.append(np.full(rows, np.inf))
        for epoch in np.unique(of["epoch"]).tolist():
            mine = of["epoch"] == epoch
            count = of["num_tokens"][mine].astype(np.float64)
            np.add.at(sums[epoch], ids[mine], count * of["loss"][mine])
            np.add.at(tokens[epoch], ids[mine], count)
            np.minimum.at(first[epoch], ids[mine], of["step"][mine])
    if not sums:
        return Trajectories(np.empty((rows, 0)), np.empty((rows, 0)))
    number, step = np.stack(tokens, axis=1), np.stack(first, axis=1)
    loss = np.divide(np.stack(sums, axis=1), number, out=np.full(number.shape, np.nan), where=number > 0)
    step[number == 0] = np.nan
    return Trajectories(loss, step)


def filled(values: np.ndarray) -> np.ndarray:
    """(N, E) values with the last known one, or before the first that one, in the place of NaN; all NaN stays."""
    known = np.isfinite(values)
    place = np.where(known, np.arange(values.shape[1]), -1)
    before = np.maximum.accumulate(place, axis=1)
    at = np.where(before < 0, known.argmax(axis=1)[:, None], before)
    return np.take_along_axis(values, at, axis=1)


def clusters_of(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(N,) the cluster of each of (N, E) points, at most N; centres are found from at most 100,000 drawn ones."""
    draw = np.random.default_rng(seed)
    if len(points) <= MOST_ROWS:
        return _centres(points, count, draw)[1]
    some = points[draw.choice(len(points), MOST_ROWS, replace=False)]
    return _nearest(points, _centres(some, count, draw)[0])


def _centres(points: np.ndarray, count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(K, E) centres and the (N,) nearest of each point: Lloyd's k-means from k-means++ centres."""
    centres = _first_centres(points, min(count, len(np.unique(points, axis=0))), draw)
    cluster = _nearest(points, centres)
    for _ in range(ROUNDS):
        size = np.bincount(cluster, minlength=len(centres))
        sums = np.stack([np.bincount(cluster, column, minlength=len(centres)) for column in points.T], axis=1)
        centres = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], centres)
        before, cluster = cluster, _nearest(points, centres)
        if (cluster == before).all():
            break
    return centres, cluster


def _first_centres(points: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """(K, E) points, each drawn with a probability in proportion to its squared distance from those drawn before."""
    centres = points[draw.integers(len(points), size=1)]
    distance = ((points - centres[0]) ** 2).sum(axis=1)
    while len(centres) < count:
        new = points[draw.choice(len(points), p=distance / distance.sum())][None]
        centres = np.concatenate([centres, new])
        distance = np.minimum(distance, ((points - new[0]) ** 2).sum(axis=1))
    return centres


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N,) the nearest centre of each point."""
    points, centres = points - points.mean(axis=0), centres - points.mean(axis=0)  # for the precision of what follows
    cluster, size, twice = np.empty(len(points), np.int64), (centres**2).sum(axis=1), 2 * centres.T
    for start in range(0, len(points), CHUNK):
        apart = size - points[start : start + CHUNK] @ twice  # |point - centre|^2 - |point|^2
        cluster[start : start + CHUNK] = apart.argmin(axis=1)
    return cluster
