"""Rows, their scores with the digest that `Selection.apply` compares, and selections of them. Not a test itself."""

from __future__ import annotations

import dataclasses
import tempfile

from datasets import Dataset

from helpers.tables import make_scores
from resofilter_trainer import DataSelector, ScoreTable, Selection
from resofilter_trainer.io.digest import hash_rows

DATASET_ROWS = Dataset.from_list([{"question": f"q {i}", "answer": str(i * 7 % 12)} for i in range(12)])


def scores_of(dataset: Dataset, content: str | None = "") -> ScoreTable:
    """Scores of a dataset, with the digest of its rows."""
    scores = make_scores([float(i * 5 % len(dataset)) for i in range(len(dataset))])
    source = {} if content is None else {"content": content or hash_rows(dataset)}
    return ScoreTable(scores.table, dataclasses.replace(scores.provenance, source=source))


def select(dataset: Dataset = DATASET_ROWS, content: str | None = "") -> Selection:
    """Half of the rows."""
    return DataSelector(keep=0.5).select(scores_of(dataset, content))


def reread(kept: Dataset) -> Dataset:
    """The rows from a Parquet file that they were written to."""
    with tempfile.TemporaryDirectory() as temporary:
        kept.to_parquet(f"{temporary}/rows.parquet")
        return Dataset.from_parquet(f"{temporary}/rows.parquet", keep_in_memory=True, cache_dir=temporary)
