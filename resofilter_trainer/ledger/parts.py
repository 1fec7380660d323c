"""The files of a ledger: found, checked to be whole and of one run, and read a piece at a time. Knows Parquet only."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import InputError
from ..selecting.results import NAME
from .schema import ADDED, COLUMNS, KEY, LEDGER, PROCESS, VERSION, schema_of, steps_of

STEP = "step"
COPY_AGAIN = "Copy it again from where the run has written it"


@dataclass(frozen=True)
class Part:
    """A file of a ledger, which is opened when it is read.

    Attributes:
        path: the file.
        process: the process that has written it.
        first, last: its steps, by its name.
    """

    path: Path
    process: int
    first: int
    last: int

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What the file says of its run: `run`, `process`, `processes`, `layers`. Raises InputError."""
        with self._file() as file:
            return self._about(file)

    @property
    def rows(self) -> int:
        """The number of lines."""
        with self._file() as file:
            return int(file.metadata.num_rows)

    def tables(self, columns: Sequence[str], first: int, last: int, run: str) -> Iterator[pa.Table]:
        """The lines of the steps from `first` to `last`, at most a row group at a time.

        Args:
            columns: the columns to read; `step` is always read.
            first, last: the steps.
            run: the run that the file must be of.

        Raises:
            InputError: the file is damaged, or of another run.
        """
        with self._file() as file:
            if self._about(file)["run"] != run:
                raise InputError(f"'{self.path}' is of another run than the ledger's first part. Remove it.")
            wanted = list(dict.fromkeys((STEP, *columns)))
            for group in self._groups(file, first, last):
                with self._reading():
                    table = file.read_row_group(group, columns=wanted)
                yield self._between(with_added(table, wanted), first, last)

    def _groups(self, file: pq.ParquetFile, first: int, last: int) -> Iterator[int]:
        """The row groups that may have lines of these steps, by their statistics."""
        place = file.schema_arrow.get_field_index(STEP)
        for group in range(file.metadata.num_row_groups):
            found = file.metadata.row_group(group).column(place).statistics
            if found is None or not found.has_min_max or (found.min <= last and found.max >= first):
                yield group

    def _between(self, table: pa.Table, first: int, last: int) -> pa.Table:
        steps = table[STEP].to_numpy()
        if (np.diff(steps) < 0).any() or (len(steps) and not self.first <= steps[0] <= steps[-1] <= self.last):
            raise InputError(f"'{self.path}' is damaged: its steps are not those of its name. {COPY_AGAIN}.")
        start, end = np.searchsorted(steps, [first, last + 1])
        return table.slice(start, end - start)

    def _about(self, file: pq.ParquetFile) -> Mapping[str, Any]:
        try:
            found: Any = json.loads((file.metadata.metadata or {}).get(KEY.encode(), "{}"))
        except ValueError:
            found = {}
        if not isinstance(found, dict) or not found.keys() >= {"run", "process", "processes", "layers"}:
            raise InputError(f"'{self.path}' is a Parquet file, but no part of a ledger. Remove it.")
        if found.get("version") != VERSION or not _needed(found["layers"]) <= {*file.schema_arrow.names}:
            raise InputError(f"'{self.path}' is of another version of resofilter_trainer: read it with that one.")
        if found["process"] != self.process:
            raise InputError(
                f"'{self.path}' was written by process {found['process']}: it is in the folder of another. Move it to "
                f"{PROCESS}{found['process']}."
            )
        return found

    @contextlib.contextmanager
    def _file(self) -> Iterator[pq.ParquetFile]:
        with self._reading():
            file = pq.ParquetFile(self.path, page_checksum_verification=True)
        with file:
            yield file

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what Parquet says of a file that is gone or damaged into an InputError."""
        try:
            yield
        except FileNotFoundError:
            raise InputError(f"'{self.path}' is gone: the run has resumed from before it. Load again.") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"'{self.path}' is cut short or damaged ({error}). {COPY_AGAIN}.") from error


def with_added(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    """The lines with the columns that earlier versions have not written, of which nothing is known: all null."""
    missing = [name for name in ADDED if name in wanted and name not in table.column_names]
    for name in missing:
        table = table.append_column(name, pa.nulls(table.num_rows, COLUMNS[name]))
    return table.select(list(wanted)) if missing else table


def _needed(layers: Sequence[int]) -> set[str]:
    """The columns that every part has."""
    return {*schema_of(layers).names} - {*ADDED}


def folder_of(run: str | os.PathLike[str]) -> Path:
    """The folder of a run's ledger.

    Args:
        run: the run's output_dir, the folder of its results in it, or the ledger itself.

    Raises:
        InputError: there is none.
    """
    path = Path(run)
    if not path.exists():
        raise InputError(f"'{path}' does not exist. Pass the output_dir of a run with ResonanceCallback.")
    _check_above(path)
    for place in (path, path / LEDGER, path / NAME / LEDGER):
        if any(place.glob(f"{PROCESS}*/*.parquet")):
            return place
    if any(place.is_dir() for place in (path / LEDGER, path / NAME / LEDGER)):
        raise InputError(f"The ledger of '{path}' has no part yet: parts are written as the run goes. Wait for one.")
    raise InputError(f"'{path}' holds no ledger. Pass the output_dir of a run with ResonanceCallback(ledger=True).")


def _check_above(path: Path) -> None:
    """Raise InputError for one part of a ledger, or the folder of one process, with the ledger above it."""
    for what, folder in (("the folder of one process", path), ("one part", path.parent)):
        if folder.resolve().name.startswith(PROCESS) and any(folder.glob("*.parquet")):
            raise InputError(f"'{path}' is {what} of a ledger. Pass the whole ledger: '{folder.resolve().parent}'.")


def parts_in(folder: Path) -> dict[int, list[Part]]:
    """The parts of each process, in the order of their steps.

    Raises:
        InputError: two parts of a process have the same step, or a file has another name.
    """
    found: dict[int, list[Part]] = {}
    for path in folder.glob(f"{PROCESS}*/*.parquet"):
        if path.name.startswith("."):
            continue  # not yet in place
        try:
            process, (first, last) = int(path.parent.name.removeprefix(PROCESS)), steps_of(path)
        except ValueError:
            raise InputError(f"'{path}' has not the name of a part of a ledger. Remove it.") from None
        found.setdefault(process, []).append(Part(path, process, first, last))
    for parts in found.values():
        parts.sort(key=lambda part: part.first)
        for part, after in itertools.pairwise(parts):
            if after.first <= part.last:
                raise InputError(
                    f"'{part.path}' and '{after.path.name}' both have step {after.first}: they are of two runs. Remove "
                    "those of one."
                )
    return dict(sorted(found.items()))


def missing_steps(parts: Mapping[int, Sequence[Part]], last: int) -> Iterator[tuple[int, int, int]]:
    """Process, first and last step of what the parts lack up to `last`, by the number of processes they tell of.

    A run may resume with another number of processes, and a ledger may begin after step 1.
    """
    if 0 not in parts:
        yield 0, min(each[0].first for each in parts.values()), last
        return
    first = min(each[0].first for each in parts.values())
    for process in range(max(max(parts) + 1, parts[0][0].about["processes"], parts[0][-1].about["processes"])):
        for start, end in _between_parts(parts.get(process, ()), first, last):
            while_there = [part for part in parts[0] if part.first <= end and part.last >= start]
            if process == 0 or any(part.about["processes"] > process for part in while_there):
                yield process, start, end


def common_end(parts: Mapping[int, Sequence[Part]]) -> int:
    """The last step that all processes have: when a run is killed, one may lack the last part of the others."""
    if 0 not in parts:
        return max(each[-1].last for each in parts.values())
    there = range(parts[0][-1].about["processes"])
    return min(parts[process][-1].last for process in there if process in parts)


def _between_parts(parts: Sequence[Part], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The steps from `first` to `last` that no part has, as their first and last."""
    at = first
    for part in parts:
        if part.first > at and at <= last:
            yield at, min(part.first - 1, last)
        at = max(at, part.last + 1)
    if at <= last:
        yield at, last
