"""The kept rows as a dataset, beside the selection that kept them. Knows folders, not how rows were selected."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import InputError
from ..io.files import flush, replacing
from .selection import SELECTION_FILE, Selection

if TYPE_CHECKING:
    from datasets import Dataset

DATASET = "dataset"
REPLACED = ".dataset.replaced"  # the earlier rows, until the new ones are in place


def check_place(output: Path, source: str | None) -> None:
    """Raise InputError where the kept rows would replace anything but those of an earlier selection.

    Args:
        output: the folder of the selection.
        source: the name or path of the scored dataset, if known.
    """
    folder = output / DATASET
    ours = (output / SELECTION_FILE).exists()
    if folder.exists() and (not ours or (source is not None and folder.resolve() == Path(source).resolve())):
        raise InputError(f"'{folder}' exists and is no earlier selection's. Choose another output.")


def save_kept(rows: Dataset, selection: Selection, output: Path, group_column: str | None = None) -> Path:
    """Write a selection, the rows that it keeps and their card. Rows are never beside another selection than theirs.

    Args:
        rows: the kept rows, as `Selection.apply` gives them.
        selection: the selection that keeps them.
        output: a folder; the rows of an earlier selection in it are replaced.
        group_column: the column whose groups each have their share, for the card.

    Returns:
        The selection's file.
    """
    folder, replaced = output / DATASET, output / REPLACED
    with replacing(folder) as temporary:
        rows.save_to_disk(temporary)
        selection.card(group_column=group_column).save(temporary / "README.md")
        flush(temporary)  # before the earlier rows are moved away
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        try:
            saved = selection.save(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise
    shutil.rmtree(replaced, ignore_errors=True)
    return saved
