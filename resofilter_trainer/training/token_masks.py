"""Which tokens of a run's rows are learnt, on a batch's labels and in a checkpoint. Knows rows as tokens, no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..config import InputError
from ..data.preparation import PreparedRows
from ..data.surveys import learnt_tokens
from ..io.files import load_arrow, save_arrow
from ..io.made_from import check_made_from
from ..model.gradients import Segment
from ..model.losses import IGNORE
from ..selecting.token_selection import kept_of_rows
from ..tokens.cleaned_dataset import masked

MASKS_FILE, MASKS_KEY = "token_masks.arrow", "resofilter_token_masks"


@dataclass(frozen=True)
class LearntTokens:
    """The N learnt tokens of R rows, row after row.

    Attributes:
        rows: the rows as tokens.
        position: (N,) int32, the position of each token in its row.
        offsets: (R + 1,) int64; the tokens of row r are `offsets[r]:offsets[r + 1]`.
    """

    rows: PreparedRows
    position: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: PreparedRows) -> LearntTokens:
        """The learnt tokens of these rows."""
        position, _ = learnt_tokens(rows.dataset)
        return cls(rows, position, np.concatenate([[0], np.cumsum(rows.num_tokens)]))

    def __len__(self) -> int:
        return len(self.position)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The tokens of some rows, as indices into the N, in the order of the rows."""
        return np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])

    def emptied(self, keep: np.ndarray) -> np.ndarray:
        """(R,) bool, the rows that have tokens and keep none, given `keep` (N,) bool."""
        return (kept_of_rows(keep, self.offsets) == 0) & (self.rows.num_tokens > 0)

    def masked_rows(self, keep: np.ndarray) -> PreparedRows:
        """The rows with the labels of all but the kept tokens masked, given `keep` (N,) bool."""
        dataset = masked(self.rows.dataset, self.offsets, self.position, keep)
        return dataclasses.replace(self.rows, dataset=dataset, num_tokens=kept_of_rows(keep, self.offsets))

    def masked_labels(self, labels: Tensor, segments: Sequence[Segment], rows: np.ndarray, keep: np.ndarray) -> Tensor:
        """The labels of a batch, (B, T), with all but the kept tokens masked.

        Args:
            labels: (B, T), as the collator returns them.
            segments: the places of the n samples in the batch.
            rows: (n,) the row of each sample; negative for fillers, which are masked already.
            keep: (N,) bool, the tokens to keep.

        Raises:
            InputError: the labels differ from those of the dataset.
        """
        found = labels.cpu().numpy().copy()
        for where, row in zip(segments, rows, strict=True):
            if row < 0:
                continue
            own, span = found[where.row, where.tokens], slice(self.offsets[row], self.offsets[row + 1])
            if not np.array_equal(np.flatnonzero(own[1:] != IGNORE) + 1, self.position[span]):
                raise InputError(
                    f"Row {row} learns other tokens in its batch than in the dataset: token_cleaning needs a collator "
                    "that leaves rows and labels as they are."
                )
            own[self.position[span][~keep[span]]] = IGNORE
        return torch.from_numpy(found).to(labels.device)


def save_masks(folder: Path, keep: np.ndarray, stages: Sequence[dict[str, Any]]) -> None:
    """Write into a checkpoint's folder which tokens are learnt, (N,) bool, and what each cleaning kept."""
    state = json.dumps({"tokens": len(keep), "stages": stages})
    save_arrow(pa.table({"keep": np.packbits(keep)}), folder / MASKS_FILE, MASKS_KEY, state)


def load_masks(folder: Path, tokens: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Read what `save_masks` wrote.

    Args:
        folder: the checkpoint's folder.
        tokens: the number N of learnt tokens of the rows.

    Raises:
        InputError: there are no masks, or masks of another number of tokens.
    """
    table, state = load_arrow(folder / MASKS_FILE, MASKS_KEY, "token masks")
    saved = json.loads(state)
    remedy = "Pass the rows that the run began with, or start again without the checkpoint."
    check_made_from(saved, {"tokens": tokens}, f"'{folder}' holds token masks", remedy, ["tokens"])
    return np.unpackbits(table["keep"].to_numpy(), count=tokens).astype(bool), saved["stages"]
