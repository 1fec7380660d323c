"""Parquet files that are read and written piece by piece, for tables that fit no memory. Knows no content.

A file that was written so has a digest for each column, which is checked for the columns that are read. A file that was
written at once is read at once: its digest is that of all columns together.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from .files import PARQUET, check_is_file, load_parquet, metadata_of, readable, replacing
from .table_digest import BY_COLUMN, DIGEST, ColumnDigests

T = TypeVar("T")
ROWS = 1 << 20  # of a row group
COUNTED = "sample_id"  # a column that counts the rows: differences take a bit where numbers take 64
ARROW_SCHEMA = "ARROW:schema"  # the key under which Arrow stores its schema in a Parquet file


@dataclass(frozen=True)
class TableFile:
    """A Parquet file of this package.

    Attributes:
        path: the file.
        key: the name of this package's metadata.
        what: the content in words, for errors: `scores`.
        schema: its columns, with all metadata.
        rows: the number of its rows.
    """

    path: Path
    key: str
    what: str
    schema: pa.Schema
    rows: int

    @classmethod
    def open(cls, path: Path, key: str, what: str) -> TableFile:
        """Read the columns' names and the metadata. Raises InputError as for `load_parquet`."""
        check_is_file(path, what)
        with readable(path, PARQUET), pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        metadata_of(schema, path, key, what, PARQUET)
        return cls(path, key, what, schema, rows)

    @property
    def metadata(self) -> str:
        """This package's metadata."""
        return metadata_of(self.schema, self.path, self.key, self.what, PARQUET)

    @property
    def by_column(self) -> bool:
        """Whether each column has a digest of its own."""
        return (self.schema.metadata.get(DIGEST) or b"").startswith(BY_COLUMN)

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, some at a time, without metadata. Their digests are checked at the end.

        Args:
            columns: the columns to read; by default all.

        Raises:
            InputError: the file is damaged, or its columns are not what was written.
        """
        names = list(self.schema.names if columns is None else columns)
        if not self.by_column:
            table = load_parquet(self.path, self.key, self.what)[0].select(names).replace_schema_metadata(None)
            yield from (table.slice(start, ROWS) for start in range(0, len(table), ROWS))
            return
        digests = ColumnDigests(names)
        for table in self.unchecked(names):
            digests.add(table)
            yield table
        with readable(self.path, PARQUET):
            digests.check(self.schema, self.rows)

    def unchecked(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """As `pieces`, with the checksums of pages alone: for columns whose digests were checked just before."""
        with readable(self.path, PARQUET):
            file = pq.ParquetFile(self.path, page_checksum_verification=True)
        with file:
            for group in range(file.num_row_groups):
                with readable(self.path, PARQUET):
                    table = file.read_row_group(group, columns=list(columns)).replace_schema_metadata(None)
                yield from (table.slice(start, ROWS) for start in range(0, len(table), ROWS))


@contextlib.contextmanager
def ahead(tables: Iterable[T]) -> Iterator[Iterator[T]]:
    """The same tables; while one is used, another thread makes the next. It has ended when the block ends."""
    source = iter(tables)

    def following() -> Iterator[T]:
        coming = thread.submit(next, source, None)
        while (found := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield found

    with ThreadPoolExecutor(1) as thread:
        yield following()


class PieceWriter:
    """Writes the pieces of a table to a Parquet file, see `writing_pieces`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._digests, self._rows = ColumnDigests(schema.names), 0
        self._ended = False

    def write(self, table: pa.Table) -> None:
        """Add the rows that follow, with the columns of the schema."""
        table = table.select(self._schema.names).cast(self._schema)
        self._digests.add(table)
        self._rows += len(table)
        self._writer.write_table(table, row_group_size=ROWS)

    def end(self, metadata: Mapping[str, str]) -> None:
        """Add the metadata and the digests, after the last rows."""
        schema = self._schema.with_metadata({name: value.encode() for name, value in metadata.items()})
        digests = self._digests.metadata(schema, self._rows)
        schema = schema.with_metadata({**schema.metadata, DIGEST: digests})
        stored = base64.b64encode(schema.serialize()).decode()  # as Arrow itself does, before the first row
        plain = {**metadata, DIGEST.decode(): digests.decode()}  # which Arrow reads where its schema does not fit
        self._writer.add_key_value_metadata({**plain, ARROW_SCHEMA: stored})
        self._ended = True


@contextlib.contextmanager
def writing_pieces(path: Path, schema: pa.Schema) -> Iterator[PieceWriter]:
    """Write a table piece by piece to a file that is complete or absent. The block ends with `PieceWriter.end`.

    Args:
        path: the file.
        schema: the columns, without metadata of the table.
    """
    text = [each.name for each in schema if pa.types.is_string(each.type)]  # numbers hardly repeat
    with replacing(path) as temporary:
        options: dict[str, Any] = {"use_dictionary": text, "write_page_checksum": True, "store_schema": False}
        if COUNTED in schema.names:
            options["column_encoding"] = {COUNTED: "DELTA_BINARY_PACKED"}
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            pieces = PieceWriter(writer, schema)
            yield pieces
            assert pieces._ended, "a file without metadata cannot be read"
