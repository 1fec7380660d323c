"""Whether the processes of a pass share the preparation of its rows, where it is kept, and by which name it is found.

    beside the dataset's files, or in the output folder / resofilter-<rows> / <tokens> / ...

A name is a hash of everything that the rows, or their tokens, depend on; the dataset's files count by their name, size
and time of change, as they do for `Dataset.map`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig

from ..config import ColumnMapping
from ..io.digest import BLOCK
from ..io.files import remove_folder
from .preparation import PreparedRows
from .shared_rows import SharedRows, are_kept, kept_rows, read_shared, save_rows
from .shared_tokens import SharedTokens
from .together import from_main, seen_by_all

LEAST = 2 * BLOCK  # rows; fewer are prepared in no time
PREPARED = "prepared"  # in an output folder
IGNORED = ("model_init_kwargs", "packing", "padding_free", "shuffle_dataset", "activation_offloading")  # by `prepare`
PACKAGES = ("resofilter_trainer", "datasets", "tokenizers", "transformers", "trl")


@dataclass(frozen=True)
class Sharing:
    """The rows of a pass, prepared by all of its processes together.

    Attributes:
        dataset: the user's rows.
        mapping, args, drop_duplicates, drop_empty: as for `usable_rows`.
        place: a folder that all processes see.
    """

    dataset: Dataset
    mapping: ColumnMapping
    args: SFTConfig
    drop_duplicates: bool
    drop_empty: bool
    place: Path

    def rows(self) -> SharedRows:
        """The usable rows, as `usable_rows`; all processes call this. Raises InputError as that does."""
        kept = (
            kept_rows(self.dataset, self.mapping, self.args, self.place)
            if from_main(lambda: are_kept(self.place))
            else None
        )
        if kept is not None:
            return kept
        options = self.mapping, self.args, self.drop_duplicates, self.drop_empty
        rows = read_shared(self.dataset, *options, self.place)
        from_main(lambda: save_rows(rows, self.place))
        return rows

    def prepared(self, rows: SharedRows, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
        """The rows as tokens, as `preparation.prepare`; all processes call this. Raises InputError as that does."""
        name = from_main(lambda: _name_of_tokens(tokenizer, self.args))
        tokens = SharedTokens(self.place / name, len(self.dataset))
        if from_main(lambda: tokens.made):
            return tokens.read()
        return tokens.prepare(rows, tokenizer, self.args, self.drop_empty)


def sharing_of(
    dataset: Any, mapping: ColumnMapping, args: SFTConfig, drop_duplicates: bool, drop_empty: bool, output: Path | None
) -> Sharing | None:
    """How the processes share the preparation of these rows; None where each process prepares them all.

    Args:
        dataset, mapping, args, drop_duplicates, drop_empty: as for `usable_rows`.
        output: the folder of the scores, if there is one.
    """
    if not isinstance(dataset, Dataset) or len(dataset) < LEAST or dataset.format["type"] == "custom":
        return None
    _ = args.device  # which decides how processes talk to each other
    folders = [Path(each["filename"]).parent for each in dataset.cache_files[:1]]
    folders += [] if output is None else [output / PREPARED]
    options = (mapping, args, drop_duplicates, drop_empty)
    for folder in folders:
        found = from_main(partial(_marked, folder, dataset, *options))
        if found is None:
            continue
        place, mark = found
        seen = seen_by_all(mark)
        mark.unlink(missing_ok=True)
        if seen:
            return Sharing(dataset, *options, place)
    return None


def remove_prepared(output: Path | None) -> None:
    """Remove what was kept in an output folder, once its scores are there."""
    if output is not None and (output / PREPARED).exists():
        remove_folder(output / PREPARED)


def _marked(folder: Path, dataset: Dataset, *options: Any) -> tuple[Path, Path] | None:
    """A folder for these rows, and a new file in it by which other processes know that they see it.

    None where nothing can be written.
    """
    with contextlib.suppress(OSError):
        place = folder / f"resofilter-{_name_of_rows(dataset, *options)}"
        place.mkdir(parents=True, exist_ok=True)
        mark = place / f"seen-{secrets.token_hex(8)}"
        mark.touch()
        return place, mark
    return None


def _name_of_rows(
    dataset: Dataset, mapping: ColumnMapping, args: SFTConfig, drop_duplicates: bool, drop_empty: bool
) -> str:
    """A hash of everything that the reading of rows depends on."""
    files = [Path(each["filename"]) for each in dataset.cache_files]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    own = {each.name for each in dataclasses.fields(SFTConfig)} - {
        each.name for each in dataclasses.fields(TrainingArguments)
    }
    made_of = {
        "dataset": [dataset._fingerprint, stats, len(dataset), repr(dataset.features), repr(dataset.format)],
        "mapping": dataclasses.asdict(mapping),
        "args": {name: getattr(args, name) for name in sorted(own)},
        "options": [drop_duplicates, drop_empty],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    return str(Hasher.hash(json.dumps(made_of, default=repr)))


def _name_of_tokens(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str:
    """A hash of everything else that the tokens depend on: the tokenizer and the template's file."""
    template = Path(args.chat_template_path or os.devnull)
    files = sorted(template.rglob("*")) if template.is_dir() else [template]
    return str(Hasher.hash([tokenizer, *(path.read_bytes() for path in files if path.is_file())]))
