"""Files that are whole or not there, whatever happens meanwhile. Knows Parquet and Arrow, not what is in them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .config import InputError


def save_parquet(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a table and its metadata beside the target, then rename: the file is whole or not there."""
    with replacing(path) as part:
        pq.write_table(table.replace_schema_metadata(dict(metadata)), part)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder that takes its place once it is whole; else nothing is left of it.

    A folder only takes the place of none, or of an empty one. Raises InputError where nothing can be written.
    """
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True) if part.is_file() else shutil.rmtree(part, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Raise InputError where a folder cannot be made or written to."""
    blocking = next((each for each in (path, *path.parents) if each.exists() and not each.is_dir()), None)
    if blocking is not None:
        raise InputError(f"'{blocking}' is a file, not a folder: nothing can be written there. Choose another output.")
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"Nothing can be written to '{there}' ({error.strerror}). Choose another output.") from error


def load_parquet(path: Path, key: str, what: str) -> tuple[pa.Table, str]:
    """The table at `path` and the metadata under `key`; `what` names the content in the errors."""
    return load_table(path, key, what, "a Parquet file", pq.read_table)


def load_table(path: Path, key: str, what: str, kind: str, read: Callable[[Path], pa.Table]) -> tuple[pa.Table, str]:
    """What `read` gives of a file, and the metadata under `key`.

    Args:
        path: the file.
        key: under which name its metadata hold what is ours.
        what: names the content in the errors.
        kind: names the format, with its article.
        read: opens it.

    Raises:
        InputError: the file is missing, cannot be read, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"No {what} at '{path}'. Pass the folder or the file that they were written to.")
    try:
        table = read(path)
    except (pa.ArrowException, OSError) as error:
        format_ = kind.split(" ", 1)[1]
        raise InputError(f"'{path}' cannot be read, it is cut off or no {format_} ({error}). Make it again.") from error
    metadata = (table.schema.metadata or {}).get(key.encode())
    if metadata is None:
        raise InputError(f"'{path}' is {kind}, but holds no {what} of resofilter.")
    try:
        return table, metadata.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is damaged: its metadata are no text. Make it again.") from error


def file_at(path: str | os.PathLike[str], name: str) -> Path:
    """`path` itself if it names a Parquet file, else the file called `name` in that folder."""
    path = Path(path)
    return path if path.suffix == ".parquet" else path / name


def save_arrow(table: pa.Table, path: Path, key: str, metadata: str) -> Path:
    """Write a table, uncompressed, beside the target, then rename: the file is whole or not there."""
    table = table.replace_schema_metadata({key: metadata})
    with replacing(path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]:
            writer.write_batch(batch)
    return path


def load_arrow(path: Path, key: str, what: str) -> tuple[pa.Table, str]:
    """The table at `path`, mapped into memory, and the metadata under `key`; `what` names the content in the errors."""
    return load_table(path, key, what, "an Arrow file", _mapped)


def _mapped(path: Path) -> pa.Table:
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate()  # else a damaged file is followed beyond its end
    return table
