"""Files that are whole or not there, whatever happens meanwhile. Knows Parquet and Arrow, not what is in them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from .config import InputError

LOCK = ".resofilter.lock"
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}  # of a disk


def save_parquet(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a table and its metadata beside the target, then rename: the file is whole or not there."""
    with replacing(path) as part:
        text = [each.name for each in table.schema if pa.types.is_string(each.type)]  # numbers hardly repeat
        table = table.replace_schema_metadata(dict(metadata))
        pq.write_table(table, part, use_dictionary=text, write_page_checksum=True)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder that takes its place once it is whole; else nothing is left of it.

    It is on the disk before it is renamed, so that neither a kill nor a power failure leaves half of it. A folder only
    takes the place of none, or of an empty one. Raises InputError where nothing can be written.
    """
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            yield part
            flush(part)
            os.replace(part, path)
            flush(path.parent)
    finally:
        part.unlink(missing_ok=True) if part.is_file() else shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to take `path` into an InputError."""
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
    """Wait until a file, everything in a folder, or the folder's own list is on the disk."""
    inside = path.rglob("*") if path.is_dir() and path.name.endswith(".part") else ()
    for each in (*inside, path):
        number = os.open(each, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the system lets go of it when this one ends, however it ends.

    Raises InputError where another holds it. Within a process it may be held several times.
    """
    check_folder(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"Another run writes to '{folder}'. Wait until it ends, stop it, or choose another output."
        ) from None
    except (NotImplementedError, OSError) as error:  # some network file systems know no locks
        warnings.warn(f"'{folder}' cannot be locked ({error}): see to it that no other run writes to it.", stacklevel=3)
        yield
        return
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)  # who locks a file that is gone notices, and tries again
        lock.release()
        with contextlib.suppress(OSError):  # not empty: something was written
            for each in made:
                each.rmdir()


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
    return load_table(path, key, what, "a Parquet file", _checked)


def _checked(path: Path) -> pa.Table:
    return pq.read_table(path, memory_map=True, page_checksum_verification=True)


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
