"""The files with all dropped rows: their scores, their reasons, their text. Knows tables and text, no page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ..io.files import replacing
from ..scores.score_table import PROMPT, ScoreTable
from ..selecting.results import DROPPED_FILE
from ..selecting.selection import Selection
from .samples import Text

CSV_FILE = "dropped.csv"
FORMULA = tuple("=+-@\t\r")  # a spreadsheet computes text that begins with one of these
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")  # a spreadsheet shows it as what it is
AT_ONCE = 5_000  # rows whose text is in memory at a time


def save_dropped(
    scores: ScoreTable,
    selection: Selection,
    folder: Path,
    texts: Sequence[Text] | None = None,
    ids: Sequence[str] | None = None,
) -> None:
    """Write every dropped row with its id, its scores, its reason and its text, as CSV and as Parquet.

    Args:
        scores: the scores of N rows.
        selection: the decision about each.
        folder: the folder to write to.
        texts: (N,) prompt and completion of each row, or None.
        ids: (N,) the user's own id of each row, or None.
    """
    table = _table(scores, selection, texts, ids)
    rows = np.flatnonzero(~selection.keep)
    schema = table(rows[:0]).schema
    with (
        replacing(folder / DROPPED_FILE) as parquet,
        replacing(folder / CSV_FILE) as plain,
        pyarrow.parquet.ParquetWriter(parquet, schema) as to_parquet,
        pyarrow.csv.CSVWriter(plain, schema) as to_csv,
    ):
        for start in range(0, len(rows), AT_ONCE):
            part = table(rows[start : start + AT_ONCE])
            to_parquet.write_table(part)
            to_csv.write_table(_without_formulas(part))


def _table(
    scores: ScoreTable, selection: Selection, texts: Sequence[Text] | None, ids: Sequence[str] | None
) -> Callable[[np.ndarray], pa.Table]:
    """A function from rows to the lines of the file."""
    replaced = {"reason"} if texts is None else {"reason", PROMPT}  # the text takes the place of its hash
    numbers = scores.table.select([name for name in scores.table.column_names if name not in replaced])

    def lines(rows: np.ndarray) -> pa.Table:
        found = numbers.take(rows)
        if ids is not None:
            found = found.add_column(1, "id", _strings([ids[row] for row in rows]))
        found = found.append_column("reason", _strings([selection.reason[row] for row in rows]))
        if texts is not None:
            pairs = [texts[row] for row in rows.tolist()]
            for place, name in enumerate(("prompt", "completion")):
                found = found.append_column(name, _strings([pair[place] for pair in pairs]))
        return found

    return lines


def _strings(values: Sequence[Any]) -> pa.Array:
    """Text as a column; a lone surrogate, which no file can hold, becomes a question mark."""
    return pa.array([str(value).encode("utf-8", "replace").decode() for value in values], pa.string())


def _without_formulas(table: pa.Table) -> pa.Table:
    """The table with an apostrophe before each text that a spreadsheet would compute; plain numbers stay."""
    for place, name in enumerate(table.column_names):
        if pa.types.is_string(table.schema.field(name).type):
            quoted = [f"'{text}" if _is_formula(text) else text for text in table[name].to_pylist()]
            table = table.set_column(place, name, pa.array(quoted, pa.string()))
    return table


def _is_formula(text: str | None) -> bool:
    return text is not None and text.startswith(FORMULA) and NUMBER.fullmatch(text) is None
