"""The demo's picture: the scores of right and wrong rows with the threshold, and the accuracies. Knows matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..scores.score_table import ScoreTable
from ..selecting.selection import Selection

RIGHT, WRONG, NEUTRAL = "#0072b2", "#d55e00", "#999999"  # distinct for colour-blind readers


@dataclass(frozen=True)
class Outcome:
    """One of the four trainings.

    Attributes:
        name: the name of the set of rows.
        rows: the number of rows.
        wrong_share: the share of wrong rows among them.
        accuracy: the exact match on the held-out problems after the training.
    """

    name: str
    rows: int
    wrong_share: float
    accuracy: float


def draw(scores: ScoreTable, selection: Selection, wrong: np.ndarray, outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the picture and write it to `path`."""
    from matplotlib.figure import Figure  # of the extra `report`; the demo's rows and model need none

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lr = scores.provenance.config["lr"]
    distance = np.maximum(1 - scores.column("score") / lr, 1e-9)  # scores saturate at lr
    bins = np.geomspace(distance.min(), distance.max(), 60)
    left.hist(
        [distance[~wrong], distance[wrong]], bins=bins, stacked=True, color=[RIGHT, WRONG], label=["right", "wrong"]
    )
    left.axvline(
        distance[selection.keep].min(), color="black", linestyle="--", label="threshold: rows to the right are dropped"
    )
    left.set(xscale="log", xlabel="1 - score / lr (larger changes to the right)", ylabel="rows", title="Resonance")
    left.invert_xaxis()
    left.legend()
    colours = [NEUTRAL, NEUTRAL, RIGHT, NEUTRAL]
    bars = right.bar([each.name for each in outcomes], [each.accuracy for each in outcomes], color=colours)
    right.bar_label(bars, [f"{each.accuracy:.3f}\n{each.wrong_share:.0%} wrong" for each in outcomes])
    right.set(ylabel="held-out exact match", title="After training on", ylim=(0, 1.1))
    figure.savefig(path, dpi=120)
