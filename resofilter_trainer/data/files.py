"""Datasets from files, folders and the hub, whole or as a stream. Knows datasets' loading, not what a row means."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    BuilderConfig,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset_builder,
    load_from_disk,
)
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import DataFilesDict
from datasets.exceptions import DatasetGenerationError
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.json.json import Json as JsonFiles
from datasets.packaged_modules.parquet.parquet import Parquet

from ..config import FILE_FORMATS, InputError, check_kind, with_known_keywords
from ..config.environment import launched_here
from ..io.hub import CARD, KIND, check_reachable
from ..scores.shards import Shard
from .folders import check_all_read, check_parquet
from .row_files import VERSION, RowFiles

SPLITS = "dataset_dict.json"  # in a folder of several splits
PARQUET_ROWS = 10_000  # at a time; datasets takes the number of a file's first row group, and fails where that is 0
CSV_OPTIONS = ("sep", "column_names", "encoding", "quotechar", "escapechar", "doublequote", "quoting")


@with_known_keywords
def load_rows(source: str, split: str = "train", name: str | None = None) -> Dataset:
    """Load the rows of a dataset. The values of CSV, TSV and JSON files are read as they are written (`row_files`).

    Args:
        source: a JSON, JSONL, CSV, TSV or Parquet file, compressed or not; a folder written by `save_to_disk`, a
            folder of data files, or a name on the hub.
        split: the split, or a part of it, such as `train[:100]`. A single file has one split, `train`.
        name: the configuration of a dataset on the hub.

    Raises:
        InputError: the dataset does not exist, cannot be read or reached, has no such split or configuration, or has no
            rows.
    """
    _check_source(source, split, name)
    with _one_line(source, "loaded"):
        if is_saved(source):
            found = _saved_split(source, split)
        else:
            builder = _builder(source, name, split)
            _convert(builder)
            found = builder.as_dataset(split=split)
    if len(found) == 0:
        raise InputError(f"The dataset '{source}' has no rows.")
    return found


def check_place(source: str, split: str = "train", name: str | None = None) -> None:
    """Raise InputError where there is no such dataset, split or configuration; no row is read or downloaded."""
    _check_source(source, split, name)
    with _one_line(source, "loaded"):
        if not is_saved(source):
            _builder(source, name, split)


def load_together(shards: Sequence[Shard]) -> Dataset:
    """The rows of shards as one dataset, in their order; shards that follow each other in one dataset are read once.

    Raises:
        InputError: one cannot be read, or their columns do not go together.
    """
    places = itertools.groupby(shards, lambda each: (each.dataset, each.split or "train", each.name))
    parts = [load_rows(str(source), split, name) for (source, split, name), _ in places]
    try:
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise InputError(f"The shards do not make one dataset ({first_line(error)}): pass the whole one.") from error


def shard_of(dataset: Dataset, index: int, count: int) -> Dataset:
    """A shard of a dataset: rows that follow each other. Raises InputError where it has none."""
    if count > len(dataset):
        raise InputError(f"The dataset has {len(dataset)} rows, and cannot be divided into {count} shards.")
    return dataset.shard(count, index, contiguous=True)


@with_known_keywords
def load_stream(source: str, split: str = "train", name: str | None = None) -> IterableDataset:
    """Load the rows of a dataset one after another, as they are read; arguments as for `load_rows`.

    Raises:
        InputError: the dataset does not exist, cannot be read or reached, or has no such split; or a part of a split is
            asked for.
    """
    _check_source(source, split, name)
    with _one_line(source, "streamed"):
        if is_saved(source):
            return _saved_split(source, split).to_iterable_dataset()
        builder = _builder(source, name, split)
        if "[" in split:
            raise InputError(f"A stream is read from its beginning: pass split='{split.partition('[')[0]}', all of it.")
        parts = [builder.as_streaming_dataset(split=each) for each in _names(split)]
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def only_split(source: str) -> str | None:
    """The split of a single file, or of a folder in which `save_to_disk` wrote one Dataset; None for any other."""
    if Path(source).is_file():
        return "train"
    if not is_saved(source) or (Path(source) / SPLITS).is_file():
        return None
    with _one_line(source, "loaded"):
        return _own_split(load_from_disk(source))


def is_saved(source: str) -> bool:
    """Whether a path is a folder that `save_to_disk` wrote."""
    return (Path(source) / "dataset_info.json").is_file() or (Path(source) / SPLITS).is_file()


def _builder(source: str, name: str | None, split: str) -> DatasetBuilder:
    """What reads a dataset that is not saved: datasets' own builder, or for CSV and JSON files, `RowFiles`."""
    path = Path(source)
    if path.is_file():
        kind = _format(path)
        _check_split(source, split, ["train"])
        files = {"train": glob.escape(source)}  # datasets takes it for a pattern
        if kind == "parquet":
            return _by_so_many_rows(load_dataset_builder(kind, data_files=files))
        return RowFiles(data_files=files, hash=VERSION, dataset_name=kind, kind=kind)
    if not path.is_dir() and (looks_local(source) or path.suffix.lower() in FILE_FORMATS):
        raise InputError(f"There is no dataset at '{source}'. Pass a file, a folder, or a name on the hub.")
    if not path.is_dir():
        _check_on_hub(source.removeprefix("hf://datasets/"))
    builder = load_dataset_builder(source, name)
    files = builder.config.data_files
    if files is None:
        return builder
    _check_split(source, split, list(files))
    if path.is_dir():
        check_all_read(source, files)
    wanted = _names(split)
    if isinstance(builder, Parquet):
        chosen = [each for name, found in files.items() if name in wanted or "all" in wanted for each in found]
        check_parquet([next(iter(files.values()))[0], *chosen])
        return _by_so_many_rows(builder)
    if not isinstance(builder, Csv | JsonFiles):
        return builder
    return RowFiles(
        data_files=DataFilesDict({each: found for each, found in files.items() if each in wanted or "all" in wanted}),
        kind="csv" if isinstance(builder, Csv) else "json",
        options=_options(builder.config, source),
        dataset_name=builder.dataset_name,
        config_name=builder.config.name,
        hash=VERSION,
        base_path=builder.base_path,
        repo_id=builder.repo_id,
        token=builder.token,
        storage_options=builder.storage_options,
    )


