"""What a training run writes: the scores and the selection of every epoch, and the files' names. Knows no models."""

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

NAME = "resofilter"  # the folder in a run's output_dir, its state in a checkpoint, the prefix of its scalars
TOKENS_FILE = "token_cleaning.json"
LOG_FILE = "log.json"  # the Trainer's log, and what was reported to its trackers
IDS_FILE = "rows.parquet"  # of a stream: which id the row of each sample_id has
FULL, RANDOM = "full", "random"  # the methods of a comparison that the others are compared with
EPOCHS, FLOPS = "epochs", "flops"  # what is equal in the trainings of a comparison
PAGE, PAGE_FILES = "report.html", "report"  # a report, and the folder of what is beside it
DROPPED_FILE = "dropped.parquet"  # in that folder: all dropped rows
COMPARISON_FILE, SUMMARY_FILE = "comparison.json", "summary.json"  # of a comparison, of token cleaning


def kept_share(line: Mapping[str, Any]) -> float:
    """The share of rows or tokens that a line of a comparison keeps.

    It is the share that was asked for. A selector that has none is trained once, with 1; its share is what it kept.
    """
    kept = line.get("sdf")  # not in every line of an earlier version
    if line["selector"] == FULL:
        return 1.0
    return float(line["keep"] if line["keep"] < 1 or kept is None else kept)


@dataclass
class Results:
    """The results of one run.

    Attributes:
        scores: the scores of every row of the user's dataset after the last complete epoch; None before.
        selections: the rows that each epoch trains on, in the order of the epochs.
        token_stages: for each stage of token cleaning, what it kept, in numbers.
        log: what was reported to the trackers, with its step and epoch.
    """

    scores: ScoreTable | None = None
    selections: list[Selection] = field(default_factory=list)
    token_stages: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path, ended: int) -> None:
        """Write the scores, also under the number of the epoch that has ended, and every selection.

        Args:
            folder: the folder to write to.
            ended: the number of complete epochs.
        """
        if self.token_stages:
            with replacing(folder / TOKENS_FILE) as temporary:
                temporary.write_text(json.dumps(self.token_stages, indent=2) + "\n")
        if self.scores is None:
            return
        self.scores.save(folder)
        if ended:
            self.scores.save(folder / f"scores-epoch-{ended}.parquet")
        for epoch, selection in enumerate(self.selections):
            if epoch >= ended or not (folder / selection_file(epoch)).exists():
                selection.save(folder / selection_file(epoch))

    def save_log(self, folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the Trainer's log and this one, in the order of their steps, beside the scores, if there are any."""
        if self.scores is not None:
            entries = sorted([*entries, *self.log], key=lambda entry: entry["step"])
            with replacing(folder / LOG_FILE) as temporary:
                temporary.write_text(json.dumps(entries, default=str) + "\n")

    def save_selections(self, folder: Path) -> None:
        """Write every selection."""
        for epoch, selection in enumerate(self.selections):
            selection.save(folder / selection_file(epoch))

    def load_selections(self, folder: Path, count: int) -> None:
        """Read what `save_selections` wrote, of `count` epochs. Raises InputError where one is missing."""
        self.selections = [Selection.load(folder / selection_file(epoch)) for epoch in range(count)]


def remove_stale(folder: Path) -> None:
    """Remove the files of an earlier run, which may have had more epochs."""
    for stale in (
        *folder.glob("*-epoch-*.parquet"),
        *(folder / name for name in (TOKENS_FILE, TOKEN_SCORES_FILE, LOG_FILE, IDS_FILE)),
    ):
        stale.unlink(missing_ok=True)


def selection_file(epoch: int) -> str:
    """The file of an epoch's selection. Epochs are counted from 0, and from 1 in names of files."""
    return f"selection-epoch-{epoch + 1}.parquet"
