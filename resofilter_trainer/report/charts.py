"""The charts of scores and of a comparison, each with a sentence that says what it shows. Knows numbers, no page.

`figures_of` lists all figures of a report; those of a training run are in `run_charts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from ..scores.score_table import ScoreTable
from . import findings, run_charts
from .axes import PER_CENT, height_of, score_axis, score_scale
from .drawing import HEIGHT, Figure, Label, end_labels, figure, plot
from .numbers import Numbers
from .paper_figures import Layer, Quarter

NAMES = (  # of all charts, also of earlier versions
    *("scores", "length", "loss", "layers", "length_of_quarters", "frequency_of_quarters", "ratios", "epochs"),
    *("learning_rate", "kept_share", "loss_by_step", "grad_norm_by_step", "curves", "steps", "timeline"),
)
DECISIONS = ("kept", "dropped")
SHAPES = {"kept": "circle", "dropped": "triangle-up"}
BAR_HEIGHT, LABEL_HEIGHT = 38, 18  # px
DIGITS = 6  # of a value in a chart


def figures_of(numbers: Numbers, points: Sequence[dict[str, Any]], note: str = "") -> dict[str, Figure]:
    """Every figure that has numbers, by name.

    Args:
        numbers: the numbers to draw.
        points: one entry for each shown row, see `points_of`.
        note: what to say beside the charts of points, as where they show only some rows.
    """
    found: dict[str, Figure | None] = {
        "scores": scores_figure(numbers) if numbers.histogram else None,
        "length": points_figure(points, numbers, "tokens", note),
        "loss": points_figure(points, numbers, "loss", note),
        "layers": layers_figure(numbers.layers, numbers.scale.full_step) if numbers.layers else None,
        "length_of_quarters": length_figure(numbers.quarters) if numbers.quarters else None,
        "frequency_of_quarters": frequency_figure(numbers.quarters),
        "ratios": ratios_figure(numbers.ratios) if numbers.ratios else None,
        **run_charts.figures_of(numbers),
    }
    return {name: each for name, each in found.items() if each is not None}


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


def scores_figure(numbers: Numbers) -> Figure:
    """The histogram of the scores, kept and dropped rows stacked, with the threshold."""
    scale = numbers.scale
    counts = {which: sum(bar.rows for bar in numbers.histogram if bar.decision == which) for which in DECISIONS}
    feet: dict[float, int] = {}  # the dropped rows of a bin stand on its kept rows
    stacked: dict[str, list[dict[str, Any]]] = {which: [] for which in DECISIONS}
    for bar in numbers.histogram:
        foot = feet.get(bar.start, 0)
        feet[bar.start] = foot + bar.rows
        place = {"start": bar.start, "end": bar.end, "foot": foot, "top": foot + bar.rows}
        stacked[bar.decision].append({**place, "rows": bar.rows, "decision": bar.decision})
    top = 1.15 * max(feet.values())  # the names stand above the bars
    layers = [
        plot(bars)
        .mark_rect(style=which)
        .encode(
            x=alt.X("start:Q", title=scale.title, scale=score_scale(scale), axis=score_axis(scale)),
            x2="end:Q",
            y=alt.Y("foot:Q", title="rows", scale=alt.Scale(domain=[0, top], nice=False)),
            y2="top:Q",
            tooltip=["decision:N", "rows:Q"],
        )
        for which, bars in stacked.items()
        if bars
    ]
    if numbers.threshold is None:
        names = [
            Label(f"{counts[which]:,} {which}", height, which) for which, height in (("kept", 0.7), ("dropped", 0.85))
        ]
        layers += end_labels([each for each in names if counts[each.style]])
    else:
        layers += _threshold_layers(numbers, counts)
    title = findings.of_scores(counts["kept"], counts["dropped"], scale, numbers.threshold, numbers.kept_below)
    about = f"All {sum(counts.values()):,} scores. Rows further to the right move the weights more."
    if scale.full_step is None:
        about = f"All {sum(counts.values()):,} scores."
    return figure(title, about, alt.layer(*layers))


def _threshold_layers(numbers: Numbers, counts: dict[str, int]) -> list[alt.Chart]:
    """A line at the threshold, and on each side of it how many rows are kept and dropped."""
    at = plot([{"at": float(numbers.scale.shown(np.array(numbers.threshold)))}])
    x = alt.X("at:Q", scale=score_scale(numbers.scale))
    layers = [at.mark_rule(strokeDash=[4, 3], style="ink").encode(x=x)]
    for which in DECISIONS:
        left = (which == "kept") == numbers.kept_below
        text = at.mark_text(align="right" if left else "left", dx=-8 if left else 8, fontWeight="bold", style=which)
        layers.append(text.encode(x=x, y=alt.value(8), text=alt.value(f"{counts[which]:,} {which}")))
    return layers


def points_figure(points: Sequence[dict[str, Any]], numbers: Numbers, name: str, note: str) -> Figure | None:
    """The score of the shown rows against another of their numbers; None where no row has it.

    Args:
        points: the entries of `points_of`.
        numbers: the numbers of the report.
        name: the other number in `points`: `tokens` or `loss`.
        note: what to say beside the chart.
    """
    scale, points = numbers.scale, [point for point in points if name in point]
    if not points:
        return None
    title, word = {"tokens": ("learnt tokens", "length"), "loss": ("loss, nats per token", "loss")}[name]
    layers, labels = list[alt.Chart](), list[Label]()
    for which in DECISIONS:
        own = [point for point in points if point["decision"] == which]
        if not own:
            continue
        shown = scale.shown(np.array([point["score"] for point in own]))
        rows = [
            {"row": point["row"], "x": short(point[name]), "y": short(y), "score": scale.text(point["score"])}
            for point, y in zip(own, shown.tolist(), strict=True)
        ]
        layers.append(
            plot(rows)
            .mark_point(size=22, filled=True, opacity=0.6, style=which, shape=SHAPES[which])
            .encode(
                x=alt.X("x:Q", title=title, scale=alt.Scale(zero=False)),
                y=alt.Y("y:Q", title=scale.title, scale=score_scale(scale), axis=score_axis(scale)),
                tooltip=["row:Q", alt.Tooltip("x:Q", title=title), "score:N"],
            )
        )
        labels.append(Label(which, float(np.median(scale.heights(shown))), which))
    correlation = numbers.length_correlation if name == "tokens" else numbers.loss_correlation
    about = f"Each point is a row: its score by its {title}.{note}"
    return figure(findings.of_correlation(word, correlation), about, alt.layer(*layers, *end_labels(labels)))


def layers_figure(measured: Sequence[Layer], full_step: float | None) -> Figure:
    """The quartiles of the change by layer (ResoFilter, figure 2).

    Args:
        measured: the layers, lowest first.
        full_step: lr, to draw shares of it in per cent; None for the changes themselves.
    """
    unit = 1.0 if full_step is None else 100 / full_step
    spans = {"rows": [(each.layer, unit * each.low, unit * each.high) for each in measured]}
    entries = [
        (each.layer, unit * each.entries_low, unit * each.entries_high)
        for each in measured
        if each.entries_low is not None and each.entries_high is not None
    ]
    if entries:
        spans["entries"] = entries
    least = min(low for values in spans.values() for _, low, _ in values)
    most = max(high for values in spans.values() for _, _, high in values)
    axis = alt.Axis(format="~g") if full_step is None else alt.Axis(labelExpr="format(datum.value, '~g') + ' %'")
    layers, labels = list[alt.Chart](), list[Label]()
    for (name, values), which in zip(spans.items(), ("kept", "other"), strict=False):
        changes = plot([{"layer": layer, "low": low, "high": high} for layer, low, high in values])
        x = alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1))
        title = "change of W_up" if full_step is None else "change of W_up, share of a full step"
        low, high = (
            alt.Y(f"{bound}:Q", title=title, scale=alt.Scale(zero=False), axis=axis) for bound in ("low", "high")
        )
        area = changes.mark_area(opacity=0.35, style=which).encode(x=x, y=low, y2="high:Q")
        point: Any = alt.OverlayMarkDef(style=which) if len(values) == 1 else False
        edges = [changes.mark_line(style=which, point=point).encode(x=x, y=bound) for bound in (low, high)]
        layers += [area, *edges]
        middle = (values[-1][1] + values[-1][2]) / 2
        labels.append(Label(name, height_of(middle, least, most), which))
    about = f"Quartiles of the change of W_up over {measured[0].rows:,} rows, each its mean over the matrix"
    about += ", and over the entries of a matrix (ResoFilter, figure 2)." if entries else " (ResoFilter, figure 2)."
    return figure(findings.of_layers(measured), about, alt.layer(*layers, *end_labels(labels)))


def length_figure(quarters: Sequence[Quarter]) -> Figure:
    """Learnt tokens of the rows with the lowest and highest scores: means and quartiles (ResoFilter, figure 4)."""
    rows = [
        {"rows": each.rows, "value": each.tokens, "low": each.tokens_low, "high": each.tokens_high} for each in quarters
    ]
    bars = _bars(rows, "learnt tokens", "format(datum.value, '.1f')", "format(datum.value, '~s')")
    spans = plot(rows).mark_rule(style="ink", strokeWidth=2).encode(y=_names(rows), x="low:Q", x2="high:Q")
    about = "Learnt tokens of a quarter of the rows each: mean, and quartiles as a line (ResoFilter, figure 4)."
    title = findings.of_quarters(quarters, "tokens")
    return figure(title, about, alt.layer(bars[0], spans, bars[1]), BAR_HEIGHT * len(rows))


def frequency_figure(quarters: Sequence[Quarter]) -> Figure | None:
    """Word frequency of the rows with the lowest and highest scores (ResoFilter, figure 5); None without text."""
    known = [{"rows": each.rows, "value": each.frequency} for each in quarters if each.frequency is not None]
    if len(known) < len(quarters) or not known:
        return None
    about = f"How frequent a row's words are among all words, mean; {quarters[-1].counted:,} rows were counted "
    about += "(ResoFilter, figure 5, with words instead of tokens)."
    bars = alt.layer(
        *_bars(
            known,
            "mean share of all words",
            "format(100 * datum.value, '.2f') + ' %'",
            "format(100 * datum.value, '~g') + ' %'",
        )
    )
    return figure(findings.of_quarters(quarters, "frequency"), about, bars, BAR_HEIGHT * len(known))


def _bars(rows: Sequence[dict[str, Any]], title: str, written: str, label: str) -> list[alt.Chart]:
    """Horizontal bars with their values written at their foot; expressions write them, and the labels of the axis."""
    axis = alt.Axis(grid=True, domain=False, tickCount=5, labelExpr=label)
    x = alt.X("value:Q", title=title, scale=alt.Scale(zero=True), axis=axis)
    bars = plot(rows).mark_bar(style="other", opacity=0.45, height=20).encode(x=x, y=_names(rows))
    names = plot(rows).transform_calculate(written=written)
    text = names.mark_text(align="left", dx=6, style="ink")
    return [bars, text.encode(x=alt.value(0), y=_names(rows), text="written:N")]


def _names(rows: Sequence[dict[str, Any]]) -> alt.Y:
    return alt.Y("rows:N", title=None, sort=[str(each["rows"]) for each in rows], axis=alt.Axis(grid=False))


def ratios_figure(ratios: Sequence[dict[str, Any]]) -> Figure:
    """A comparison's metric by kept share of rows or tokens (ResoFilter, figure 3); the best selector stands out."""
    several = len({each["model"] for each in ratios}) > 1
    series: dict[str, list[dict[str, Any]]] = {}
    for each in ratios:
        series.setdefault(f"{each['model']}: {each['selector']}" if several else each["selector"], []).append(each)
    best = max(series, key=lambda name: max(each["metric"] for each in series[name]))
    ends = [each[name] for each in ratios for name in ("metric", "metric_low", "metric_high") if each[name] is not None]
    low, high = min(ends), max(ends)
    scale = alt.Scale(domain=[low, high]) if low < high else alt.Scale(zero=False)
    layers, labels = list[alt.Chart](), list[Label]()
    for name, values in sorted(series.items(), key=lambda each: each[0] == best):  # the best is drawn last
        which = "kept" if name == best else "other"
        rows = sorted(({**each, "name": name} for each in values), key=lambda each: each["keep"])
        axis = alt.Axis(labelExpr=PER_CENT)
        x = alt.X("keep:Q", title="share of rows or tokens kept", axis=axis)
        y, foot = (alt.Y(f"{field}:Q", title="held-out metric", scale=scale) for field in ("metric", "metric_low"))
        tooltip = ["name:N", "keep:Q", "metric:Q", "metric_low:Q", "metric_high:Q"]
        line = plot(rows).mark_line(style=which, point=alt.OverlayMarkDef(size=36, style=which))
        layers.append(plot(rows).mark_rule(style=which, opacity=0.45).encode(x=x, y=foot, y2="metric_high:Q"))
        layers.append(line.encode(x=x, y=y, tooltip=tooltip))
        labels.append(Label(name, height_of(rows[-1]["metric"], low, high), "kept" if name == best else "ink"))
    tall = max(HEIGHT, LABEL_HEIGHT * len(series))
    about = "Held-out metric of every selector, with its 95 % interval over seeds (ResoFilter, figure 3)."
    return figure(findings.of_ratios(ratios), about, alt.layer(*layers, *end_labels(labels, tall)), tall)


def short(value: float) -> float:
    """A value with the digits that a chart can show, which makes the page lighter."""
    return float(f"{value:.{DIGITS}g}")
