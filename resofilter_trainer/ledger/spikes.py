"""Steps that stand out, and the rows that explain them. Knows a line for each step and the lines of one, no file.

The level of a step is the median of the steps around it. Near the start, where losses fall fast, as many steps before
it as after it count: a falling curve has no spike there, and the first step cannot be one. The noise is the median
distance of the steps around it from their own levels, as a standard deviation.

    score = (value - level) / max(1.4826 * median |value - level|, level / 1000)

of the loss, and of the logarithm of the gradient norm (with 1 / 1000 as the least noise), as norms vary by factors. A
loss that is not finite stands out infinitely where some other of the run is finite. A norm that is not finite does so
only where its loss or the next one is not finite, either: fp16 leaves the other such steps out. The rows of a spike are
ranked by what they add:

    of the loss           weight * (loss - level) / (the step's loss - level), which adds up to 1
    of the update         weight * (resonance - the step's mean resonance) / sum(weight * resonance), adds up to 0

by the first where the loss stands out, by the second where only the gradient norm does and layers are measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import number, whole_number
from .steps import contributions

if TYPE_CHECKING:
    import pandas as pd

NORMAL = 1.4826  # a standard deviation of normal noise, in median absolute deviations
FLOOR = 1e-3  # of the level: the least noise
FEWEST = 11  # steps of a window
THRESHOLD, WINDOW = 4.0, 101  # by default
SHARE_OF_LOSS, SHARE_OF_UPDATE, EXPLAINS = "share_of_loss", "share_of_update", "explains"


@dataclass(frozen=True)
class Spike:
    """A step that stands out.

    Attributes:
        step, epoch, loss, grad_norm: see `Ledger.steps`.
        loss_level, grad_norm_level: the level around it.
        loss_score, grad_norm_score: how far it stands out, in robust standard deviations; NaN where not known.
        by: what stands out: `"loss"`, `"grad_norm"`, or `"loss and grad_norm"`.
        rows: the lines of the step, see `Ledger.step`, with `explains`, what each adds; the largest first.
    """

    step: int
    epoch: int
    loss: float
    loss_level: float
    loss_score: float
    grad_norm: float
    grad_norm_level: float
    grad_norm_score: float
    by: str
    rows: pd.DataFrame = dataclasses.field(repr=False, compare=False)

    @property
    def score(self) -> float:
        """How far the step stands out, by what stands out most."""
        return float(np.fmax(self.loss_score, self.grad_norm_score))

    def explained(self, rows: pd.DataFrame) -> Spike:
        """The spike with its rows."""
        return dataclasses.replace(self, rows=rows)


def stands_out(values: np.ndarray, window: int, by_factor: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The level of each value, and by how many robust standard deviations it is above; see above.

    Args:
        values: (S,) of each step; NaN where not known.
        window: the number of steps around each, itself among them.
        by_factor: whether logarithms are compared; values that have none are not known.

    Returns:
        (S,) levels and (S,) scores, NaN for a value that is not known, and where none is finite.
    """
    import pandas as pd

    infinite, half = values == np.inf, window // 2
    if by_factor:
        values = np.log(np.where(values > 0, values, np.nan))
    known = pd.Series(np.where(np.isfinite(values), values, np.nan))
    around = {"window": 2 * half + 1, "center": True, "min_periods": 1}
    level = known.rolling(**around).median().to_numpy().copy()
    last = np.minimum(2 * np.arange(min(half, len(values))), len(values) - 1)  # as many after a step as before it
    level[: len(last)] = known[: 2 * half].expanding(min_periods=1).median().to_numpy()[last]
    above = known.to_numpy() - level
    noise = NORMAL * pd.Series(np.abs(above)).rolling(**around).median().to_numpy()
    least = FLOOR if by_factor else np.maximum(FLOOR * np.abs(level), np.finfo(np.float32).tiny)
    score = above / np.maximum(noise, least)
    score[infinite] = np.inf if known.notna().any() else np.nan
    return np.exp(level) if by_factor else level, score


