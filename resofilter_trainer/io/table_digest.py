"""The digest of a table, which is checked when its file is read. Knows Arrow's columns, not files.

The digest of a table that is written at once is one number. A table that is written piece by piece has a digest for
each column, `columns:` and JSON: whoever reads some of its columns, piece by piece, can check these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

DIGEST = b"resofilter_digest"  # the metadata key of a table's digest; files of earlier versions may lack it
BY_COLUMN = b"columns:"  # begins the digests of columns
CHANGED = "its content is not what was written"


def with_digest(table: pa.Table) -> pa.Table:
    """The table with its digest in its metadata."""
    return table.replace_schema_metadata({**table.schema.metadata, DIGEST: _digest(table, table.columns)})


def verified(table: pa.Table, columns: Iterable[pa.ChunkedArray]) -> pa.Table:
    """The table, if it has the digest that was written. Page checksums cover neither names nor metadata.

    Raises:
        ArrowInvalid: the digest differs.
    """
    expected = (table.schema.metadata or {}).get(DIGEST)
    if expected is not None and expected.startswith(BY_COLUMN):
        if len({*table.column_names}) < table.num_columns:
            raise pa.ArrowInvalid(CHANGED)
        digests = ColumnDigests(table.schema.names)
        digests.add(table)
        digests.check(table.schema, table.num_rows)
    elif expected is not None and expected != _digest(table, columns):
        raise pa.ArrowInvalid(CHANGED)
    return table


class ColumnDigests:
    """The digests of columns whose rows come piece by piece. They do not depend on the pieces.

    Args:
        names: the columns.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._columns = {name: [xxhash.xxh3_128() for _ in range(3)] for name in names}

    def add(self, table: pa.Table) -> None:
        """Add the rows that follow; other columns do not count."""
        for name, (present, lengths, values) in self._columns.items():
            for chunk in table[name].chunks:
                present.update(_present(chunk))
                if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
                    chunk = chunk.drop_null()
                    lengths.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64).data)
                    if len(chunk):
                        values.update(text_of(chunk).data)
                elif pa.types.is_boolean(chunk.type):
                    values.update(chunk.fill_null(False).to_numpy(zero_copy_only=False).data)
                else:
                    chunk = chunk.fill_null(0) if chunk.null_count else chunk
                    values.update(np.ascontiguousarray(chunk.to_numpy()).data)

    def metadata(self, schema: pa.Schema, rows: int) -> bytes:
        """What is written under `DIGEST`: the digest of names, types and metadata, and that of each column."""
        found = {name: [each.hexdigest() for each in own] for name, own in self._columns.items()}
        columns = {name: xxhash.xxh3_128_hexdigest(" ".join(own).encode()) for name, own in found.items()}
        return BY_COLUMN + json.dumps({"table": _head(schema, rows).hexdigest(), "columns": columns}).encode()

    def check(self, schema: pa.Schema, rows: int) -> None:
        """Raise ArrowInvalid unless the columns are those that were written.

        Args:
            schema: the schema that was read, with all columns and the metadata.
            rows: the number of all rows.
        """
        expected, found = (_read(each) for each in (schema.metadata[DIGEST], self.metadata(schema, rows)))
        there = expected.get("columns")
        if expected.get("table") != found["table"] or not isinstance(there, Mapping):
            raise pa.ArrowInvalid(CHANGED)
        if any(there.get(name) != digest for name, digest in found["columns"].items()):
            raise pa.ArrowInvalid(CHANGED)


def text_of(chunk: pa.Array) -> np.ndarray:
    """The bytes of a chunk's texts, one after another. None of them may be null."""
    _, offsets, text = chunk.buffers()
    width = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    first, last = np.frombuffer(offsets, width)[[chunk.offset, chunk.offset + len(chunk)]]
    return np.empty(0, np.uint8) if text is None else np.frombuffer(text, np.uint8)[first:last]


def _present(chunk: pa.Array) -> Any:
    """A byte for each value: 1, or 0 for null."""
    return chunk.is_valid().to_numpy(zero_copy_only=False).data if chunk.null_count else b"\1" * len(chunk)


def _read(metadata: bytes) -> dict[str, Any]:
    try:
        values = json.loads(metadata.removeprefix(BY_COLUMN))
    except (ValueError, RecursionError) as error:
        raise pa.ArrowInvalid(CHANGED) from error
    if not isinstance(values, dict):
        raise pa.ArrowInvalid(CHANGED)
    return values


def _head(schema: pa.Schema, rows: int) -> xxhash.xxh3_128:
    """The digest of a table's names, types and metadata."""
    metadata = sorted((name, value) for name, value in (schema.metadata or {}).items() if name != DIGEST)
    names = [(field.name, str(field.type)) for field in schema]
    return xxhash.xxh3_128(repr((rows, names, metadata)).encode(errors="replace"))


def _digest(table: pa.Table, columns: Iterable[pa.ChunkedArray]) -> bytes:
    """The digest of a table's names, types, metadata and columns, as one number."""
    digest = _head(table.schema, table.num_rows)
    for column in columns:
        for piece in _bytes_of(column):
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest().encode()


def _bytes_of(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """A column's bytes. For numbers, bools and text they do not depend on the chunks; for lists they do."""
    kind = column.type
    if column.null_count:
        yield from (chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in column.chunks)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.drop_null()
        yield from (pc.binary_length(chunk).to_numpy() for chunk in column.chunks)
        yield from (text_of(chunk) for chunk in column.chunks if len(chunk))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield from (chunk.to_numpy() for chunk in (column.fill_null(0) if column.null_count else column).chunks)
    elif pa.types.is_boolean(kind):
        yield from (chunk.to_numpy(zero_copy_only=False) for chunk in column.fill_null(False).chunks)
    elif pa.types.is_large_list(kind):
        for chunk in column.chunks:
            yield chunk.offsets.to_numpy()
            yield from _bytes_of(pa.chunked_array([chunk.values]))
