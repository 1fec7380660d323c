"""One HTML file that needs no network: the numbers as text, the pictures' specifications, the samples as data.

Whatever comes from a dataset is data: Jinja escapes it where it is markup, the script makes text nodes of it, and the
page's own policy runs one script, by its hash, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import dataclasses
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
from .charts import Specification, javascript
from .contents import Epoch
from .numbers import Numbers, finite
from .samples import Samples, as_json, cut

HERE = Path(__file__).parent


def make_page(
    title: str,
    numbers: Numbers | None,
    charts: Mapping[str, Specification],
    scores: ScoreTable | None,
    selection: Selection | None,
    samples: Samples | None,
    groups: Sequence[str] | None,
    epochs: Sequence[Epoch],
    files: str,
) -> str:
    """The page.

    Args:
        title: of the page.
        numbers, charts: what is said and drawn; no numbers where there is only a comparison.
        scores, selection, samples, groups: of the dataset; None where there are none.
        epochs: of a run.
        files: where all dropped rows are listed, for people; may be empty.
    """
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content: dict[str, Any] = {"charts": dict(charts)}
    about: dict[str, Any] = {"provenance": [], "shown": "", "samples_note": "", "verdict": "", "keep_percent": 50}
    if numbers is not None and scores is not None and selection is not None and samples is not None:
        content |= {
            "what_if": _what_if(numbers, groups),
            "samples": rows_shown(scores, selection, samples, groups, epochs),
        }
        about = {
            "verdict": verdict_line(numbers, scores),
            "provenance": provenance_lines(scores, selection),
            "shown": shown_note(len(samples.rows), len(scores)),
            "samples_note": samples_note(samples, len(scores)),
            "keep_percent": keep_percent(numbers),
        }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string((HERE / "page.html").read_text()).render(
        title=title,
        policy=f"default-src 'none'; script-src 'sha256-{digest}' 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",  # Vega makes functions of its own expressions
        style=(HERE / "page.css").read_text(),
        script=script,
        data=as_json(content),
        numbers=numbers,
        charts=charts,
        files=files,
        version=__version__,
        correlation=lambda value: "unknown." if value is None else f"{value:+.3f}.",
        **about,
    )


def verdict_line(numbers: Numbers, scores: ScoreTable) -> str:
    """What happened, in one line."""
    v, name = numbers.verdict, scores.provenance.model
    tokens = f", with {v.tokens_kept / v.tokens:.1%} of the learnt tokens" if v.tokens else ""
    line = f"{v.kept:,} of {v.rows:,} rows stay{tokens}; {v.dropped:,} go. Scored by {v.score}, model {name}."
    if v.previewed:
        return f"Nothing was decided yet; with keep=0.5: {line}"
    return line if v.epoch is None else f"As epoch {v.epoch} was trained: {line}"


def provenance_lines(scores: ScoreTable, selection: Selection) -> list[tuple[str, str]]:
    """Where the scores come from and what decided, name by name."""
    provenance = scores.provenance
    policy = {name: value for name, value in selection.policy.items() if value is not None}
    lines: dict[str, Any] = {
        "model": provenance.model,
        "weights": provenance.weights,
        "dataset": provenance.source.get("dataset"),
        "tokens and labels": provenance.dataset,
        "measured": _listed(provenance.config),
        "rows became tokens": _listed(provenance.preparation),
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
    """The samples as columns, as the page's script wants them; of a run, whether each epoch has trained on the row."""
    rows = samples.rows
    keeps = [epoch.selection.keep for epoch in epochs if epoch.selection is not None]
    found: dict[str, list[Any] | None] = {"row": list(rows)}
    for name in ("score", "loss", "num_tokens"):
        if name in scores.table.column_names:
            found[name] = [finite(value) for value in scores.column(name)[rows].tolist()]
    return {
        **found,
        "decision": ["kept" if selection.keep[row] else "dropped" for row in rows],
        "reason": ["" if selection.reason[row] == KEPT else cut(selection.reason[row]) for row in rows],
        "epochs": ["".join("●○"[not keep[row]] for keep in keeps) for row in rows] if len(keeps) > 1 else None,
        "group": None if groups is None else [groups[row] for row in rows],
        "prompt": samples.prompts,
        "completion": samples.completions,
        "cut": list(samples.cut),
        "neighbours": list(samples.neighbours),
        "copy_of": list(samples.copy_of),
        "tokens": list(samples.tokens),
    }


def shown_note(shown: int, rows: int) -> str:
    """Whether pictures of points show all of them."""
    return "" if shown >= rows else f" The correlation is over all rows, the picture shows {shown:,} of them."


def samples_note(samples: Samples, rows: int) -> str:
    """Which rows can be looked at."""
    shown = len(samples.rows)
    note = f"All {rows:,} rows."
    if shown < rows:
        note = f"{shown:,} of {rows:,} rows: both ends of the ranking, and an even sample by rank between them. "
        note += "Scores, tokens and groups above are counted over all rows."
    coloured = sum(each is not None for each in samples.tokens)
    if 0 < coloured < shown:
        note += f" The tokens of {coloured:,} of them are coloured."
    return note if samples.prompts is not None else f"{note} Their text is not known: pass --dataset."


def keep_percent(numbers: Numbers) -> int:
    """Where the slider stands at first: at what is kept of the rows with a score."""
    return min(max(round(100 * numbers.verdict.kept / max(numbers.verdict.scored, 1)), 1), 100)


def _what_if(numbers: Numbers, groups: Sequence[str] | None) -> dict[str, Any] | None:
    if numbers.what_if is None:
        return None
    counts = Counter(groups or [])
    sizes = {name: counts[name] for name in numbers.what_if.dropped_of_groups}
    return {**dataclasses.asdict(numbers.what_if), "size_of_groups": sizes}


@cache
def _script() -> str:
    """Vega and the page's own script."""
    script = f"{javascript()}\n{(HERE / 'page.js').read_text()}"
    if "</script" in script.lower() or "<!--" in script:
        raise RuntimeError("The bundled script would end its own element.")
    return script


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
