"""What a long pass has measured so far: parts that are whole or not there. Knows Parquet, not what is measured.

    folder/manifest.json                           what it is made from; written once, before the first part
    folder/part-<lowest unit>-<digest>.parquet     the lines of some units of work, each with the number of its unit

The digest in a part's name is of its bytes: a part that was cut off or changed is known by its name. Several processes
may add parts while others read. A unit that is in two parts, as after a crash while parts were put together, counts
once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ..config import InputError
from .files import flush, read_json, remove_folder, replacing, writing
from .made_from import check_made_from

MANIFEST = "manifest.json"
FORMAT = 1
UNIT = "unit"
PARTS = "parts"  # the folder, in that of an output, in which stores lie
PART = re.compile(r"part-\d{10}-([0-9a-f]{32})\.parquet")
UNFINISHED = ".writing-"  # begins the name of a part before it is whole
MANY = 1000  # parts, from which on they are put together when the work goes on
BLOCK = 1 << 22  # bytes
NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Store:
    """A folder of parts.

    Attributes:
        folder: of its own.
        what: lies in it, for people.
        made_of: all that the lines depend on, as plain values by the names that people know them by.
    """

    folder: Path
    what: str
    made_of: Mapping[str, Any]

    def open(self) -> None:
        """Make the folder, or go on with what is there; to be called by one process, before any other uses the store.

        Raises:
            InputError: what is there is of something else, and differs in this and that; it is damaged.
        """
        if (self.folder / MANIFEST).exists():
            self._check(read_manifest(self.folder))
        elif any(PART.fullmatch(path.name) for path in self.folder.glob("part-*")):
            raise InputError(f"'{self.folder}' holds parts and no {MANIFEST}: nobody knows of what. Remove the folder.")
        else:
            with replacing(self.folder / MANIFEST) as path:
                path.write_text(json.dumps({"format": FORMAT, "made_of": dict(self.made_of)}, indent=1) + "\n")
        for path in self.folder.glob(f"{UNFINISHED}*"):
            path.unlink()
        if len(self._paths()) > MANY:
            self.compact()

    def append(self, lines: pa.Table) -> Path | None:
        """Add the lines of some units, with a column `unit`; they are on the disk when this returns their part."""
        if not lines.num_rows:
            return None
        unfinished = self.folder / f"{UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}"
        lowest = int(lines[UNIT].to_numpy().min())
        try:
            with writing(self.folder):
                pq.write_table(lines, unfinished, use_dictionary=False)
                flush(unfinished)
                part = self.folder / f"part-{lowest:010d}-{_digest(unfinished)}.parquet"
                os.replace(unfinished, part)
                flush(self.folder)
                return part
        finally:
            unfinished.unlink(missing_ok=True)

    def done(self) -> np.ndarray:
        """The units that are there, ascending."""
        return _sorted(np.concatenate([NONE, *map(_units, read_parts(self.folder, [UNIT]))]))

    def lines(self) -> pa.Table:
        """Everything, by units ascending; of a unit in the order in which its lines were added."""
        tables = list(read_parts(self.folder))
        try:
            return pa.concat_tables(tables).sort_by(UNIT) if tables else pa.table({UNIT: pa.array([], pa.int64())})
        except pa.ArrowException as error:
            raise InputError(
                f"The parts in '{self.folder}' do not belong together. Remove the folder: its rows are measured again."
            ) from error

    def compact(self) -> None:
        """Put all parts together in one; at any moment everything is there, some of it twice."""
        before = self._paths()
        if len(before) > 1:
            whole = self.append(self.lines())
            for path in before:
                if path != whole:  # which a crash left among them the last time, with the same bytes
                    path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return part_paths(self.folder)

    def _check(self, theirs: Mapping[str, Any]) -> None:
        what = f"'{self.folder}' holds {self.what}"
        check_made_from(theirs, self.made_of, what, "Choose another output, or remove that folder.")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the parts in a folder are made of.

    Raises:
        InputError: there is no manifest, it is damaged, or another version wrote it.
    """
    path, way_out = folder / MANIFEST, f"Remove '{folder}': its rows are measured again."
    try:
        manifest = read_json(path, way_out)
    except FileNotFoundError:
        raise InputError(f"No {MANIFEST} in '{folder}': no pass was begun there. Pass the folder of one.") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("made_of"), dict):
        raise InputError(f"'{path}' is damaged, it says not what the parts are made of. {way_out}")
    if manifest.get("format") != FORMAT:
        raise InputError(f"'{path}' was written by another version. {way_out}")
    made_of: dict[str, Any] = manifest["made_of"]
    return made_of


def remove_parts(folder: Path) -> None:
    """Remove the stores in a folder, and the one around it unless another pass has left something there."""
    remove_folder(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def part_paths(folder: Path) -> list[Path]:
    """The parts in a folder, in the order of their lowest units."""
    return sorted(path for path in folder.glob("part-*") if PART.fullmatch(path.name))


def read_parts(folder: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The lines of every part, those of a unit once; also while others add parts or put them together.

    Raises:
        InputError: a part is damaged.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):  # two parts have become one meanwhile: the next list is of that
            yield from _distinct([_read(path, columns) for path in part_paths(folder)])
            return


def _distinct(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """The tables, without lines of a unit that an earlier table has."""
    own = [_units(table) for table in tables]
    units = np.concatenate([NONE, *own])
    if len(_sorted(units)) == len(units):
        yield from tables
        return
    seen = NONE
    for table, mine in zip(tables, own, strict=True):
        fresh = np.setdiff1d(mine, seen)
        yield table.filter(pa.array(np.isin(table[UNIT].to_numpy(), fresh)))
        seen = np.union1d(seen, fresh)


def _units(table: pa.Table) -> np.ndarray:
    """The units in a part, ascending, whose lines follow each other."""
    units = table[UNIT].to_numpy()
    return _sorted(units[np.flatnonzero(np.diff(units, prepend=units[:1] - 1))])


def _sorted(units: np.ndarray) -> np.ndarray:
    """Ascending, each once; numpy's own `unique` takes ten times as long on whole numbers."""
    units = np.sort(units)
    return units[np.flatnonzero(np.diff(units, prepend=units[:1] - 1))]


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    expected = PART.fullmatch(path.name)
    assert expected is not None, "part_paths names parts"
    try:
        table = None
        if _digest(path) == expected[1]:
            with pq.ParquetFile(path) as file:  # `read_table` looks for a dataset first, which takes longer
                table = file.read(columns=columns)
            units, _ = table.column(UNIT), table.column_names  # which may be no text
            if units.type != pa.int64() or units.null_count:
                raise KeyError("units are whole numbers")
    except FileNotFoundError:
        if path.is_symlink():  # into nothing: it will not be gone from the next list
            raise InputError(f"'{path}' is a link into nothing. Remove it.") from None
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"'{path}' is no part of a pass ({error}). Remove it.") from error
    if table is None:
        raise InputError(
            f"'{path}' is damaged: its bytes are not those that were written. Remove it, and its rows are measured "
            "again."
        )
    return table


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
