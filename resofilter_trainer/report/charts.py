"""The charts of a report, as Vega-Lite specifications. Knows the numbers and Altair, no page.

Page and PNG share one definition: the page embeds the specification, and `save_png` draws it without a browser.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert

from ..io.files import replacing
from ..scores.score_table import ScoreTable
from .distribution import Scale
from .numbers import Numbers
from .paper_figures import Quarter
from .timeline import Timeline

VERSIONS = vl_convert.get_vegalite_versions()  # oldest first
SCHEMA = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
VEGA_LITE = SCHEMA if SCHEMA in VERSIONS else VERSIONS[-1]
KEPT_COLOUR, DROPPED_COLOUR, OTHER = "#0072b2", "#d55e00", "#767676"  # distinct for colour-blind readers
DECISIONS = alt.Scale(domain=["kept", "dropped"], range=[KEPT_COLOUR, DROPPED_COLOUR])
HEIGHT, WIDTH = 220, 460
KINDS = ("means of rows", "entries of W_up")
NAMES = (  # of all charts
    *("scores", "length", "loss", "layers", "length_of_quarters", "frequency_of_quarters", "ratios", "epochs", "steps"),
    *("timeline", "curves"),
)
Specification = dict[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.VConcatChart


def charts_of(numbers: Numbers, points: Sequence[dict[str, Any]]) -> dict[str, Specification]:
    """The specification of every chart that has numbers, by name.

    Args:
        numbers: the numbers to draw.
        points: one entry for each shown row, see `points_of`.
    """
    found: dict[str, Chart | None] = {
        "scores": scores_chart(numbers) if numbers.histogram else None,
        "length": points_chart(points, numbers.scale, "tokens", "learnt tokens"),
        "loss": points_chart(points, numbers.scale, "loss", "loss, nats per token"),
        "layers": layers_chart(numbers) if numbers.layers else None,
        "length_of_quarters": length_chart(numbers.quarters) if numbers.quarters else None,
        "frequency_of_quarters": frequency_chart(numbers.quarters),
        "ratios": ratios_chart(numbers.ratios) if numbers.ratios else None,
        "epochs": epochs_chart(numbers) if any(each.median is not None for each in numbers.epochs) else None,
        "steps": steps_chart(numbers.log) if numbers.log else None,
        "timeline": None if numbers.timeline is None else timeline_chart(numbers.timeline),
        "curves": curves_chart(numbers.curves) if numbers.curves else None,
    }
    return {name: specification(chart) for name, chart in found.items() if chart is not None}


def points_of(scores: ScoreTable, keep: np.ndarray, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Score, learnt tokens, loss and decision of the rows that have a finite score.

    Args:
        scores: the scores of N rows.
        keep: (N,) bool, the rows that are kept.
        rows: the rows to show.
    """
    columns = {"tokens": "num_tokens", "loss": "loss", "score": "score"}
    known = [name for name in columns if columns[name] in scores.table.column_names]
    values = {name: scores.column(columns[name]) for name in known}
    return [
        {
            "row": row,
            "decision": "kept" if keep[row] else "dropped",
            **{name: float(values[name][row]) for name in known if np.isfinite(values[name][row])},
        }
        for row in rows
        if np.isfinite(values["score"][row])
    ]


def scores_chart(numbers: Numbers) -> Chart:
    """The histogram of the scores, kept and dropped rows stacked, with the threshold."""
    scale = _score_scale(numbers.scale)
    title = numbers.scale.title + ("" if numbers.scale.bound is None else " (larger changes to the right)")
    below: dict[float, int] = {}  # the dropped rows of a bin stand on its kept rows
    stacked = []
    for bar in numbers.histogram:
        foot = below.get(bar.start, 0)
        below[bar.start] = foot + bar.rows
        stacked.append({**dataclasses.asdict(bar), "foot": foot, "top": foot + bar.rows})
    bars = (
        alt.Chart(_data(stacked))
        .mark_rect()
        .encode(
            x=alt.X("start:Q", title=title, scale=scale, axis=_numbers_axis(numbers.scale.format)),
            x2="end:Q",
            y=alt.Y("foot:Q", title="rows", scale=alt.Scale(zero=True)),
            y2="top:Q",
            color=_decision(),
            tooltip=["decision:N", "start:Q", "end:Q", "rows:Q"],
        )
    )
    if numbers.threshold is None:
        return _sized(bars)
    at = _data([{"threshold": float(numbers.scale.shown(np.array(numbers.threshold)))}])
    rule = alt.Chart(at).mark_rule(strokeDash=[4, 4], color=OTHER, strokeWidth=2)
    return _sized(bars + rule.encode(x=alt.X("threshold:Q", scale=scale), tooltip=["threshold:Q"]))


