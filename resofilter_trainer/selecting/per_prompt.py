"""The policy that chooses among the answers to one prompt. Knows nothing of models: sees arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from ..config import InputError, check_kind, one_of, whole_number, with_known_keywords
from ..scores.score_table import OF_PROMPT, PROMPT, ScoreTable
from .data_selector import DataSelector
from .groups import check_groups
from .selection import Selection
from .shares import Side


@with_known_keywords
@dataclass(frozen=True)
class OnePerPrompt:
    """Keeps of the rows with the same prompt the one with the lowest loss (GRAPE: Zhang et al., arXiv 2502.04194).

    A row whose prompt no other row has stays, and so does a row without a prompt. Of equal values the first row stays.

    Attributes:
        by: the column to rank by, or several, as for `DataSelector`.
        drop: the end to drop; by default as for `DataSelector`, so that of losses the lowest stays.
        keep: the number of rows to keep of each prompt.

    Raises:
        InputError: a setting is not allowed.
    """

    by: str | Sequence[str] = "loss"
    drop: Side | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        if self.drop is not None:
            one_of("drop", self.drop, get_args(Side))
        object.__setattr__(self, "by", DataSelector(by=self.by).by)  # checks the columns
        whole_number("keep, the number of rows of each prompt,", self.keep, least=1)

    def select(self, scores: ScoreTable, *, groups: Sequence[Any] | None = None) -> Selection:
        """Keep or drop, with a reason, for every row of the dataset.

        Args:
            scores: the scores of all rows, with the column `prompt`.
            groups: instead of that column, what rows with the same prompt have in common, N values in the dataset's
                order; None for a row without a prompt.

        Raises:
            InputError: the scores have no column `prompt`, or there is not a group for every row.
        """
        check_kind("scores", scores, ScoreTable, "a ScoreTable, as score_dataset returns")
        prompts = _prompts(scores) if groups is None else _codes(groups, len(scores))
        ranking = DataSelector(by=self.by, drop=self.drop)
        values, lower = ranking.values(scores), ranking.end(scores) == "largest"
        rows = np.flatnonzero(scores.scored & np.isfinite(values))
        why = ranking.unranked(scores, values)
        for row, best in _passed_over(values if lower else -values, prompts, rows, self.keep):
            which = "the same" if values[row] == values[best] else f"a {'lower' if lower else 'higher'}"
            why[row] = f"row {best}{OF_PROMPT}{which} {ranking.what}"
        return Selection.of(self, scores, why)


def _passed_over(values: np.ndarray, prompts: np.ndarray, rows: np.ndarray, keep: int) -> list[tuple[int, int]]:
    """The rows that are not among the `keep` smallest of their prompt, each with the row of the smallest value.

    Args:
        values: (N,) values, of which the small ones stay.
        prompts: (N,) the number of each row's prompt; -1 without one.
        rows: the rows to choose among, ascending.
        keep: the number of rows to keep of each prompt.
    """
    rows = rows[prompts[rows] >= 0]
    order = rows[np.lexsort((values[rows], prompts[rows]))]  # stable: of equal values, the first row comes first
    starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    best = np.repeat(starts, np.diff(starts, append=len(order)))
    out = np.arange(len(order)) - best >= keep
    return list(zip(order[out].tolist(), order[best[out]].tolist(), strict=True))


def _prompts(scores: ScoreTable) -> np.ndarray:
    """(N,) the number of each row's prompt, -1 without one."""
    if PROMPT not in scores.table.column_names:
        raise InputError(
            "The scores do not say which rows have the same prompt: they were measured in a training run, or by "
            "version 0.1.0. Score the rows again, or pass groups=, such as the column of the prompts."
        )
    codes = scores.table[PROMPT].combine_chunks().dictionary_encode().indices
    found: np.ndarray = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False)
    if scores.scored.any() and (found[scores.scored] < 0).all():
        raise InputError(
            "No row has a prompt apart from what is learnt: score with assistant_only_loss=True, or with prompt and "
            "completion, or pass groups=, such as the column of the prompts."
        )
    return found.astype(np.int64)


def _codes(groups: Sequence[Any], rows: int) -> np.ndarray:
    """(N,) the number of each row's group, -1 for None."""
    check_groups(groups, rows)
    names = [None if each is None else repr(each) for each in groups]  # a prompt may be a list of messages
    codes: np.ndarray = pd.factorize(np.array(names, dtype=object))[0]
    return codes
