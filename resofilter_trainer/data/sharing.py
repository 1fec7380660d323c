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
import secrets
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset
from datasets.fingerprint import Hasher
from datasets.table import ConcatenationTable, MemoryMappedTable
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, enable_full_determinism, set_seed
from trl import SFTConfig

from ..config import ColumnMapping
from ..io.digest import BLOCK, same_rows
from ..io.files import remove_folder
from .preparation import PreparedRows
from .shared_rows import SharedRows, are_kept, kept_content, kept_rows, read_shared, save_rows
from .shared_tokens import SharedTokens
from .together import from_main, seen_by_all

LEAST = 2 * BLOCK  # rows; fewer are prepared in no time
PREPARED = ".resofilter-prepared"  # in an output folder
OWN = "resofilter-"  # begins the names of the folders of rows
# settings of SFTConfig that `preparation.prepare` sets itself, or that are about batches and processes
IGNORED = frozenset({
    "activation_offloading", "dataset_num_proc", "model_init_kwargs", "packing", "packing_strategy",
    "pad_to_multiple_of", "padding_free", "router_aux_loss_coef", "shuffle_dataset",
})  # fmt: skip
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
        if from_main(self._are_kept):
            return kept_rows(self.dataset, self.mapping, self.args, self.place)
        options = self.mapping, self.args, self.drop_duplicates, self.drop_empty
        rows = read_shared(self.dataset, *options, self.place)
        from_main(lambda: save_rows(rows, self.place))
        return rows

    def prepared(self, rows: SharedRows, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
        """The rows as tokens, as `preparation.prepare`; all processes call this. Raises InputError as that does."""
        name = from_main(lambda: _name_of_tokens(tokenizer, self.args))
        content = rows.content.rpartition(":")[2]  # another run may have put rows of the same name here since
        tokens = SharedTokens(self.place / f"{name}-{content}", len(self.dataset))
        if from_main(lambda: tokens.made):
            prepared = tokens.read()
        else:
            prepared = tokens.prepare(rows, tokenizer, self.args, self.drop_empty)
        # as SFTTrainer does, which a process that prepares nothing does not build
        enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)
        return prepared

    def _are_kept(self) -> bool:
        """Whether the rows in the place are these; others are removed."""
        if not are_kept(self.place):
            return False
        if not _has_rows_in_memory(self.dataset) or same_rows(kept_content(self.place), self.dataset):
            return True
        remove_folder(self.place)
        return False


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
    if output is None or not (output / PREPARED).is_dir():
        return
    for folder in (output / PREPARED).glob(f"{OWN}*"):
        remove_folder(folder)
    for rest in (output / PREPARED).glob(f".{OWN}*.part"):  # of a process that was killed here
        shutil.rmtree(rest, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is something else in it
        (output / PREPARED).rmdir()


def _marked(folder: Path, dataset: Dataset, *options: Any) -> tuple[Path, Path] | None:
    """A folder for these rows, and a new file in it by which other processes know that they see it.

    None where nothing can be written.
    """
    with contextlib.suppress(OSError):
        place = folder / f"{OWN}{_name_of_rows(dataset, *options)}"
        place.mkdir(parents=True, exist_ok=True)
        mark = place / f"seen-{secrets.token_hex(8)}"
        mark.touch()
        return place, mark
    return None


def _has_rows_in_memory(dataset: Dataset) -> bool:
    """Whether values of a dataset are in no file that could tell whether they are the same as before.

    The fingerprint does not tell: after `Dataset.map` it is that of the function's code, not of what that reads.
    """
    table = dataset.data
    blocks = [block for row in table.blocks for block in row] if isinstance(table, ConcatenationTable) else [table]
    return not all(isinstance(block, MemoryMappedTable) for block in blocks)


def _name_of_rows(
    dataset: Dataset, mapping: ColumnMapping, args: SFTConfig, drop_duplicates: bool, drop_empty: bool
) -> str:
    """A hash of everything that the reading of rows depends on."""
    files = [Path(each["filename"]) for each in dataset.cache_files]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    order = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
    names = {each.name for each in dataclasses.fields(SFTConfig)} - IGNORED
    names -= {each.name for each in dataclasses.fields(TrainingArguments)}
    made_of = {
        "dataset": [dataset._fingerprint, stats, len(dataset), repr(dataset.features), repr(dataset.format)],
        "order": None if order is None else xxhash.xxh3_128_hexdigest(order),
        "mapping": dataclasses.asdict(mapping),
        "args": {name: getattr(args, name) for name in sorted(names)},
        "options": [drop_duplicates, drop_empty],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    return str(Hasher.hash(json.dumps(made_of, default=_as_text)))


def _as_text(value: Any) -> str:
    """A value that JSON lacks, by its content: its own text may have its place in memory, another one at each start."""
    try:
        return str(Hasher.hash(value))
    except Exception:  # pickling raises what it likes
        return repr(value)


def _name_of_tokens(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str:
    """A hash of everything else that the tokens depend on: the tokenizer, and the template or that of another one."""
    template: Any = args.chat_template_path
    if template is not None and Path(template).is_file():
        template = Path(template).read_bytes()
    elif template is not None:
        with contextlib.suppress(Exception):  # the preparation will refuse it
            template = AutoTokenizer.from_pretrained(template)  # as TRL does, of a folder or from the hub
    return str(Hasher.hash([tokenizer, template]))