def points_chart(points: Sequence[dict[str, Any]], scale: Scale, name: str, title: str) -> Chart | None:
    """The score of the shown rows against another of their numbers; None where no row has it.

    Args:
        points: the entries of `points_of`.
        scale: the scale of the score.
        name, title: the other number in `points`, and the title of its axis.
    """
    points = [point for point in points if name in point]
    if not points:
        return None
    shown = scale.shown(np.array([point["score"] for point in points])).tolist()
    rows = [
        {"row": point["row"], "decision": point["decision"], "x": point[name], "y": y, "score": point["score"]}
        for point, y in zip(points, shown, strict=True)
    ]
    return _sized(
        alt.Chart(_data(rows))
        .mark_point(size=14, filled=True, opacity=0.5)
        .encode(
            x=alt.X("x:Q", title=title, scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", title=scale.title, scale=_score_scale(scale), axis=_numbers_axis(scale.format)),
            color=_decision(),
            shape=alt.Shape("decision:N", scale=alt.Scale(domain=["kept", "dropped"], range=["circle", "cross"])),
            tooltip=["row:Q", alt.Tooltip("x:Q", title=title), "score:Q", "decision:N"],
        )
    )


def layers_chart(numbers: Numbers) -> Chart:
    """The quartiles of the change by layer (ResoFilter, figure 2)."""
    rows = []
    for layer in numbers.layers:
        values = (layer.low, layer.high, layer.entries_low, layer.entries_high)
        for (of, quantile), value in zip(itertools.product(KINDS, ("25 %", "75 %")), values, strict=True):
            if value is not None:
                rows.append({"layer": layer.layer, "of": of, "quantile": quantile, "change": value})
    return _sized(
        alt.Chart(_data(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("change:Q", title="change of W_up", scale=alt.Scale(zero=False), axis=_numbers_axis()),
            color=alt.Color("of:N", title=None, scale=alt.Scale(range=[DROPPED_COLOUR, KEPT_COLOUR])),
            strokeDash=alt.StrokeDash("quantile:N", title=None),
            tooltip=["layer:Q", "of:N", "quantile:N", "change:Q"],
        )
    )


def length_chart(quarters: Sequence[Quarter]) -> Chart:
    """Learnt tokens of the rows with the lowest and highest scores: means and quartiles (ResoFilter, figure 4)."""
    data = _data([dataclasses.asdict(each) for each in quarters])
    across = alt.X("rows:N", title=None, sort=[each.rows for each in quarters], axis=alt.Axis(labelAngle=0))
    bars = (
        alt.Chart(data)
        .mark_bar(color=KEPT_COLOUR, size=40)
        .encode(
            x=across, y=alt.Y("tokens:Q", title="learnt tokens, mean and quartiles"), tooltip=["rows:N", "tokens:Q"]
        )
    )
    spans = alt.Chart(data).mark_rule(color=OTHER, strokeWidth=2).encode(x=across, y="tokens_low:Q", y2="tokens_high:Q")
    return _sized(bars + spans)


def frequency_chart(quarters: Sequence[Quarter]) -> Chart | None:
    """Word frequency of the rows with the lowest and highest scores (ResoFilter, figure 5); None without text."""
    known = [{"rows": each.rows, "frequency": each.frequency} for each in quarters if each.frequency is not None]
    if not known:
        return None
    return _sized(
        alt.Chart(_data(known))
        .mark_bar(color=KEPT_COLOUR, size=40)
        .encode(
            x=alt.X("rows:N", title=None, sort=[str(each["rows"]) for each in known], axis=alt.Axis(labelAngle=0)),
            y=alt.Y("frequency:Q", title="share of all words, mean"),
            tooltip=["rows:N", "frequency:Q"],
        )
    )


def ratios_chart(ratios: Sequence[dict[str, Any]]) -> Chart:
    """The metric of a comparison by kept share (ResoFilter, figure 3)."""
    several = len({each["model"] for each in ratios}) > 1
    lines = [
        {**each, "name": f"{each['model']}: {each['selector']}" if several else each["selector"]} for each in ratios
    ]
    base = alt.Chart(_data(lines)).encode(
        x=alt.X("keep:Q", title="share of rows kept", axis=alt.Axis(format="%")),
        color=alt.Color("name:N", title=None, scale=alt.Scale(scheme="tableau20")),
    )
    points = base.mark_line(point=True).encode(
        y=alt.Y("metric:Q", title="held-out metric, 95 % interval", scale=alt.Scale(zero=False)),
        tooltip=["name:N", "keep:Q", "metric:Q", "metric_low:Q", "metric_high:Q"],
    )
    return _sized(base.mark_rule(opacity=0.4).encode(y="metric_low:Q", y2="metric_high:Q") + points, 340)


def epochs_chart(numbers: Numbers) -> Chart:
    """The median and the quartiles of the scores after each epoch."""
    found, scale = [each for each in numbers.epochs if each.median is not None], numbers.scale.linear
    quartiles = [each for epoch in found for each in (epoch.low, epoch.median, epoch.high)]
    low, median, high = scale.shown(np.array(quartiles, dtype=float)).reshape(-1, 3).T.tolist()
    shown = zip(found, low, median, high, strict=True)
    data = _data([{"epoch": epoch.epoch, "low": a, "median": b, "high": c} for epoch, a, b, c in shown])
    base = alt.Chart(data).encode(x=alt.X("epoch:O", title="epoch", axis=alt.Axis(labelAngle=0)))
    title, axis = f"{scale.title}, median and quartiles", _numbers_axis(scale.format)
    spans = base.mark_rule(color=OTHER, strokeWidth=3).encode(
        y=alt.Y("low:Q", title=title, scale=alt.Scale(zero=False), axis=axis), y2="high:Q"
    )
    return _sized(spans + base.mark_point(color=KEPT_COLOUR, filled=True, size=80).encode(y="median:Q"))


def steps_chart(log: Sequence[dict[str, Any]]) -> Chart:
    """The learning rate and the kept share by step, one panel each."""
    panels = []
    for what in dict.fromkeys(str(entry["what"]) for entry in log):
        own = [entry for entry in log if entry["what"] == what]
        mark = alt.Chart(_data(own)).mark_line(point=True, color=KEPT_COLOUR, interpolate="step-after")
        panel = mark.encode(
            x=alt.X("step:Q", title="step"), y=alt.Y("value:Q", title=what), tooltip=["step:Q", "value:Q"]
        )
        panels.append(panel.properties(width=WIDTH, height=110))
    return alt.vconcat(*panels)


def timeline_chart(timeline: Timeline) -> Chart:
    """The loss and the gradient norm by step, a panel each, with the steps that stand out."""
    panels = []
    for name, title in (("loss", "loss, nats per token"), ("grad_norm", "gradient norm")):
        if all(each[name] is None for each in timeline.steps):
            continue
        x, y = alt.X("step:Q", title="step"), alt.Y(f"{name}:Q", title=title, scale=alt.Scale(zero=False))
        line = alt.Chart(_data(timeline.steps)).mark_line(color=KEPT_COLOUR).encode(x=x, y=y)
        spikes = [{"step": each.step, name: getattr(each, name), "spike": each.step} for each in timeline.spikes]
        points = alt.Chart(_data([each for each in spikes if each[name] is not None]))
        marked = points.mark_point(color=DROPPED_COLOUR, filled=True, size=70, cursor="pointer")
        marked = marked.encode(x=x, y=y, tooltip=["step:Q", f"{name}:Q"])
        panels.append((line + marked).properties(width=WIDTH, height=110))
    return alt.vconcat(*panels)


def curves_chart(curves: Sequence[dict[str, Any]]) -> Chart:
    """The mean loss of kept, dropped and random rows by epoch."""
    names, colours = ["kept", "dropped", "random half"], [KEPT_COLOUR, DROPPED_COLOUR, OTHER]
    lines = alt.Chart(_data(curves)).mark_line(point=True)
    return _sized(
        lines.encode(
            x=alt.X("epoch:O", title="epoch", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("loss:Q", title="mean loss of the rows trained", scale=alt.Scale(zero=False)),
            color=alt.Color("rows:N", title=None, scale=alt.Scale(domain=names, range=colours)),
            tooltip=["epoch:O", "rows:N", "loss:Q", "count:Q"],
        )
    )


def specification(chart: Chart) -> Specification:
    """The specification that the page embeds."""
    with alt.data_transformers.disable_max_rows():
        found: Specification = chart.to_dict()
    return found


def save_png(chart: Specification, path: Path) -> None:
    """Draw a chart to a PNG file."""
    picture = vl_convert.vegalite_to_png(chart, vl_version=VEGA_LITE, scale=2)
    with replacing(path) as temporary:
        temporary.write_bytes(picture)


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which needs no network."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)


def _data(rows: Sequence[Mapping[str, Any]]) -> alt.Data:
    return alt.Data(values=[dict(row) for row in rows])


def _sized(chart: Any, height: int = HEIGHT) -> Chart:
    sized: Chart = chart.properties(width=WIDTH, height=height)
    return sized


def _decision() -> alt.Color:
    return alt.Color("decision:N", title=None, scale=DECISIONS)


def _score_scale(scale: Scale) -> alt.Scale:
    """Larger scores to the right and at the top, also where the distance to the bound is shown."""
    return alt.Scale(zero=False, nice=False) if scale.bound is None else alt.Scale(type="log", reverse=True, nice=False)


def _numbers_axis(digits: str = "~g") -> alt.Axis:
    """An axis with as many digits as scores need, which are small and close together."""
    return alt.Axis(format=digits, labelOverlap=True, tickCount=6)
