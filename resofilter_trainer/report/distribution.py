"""How the scores are distributed: the scale of their axis, their histogram, and the threshold of a selection.

Knows arrays and provenance; knows no page, no chart and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import SATURATING
from ..scores.provenance import Provenance

BINS = 60


@dataclass(frozen=True)
class Scale:
    """What the axes show for a score.

    An update may bound the score (a fresh AdamW step changes no weight by much more than lr). Where scores lie close
    to the bound, the axes show the distance `1 - score / lr`, on a logarithmic axis.

    Attributes:
        bound: lr, where the distance to it is shown; None where the score itself is shown.
    """

    bound: float | None = None

    @property
    def title(self) -> str:
        """The title of the axis."""
        return "score" if self.bound is None else "1 - score / lr"

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """The values on the axis, in the shape of `scores`."""
        return scores if self.bound is None else 1 - scores / self.bound


@dataclass(frozen=True)
class Bar:
    """The number of kept or of dropped rows whose value lies in `[start, end)`; the last bar includes its end."""

    start: float
    end: float
    decision: str
    rows: int


def bound_of(provenance: Provenance) -> float | None:
    """The bound of the score, weight decay aside; None where the measured update has none, or it is not known."""
    config, trust = provenance.config, provenance.trust
    if trust is None:  # as for the scores of a training run
        bounded = config.get("update") in SATURATING and config.get("norm", "mean_abs") == "mean_abs"
    else:
        bounded = trust.saturation is not None
    return config.get("lr") if bounded else None


def scale_of(values: np.ndarray, provenance: Provenance) -> Scale:
    """The scale on which scores are told apart best.

    Args:
        values: the finite scores.
        provenance: their provenance.
    """
    bound = bound_of(provenance)
    if bound is None or not len(values):
        return Scale()
    distance = 1 - values / bound
    spread = distance.min() > 0 and distance.min() < distance.max() / 2
    return Scale(bound) if spread else Scale()


def histogram(values: np.ndarray, keep: np.ndarray, log: bool) -> list[Bar]:
    """Count kept and dropped rows in `BINS` intervals between the smallest and the largest value.

    Args:
        values: (N,) finite values.
        keep: (N,) bool, the rows that are kept.
        log: whether the intervals are equal on a logarithmic axis.
    """
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    if low == high:
        width = abs(low) / 20 or 0.5
        edges = np.array([low - width, low + width])
    else:
        edges = (np.geomspace if log else np.linspace)(low, high, BINS + 1)
        edges[[0, -1]] = low, high  # undo rounding
        edges = np.unique(edges)  # there may be fewer than BINS numbers between neighbouring values
    bars = []
    for decision, which in (("kept", keep), ("dropped", ~keep)):
        counts = np.histogram(values[which], edges)[0]
        bars += [
            Bar(float(start), float(end), decision, int(rows))
            for start, end, rows in zip(edges, edges[1:], counts, strict=False)
            if rows
        ]
    return bars


def threshold_of(values: np.ndarray, keep: np.ndarray) -> float | None:
    """The last kept score, beyond which every row is dropped; None where no single score separates them.

    Args:
        values: (N,) finite scores.
        keep: (N,) bool, the rows that are kept.
    """
    if keep.all() or not keep.any():
        return None
    kept, dropped = values[keep], values[~keep]
    if kept.max() <= dropped.min():
        return float(kept.max())
    return float(kept.min()) if kept.min() >= dropped.max() else None
