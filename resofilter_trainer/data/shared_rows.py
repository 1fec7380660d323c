"""The rows of a pass, read by all processes together: each looks at its share. Knows datasets, not tokens.

what rows say -> settled by all of them -> which are empty or repeated -> the usable rows, a block at a time

Nothing here depends on the number of processes, and no process has all rows in memory.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, DatasetInfo, Features, Value
from trl import SFTConfig

from ..config import ColumnMapping
from ..io.digest import BLOCK, block_digests, digest_of_blocks
from ..io.files import load_parquet, read_json, remove_old, replacing, save_parquet
from ..scores.score_table import EMPTY, SAME_PROMPT
from .columns import kind_of
from .reading import Found, Reader
from .rows import empty_rows, query_hashes
from .surveys import ROW_POSITION
from .tables import tables_of
from .together import from_main, shared_out
from .usable import all_skipped, check_no_media, check_skipped, check_unpacked

MAPPED = 2**28  # bytes of mapped files that a process reads before it maps others, which frees their memory
MOST_SHARES = 1024  # more would make more files than a folder should have
SORTED = 2**23  # rows whose hashes are sorted at a time
QUERIES, ROWS, SKIPPED = "queries", "rows.json", "skipped.parquet"


@dataclass(frozen=True)
class Share:
    """Consecutive rows of the user's dataset that one process prepares.

    Attributes:
        number: the share's number, ascending with the rows.
        start, stop: the first row, which begins a block, and the row after the last.
    """

    number: int
    start: int
    stop: int

    @property
    def blocks(self) -> Iterator[tuple[int, int]]:
        """The first row of each block, and the row after its last."""
        yield from ((start, min(start + BLOCK, self.stop)) for start in range(self.start, self.stop, BLOCK))


def shares_of(rows: int) -> list[Share]:
    """The shares of a dataset, whatever the number of processes: of a block each, or of several if there are many."""
    blocks = -(-rows // BLOCK)
    size = -(-blocks // MOST_SHARES) * BLOCK
    return [Share(number, start, min(start + size, rows)) for number, start in enumerate(range(0, rows, size))]


@dataclass(frozen=True)
class SharedRows:
    """Rows of which each process reads its share.

    Attributes:
        reader: reads the user's rows.
        form: the form to rewrite them in, if they are rewritten.
        skipped: why rows are skipped, by position.
        notes: what was read as something else.
        content: the digest of the user's rows.
    """

    reader: Reader
    form: Any
    skipped: dict[int, str]
    notes: list[str]
    content: str

    @property
    def have_messages(self) -> bool:
        """Whether the rows under TRL's names may hold messages."""
        kinds = {kind_of(self.reader.dataset.features[name]) for name in self.reader.layout.sources}
        return self.reader.layout.kind != "tokens" and self.form != "text" and kinds != {"text"}

    @cached_property
    def _mapped(self) -> Remapped:
        return Remapped(self.reader.dataset)

    def usable(self, share: Share) -> Iterator[Dataset]:
        """The usable rows of a share under TRL's names, in memory, a block at a time; blocks without any are left out.

        They have the columns that TRL reads and `ROW_POSITION`.
        """
        gone = np.array(sorted(self.skipped), dtype=np.int64)
        for start, stop in share.blocks:
            positions = np.setdiff1d(np.arange(start, stop), gone[np.searchsorted(gone, start) :], assume_unique=True)
            if len(positions):
                yield under_trls_names(self.reader.over(self._mapped.rows(start, stop)), positions, start, self.form)


def read_shared(
    dataset: Dataset, mapping: ColumnMapping, args: SFTConfig, drop_duplicates: bool, drop_empty: bool, folder: Path
) -> SharedRows:
    """Read the rows of a pass; all processes call this. Arguments and errors as for `usable_rows`.

    Args:
        folder: a folder that all processes see, for hashes of rows that may be repeated.
    """
    check_unpacked(dataset)
    reader = Reader.of(dataset, mapping, args.dataset_text_field, args)
    if not mapping.columns:
        check_no_media(dataset)
    shares, mapped = shares_of(len(dataset)), Remapped(reader.dataset)
    with _queries(folder) if drop_duplicates else contextlib.nullcontext() as queries:
        look = _Look(reader, args.dataset_text_field, queries, mapped, Remapped(dataset))
        return _read_together(look, shares, drop_empty)


