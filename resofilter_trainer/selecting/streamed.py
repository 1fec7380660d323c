"""A selection from a file of scores to a file, for tables that fit no memory. Knows files and one column at a time.

    count and gather the ranked values, see `order_statistics`  ->  cuts  ->  read again, write keep and reason

Keeps and drops the same rows as `DataSelector.select`, for the same reasons, in a million rows at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import InputError, check_kind, with_known_keywords
from ..io.files import file_at
from ..io.pieces import TableFile, ahead, writing_pieces
from ..scores.joined_file import open_scores
from ..scores.provenance import Provenance
from ..scores.score_table import ScoreTable
from .cuts import Cut, bound_of_rule, cuts_of_band, cuts_of_share
from .data_selector import DataSelector
from .selection import KEPT, KEY, SELECTION_FILE, Selection, check_all_rows, settings_of

SCHEMA = pa.schema([("sample_id", pa.int64()), ("keep", pa.bool_()), ("reason", pa.string())])


@with_known_keywords
def select_file(
    scores: str | os.PathLike[str], output: str | os.PathLike[str], selector: DataSelector | None = None
) -> Path:
    """Select from a file of scores that fits no memory, and write the selection as it is made.

    The file has the rows and reasons that `DataSelector.select` gives, to the bit. It is read three or four times; the
    thresholds `"otsu"` and `"knee"` take the ranked column into memory, 8 bytes for each row and as many again.

    Args:
        scores: the folder or file of the scores, such as `join_scores` writes it.
        output: a folder for `selection.parquet`, or a Parquet file.
        selector: the share or threshold to keep, by one column; by default half of the rows.

    Returns:
        The file of the selection (`Selection.load`).

    Raises:
        InputError: the selector ranks by several columns or within groups or strata, scores are missing, damaged or not
            in the order of the rows, or the column is not known.
    """
    selector = DataSelector() if selector is None else selector
    check_kind("selector", selector, DataSelector, "a DataSelector")
    check_streams(selector)
    file, provenance = open_scores(scores)
    check_all_rows(file.rows, provenance)
    empty = ScoreTable(file.schema.empty_table(), provenance)
    empty.column(selector.column)  # refuses a name that is not there, with those that are
    if selector.drop is None and selector.band is None:
        selector = dataclasses.replace(selector, drop=selector.end(empty))
    target = file_at(output, SELECTION_FILE)
    if target.resolve() == file.path.resolve():
        raise InputError(f"'{target}' is the file of the scores. Choose another output.")
    choosing = _Choosing(file, provenance, selector)
    cuts = choosing.cuts()
    with writing_pieces(target, SCHEMA) as writer, ahead(choosing.decided(cuts)) as tables:
        for table in tables:
            writer.write(table)
        policy = Selection(np.zeros(0, dtype=bool), [], settings_of(selector), provenance.to_json())
        writer.end({KEY: policy.metadata()})
    return target


def check_streams(selector: DataSelector) -> None:
    """Raise InputError for a selector whose decision on a row needs the values of all rows in memory."""
    if not selector.ranks_one_column:
        raise InputError(
            "A file of scores is selected from by one column, in one ranking: leave further columns, length_out and "
            "stratify_by out, and shares of groups, or load the scores (ScoreTable.load)."
        )


@dataclass(frozen=True)
class _Choosing:
    """A decision over the rows of a file.

    Attributes:
        file: the scores.
        provenance: their provenance.
        selector: the settings.
    """

    file: TableFile
    provenance: Provenance
    selector: DataSelector

    @property
    def _names(self) -> list[str]:
        """The columns that decide."""
        return list(dict.fromkeys(["sample_id", self.selector.column, "reason"]))

    def cuts(self) -> list[Cut]:
        """Where the ranking is cut."""
        selector, threshold = self.selector, self.selector.threshold
        if selector.band is not None:
            return cuts_of_band(self.ranked, (selector.band[0], selector.band[1]))
        if threshold is None:
            return cuts_of_share(self.ranked, selector.share(), selector.end())
        above = selector.end() == "largest"
        if not isinstance(threshold, str):
            return [Cut(threshold, above)]
        if not any(len(values) for values in self.ranked()):
            return []
        sign = 1 if above else -1
        return [Cut(sign * bound_of_rule(lambda: (sign * each for each in self.ranked()), threshold), above)]

    def ranked(self) -> Iterator[np.ndarray]:
        """The values to rank, some at a time."""

        def ranked(table: pa.Table) -> np.ndarray:
            _, values, chosen = self._values(table)
            return values[chosen]

        with ahead(map(ranked, self.file.unchecked([self.selector.column, "reason"]))) as values:
            yield from values

    def decided(self, cuts: list[Cut]) -> Iterator[pa.Table]:
        """Keep or drop, with a reason, some rows at a time."""
        whys = pa.array([KEPT, *(self.selector.reason(cut.above, bound=cut.bound) for cut in cuts)], pa.string())
        ties, start = [0] * len(cuts), 0
        for table in self.file.pieces(self._names):
            ids = table["sample_id"].to_numpy()
            if not np.array_equal(ids, np.arange(start, start + len(ids))):
                raise InputError(f"'{self.file.path}' has not every row in its order: load it (ScoreTable.load).")
            scores, values, ranked = self._values(table)
            codes, own = np.zeros(len(ids), dtype=np.int64), values[ranked]
            rows = np.flatnonzero(ranked)
            for number, cut in enumerate(cuts):
                dropped = cut.drops(own, ties[number])
                codes[rows[dropped]] = number + 1
                ties[number] += int(np.count_nonzero(own == cut.bound)) if cut.ties else 0
            reason = whys.take(pa.array(codes))
            unranked = scores.scored & ~ranked
            if unranked.any():
                why = self.selector.unranked(scores, values)[unranked].tolist()
                reason = pc.replace_with_mask(reason, pa.array(unranked), pa.array(why, pa.string()))
            if not scores.scored.all():
                told = table["reason"].combine_chunks().cast(pa.string())
                reason = pc.if_else(pa.array(scores.scored), reason, told)
            yield pa.table({"sample_id": ids, "keep": ranked & (codes == 0), "reason": reason})
            start += len(ids)

    def _values(self, table: pa.Table) -> tuple[ScoreTable, np.ndarray, np.ndarray]:
        """Some rows, the values to rank them by, and which have one."""
        scores = ScoreTable(table, self.provenance)
        values = self.selector.values(scores)
        return scores, values, scores.scored & np.isfinite(values)
