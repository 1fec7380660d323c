"""The kept rows as a dataset, beside the selection that kept them. Knows folders, not how rows were selected."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import InputError
from ..io.files import flush, remove_folder, replacing
from .results import DROPPED_FILE, PAGE, PAGE_FILES
from .selection import SELECTION_FILE, Selection, source_of
from .training_lines import TRAINED

if TYPE_CHECKING:
    from datasets import Dataset

DATASET = "dataset"
EXPORTED = "exported"  # the rows as files for other trainers
OF_SELECTION = (DATASET, EXPORTED, PAGE, PAGE_FILES)  # what is made of a selection, and goes with it


def check_place(output: Path, source: str | None) -> None:
    """Raise InputError where the kept rows would replace anything but those of an earlier selection.

    Args:
        output: the folder of the selection.
        source: the name or path of the scored dataset, if known.
    """
    ours = (output / SELECTION_FILE).exists()
    for folder in (output / DATASET, output / EXPORTED):
        is_source = source is not None and folder.resolve() in (Path(source).resolve(), Path(source).resolve().parent)
        if folder.exists() and (not ours or is_source):
            what = "holds the rows that were scored" if ours else "exists and is no earlier selection's"
            raise InputError(f"'{folder}' {what}. Choose another output.")


def check_no_other(output: Path, selection: Selection) -> None:
    """Raise InputError where a folder holds another selection than this one, which would be lost."""
    if (output / SELECTION_FILE).exists() and not _holds(output, selection):
        raise InputError(
            f"'{output}' holds another selection. Choose another folder, or pass overwrite=True to replace it."
        )


def trained_on_another(output: Path, selection: Selection) -> Path | None:
    """The model that the printed lines have trained on another selection than this one; None if there is none.

    Args:
        output: the folder, which still holds the earlier selection.
        selection: the one that is about to replace it.
    """
    trained = output / TRAINED
    known = trained.is_dir() and (output / SELECTION_FILE).exists()
    return trained if known and not _holds(output, selection) else None


def _holds(output: Path, selection: Selection) -> bool:
    """Whether a folder holds this very selection."""
    try:
        return Selection.load(output) == selection
    except InputError:  # none, a damaged one, or one of another version
        return False


def save_kept(
    rows: Dataset | None,
    selection: Selection,
    output: Path,
    group_column: str | None = None,
    export: Callable[[Path], object] | None = None,
) -> Path:
    """Write a selection, the rows that it keeps and their card. Rows are never beside another selection than theirs.

    Of another selection in the folder, its rows, exported files and report are removed; of the same one, what is not
    written anew stays.

    Args:
        rows: the kept rows, as `Selection.apply` gives them; None to write the selection alone.
        selection: the selection that keeps them.
        output: a folder.
        group_column: the column whose groups each have their share, for the card.
        export: writes the rows to a folder as files for other trainers, if they are wanted.

    Returns:
        The selection's file.
    """
    known = source_of(selection.provenance).get("content") is not None  # else the rows may differ
    same = _holds(output, selection) and known
    written = {DATASET: rows is not None, EXPORTED: export is not None}
    replaced = [name for name, anew in written.items() if anew or not same]
    if not same and (output / SELECTION_FILE).exists() and (output / PAGE_FILES / DROPPED_FILE).exists():
        replaced += [PAGE, PAGE_FILES]
    with contextlib.ExitStack() as stack:
        if rows is not None:
            folder = stack.enter_context(replacing(output / DATASET))
            rows.save_to_disk(folder)
            selection.card(group_column=group_column, folders=True).save(folder / "README.md")
            flush(folder)  # before the earlier rows are moved away
        if export is not None:
            exported = stack.enter_context(replacing(output / EXPORTED))
            if same and (output / EXPORTED).is_dir():
                shutil.copytree(output / EXPORTED, exported)  # files in other formats
            exported.mkdir(exist_ok=True)
            export(exported)
            flush(exported)
        with _moved_away(output, replaced):
            saved = selection.save(output)
    for name in replaced:
        remove_folder(_replaced(output, name))
    return saved


@contextlib.contextmanager
def _moved_away(output: Path, names: Sequence[str]) -> Iterator[None]:
    """Moves what is replaced out of the way, and back after an error."""
    for name in OF_SELECTION:  # a killed run may have left some
        remove_folder(_replaced(output, name))
    for name in names:
        if (output / name).exists():
            (output / name).rename(_replaced(output, name))
    try:
        yield
    except BaseException:
        for name in names:
            if _replaced(output, name).exists():
                _replaced(output, name).rename(output / name)
        raise


def _replaced(output: Path, name: str) -> Path:
    """Where an earlier folder or file is until the new ones are in place."""
    return output / f".{name}.replaced"
