"""Every number of a report, gathered. Knows which module counts what, no page, no chart and no model.

The page and the charts show these numbers only, and they come from the library's own functions, so that page and
library cannot differ. A new number goes into the module that its subject belongs to:

    verdict         rows kept and dropped, reasons, warnings
    distribution    the scale of the scores, their histogram, the threshold
    what_if         what another share would keep
    paper_figures   layers, quarters and ratios, as in ResoFilter's figures
    epochs          rows and scores by epoch, the log by step
    timeline        losses by step and by epoch, steps that stand out, from a run's ledger
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .columns import correlation_with_score, with_finite_score
from .contents import Contents
from .distribution import Bar, Scale, histogram, scale_of, threshold_of
from .epochs import EpochNumbers, epochs_of, steps_of
from .paper_figures import Layer, Quarter, layers_of, quarters_of, ratios_of
from .timeline import Timeline, curves_of, timeline_of
from .verdict import Verdict, verdict_of, warnings_of
from .what_if import WhatIf, selector_of, what_if


@dataclass(frozen=True)
class Numbers:
    """All numbers of a report; empty or None where there is nothing to count.

    Attributes:
        verdict: the rows kept and dropped, and why.
        warnings: what makes the verdict doubtful.
        scale, histogram: the axis of the scores, and the rows by score.
        threshold: the score beyond which all rows are dropped, where a single score separates them.
        kept_below: whether rows beyond it have larger scores.
        length_correlation, loss_correlation: rank correlations of the score with learnt tokens and with loss.
        what_if: what another share would keep.
        quarters, layers: token counts and word frequency by score, and the change by layer.
        epochs, log: rows and scores by epoch of a training run; learning rate and kept share by step.
        ratios: a comparison's metric by kept share.
        timeline: a run by step, and the steps that stand out.
        curves: the mean loss of kept, dropped and random rows by epoch.
    """

    verdict: Verdict
    warnings: list[str]
    scale: Scale
    histogram: list[Bar]
    threshold: float | None
    kept_below: bool
    length_correlation: float | None
    loss_correlation: float | None
    what_if: WhatIf | None
    quarters: list[Quarter]
    layers: list[Layer]
    epochs: list[EpochNumbers]
    log: list[dict[str, Any]]
    ratios: list[dict[str, Any]]
    timeline: Timeline | None
    curves: list[dict[str, Any]]


def numbers_of(contents: Contents, groups: Sequence[str] | None, frequency: np.ndarray | None, copies: int) -> Numbers:
    """Count everything that a report shows.

    Args:
        contents: what was measured and selected; with scores.
        groups: (N,) the group of each row, or None.
        frequency: (N,) of `word_frequency`, NaN where it was not counted; None without text.
        copies: the number of rows that repeat the text of an earlier row.
    """
    scores, selection = contents.scores, contents.decided()
    assert scores is not None, "numbers need scores"
    ranked = with_finite_score(scores)
    values, keep = scores.column("score")[ranked], selection.keep[ranked]
    scale = scale_of(values, scores.provenance)
    threshold = threshold_of(values, keep)
    length, loss = (correlation_with_score(scores, name) for name in ("num_tokens", "loss"))
    return Numbers(
        verdict=verdict_of(contents, scores),
        warnings=warnings_of(contents, scores, length, loss, copies),
        scale=scale,
        histogram=histogram(scale.shown(values), keep, scale),
        threshold=threshold,
        kept_below=threshold is not None and bool(values[keep].max() <= values[~keep].min()),
        length_correlation=length,
        loss_correlation=loss,
        what_if=what_if(selector_of(selection), scores, groups) if ranked.any() else None,
        quarters=quarters_of(scores, frequency),
        layers=[] if contents.layers is None else layers_of(contents.layers),
        epochs=epochs_of(contents.epochs),
        log=steps_of(contents.log),
        ratios=ratios_of(contents.comparison),
        timeline=timeline_of(contents.ledger),
        curves=curves_of(contents.ledger, selection.keep),
    )
