"""Rows as files for trainers that cannot share an environment with this package. Knows rows and files, no model.

    jsonl               each row as it is, a JSON object a line
    parquet             each row as it is, in types that every version of datasets knows, images and the like apart
    sharegpt, alpaca    see `conversations`

A row that a format cannot hold unchanged is refused. In a struct, Arrow stores a key that a row lacks as null: it is
left out again, except for a message's content.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, LargeList, List, Value

from ..config import ColumnMapping, InputError, one_of
from ..io.files import read_json, replacing
from ..selecting.weighted_rows import WEIGHT
from .chat import Message, Unreadable, tools_of
from .columns import AT_ONCE
from .conversations import FORMATS, Row
from .exact_json import has_json
from .rows import read_rows, told_of

FILES = {"jsonl": "rows.jsonl", "parquet": "rows.parquet", **{format: f"{format}.jsonl" for format in FORMATS}}
INFO = "dataset_info.json"
ID = "sample_id"
CONTENT = ("content", "value")  # null in a message that only calls tools
LINE_ENDS = {end: f"\\u{end:04x}" for end in (0x85, 0x2028, 0x2029)}  # for some readers of lines, not in JSON
KEEPS_ALL = "The format jsonl holds every row as it is."


def export_rows(
    rows: Dataset,
    folder: str | Path,
    format: str,
    columns: ColumnMapping | None = None,
    sample_ids: Iterable[int] | None = None,
) -> Path:
    """Write rows as a file that other trainers read. Rows with weights, which no other trainer reads, are warned of.

    Args:
        rows: the rows, such as `selection.apply(dataset)`.
        folder: where to write `rows.jsonl`, `rows.parquet`, `sharegpt.jsonl` or `alpaca.jsonl`. Beside the last two, a
            `dataset_info.json` describes the file to LLaMA-Factory, under the name `kept_sharegpt` or `kept_alpaca`.
        format: `"jsonl"`, `"parquet"`, `"sharegpt"` or `"alpaca"`.
        columns: which column is which, for `sharegpt` and `alpaca`; by default TRL's names.
        sample_ids: (N,) the positions of the rows in the dataset that was scored, such as `selection.sample_ids`, for a
            column `sample_id`.

    Returns:
        The file.

    Raises:
        InputError: the format is unknown, or cannot hold a column or a row unchanged.
    """
    one_of("format", format, list(FILES))
    file = Path(folder) / FILES[format]
    known = _described(file.with_name(INFO)) if format in FORMATS else {}
    rows = _with_ids(rows, sample_ids)
    if WEIGHT in rows.column_names:
        warnings.warn(
            f"The rows do not count alike, and no other trainer reads their weights (column '{WEIGHT}'): a training on "
            "the file is biased. Select rows by a policy without weights, or train on them with SampleWeights.",
            stacklevel=2,
        )
    with replacing(file) as temporary:
        if format == "jsonl":
            _write_lines(_plain_rows(rows), temporary)
        elif format == "parquet":
            _write_parquet(rows, temporary)
        else:
            _write_lines(_converted(rows, columns or ColumnMapping(), format), temporary)
    if format in FORMATS:
        _describe(file.with_name(INFO), known, format)
    return file


def _with_ids(rows: Dataset, ids: Iterable[int] | None) -> Dataset:
    if ids is None:
        return rows
    listed = [int(each) for each in ids]
    if ID not in rows.column_names:
        return rows.add_column(ID, listed)
    if rows.with_format(None)[ID][:] != listed:
        raise InputError(f"The dataset has a column '{ID}' of its own, under which positions are written: rename it.")
    return rows


# ---- rows as they are


def _write_parquet(rows: Dataset, file: Path) -> None:
    for name, feature in rows.features.items():
        if has_json(feature):
            rows = _without_json(rows, name)
    if not _is_plain(rows.features):
        rows.to_parquet(str(file))
        return
    schema = rows.features.arrow_schema.remove_metadata()  # of which datasets before 4 does not know all
    with pq.ParquetWriter(file, schema) as writer:
        for table in rows.with_format("arrow").iter(batch_size=AT_ONCE):
            writer.write_table(table.cast(schema))


def _is_plain(feature: Any) -> bool:
    """Whether Arrow's own types say all of a feature."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    return isinstance(feature, Value) or (isinstance(feature, List | LargeList) and _is_plain(feature.feature))


def _without_json(rows: Dataset, name: str) -> Dataset:
    """The rows with a column of JSON in Arrow's own types. Raises InputError where these would change a value."""
    values = [row[name] for row in _plain_rows(rows.select_columns([name]))]
    try:
        made = Dataset(pa.table({name: pa.array(values)}))
        there = [_without_nulls(row[name]) for row in made] if _has_keys(made.data.schema.field(name).type) else None
    except (pa.ArrowException, OverflowError):
        there = None
    if there != [_without_nulls(each) for each in values]:
        raise InputError(
            f"Parquet cannot hold column '{name}' as it is: its values have several types, or an object has no key. "
            f"{KEEPS_ALL}"
        )
    changed = rows.remove_columns(name).add_column(name, made.data.column(name))
    return changed.select_columns(rows.column_names)


