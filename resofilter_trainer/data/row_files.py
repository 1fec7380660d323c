"""CSV, TSV and JSON files as rows whose values are as they are written. Knows files' text, not what a row means.

pandas and Arrow guess types: 007 becomes 7, NA nothing, a date a time, and 18 beside 3.5 becomes 18.0. Here, a cell of
CSV is text, an empty one the empty string, and JSON keeps its own types (`json_kinds`). The rest is datasets' own: its
cache, compressed files, files on the hub, streams. JSON is read twice, first for its types, some rows at a time, except
for a file that is one list or object, which is read whole.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import Any

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, Json, List, SplitGenerator
from datasets.builder import Key

from ..config import InputError
from . import json_kinds as kinds
from .row_parsers import Rows, csv_rows, json_rows

VERSION = "resofilter-2"  # of how values are read, in the name of datasets' cache
ROWS = 1000  # in memory at a time


@dataclass
class RowFilesConfig(BuilderConfig):
    """The files of a dataset.

    Attributes:
        kind: `csv` or `json`.
        options: of `csv`: those of Python's csv, and `names` for files without a header. Of `json`: `field`, the key of
            the rows in a file that is one object. Of both: `encoding`.
    """

    kind: str = "json"
    options: Mapping[str, Any] = field(default_factory=dict)


class RowFiles(ArrowBasedBuilder):
    """Reads CSV, TSV and JSON files for `datasets`."""

    BUILDER_CONFIG_CLASS = RowFilesConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        dl_manager.download_config.extract_on_the_fly = True
        extracted = dl_manager.extract(dl_manager.download(self.config.data_files))
        files = {
            split: [
                (file, str(origin))
                for path, origin in zip(paths, self.config.data_files[split], strict=True)
                for file in dl_manager.iter_files(path)
            ]
            for split, paths in extracted.items()
        }
        columns = self._columns([each for several in files.values() for each in several])
        if not columns:
            raise InputError(f"The dataset '{next(iter(self.config.data_files.values()))[0]}' has no rows.")
        self.info.features = Features({name: kinds.feature_of(kind) for name, kind in columns.items()})
        return [
            SplitGenerator(name=split, gen_kwargs={"files": found, "columns": columns})
            for split, found in files.items()
        ]

    def _generate_tables(
        self, files: Sequence[tuple[str, str]], columns: Mapping[str, kinds.Kind]
    ) -> Iterator[tuple[Key, pa.Table]]:
        features = Features({name: kinds.feature_of(kind) for name, kind in columns.items()})
        schema = pa.schema({name: _storage(feature) for name, feature in features.items()})
        for number, (file, origin) in enumerate(files):
            start = 0
            for part, rows in enumerate(_parts(self._rows(file, origin, columns))):
                try:
                    values = {
                        name: kinds.stored(kind, [row.get(name) for _, row in rows]) for name, kind in columns.items()
                    }
                    table = pa.table(values, schema=schema)
                except InputError as error:
                    raise InputError(f"'{origin}', rows {start} to {start + len(rows) - 1}: {error}") from error
                except UnicodeEncodeError as error:
                    where = f"'{origin}', rows {start} to {start + len(rows) - 1}"
                    raise InputError(f"{where}: text with half a character (\\ud800 to \\udfff): {error}.") from error
                yield Key(number, part), table.cast(features.arrow_schema)  # datasets' own cast guesses at text
                start += len(rows)

    def _columns(self, files: Iterable[tuple[str, str]]) -> dict[str, kinds.Kind]:
        """The kind of every column, in the order of their appearance."""
        if self.config.kind == "json":
            found: dict[str, kinds.Kind] = {}
            for file, origin in files:
                for rows in _parts(self._rows(file, origin, None)):
                    for name in dict.fromkeys(name for _, row in rows for name in row):
                        kind = kinds.kind_of([row.get(name) for _, row in rows])
                        found[name] = kinds.together(found.get(name), kind)
            return {name: kinds.of_column(kind) for name, kind in found.items()}
        header: list[str] | None = None
        for file, origin in files:
            with closing(self._csv(file, origin)) as lines:
                _, own = next(lines)
            if header is not None and set(own) != set(header):
                there = f"{', '.join(own)}, and those of other files {', '.join(header)}"
                raise InputError(f"The dataset '{origin}' cannot be loaded: its columns are {there}.")
            header = header or own
        return dict.fromkeys(header or [], str)

    def _rows(self, file: str, origin: str, columns: Mapping[str, kinds.Kind] | None) -> Rows:
        """The rows of a file as mappings; of JSON, without columns, also checked for repeated keys."""
        if self.config.kind == "csv":
            with closing(self._csv(file, origin)) as lines:
                _, header = next(lines)
                yield from ((line, dict(zip(header, cells, strict=True))) for line, cells in lines)
            return
        exact = columns is not None and kinds.WRITTEN in columns.values()
        hook = _without_repeats if columns is None else None
        loads = json.JSONDecoder(parse_float=kinds.Decimal if exact else None, object_pairs_hook=hook).decode
        encoding = self.config.options.get("encoding") or "utf-8-sig"
        with open(file, "rb") as opened, TextIOWrapper(opened, encoding) as text:
            yield from json_rows(text, origin, loads, self.config.options.get("field"))

    def _csv(self, file: str, origin: str) -> Generator[tuple[int, Any], None, None]:
        options = dict(self.config.options)
        encoding, names = options.pop("encoding", None) or "utf-8-sig", options.pop("names", None)
        if [part for part in origin.lower().split("/")[-1].split(".") if part in ("csv", "tsv")][-1:] == ["tsv"]:
            options["delimiter"] = "\t"
        with open(file, "rb") as opened, TextIOWrapper(opened, encoding, newline="") as text:
            yield from csv_rows(text, origin, names, options)


def _parts(rows: Rows) -> Iterator[list[tuple[int, Any]]]:
    """The rows, some at a time."""
    part: list[tuple[int, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == ROWS:
            yield part
            part = []
    if part:
        yield part


def _storage(feature: Any) -> pa.DataType:
    """The Arrow type of a feature; text for JSON, which Arrow converts."""
    if isinstance(feature, Json):
        return pa.string()
    if isinstance(feature, List):
        return pa.list_(_storage(feature.feature))
    if isinstance(feature, dict):
        return pa.struct({name: _storage(each) for name, each in feature.items()})
    return feature.pa_type


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises InputError for a key that it has twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"an object has the key '{twice}' twice: rename or remove one.")
    return made
