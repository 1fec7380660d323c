"""Kept rows that a training must weight: with a column of their weights, and a reminder. Knows datasets, no Trainer."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from ..config import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

WEIGHT = "resofilter_weight"  # the column of the weights
TOKEN_WEIGHTS = "token_weights"  # the column of the weights of tokens, a list for each row
NEEDS_WEIGHTS = (
    "The selection weights the rows that it keeps: a training on them without their weights is biased. Pass "
    "callbacks=[SampleWeights.of(selection)] to the trainer."
)
OF_A_STREAM = f"{NEEDS_WEIGHTS} Of a stream, no trainer can take them."
DERIVING = (  # methods of a Dataset that return rows of it, and do not call another of these for it
    *("map", "filter", "select", "sort", "with_format", "with_transform", "repeat", "flatten", "add_item"),
    *("select_columns", "remove_columns", "rename_column", "rename_columns", "add_column", "cast", "cast_column"),
)


@dataclass
class Reminder:
    """Whether a loader that reads weighted rows, or rows made of them, still warns that they have weights."""

    due: bool = True


def with_columns(rows: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """The rows with further columns, in the same format. Raises InputError for a name that is taken."""
    if taken := sorted(columns.keys() & set(rows.column_names)):
        raise InputError(f"The dataset has a column '{taken[0]}' already: remove or rename it.")
    shown = rows.format
    if set(shown["columns"]) == set(rows.column_names):
        shown["columns"] = None  # all, and the further ones too
    plain = rows.with_format(None)  # else the values of a transform would be stored
    for name, values in columns.items():
        plain = plain.add_column(name, values)
    plain.set_format(**shown)
    return plain


def keep_weighted(rows: Dataset, kept: np.ndarray, weight: np.ndarray, reminder: Reminder) -> Dataset:
    """Some rows with a column of their weights, times those of an earlier selection. A loader that reads them warns.

    Args:
        rows: the rows to choose from.
        kept: (K,) the positions of the rows to keep.
        weight: (N,) the weight of every row.
        reminder: of the weights.
    """
    earlier = column_of_weights(rows)
    if earlier is not None:
        weight, rows = weight * earlier, rows.remove_columns(WEIGHT)
    base, stored = copy.copy(rows), np.arange(len(rows))
    if rows._indices is not None:
        base._indices, stored = None, rows._indices.column(0).to_numpy().astype(np.int64)
    column = np.full(len(base), np.nan)
    column[stored[kept]] = weight[kept]
    if np.array_equal(column[stored[kept]], weight[kept]):  # no row is copied
        return weighted(with_columns(base, {WEIGHT: column}).select(stored[kept]), reminder)
    return weighted(with_columns(rows.select(kept), {WEIGHT: weight[kept]}), reminder)  # repeated, with other weights


def column_of_weights(rows: Any) -> np.ndarray | None:
    """(N,) the weights in the column of the rows; None without such a column.

    Raises:
        InputError: a weight is missing, no number, negative or not finite.
    """
    if WEIGHT not in (getattr(rows, "column_names", None) or []):
        return None
    column = rows.with_format("arrow").select_columns(WEIGHT)[:].column(0)
    try:
        weight: np.ndarray = column.cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise InputError(f"The column '{WEIGHT}' holds {column.type}, not the weights of rows. Rename it.") from error
    wrong = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(wrong):
        raise InputError(
            f"{len(wrong)} rows, the first of them row {wrong[0]}, have no weight of at least 0 in their column "
            f"'{WEIGHT}'. Give 1 to rows that come from elsewhere, in a column of that name."
        )
    return weight


def reminder_of(rows: Any) -> Reminder | None:
    """The reminder of weighted rows, or of rows made of them; None for others."""
    found = getattr(rows, "reminder", None)
    return found if isinstance(found, Reminder) else None


def weighted(rows: Dataset, reminder: Reminder) -> Dataset:
    """The same rows, which warn once when a DataLoader reads a batch of them, or of rows made of them."""
    if not hasattr(rows, "reminder"):
        rows.__class__ = _reminding(cast(Any, type(rows)))
    rows.reminder = reminder
    return rows


def _remind(reminder: Reminder, text: str) -> None:
    if reminder.due:
        reminder.due = False
        warnings.warn(text, stacklevel=3)


@functools.cache
def _reminding(dataset: Any) -> type:
    """A class of datasets that remind of the weights; made here, as `datasets` is imported by its user only."""

    def read(self: Any, keys: list[int]) -> Any:
        _remind(self.reminder, NEEDS_WEIGHTS)
        return dataset.__getitems__(self, keys)

    def stream(self: Any, *args: Any, **kwargs: Any) -> IterableDataset:
        _remind(self.reminder, OF_A_STREAM)
        return cast("IterableDataset", dataset.to_iterable_dataset(self, *args, **kwargs))

    def pickled(self: Any, protocol: Any) -> Any:
        plain = dataset.__new__(dataset)
        plain.__dict__ = {name: value for name, value in self.__dict__.items() if name != "reminder"}
        return weighted, (plain, self.reminder)

    methods = {name: _deriving(getattr(dataset, name)) for name in DERIVING}
    own = {"__getitems__": read, "__reduce_ex__": pickled, "to_iterable_dataset": stream}
    return type("WeightedRows", (dataset,), {**methods, **own})


def _deriving(method: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """A method whose result reminds, too."""

    @functools.wraps(method)
    def derived(self: Any, *args: Any, **kwargs: Any) -> Dataset:
        return weighted(method(self, *args, **kwargs), self.reminder)

    return derived