def _by_so_many_rows(builder: DatasetBuilder) -> DatasetBuilder:
    """A builder of Parquet, which now reads `PARQUET_ROWS` at a time, unless a dataset's card says how many."""
    builder.config.batch_size = builder.config.batch_size or PARQUET_ROWS
    return builder


def _convert(builder: DatasetBuilder) -> None:
    """Write the rows as Arrow files unless they are there: in as many processes as were launched on this machine.

    One of these converts the rows while the others wait, so that their cores are free. Files of which each could have
    other types than the first, or that are not rows alone, are converted in one process.
    """
    processes = launched_here() if isinstance(builder, Parquet | RowFiles) else 1
    if processes > 1:
        processes = min(processes, max(map(len, builder.config.data_files.values())))
    if processes > 1:
        with contextlib.suppress(DatasetGenerationError):  # whose cause another process cannot hand over
            builder.download_and_prepare(num_proc=processes)
            return
    builder.download_and_prepare()


def _check_on_hub(name: str) -> None:
    """Raise InputError, within seconds, where a dataset can neither be reached nor was loaded before."""
    owner, slash, own = name.rpartition("/")
    folder = f"{owner}{slash and '___'}{camelcase_to_snakecase(own)}"
    cached = Path(HF_DATASETS_CACHE, folder).is_dir()  # datasets' own, beside the hub's
    if not cached and "://" not in name and name.count("/") <= 1:
        check_reachable("dataset", name, [CARD], KIND)


