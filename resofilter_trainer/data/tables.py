"""The rows of a dataset as Arrow tables, some at a time. Knows datasets, not what rows mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
from datasets import Dataset


def tables_of(dataset: Dataset | pa.Table, size: int, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows as they are stored, in order and without a format.

    Args:
        dataset: the rows.
        size: the most rows of a table.
        names: the columns; by default all.
    """
    if isinstance(dataset, Dataset) and dataset._indices is not None:
        chosen = dataset if names is None else dataset.select_columns(list(names))
        yield from chosen.with_format("arrow").iter(batch_size=size)
        return
    table = dataset.data.table if isinstance(dataset, Dataset) else dataset
    table = table if names is None else table.select(names)
    yield from (table.slice(start, size) for start in range(0, len(table), size))
