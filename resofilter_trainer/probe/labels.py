"""The user's own labels of wrong rows. Knows a column of a dataset, not what it is used for."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from ..config import InputError, nearest

WRONG = {"true": True, "1": True, "1.0": True, "wrong": True, "incorrect": True}
RIGHT = {"false": False, "0": False, "0.0": False, "right": False, "correct": False}


def labels_of(dataset: Dataset, name: str) -> np.ndarray:
    """(N,) bool, whether each row is wrong: true or false, 1 or 0, `wrong` or `right`, `incorrect` or `correct`.

    Raises:
        InputError: there is no such column, or a row has another value.
    """
    if name not in dataset.column_names:
        close = nearest(name, dataset.column_names)
        hint = f"Did you mean '{close}'?" if close else f"It has: {', '.join(dataset.column_names)}."
        raise InputError(f"The dataset has no column '{name}', named as wrong_column. {hint}")
    values = dataset.with_format(None)[name][:]
    flags = [_flag(value) for value in values]
    odd = next((row for row, flag in enumerate(flags) if flag is None), None)
    if odd is not None:
        raise InputError(
            f"Row {odd}: wrong_column '{name}' has {values[odd]!r}. Each row needs true or false, 1 or 0, 'wrong' or "
            "'right'."
        )
    return np.array(flags, dtype=bool)


def _flag(value: Any) -> bool | None:
    """A value as a label; None for one that is none."""
    if isinstance(value, str):
        return {**WRONG, **RIGHT}.get(value.strip().lower())
    return bool(value) if value in (True, False) else None