def _has_keys(kind: pa.DataType) -> bool:
    """Whether every struct of an Arrow type has a key, as Parquet needs it."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not inner) and all(map(_has_keys, inner))


def _without_nulls(value: Any) -> Any:
    """A value whose numbers keep their types in a comparison, without nulls in objects, which Arrow adds."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return (type(value), value)


def _plain_rows(rows: Dataset) -> Iterator[Row]:
    """Each row in JSON's own types. Raises InputError for a value that has none."""
    rows, features = rows.with_format(None), rows.features
    for start in range(0, len(rows), AT_ONCE):
        batch = rows[start : min(start + AT_ONCE, len(rows))]
        for number, values in enumerate(zip(*batch.values(), strict=True), start):
            row = {}
            for name, value in zip(batch, values, strict=True):
                try:
                    row[name] = _plain(value, features[name])
                except TypeError as error:
                    what = f"Row {number}, column '{name}': {error} is no value of JSON."
                    raise InputError(f"{what} Use the format parquet, or remove the column.") from error
            yield row


def _plain(value: Any, feature: Any) -> Any:
    """A value in JSON's types; of a struct, only the keys that the row has."""
    if isinstance(value, Mapping):
        of = feature if isinstance(feature, dict) else None
        there = {name: each for name, each in value.items() if of is None or each is not None or name in CONTENT}
        return {name: _plain(each, of and of.get(name)) for name, each in there.items()}
    if isinstance(value, list | tuple):
        of = feature.feature if isinstance(feature, List | LargeList) else None
        return [_plain(each, of) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and value - value == 0):
        return value
    raise TypeError(repr(value) if isinstance(value, float) else type(value).__name__)


def _write_lines(rows: Iterator[Row], file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False).translate(LINE_ENDS) + "\n")


# ---- conversations


def _converted(rows: Dataset, columns: ColumnMapping, format: str) -> Iterator[Row]:
    """Each row's messages and tools in a format, with its other columns. Raises InputError for rows that do not fit."""
    if columns.prompt_columns:
        columns = dataclasses.replace(columns, conversational=True)
    read = read_rows(rows, columns)
    taken, refused = _taken(read.dataset, format), dict(read.refused)
    for position, row in zip(read.positions.tolist(), _plain_rows(read.dataset), strict=True):
        try:
            made = FORMATS[format].convert(_messages(row), _parsed(row.get("tools")))
            yield made | {name: value for name, value in row.items() if name not in taken}
        except Unreadable as error:
            refused[position] = str(error)
    if ID in rows.column_names:
        refused = {rows[position][ID]: why for position, why in refused.items()}
    if refused:
        raise InputError(f"{told_of(refused, len(rows), f'do not fit the format {format}')} {KEEPS_ALL}")


def _taken(mapped: Dataset, format: str) -> set[str]:
    """The columns that become those of the format. Raises InputError where there are none, or a name is taken."""
    names = set(mapped.column_names)
    if not ({"prompt", "completion"} <= names or "messages" in names):
        raise InputError(
            f"The format {format} needs questions and answers, and the columns are {', '.join(mapped.column_names)}. "
            f"Pass prompt_column and completion_column, or messages_column. {KEEPS_ALL}"
        )
    taken = ({"messages"} if "messages" in names else {"prompt", "completion"}) | {"tools"}
    clash = sorted((names - taken) & set(FORMATS[format].columns.values()))
    if clash:
        raise InputError(f"The dataset's column '{clash[0]}' has the name of one of the format {format}: rename it.")
    return taken


def _messages(row: Row) -> list[Message]:
    if "messages" in row:
        return list(row["messages"] or [])
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return [*prompt, *completion]


def _parsed(tools: Any) -> Any:
    tools = tools_of(tools)
    return json.loads(tools) if isinstance(tools, str) else tools


def _described(info: Path) -> dict[str, Any]:
    """The files that dataset_info.json describes already. Raises InputError where it is another kind of file."""
    if not info.is_file():
        return {}
    remedy = "Correct or remove it."
    known = read_json(info, remedy)
    if not isinstance(known, dict):
        raise InputError(f"'{info}' is no object of names and files. {remedy}")
    return known


def _describe(info: Path, known: Mapping[str, Any], format: str) -> None:
    """Add the file to dataset_info.json, in which LLaMA-Factory looks for its name, format and columns."""
    described = {"file_name": FILES[format], "formatting": format, "columns": dict(FORMATS[format].columns)}
    with replacing(info) as temporary:
        temporary.write_text(json.dumps({**known, f"kept_{format}": described}, indent=2) + "\n", encoding="utf-8")
