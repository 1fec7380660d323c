"""Datasets from files, folders and the hub, whole or as a stream. Knows datasets' loading, not what a row means."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from ..config import FILE_FORMATS, InputError


def load_rows(source: str, split: str = "train", name: str | None = None) -> Dataset:
    """Load the rows of a dataset.

    Args:
        source: a JSON, JSONL, CSV or Parquet file, a folder written by `save_to_disk`, a folder of data files, or
            a name on the hub.
        split: the split, if the dataset has several.
        name: the configuration of a dataset on the hub.

    Raises:
        InputError: the dataset does not exist, cannot be read or reached, has no such split, or has no rows.
    """
    path = Path(source)
    try:
        if path.is_file():
            found = load_dataset(_format(path), data_files={split: str(path)}, split=split)
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            found = load_from_disk(source)
        elif not path.is_dir() and (looks_local(source) or path.suffix in FILE_FORMATS):
            raise InputError(f"There is no dataset at '{source}'. Pass a file, a folder, or a name on the hub.")
        else:
            found = load_dataset(source, name, split=split)
    except InputError:
        raise
    except Exception as error:  # datasets, the hub and pyarrow each raise their own
        if path.exists() and _says_empty(error):
            raise InputError(f"The dataset '{source}' has no rows.") from error
        raise InputError(f"The dataset '{source}' cannot be loaded: {first_line(error)}") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise InputError(f"'{source}' has no split '{split}'. It has: {', '.join(found)}.")
        found = found[split]
    if len(found) == 0:
        raise InputError(f"The dataset '{source}' has no rows.")
    return found


def load_stream(source: str, split: str = "train", name: str | None = None) -> IterableDataset:
    """Load the rows of a dataset one after another, as they are read; arguments as for `load_rows`.

    Raises:
        InputError: the dataset does not exist, or cannot be read or reached.
    """
    path = Path(source)
    try:
        if path.is_file():
            return load_dataset(_format(path), data_files={split: str(path)}, split=split, streaming=True)
        if not path.is_dir() and (looks_local(source) or path.suffix in FILE_FORMATS):
            raise InputError(f"There is no dataset at '{source}'. Pass a file, a folder, or a name on the hub.")
        return load_dataset(source, name, split=split, streaming=True)
    except InputError:
        raise
    except Exception as error:  # datasets, the hub and pyarrow each raise their own
        raise InputError(f"The dataset '{source}' cannot be streamed: {first_line(error)}") from error


def looks_local(name: str) -> bool:
    """Whether a name is certainly a path: no name on the hub begins with a slash, a dot or a tilde."""
    return Path(name).is_absolute() or name.startswith((".", "~"))


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
    suffixes = [suffix for suffix in path.suffixes if suffix in FILE_FORMATS]
    if not suffixes:
        raise InputError(f"'{path}' is not a known kind of data file. Known: {', '.join(FILE_FORMATS)}.")
    return FILE_FORMATS[suffixes[-1]]
