"""What each chart shows, in one sentence: its title. Knows numbers, no page and no chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .distribution import Scale
from .epochs import EpochNumbers
from .paper_figures import Layer, Quarter
from .timeline import Timeline

NO_RELATION, WEAK, CLOSE = 0.1, 0.4, 0.9  # absolute rank correlations
SAME = 0.05  # relative difference below which two means are called equal


def of_scores(kept: int, dropped: int, scale: Scale, threshold: float | None, kept_below: bool) -> str:
    """What separates the dropped rows from the kept ones.

    Args:
        kept, dropped: the numbers of rows with a score.
        scale: the scale of the scores.
        threshold: the last kept score, or None.
        kept_below: whether the kept scores are the smaller ones.
    """
    rows = kept + dropped
    if not dropped:
        return f"All {rows:,} rows with a score are kept."
    if not kept:
        return f"All {rows:,} rows with a score are dropped."
    if threshold is None:
        return f"{dropped:,} of {rows:,} rows are dropped, and no single score separates them."
    moved = "with a score" if scale.full_step is None else "that move a share of entries"
    side = "above" if kept_below else "below"
    return f"Rows {moved} {side} {scale.text(threshold)} are dropped: {dropped:,} of {rows:,}."


def of_correlation(name: str, correlation: float | None) -> str:
    """How the score goes with another number of a row.

    Args:
        name: the other number, such as `loss`.
        correlation: the rank correlation with the score.
    """
    if correlation is None:
        return f"Too few rows have a score and a {name} to tell how the two go together."
    number = f"(rank correlation {correlation:+.3f})"
    size, more = abs(correlation), "higher" if correlation > 0 else "lower"
    if size < NO_RELATION:
        return f"The score does not go with the {name} {number}."
    if size >= CLOSE:
        return f"The score ranks almost as the {name} {'does' if correlation > 0 else 'does backwards'} {number}."
    tend = "have" if size >= WEAK else "tend to have slightly"
    return f"Rows with a higher {name} {tend} {more} scores {number}."


def of_layers(layers: Sequence[Layer]) -> str:
    """In which layer rows move W_up most."""
    most = max(layers, key=lambda each: (each.low + each.high, -each.layer))
    if len(layers) == 1:
        return f"Only layer {most.layer} was measured."
    least = min(layers, key=lambda each: (each.low + each.high, each.layer))
    return f"Rows move W_up most in layer {most.layer} and least in layer {least.layer}."


def of_quarters(quarters: Sequence[Quarter], what: str) -> str:
    """How the rows with the highest scores differ from those with the lowest.

    Args:
        quarters: the quarters.
        what: `tokens` or `frequency`.
    """
    means = {each.rows: getattr(each, what) for each in quarters}
    low, high = means["lowest quarter"], means["highest quarter"]
    change = high / low - 1 if low and high is not None else 0.0
    if what == "tokens":
        if abs(change) < SAME:
            return "The rows with the highest scores are as long as those with the lowest."
        return f"The rows with the highest scores are {_times(change, 'longer', 'shorter')} than those with the lowest."
    if abs(change) < SAME:
        return "The words of the rows with the highest scores are as common as of those with the lowest."
    words = _times(change, "more common", "rarer")
    return f"The words of the rows with the highest scores are {words} than of those with the lowest."


def of_ratios(ratios: Sequence[dict[str, Any]]) -> str:
    """Which selector reached the highest metric."""
    best = max(ratios, key=lambda each: each["metric"])
    share = f"{100 * best['keep']:.0f} % of the rows or tokens"
    return f"The highest metric is {best['metric']:.3g}, of {best['selector']} with {share}."


def of_epochs(epochs: Sequence[EpochNumbers], scale: Scale) -> str:
    """Where the median score went."""
    found = [each for each in epochs if each.median is not None]
    first, last = (scale.linear.text(float(each.median or 0.0)) for each in (found[0], found[-1]))
    if len(found) == 1 or first == last:
        return f"The median score is {last} after epoch {found[-1].epoch}."
    return f"The median score is {first} after epoch {found[0].epoch} and {last} after epoch {found[-1].epoch}."


def of_log(what: str, values: Sequence[float]) -> str:
    """How a logged number goes from the first step to the last."""
    first, last, most = values[0], values[-1], max(values)
    shown = (lambda each: f"{100 * each:.0f} %") if what == "kept share" else (lambda each: f"{each:.3g}")
    name = "share of rows kept" if what == "kept share" else what
    if len(values) == 1 or min(values) == most:
        return f"The {name} is {shown(last)}."
    peak = f", at most {shown(most)}" if most > max(first, last) else ""
    way = "falls" if last < first else "rises" if last > first else "goes"
    return f"The {name} {way} from {shown(first)} to {shown(last)}{peak}."


def of_timeline(timeline: Timeline, name: str) -> str:
    """How the loss or the gradient norm goes, and how many steps stand out.

    Args:
        timeline: the run by step.
        name: `loss` or `grad_norm`.
    """
    values = [each[name] for each in timeline.steps if each[name] is not None]
    ends = max(1, len(values) // 10)
    first, last = np.mean(values[:ends]), np.mean(values[-ends:])
    title = "loss" if name == "loss" else "gradient norm"
    count = timeline.stand_out[name]
    told = f"{count:,} steps stand out" if count else "no step stands out"
    if count == 1:
        listed = [f"step {each.step:,}" for each in timeline.spikes if title in each.by]
        told = f"{listed[0] if listed else '1 step'} stands out"
    way = "falls" if last < first else "rises"
    return f"The {title} {way} from {first:.3g} to {last:.3g}; {told}."


def of_left_out(timeline: Timeline) -> str:
    """Which steps' updates were left out; empty where none was."""
    steps, most = timeline.left_out, 20
    if not steps:
        return ""
    if len(steps) == 1:
        return f"The update of step {steps[0]:,} was left out."
    listed = ", ".join(f"{step:,}" for step in steps[:most]) + (", …" if len(steps) > most else "")
    return f"The updates of {len(steps):,} steps were left out: {listed}."


def of_curves(curves: Sequence[dict[str, Any]]) -> str:
    """What the losses of kept and dropped rows were when they were last trained."""
    last = {each["rows"]: each for each in curves}  # the last epoch of each
    told = [f"{name} rows at {last[name]['loss']:.3g}" for name in ("kept", "dropped") if name in last]
    return f"The mean loss ends for {' and for '.join(told)}." if told else "The mean loss of a random half."


def _times(change: float, more: str, less: str) -> str:
    return f"{100 * abs(change):.0f} % {more if change > 0 else less}"