def _options(config: BuilderConfig, source: str) -> dict[str, Any]:
    """The options that a dataset's card sets for its files. Raises InputError for one that is not known here."""
    known = CSV_OPTIONS if isinstance(config, CsvConfig) else ("encoding", "field")
    default, found = type(config)(), {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.name in ("name", "version", "data_dir", "data_files", "description", "features", "delimiter", "names"):
            continue
        if each.name == "header" and value is None and config.names:
            continue
        if value != getattr(default, each.name):
            if each.name not in known:
                raise InputError(
                    f"The card of '{source}' sets {each.name}={value!r} for its files, which is not supported here. "
                    "Load it with datasets.load_dataset, save_to_disk, and pass the folder."
                )
            found[each.name] = value
    names = getattr(config, "names", None)
    found = {{"sep": "delimiter", "column_names": "names"}.get(each, each): value for each, value in found.items()}
    return found | ({"names": list(names)} if names else {})


def _saved_split(source: str, split: str) -> Dataset:
    """A split, or a part of one, of what `save_to_disk` wrote."""
    found = load_from_disk(source)
    splits = dict(found) if isinstance(found, DatasetDict) else {_own_split(found): found}
    _check_split(source, split, list(splits))
    parts = ReadInstruction.from_spec(split).to_absolute({each: len(rows) for each, rows in splits.items()})
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _own_split(dataset: Dataset) -> str:
    return str(dataset.split or "train").partition("[")[0]


def _names(split: str) -> list[str]:
    """The splits that a text such as `train[:10]+test` names."""
    return [part.strip().partition("[")[0] for part in split.split("+")]


def _check_split(source: str, split: str, there: list[str]) -> None:
    """Raise InputError for a split that is not there."""
    missing = [each for each in _names(split) if each not in there and each != "all"]
    if missing:
        listed = ", ".join(f"'{each}'" for each in there)
        one = "A single file or Dataset has one split. " if len(there) == 1 else ""
        raise InputError(f"'{source}' has no split '{missing[0]}'. {one}It has: {listed}.")


def _check_source(source: str, split: str, name: str | None) -> None:
    """Raise InputError for what is no text, and for a configuration of what has none."""
    check_kind("source", source, str, "a file, a folder or a name on the hub, as text")
    check_kind("split", split, str, "the name of a split, such as 'train'")
    check_kind("name", name, (str, type(None)), "the name of a configuration")
    if name is not None and (Path(source).is_file() or is_saved(source)):
        raise InputError(f"'{source}' has no configurations, unlike a dataset on the hub. Leave name={name!r} out.")


@contextlib.contextmanager
def _one_line(source: str, done: str) -> Iterator[None]:
    """Other libraries' errors as an InputError of one line."""
    try:
        yield
    except Exception as error:  # datasets, the hub and pyarrow each raise their own
        if isinstance(error, InputError):
            raise
        if isinstance(error.__cause__, InputError):
            raise InputError(str(error.__cause__)) from error
        if Path(source).exists() and _says_empty(error):
            raise InputError(f"The dataset '{source}' has no rows.") from error
        raise InputError(f"The dataset '{source}' cannot be {done}: {first_line(error)}") from error


def looks_local(name: str) -> bool:
    """Whether a name is certainly a path: none on the hub begins with a slash, dot or tilde, or has several slashes."""
    deep = name.count("/") > 1 and "://" not in name
    return Path(name).is_absolute() or name.startswith((".", "~")) or deep


def first_line(error: BaseException) -> str:
    """The first line of another library's error; for datasets' "error while generating", of its cause."""
    if type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _says_empty(error: BaseException) -> bool:
    """Whether an error of datasets means that the dataset is empty."""
    return isinstance(error, StopIteration | IndexError) or "no data" in str(error)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() in FILE_FORMATS]
    if not suffixes:
        raise InputError(f"'{path}' is not a known kind of data file. Known: {', '.join(FILE_FORMATS)}.")
    return FILE_FORMATS[suffixes[-1]]
