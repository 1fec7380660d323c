"""The digest of a dataset's rows, by which scores and selections know what they are of. Knows Arrow, not files.

The values are hashed, not their representation: chunks, slices, a shuffled or selected dataset's list of indices, the
width of numbers and offsets, and dictionaries make no difference. Columns are hashed in alphabetical order. A whole
number is another value than the decimal of the same size, an image is its stored bytes and path, a timestamp has a
unit and a time zone, and a column or field without any value counts as absent.

Blocks of 10,000 rows have digests of their own, from which that of the dataset is made: processes share the work.
A dataset whose shards were scored apart has a digest of each shard in one text: `shards:900=blocks:...,500=blocks:...`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BLOCKS = "blocks:"  # begins every digest but those of earlier versions
ARROW = "arrow:"  # begins a digest of all rows in one; those of version 0.1.0, of JSON text, begin with neither
SHARDS = "shards:"  # begins the digests of the shards of a dataset, each with its number of rows
FIRST = ""  # as `like`: a digest of version 0.1.0
BLOCK = 10_000  # rows of a block
PIECE = BLOCK  # rows of a stream at a time; a multiple of the rows that version 0.1.0 hashed together
BATCH = 250_000  # rows that are gathered together, at most
BYTES = 2**29  # of them, about: Arrow's text has offsets of 32 bits
AT_ONCE = 2**15  # values that are converted at a time, few enough for a processor's cache
PRESENT = b"\1" * AT_ONCE


def hash_rows(dataset: Dataset, like: str | None = None) -> str:
    """Digest of all columns and values, in order: another order or another value gives another digest.

    Args:
        dataset: the rows. A format or transform makes no difference: what is stored is hashed.
        like: a digest to compare with; one of version 0.1.0 is computed as that version does, and one of shards for
            the same shards.
    """
    digest = RowsDigest(like)
    digest.add(dataset)
    return digest.hexdigest()


def same_rows(digest: str, dataset: Dataset) -> bool:
    """Whether a saved digest, of this or an earlier version, is that of a dataset's rows."""
    return hash_rows(dataset, like=digest) == digest


def block_digests(rows: Dataset | pa.Table) -> list[bytes]:
    """The digests of rows in blocks: of some rows of a dataset, the first of which begins a block."""
    digest = RowsDigest()
    digest.add(rows)
    return digest.blocks


def digest_of_blocks(blocks: Iterable[bytes], rows: int) -> str:
    """The digest of a dataset.

    Args:
        blocks: the digests of its blocks, in order.
        rows: the number of its rows.
    """
    return f"{BLOCKS}{xxhash.xxh3_128_hexdigest(rows.to_bytes(8, 'little') + b''.join(blocks))}"


def of_shards(digests: Iterable[tuple[int, str]]) -> str:
    """The digest of a dataset whose shards were digested apart.

    Args:
        digests: the number of rows and the digest of each shard, in the dataset's order; that of a shard may be of
            shards in turn.
    """
    own = (each for rows, digest in digests for each in shards_in(digest) or [(rows, digest)])
    return SHARDS + ",".join(f"{rows}={digest}" for rows, digest in own)


def shards_in(digest: str) -> list[tuple[int, str]]:
    """The number of rows and the digest of each shard; empty for the digest of a dataset as a whole."""
    if not digest.startswith(SHARDS):
        return []
    pairs = [each.partition("=") for each in digest.removeprefix(SHARDS).split(",")]
    sound = all(rows.isdecimal() and int(rows) and own.startswith((BLOCKS, ARROW)) for rows, _, own in pairs)
    return [(int(rows), own) for rows, _, own in pairs] if sound else []


def first_other_shard(expected: str, found: str) -> range | None:
    """The rows of the first shard whose digest differs; None where the digests are not of shards, or none differs.

    Args:
        expected, found: digests, the second like the first.
    """
    start = 0
    for there, here in itertools.zip_longest(shards_in(expected), shards_in(found)):
        rows = (there or here)[0]
        if there != here:
            return range(start, start + rows)
        start += rows
    return None


def columns_of(stream: IterableDataset, size: int) -> Iterator[dict[str, list[Any]]]:
    """The values of a stream by column, `size` rows at a time; None where a row lacks a column that others have."""
    rows = iter(stream)
    while piece := list(itertools.islice(rows, size)):
        names = dict.fromkeys(name for row in piece for name in row)
        yield {name: [row.get(name) for row in piece] for name in names}


def tables_of(stream: IterableDataset, size: int) -> Iterator[pa.Table]:
    """The rows of a stream, `size` at a time, as they are stored: without its format, its images not decoded.

    Raises:
        pa.ArrowException: the stream does not know its types, and the values of a column do not show one.
    """
    if stream.features is not None:
        yield from stream.with_format("arrow").iter(batch_size=size)
    else:
        yield from map(pa.table, columns_of(stream.with_format(None), size))


