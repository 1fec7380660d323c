"""How the scores are distributed: the scale of their axis, their histogram, and the threshold of a selection.

Knows arrays and provenance; knows no page, no chart and no model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..scores.full_step import decimals, full_step_of
from ..scores.provenance import Provenance

BINS = 60


@dataclass(frozen=True)
class Scale:
    """What the axes show for a score.

    A fresh AdamW step changes no weight by much more than the full step, lr. Where all scores lie below it, and some
    much closer than others, the axes show the distance `1 - score / lr`, on a logarithmic axis. Otherwise they show the
    share of the full step, which weight decay can take above 100 %.

    Attributes:
        bound: lr, where the distance to it is shown.
        full_step: lr, where the share of it is shown instead. Where both are None, the score itself is shown.
        decimals: of the share in per cent, so that the smallest and the largest differ.
    """

    bound: float | None = None
    full_step: float | None = None
    decimals: int = 1

    @property
    def title(self) -> str:
        """The title of the axis."""
        if self.bound is not None:
            return "1 - score / lr"
        return "score" if self.full_step is None else "% of a full step (score / lr)"

    @property
    def linear(self) -> Scale:
        """The scale without a logarithm, for what may lie on both sides of the bound."""
        return self if self.bound is None else dataclasses.replace(self, bound=None, full_step=self.bound)

    @property
    def format(self) -> str:
        """The format of the axis, as d3 writes it: as many digits as it takes."""
        return "~g" if self.full_step is None else f".{self.decimals}f"

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """The values on the axis, in the shape of `scores`."""
        if self.bound is not None:
            return 1 - scores / self.bound
        return scores if self.full_step is None else 100 * scores / self.full_step


@dataclass(frozen=True)
class Bar:
    """The number of kept or of dropped rows whose value lies in `[start, end)`; the last bar includes its end."""

    start: float
    end: float
    decision: str
    rows: int


def scale_of(values: np.ndarray, provenance: Provenance) -> Scale:
    """The scale on which scores are told apart best.

    Args:
        values: the finite scores.
        provenance: their provenance.
    """
    full = full_step_of(provenance.config)
    if full is None or not len(values):
        return Scale()
    distance = 1 - values / full
    digits = decimals(100 * float(np.ptp(values)) / full)
    if 0 < distance.min() < distance.max() / 2:
        return Scale(bound=full, decimals=digits)
    return Scale(full_step=full, decimals=digits)


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
