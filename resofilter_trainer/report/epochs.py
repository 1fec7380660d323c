"""How a training run develops: its rows and scores by epoch, its log by step. Knows arrays, no trainer and no chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .contents import Epoch

LOGGED = {"learning_rate": "learning rate", "resofilter/kept_share": "kept share"}  # names in the log, and on the page
MAX_STEPS = 1000  # of one line of the chart


@dataclass(frozen=True)
class EpochNumbers:
    """The rows and the scores of one epoch; None where they were not saved.

    Attributes:
        epoch: the epoch, counted from 1.
        rows: the number of rows that it trained on.
        readmitted: the number of these rows that the epoch before did not train on.
        dropped: the number of rows that the epoch before trained on and this one did not.
        low, median, high: the quartiles of its scores.
    """

    epoch: int
    rows: int | None
    readmitted: int | None
    dropped: int | None
    low: float | None
    median: float | None
    high: float | None


def epochs_of(epochs: Sequence[Epoch]) -> list[EpochNumbers]:
    """Count rows and take quartiles of the scores, epoch by epoch."""
    found, last = [], None
    for epoch in epochs:
        rows = readmitted = dropped = None
        if epoch.selection is not None:
            keep = epoch.selection.keep
            rows = int(keep.sum())
            if last is not None:
                readmitted, dropped = int((keep & ~last).sum()), int((last & ~keep).sum())
            last = keep
        quartiles: list[float | None] = [None, None, None]
        if epoch.scores is not None:
            values = epoch.scores.column("score")[epoch.scores.scored]
            values = values[np.isfinite(values)]
            quartiles = [float(each) for each in np.quantile(values, [0.25, 0.5, 0.75])] if len(values) else quartiles
        found.append(EpochNumbers(epoch.number, rows, readmitted, dropped, *quartiles))
    return found


def steps_of(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The learning rate and the kept share by step, from the Trainer's log; an even sample of a long log."""
    found = []
    for name, shown in LOGGED.items():
        own = [entry for entry in log if "step" in entry and name in entry and np.isfinite(float(entry[name]))]
        thinned = np.unique(np.linspace(0, len(own) - 1, min(len(own), MAX_STEPS)).astype(int)).tolist() if own else []
        found += [{"step": own[i]["step"], "what": shown, "value": float(own[i][name])} for i in thinned]
    return found
