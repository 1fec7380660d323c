"""What a probe found as one HTML file without scripts, which needs no network. Knows results and a template, no model.

Jinja escapes all text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..io.files import replacing
from ..report.theme import style
from .findings import Record
from .recommended import RECOMMENDED_FILE, settings_text
from .results import ProbeResult
from .table import cost_text, interval_text, number_text

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
OWN_END, OTHER_END = (230, 140, 60), (90, 160, 220)  # of the colours of an AUROC of 1 and of 0


def write_probe(result: ProbeResult, folder: Path) -> None:
    """Write `recommended.yaml`, `report.html` and, last, `probe.json`, each complete or not at all."""
    with replacing(folder / RECOMMENDED_FILE) as temporary:
        temporary.write_text(settings_text(result.recommendation, result.provenance), encoding="utf-8")
    write_page(result, folder)
    result.save(folder)


def write_page(result: ProbeResult, folder: Path) -> Path:
    """Write `report.html`, complete or not at all. Returns the file."""
    path = folder / PAGE
    with replacing(path) as temporary:
        temporary.write_bytes(page_of(result).encode("utf-8", "replace"))  # a lone surrogate becomes a question mark
    return path


def page_of(result: ProbeResult) -> str:
    """The page."""
    main = result.evidence
    titles = [main, "length out", "within prompt", *(kind for kind in result.ordered_kinds if kind != main)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title="Which signal finds which fault",
        style=style(),
        result=result,
        titles=titles,
        lines=[_line(result, name) for name in result.ranked],
        correlations=_correlations(result),
        cost=cost_text(result),
        provenance=[(name, _text(value)) for name, value in result.provenance.items()],
        version=__version__,
    )


def _line(result: ProbeResult, name: str) -> dict[str, Any]:
    main = result.record(name, result.evidence)
    cells = [_cell(main["auroc"], main), _cell(main["auroc_length_out"]), _cell(main["auroc_within_prompt"])]
    for kind in result.ordered_kinds:
        if kind != result.evidence:
            other = result.record(name, kind)
            cells.append(_cell(other["auroc"], other))
    best = name == result.recommendation.name
    return {"signal": name, "direction": main["direction"], "cells": cells, "best": best}


def _cell(value: float | None, record: Record | None = None) -> dict[str, str]:
    interval = "" if record is None else interval_text(record["low"], record["high"])
    return {"text": number_text(value), "interval": interval, "colour": colour_of(value, 0.5)}


def _correlations(result: ProbeResult) -> list[dict[str, Any]]:
    lines = []
    for name, values in zip(result.alike["signals"], result.alike["spearman"], strict=True):
        cells = [{"text": "-" if each is None else f"{each:.2f}", "colour": colour_of(each, 0.0)} for each in values]
        lines.append({"signal": name, "cells": cells})
    return lines


def colour_of(value: float | None, middle: float) -> str:
    """A colour between white, in the middle, and that of either end; dark text is readable on all of them."""
    if value is None:
        return "rgb(255, 255, 255)"
    far = min(abs(value - middle) / (1 - middle), 1)
    end = OWN_END if value >= middle else OTHER_END
    return f"rgb({', '.join(str(round(255 + far * (each - 255))) for each in end)})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={each}" for name, each in value.items() if each is not None)
    return str(value)
