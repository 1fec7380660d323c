"""What `datasets` would change or leave out of a folder of files without a word. Knows files, not what a row means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, get_data_patterns

from ..config import FILE_FORMATS, InputError


def check_all_read(source: str, files: DataFilesDict) -> None:
    """Raise InputError for a folder with rows in files of several formats, of which `datasets` reads one."""
    card = Path(source, "README.md")
    if card.is_file() and "data_files:" in card.read_text("utf-8", errors="replace"):
        return
    there = DataFilesDict.from_patterns(get_data_patterns(source), base_path=source)
    read = {each for several in files.values() for each in several}
    for other in (each for split in files for each in there.get(split, ()) if each not in read):
        if FILE_FORMATS.keys() & {suffix.lower() for suffix in Path(other).suffixes}:
            raise InputError(
                f"'{source}' holds files of several formats, such as '{Path(other).name}' beside "
                f"'{Path(min(read)).name}': move those of one format into a folder of their own."
            )


def check_parquet(files: Sequence[str]) -> None:
    """Raise InputError for Parquet files with other columns than the first has, to whose types values would change."""
    paths = [each for each in files if Path(each).is_file()]
    if not paths:
        return
    kinds = {field.name: field.type for field in pq.read_schema(paths[0])}
    for path in paths[1:]:
        for field in pq.read_schema(path):
            kind = kinds.get(field.name)
            if kind is None or not _keeps(kind, field.type):
                raise InputError(
                    f"Column '{field.name}' is {field.type} in '{path}' and {kind or 'missing'} in '{paths[0]}': one "
                    "dataset has one type for a column. Write both files alike."
                )


def _keeps(kind: pa.DataType, own: pa.DataType) -> bool:
    """Whether values of the second type are the same in the first; of whole numbers, too large ones cannot be cast."""
    kind, own = _plain(kind), _plain(own)
    if kind == own or pa.types.is_null(own):
        return True
    if _is_list(kind) and _is_list(own):
        return _keeps(kind.value_type, own.value_type)
    if pa.types.is_struct(kind) and pa.types.is_struct(own):
        names = [field.name for field in kind]
        return all(field.name in names and _keeps(kind.field(field.name).type, field.type) for field in own)
    if pa.types.is_floating(kind) and pa.types.is_floating(own):
        return bool(kind.bit_width >= own.bit_width)
    return pa.types.is_integer(kind) and pa.types.is_integer(own)


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type without its encoding or the name around it."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if kind in (pa.large_string(), pa.string_view()) else kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
