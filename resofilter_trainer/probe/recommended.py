"""The recommendation as a settings file: `recommended.yaml`. Knows text, no results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from ..config import Warmup
from ..scores.score_table import LENGTH
from ..scoring.further_signals import FURTHER
from .recommendation import Recommendation

RECOMMENDED_FILE = "recommended.yaml"
BESIDE = ("loss", LENGTH)  # columns that a pass measures anyway
WIDTH = 118
KEEP = 0.5  # the default of `select`


def settings_text(recommendation: Recommendation, provenance: Mapping[str, Any]) -> str:
    """YAML with a section for each command: what to measure, and by what to drop rows.

    `score --config`, `select --config` and the recipe for GSM8K take the file; each command reads its own section.
    """
    about = f"Made by resofilter probe for the model {provenance['model']} and the dataset {provenance['dataset']}."
    lines = _comment(about) + _comment(recommendation.reason)
    name = recommendation.signal
    if name is None:
        return "\n".join([*lines, "select:", "  keep: 1.0  # all rows, see above", ""])
    measure = [] if name in BESIDE else [f"  signals: [{name}]"]
    if name in FURTHER and FURTHER[name].by_reference:
        measure.append(f"  reference: {json.dumps(provenance['reference'])}")
    if recommendation.warmup is not None:
        measure += _warmup(provenance)
    settings = [each for each in measure if not each.lstrip().startswith("#")]
    lines += ["score:", *measure] if settings else [each.strip() for each in measure]
    by = [name, LENGTH] if recommendation.length_out else [name]
    lines += ["select:", f"  by: [{', '.join(by)}]"]
    lines += ["  combine: residual"] if recommendation.length_out else []
    lines += [f"  drop: {recommendation.drop}", f"  keep: {KEEP}  # the share is yours to choose", ""]
    return "\n".join(lines)


def _warmup(provenance: Mapping[str, Any]) -> list[str]:
    """The settings of the warm-up; a comment for rows of the user's own, of which the probe knows no name."""
    lines = ["  # with the same warmup_dataset as the probe"] if "warmup_dataset" in provenance else []
    if provenance["warmup_rows"] is not None:
        lines.append(f"  warmup: {provenance['warmup_rows']}")
    usual = Warmup(method=provenance["warmup_method"]).to_json() | {"method": Warmup.method}
    others = [name for name in usual if name != "rows" and provenance[f"warmup_{name}"] != usual[name]]
    return lines + [f"  warmup_{name}: {provenance[f'warmup_{name}']}" for name in others]


def _comment(text: str) -> list[str]:
    printable = "".join(each if each.isprintable() else " " for each in text)  # a line break would end the comment
    return [f"# {line}" for line in textwrap.wrap(printable, WIDTH, break_on_hyphens=False)]