class RowsDigest:
    """The digest of rows that come piece by piece. It does not depend on the pieces.

    Args:
        like: as for `hash_rows`. For a digest of version 0.1.0, pieces must have a multiple of 1000 rows.
    """

    def __init__(self, like: str | None = None) -> None:
        self._shards = shards_in(like or "")
        known = like is None or bool(self._shards) or like.startswith((BLOCKS, ARROW))
        self._text = None if known else xxhash.xxh3_128()
        self._ended = list[tuple[int, str]]()  # the shards before the one that is read
        self._own = _Whole(self._shards[0][1] if self._shards else like)

    def add(self, dataset: Dataset | pa.Table) -> None:
        """Add the rows that follow."""
        if self._text is not None:
            for batch in _python(dataset):
                self._text.update(json.dumps(batch, sort_keys=True, default=str).encode())
            return
        for table in [dataset] if isinstance(dataset, pa.Table) else _batches(dataset):
            for rows in self._at_ends(table):
                self._own.add(rows)

    def _at_ends(self, table: pa.Table) -> Iterator[pa.Table]:
        """The rows, cut where a shard ends; the next shard begins with an empty digest."""
        start = 0
        while len(self._ended) < len(self._shards) and start < len(table):
            size, _ = self._shards[len(self._ended)]
            if self._own.count == size:
                self._end()
                continue
            count = min(size - self._own.count, len(table) - start)
            yield table.slice(start, count)
            start += count
        if start < len(table):
            yield table.slice(start)

    def _end(self) -> None:
        self._ended.append((self._own.count, self._own.hexdigest()))
        following = self._shards[len(self._ended) :]
        self._own = _Whole(following[0][1] if following else None)

    @property
    def blocks(self) -> list[bytes]:
        """The digests of all blocks so far, the last of which may have fewer rows."""
        return self._own.blocks

    def hexdigest(self) -> str:
        """The digest of the rows so far."""
        if self._text is not None:
            return str(self._text.hexdigest())
        if self._shards:
            last = [(self._own.count, self._own.hexdigest())] if self._own.count else []
            return of_shards([*self._ended, *last])
        return self._own.hexdigest()


class _Whole:
    """The digest of a dataset or shard as a whole: made from those of blocks, or of all rows in one as earlier.

    Args:
        like: a digest that begins with `ARROW` for one of all rows in one; any other, or None, for one of blocks.
    """

    def __init__(self, like: str | None) -> None:
        self._size = None if like is not None and like.startswith(ARROW) else BLOCK
        self._rows, self._done, self.count = _Values(0), list[bytes](), 0

    def add(self, table: pa.Table) -> None:
        """Add the rows that follow."""
        start = 0
        while start < len(table):
            room = len(table) if self._size is None else self._size - self._rows.count
            piece = table.slice(start, room)
            self._rows.add_fields(dict(zip(piece.column_names, piece.columns, strict=True)), len(piece))
            start += len(piece)
            self.count += len(piece)
            if self._rows.count == self._size:
                self._done.append(self._rows.digest())
                self._rows = _Values(0)

    @property
    def blocks(self) -> list[bytes]:
        """The digests of all blocks so far."""
        return [*self._done, self._rows.digest()] if self._rows.count else self._done

    def hexdigest(self) -> str:
        """The digest of the rows so far."""
        if self._size is not None:
            return digest_of_blocks(self.blocks, self.count)
        return f"{ARROW}{xxhash.xxh3_128_hexdigest(self._rows.digest())}"


