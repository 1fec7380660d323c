"""What is measured of each row while training, epoch by epoch. Knows arrays and files, no model, no Trainer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..config import InputError
from ..io.files import load_parquet, save_parquet
from ..scores.drift import on_scale_of, without_drift
from ..scores.provenance import Provenance
from ..scores.score_table import LAYER, ScoreTable

FILE = "measurements.parquet"
KEY = "resofilter_measurements"


@dataclass(frozen=True)
class Measured:
    """What one process measured of some rows in one step: (N,) each, and (N, L) for the layers."""

    epoch: int
    step: int
    rows: np.ndarray
    loss: np.ndarray
    num_tokens: np.ndarray
    length: np.ndarray
    layers: np.ndarray

    def where(self, which: np.ndarray) -> Measured:
        """The same for some of the rows, `which` (N,) bool."""
        names = ("rows", "loss", "num_tokens", "length", "layers")
        return dataclasses.replace(self, **{name: getattr(self, name)[which] for name in names})


@dataclass(frozen=True)
class Trained:
    """What the rows of one micro-batch were in the loss of their step: (N,) each, and (N, L) for the layers.

    Attributes:
        rows: the rows, without fillers.
        loss: the mean over each row's learnt tokens, as the trainer trains on it; NaN where it is not known.
        num_tokens: the number of learnt tokens.
        weight: the factor of `loss` in the loss that the trainer logs for the step.
        layers: the measurement; NaN where there is none.
    """

    rows: np.ndarray
    loss: np.ndarray
    num_tokens: np.ndarray
    weight: np.ndarray
    layers: np.ndarray


class Measurements:
    """The last measurement of every row that is trained on.

    Args:
        rows: the number of rows.
        layers: the indices of the measured layers.

    Attributes:
        score: (N,) what rows are ranked by: the measured score without drift, on the scale of the first epoch; NaN
            until the row's first epoch has ended.
        measured: (N,) the mean over the layers, as it was measured.
        epoch, step: (N,) when it was measured; -1 for a row that was never measured.
        idle: (N,) bool, the rows that were trained on without a learnt token, and so were never measured.
        loss, num_tokens, length, layers: (N,) each, and (N, L).
    """

    def __init__(self, rows: int, layers: Sequence[int]) -> None:
        self.layer_indices = list(layers)
        self.score = np.full(rows, np.nan)
        self.loss = np.full(rows, np.nan)
        self.layers = np.full((rows, len(layers)), np.nan)
        self.num_tokens = np.zeros(rows, dtype=np.int64)
        self.length = np.zeros(rows, dtype=np.int64)
        self.epoch = np.full(rows, -1)
        self.step = np.full(rows, -1)
        self.idle = np.zeros(rows, dtype=bool)

    @property
    def measured(self) -> np.ndarray:
        """The mean over the layers."""
        return self.layers.mean(axis=1)

    @property
    def ever(self) -> np.ndarray:
        """Which rows were measured at all."""
        return self.epoch >= 0

    def grow(self, rows: int) -> None:
        """Make room for so many rows; the further ones were never measured."""
        more, before = Measurements(rows, self.layer_indices), len(self.score)
        for name in ("score", "loss", "layers", "num_tokens", "length", "epoch", "step", "idle"):
            values = getattr(more, name)
            values[:before] = getattr(self, name)
            setattr(self, name, values)

    def add(self, found: Measured) -> None:
        """Add the measurements of one step. Of a row that comes more than once in an epoch, the first counts.

        A row without a learnt token has no measurement.
        """
        empty = found.rows[(found.num_tokens == 0) & (found.rows >= 0)]
        self.idle[empty] = ~self.ever[empty]
        found = found.where(found.num_tokens > 0)
        _, first = np.unique(found.rows, return_index=True)
        first = first[(found.rows[first] >= 0) & (self.epoch[found.rows[first]] != found.epoch)]
        rows = found.rows[first]
        self.epoch[rows], self.step[rows], self.idle[rows] = found.epoch, found.step, False
        for name in ("loss", "num_tokens", "length", "layers"):
            getattr(self, name)[rows] = getattr(found, name)[first]

    def end_epoch(self, epoch: int, correct_drift: bool) -> None:
        """Make the scores from what was measured in an epoch, with or without its drift."""
        now = self.epoch == epoch
        values = self.measured[now]
        if correct_drift:
            values = on_scale_of(without_drift(values, self.step[now]), self.score[now])
        self.score[now] = values

    def joined(self, group: np.ndarray, count: int) -> Measurements:
        """The measurements of groups: means over their learnt tokens, and sums of the numbers of tokens.

        Args:
            group: (N,) the group of each row, from 0 to `count` - 1.
            count: the number of groups.
        """
        found = Measurements(count, self.layer_indices)
        found.num_tokens = np.bincount(group, self.num_tokens, count).astype(np.int64)
        found.length = np.bincount(group, self.length, count).astype(np.int64)
        learnt = self.num_tokens > 0
        group_of, share = group[learnt], self.num_tokens[learnt] / found.num_tokens[group[learnt]]
        for name in ("score", "loss", "layers"):
            own, whole = getattr(self, name)[learnt], getattr(found, name)
            whole[found.num_tokens > 0] = 0
            np.add.at(whole, group_of, (own.T * share).T)
        for name in ("epoch", "step"):
            np.maximum.at(getattr(found, name), group, getattr(self, name))
        found.idle = np.bincount(group, ~self.idle, count) == 0
        return found

    def to_scores(self, sample_ids: np.ndarray, reasons: Sequence[str | None], provenance: Provenance) -> ScoreTable:
        """The scores as a table with a line for every row of the user's dataset.

        Args:
            sample_ids: (N,) the position of each row in the user's dataset.
            reasons: why each row of the user's dataset has no score; None where it has one.
            provenance: what the scores were measured from.
        """
        missing = np.array([reason is not None for reason in reasons])

        def column(values: np.ndarray) -> pa.Array:
            spread = np.zeros(len(reasons), dtype=values.dtype)
            spread[sample_ids] = values
            return pa.array(spread, mask=missing)

        columns = {
            "sample_id": np.arange(len(reasons)),
            "score": column(self.score),
            **{name: column(getattr(self, name)) for name in ("loss", "num_tokens", "length")},
            **{f"{LAYER}{layer}": column(self.layers[:, i]) for i, layer in enumerate(self.layer_indices)},
            "measured": column(self.measured),
            "epoch": column(self.epoch),
            "step": column(self.step),
            "reason": pa.array(reasons, pa.string()),
        }
        return ScoreTable(pa.table(columns), provenance)

    def save(self, folder: Path, extra: Mapping[str, np.ndarray]) -> None:
        """Write to a folder, with `extra` columns of a value for each row; whole or not at all."""
        names = ("score", "loss", "num_tokens", "length", "epoch", "step", "idle")
        columns = {name: getattr(self, name) for name in names}
        columns |= {f"{LAYER}{layer}": self.layers[:, i] for i, layer in enumerate(self.layer_indices)}
        save_parquet(pa.table({**columns, **extra}), folder / FILE, {KEY: json.dumps(self.layer_indices)})

    @classmethod
    def load(cls, folder: Path) -> tuple[Measurements, dict[str, np.ndarray]]:
        """Undo `save`: the measurements and the extra columns. Raises InputError for a missing or damaged file."""
        table, metadata = load_parquet(folder / FILE, KEY, "measurements of a training run")
        try:
            columns = {name: table[name].to_numpy().copy() for name in table.column_names}
            measurements = cls(table.num_rows, json.loads(metadata))
            for i, layer in enumerate(measurements.layer_indices):
                measurements.layers[:, i] = columns.pop(f"{LAYER}{layer}")
            for name in ("score", "loss", "num_tokens", "length", "epoch", "step"):
                setattr(measurements, name, columns.pop(name))
            measurements.idle = columns.pop("idle", measurements.idle)  # version 0.1.0 has none
            return measurements, columns
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise InputError(
                f"'{folder / FILE}' was written by another version. Start from an earlier checkpoint."
            ) from error
