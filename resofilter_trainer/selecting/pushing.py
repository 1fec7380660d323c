"""Kept rows and the selection that kept them, pushed to the hub. Knows repositories, not how rows were selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..config import InputError, check_keywords
from ..io.hub import PushOptions, hub_errors, push_files, remove_file

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, DatasetCard

OF_COMMIT = tuple(PushOptions.__annotations__)


def push_kept(
    rows: Any,
    write: Callable[[Path], Path],
    file: str,
    card: DatasetCard,
    repo_id: str,
    options: Mapping[str, Any],
) -> CommitInfo:
    """Push rows by `datasets`, then their selection and card in one commit. Rows are never beside another selection.

    Args:
        rows: the kept rows; None to push the selection alone.
        write: writes the selection to a folder.
        file: the name of its file there.
        card: their card.
        repo_id: `owner/name`.
        options: arguments of `Dataset.push_to_hub`; without rows, those of `PushOptions`.

    Raises:
        InputError: nobody is logged in, the token may not write there, or the hub cannot be reached.
    """
    own = {name: options[name] for name in OF_COMMIT if name in options}
    if rows is None:
        check_keywords({name: value for name, value in options.items() if name not in own}, OF_COMMIT)
    else:
        if not own.get("create_pr"):
            remove_file(file, repo_id, own.get("token"), own.get("revision"))
        with hub_errors(repo_id):
            try:
                commit = rows.push_to_hub(repo_id, **options)
            except TypeError as error:  # an argument that `Dataset.push_to_hub` does not have
                raise InputError(f"The rows cannot be pushed to '{repo_id}': {error}.") from error
        if getattr(commit, "pr_revision", None):
            own |= {"revision": commit.pr_revision, "create_pr": False}
    cast(Any, card.data).configs = [{"config_name": Path(file).stem, "data_files": file}]
    columns = {} if rows is None else {options.get("config_name", "default"): rows.column_names}
    return push_files(write, card, repo_id, columns=columns, **own)
