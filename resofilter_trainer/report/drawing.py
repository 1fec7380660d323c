"""What all charts share: data, labels at the end of a line, the specification, and how it becomes a picture.

Page and PNG share one definition: the page embeds the specification, and `save_png` draws it without a browser. Knows
Altair and the theme, no number of a report.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from ..io.files import replacing
from .theme import TEXT_SIZE, picture_config

VERSIONS = vl_convert.get_vegalite_versions()  # oldest first
SCHEMA = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
VEGA_LITE = SCHEMA if SCHEMA in VERSIONS else VERSIONS[-1]
HEIGHT, WIDTH = 230, 520  # of the plot in a PNG; on the page, a chart is as wide as its place
APART = TEXT_SIZE + 4  # px between the middles of two labels
LABEL_WIDTH, TITLE_WIDTH = 150, 72  # px of a label; characters of a line of a PNG's title
Specification = dict[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart


@dataclass(frozen=True)
class Label:
    """A name beside the plot, in the colour of what it names.

    Attributes:
        text: the name.
        height: the place on the axis, from 0 at the foot to 1 at the top.
        style: `kept`, `dropped`, `other` or `ink`.
    """

    text: str
    height: float
    style: str


@dataclass(frozen=True)
class Figure:
    """A chart with its words.

    Attributes:
        title: what the chart shows, in one sentence.
        about: what is drawn, and in which unit.
        chart: the Vega-Lite specification, without title and colours.
    """

    title: str
    about: str
    chart: Specification


def figure(title: str, about: str, chart: Chart, height: int = HEIGHT) -> Figure:
    """A figure of a chart of one plot."""
    with alt.data_transformers.disable_max_rows():
        drawn = chart.properties(width=WIDTH, height=height).to_dict()
    return Figure(title, about, {name: part for name, part in drawn.items() if name != "config"})


def plot(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A chart of rows, without a mark."""
    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))


def end_labels(labels: Sequence[Label], height: int = HEIGHT) -> list[alt.Chart]:
    """A layer for each label: to the right of the plot, each at its height, moved apart where they are too close.

    Args:
        labels: the labels.
        height: the height of the plot.
    """
    ordered = sorted(labels, key=lambda each: -each.height)  # from the top down
    places: list[float] = []
    for each in ordered:
        place = height * (1 - min(max(each.height, 0.0), 1.0))
        places.append(max(place, places[-1] + APART) if places else place)
    limit = float(height)
    for i in reversed(range(len(places))):  # what was moved below the plot goes up again
        places[i] = min(places[i], limit)
        limit = places[i] - APART
    return [
        plot([{}])
        .mark_text(align="left", baseline="middle", dx=8, limit=LABEL_WIDTH, style=each.style)
        .encode(x=alt.value("width"), y=alt.value(place), text=alt.value(each.text))
        for each, place in zip(ordered, places, strict=True)
    ]


def save_png(shown: Figure, path: Path) -> None:
    """Draw a figure to a PNG file, with its words above it."""
    title = {"text": textwrap.wrap(shown.title, TITLE_WIDTH), "subtitle": textwrap.wrap(shown.about, TITLE_WIDTH + 20)}
    chart = {**shown.chart, "title": title}
    picture = vl_convert.vegalite_to_png(chart, vl_version=VEGA_LITE, scale=2, config=picture_config())
    with replacing(path) as temporary:
        temporary.write_bytes(picture)


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which needs no network."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
