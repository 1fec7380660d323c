"""Files that are complete or absent, even after a crash. Knows file formats, not what the files contain."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..config import InputError
from .table_digest import verified, with_digest

LOCK = ".resofilter.lock"
PARQUET = "a Parquet file"
OLD = 3600  # seconds
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # from a network file system without locks
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}  # from a disk


# ---- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for a file or folder, which is renamed to `path` when the block ends.

    The content is flushed to the disk before it is renamed, so neither a kill nor a power failure leaves half of it.
    After an error, the temporary file is removed and `path` is unchanged. A folder replaces only an empty folder or
    none.

    Raises:
        InputError: nothing can be written there.
    """
    check_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")  # machines may share it
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush_entry(path.parent)
    finally:
        _remove(temporary)


def remove_old(folder: Path, pattern: str) -> None:
    """Remove files that processes left when they were killed: those that were not written to for an hour.

    Args:
        folder: their folder, which may be missing.
        pattern: their names, as for `Path.glob`; another run may be writing such files now.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process removes it, too
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the disk's refusal to write `path` into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise InputError(
            f"'{path}' cannot be written ({os.strerror(error.errno)}): what was there before is untouched. Make room, "
            "or choose another output, and start again."
        ) from error


def flush(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk."""
    for each in (*(path.rglob("*") if path.is_dir() else ()), path):
        flush_entry(each)


def flush_entry(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def save_parquet(table: pa.Table, path: Path, metadata: Mapping[str, str], **options: Any) -> Path:
    """Write a table and its metadata to a Parquet file that is complete or absent. Returns the file.

    Args:
        table, path: the table and the file.
        metadata: the metadata.
        **options: arguments of `pyarrow.parquet.write_table`; by default, only texts have dictionaries.
    """
    with replacing(path) as temporary:
        text = [each.name for each in table.schema if pa.types.is_string(each.type)]  # numbers hardly repeat
        table = with_digest(table.replace_schema_metadata(dict(metadata)))
        pq.write_table(table, temporary, **{"use_dictionary": text, **options}, write_page_checksum=True)
    return path


def save_arrow(table: pa.Table, path: Path, key: str, metadata: str) -> Path:
    """Write a table, uncompressed, to an Arrow file that is complete or absent. Returns the file."""
    table = with_digest(table.replace_schema_metadata({key: metadata}).combine_chunks())
    batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
    return path


# ---- folders


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes. The system releases the lock when the process ends, however it ends.

    One process may lock a folder several times. A folder that was made for the lock and stays empty is removed.

    Raises:
        InputError: another process has locked the folder, or it cannot be written to.
    """
    check_folder(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"Another run writes to '{folder}'. Wait until it ends, stop it, or choose another output."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise InputError(f"'{lock.lock_file}' cannot be locked ({error}). Choose another output.") from error
        warnings.warn(f"'{folder}' cannot be locked ({error}): make sure that no other run writes to it.", stacklevel=3)
        yield
        return
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)  # a process that locks a removed file notices and retries
        lock.release()
        with contextlib.suppress(OSError):  # not empty: something was written
            for each in made:
                each.rmdir()


def remove_folder(path: Path) -> None:
    """Remove a folder with its content. It is renamed first, so at any moment it is there as it was or not at all."""
    removed = path.with_name(f".{path.name}.removed.part")
    _remove(removed)
    with contextlib.suppress(FileNotFoundError):
        path.rename(removed)
    _remove(removed)


def check_folder(path: Path) -> None:
    """Raise InputError if a folder cannot be made or written to."""
    if path.parts[:1] == ("hf:",):
        raise InputError(f"'{path}' is on the hub: write to a folder here, and pass push_to_hub or call it.")
    there = path.absolute()
    try:
        blocking = next((each for each in (path, *path.parents) if each.exists() and not each.is_dir()), None)
        if blocking is not None:
            raise InputError(
                f"'{blocking}' is a file, not a folder: nothing can be written there. Choose another output."
            )
        there = next(each for each in (there, *there.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"Nothing can be written to '{there}' ({error.strerror}). Choose another output.") from error


# ---- reading


def file_at(path: str | os.PathLike[str], name: str) -> Path:
    """`path` itself if it names a file of the kind of `name`, by its suffix; else the file of that name in a folder."""
    path = Path(path)
    return path if path.suffix == Path(name).suffix else path / name


def load_parquet(path: Path, key: str, what: str) -> tuple[pa.Table, str]:
    """A Parquet file's table and its metadata. Arguments and errors as for `load_table`."""
    return load_table(path, key, what, PARQUET, _read_parquet)


def load_arrow(path: Path, key: str, what: str) -> tuple[pa.Table, str]:
    """An Arrow file's table, mapped into memory, and its metadata. Arguments and errors as for `load_table`."""
    return load_table(path, key, what, "an Arrow file", _read_arrow)


def load_table(path: Path, key: str, what: str, kind: str, read: Callable[[Path], pa.Table]) -> tuple[pa.Table, str]:
    """A file's table and its metadata under `key`.

    Args:
        path: the file.
        key: the name of this package's metadata.
        what: the content in words, for errors: `scores`.
        kind: the format in words: `a Parquet file`.
        read: the function that reads the file.

    Raises:
        InputError: the file is missing, cannot be read, or contains something else.
    """
    check_is_file(path, what)
    with readable(path, kind):
        table = read(path)
    return table, metadata_of(table.schema, path, key, what, kind)


def check_is_file(path: Path, what: str) -> None:
    """Raise InputError where there is no file; arguments as for `load_table`."""
    if not path.is_file():
        raise InputError(f"No {what} at '{path}'. Pass the folder or the file that they were written to.")


@contextlib.contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turns other libraries' errors of a damaged file into an InputError; arguments as for `load_table`."""
    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"'{path}' cannot be read: it is truncated, damaged or not {kind} ({error}). Make it again."
        ) from error


def metadata_of(schema: pa.Schema, path: Path, key: str, what: str, kind: str) -> str:
    """This package's metadata of a file with this schema; arguments and errors as for `load_table`."""
    metadata = (schema.metadata or {}).get(key.encode())
    if metadata is None:
        raise InputError(f"'{path}' is {kind}, but holds no {what} written by resofilter.")
    try:
        return str(metadata.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is damaged: its metadata is not text. Make it again.") from error


def _read_parquet(path: Path) -> pa.Table:
    # unlike `read_table`, it has ended all its threads after an error: none reads the mapped file when that is replaced
    with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
        table = file.read()
    return verified(table, table.columns)


def _read_arrow(path: Path) -> pa.Table:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.py_buffer(memory)).read_all()
    table.validate()  # else a damaged file would be read beyond its end
    return verified(table, _freeing_pages(table.columns, memory))


def _freeing_pages(columns: Iterable[pa.ChunkedArray], memory: mmap.mmap) -> Iterator[pa.ChunkedArray]:
    """The columns one by one; the pages of a column are freed after it was read."""
    for column in columns:
        yield column
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every platform
            memory.madvise(mmap.MADV_DONTNEED)


def read_json(path: Path, way_out: str) -> Any:
    """A JSON file's content.

    Raises:
        FileNotFoundError: the file is missing.
        InputError: the file is damaged; the message ends with the way out.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({error}). {way_out}") from error


def read_yaml(path: str | os.PathLike[str], name: str) -> Any:
    """A YAML file's content. Raises InputError, which calls the file `name`, if it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # `safe_load` itself raises the last ones, for a thirteenth month, `!!bool x` and the like
        raise InputError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
