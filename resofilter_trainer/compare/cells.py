"""The trainings of a comparison, and how they are summarised. Knows numbers, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..scores.statistics import interval
from ..selecting.results import EPOCHS, FULL, RANDOM

NEARLY = 0.02  # of the rows: a model may be unable to score some, and tokens are counted row by row


@dataclass(frozen=True)
class Cell:
    """One training of a comparison.

    Attributes:
        selector: by its name.
        model, scored_by: which is trained, and which has scored, if any has.
        method: of the selector, with its settings.
        keep: the share that was asked for.
        seed: of the training, of the selection where it draws lots, and of the demo's problems.
        rows, kept: of the dataset, and trained on; learnt tokens where it is tokens that are selected.
        metric: held-out, larger is better; None where the training diverged, or could not be.
        selection_seconds, training_seconds: on this machine.
        selection_flops, training_flops: estimated from parameters and tokens.
        length_correlation, loss_correlation: Spearman's, of the score with learnt tokens and with the loss.
        auroc: of the score as a detector of wrong rows, large where those that go are wrong.
        wrong_kept: share of wrong rows among the kept.
        budget: `"epochs"`, as many as the run on all rows; or `"flops"`, as many as cost the same, selecting included.
        failure: why there is no metric.
        tasks: the metric of each task, where the metric is the mean over some.
    """

    selector: str
    keep: float
    seed: int
    rows: int
    kept: int
    metric: float | None
    selection_seconds: float
    selection_flops: float
    training_seconds: float
    training_flops: float
    length_correlation: float | None = None
    loss_correlation: float | None = None
    auroc: float | None = None
    wrong_kept: float | None = None
    model: str = ""
    scored_by: str = ""
    method: str = ""
    budget: str = EPOCHS
    failure: str = ""
    tasks: Mapping[str, float] = field(default_factory=dict)


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A line for each budget, trained model, selector and share, in the order in which they come.

    Columns: the metric with its interval over seeds, `failures` left out; `over_random` and `over_full`, the mean
    difference to the same seed's run on as many random rows, and on all rows, with its interval (paired); `p`, the mean
    ratio to the run on all rows; SDF, kept over all rows; costs, as medians. Runs that failed count in none of these,
    unless all of them did.
    """
    lines: dict[tuple[str, str, str, float], list[Cell]] = {}
    for cell in cells:
        lines.setdefault((cell.budget, cell.model, cell.selector, cell.keep), []).append(cell)
    found = []
    for (budget, model, selector, keep), own in lines.items():
        full = {cell.seed: cell for cell in lines.get((EPOCHS, model, FULL, 1.0), [])}
        random = {cell.seed: cell for cell in lines.get((budget, model, RANDOM, keep), [])}
        sound = [cell for cell in own if cell.metric is not None]
        told = sound or own
        metric, low, high = interval([cell.metric for cell in sound if cell.metric is not None])
        found.append(
            {
                "selector": selector,
                "keep": keep,
                "model": model,
                "budget": budget,
                "scored_by": told[0].scored_by,
                "method": told[0].method,
                "seeds": len(sound),
                "failures": [cell.failure for cell in own if cell.metric is None],
                "metric": metric,
                "metric_low": low,
                "metric_high": high,
                "over_random": _paired([(cell.metric, _as_many(random.get(cell.seed), cell)) for cell in sound]),
                "over_full": _paired([(cell.metric, _metric(full.get(cell.seed))) for cell in sound]),
                "sdf": float(np.mean([cell.kept / cell.rows for cell in told])),
                "p": _mean([_ratio(cell, full.get(cell.seed)) for cell in sound]),
                **{name: _mean([getattr(cell, name) for cell in told]) for name in MEANS},
                **{name: float(np.median([getattr(cell, name) for cell in told])) for name in COSTS},
            }
        )
    return found


MEANS = ("length_correlation", "loss_correlation", "auroc", "wrong_kept")
COSTS = ("selection_seconds", "training_seconds", "selection_flops", "training_flops")


def _as_many(other: Cell | None, cell: Cell) -> float | None:
    """The other's metric, where it was trained on as many rows or nearly."""
    if other is None or abs(other.kept * cell.rows - cell.kept * other.rows) > NEARLY * cell.rows * other.rows:
        return None
    return other.metric


def _paired(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[float, float, float]:
    """The mean difference of the pairs of which both are there, and its interval."""
    return interval([mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None])


def _metric(cell: Cell | None) -> float | None:
    return None if cell is None else cell.metric


def _ratio(cell: Cell, full: Cell | None) -> float | None:
    """To the run on all rows, the mean over tasks; None where that is not there, or scored nothing."""
    if cell.metric is None or full is None or full.metric is None:
        return None
    mine, all_rows = dict(cell.tasks) or {"": cell.metric}, dict(full.tasks) or {"": full.metric}
    if any(not all_rows.get(name) for name in mine):
        return None
    return float(np.mean([mine[name] / all_rows[name] for name in mine]))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def transfer(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, float], dict[tuple[str, str], float]]:
    """How much better than random a method's selection is, by (scored by, trained), where there are several pairs.

    Args:
        lines: of `summarise`.

    Returns:
        For each method and share the mean difference to as many random rows, paired by seed.
    """
    found: dict[tuple[str, float], dict[tuple[str, str], float]] = {}
    for line in lines:
        difference = line["over_random"][0]
        if line["scored_by"] and line["budget"] == EPOCHS and not math.isnan(difference):
            of_method = found.setdefault((line["method"], line["keep"]), {})
            of_method[line["scored_by"], line["model"]] = difference
    return {key: pairs for key, pairs in found.items() if len(pairs) > 1}