class _Values:
    """What is known of the values at one place of the rows: a column, a field of it, the items of a list.

    Args:
        missing: the number of values before the first, which are absent.
    """

    def __init__(self, missing: int) -> None:
        self.count = 0  # values that are not null
        self.present = xxhash.xxh3_128(bytes(missing))  # a byte for each value: 1, or 0 for null
        self.kinds: dict[str, Any] = {}  # the lengths and the bytes of values, by their kind
        self.parts: dict[str, _Values] = {}  # fields by name, items of a list as "[]"

    def add(self, array: pa.Array) -> None:
        """Add the next values."""
        array = _plain(array)
        if array.null_count:
            self.present.update(array.is_valid().cast(pa.uint8()).to_numpy().tobytes())
            array = array.drop_null()
        else:
            self._all_present(len(array))
        if pa.types.is_struct(array.type):
            names = [field.name for field in array.type]
            self.add_fields(dict(zip(names, array.flatten(), strict=True)), len(array))
            return
        if pa.types.is_nested(array.type):
            self._feed("list", pc.list_value_length(array).cast(pa.int64()).to_numpy())
            self._part("[]").add(array.flatten())
        elif len(array):
            self._add_plain(array)
        self.count += len(array)

    def add_fields(self, fields: dict[str, Any], count: int) -> None:
        """Add the next rows or structs, each of which has these fields; others of earlier ones are absent."""
        for name, values in fields.items():
            part = self._part(name, missing=self.count)
            for array in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
                part.add(array)
        for name in self.parts.keys() - fields.keys():
            self.parts[name].present.update(bytes(count))
        self.count += count

    def digest(self) -> bytes:
        """The digest of all values; empty if there is none."""
        if not self.count:
            return b""
        found = [self.count, self.present.hexdigest()]
        found += [[kind, self.kinds[kind].hexdigest()] for kind in sorted(self.kinds)]
        found += [[name, part.digest().hex()] for name, part in sorted(self.parts.items()) if part.count]
        return bytes(xxhash.xxh3_128(json.dumps(found).encode()).digest())

    def _all_present(self, count: int) -> None:
        for start in range(0, count, AT_ONCE):
            self.present.update(PRESENT[: count - start])

    def _part(self, name: str, missing: int = 0) -> _Values:
        if name not in self.parts:
            self.parts[name] = _Values(missing)
        return self.parts[name]

    def _feed(self, kind: str, values: Any) -> None:
        self.kinds.setdefault(kind, xxhash.xxh3_128()).update(values)

    def _add_plain(self, array: pa.Array) -> None:
        """Add values without parts, none of them null."""
        kind = array.type
        if pa.types.is_integer(kind):
            values = array.to_numpy()
            for start in range(0, len(values), AT_ONCE):
                # wraps what needs 64 bits without a sign, which is marked
                self._feed("whole", values[start : start + AT_ONCE].astype(np.int64))
            if kind == pa.uint64() and (above := values[values >= 2**63]).size:
                self._feed("above int64", above)
        elif pa.types.is_floating(kind):
            self._feed("decimal", array.to_numpy().astype(np.float64))
        elif pa.types.is_boolean(kind):
            self._feed("truth", array.cast(pa.uint8()).to_numpy())
        elif pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_time64(kind):
            self._feed(str(kind), array.view(pa.int64()).to_numpy())
        else:
            is_text = kind in (pa.string(), pa.large_string())
            is_bytes = kind in (pa.binary(), pa.large_binary()) or pa.types.is_fixed_size_binary(kind)
            if not is_bytes:
                array = array.cast(pa.large_string())
            lengths, data = _text(array.cast(pa.large_binary()))
            name = "text" if is_text else "bytes" if is_bytes else str(kind)
            self._feed(f"{name} lengths", lengths)
            self._feed(name, data)


def _text(array: pa.LargeBinaryArray) -> tuple[np.ndarray, Any]:
    """The lengths of texts, and the bytes of all of them."""
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.diff(ends), memoryview(b"" if data is None else data)[ends[0] : ends[-1]]


def _plain(array: pa.Array) -> pa.Array:
    """The values in one of the types that hold them: without dictionaries, views, or a type around the type."""
    if isinstance(array, pa.ExtensionArray):
        array = _json(array) if isinstance(array.type, pa.JsonType) else array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.type == pa.string_view():
        return array.cast(pa.large_string())
    return array.cast(pa.large_binary()) if array.type == pa.binary_view() else array


def _json(array: pa.JsonArray) -> pa.Array:
    """JSON text with its fields in one order and without needless space, as libraries write it differently."""
    values = [None if text is None else json.loads(text) for text in array.storage.to_pylist()]
    texts = [None if value is None else json.dumps(value, sort_keys=True) for value in values]
    return pa.array(texts, pa.large_string())


def _python(rows: Dataset | pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as Python's values by column, 1000 rows at a time, as version 0.1.0 hashes them."""
    if isinstance(rows, pa.Table):
        yield from (rows.slice(start, 1000).to_pydict() for start in range(0, len(rows), 1000))
    else:
        yield from rows.with_format(None).iter(batch_size=1000)


def _batches(dataset: Dataset) -> Iterator[pa.Table]:
    """The rows in order, as they are stored; of a shuffled or selected dataset, some at a time."""
    table = dataset.data.table
    if dataset._indices is None:
        yield table
        return
    stored = table.to_batches()
    starts = np.cumsum([0, *(len(batch) for batch in stored)])
    rows = dataset._indices.table.column(0).to_numpy().astype(np.int64)
    size = max(min(BATCH, BYTES * len(table) // max(table.nbytes, 1)), 1)
    for start in range(0, len(rows), size):
        yield _gather(stored, starts, rows[start : start + size])


def _gather(stored: list[pa.RecordBatch], starts: np.ndarray, rows: np.ndarray) -> pa.Table:
    """Some rows, in the given order. `Table.take` copies all that is stored, or takes row after row."""
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], starts)
    pieces = [
        batch.take(pa.array(rows[order[low:high]] - start))
        for batch, start, low, high in zip(stored, starts[:-1], bounds[:-1], bounds[1:], strict=True)
        if low < high
    ]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return pa.Table.from_batches(pieces).combine_chunks().take(pa.array(place))
