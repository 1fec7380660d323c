"""The results so far of a long pass, in parts that are complete or absent. Knows Parquet, not what is measured.

    folder/manifest.json                           what the parts are made from; written once, before the first part
    folder/part-<lowest unit>-<digest>.parquet     the lines of some units of work, each with the number of its unit

The digest in a part's name is the digest of its bytes, so a truncated or changed part is noticed. Several processes may
add parts while others read and merge them:

    lines of new units + the lines of small parts -> one part -> on the disk -> the small parts are removed

A part is removed only when another with all its lines is on the disk, so a kill loses nothing. A unit in two parts
counts once; a kill before the small parts are removed leaves such units, and so do two processes that merge one part.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
MANY = 100  # more parts than this are merged when a pass is resumed, and when it has measured everything
GROWS = 1 << 23  # bytes: a smaller part is written anew with each addition
LARGE = 1 << 28  # bytes: parts are merged up to this size, which fits every memory
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
        self.compact_if_many()

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

    def append_and_merge(self, lines: pa.Table, paths: Iterable[Path]) -> list[Path]:
        """Add the lines of some units in one part with those of small parts, in whose place it is. This is one write.

        Args:
            lines: a table with a column `unit`.
            paths: the parts that may be merged. Those that another process has merged meanwhile count as removed.

        Returns:
            Those that are left, and the new one.
        """
        sizes = _by_size(paths)
        parts, count = [path for _, path in sizes], parts_to_merge(lines.nbytes, [size for size, _ in sizes])
        part = self._replace(parts[:count], [lines])
        return parts[count:] if part is None else [*parts[count:], part]

    def compact_if_many(self) -> None:
        """Merge parts where there are more than 100."""
        if len(self.paths()) > MANY:
            self.compact()

    def compact(self) -> None:
        """Merge all parts, to one for every 128 to 256 MB. No line is ever missing, some are there twice meanwhile."""
        groups, total = list[list[Path]]([[]]), 0
        for size, path in _by_size(self.paths()):
            if total + size > LARGE:
                groups, total = [*groups, []], 0
            groups[-1].append(path)
            total += size
        for group in groups:
            if len(group) > 1:
                self._replace(group, [])

    def _replace(self, paths: Sequence[Path], tables: Sequence[pa.Table]) -> Path | None:
        """Write a part with some lines and with those of other parts, and then remove these."""
        read, found = list[Path](), list(tables)
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # another process has merged it meanwhile
                found.append(_read(path, None))
                read.append(path)
        part = self.append(self._ordered(_distinct(found)))
        for path in read:
            if path != part:  # a merge that crashed may have left the same part
                path.unlink(missing_ok=True)
        return part

    def done(self) -> np.ndarray:
        """The units in the store, ascending."""
        return _sorted(np.concatenate([NONE, *map(_units, read_parts(self.folder, [UNIT]))]))

    def lines(self) -> pa.Table:
        """All lines, by ascending unit; the lines of a unit in the order in which they were added."""
        return self._ordered(read_parts(self.folder))

    def paths(self) -> list[Path]:
        """The parts, by their lowest units."""
        return part_paths(self.folder)

    def _ordered(self, tables: Iterable[pa.Table]) -> pa.Table:
        found = list(tables)
        try:
            return pa.concat_tables(found).sort_by(UNIT) if found else pa.table({UNIT: pa.array([], pa.int64())})
        except pa.ArrowException as error:
            raise InputError(
                f"The parts in '{self.folder}' do not belong together. Remove the folder: its rows are measured again."
            ) from error

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


def parts_to_merge(added: int, sizes: Sequence[int]) -> int:
    """How many parts to write anew together with what is added, so that there are few, and no line is written often.

    The smallest are taken first, up to one that is more than twice as large as what is taken and at least 8 MB, or with
    which the new part would have more than 256 MB. So of those that are left, each is more than twice as large as the
    next smaller one.

    Args:
        added: the size of what is added, in bytes.
        sizes: the sizes of the parts, ascending.

    Returns:
        The number of the smallest parts.
    """
    total = added
    for count, size in enumerate(sizes):
        if total + size > LARGE or size > max(GROWS, 2 * total):
            return count
        total += size
    return len(sizes)


def _by_size(paths: Iterable[Path]) -> list[tuple[int, Path]]:
    """The size of each part that is there, and the part, ascending."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # merged meanwhile
            found.append((path.stat().st_size, path))
    return sorted(found)


def _distinct(tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """The tables, without the units that an earlier table has."""
    own = [_units(table) for table in tables]
    units = np.concatenate([NONE, *own])
    firsts = np.unique(units, return_index=True)[1]
    if len(firsts) == len(units):
        yield from tables
        return
    first = np.zeros(len(units), dtype=bool)
    first[firsts] = True
    ends = np.cumsum([len(mine) for mine in own])[:-1]
    for table, mine, fresh in zip(tables, own, np.split(first, ends), strict=True):
        yield table.filter(pa.array(np.isin(table[UNIT].to_numpy(), mine[fresh])))


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
        if isinstance(error, OSError) and error.errno == errno.ESTALE:  # removed on a network's disk while it was read
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
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
