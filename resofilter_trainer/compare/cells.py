"""The cells of a comparison, and their summary. Knows numbers; does not know where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..scores.statistics import interval
from ..selecting.results import EPOCHS, FULL, RANDOM

TOLERANCE = 0.02  # of the rows: a model may not score some of them, and shares of tokens are rounded row by row


@dataclass(frozen=True)
class Cell:
    """One training of a comparison.

    Attributes:
        selector: the name of the selector.
        model, scored_by: the trained model, and the model that scored; "" if none did.
        method: the selector's method with its settings.
        keep: the share to keep.
        seed: the seed of the training, of a random selection, and of the demo's problems.
        rows, kept: the size of the dataset and of what was trained on, in rows; in learnt tokens where tokens are
            selected.
        metric: the held-out metric, larger is better; None if the training failed or was not possible.
        selection_seconds, training_seconds: the time on this machine.
        selection_flops, training_flops: an estimate from parameters and tokens.
        length_correlation, loss_correlation: Spearman's correlation of the score with learnt tokens and with the loss.
        auroc: the AUROC of the score as a detector of wrong rows, large where wrong rows are dropped first.
        wrong_kept: the share of wrong rows among the kept.
        budget: `"epochs"`, as many as the run on all rows; or `"flops"`, so many that selecting and training together
            cost as much as the run on all rows.
        failure: why there is no metric.
        tasks: the metric of each task, if the metric is their mean.
        held_out_loss: the mean loss per learnt token of the rows of `loss_dataset`, in nats; None without any.
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
    held_out_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name; the held-out loss, which earlier versions lack, only where it is measured."""
        found = asdict(self)
        return found if self.held_out_loss is not None else {k: v for k, v in found.items() if k != "held_out_loss"}


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A line for each budget, trained model, selector and share, in the order of the cells.

    Columns: the metric with its interval over seeds; `over_random` and `over_full`, the mean difference to the same
    seed's run on as many random rows and on all rows, with its interval (paired); `p`, the mean ratio to the run on all
    rows; `sdf`, kept over all rows; `held_out_loss`, with its interval, where it is measured; the costs, as medians.
    Failed runs are listed in `failures` and count in no other column, unless all runs failed.
    """
    lines: dict[tuple[str, str, str, float], list[Cell]] = {}
    for cell in cells:
        lines.setdefault((cell.budget, cell.model, cell.selector, cell.keep), []).append(cell)
    found = []
    for (budget, model, selector, keep), own in lines.items():
        full = {cell.seed: cell for cell in lines.get((EPOCHS, model, FULL, 1.0), [])}
        random = {cell.seed: cell for cell in lines.get((budget, model, RANDOM, keep), [])}
        sound = [cell for cell in own if cell.metric is not None]
        counted = sound or own
        metric, low, high = interval([cell.metric for cell in sound if cell.metric is not None])
        found.append(
            {
                "selector": selector,
                "keep": keep,
                "model": model,
                "budget": budget,
                "scored_by": counted[0].scored_by,
                "method": counted[0].method,
                "seeds": len(sound),
                "failures": [cell.failure for cell in own if cell.metric is None],
                "metric": metric,
                "metric_low": low,
                "metric_high": high,
                "over_random": _paired([(cell.metric, _of_same_size(random.get(cell.seed), cell)) for cell in sound]),
                "over_full": _paired([(cell.metric, _metric(full.get(cell.seed))) for cell in sound]),
                "sdf": float(np.mean([cell.kept / cell.rows for cell in counted])),
                "p": _mean([_ratio(cell, full.get(cell.seed)) for cell in sound]),
                **_held_out_loss(sound),
                **{name: _mean([getattr(cell, name) for cell in counted]) for name in MEANS},
                **{name: float(np.median([getattr(cell, name) for cell in counted])) for name in COSTS},
            }
        )
    return found


def _held_out_loss(cells: Sequence[Cell]) -> dict[str, tuple[float, float, float]]:
    """The mean held-out loss with its interval over seeds, as `held_out_loss`; nothing where it is not measured."""
    known = [cell.held_out_loss for cell in cells if cell.held_out_loss is not None]
    return {"held_out_loss": interval(known)} if known else {}


MEANS = ("length_correlation", "loss_correlation", "auroc", "wrong_kept")
COSTS = ("selection_seconds", "training_seconds", "selection_flops", "training_flops")


def _of_same_size(other: Cell | None, cell: Cell) -> float | None:
    """The other cell's metric, if it was trained on as many rows, up to the tolerance."""
    if other is None or abs(other.kept * cell.rows - cell.kept * other.rows) > TOLERANCE * cell.rows * other.rows:
        return None
    return other.metric


def _paired(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[float, float, float]:
    """The mean difference of the complete pairs, and its interval."""
    return interval([mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None])


def _metric(cell: Cell | None) -> float | None:
    return None if cell is None else cell.metric


def _ratio(cell: Cell, full: Cell | None) -> float | None:
    """The ratio to the run on all rows, its mean over tasks; None if that run is missing, or a metric of it is 0."""
    if cell.metric is None or full is None or full.metric is None:
        return None
    mine, all_rows = dict(cell.tasks) or {"": cell.metric}, dict(full.tasks) or {"": full.metric}
    if any(not all_rows.get(name) for name in mine):
        return None
    return float(np.mean([mine[name] / all_rows[name] for name in mine]))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def transfer(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, float], dict[tuple[str, str], float]]:
    """How much better than a random selection a method is, for each pair of a scoring and a trained model.

    Args:
        lines: the lines of `summarise`.

    Returns:
        For each method and share with several such pairs, the mean difference to as many random rows, paired by seed,
        by (scored by, trained).
    """
    found: dict[tuple[str, float], dict[tuple[str, str], float]] = {}
    for line in lines:
        difference = line["over_random"][0]
        if line["scored_by"] and line["budget"] == EPOCHS and not math.isnan(difference):
            of_method = found.setdefault((line["method"], line["keep"]), {})
            of_method[line["scored_by"], line["model"]] = difference
    return {key: pairs for key, pairs in found.items() if len(pairs) > 1}
