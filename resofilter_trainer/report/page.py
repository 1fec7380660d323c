"""One HTML file that needs no network: the numbers as text, the charts' specifications, the samples as data.

Nothing from a dataset is interpreted: Jinja escapes it in the markup, the script turns it into text nodes, and the
page's content security policy allows one script, by its hash, and no request. Knows numbers and templates, no model.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..scores.score_table import ScoreTable
from ..selecting.selection import KEPT, Selection
from .columns import finite
from .contents import Epoch
from .drawing import Figure, javascript
from .findings import of_left_out
from .numbers import Numbers
from .samples import Samples, as_json, shortened
from .theme import page_config, style
from .tiles import tiles_of
from .timeline import Visit
from .what_if import LISTED_GROUPS

HERE = Path(__file__).parent
SCRIPTS = ("page.js", "page.rows.js")


def make_page(
    title: str,
    numbers: Numbers | None,
    figures: Mapping[str, Figure],
    scores: ScoreTable | None,
    selection: Selection | None,
    samples: Samples | None,
    groups: Sequence[str] | None,
    epochs: Sequence[Epoch],
    files: str,
    lives: list[list[Visit]] | None = None,
) -> str:
    """Render the page.

    Args:
        title: the title of the page.
        numbers: the numbers to show; None where there is only a comparison.
        figures: the figures to draw, by name.
        scores, selection, samples, groups: the rows of the dataset; None where there are none.
        epochs: the epochs of a training run.
        files: where all dropped rows are listed, as text; may be empty.
        lives: every time that each of the samples was trained; None without a ledger.

    Returns:
        The HTML.
    """
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content: dict[str, Any] = {"charts": {name: each.chart for name, each in figures.items()}, "config": page_config()}
    about: dict[str, Any] = {"provenance": [], "tiles": [], "samples_note": "", "verdict": "", "keep_percent": 50}
    if numbers is not None and scores is not None and selection is not None and samples is not None:
        content |= {
            "what_if": _what_if(numbers, groups),
            "samples": {**rows_shown(scores, selection, samples, groups, epochs), "life": lives},
            "share": _share(numbers),
        }
        if numbers.what_if is not None:
            content["samples"]["kept_from"] = numbers.what_if.kept_from[samples.rows].tolist()
        about = {
            "verdict": verdict_line(numbers),
            "scored_by": f"Scored by {numbers.verdict.score}, model {scores.provenance.model}.",
            "provenance": provenance_lines(scores, selection),
            "tiles": tiles_of(numbers, scores),
            "samples_note": samples_note(samples, len(scores)),
            "keep_percent": keep_percent(numbers),
        }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string((HERE / "page.html").read_text()).render(
        title=title,
        policy=f"default-src 'none'; script-src 'sha256-{digest}' 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",  # Vega compiles its expressions
        style=style(),
        script=script,
        data=as_json(content),
        numbers=numbers,
        figures=figures,
        left_out=of_left_out(numbers.timeline) if numbers is not None and numbers.timeline is not None else "",
        files=files,
        version=__version__,
        listed_groups=LISTED_GROUPS,
        tight=lambda text: text.replace(" %", "\u00a0%"),
        digits=lambda value: "unknown" if value is None else f"{value:.4g}",
        **about,
    )


def verdict_line(numbers: Numbers) -> str:
    """The verdict in one line."""
    v = numbers.verdict
    tokens = f", with {100 * v.tokens_kept / v.tokens:.1f} % of the learnt tokens" if v.tokens else ""
    line = f"{v.kept:,} of {v.rows:,} rows are kept{tokens}; {v.dropped:,} are dropped."
    if v.previewed:
        return f"No selection was made; with keep=0.5, {line}"
    return line if v.epoch is None else f"In epoch {v.epoch}, {line}"


def provenance_lines(scores: ScoreTable, selection: Selection) -> list[tuple[str, str]]:
    """The provenance of the scores and the policy of the selection, as names and values."""
    provenance = scores.provenance
    policy = {name: value for name, value in selection.policy.items() if value is not None}
    lines: dict[str, Any] = {
        "model": provenance.model,
        "weights": provenance.weights,
        "dataset": provenance.source.get("dataset"),
        "tokens and labels": provenance.dataset,
        "measured": _listed(provenance.config),
        "preparation": _listed(provenance.preparation),
        "policy": _listed(policy),
        "trust": provenance.trust,
        "versions": _listed(provenance.versions),
    }
    return [(name, str(value)) for name, value in lines.items() if value not in (None, "")]


def rows_shown(
    scores: ScoreTable,
    selection: Selection,
    samples: Samples,
    groups: Sequence[str] | None,
    epochs: Sequence[Epoch] = (),
) -> dict[str, list[Any] | None]:
    """The shown rows as columns for the page's script; with a run's epochs, which of them trained on each row."""
    rows = samples.rows
    keeps = [epoch.selection.keep for epoch in epochs if epoch.selection is not None]
    found: dict[str, list[Any] | None] = {"row": list(rows), "id": samples.ids}
    for name in ("score", "loss", "num_tokens"):
        if name in scores.table.column_names:
            found[name] = [finite(value) for value in scores.column(name)[rows].tolist()]
    return {
        **found,
        "decision": ["kept" if selection.keep[row] else "dropped" for row in rows],
        "reason": ["" if selection.reason[row] == KEPT else shortened(selection.reason[row]) for row in rows],
        "epochs": ["".join("●○"[not keep[row]] for keep in keeps) for row in rows] if len(keeps) > 1 else None,
        "group": None if groups is None else [groups[row] for row in rows],
        "prompt": samples.prompts,
        "completion": samples.completions,
        "cut": list(samples.omitted),
        "neighbours": list(samples.neighbours),
        "copy_of": list(samples.copy_of),
        "tokens": list(samples.tokens),
    }


def shown_note(shown: int, rows: int) -> str:
    """A note where charts of points show only some of the rows."""
    return "" if shown >= rows else f" The chart shows {shown:,} rows; the correlation is over all {rows:,}."


def samples_note(samples: Samples, rows: int) -> str:
    """A note on which rows the table lists."""
    shown = len(samples.rows)
    note = f"All {rows:,} rows."
    if shown < rows:
        note = f"{shown:,} of {rows:,} rows: both ends of the ranking and an even sample between them. "
        note += "The numbers above are counted over all rows."
    coloured = sum(each is not None for each in samples.tokens)
    if 0 < coloured < shown:
        note += f" The tokens of {coloured:,} rows are coloured."
    return note if samples.prompts is not None else f"{note} To show their text, write the page with the dataset."


def keep_percent(numbers: Numbers) -> int:
    """The slider's first position: the kept share of the scored rows, in per cent."""
    return min(max(round(100 * numbers.verdict.kept / max(numbers.verdict.scored, 1)), 1), 100)


def _what_if(numbers: Numbers, groups: Sequence[str] | None) -> dict[str, Any] | None:
    if numbers.what_if is None:
        return None
    counts = Counter(groups or [])
    sizes = {name: counts[name] for name in numbers.what_if.dropped_of_groups}
    fields = ("rows", "tokens", "dropped_of_groups", "unscored")
    return {**{name: getattr(numbers.what_if, name) for name in fields}, "size_of_groups": sizes}


def _share(numbers: Numbers) -> dict[str, Any] | None:
    """How the script writes a score as a share of the full step; None where scores are no shares of it."""
    scale = numbers.scale
    if scale.full_step is None:
        return None
    return {"full_step": scale.full_step, "decimals": scale.decimals if scale.kind == "linear" else None}


@cache
def _script() -> str:
    """Vega and the scripts of the page."""
    own = (HERE.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = "\n".join([javascript(), *own])
    if "</script" in script.lower() or "<!--" in script:
        raise RuntimeError("The bundled script contains the end of its own script element.")
    return script


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
