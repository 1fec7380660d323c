"""Tables of shards as one table: rows, reasons, votes and trust. Knows Arrow's columns and provenances, no file."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import InputError
from .provenance import Trust
from .shards import Piece
from .statistics import LAYER, layer_vote

NAMED_ROW = re.compile(r"\brow (\d+)")  # in a reason: another row
LAYER_VOTE = "layer_vote"  # a signal that is made from those of all rows


def common_schema(schemas: Sequence[pa.Schema], names: Sequence[str]) -> pa.Schema:
    """The columns of the whole, as the first table has them.

    Args:
        schemas: those of the tables.
        names: what to call each table in an error.

    Raises:
        InputError: a table has other columns, or the same ones of other types.
    """
    first = schemas[0]
    for name, other in zip(names, schemas, strict=True):
        columns = {*first.names} ^ {*other.names}
        if columns:
            raise InputError(
                f"{names[0]} and {name} do not belong together: not both have the columns "
                f"{', '.join(sorted(columns))}. Score the rows of both with the same signals."
            )
        for field in first:
            kinds = field.type, other.field(field.name).type
            if field.name != "reason" and kinds[0] != kinds[1]:
                raise InputError(f"'{field.name}' is {kinds[0]} in {names[0]} and {kinds[1]} in {name}: score again.")
    fields = [each.with_type(pa.string()) if each.name == "reason" else each for each in first]
    return pa.schema(fields)


def moved(table: pa.Table, piece: Piece, at: int, schema: pa.Schema, name: str) -> pa.Table:
    """Some rows of a piece, as they are in the whole: their ids, and the rows that reasons name.

    Args:
        table: the rows, as their table has them.
        piece: their piece.
        at: the position of the first one in the piece.
        schema: the columns of the whole.
        name: what to call their table in an error.

    Raises:
        InputError: the rows are not in order.
    """
    ids = table["sample_id"].to_numpy()
    first = piece.shard.first - piece.offset + at
    if not np.array_equal(ids, np.arange(first, first + len(ids))):
        raise InputError(f"{name} has not every row once, in their order: load and join it first (ScoreTable.join).")
    table = table.select(schema.names).cast(pa.schema([each.remove_metadata() for each in schema])).cast(schema)
    if not piece.offset:
        return table
    reasons = table["reason"]
    if reasons.null_count < len(reasons) and pc.any(pc.match_substring_regex(reasons, NAMED_ROW.pattern)).as_py():
        found = [None if each is None else _renumbered(each, piece.offset) for each in reasons.to_pylist()]
        table = _with(table, "reason", pa.array(found, pa.string()))
    return _with(table, "sample_id", pa.array(ids + piece.offset, schema.field("sample_id").type))


def trust_of(trusts: Sequence[Trust | None], span: float | None, saturated: bool, lr: float | None) -> Trust | None:
    """The trust in all tables together: their lowest agreement, and the range of all scores; None where none has any.

    Args:
        trusts: those of the tables.
        span: the distance between the smallest and the largest of all scores; None without a score.
        saturated: whether all scores together are saturated.
        lr: the learning rate of the measured step.
    """
    known = [each for each in trusts if each is not None]
    if not known:
        return None
    agreements = [each.agreement for each in known if each.agreement is not None]
    bounded = all(each.saturation is not None for each in known) and span is not None and bool(lr)
    return Trust(
        agreement=min(agreements) if agreements else None,
        rows=sum(each.rows for each in known),
        saturation=(span or 0.0) / (lr or 1.0) if bounded else None,
        forward=known[0].forward,
        saturated=saturated,
        in_float32=all(each.in_float32 for each in known),
    )


def votes_of_layers(layers: Sequence[pa.ChunkedArray]) -> pa.Array:
    """The `layer_vote` of all rows, from the scores of each layer; null for a row that lacks one."""
    values = np.stack([each.to_numpy() for each in layers], axis=1)
    votes, scored = np.zeros(len(values)), np.isfinite(values).all(axis=1)
    votes[scored] = layer_vote(values[scored])
    return pa.array(votes, mask=~scored)


def layers_of(names: Sequence[str]) -> list[str]:
    """The columns of layers, of which votes are made; empty where there is no column of votes."""
    found = [name for name in names if name.startswith(LAYER) and name.removeprefix(LAYER).isdigit()]
    return found if LAYER_VOTE in names else []


def with_votes_of_all(table: pa.Table) -> pa.Table:
    """The table with its `layer_vote`, if it has one, made from all its rows: for tables that were put together."""
    names = layers_of(table.column_names)
    return _with(table, LAYER_VOTE, votes_of_layers([table[name] for name in names])) if names else table


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)


def _renumbered(reason: str, offset: int) -> str:
    return NAMED_ROW.sub(lambda found: f"row {int(found[1]) + offset}", reason)
