"""Whether a step of a run stands out from those before it, and what is told of one that does. Knows numbers only.

    level    the median of the last 100 steps, of which there must be 20
    noise    1.4826 * median |value - level| over them, a standard deviation where values are normal;
             at least a thousandth of the level
    a step stands out if value > level + 6 * noise

of the loss, or of the logarithm of the gradient's norm, which varies by factors. A value that is no number stands out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .spikes import FLOOR, NORMAL

LAST, LEAST, DEVIATIONS = 100, 20, 6.0


@dataclass(frozen=True)
class SpikingRow:
    """A row of a step that stands out.

    Attributes:
        sample_id: the position of the row in the user's dataset.
        loss: the mean over its learnt tokens.
        num_tokens: the number of its learnt tokens.
        share_of_loss: its part of the step's loss; the parts of all rows add up to 1.
        share_of_update: its part of the sum of the rows' resonances, each times its weight in the loss; NaN where they
            are not known before the step.
        text: prompt and answer; None where the dataset has none.
    """

    sample_id: int
    loss: float
    num_tokens: int
    share_of_loss: float
    share_of_update: float
    text: tuple[str, str] | None = None


@dataclass(frozen=True)
class SpikingStep:
    """A step that stands out, before its update.

    Attributes:
        step: its number, counted from 1.
        loss: its loss, as the Trainer logs it.
        grad_norm: the norm of its gradient before clipping; NaN where it is not known.
        usual_loss, usual_grad_norm: the medians of the last steps.
        by: what stands out: `"loss"`, `"grad_norm"`, or `"loss and grad_norm"`.
        rows: its rows with a learnt token, those first that add most to the loss above the usual one.
    """

    step: int
    loss: float
    grad_norm: float
    usual_loss: float
    usual_grad_norm: float
    by: str
    rows: tuple[SpikingRow, ...]


def stands_out(value: float, earlier: Sequence[float], by_factor: bool = False) -> bool:
    """Whether a value is far above earlier ones, as above.

    Args:
        value: the value.
        earlier: those of the steps before it, of which the last 100 count; values that are no number do not.
        by_factor: whether logarithms are compared.
    """
    known = np.array(earlier[-LAST:], dtype=np.float64)
    known = known[np.isfinite(known) & ((known > 0) | (not by_factor))]
    if len(known) < LEAST:
        return False
    if not math.isfinite(value):
        return True
    if by_factor:
        known, value = np.log(known), math.log(value) if value > 0 else -math.inf
    level = float(np.median(known))
    least = FLOOR if by_factor else FLOOR * abs(level)
    return value > level + DEVIATIONS * max(NORMAL * float(np.median(np.abs(known - level))), least)


def usual(earlier: Sequence[float]) -> float:
    """The median of the last steps; NaN where none is known."""
    known = [each for each in earlier[-LAST:] if math.isfinite(each)]
    return float(np.median(known)) if known else math.nan
