"""Scores of shards, joined from file to file: no table is ever in memory as a whole. Knows files, no model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..config import InputError, with_known_keywords
from ..io.files import file_at
from ..io.hub import record_at
from ..io.pieces import TableFile, ahead, writing_pieces
from .full_step import MIDDLE, full_step_of, lie_close, may_saturate
from .joining import LAYER_VOTE, common_schema, layers_of, moved, trust_of, votes_of_layers
from .order_statistics import quantiles
from .provenance import Provenance, Trust
from .score_table import KEY, SCORES_FILE, ScoreTable
from .shards import SHARD, Piece, Whole, whole_of, with_digest_of

if TYPE_CHECKING:
    from datasets import Dataset


@with_known_keywords
def join_scores(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    partial: bool = False,
    dataset: Dataset | None = None,
    overwrite: bool = False,
) -> Path:
    """Join saved scores of shards into one file, as `ScoreTable.concatenate` does with tables in memory.

    A million rows are in memory at a time; with `layer_vote`, the scores of all layers are, too.

    Args:
        paths: the folders or files of the scores.
        output: a folder for `scores.parquet`, or a Parquet file.
        partial, dataset: as for `ScoreTable.concatenate`.
        overwrite: whether to replace scores that are already there.

    Returns:
        The file of the joined scores.

    Raises:
        InputError: as for `ScoreTable.concatenate`; or a file is missing or damaged, or there are scores already.
    """
    target = _target(paths, output, overwrite)
    opened, names = [open_scores(each) for each in paths], [f"'{each}'" for each in paths]
    files, made = [file for file, _ in opened], [provenance for _, provenance in opened]
    whole = whole_of(made, [each.rows for each in files], names, partial)
    if dataset is not None:
        whole = dataclasses.replace(whole, provenance=with_digest_of(whole.provenance, dataset))
    schema = common_schema([each.schema.remove_metadata() for each in files], names)
    joining = _Joining(files, names, whole, schema)
    votes = joining.votes()
    with writing_pieces(target, schema) as writer, ahead(joining.rows()) as tables:
        for table in tables:
            if votes is not None:
                place, at = schema.get_field_index(LAYER_VOTE), joining.written
                table = table.set_column(place, schema.field(place), votes.slice(at, len(table)))
            joining.written += len(table)
            joining.look_at(table)
            writer.write(table)
        alone = len(files) == 1 and SHARD not in made[0].source
        trust = made[0].trust if alone else joining.trust(made)
        writer.end({KEY: dataclasses.replace(whole.provenance, trust=trust).to_json()})
    return target


def _target(paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], overwrite: bool) -> Path:
    """The file of the joined scores. Raises InputError where it would replace scores."""
    if isinstance(paths, str | os.PathLike):
        raise InputError(f"paths are several folders or files of scores, got {str(paths)!r}: pass a list.")
    target = file_at(output, SCORES_FILE)
    if target.resolve() in [file_at(each, SCORES_FILE).resolve() for each in paths]:
        raise InputError(f"'{target}' is one of the scores to join. Choose another output.")
    if target.exists() and not overwrite:
        raise InputError(f"'{target}' holds scores already. Choose another output, or pass overwrite=True.")
    return target


@dataclass
class _Joining:
    """The rows of the files in the order of the whole, and what is known of all of their scores.

    Attributes:
        files, names: the files, and what to call each in an error.
        whole: how they become one.
        schema: the columns of the whole.
        written: the number of rows so far.
        scores: the number of finite scores so far; `low` and `high` are the smallest and the largest.
    """

    files: Sequence[TableFile]
    names: Sequence[str]
    whole: Whole
    schema: pa.Schema
    written: int = 0
    scores: int = 0
    low: float = field(default=np.inf)
    high: float = field(default=-np.inf)

    def rows(self) -> Iterator[pa.Table]:
        """The rows as they are in the whole, with every column."""
        for piece, at, table in self._pieces(self.schema.names, checked=True):
            yield moved(table, piece, at, self.schema, self.names[piece.table])

    def look_at(self, table: pa.Table) -> None:
        """Count the finite scores of some rows."""
        values = _finite(table)
        if len(values):
            self.scores += len(values)
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def trust(self, made: Sequence[Provenance]) -> Trust | None:
        """The trust in all scores together, once all rows were seen."""
        config = made[0].config
        saturated = False
        if may_saturate(config, self.scores):
            found = np.array(quantiles(self._scores, [MIDDLE[0], 0.5, MIDDLE[1]]))
            saturated = lie_close(found, full_step_of(config) or float(found[1]))
        span = self.high - self.low if self.scores else None
        return trust_of([each.trust for each in made], span, saturated, config.get("lr"))

    def votes(self) -> pa.Array | None:
        """The votes of all rows' layers; None without such a column."""
        names = layers_of(self.schema.names)
        if not names or len(self.files) == 1:
            return None
        tables = [table for _, _, table in self._pieces(names, checked=False)]
        return votes_of_layers([pa.chunked_array([c for each in tables for c in each[name].chunks]) for name in names])

    def _scores(self) -> Iterator[np.ndarray]:
        """The finite scores again, in any order."""
        for file in self.files:
            with ahead(map(_finite, file.unchecked(["score", "reason"]))) as values:
                yield from values

    def _pieces(self, columns: Sequence[str], checked: bool) -> Iterator[tuple[Piece, int, pa.Table]]:
        """Rows in the order of the whole: their piece, the position of the first one in it, and the rows."""
        last = {piece.table: piece for piece in self.whole.pieces}
        cursors: dict[int, _Cursor] = {}
        for piece in self.whole.pieces:
            file = self.files[piece.table]
            if piece.table not in cursors:
                read = file.pieces if checked else file.unchecked
                cursors[piece.table] = _Cursor(read(columns), file.path)
            at = 0
            for table in cursors[piece.table].take(piece.shard.rows):
                yield piece, at, table
                at += len(table)
            if piece is last[piece.table]:
                cursors.pop(piece.table).end()


@dataclass
class _Cursor:
    """The next rows of a file.

    Attributes:
        tables: its rows, some at a time.
        path: the file, for an error.
        rest: rows that were read and not yet taken.
    """

    tables: Iterator[pa.Table]
    path: Path
    rest: pa.Table | None = None

    def take(self, count: int) -> Iterator[pa.Table]:
        """So many rows, some at a time."""
        while count:
            table = next(self.tables, None) if self.rest is None else self.rest
            if table is None:
                raise InputError(f"'{self.path}' has changed while it was read. Start again.")
            own, self.rest = table.slice(0, count), table.slice(count) if len(table) > count else None
            count -= len(own)
            yield own

    def end(self) -> None:
        """Read to the end, where the digests are checked."""
        for _ in self.tables:
            pass


def open_scores(path: str | os.PathLike[str]) -> tuple[TableFile, Provenance]:
    """A file of scores, to be read piece by piece, and its provenance. Raises InputError as for `ScoreTable.load`."""
    with record_at(path, SCORES_FILE, "scores") as place:
        file = TableFile.open(place, KEY, "scores")
    try:
        provenance = Provenance.from_json(file.metadata)
        ScoreTable(file.schema.empty_table(), provenance).check_columns()
        return file, provenance
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"The scores at '{file.path}' were written by another version. Make them again.") from error


def _finite(table: pa.Table) -> np.ndarray:
    values = table["score"].to_numpy()[table["reason"].is_null().to_numpy()]
    return values[np.isfinite(values)]
