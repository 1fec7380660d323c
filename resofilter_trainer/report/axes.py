"""The axes that several charts have. Knows Altair and the scale of the scores, no number of a report."""

from __future__ import annotations

import altair as alt

from .distribution import Scale

PER_CENT = "round(100 * datum.value) + ' %'"  # the labels of shares


def epoch_axis() -> alt.X:
    """The epochs, from left to right."""
    return alt.X("epoch:O", title="epoch", axis=alt.Axis(labelAngle=0))


def height_of(value: float, low: float, high: float) -> float:
    """Where a value lies on a linear axis from `low` at 0 to `high` at 1; 0.5 where they are equal."""
    return 0.5 if low == high else (value - low) / (high - low)


def score_scale(scale: Scale) -> alt.Scale:
    """The axis of the scores: larger ones to the right and at the top, also where the distance to lr is drawn."""
    if scale.kind == "linear":
        return alt.Scale(zero=False, nice=False)
    found = alt.Scale(type=scale.kind, domain=[scale.low, scale.high], reverse=True, nice=False)
    if scale.kind == "symlog":
        found.constant = scale.constant
    return found


def score_axis(scale: Scale) -> alt.Axis:
    """Its labels: shares in per cent with as many digits as it takes, or the scores."""
    if scale.full_step is None:
        return alt.Axis(format="~g", tickCount=6)
    if scale.kind == "linear":
        return alt.Axis(labelExpr=f"format(datum.value, '.{scale.decimals}~f') + ' %'", tickCount=5)
    label = "format(100 * (1 - datum.value), '.12~f') + ' %'"
    return alt.Axis(values=scale.ticks(), labelExpr=label, labelOverlap="greedy")
