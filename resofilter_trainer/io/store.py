"""The results so far of a long pass, in parts that are complete or absent. Knows Parquet, not what is measured.

    folder/manifest.json                           what the parts are made from; written once, before the first part
    folder/part-<lowest unit>-<digest>.parquet     the lines of some units of work, each with the number of its unit

The digest in a part's name is the digest of its bytes, so a truncated or changed part is noticed. Several processes may
add parts while others read. A unit in two parts counts once; a crash while parts are merged leaves such units.
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
from .files import flush, flush_entry, read_json, remove_folder, replacing, writing
from .made_from import check_made_from

MANIFEST = "manifest.json"
FORMAT = 1
UNIT = "unit"
PARTS = "parts"  # the folder of all stores in an output folder
PART = re.compile(r"part-\d{10}-([0-9a-f]{32})\.parquet")
TEMPORARY = ".writing-"  # the prefix of a part that is not yet complete
MANY = 1000  # more parts than this are merged when the pass is resumed
BLOCK = 1 << 22  # bytes
NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Store:
    """A folder of parts.

    Attributes:
        folder: a folder for these parts only.
        what: the content in words, for errors: `scores`.
        made_of: everything that the lines depend on, as plain values by name.
    """

    folder: Path
    what: str
    made_of: Mapping[str, Any]

    def open(self) -> None:
        """Create the folder, or check the one that exists. One process calls this before any other uses the store.

        Raises:
            InputError: the folder is damaged, or its parts were made from something else.
        """
        if (self.folder / MANIFEST).exists():
            self._check(read_manifest(self.folder))
        elif any(PART.fullmatch(path.name) for path in self.folder.glob("part-*")):
            raise InputError(
                f"'{self.folder}' holds parts and no {MANIFEST}: nothing says what they were made from. Remove it."
            )
        else:
            with replacing(self.folder / MANIFEST) as path:
                path.write_text(json.dumps({"format": FORMAT, "made_of": dict(self.made_of)}, indent=1) + "\n")
        for path in self.folder.glob(f"{TEMPORARY}*"):
            path.unlink()
        if len(self._paths()) > MANY:
            self.compact()

    def append(self, lines: pa.Table) -> Path | None:
        """Add the lines of some units as a part, which is on the disk when this returns.

        Args:
            lines: a table with a column `unit`.

        Returns:
            The part; None if there are no lines.
        """
        if not lines.num_rows:
            return None
        temporary = self.folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        lowest = int(lines[UNIT].to_numpy().min())
        try:
            with writing(self.folder):
                pq.write_table(lines, temporary, use_dictionary=False)
                flush(temporary)
                part = self.folder / f"part-{lowest:010d}-{_digest(temporary)}.parquet"
                os.replace(temporary, part)
                flush_entry(self.folder)
                return part
        finally:
            temporary.unlink(missing_ok=True)

    def done(self) -> np.ndarray:
        """The units in the store, ascending."""
        return _sorted(np.concatenate([NONE, *map(_units, read_parts(self.folder, [UNIT]))]))

    def lines(self) -> pa.Table:
        """All lines, by ascending unit; the lines of a unit in the order in which they were added."""
        tables = list(read_parts(self.folder))
        try:
            return pa.concat_tables(tables).sort_by(UNIT) if tables else pa.table({UNIT: pa.array([], pa.int64())})
        except pa.ArrowException as error:
            raise InputError(
                f"The parts in '{self.folder}' do not belong together. Remove the folder: its rows are measured again."
            ) from error

    def compact(self) -> None:
        """Merge all parts into one. No line is missing at any moment, some are there twice meanwhile."""
        before = self._paths()
        if len(before) > 1:
            whole = self.append(self.lines())
            for path in before:
                if path != whole:  # a merge that crashed may have left the same part
                    path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return part_paths(self.folder)

    def _check(self, theirs: Mapping[str, Any]) -> None:
        what = f"'{self.folder}' holds {self.what}"
        check_made_from(theirs, self.made_of, what, "Choose another output, or remove that folder.")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the parts in a folder were made from.

    Raises:
        InputError: the manifest is missing, damaged, or of another version.
    """
    path, way_out = folder / MANIFEST, f"Remove '{folder}': its rows are measured again."
    try:
        manifest = read_json(path, way_out)
    except FileNotFoundError:
        raise InputError(
            f"No {MANIFEST} in '{folder}': no pass was started there. Pass the folder of an interrupted pass."
        ) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("made_of"), dict):
        raise InputError(f"'{path}' is damaged: it does not say what the parts were made from. {way_out}")
    if manifest.get("format") != FORMAT:
        raise InputError(f"'{path}' was written by another version. {way_out}")
    made_of: dict[str, Any] = manifest["made_of"]
    return made_of


def remove_parts(folder: Path) -> None:
    """Remove a store's folder, and the folder around it if that is empty then."""
    remove_folder(folder)
    with contextlib.suppress(OSError):  # another pass has a store there
        folder.parent.rmdir()


def part_paths(folder: Path) -> list[Path]:
    """The parts in a folder, by their lowest units."""
    return sorted(path for path in folder.glob("part-*") if PART.fullmatch(path.name))


def read_parts(folder: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The tables of all parts, with each unit once. Other processes may add or merge parts meanwhile.

    Raises:
        InputError: a part is damaged.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):  # parts were merged meanwhile: list them again
            yield from _distinct([_read(path, columns) for path in part_paths(folder)])
            return


def _distinct(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """The tables, without the units that an earlier table has."""
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
    """The units in a table, ascending, each once."""
    units = table[UNIT].to_numpy()
    return _sorted(units[np.flatnonzero(np.diff(units, prepend=units[:1] - 1))])


def _sorted(units: np.ndarray) -> np.ndarray:
    """The units, ascending, each once; ten times as fast as `np.unique` on integers."""
    units = np.sort(units)
    return units[np.flatnonzero(np.diff(units, prepend=units[:1] - 1))]


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    expected = PART.fullmatch(path.name)
    assert expected is not None, "part_paths names parts"
    try:
        table = None
        if _digest(path) == expected[1]:
            with pq.ParquetFile(path) as file:  # faster than `read_table`, which looks for a dataset first
                table = file.read(columns=columns)
            units, _ = table.column(UNIT), table.column_names  # raises ValueError for a name that is not text
            if units.type != pa.int64() or units.null_count:
                raise KeyError("units are integers")
    except FileNotFoundError:
        if path.is_symlink():  # a broken one, which the next list contains too
            raise InputError(f"'{path}' is a broken link. Remove it.") from None
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"'{path}' is not a part of a pass ({error}). Remove it.") from error
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