def _read_together(look: _Look, shares: Sequence[Share], drop_empty: bool) -> SharedRows:
    """The rows of all shares."""
    reader, queries, count = look.reader, look.queries, shares[-1].stop
    looked = shared_out(shares, look.first)
    meaning = reader.settled([each.found for each in looked])
    empty = [row for each in looked for row in each.empty]
    if reader.reads:
        read = np.array(sorted(meaning.refused), dtype=np.int64)
        empty = [row for rows in shared_out(shares, partial(look.second, read, meaning.form)) for row in rows]
    repeated = np.empty((0, 2), np.int64) if queries is None else from_main(lambda: _repeated(queries, shares))
    reasons = {int(row): f"{SAME_PROMPT} {first}" for row, first in repeated}
    nothing = {row: EMPTY for row in empty if row not in reasons}
    check_skipped(nothing | meaning.refused, count, drop_empty)
    skipped = reasons | nothing | meaning.refused
    if len(skipped) == count:
        raise all_skipped(skipped)
    content = digest_of_blocks([block for each in looked for block in each.blocks], count)
    return SharedRows(reader, meaning.form, skipped, meaning.notes, content)


def save_rows(rows: SharedRows, folder: Path) -> None:
    """Keep what is known of the rows; the last file says that all of it is there."""
    positions, reasons = pa.array(rows.skipped.keys(), pa.int64()), pa.array(rows.skipped.values(), pa.string())
    save_parquet(pa.table({"position": positions, "reason": reasons}), folder / SKIPPED, {SKIPPED: ""})
    with replacing(folder / ROWS) as path:
        path.write_text(json.dumps({"form": rows.form, "notes": rows.notes, "content": rows.content}))


def are_kept(folder: Path) -> bool:
    """Whether all of that is there."""
    return (folder / ROWS).exists()


def kept_content(folder: Path) -> str:
    """The digest of the rows of which it is known. Raises InputError where the file is damaged."""
    return str(_known(folder)["content"])


def kept_rows(dataset: Dataset, mapping: ColumnMapping, args: SFTConfig, folder: Path) -> SharedRows:
    """The rows of which it is known. Raises InputError where a file is damaged."""
    known = _known(folder)
    table, _ = load_parquet(folder / SKIPPED, SKIPPED, "skipped rows")
    skipped = dict(zip(table["position"].to_pylist(), table["reason"].to_pylist(), strict=True))
    reader = Reader.of(dataset, mapping, args.dataset_text_field, args)
    return SharedRows(reader, known["form"], skipped, known["notes"], known["content"])


def _known(folder: Path) -> Any:
    return read_json(folder / ROWS, f"Remove '{folder}': the rows are read again.")


@dataclass(frozen=True)
class _Looked:
    """What is known of a share: what its rows say, its blocks' digests, and its empty rows if that is known already."""

    found: Found
    blocks: list[bytes]
    empty: list[int]


@dataclass(frozen=True)
class _Look:
    """Looks at a share of the rows.

    Attributes:
        reader: reads the rows.
        text_field: the column in which TRL looks for text.
        queries: how the names of the files begin with hashes of what rows ask; None if repeated rows stay.
        mapped, whole: the reader's rows, and the user's with all columns.
    """

    reader: Reader
    text_field: str
    queries: Path | None
    mapped: Remapped
    whole: Remapped

    def first(self, share: Share) -> _Looked:
        """Look at the rows as they are; at once at how they will be read, unless all rows decide on that."""
        parts, blocks, empty, hashes = [], list[bytes](), list[int](), list[np.ndarray]()
        for start, stop in share.blocks:
            now = self.reader.over(self.mapped.rows(start, stop))
            found = now.found()
            parts.append(found.moved(start))
            same = self.mapped.given is self.whole.given
            blocks += block_digests(now.dataset if same else self.whole.rows(start, stop))
            if not self.reader.reads:
                places = np.setdiff1d(np.arange(stop - start), list(found.refused), assume_unique=True)
                self._look(now, places, start, None, empty, hashes)
        if not self.reader.reads:
            self._write(share, hashes)
        return _Looked(_joined(parts), blocks, empty)

    def second(self, refused: np.ndarray, form: Any, share: Share) -> list[int]:
        """Look at the rows as they are read, once all rows have decided on that; the positions of the empty ones."""
        empty, hashes = list[int](), list[np.ndarray]()
        for start, stop in share.blocks:
            now = self.reader.over(self.mapped.rows(start, stop))
            places = np.setdiff1d(np.arange(stop - start), refused - start, assume_unique=True)
            self._look(now, places, start, form, empty, hashes)
        self._write(share, hashes)
        return empty

    def _look(
        self, reader: Reader, places: np.ndarray, start: int, form: Any, empty: list[int], hashes: list[np.ndarray]
    ) -> None:
        """Add the positions of the empty rows, and what the rows ask; the reader's first row is at `start`."""
        if not len(places):
            return
        rows, positions = reader.under_trls_names(places, form), start + places
        empty += positions[empty_rows(rows, self.text_field)].tolist()
        if self.queries is not None:
            found = np.frombuffer(b"".join(query_hashes(rows, self.text_field)), np.uint64).reshape(-1, 2)
            hashes.append(np.column_stack([found, positions.astype(np.uint64)]))

    def _write(self, share: Share, hashes: Sequence[np.ndarray]) -> None:
        if self.queries is not None:
            with replacing(_file_of(self.queries, share)) as path, path.open("wb") as file:
                np.save(file, np.concatenate([np.empty((0, 3), np.uint64), *hashes]))


