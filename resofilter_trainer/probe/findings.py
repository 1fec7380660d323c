"""How well each signal finds each kind of fault, from the measured rows. Knows arrays, no model and no text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..scores.score_table import LENGTH
from .statistics import NOTHING, Auroc, alike, clustered_auroc, length_out, mean_of, rank_correlations

ALL, LABELLED, SELF_MADE, CONTRADICTED = "all", "labelled", "self_made", "contradicted"  # kinds beside planted ones
REAL = (LABELLED, CONTRADICTED)  # kinds of unplanted rows
ROWS, WRITER = "rows", "writer"  # what faulty rows are compared with
UNPLANTED = ""  # the kind of the rows as they are
LEAST_PLANTED = 5  # faulty rows, for a kind to be measured
LEAST_CONTRADICTED = 10  # rows that other answers contradict, and rows that they agree with
LEAST_RIGHT = 10  # right answers by the writer, to compare its wrong ones with
LEAST_PAIRS = 10  # of rows with the same prompt
LEAST_CLUSTERS = 20  # prompts, for an interval over prompts
ALIKE = 0.95  # rank correlation

Record = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The measured rows: T rows, unplanted and planted.

    Attributes:
        signals: the values of each signal, (T,), NaN where it has none.
        directions: the end of each signal that its table drops, `largest` or `smallest`.
        lengths: (T,) the number of learnt tokens.
        kind: (T,) the kind of each planted row; `UNPLANTED` for the others.
        faulty: (T,) bool, whether a planted row has a fault; or an unplanted one, by the user's labels.
        stratum: (T,) what a planted row is compared within.
        source: (T,) the number of the drawn row that it is or was made of, from 0.
        prompt: (T,) the number of its prompt, from 0; rows without a prompt have one of their own.
        labelled: whether the unplanted rows have labels.
        contradicted: (T,) for unplanted rows 1 if most answers to the prompt end otherwise, 0 if they end so; else -1.
        seconds: how long each signal took; None where it is not known.
    """

    signals: Mapping[str, np.ndarray]
    directions: Mapping[str, str]
    lengths: np.ndarray
    kind: np.ndarray
    faulty: np.ndarray
    stratum: np.ndarray
    source: np.ndarray
    prompt: np.ndarray
    labelled: bool = False
    contradicted: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    seconds: Mapping[str, float | None] = field(default_factory=dict)

    @cached_property
    def usable(self) -> np.ndarray:
        """(T,) bool, the rows that were measured."""
        return np.isfinite(self.lengths)

    @cached_property
    def right(self) -> np.ndarray:
        """The unplanted rows without those that the user's labels call wrong, or other answers contradict."""
        gone = self.faulty if self.labelled else self.faulty | self._told(1)
        return np.flatnonzero((self.kind == UNPLANTED) & ~gone & self.usable)

    @property
    def agreed(self) -> np.ndarray:
        """The unplanted rows that end as most answers to their prompt."""
        return np.flatnonzero(self._told(0) & self.usable)

    @cached_property
    def clusters(self) -> np.ndarray:
        """(T,) the cluster of each row: its prompt; or the row that it was made of, where there are few prompts."""
        return self.prompt if len(np.unique(self.prompt)) >= LEAST_CLUSTERS else self.source

    def faults(self, kind: str) -> np.ndarray:
        """The rows with a fault of a kind; of all planted kinds for `"all"`."""
        if kind == CONTRADICTED:
            return np.flatnonzero(self._told(1) & self.usable)
        of_kind = self.kind != UNPLANTED if kind == ALL else self.kind == (UNPLANTED if kind == LABELLED else kind)
        return np.flatnonzero(of_kind & self.faulty & self.usable)

    def _told(self, value: int) -> np.ndarray:
        return self.contradicted == value if len(self.contradicted) else np.zeros(len(self.kind), bool)


