"""A line for each step, from the lines of its rows, read a piece at a time. Knows arrays, no file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

READ = ("epoch", "loss", "num_tokens", "weight", "learning_rate", "grad_norm", "left_out")  # columns, beside `step`


def step_lines(tables: Iterable[pa.Table], first: int, last: int) -> pd.DataFrame:
    """The loss and the rest of each step from `first` to `last`.

    Args:
        tables: the lines of all processes, each table by ascending step, with `step` and the columns in `READ`.
        first, last: the steps.

    Returns:
        See `Ledger.steps`.
    """
    import pandas as pd

    count = max(last - first + 1, 0)
    loss, grad_norm, rate = np.zeros(count), np.full(count, np.nan), np.full(count, np.nan)
    lines, tokens = np.zeros(count, np.int64), np.zeros(count, np.int64)
    epoch, left_out = np.full(count, -1, np.int64), np.full(count, -1, np.int8)  # -1 where not known
    for table in tables:
        if not table.num_rows:
            continue
        of = {name: table[name].to_numpy() for name in table.column_names if name != "left_out"}
        starts = np.flatnonzero(np.diff(of["step"], prepend=of["step"][0] - 1))
        at = of["step"][starts] - first
        loss[at] += np.add.reduceat(contributions(of["weight"], of["loss"]), starts)
        lines[at] += np.diff(starts, append=table.num_rows)
        tokens[at] += np.add.reduceat(of["num_tokens"], starts, dtype=np.int64)
        grad_norm[at] = np.fmax(grad_norm[at], np.fmax.reduceat(of["grad_norm"], starts))
        rate[at] = of["learning_rate"][starts]
        epoch[at] = np.maximum(epoch[at], of["epoch"][starts])
        left_out[at] = np.maximum(left_out[at], table["left_out"].cast(pa.int8()).fill_null(-1).to_numpy()[starts])
    loss[lines == 0] = np.nan
    return pd.DataFrame(
        {
            "step": first + np.arange(count),
            "epoch": epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "lines": lines,
            "tokens": tokens,
            "left_out": pd.arrays.BooleanArray(left_out == 1, left_out < 0),
        }
    )


def contributions(weight: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """`weight * loss` of each line, as float64; 0 for a row without a learnt token, whose loss is NaN."""
    return np.where(weight != 0, weight.astype(np.float64) * loss, 0.0)