def _joined(parts: Sequence[Found]) -> Found:
    """What is found in consecutive rows."""
    forms: dict[Any, list[np.ndarray]] = {}
    for part in parts:
        for each, rows in part.forms.items():
            forms.setdefault(each, []).append(rows)
    return Found(
        {row: why for each in parts for row, why in each.refused.items()},
        {note for each in parts for note in each.notes},
        {each: np.concatenate(rows) for each, rows in forms.items()},
        any(each.changed for each in parts),
    )


@contextlib.contextmanager
def _queries(folder: Path) -> Iterator[Path]:
    """How the names of this run's files begin with hashes of what rows ask; the files are removed at the end.

    Another run may prepare the same rows at the same time.
    """
    from_main(lambda: remove_old(folder, f"{QUERIES}-*.npy"))
    own = folder / f"{QUERIES}-{from_main(lambda: secrets.token_hex(8))}"
    try:
        yield own
    finally:
        if PartialState().is_main_process:
            for path in folder.glob(f"{own.name}-*.npy"):
                path.unlink()


def _file_of(queries: Path, share: Share) -> Path:
    return queries.with_name(f"{queries.name}-{share.number:04d}.npy")


def _repeated(queries: Path, shares: Sequence[Share]) -> np.ndarray:
    """The rows that ask what an earlier row asks, each with the first such row; (R, 2), ascending."""
    parts = [np.load(_file_of(queries, share), mmap_mode="r") for share in shares]
    pieces = -(-sum(map(len, parts)) // SORTED)
    found = [np.empty((0, 2), np.int64)]
    for piece in range(pieces):  # of rows whose hashes are alike, so that equal ones are in one piece
        rows = np.concatenate([part[part[:, 0] % np.uint64(pieces) == piece] for part in parts])
        rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
        starts = np.ones(len(rows), bool)
        starts[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
        first = rows[starts, 2][np.cumsum(starts) - 1]
        found.append(np.column_stack([rows[~starts, 2], first[~starts]]).astype(np.int64))
    whole = np.concatenate(found)
    return whole[np.argsort(whole[:, 0])]


class Remapped:
    """A dataset of which a stretch of files is mapped at a time, so that what was read does not stay in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.given, self._now, self._first = dataset, dataset, 0
        size = sum(Path(each["filename"]).stat().st_size for each in dataset.cache_files)
        bytes_of_block = size * BLOCK // max(len(dataset.data), 1)
        self._step = max(MAPPED // max(bytes_of_block, 1), 1) * BLOCK if size else len(dataset)

    def rows(self, start: int, stop: int) -> Dataset:
        """Some rows of one block, in memory or in mapped files."""
        first = start // self._step * self._step
        if self._step < len(self.given) and (first != self._first or self._now is self.given):
            stretch = self.given.select(range(first, min(first + self._step, len(self.given))))
            self._first, self._now = first, pickle.loads(pickle.dumps(stretch))  # which opens its files alone
        return _stretch(self._now, np.arange(start, stop) - first)


def under_trls_names(reader: Reader, positions: np.ndarray, start: int, form: Any) -> Dataset:
    """Some rows in memory, with the columns that TRL reads and `ROW_POSITION`; the reader has a block, from `start`."""
    all_of_them = len(positions) == len(reader.dataset)
    near = reader if all_of_them else reader.over(_stretch(reader.dataset, positions - start))
    renamed = near.under_trls_names(np.arange(len(positions)), form)
    names = [name for name in reader.layout.passed if name in renamed.column_names]
    table = next(tables_of(renamed, len(renamed), names)).append_column(ROW_POSITION, pa.array(positions, pa.int64()))
    features = {**{name: renamed.features[name] for name in names}, ROW_POSITION: Value("int64")}
    return _in_memory(table, Features(features))


def _stretch(dataset: Dataset, positions: np.ndarray) -> Dataset:
    """Some rows in memory, at least one."""
    first, last = int(positions[0]), int(positions[-1])
    together = last - first == len(positions) - 1
    if together and dataset._indices is None:
        return _in_memory(dataset.data.table.slice(first, len(positions)), dataset.features)
    part = dataset.select(range(first, last + 1) if together else positions)
    return _in_memory(next(tables_of(part, len(part))), dataset.features)


def _in_memory(table: pa.Table, features: Features) -> Dataset:
    """A dataset that writes no files when it is mapped. Without a fingerprint, datasets would hash all of its rows."""
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=secrets.token_hex(8))
