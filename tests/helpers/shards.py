"""Scores of a small dataset's shards, as passes over each would write them. Knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from helpers.tables import WHY, make_provenance
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.scores.provenance import Trust
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.scores.shards import SHARD, shard_place

CONFIG = {"update": "adamw", "lr": 1e-5, "eps": 1e-8, "n_layers": 2}
ROWS = Dataset.from_list([{"prompt": f"what is {row}?", "completion": "x" * (1 + row % 3)} for row in range(11)])
RANDOM = np.random.default_rng(3)
VALUES = RANDOM.permutation([1e-5, 9e-6, 9e-6, 0.0, -0.0, 5e-324, 3e-6, 1 / 3e6, 8e-6, 0.1 + 0.2, 2e-6])


def scores_of(first: int = 0, end: int = len(ROWS), source: dict[str, Any] | None = None, **changes: Any) -> ScoreTable:
    """Scores of rows that follow each other; rows 4 and 9 have none, and row 9 repeats the first of its own table."""
    rows, values = np.arange(first, end), VALUES[first:end]
    scored = ~np.isin(rows, [4, 9])
    repeats = "same prompt as row 0"
    why = [None if each else repeats if row == 9 else WHY for row, each in zip(rows, scored, strict=True)]
    numbers = {"score": values, "loss": values / 3, "layer_2": values * 2, "layer_3": values[::-1].copy()}
    columns: dict[str, Any] = {name: pa.array(own, mask=~scored) for name, own in numbers.items()}
    table = pa.table(
        {
            "sample_id": np.arange(end - first),
            **columns,
            "entropy": columns["loss"],
            "num_tokens": pa.array(rows + 1, mask=~scored),
            "reason": pa.array(why, pa.string()),
        }
    )
    place = table.schema.get_field_index("entropy")
    table = table.cast(table.schema.set(place, table.schema.field(place).with_metadata({"direction": "smallest"})))
    span = float(np.ptp(values[scored])) if scored.any() else 0.0
    made = {
        "rows": end - first,
        "dataset": f"tokens {first} {end}",
        "config": CONFIG,
        "source": {"dataset": f"rows-{first}.jsonl", "content": hash_rows(ROWS.select(rows)), **(source or {})},
        "trust": Trust(0.99 - first / 1000, 6, span / 1e-5),
    }
    return ScoreTable(table, make_provenance(**{**made, **changes}))


def shard(index: int, count: int) -> ScoreTable:
    """The scores of a shard that knows its place, as `resofilter score --shard 1/4` makes them."""
    place = shard_place(len(ROWS), index, count)
    rows = len(ROWS.shard(count, index, contiguous=True))
    return scores_of(place["first"], place["first"] + rows, {"dataset": "rows.jsonl", SHARD: place})


def files(ends: tuple[int, ...] = (3, 5, 9, 11)) -> list[ScoreTable]:
    """The scores of files, whose rows follow each other."""
    return [scores_of(first, end) for first, end in zip((0, *ends[:-1]), ends, strict=True)]
