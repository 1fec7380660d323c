"""Tables of scores for a report, and what it counts. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from helpers.tables import make_provenance, make_token_scores
from resofilter_trainer.report import Contents
from resofilter_trainer.report.numbers import Numbers, numbers_of
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting.token_selection import TokenSelection, TokenSelector

WHY = "no completion"


def make_table(score: Sequence[float | None], provenance: Any = None, **columns: Sequence[Any]) -> ScoreTable:
    """Rows of None have no score and nothing else."""
    missing = np.array([value is None for value in score], dtype=bool)
    table = pa.table(
        {
            "sample_id": np.arange(len(score)),
            "score": pa.array(score, pa.float64()),
            **{name: pa.array(np.asarray(values), mask=missing) for name, values in columns.items()},
            "reason": pa.array([WHY if each else None for each in missing], pa.string()),
        }
    )
    return ScoreTable(table, provenance or make_provenance(rows=len(score)))


def usual(rows: int = 100, provenance: Any = None, **changes: Any) -> ScoreTable:
    """A table without anything to warn about, except for the changes."""
    draw = np.random.default_rng(0)
    columns = {name: draw.permutation(rows) + 1 for name in ("score", "loss", "num_tokens", "length")} | changes
    return make_table(columns.pop("score").tolist(), provenance, **columns)


def counted(scores: ScoreTable, copies: int = 0, **more: Any) -> Numbers:
    """The numbers of a report without text and groups."""
    return numbers_of(Contents(scores, **more), None, None, copies)


def cleaning() -> TokenSelection:
    """Cleaned tokens of four rows: rows 0 and 2 have tokens, and row 0 keeps two."""
    losses = [[(3.0, 0.0), (2.0, 0.0), (1.0, 0.0)], [(0.5, 0.4)]]
    return TokenSelector(0.5).select(make_token_scores(losses, provenance=make_provenance(rows=4)))
