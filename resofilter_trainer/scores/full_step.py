"""Scores as shares of a full step: the unit in which people read them, and when they say too little. Knows arrays only.

The first step of a fresh AdamW moves a weight by `lr * (g / (|g| + eps) + weight_decay * w)`: by the full step, lr,
where the gradient is far above eps. So `score / lr` is about the share of W_up's entries that moved by the full step.
It is close to 1 for every row of a model that knows little of the data; weight decay can take it a little above 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import SATURATING

LITTLE = 5e-4  # of a full step: the range of the middle 90 % of the rows, below which scores are saturated
LITTLE_RANGE = 1e-3  # the same for the whole range of the scores, where the scores themselves are not at hand
MIDDLE = (0.05, 0.95)  # quantiles: some rows that differ say nothing of the others, of which half are dropped
NEAR = 0.5  # of a full step: what is below is small, not saturated
LEAST_ROWS = 3
MOST_DIGITS = 12


def full_step_of(config: Mapping[str, Any]) -> float | None:
    """lr, for scores that can be read as shares of a full step; None for other updates, norms and criteria.

    Args:
        config: the settings of the scores, as in their provenance.
    """
    by_entry = config.get("update") in SATURATING and config.get("norm", "mean_abs") == "mean_abs"
    return config.get("lr") if by_entry else None


def is_saturated(scores: np.ndarray, config: Mapping[str, Any]) -> bool:
    """Whether scores lie so close together at the full step that their ranking rests on the smallest gradients.

    Args:
        scores: (N,) finite scores.
        config: their settings, as in their provenance. The L2 norm of a saturating update has no bound that is known
            here; the scores themselves are near it then.
    """
    if not may_saturate(config, len(scores)):
        return False
    return lie_close(np.quantile(scores, [MIDDLE[0], 0.5, MIDDLE[1]]), full_step_of(config) or float(np.median(scores)))


def may_saturate(config: Mapping[str, Any], count: int) -> bool:
    """Whether scores of these settings can be saturated, and there are enough of them to tell."""
    return config.get("update") in SATURATING and count >= LEAST_ROWS


def lie_close(quantiles: np.ndarray, full: float) -> bool:
    """Whether scores lie close together at the full step.

    Args:
        quantiles: the lower end of their middle, their median, and its upper end, see `MIDDLE`.
        full: the full step, or what stands for it.
    """
    low, middle, high = quantiles / full if full else (0.0, 0.0, 0.0)
    return bool(middle > NEAR and high - low < LITTLE)


def span_of(scores: np.ndarray, full_step: float | None) -> str:
    """The smallest and the largest score in words, with as many digits as it takes to tell them apart.

    Args:
        scores: (N,) finite scores.
        full_step: lr, to show shares of a full step; None for the numbers themselves.
    """
    if not len(scores):
        return "none"
    low, high = float(scores.min()), float(scores.max())
    if full_step is None:
        digits = _digits(high - low, max(abs(low), abs(high)))
        return f"{low:.{digits}g} to {high:.{digits}g}"
    return f"{percent(low, full_step, high - low)} to {percent(high, full_step, high - low)} of a full step"


def percent(score: float, full_step: float, span: float) -> str:
    """A score as a share of the full step, with the decimals that `span`, a difference of scores, asks for."""
    return f"{100 * score / full_step:.{decimals(100 * span / full_step)}f} %"


def decimals(span: float) -> int:
    """The number of decimals, at least 1, with which numbers that lie within `span` differ."""
    return 1 if span <= 0 else min(max(1 - math.floor(math.log10(span)), 1), MOST_DIGITS)


def _digits(span: float, largest: float) -> int:
    """The number of significant digits, at least 4, with which numbers up to `largest` differ within `span`."""
    return 4 if span <= 0 else min(max(2 + math.ceil(math.log10(largest / span)), 4), MOST_DIGITS + 3)
