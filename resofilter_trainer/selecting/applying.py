"""The rows that a selection keeps of a stream. Knows datasets and digests, not how rows were selected."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..config import InputError
from ..config.compatibility import has
from ..io.digest import PIECE, RowsDigest, tables_of
from ..scores.shards import other_rows

if TYPE_CHECKING:
    from datasets import IterableDataset

OTHER_ROWS = (
    "The dataset is not what was scored: its values, its columns or the order of its rows differ. Apply the selection "
    "to the dataset as it was scored, before shuffling or changing it. If only columns differ, and row i is still row "
    "i, pass check_rows=False."
)
UNTYPED = (
    "The stream does not know the types of its columns, so that its rows cannot all be compared with those that were "
    "scored: if they are the same, pass check_rows=False."
)
MORE_ROWS = "The selection was made for {} rows and the stream has more. Score it again."


def check_stream(stream: IterableDataset, source: Mapping[str, Any], rows: int) -> None:
    """Read a stream. Raise InputError unless its rows are those that were scored.

    Args:
        stream: the stream.
        source: the source of the scores, with the digest of their rows.
        rows: their number.
    """
    digest, found = RowsDigest(like=source["content"]), 0
    try:
        for table in tables_of(stream, PIECE):
            digest.add(table)
            found += len(table)
            if found > rows:
                raise InputError(MORE_ROWS.format(rows))
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(UNTYPED) from error
    if found < rows:
        raise InputError(f"The selection was made for {rows} rows and the stream has {found}. Score it again.")
    if digest.hexdigest() != source["content"]:
        untyped = "" if stream.features is not None else f" {UNTYPED}"
        raise InputError(f"{OTHER_ROWS}{other_rows(source, digest.hexdigest())}{untyped}")


def kept_of_stream(stream: IterableDataset, keep: np.ndarray) -> IterableDataset:
    """The rows of a stream to keep, by their position; `keep` is (N,) bool."""
    keeps = functools.partial(_keeps, keep=keep, shards=stream.num_shards)
    kept = stream.skip(0).filter(keeps, with_indices=True)  # skip: a later shuffling leaves the shards alone
    return kept if has("decoding after a filter") else _decoding(kept)


def _keeps(row: Any, position: int, keep: np.ndarray, shards: int) -> bool:
    if shards > 1 and _in_one_of_several_workers():
        raise InputError(
            "The rows of a stream of several shards have a position in one process only: pass dataloader_num_workers=0."
        )
    if position >= len(keep):
        raise InputError(MORE_ROWS.format(len(keep)))
    return bool(keep[position])


def check_dataset(dataset: Any) -> None:
    """Raise InputError for anything but a Dataset or a stream."""
    if isinstance(dataset, dict):
        split = next(iter(dataset), "train")
        raise InputError(
            f"A selection is of one split, and this is a {type(dataset).__name__}: pass dataset['{split}']."
        )
    if not hasattr(dataset, "with_format"):
        raise InputError(
            f"A selection applies to a datasets.Dataset or IterableDataset, and this is a {type(dataset).__name__}."
        )


def _decoding(stream: IterableDataset) -> IterableDataset:
    """A filtered stream whose images and the like are decoded."""
    features: Any = sys.modules["datasets.features.features"]  # imported by the stream's user only
    if stream.features is None or not features.require_decoding(dict(stream.features)):
        return stream
    return stream.map(_same, features=stream.features)


def _same(row: Any) -> Any:
    return row


def _in_one_of_several_workers() -> bool:
    """Whether this process is a worker of a DataLoader that has others."""
    torch: Any = sys.modules.get("torch")
    worker = torch.utils.data.get_worker_info() if torch is not None else None
    return worker is not None and worker.num_workers > 1
