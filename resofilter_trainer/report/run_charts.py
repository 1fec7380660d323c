"""The charts of a training run: scores and shares by epoch, losses by step, what stands out. Knows numbers, no page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from . import findings
from .axes import PER_CENT, epoch_axis, height_of, score_axis
from .drawing import Figure, Label, end_labels, figure, plot
from .numbers import Numbers
from .timeline import Timeline

PANEL = 170  # px: the height of a chart by step
NAMED = 3  # steps that are named in a chart, at most
MARKED = 200  # left-out steps that are marked, at most
BESIDE = 0.08  # of the run: names of steps that are closer would cover each other
ROOM = (0.12, 0.18)  # below and above, as a share of the values' span
SHOWN = {"loss": "loss", "grad_norm": "gradient norm"}  # what steps stand out by
OF_LOG = {"learning rate": "learning_rate", "kept share": "kept_share"}  # what is logged, and its chart


def figures_of(numbers: Numbers) -> dict[str, Figure | None]:
    """The figures of a run, by name; None where there are no numbers."""
    found: dict[str, Figure | None] = {
        "epochs": epochs_figure(numbers) if any(each.median is not None for each in numbers.epochs) else None,
        "curves": curves_figure(numbers.curves) if numbers.curves else None,
    }
    for what, name in OF_LOG.items():
        own = [entry for entry in numbers.log if entry["what"] == what]
        found[name] = log_figure(what, own) if own else None
    for name in ("loss", "grad_norm"):
        known = numbers.timeline is not None and any(each[name] is not None for each in numbers.timeline.steps)
        found[f"{name}_by_step"] = timeline_figure(numbers.timeline, name) if numbers.timeline and known else None
    return found


def epochs_figure(numbers: Numbers) -> Figure:
    """The median and the quartiles of the scores after each epoch."""
    found, scale = [each for each in numbers.epochs if each.median is not None], numbers.scale.linear
    quartiles = [each for epoch in found for each in (epoch.low, epoch.median, epoch.high)]
    low, median, high = scale.shown(np.array(quartiles, dtype=float)).reshape(-1, 3).T.tolist()
    shown = zip(found, low, median, high, strict=True)
    rows = [{"epoch": epoch.epoch, "low": a, "median": b, "high": c} for epoch, a, b, c in shown]
    x = epoch_axis()
    y = alt.Y("low:Q", title=scale.title, scale=alt.Scale(zero=False), axis=score_axis(scale))
    spans = plot(rows).mark_rule(style="other", strokeWidth=4).encode(x=x, y=y, y2="high:Q")
    points = plot(rows).mark_point(style="kept", filled=True, size=90, opacity=1).encode(x=x, y="median:Q")
    about = "Scores after each epoch: the median as a point, the quartiles as a line."
    return figure(findings.of_epochs(numbers.epochs, numbers.scale), about, spans + points)


def log_figure(what: str, log: Sequence[dict[str, Any]]) -> Figure:
    """A logged number by step: the learning rate, or the share of rows kept.

    Args:
        what: the name of the number.
        log: its entries.
    """
    share = what == "kept share"
    axis = alt.Axis(labelExpr=PER_CENT) if share else alt.Axis(format="~g")
    y = alt.Y("value:Q", title="share of rows kept" if share else what, axis=axis, scale=alt.Scale(zero=True))
    line = plot(log).mark_line(style="kept", interpolate="step-after")
    chart = line.encode(x=alt.X("step:Q", title="step"), y=y, tooltip=["step:Q", "value:Q"])
    return figure(
        findings.of_log(what, [entry["value"] for entry in log]), "By step, as the Trainer logged it.", chart, PANEL
    )


def timeline_figure(timeline: Timeline, name: str) -> Figure:
    """The loss or the gradient norm by step, with the steps that stand out and those whose update was left out.

    Args:
        timeline: the run by step.
        name: `loss` or `grad_norm`.
    """
    title = "loss, nats per token" if name == "loss" else SHOWN[name]
    steps = [{"step": each["step"], name: each[name]} for each in timeline.steps]
    spikes = [
        {"step": each.step, name: getattr(each, name), "spike": each.step}
        for each in timeline.spikes
        if SHOWN[name] in each.by
    ]
    x, y = alt.X("step:Q", title="step"), alt.Y(f"{name}:Q", title=title, scale=_with_room(name, [*steps, *spikes]))
    layers = [plot(steps).mark_line(style="kept", strokeWidth=1.5).encode(x=x, y=y)]
    if timeline.left_out:
        layers += _left_out_layers(timeline, x)
    marked = plot(spikes).mark_point(style="dropped", filled=True, size=80, opacity=1, cursor="pointer")
    layers.append(marked.encode(x=x, y=y, tooltip=["step:Q", f"{name}:Q"]))
    for each in _apart(sorted(spikes, key=lambda each: -float(each[name] or 0)), timeline):
        text = plot([each]).mark_text(style="dropped", dy=-12, fontWeight="bold")
        layers.append(text.encode(x=x, y=y, text=alt.value(f"step {each['step']:,}")))
    about = f"The {title}, of steps {timeline.first:,} to {timeline.last:,}"
    about += f", means of {timeline.per_point} steps." if timeline.per_point > 1 else "."
    if spikes:
        more = len(timeline.spikes) < timeline.stand_out["any"]
        which = f"one of the {len(timeline.spikes)} steps that stand out most" if more else "a step that stands out"
        about += f" A dot is {which}; a click shows its rows, as does the list below."
    if timeline.left_out:
        about += " A cross is a step whose update was left out."
    return figure(findings.of_timeline(timeline, name), about, alt.layer(*layers), PANEL)


def _with_room(name: str, points: Sequence[dict[str, Any]]) -> alt.Scale:
    """A scale that leaves room for names above the largest value and for crosses below the smallest."""
    known = [each[name] for each in points if each[name] is not None]
    low, high = min(known), max(known)
    span = (high - low) or abs(high) or 1.0
    return alt.Scale(domain=[low - ROOM[0] * span, high + ROOM[1] * span], nice=False)


def _left_out_layers(timeline: Timeline, x: alt.X) -> list[alt.Chart]:
    """A line with a cross at its foot for each step whose update was left out, the first ones named."""
    every = -(-len(timeline.left_out) // MARKED)
    steps = [{"step": step} for step in timeline.left_out[::every]]
    foot = alt.value("height")
    layers = [
        plot(steps).mark_rule(style="other", strokeDash=[3, 3]).encode(x=x),
        plot(steps)
        .mark_point(style="ink", shape="M-1,-1L1,1M1,-1L-1,1", size=40, strokeWidth=2.5, opacity=1)
        .encode(x=x, y=foot, tooltip=["step:Q"]),
    ]
    for each in _apart(steps, timeline):
        right = each["step"] > (timeline.first + timeline.last) / 2
        text = plot([each]).mark_text(style="ink", align="right" if right else "left", dx=-8 if right else 8, dy=-9)
        layers.append(text.encode(x=x, y=foot, text=alt.value("left out")))
    return layers


def _apart(steps: Sequence[dict[str, Any]], timeline: Timeline) -> list[dict[str, Any]]:
    """The first of some steps that are far enough from each other to be named."""
    found: list[dict[str, Any]] = []
    width = BESIDE * (timeline.last - timeline.first)
    for each in steps:
        if len(found) < NAMED and all(abs(each["step"] - other["step"]) > width for other in found):
            found.append(each)
    return found


def curves_figure(curves: Sequence[dict[str, Any]]) -> Figure:
    """The mean loss of kept, dropped and random rows by epoch."""
    styles = {"kept": "kept", "dropped": "dropped", "random half": "other"}
    losses = [each["loss"] for each in curves]
    low, high = min(losses), max(losses)
    layers, labels = list[alt.Chart](), list[Label]()
    for name, which in styles.items():
        rows = [each for each in curves if each["rows"] == name]
        if not rows:
            continue
        y = alt.Y(
            "loss:Q",
            title="mean loss, nats per token",
            scale=alt.Scale(domain=[low, high], nice=False) if low < high else alt.Scale(),
        )
        line = plot(rows).mark_line(style=which, point=alt.OverlayMarkDef(size=50, opacity=1, style=which))
        layers.append(line.encode(x=epoch_axis(), y=y, tooltip=["epoch:O", "rows:N", "loss:Q", "count:Q"]))
        labels.append(Label(name, height_of(rows[-1]["loss"], low, high), which))
    about = "Mean loss of the rows that each epoch trained: of those the selection keeps, of those it drops, and of a "
    about += "random half of all."
    return figure(findings.of_curves(curves), about, alt.layer(*layers, *end_labels(labels)))
