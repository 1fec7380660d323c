"""The report of scores with the texts of their rows. Knows rows and the page; imports datasets only where rows are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from ..config import InputError, check_kind, with_known_keywords
from ..report import Contents, Report
from ..report import write_report as write_page
from ..scores.score_table import ScoreTable
from ..scores.shards import difference
from ..selecting.groups import check_groups
from ..selecting.selection import Selection

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "resofilter-report"
ID = "id"
WHAT = "a ScoreTable, as score_dataset returns, or the result of read_contents"
ROWS = "a datasets.Dataset, as load_rows returns, or a list with a pair of prompt and completion for each row"


@with_known_keywords
def write_report(
    scores: ScoreTable | Contents,
    selection: Selection | str | os.PathLike[str] | None = None,
    dataset: Dataset | Sequence[tuple[str, str]] | None = None,
    groups: str | Sequence[Any] | None = None,
    decode: Callable[[Sequence[int]], list[str]] | None = None,
    title: str | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    check_rows: bool = True,
    ids: str | Sequence[Any] | None = None,
) -> Report:
    """Write a page that shows why rows were dropped: `report.html`, and charts and all dropped rows beside it.

    >>> write_report(scores, selection, dataset)    # in a notebook, the page is shown

    Args:
        scores: the scores of all rows; or what `read_contents` found in a folder.
        selection: the selection that was made from them; by default that of `read_contents`, or of `DataSelector()`.
            As in version 0.1.0, `write_report(contents, folder, texts)` is understood, too.
        dataset: the dataset that was scored, whose texts the page shows; or its texts, a pair of prompt and completion
            for each row.
        groups: the column of the dataset with the group of each row, such as its source; or the groups themselves.
        decode: a function from token ids to the text of each; it shows which tokens are learnt.
        title: the title of the page.
        output: the folder to write to; by default `resofilter-report`.
        check_rows: whether all values of the dataset must be those that were scored. `False` is for the same rows in
            the same order with other columns.
        ids: the column of the dataset with your own id of each row, or the ids themselves; by default `id`, where there
            is such a column. The page finds rows by it, and the lists of dropped rows have it.

    Raises:
        InputError: the dataset has other rows than were scored, the selection is of other scores, a column is missing,
            the folder cannot be written to, or what draws the charts is not installed.
    """
    check_kind("scores", scores, (ScoreTable, Contents), WHAT)
    if isinstance(selection, str | os.PathLike):
        if not isinstance(scores, Contents) or output is not None:
            raise InputError(f"selection must be a Selection, got {selection!r}: pass Selection.load of that folder.")
        selection, output = None, selection  # the order of version 0.1.0: contents, folder, texts
    check_kind("selection", selection, (Selection, type(None)), "a Selection")
    contents = _contents(scores, selection)
    texts = dataset
    if _is_dataset(dataset):
        texts = _texts(contents.scores, dataset, check_rows)
        groups, ids = column_of(dataset, groups), column_of(dataset, default_id(dataset) if ids is None else ids)
    for name, values in (("groups", groups), ("ids", ids)):
        if isinstance(values, str):
            raise InputError(f"{name}='{values}' is a column of the dataset: pass dataset=.")
    if groups is not None and contents.scores is not None:
        check_groups(groups, len(contents.scores))
    return write_page(contents, FOLDER if output is None else output, texts, groups, decode, title, ids)


def _contents(scores: ScoreTable | Contents, selection: Selection | None) -> Contents:
    """What to show: the contents, with another selection if one is passed."""
    if isinstance(scores, ScoreTable):
        return Contents(scores, selection)
    if selection is None:
        return scores
    return dataclasses.replace(scores, selection=selection)


def _is_dataset(rows: Any) -> bool:
    """Whether rows are a Dataset, not texts. Raises InputError for what is neither."""
    if isinstance(rows, Mapping):
        split = next(iter(rows), "train")
        raise InputError(f"dataset must be one split, and this is a {type(rows).__name__}: pass dataset['{split}'].")
    if rows is None or (hasattr(rows, "with_format") and isinstance(rows, Sized)):
        return rows is not None
    if isinstance(rows, str):
        raise InputError(f"dataset must be {ROWS}, got {rows!r}: pass load_rows({rows!r}).")
    check_kind("dataset", rows, Sequence, ROWS)
    for row, each in enumerate(rows if isinstance(rows, list | tuple) else ()):
        pair = isinstance(each, list | tuple) and len(each) == 2
        if not pair or not all(isinstance(text, str) for text in each):
            raise InputError(f"dataset must be {ROWS}, and row {row} is no pair of texts but a {type(each).__name__}.")
    return False


def default_id(dataset: Dataset) -> str | None:
    """The column with the user's own ids: `id`; None where the dataset has none."""
    return ID if ID in dataset.column_names else None


def column_of(dataset: Dataset, name: Any) -> Any:
    """The values of a column as text; anything but a name as it is. Raises InputError for a column that is missing."""
    if not isinstance(name, str):
        return name
    if name not in dataset.column_names:
        raise InputError(f"There is no column '{name}'. The dataset has: {', '.join(dataset.column_names)}.")
    return ["" if each is None else str(each) for each in dataset[name][:]]


def _texts(scores: ScoreTable | None, dataset: Any, check_rows: bool) -> Any:
    """The texts of a dataset, None where they are not known. Raises InputError for other rows than were scored."""
    from .layout import scored_columns
    from .row_texts import RowTexts

    if scores is None:
        raise InputError("There are no scores whose rows could be shown: leave dataset= out.")
    provenance = scores.provenance
    if len(dataset) != provenance.rows:
        raise InputError(f"The dataset has {len(dataset)} rows and the scores are of {provenance.rows}.")
    where = difference(provenance.source, dataset) if check_rows else None
    if where is not None:
        raise InputError(
            "The dataset is not what was scored: its values, its columns or the order of its rows differ. Pass the "
            "dataset as it was scored; if only columns differ, and row i is still row i, pass check_rows=False." + where
        )
    texts = RowTexts(dataset, scored_columns(provenance.preparation))
    return texts if texts.known else None
