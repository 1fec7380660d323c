"""The rows that stay, as a dataset beside the selection that chose them. Knows folders, not how it was chosen."""

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
REPLACED = ".dataset.replaced"  # until the new one is there


def check_place(output: Path, source: str | None) -> None:
    """Raise InputError where the rows that stay would replace anything but those of an earlier selection.

    Args:
        output: the folder of the selection.
        source: the dataset that was scored, by its name or path, where that is known.
    """
    folder = output / DATASET
    ours = (output / SELECTION_FILE).exists()
    if folder.exists() and (not ours or (source is not None and folder.resolve() == Path(source).resolve())):
        raise InputError(f"'{folder}' holds something that is no earlier selection. Choose another output.")


def save_kept(rows: Dataset, selection: Selection, output: Path, group_column: str | None = None) -> Path:
    """Write a selection, the rows that it keeps and their card; at no moment do rows lie beside another selection.

    Args:
        rows: that stay.
        selection: that says so.
        output: a folder; an earlier selection's rows in it are replaced.
        group_column: for the card, where shares held within its groups.

    Returns:
        The selection's file.
    """
    folder, replaced = output / DATASET, output / REPLACED
    with replacing(folder) as part:
        rows.save_to_disk(part)
        selection.card(group_column=group_column).save(part / "README.md")
        flush(part)  # before anything gives way to it
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
