"""The numbers of ResoFilter's figures 2 to 5 (arXiv 2412.14809), for this dataset. Knows arrays and text, no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..scores.score_table import LAYER, ScoreTable
from ..selecting.results import EPOCHS, kept_share
from .columns import column_or_nan, finite, with_finite_score

QUARTER = 0.25
WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Layer:
    """The change of W_up in one layer (figure 2).

    Attributes:
        layer: the layer, counted from 0.
        rows: the number of rows measured.
        low, high: the 25 % and 75 % quantiles of the rows' mean changes.
        entries_low, entries_high: the same quantiles over the entries of a matrix, mean over rows; None where they were
            not measured.
    """

    layer: int
    rows: int
    low: float
    high: float
    entries_low: float | None
    entries_high: float | None


@dataclass(frozen=True)
class Quarter:
    """Means over the quarter of the rows with the lowest or the highest scores, or over all (figures 4 and 5).

    Attributes:
        rows: "lowest quarter", "highest quarter" or "all".
        tokens: the mean number of learnt tokens of a row.
        tokens_low, tokens_high: the 25 % and 75 % quantiles of the number of learnt tokens.
        frequency: the mean of how common a row's words are; None without text.
        counted: the number of rows whose words were counted.
    """

    rows: str
    tokens: float
    tokens_low: float
    tokens_high: float
    frequency: float | None
    counted: int


def layers_of(scores: ScoreTable) -> list[Layer]:
    """The quartiles of the change in every measured layer, lowest layer first (figure 2)."""
    found = []
    names = [name for name in scores.table.column_names if re.fullmatch(rf"{LAYER}\d+", name)]
    for name in sorted(names, key=lambda name: int(name.removeprefix(LAYER))):
        values = scores.column(name)
        measured = scores.scored & np.isfinite(values)
        if not measured.any():
            continue
        low, high = np.quantile(values[measured], [QUARTER, 1 - QUARTER])
        entries = [
            float(scores.column(f"{name}_{quantile}")[measured].mean())
            if f"{name}_{quantile}" in scores.table.column_names
            else None
            for quantile in ("q25", "q75")
        ]
        found.append(Layer(int(name.removeprefix(LAYER)), int(measured.sum()), float(low), float(high), *entries))
    return found


def ratios_of(comparison: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The metric by kept share of rows or tokens, of selectors that trained for as many epochs (figure 3)."""
    found = []
    for line in [] if comparison is None else comparison["lines"]:
        values = {name: finite(line[name]) for name in ("metric", "metric_low", "metric_high")}
        if line.get("budget", EPOCHS) == EPOCHS and values["metric"] is not None:
            found.append({"selector": line["selector"], "model": line["model"], "keep": kept_share(line), **values})
    return found


def quarters_of(scores: ScoreTable, frequency: np.ndarray | None) -> list[Quarter]:
    """Token counts and word frequency of the rows with the lowest and the highest scores (figures 4 and 5).

    Args:
        scores: the scores of N rows.
        frequency: (N,) of `word_frequency`, NaN where it was not counted; None without text.
    """
    rows = np.flatnonzero(with_finite_score(scores) & np.isfinite(column_or_nan(scores, "num_tokens")))
    if not len(rows):
        return []
    order = rows[np.argsort(scores.column("score")[rows], kind="stable")]
    count = max(1, int(len(rows) * QUARTER))
    found = []
    for name, members in (("lowest quarter", order[:count]), ("highest quarter", order[-count:]), ("all", order)):
        tokens = scores.column("num_tokens")[members]
        low, high = np.quantile(tokens, [0.25, 0.75])
        known = np.empty(0) if frequency is None else frequency[members][np.isfinite(frequency[members])]
        mean = float(known.mean()) if len(known) else None
        found.append(Quarter(name, float(tokens.mean()), float(low), float(high), mean, len(known)))
    return found


def word_frequency(texts: Sequence[str | None]) -> np.ndarray:
    """(N,) the mean share of a text's words and punctuation marks among those of all texts; NaN without text.

    ResoFilter's figure 5 counts tokens; words need no tokenizer.
    """
    split = [WORDS.findall(text.lower()) if text else [] for text in texts]
    counts = Counter(word for words in split for word in words)
    total = max(counts.total(), 1)
    return np.array([np.mean([counts[word] for word in words]) / total if words else np.nan for words in split])
