"""Which rows of a dataset can be used, and why others are skipped or refused. Knows datasets, not tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from datasets import Dataset
from trl import SFTConfig

from ..config import ColumnMapping, InputError, NothingError
from ..scores.score_table import EMPTY, SAME_PROMPT
from .columns import media_columns
from .reading import Reader
from .rows import duplicate_rows, empty_rows, listed_rows, read_rows, told_of
from .surveys import ROW_POSITION


def usable_rows(
    dataset: Dataset,
    mapping: ColumnMapping,
    args: SFTConfig,
    drop_duplicates: bool,
    drop_empty: bool,
    notes: list[str] | None = None,
) -> tuple[Dataset, dict[int, str]]:
    """The columns that TRL reads of the usable rows, each with its position, and by position why others are skipped.

    Args:
        dataset, drop_duplicates, drop_empty: as for `score_dataset`.
        mapping: which column is which.
        args: what is learnt of a row, and where TRL looks for text.
        notes: a list to extend with notes on what was read as something else.

    Raises:
        InputError: no row is usable, or there are rows to skip and `drop_empty` is False.
    """
    check_unpacked(dataset)
    field = args.dataset_text_field
    read = read_rows(dataset, mapping, field, args)
    if not mapping.columns:
        check_no_media(dataset)
    rows = read.dataset.select_columns(read.passed)
    reasons: dict[int, str] = {}
    if drop_duplicates:
        repeated = duplicate_rows(rows, field)
        reasons = {row: f"{SAME_PROMPT} {read.positions[first]}" for row, first in repeated.items()}
    empty = dict.fromkeys((row for row in empty_rows(rows, field) if row not in reasons), EMPTY)
    skipped = {int(read.positions[row]): reason for row, reason in (reasons | empty).items()}
    check_skipped({int(read.positions[row]): EMPTY for row in empty} | read.refused, len(dataset), drop_empty)
    skipped |= read.refused
    if len(skipped) == len(dataset):
        raise all_skipped(skipped)
    if notes is not None:
        notes += read.notes
    rows = rows.add_column(ROW_POSITION, read.positions)
    gone = reasons.keys() | empty.keys()
    return rows.select(np.setdiff1d(np.arange(len(rows)), list(gone))) if gone else rows, skipped


def check_columns(dataset: Dataset, mapping: ColumnMapping, args: SFTConfig) -> None:
    """Raise InputError for columns that are missing, or of which no row can be made; no row is read."""
    check_unpacked(dataset)
    Reader.of(dataset, mapping, args.dataset_text_field, args)


def check_unpacked(dataset: Dataset) -> None:
    """Raise InputError where rows are packs of several samples."""
    if "seq_lengths" in (getattr(dataset, "column_names", None) or ()):
        raise InputError(
            "The rows are packed already (seq_lengths), several samples in one: pass the rows before packing, or "
            "resofilter_trainer.unpack(dataset), which makes a row of each sample."
        )


def all_skipped(skipped: dict[int, str]) -> NothingError:
    """The error of rows all of which are skipped, each with its reason."""
    return NothingError(
        f"All {len(skipped)} rows are empty or repeated: there is nothing to score or to train on.", skipped
    )


def check_skipped(skipped: Mapping[int, str], rows: int, drop_empty: bool) -> None:
    """Raise InputError as `check_refused`, in other words where the completions of all skipped rows are empty."""
    if skipped and not drop_empty and all(reason == EMPTY for reason in skipped.values()):
        raise InputError(
            f"{len(skipped)} of {rows} rows have an empty completion and teach nothing: rows {listed_rows(skipped)}. "
            "Remove them, or skip them with drop_empty=True."
        )
    check_refused(skipped, rows, drop_empty)


def check_refused(refused: Mapping[int, str], rows: int, drop_empty: bool) -> None:
    """Raise InputError where some of these rows are refused, and they are not to be skipped or are all there are."""
    if not refused:
        return
    line = told_of(refused, rows, "cannot be learnt from")
    if not drop_empty:
        raise InputError(f"{line} Correct or remove them, or skip them with drop_empty=True.")
    if len(refused) == rows:
        raise NothingError(line, refused)


def check_no_media(dataset: Dataset) -> None:
    """Raise InputError where rows have images or sound, on which SFTTrainer would train as well."""
    for name, row in media_columns(dataset).items():
        raise InputError(
            f"Column '{name}' is not empty (row {row}), and only text can be scored. Remove the column to score the "
            f"text alone, with dataset.remove_columns('{name}'), or name the columns of the text, such as "
            'messages_column="messages".'
        )
