"""What a training run leaves: scores and the selection of every epoch, and the folder they lie in. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io.files import replacing
from ..scores.score_table import ScoreTable
from ..scores.token_scores import TOKEN_SCORES_FILE
from .selection import Selection

NAME = "resofilter"  # of the folder in a training's output_dir, of its state and its scalars
TOKENS_FILE = "token_cleaning.json"
LOG_FILE = "log.json"  # the Trainer's
FULL, RANDOM = "full", "random"  # selectors of a comparison that the others are compared with
EPOCHS, FLOPS = "epochs", "flops"  # what two trainings of a comparison have as many of
COMPARISON_FILE, SUMMARY_FILE = "comparison.json", "summary.json"  # of a comparison, of a cleaning of tokens


@dataclass
class Results:
    """Of one run.

    Attributes:
        scores: a line for every row of the user's dataset, as of the last epoch that has ended; None before.
        selections: which rows each epoch trained on, first epoch first.
        token_stages: what each cleaning of tokens kept, in numbers.
    """

    scores: ScoreTable | None = None
    selections: list[Selection] = field(default_factory=list)
    token_stages: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path, ended: int) -> None:
        """Write the scores, also under the name of the epoch that has ended (0: none has), and every selection."""
        if self.token_stages:
            with replacing(folder / TOKENS_FILE) as part:
                part.write_text(json.dumps(self.token_stages, indent=2) + "\n")
        if self.scores is None:
            return
        self.scores.save(folder)
        if ended:
            self.scores.save(folder / f"scores-epoch-{ended}.parquet")
        for epoch, selection in enumerate(self.selections):
            if epoch >= ended or not (folder / selection_file(epoch)).exists():
                selection.save(folder / selection_file(epoch))

    def save_log(self, folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the Trainer's log beside the scores, if there are any."""
        if self.scores is not None:
            with replacing(folder / LOG_FILE) as part:
                part.write_text(json.dumps(list(entries), default=str) + "\n")

    def save_selections(self, folder: Path) -> None:
        """Write every selection."""
        for epoch, selection in enumerate(self.selections):
            selection.save(folder / selection_file(epoch))

    def load_selections(self, folder: Path, count: int) -> None:
        """Undo `save_selections`. Raises InputError where one is missing."""
        self.selections = [Selection.load(folder / selection_file(epoch)) for epoch in range(count)]


def remove_stale(folder: Path) -> None:
    """Remove what an earlier run left of its epochs: this one may have fewer."""
    for stale in (
        *folder.glob("*-epoch-*.parquet"),
        *(folder / name for name in (TOKENS_FILE, TOKEN_SCORES_FILE, LOG_FILE)),
    ):
        stale.unlink(missing_ok=True)


def selection_file(epoch: int) -> str:
    """Its name, for an epoch counted from 0; people count from 1."""
    return f"selection-epoch-{epoch + 1}.parquet"
