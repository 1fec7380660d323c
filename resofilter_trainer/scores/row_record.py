"""What a record of rows has in common with a `datasets.Dataset`: columns, rows, iteration. Knows arrays, no scores."""

from __future__ import annotations

import html
import numbers
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..config import InputError

SHOWN = 5  # rows in a notebook


class RowRecord:
    """A record with a value for each row in each of its columns.

    `record["score"]` is a column: an array of numbers, or a list of texts. `record[0]` is a row as a dictionary, and
    iteration gives each. `record[:5]`, `record[[0, 7]]` and `record[record["score"] > 1e-4]` are the columns of several
    rows. `"score" in record` says whether there is such a column. Two records are equal if all their values are.
    """

    def _columns(self) -> Mapping[str, Any]:
        """The columns: arrays, Arrow's columns, lists or a range, all of one length."""
        raise NotImplementedError

    def _made_from(self) -> object:
        """What is compared beside the columns."""
        raise NotImplementedError

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self._columns())

    def __getitem__(self, key: Any) -> Any:
        columns = self._columns()
        if isinstance(key, str):
            if key not in columns:
                raise InputError(f"There is no column '{key}'. There are: {', '.join(columns)}.")
            return values_of(columns[key])
        length = len(next(iter(columns.values())))
        if isinstance(key, numbers.Integral) and not isinstance(key, bool):
            row = _position(int(key), length)
            return {name: _plain(column[row]) for name, column in columns.items()}
        rows = _positions(key, length)
        return {name: values_of(_taken(column, rows)) for name, column in columns.items()}

    def __contains__(self, key: object) -> bool:
        return key in self._columns() if isinstance(key, str) else any(row == key for row in self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = self._columns()
        for row in zip(*columns.values(), strict=True):
            yield {name: _plain(value) for name, value in zip(columns, row, strict=True)}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowRecord) or type(self) is not type(other):
            return NotImplemented
        mine, others = self._columns(), other._columns()
        same = list(mine) == list(others) and self._made_from() == other._made_from()
        return same and all(same_values(mine[name], others[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        """The first rows as a table, for a notebook."""
        columns = self._columns()
        length = len(next(iter(columns.values())))
        first = np.arange(min(SHOWN, length))
        frame = pd.DataFrame({name: values_of(_taken(column, first)) for name, column in columns.items()})
        return as_html(repr(self), frame, "" if length <= SHOWN else f"The first {SHOWN} of {length:,} rows.")


def as_html(title: str, frame: pd.DataFrame, note: str = "") -> str:
    """A table under its title, as HTML in which no value is markup."""
    table = frame.to_html(index=False, border=0, na_rep="")
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<div><p><b>{html.escape(title)}</b></p>{table}{below}</div>"


def values_of(column: Any) -> Any:
    """A column's values: an array of numbers, with NaN for a missing one, or a list."""
    if isinstance(column, range):
        return np.arange(column.start, column.stop, column.step)
    if not isinstance(column, pa.ChunkedArray):
        return column
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return column.to_numpy() if number else column.to_pylist()


def same_values(one: Any, other: Any) -> bool:
    """Whether two columns have the same values; NaN is the same as NaN."""
    if isinstance(one, pa.ChunkedArray) and isinstance(other, pa.ChunkedArray):
        if one.type != other.type or not one.is_null().equals(other.is_null()):
            return False
        if not pa.types.is_floating(one.type):
            return bool(one.equals(other))
    one, other = (each if each is None or isinstance(each, list) else values_of(each) for each in (one, other))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        floating = np.issubdtype(one.dtype, np.floating) and np.issubdtype(other.dtype, np.floating)
        return np.array_equal(one, other, equal_nan=floating)
    return one is other or (one is not None and other is not None and list(one) == list(other))


def _position(row: int, length: int) -> int:
    if not -length <= row < length:
        raise InputError(f"There is no row {row}: there are {length} rows, counted from 0.")
    return row % length


def _positions(key: Any, length: int) -> np.ndarray:
    if isinstance(key, slice):
        return np.arange(length)[key]
    try:
        rows = np.asarray(key)
    except ValueError:  # lists of several lengths
        rows = np.empty((0, 0))
    if rows.ndim == 1 and rows.dtype == bool:
        if len(rows) != length:
            raise InputError(f"There are {length} rows and the mask has {len(rows)} values: every row needs one.")
        return np.flatnonzero(rows)
    if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        shown = reprlib.repr(key)
        raise InputError(f"Pass a column's name, a row's number, a slice, a list of numbers or a mask, got {shown}.")
    return np.array([_position(row, length) for row in rows.tolist()], dtype=np.int64)


def _taken(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, np.ndarray | pa.ChunkedArray):
        return column[rows] if isinstance(column, np.ndarray) else column.take(pa.array(rows, pa.int64()))
    taken = [column[row] for row in rows.tolist()]
    return np.array(taken, dtype=np.int64) if isinstance(column, range) else taken


def _plain(value: Any) -> Any:
    """A value of an array as Python's own."""
    if isinstance(value, pa.Scalar):
        return value.as_py()
    return value.item() if isinstance(value, np.generic) else value
