"""The digest of a dataset's rows, by which scores and selections know what they are of. Knows values, not files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from datasets import Dataset


def hash_rows(dataset: Dataset) -> str:
    """Hash of all columns and values, in order: another order or another value gives another hash."""
    digest = xxhash.xxh3_128()
    add_rows(digest, dataset)
    return digest.hexdigest()


def add_rows(digest: Any, dataset: Dataset) -> None:
    """Update a hash with more rows; pieces of a multiple of 1000 rows give the hash of the whole."""
    for batch in dataset.with_format(None).iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
