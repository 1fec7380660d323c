"""The reasons of many rows, of which few differ: a number for each row and a list of texts. Knows no scores.

A list of a hundred million texts takes minutes and gigabytes; a number takes four bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from ..io.pieces import ROWS, TableFile, writing_pieces

MANY = 4_000_000  # rows of a selection from which on it is read and written piece by piece
KINDS = {"keep": pa.bool_(), "reason": pa.string(), "weight": pa.float64()}  # the types of the columns


class Reasons(Sequence[str]):
    """A sequence of texts.

    Args:
        names: the different texts.
        codes: (N,) which of them each row has.
    """

    def __init__(self, names: Sequence[str], codes: np.ndarray) -> None:
        self._names, self._codes = list(names), codes

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        found = self._codes[key]
        return [self._names[code] for code in found.tolist()] if isinstance(key, slice) else self._names[int(found)]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), ROWS):
            yield from self[start : start + ROWS]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def counts(self) -> Counter[str]:
        """How often each text occurs, in the order in which they first occur."""
        numbers = np.bincount(self._codes, minlength=len(self._names)).tolist()
        return Counter({name: count for name, count in zip(self._names, numbers, strict=True) if count})


def counts_of(reasons: Iterable[str]) -> Counter[str]:
    """How often each reason occurs, in the order in which they first occur."""
    return reasons.counts() if isinstance(reasons, Reasons) else Counter(reasons)


def columns_of(table: pa.Table) -> dict[str, Any]:
    """The columns `keep`, `reason` and, if there is one, `weight` of a selection.

    Raises:
        KeyError, TypeError, ArrowInvalid: there are other columns, or a value is missing.
    """
    columns = dict(zip(table.column_names, table.columns, strict=True))
    if not pa.types.is_boolean(columns["keep"].type) or any(column.null_count for column in table.columns):
        raise TypeError("other columns")
    found = {name: columns[name].cast(kind) for name, kind in KINDS.items() if name != "weight" or name in columns}
    return {name: each.to_pylist() if name == "reason" else each.to_numpy() for name, each in found.items()}


def read_in_pieces(file: TableFile) -> dict[str, Any]:
    """The same of a selection's file, piece by piece, with `Reasons`. Errors as for `columns_of`, and damage."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in file.schema.names if name in ("keep", "weight")}
    known, codes = dict[str, int](), list[np.ndarray]()
    if "keep" not in parts or not pa.types.is_boolean(file.schema.field("keep").type):
        raise KeyError("keep")
    for table in file.pieces([*parts, "reason"]):
        if any(column.null_count for column in table.columns):
            raise TypeError("a value is missing")
        for name, own in parts.items():
            own.append(table[name].cast(KINDS[name]).to_numpy())
        encoded = table["reason"].combine_chunks().cast(pa.string()).dictionary_encode()
        numbers = [known.setdefault(each, len(known)) for each in encoded.dictionary.to_pylist()]
        codes.append(np.array(numbers, dtype=np.int32)[encoded.indices.to_numpy()])
    whole = {name: np.concatenate(own) for name, own in parts.items()}
    return {**whole, "reason": Reasons(list(known), np.concatenate(codes))}


def write_in_pieces(path: Path, columns: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
    """Write the columns of a selection piece by piece. Returns the file."""
    schema = pa.schema([("sample_id", pa.int64()), *((name, KINDS[name]) for name in KINDS if name in columns)])
    with writing_pieces(path, schema) as writer:
        for start in range(0, len(columns["keep"]), ROWS):
            rows = {name: column[start : start + ROWS] for name, column in columns.items() if name != "sample_id"}
            rows["sample_id"] = np.arange(start, start + len(rows["keep"]))
            writer.write(pa.table(rows))
        writer.end(metadata)
    return path
