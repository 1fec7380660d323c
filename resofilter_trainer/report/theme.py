"""The colours and the type of the page and its charts, in one place. Knows no number, no row and no chart.

The page holds both themes as CSS variables, and the charts on it name these variables: a change of the theme draws
nothing again. The PNG files have the light theme.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
TEXT_SIZE = 12  # px, of every text in a chart; no text of the page is smaller

# Blue is the page's accent and stands for what is kept. Orange stands for what is dropped or stands out, and for
# nothing else. The two are distinct for colour-blind readers.
COLOURS: dict[str, dict[str, str]] = {
    "light": {
        "ink": "#1c2126",
        "muted": "#59636e",  # text of lower rank
        "paper": "#ffffff",
        "faint": "#f4f6f8",  # the ground of texts and controls
        "line": "#dde2e8",
        "kept": "#1a69ad",
        "dropped": "#bf3f08",
        "other": "#737c87",  # lines and marks of lower rank
    },
    "dark": {
        "ink": "#e6eaee",
        "muted": "#a5afba",
        "paper": "#14171b",
        "faint": "#1f242a",
        "line": "#363e48",
        "kept": "#6db5fb",
        "dropped": "#ff9559",
        "other": "#8d97a3",
    },
}


def style() -> str:
    """The style sheet of a page: the colours of both themes, and the rules.

    The theme is that of the reader's system, or the one that the attribute `data-theme` of the document names.
    """
    light, dark = ("; ".join(f"--{name}: {value}" for name, value in COLOURS[each].items()) for each in COLOURS)
    return (
        f":root {{ color-scheme: light; --font: {FONT}; {light}; }}\n"
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark}; }}\n'
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme]) {{ color-scheme: dark; {dark}; }} }}\n"
        + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    )


def page_config() -> dict[str, Any]:
    """How charts look on the page: in colours that are variables of its style sheet."""
    return chart_config({name: f"var(--{name})" for name in COLOURS["light"]}, "transparent")


def picture_config() -> dict[str, Any]:
    """How charts look as PNG files."""
    return chart_config(COLOURS["light"], COLOURS["light"]["paper"])


def chart_config(colours: Mapping[str, str], background: str) -> dict[str, Any]:
    """The configuration of a Vega-Lite chart. A mark takes the colour of its style: `kept`, `dropped`, `other`, `ink`.

    Args:
        colours: a colour for each name in `COLOURS["light"]`.
        background: the colour behind the chart.
    """
    text = {"labelColor": colours["muted"], "titleColor": colours["muted"]}
    sizes = {"labelFontSize": TEXT_SIZE, "titleFontSize": TEXT_SIZE, "titleFontWeight": "normal"}
    lines = {"gridColor": colours["line"], "domainColor": colours["other"], "tickColor": colours["other"]}
    return {
        "background": background,
        "font": FONT,
        "aria": False,  # the page names the whole chart; thousands of named points would not help
        "view": {"stroke": None},
        "axis": {**text, **sizes, **lines, "labelOverlap": True, "labelPadding": 5, "titlePadding": 8},
        "axisX": {"grid": False, "labelFlush": True, "tickSize": 4},
        "axisY": {  # its title stands above it, so that nobody has to turn their head
            **{"domain": False, "ticks": False, "tickCount": 5},
            **{"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -8},
        },
        "title": {
            **{"anchor": "start", "frame": "group", "color": colours["ink"], "fontSize": 15, "offset": 14},
            **{"subtitleColor": colours["muted"], "subtitleFontSize": TEXT_SIZE, "subtitlePadding": 5},
        },
        "text": {"fontSize": TEXT_SIZE},
        "style": {name: {"color": colours[name]} for name in ("kept", "dropped", "other", "ink")},
    }