@dataclass(frozen=True)
class Comparison:
    """The rows by which a signal shows whether it finds a kind of fault.

    Attributes:
        kind: the kind.
        against: what rows with the fault are compared with: `rows`, those of the dataset; or `writer`, right answers
            by the same model.
        rows: (N,) which of the measured rows.
        positive: (N,) bool, those with the fault.
        strata: (N,) the number of each row's stratum.
    """

    kind: str
    rows: np.ndarray
    positive: np.ndarray
    strata: np.ndarray
    against: str = ROWS

    @classmethod
    def of(cls, kind: str, faults: np.ndarray, others: np.ndarray, stratum: np.ndarray | None = None) -> Comparison:
        """Rows with a fault against others of the dataset; or of the same writer, within each stratum."""
        rows, positive = np.concatenate([faults, others]), np.arange(len(faults) + len(others)) < len(faults)
        own = np.zeros(len(rows), int) if stratum is None else np.unique(stratum[rows], return_inverse=True)[1]
        return cls(kind, rows, positive, own, ROWS if stratum is None else WRITER)


def comparisons(rows: Rows) -> tuple[list[Comparison], dict[str, str], list[str]]:
    """What is compared with what: a comparison for each kind, the kinds left out with the reason, and notes."""
    found, left_out, notes = list[Comparison](), dict[str, str](), list[str]()
    prompts = len(np.unique(rows.prompt))
    if prompts < LEAST_CLUSTERS:
        notes.append(f"There are {prompts} different prompts, too few for intervals over prompts: they are over rows.")
    if rows.labelled:
        found.append(Comparison.of(LABELLED, rows.faults(LABELLED), rows.right))
    if min(len(rows.faults(CONTRADICTED)), len(rows.agreed)) >= LEAST_CONTRADICTED:
        found.append(Comparison.of(CONTRADICTED, rows.faults(CONTRADICTED), rows.agreed))
    for kind in dict.fromkeys(rows.kind[rows.kind != UNPLANTED].tolist()):
        faults = rows.faults(kind)
        if len(faults) < LEAST_PLANTED:
            left_out[kind] = f"only {len(faults)} rows with it were measured, and at least {LEAST_PLANTED} are needed"
            continue
        right = np.flatnonzero((rows.kind == kind) & ~rows.faulty & rows.usable)
        shared = np.isin(rows.stratum[faults], rows.stratum[right])
        if len(right) >= LEAST_RIGHT and shared.sum() >= LEAST_PLANTED:
            found.append(Comparison.of(kind, faults, right, rows.stratum))
            continue
        found.append(Comparison.of(kind, faults, rows.right))
        if kind.startswith(SELF_MADE):
            notes.append(
                f"{kind}: the writer gave {len(right)} right answers to compare its wrong ones with, fewer than "
                f"{LEAST_RIGHT}. They are compared with the dataset's own answers, so that the writer's style is "
                "measured, too."
            )
    return found, left_out, notes


def records_of(rows: Rows, compared: Sequence[Comparison]) -> list[Record]:
    """A record for each signal and kind, and for all planted kinds together, each with the same weight.

    Returns:
        Mappings with `signal`, `kind`, `auroc`, `low`, `high` (its 95 % interval), `auroc_length_out`,
        `low_length_out`, `high_length_out`, `auroc_within_prompt`, `pairs_within_prompt`, `seconds`, `direction` (the
        end that the AUROC is of, the signal's own: below .5 the other end finds the fault), `faulty` and `compared`
        (the numbers of rows), `beyond`: the share of the unplanted rows beyond the median of the faulty ones; and
        `against` (see `Comparison`).
        None for what is not known.
    """
    found, against = [], {each.kind: each.against for each in compared}
    for name in rows.signals:
        measured = {each.kind: _measured(rows, name, each) for each in compared}
        planted = [three for kind, three in measured.items() if kind not in REAL] or list(measured.values())
        together = [mean_of([three[form] for three in planted]) for form in range(3)]
        for kind, three in {**measured, ALL: together}.items():
            found.append({**_record(rows, name, kind, *three), "against": against.get(kind, ROWS)})
    return found


