"""The demo in one run: the callback measures and filters inside SFTTrainer. Needs no network.

two epochs on: all rows | all, then a random half | all, then the kept half | the half kept by scores at the start
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..report import PAGE
from ..scores.drift import drop_rate_by_moment
from ..scores.score_table import ScoreTable
from ..scores.statistics import auroc, rank_correlation
from ..selecting.selection import KEPT, Selection
from ..selecting.shares import drop_share
from ..training.callback import ResonanceCallback
from ..training.run import STATE
from .run import KEEP, ROWS, Stages, make_data, train_with, training_arguments

INTERVALS = 10  # of an epoch, in each of which the drop rate is counted


@dataclass(frozen=True)
class Outcome:
    """One training.

    Attributes:
        name: the name of the run.
        rows: the number of rows of each epoch.
        wrong_share: the share of wrong rows in the last epoch.
        accuracy: the exact match on the held-out problems after the training.
    """

    name: str
    rows: list[int]
    wrong_share: float
    accuracy: float


@dataclass(frozen=True)
class Ranking:
    """How well scores find the wrong rows, and how well they agree with the scores before training.

    Attributes:
        name: the name of the scores.
        auroc: the AUROC as a detector of the wrong rows.
        wrong_share_kept: the share of wrong rows in the kept half.
        rank_correlation_with_before: the rank correlation with the scores at the starting weights.
        same_decision_as_before: the share of rows on which both decide alike.
        drop_rate_by_moment: the share of rows dropped in each tenth of the epoch.
    """

    name: str
    auroc: float
    wrong_share_kept: float
    rank_correlation_with_before: float
    same_decision_as_before: float
    drop_rate_by_moment: list[float]


@dataclass(frozen=True)
class RandomHalf:
    """A policy that keeps a random half of the rows."""

    seed: int

    def select(self, scores: ScoreTable) -> Selection:
        """Keep a random half of the rows, whatever their scores."""
        keep = np.zeros(len(scores), dtype=bool)
        keep[np.random.default_rng(self.seed).choice(len(scores), size=round(KEEP * len(scores)), replace=False)] = True
        return Selection(keep, [KEPT if each else "random" for each in keep], {}, scores.provenance.to_json())


def run(output: Path, seed: int, rows: int = ROWS) -> dict[str, object]:
    """Run the demo, print its table, and write the runs' scores and selections and `results.json` to `output`."""
    started = time.perf_counter()
    stages = Stages(5)
    dataset, wrong, held_out = make_data(seed, rows)
    outcomes = []
    for name, callback in {
        "all": ResonanceCallback(keep=1.0),
        "random": ResonanceCallback(selector=RandomHalf(seed)),
        "training": ResonanceCallback(keep=KEEP, report=True),
        "before": ResonanceCallback(keep=KEEP, when="before"),
    }.items():
        stages.next(f"the run '{name}' on {rows:,} rows, and answering {len(held_out)} problems")
        args = copy.copy(training_arguments(output, seed))
        args.output_dir = str(output / name)
        accuracy = train_with(dataset, held_out, args, [callback])
        keeps = [selection.keep for selection in callback.selections]
        sizes = [int(keep.sum()) for keep in keeps]
        outcomes.append(Outcome(name, sizes, float(wrong[keeps[-1]].mean()), accuracy))
    stages.next("comparing the scores")
    rankings = compare(output, wrong)
    results: dict[str, object] = {
        "rows": [dataclasses.asdict(outcome) for outcome in outcomes],
        "scores": [dataclasses.asdict(ranking) for ranking in rankings],
        "seed": seed,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"Report, with the reason for each dropped row: {output / 'training' / STATE / PAGE}")
    print(f"Scores, selections and results.json: {output}  ({time.perf_counter() - started:.0f} s)")
    print(table(outcomes, rankings))
    return results


def compare(output: Path, wrong: np.ndarray) -> list[Ranking]:
    """Compare the scores of the first epoch, measured and corrected for drift, with those at the starting weights."""
    first = ScoreTable.load(output / "training" / STATE / "scores-epoch-1.parquet")
    before = ScoreTable.load(output / "before" / STATE).column("score")
    dropped_before = ~drop_share(before, KEEP, "largest")
    rankings = []
    for name, scores in (
        ("measured", first.column("measured")),
        ("corrected", first.column("score")),
        ("before", before),
    ):
        dropped = ~drop_share(scores, KEEP, "largest")
        rates = drop_rate_by_moment(dropped, first.column("step"), INTERVALS).round(3).tolist()
        rankings.append(
            Ranking(
                name,
                auroc=auroc(scores, wrong),
                wrong_share_kept=float(wrong[~dropped].mean()),
                rank_correlation_with_before=rank_correlation(scores, before),
                same_decision_as_before=float((dropped == dropped_before).mean()),
                drop_rate_by_moment=rates,
            )
        )
    return rankings


def table(outcomes: Sequence[Outcome], rankings: Sequence[Ranking]) -> str:
    """The results as a text table."""
    lines = [f"{'run':12}{'rows of each epoch':>20}{'wrong rows in the last':>24}{'accuracy':>10}"]
    for each in outcomes:
        sizes = ", ".join(map(str, each.rows))
        lines.append(f"{each.name:12}{sizes:>20}{each.wrong_share:24.1%}{each.accuracy:10.3f}")
    title = f"{'scores':12}{'AUROC':>8}{'wrong kept':>12}{'rank corr. with before':>24}{'same decision':>15}"
    lines += ["", f"{title}   dropped in each tenth of the epoch"]
    for row in rankings:
        agreement = f"{row.rank_correlation_with_before:24.3f}{row.same_decision_as_before:15.1%}"
        rates = " ".join(f"{rate:.2f}" for rate in row.drop_rate_by_moment)
        lines.append(f"{row.name:12}{row.auroc:8.3f}{row.wrong_share_kept:12.1%}{agreement}   {rates}")
    return "\n".join(["", *lines, ""])
