"""The rows that a probe measures: drawn, and planted with faults. Knows datasets, no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig

from ..config import ColumnMapping, InputError, check_keywords, check_kind, one_of, whole_number
from ..data.arguments import ROW_OPTIONS
from ..data.exact_json import encoded
from ..data.loading import usable_rows
from ..data.row_texts import said
from ..data.rows import duplicate_rows
from ..data.surveys import ROW_POSITION
from .contradictions import AGREES, CONTRADICTED, contradicted, whole_prompts
from .examples import Example, examples_of
from .faults import FAULTS, Fault, Planted, plant
from .findings import CONTRADICTED as CONTRADICTED_KIND
from .findings import LABELLED, LEAST_CONTRADICTED, SELF_MADE
from .labels import labels_of
from .own_fault import load_fault, own_fault

EVERY = "all"
RESERVED = (EVERY, LABELLED, SELF_MADE, CONTRADICTED_KIND)  # kinds that are not planted
ROWS = 400
LEAST_ROWS = 20
MOST_OF_A_PROMPT = 8  # rows: more would leave few prompts
LEAST_LABELLED = 10  # wrong rows, and right ones
IN_ALL, MOST_OF_A_KIND, FEWEST_OF_A_KIND = 320, 60, 20  # planted rows


@dataclass(frozen=True)
class Drawn:
    """The drawn rows, and those planted in copies of them.

    Attributes:
        base: the drawn rows under TRL's names.
        others: the usable rows that were not drawn, under TRL's names, too.
        examples: the same rows as prompt and answer.
        wrong: (N,) bool, which of them the user's labels call wrong; None without labels.
        contradicted: (N,) whether other answers to the same prompt contradict it, see `contradictions`.
        planted: the rows with faults.
        kinds: the kinds of faults.
        left_out: why other kinds were not planted.
        notes: what is to be said of the rows.
    """

    base: Dataset
    others: Dataset
    examples: list[Example]
    wrong: np.ndarray | None
    contradicted: np.ndarray
    planted: list[Planted]
    kinds: dict[str, Fault]
    left_out: dict[str, str]
    notes: list[str]

    @property
    def right(self) -> list[Example]:
        """The rows that no label calls wrong, and no other answers contradict."""
        wrong = self.contradicted == CONTRADICTED if self.wrong is None else self.wrong
        return [each for each, gone in zip(self.examples, wrong, strict=True) if not gone]

    @property
    def contradict(self) -> bool:
        """Whether enough rows contradict each other to compare them."""
        told = [int((self.contradicted == each).sum()) for each in (AGREES, CONTRADICTED)]
        return min(told) >= LEAST_CONTRADICTED

    def together(self) -> Dataset:
        """The drawn rows and then the planted ones, under TRL's names."""
        rows = [*(each.values for each in self.examples), *(each.values for each in self.planted)]
        features = self.base.features
        columns = {name: [encoded(kind, row[name]) for row in rows] for name, kind in features.items()}
        return Dataset.from_dict(columns, features=features)

    def digest(self) -> str:
        """A hash of all rows, planted ones included, their kinds and labels."""
        wrong = None if self.wrong is None else self.wrong.tolist()
        rows = [[each.row, each.values] for each in self.examples]
        text = json.dumps([rows, [dataclasses.asdict(each) for each in self.planted], wrong], default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def kinds_of(kinds: str | Sequence[str] | None, faults: Sequence[Any]) -> dict[str, Fault]:
    """The kinds of faults to plant.

    Args:
        kinds: names of `FAULTS`, as a list or as text with commas; `"all"`; or None for none of them.
        faults: the user's own: functions from a row to a row with a fault, or where one is, `file.py:function`.

    Raises:
        InputError: a name is not known, or a fault is no function.
    """
    check_kind("kinds", kinds, (str, Sequence, type(None)), f"names of kinds of faults, or {EVERY!r}")
    names = [each.strip() for each in kinds.split(",")] if isinstance(kinds, str) else list(kinds or ())
    for name in names:
        one_of("kinds", name, (*FAULTS, EVERY))
    found = {name: fault for name, fault in FAULTS.items() if name in names or EVERY in names}
    check_kind("faults", faults, (list, tuple), "a list of functions")
    for each in faults:
        name, fault = load_fault(each) if isinstance(each, str) else (_name_of(each), own_fault(each))
        if name in (*found, *FAULTS, *RESERVED):
            raise InputError(f"There is a kind of fault named '{name}' already: give the function another name.")
        found[name] = fault
    return found


def draw(
    dataset: Dataset,
    args: SFTConfig,
    rows: int,
    kinds: Mapping[str, Fault],
    faults_per_kind: int | None,
    wrong_column: str | None,
    seed: int,
    *,
    drop_duplicates: bool = False,
    drop_empty: bool = False,
    source: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Drawn:
    """Draw rows at random, and plant faults in copies of those that no label calls wrong.

    Args:
        dataset, args, drop_duplicates, drop_empty, source, **columns: as for `score_dataset`.
        rows, faults_per_kind, wrong_column, seed: as for `probe_dataset`.
        kinds: what `kinds_of` returns.

    Raises:
        InputError: too few rows can be used or have one of the labels, or a label is none.
    """
    check_keywords(columns, ROW_OPTIONS)
    check_kind("dataset", dataset, Dataset, "a Dataset")
    mapping, notes = ColumnMapping(**columns), list[str]()
    labels = None if wrong_column is None else labels_of(dataset, wrong_column)
    usable, _ = usable_rows(dataset, mapping, args, drop_duplicates, drop_empty, notes)
    notes = [f"Rows were read as TRL's format: {'; '.join(notes)}."] if notes else []
    positions = _drawn(usable, args.dataset_text_field, labels, rows, seed)
    base, examples = examples_of(dataset, mapping, args, positions)
    if len(examples) < LEAST_ROWS:
        raise InputError(
            f"{len(examples)} of {len(dataset)} rows can be probed, and at least {LEAST_ROWS} are needed to compare "
            "rows with a fault to rows without. Pass more rows."
        )
    if len(examples) < rows:
        notes.append(f"{len(examples)} rows were drawn, not {rows}: the dataset has no more that can be probed.")
    wrong = None if labels is None else labels[[each.row for each in examples]]
    if wrong is not None:
        _check_labels(wrong, str(wrong_column))
    others = usable.select(np.flatnonzero(~np.isin(usable[ROW_POSITION], positions))).remove_columns(ROW_POSITION)
    drawn = Drawn(base, others, examples, wrong, contradicted(examples), [], {}, {}, notes)
    count = min(faults_per_kind or _affordable(len(kinds)), len(drawn.right))
    planted, left_out = plant(drawn.right, kinds, count, seed)
    there = {each.kind for each in planted}
    return dataclasses.replace(
        drawn,
        planted=planted,
        kinds={name: fault for name, fault in kinds.items() if name in there},
        left_out=left_out,
    )


def check_counts(rows: Any, faults_per_kind: Any, seed: Any) -> None:
    """Raise InputError for numbers that cannot work."""
    whole_number("rows", rows, least=LEAST_ROWS)
    whole_number("seed", seed, least=0)
    if faults_per_kind is not None:
        whole_number("faults_per_kind", faults_per_kind, least=FEWEST_OF_A_KIND // 4)


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _affordable(kinds: int) -> int:
    """The faults of each kind, so that all together cost about as much as the drawn rows."""
    return min(max(IN_ALL // max(kinds, 1), FEWEST_OF_A_KIND), MOST_OF_A_KIND)


def _drawn(usable: Dataset, text_field: str, labels: np.ndarray | None, rows: int, seed: int) -> np.ndarray:
    """The positions of rows drawn at random, ascending: prompts with their rows; with labels, up to half wrong ones."""
    positions = np.array(usable[ROW_POSITION])
    order = np.random.default_rng([seed, 0]).permutation(len(positions))
    if labels is None:
        repeated = duplicate_rows(usable.remove_columns(ROW_POSITION), text_field)
        if "prompt" in usable.column_names:  # rows without a prompt share none
            prompts = usable["prompt"]
            repeated = {row: first for row, first in repeated.items() if said(prompts[row]).strip()}
        return np.sort(positions[whole_prompts(order, repeated, rows, MOST_OF_A_PROMPT)])
    shuffled = positions[order]
    wrong, right = shuffled[labels[shuffled]], shuffled[~labels[shuffled]]
    some = wrong[: max(rows // 2, rows - len(right))]
    return np.sort(np.concatenate([some, right[: rows - len(some)]]))


def _check_labels(wrong: np.ndarray, name: str) -> None:
    for count, what in ((int(wrong.sum()), "wrong"), (int((~wrong).sum()), "right")):
        if count < LEAST_LABELLED:
            raise InputError(
                f"wrong_column '{name}' calls {count} of the {len(wrong)} drawn rows {what}, and at least "
                f"{LEAST_LABELLED} are needed. Leave it out, or pass more rows."
            )
