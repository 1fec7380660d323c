"""How the scores are distributed: the scale of their axis, their histogram, and the threshold of a selection.

Knows arrays and provenance; knows no page, no chart and no model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..scores.full_step import decimals, full_step_of, percent
from ..scores.provenance import Provenance

BINS = 60
FAR = 10  # times as far from the full step as most scores: then a linear axis shows most of them as one
APART = 3  # times the constant of a symlog axis: what is closer to 100 % has no room for a label
FEW = 3  # powers of ten on an axis, up to which 2 and 5 times these are labelled, too


@dataclass(frozen=True)
class Scale:
    """What the axes show for a score.

    A fresh AdamW step moves no entry of W_up by much more than the full step, lr, so that `score / lr` is about the
    share of the entries that it moved. The axes show this share. Where it is close to 100 % for many rows, as for a
    model that knows little of the data, they are logarithmic in the distance `1 - score / lr`; weight decay takes some
    scores above lr, and then the axis is so on both sides of 100 %.

    Attributes:
        full_step: lr; None where scores are no shares of it, and the axes show the scores.
        kind: `linear`, in the share or the score; `log` or `symlog`, in the distance.
        constant: of `symlog`: the distance from 100 % within which the axis is almost linear.
        decimals: of a share in per cent, so that the smallest and the largest differ.
        low, high: the smallest and the largest value on the axis.
    """

    full_step: float | None = None
    kind: Literal["linear", "log", "symlog"] = "linear"
    constant: float = 1.0
    decimals: int = 1
    low: float = 0.0
    high: float = 1.0

    @property
    def title(self) -> str:
        """The title of the axis."""
        return "score" if self.full_step is None else "share of entries moved (score / lr)"

    @property
    def linear(self) -> Scale:
        """The linear scale, for values that lie close together."""
        return dataclasses.replace(self, kind="linear")

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """The values on the axis, in the shape of `scores`: the distance, the share in per cent or the score."""
        if self.full_step is None:
            return scores
        share = scores / self.full_step
        return 100 * share if self.kind == "linear" else 1 - share

    def heights(self, values: np.ndarray) -> np.ndarray:
        """Where values lie on the axis, from 0 for the smallest score to 1 for the largest, in their shape."""
        low, high, places = (self._even(np.asarray(each, float)) for each in (self.low, self.high, values))
        if low == high:
            return np.full_like(places, 0.5)
        return (places - low) / (high - low) if self.kind == "linear" else (high - places) / (high - low)

    def text(self, score: float) -> str:
        """A score in words, with as many digits as tell it from its neighbours on the axis."""
        if self.full_step is None:
            return f"{score:.4g}"
        if self.kind == "linear":
            return f"{100 * score / self.full_step:.{self.decimals}f} %"
        return percent(score, self.full_step, abs(self.full_step - score))

    def edges(self) -> np.ndarray:
        """The (B + 1,) edges of intervals that are equal on the axis, at most `BINS`."""
        if self.low == self.high:
            width = abs(self.low) / 20 or 0.5
            return np.array([self.low - width, self.low + width])
        even = np.linspace(self._even(np.array(self.low)), self._even(np.array(self.high)), BINS + 1)
        edges = even
        if self.kind == "log":
            edges = np.exp(even)
        if self.kind == "symlog":
            edges = np.sign(even) * self.constant * np.expm1(np.abs(even))
        edges[[0, -1]] = self.low, self.high  # undo rounding
        return np.unique(edges)  # there may be fewer than BINS numbers between neighbouring values

    def ticks(self) -> list[float]:
        """The values to label; empty for a linear axis, which chooses them itself."""
        if self.kind == "linear":
            return []
        least = self.low if self.kind == "log" else APART * self.constant
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(max(abs(self.low), abs(self.high))))
        times = (1, 2, 5) if last - first <= FEW and self.kind == "log" else (1,)
        sizes = [factor * 10.0**power for power in range(first, last + 1) for factor in times]
        values = sizes if self.kind == "log" else [*(-size for size in reversed(sizes)), 0.0, *sizes]
        return [value for value in values if self.low <= value <= self.high]

    def _even(self, values: np.ndarray) -> np.ndarray:
        """Values as they are spaced on the axis, ascending."""
        if self.kind == "log":
            return np.log(values)
        return values if self.kind == "linear" else np.sign(values) * np.log1p(np.abs(values) / self.constant)


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
    if not len(values):
        return Scale()
    if full is None:
        return Scale(low=float(values.min()), high=float(values.max()))
    distance = 1 - values / full
    scale = Scale(full, decimals=decimals(100 * float(np.ptp(values)) / full))
    away = np.abs(distance[distance != 0])
    if 0 < distance.min() < distance.max() / 2:
        scale = dataclasses.replace(scale, kind="log")
    elif distance.min() <= 0 and len(away) and away.max() > FAR * np.median(away):
        scale = dataclasses.replace(scale, kind="symlog", constant=float(np.quantile(away, 0.1)))
    shown = scale.shown(values)
    return dataclasses.replace(scale, low=float(shown.min()), high=float(shown.max()))


def histogram(values: np.ndarray, keep: np.ndarray, scale: Scale) -> list[Bar]:
    """Count kept and dropped rows in intervals that are equal on the axis, between the smallest and the largest value.

    Args:
        values: (N,) finite values on the scale.
        keep: (N,) bool, the rows that are kept.
        scale: the scale.
    """
    if not len(values):
        return []
    edges, bars = scale.edges(), []
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