def spikes_of(
    steps: pd.DataFrame, threshold: float = THRESHOLD, window: int = WINDOW, most: int | None = None
) -> list[Spike]:
    """The spikes without their rows, the one that stands out most first.

    Args:
        steps: a line for each step, see `Ledger.steps`.
        threshold: the least score of a spike.
        window: see `stands_out`.
        most: the number of spikes to return; None for all.
    """
    threshold, window = number("threshold", threshold, above=0), whole_number("window", window, least=FEWEST)
    loss, grad_norm = steps["loss"].to_numpy().copy(), steps["grad_norm"].to_numpy()
    loss[np.isnan(loss) & (steps["lines"] > 0).to_numpy()] = np.inf  # of a step that has a loss, which is broken
    loss_level, loss_score = stands_out(loss, window)
    grad_level, grad_score = stands_out(grad_norm, window, by_factor=True)
    broken = loss_score == np.inf
    grad_score[(grad_norm == np.inf) & ~(broken | np.append(broken[1:], False))] = np.nan
    score = np.fmax(loss_score, grad_score)
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf, posinf=np.inf), kind="stable")
    found = []
    for at in order[:most].tolist():
        if not score[at] >= threshold:
            break
        out = {"loss": loss_score[at] >= threshold, "grad_norm": grad_score[at] >= threshold}
        found.append(
            Spike(
                step=int(steps["step"][at]),
                epoch=int(steps["epoch"][at]),
                loss=float(steps["loss"][at]),
                loss_level=float(loss_level[at]),
                loss_score=float(loss_score[at]),
                grad_norm=float(grad_norm[at]),
                grad_norm_level=float(grad_level[at]),
                grad_norm_score=float(grad_score[at]),
                by=" and ".join(name for name, stands in out.items() if stands),
                rows=steps.head(0),
            )
        )
    return found


def ranked(rows: pd.DataFrame, spike: Spike) -> pd.DataFrame:
    """The lines of a spike's step with `explains`, what each adds, the largest first."""
    measured = np.isfinite(rows["resonance"].to_numpy()).any()
    of_update = spike.by == "grad_norm" and measured
    explains = (added_update if of_update else added_loss)(rows, spike.loss_level)
    return rows.assign(**{EXPLAINS: explains}).sort_values(EXPLAINS, ascending=False, kind="stable", ignore_index=True)


def added_loss(rows: pd.DataFrame, level: float) -> np.ndarray:
    """(R,) what each line adds to the step's loss above its level, as a share; those that are not finite share all."""
    weight, loss = rows["weight"].to_numpy(np.float64), rows["loss"].to_numpy(np.float64)
    broken = (weight != 0) & ~np.isfinite(loss)
    if broken.any():
        return broken / broken.sum()
    added = contributions(weight, loss - level)
    total = added.sum()
    return added / total if total > 0 else added


def added_update(rows: pd.DataFrame, level: float) -> np.ndarray:
    """(R,) what each line adds to the step's update above what its weight gives it, as a share of the update."""
    weight, resonance = rows["weight"].to_numpy(np.float64), rows["resonance"].to_numpy(np.float64)
    counts = np.isfinite(resonance) & (weight != 0)
    weight, resonance = np.where(counts, weight, 0.0), np.where(counts, resonance, 0.0)
    update = weight @ resonance
    if not update > 0:
        return np.zeros(len(rows))
    added: np.ndarray = weight * (resonance - update / weight.sum()) / update
    return added


def shares(rows: pd.DataFrame, resonance: np.ndarray) -> dict[str, np.ndarray]:
    """Each line's part of its step's loss and update, see `Ledger.step`."""
    weight = rows["weight"].to_numpy(np.float64)
    loss = contributions(weight, rows["loss"].to_numpy(np.float64))
    update = contributions(weight, resonance)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {SHARE_OF_LOSS: loss / loss.sum(), SHARE_OF_UPDATE: update / update.sum()}
