"""Small tables of scores and token scores. Knows no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from resofilter_trainer.scores.provenance import Provenance, Trust
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.scores.token_scores import TokenScores

WHY = "empty completion"


def make_provenance(**changes: Any) -> Provenance:
    made = Provenance(
        model="tiny",
        weights="0123456789abcdef",
        tokenizer="t0",
        template="c0",
        dataset="d0",
        rows=6,
        config={"eps": 1e-8, "n_layers": 2},
        preparation={"max_length": 64, "prompt_column": None},
        versions={"torch": "2.13.0"},
        source={"dataset": "rows.jsonl"},
        trust=Trust(agreement=0.99, rows=6, saturation=None),
    )
    return dataclasses.replace(made, **changes)


def make_scores(
    values: Sequence[float | None], ids: Sequence[int] | None = None, provenance: Provenance | None = None
) -> ScoreTable:
    """Row i has the score `values[i]`, and the prompt of row j if `i // 3 == j // 3`; a row with None has a reason."""
    ids = range(len(values)) if ids is None else ids
    half = [None if value is None else value / 2 for value in values]
    table = pa.table(
        {
            "sample_id": pa.array(ids, pa.int64()),
            "score": pa.array(values, pa.float64()),
            "loss": pa.array(half, pa.float64()),
            "num_tokens": pa.array([None if value is None else 3 + i for i, value in enumerate(values)], pa.int64()),
            "prompt": pa.array(
                [None if value is None else 2**62 + i // 3 for i, value in enumerate(values)], pa.int64()
            ),
            "layer_2": pa.array(values, pa.float64()),
            "layer_3": pa.array(half, pa.float64()),
            "reason": pa.array([WHY if value is None else None for value in values], pa.string()),
        }
    )
    return ScoreTable(table, provenance or make_provenance(rows=len(values)))


def files_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


Row = Sequence[tuple[float, float]]  # the losses of each learnt token under the base and the reference model


def make_token_scores(
    rows: Sequence[Row], tokens: Sequence[int] | None = None, provenance: Provenance | None = None
) -> TokenScores:
    """Row r has `len(rows[r])` learnt tokens. By default, their ids are 0, 1, ... over all rows."""
    flat = [pair for row in rows for pair in row]
    return TokenScores(
        sample_id=np.arange(len(rows), dtype=np.int64) * 2,
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        position=np.array([5 + place for row in rows for place in range(len(row))], dtype=np.int32),
        token=np.array(range(len(flat)) if tokens is None else tokens, dtype=np.int32),
        base=np.array([base for base, _ in flat], dtype=np.float32),
        reference=np.array([reference for _, reference in flat], dtype=np.float32),
        provenance=provenance or make_provenance(rows=len(rows)),
    )