def alike_of(rows: Rows) -> dict[str, Any]:
    """How alike the signals rank the unplanted rows: `signals`, the matrix `spearman`, and `groups` of like ones."""
    names = list(rows.signals)
    of_row = np.flatnonzero((rows.kind == UNPLANTED) & rows.usable)
    matrix = rank_correlations([rows.signals[name][of_row] for name in names])
    shown = [[plain(each) for each in line] for line in matrix.tolist()]
    return {"signals": names, "spearman": shown, "groups": alike(matrix, names, ALIKE), "above": ALIKE}


def missing_values(rows: Rows) -> list[str]:
    """A note for each signal with values that are no finite numbers."""
    notes = []
    for name, values in rows.signals.items():
        of_row = values[rows.usable]
        gone, infinite = int(np.isnan(of_row).sum()), int(np.isinf(of_row).sum())
        if gone:
            notes.append(f"{name} has no value for {gone} of {len(of_row)} rows, which are left out of its numbers.")
        if infinite:
            notes.append(f"{name} is infinite for {infinite} of {len(of_row)} rows, which rank as the most extreme.")
    return notes


def plain(value: float) -> float | None:
    """A number for JSON: None for NaN."""
    return None if math.isnan(value) else float(value)


def number_of(values: Iterable[Any]) -> np.ndarray:
    """The number of each value, (N,), from 0, in the order of their first appearance."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(each, len(numbers)) for each in values], dtype=int)


def _measured(rows: Rows, name: str, compared: Comparison) -> tuple[Auroc, Auroc, Auroc]:
    """The AUROC of a signal for a kind: plain, with length taken out, and within the same prompt."""
    known = ~np.isnan(rows.signals[name][compared.rows])
    of_row, positive, strata = compared.rows[known], compared.positive[known], compared.strata[known]
    values = rows.signals[name][of_row] * (1 if rows.directions[name] == "largest" else -1)
    if not positive.any() or positive.all():
        return NOTHING, NOTHING, NOTHING
    clusters, prompts = rows.clusters[of_row], rows.prompt[of_row]
    count = int(rows.clusters.max()) + 1
    without = NOTHING
    if name != LENGTH:
        rest = length_out(values, rows.lengths[of_row])
        without = clustered_auroc(rest, positive, clusters, strata, count)
    within = np.unique(np.stack([strata, prompts]), axis=1, return_inverse=True)[1].ravel()
    same_prompt = clustered_auroc(values, positive, clusters, within, count)
    if same_prompt.pairs < LEAST_PAIRS:
        same_prompt = NOTHING
    return clustered_auroc(values, positive, clusters, strata, count), without, same_prompt


def _record(rows: Rows, name: str, kind: str, auroc: Auroc, without: Auroc, within: Auroc) -> Record:
    return {
        "signal": name,
        "kind": kind,
        "auroc": plain(auroc.value),
        "low": plain(auroc.low),
        "high": plain(auroc.high),
        "auroc_length_out": plain(without.value),
        "low_length_out": plain(without.low),
        "high_length_out": plain(without.high),
        "auroc_within_prompt": plain(within.value),
        "pairs_within_prompt": within.pairs,
        "seconds": rows.seconds.get(name),
        "direction": rows.directions[name],
        "faulty": auroc.positives,
        "compared": auroc.negatives,
        "beyond": _beyond(rows, name, kind, reverse=auroc.value < 0.5),
    }


def _beyond(rows: Rows, name: str, kind: str, reverse: bool) -> float | None:
    """The share of the right unplanted rows whose value is beyond the median of the faulty rows."""
    largest = (rows.directions[name] == "largest") != reverse
    values = rows.signals[name] * (1 if largest else -1)
    faulty, right = values[rows.faults(kind)], values[rows.right]
    faulty, right = faulty[~np.isnan(faulty)], right[~np.isnan(right)]
    return float((right > np.median(faulty)).mean()) if len(faulty) and len(right) else None
