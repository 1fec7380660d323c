"""The few numbers at the head of the page. Knows numbers, no chart and no page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..scores.full_step import decimals
from ..scores.score_table import ScoreTable
from .columns import with_finite_score
from .numbers import Numbers

MOST = 4  # tiles: a row of the page


@dataclass(frozen=True)
class Tile:
    """A number and what it says.

    Attributes:
        value: the number, written out.
        name: what it is.
        about: what it is measured against.
    """

    value: str
    name: str
    about: str


def tiles_of(numbers: Numbers, scores: ScoreTable) -> list[Tile]:
    """The numbers that the verdict rests on, those that are known.

    Args:
        numbers: the numbers of the report.
        scores: the scores of N rows.
    """
    v = numbers.verdict
    found = [Tile(f"{100 * v.kept / max(v.rows, 1):.0f} %", "of the rows are kept", f"{v.kept:,} of {v.rows:,}")]
    if v.tokens:
        found.append(
            Tile(
                f"{100 * v.tokens_kept / v.tokens:.0f} %", "of the learnt tokens", f"{v.tokens_kept:,} of {v.tokens:,}"
            )
        )
    trust = scores.provenance.trust
    if trust is not None and trust.agreement is not None:
        found.append(Tile(f"{trust.agreement:.3f}", "rank agreement", f"of {trust.rows:,} rows that were scored twice"))
    spread = _spread(numbers, scores)
    if spread is not None:
        found.append(spread)
    if numbers.timeline is not None and len(found) < MOST:
        t = numbers.timeline
        count = t.stand_out["any"]
        left_out = f", {len(t.left_out):,} left out" if t.left_out else ""
        found.append(
            Tile(
                f"{count:,}",
                "step stands out" if count == 1 else "steps stand out",
                f"of {t.last - t.first + 1:,}{left_out}",
            )
        )
    return found


def _spread(numbers: Numbers, scores: ScoreTable) -> Tile | None:
    """How far the middle 90 % of the scores lie apart, in shares of the full step; None for other scores."""
    full, ranked = numbers.scale.full_step, with_finite_score(scores)
    if full is None or not ranked.any():
        return None
    low, high = np.quantile(scores.column("score")[ranked], [0.05, 0.95])
    span = 100 * float(high - low) / full
    return Tile(
        f"{span:.{decimals(span)}f} %", "spread of the scores", "middle 90 % of the rows, in shares of a full step"
    )
