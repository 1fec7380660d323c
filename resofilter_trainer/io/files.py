"""Files that are whole or not there, whatever happens meanwhile. Knows their formats, not what is in them."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout

from ..config import InputError

LOCK = ".resofilter.lock"
DIGEST = b"resofilter_digest"  # the metadata that holds a table's own; files of earlier versions have none
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # of a network file system without any
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}  # of a disk


def save_parquet(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a table and its metadata beside the target, then rename: the file is whole or not there."""
    with replacing(path) as part:
        text = [each.name for each in table.schema if pa.types.is_string(each.type)]  # numbers hardly repeat
        table = _signed(table.replace_schema_metadata(dict(metadata)))
        pq.write_table(table, part, use_dictionary=text, write_page_checksum=True)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder that takes its place once it is whole; else nothing is left of it.

    It is on the disk before it is renamed, so that neither a kill nor a power failure leaves half of it. A folder only
    takes the place of none, or of an empty one. Raises InputError where nothing can be written.
    """
    check_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(part)  # left by one that was killed and had the same number, as in a container
            yield part
            flush(part)
            os.replace(part, path)
            flush(path.parent)
    finally:
        _remove(part)


def _remove(part: Path) -> None:
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
        except OSError as error:
            if error.errno != errno.EINVAL or not each.is_dir():  # some file systems have no such thing for folders
                raise
        finally:
            os.close(number)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the system lets go of it when this one ends, however it ends.

    Raises InputError where another holds it. Within a process it may be held several times.
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


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it: at any moment it is there as it was, or not at all."""
    removed = path.with_name(f".{path.name}.removed.part")
    _remove(removed)
    with contextlib.suppress(FileNotFoundError):
        path.rename(removed)
    _remove(removed)


def check_folder(path: Path) -> None:
    """Raise InputError where a folder cannot be made or written to."""
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


def load_parquet(path: Path, key: str, what: str) -> tuple[pa.Table, str]:
    """The table at `path` and the metadata under `key`; `what` names the content in the errors."""
    return load_table(path, key, what, "a Parquet file", _checked)


def _checked(path: Path) -> pa.Table:
    table = pq.read_table(path, memory_map=True, page_checksum_verification=True, partitioning=None)
    return _as_signed(table, table.columns)


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
    except (pa.ArrowException, OSError, ValueError) as error:
        format_ = kind.split(" ", 1)[1]
        raise InputError(
            f"'{path}' cannot be read, it is cut off or damaged, or no {format_} ({error}). Make it again."
        ) from error
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
    table = _signed(table.replace_schema_metadata({key: metadata}).combine_chunks())
    with replacing(path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]:
            writer.write_batch(batch)
    return path


def load_arrow(path: Path, key: str, what: str) -> tuple[pa.Table, str]:
    """The table at `path`, mapped into memory, and the metadata under `key`; `what` names the content in the errors."""
    return load_table(path, key, what, "an Arrow file", _mapped)


def _mapped(path: Path) -> pa.Table:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.py_buffer(memory)).read_all()
    table.validate()  # else a damaged file is followed beyond its end
    return _as_signed(table, _let_go(table.columns, memory))


def _let_go(columns: Iterable[pa.ChunkedArray], memory: mmap.mmap) -> Iterator[pa.ChunkedArray]:
    """One after another; of each that has been read, no page stays in memory."""
    for column in columns:
        yield column
        if hasattr(mmap, "MADV_DONTNEED"):  # not everywhere
            memory.madvise(mmap.MADV_DONTNEED)


def _signed(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({**table.schema.metadata, DIGEST: _digest(table, table.columns)})


def _as_signed(table: pa.Table, columns: Iterable[pa.ChunkedArray]) -> pa.Table:
    """The table. Raises ArrowInvalid where it is not what was signed: no page checksum covers names and metadata."""
    expected = (table.schema.metadata or {}).get(DIGEST)
    if expected is not None and expected != _digest(table, columns):
        raise pa.ArrowInvalid("what it holds is not what was written")
    return table


def _digest(table: pa.Table, columns: Iterable[pa.ChunkedArray]) -> bytes:
    """Of a table's names, types and metadata, and of its columns."""
    metadata = sorted((name, value) for name, value in (table.schema.metadata or {}).items() if name != DIGEST)
    names = [(field.name, str(field.type)) for field in table.schema]
    digest = xxhash.xxh3_128(repr((table.num_rows, names, metadata)).encode(errors="replace"))
    for column in columns:
        for part in _bytes_of(column):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest().encode()


def _bytes_of(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Of numbers, truth values and text the same ones however a column is cut into chunks; of lists as they are cut."""
    kind = column.type
    if column.null_count:
        yield from (chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in column.chunks)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.drop_null()
        yield from (pc.binary_length(chunk).to_numpy() for chunk in column.chunks)
        yield from (_text_of(chunk) for chunk in column.chunks if len(chunk))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield from (chunk.to_numpy() for chunk in (column.fill_null(0) if column.null_count else column).chunks)
    elif pa.types.is_boolean(kind):
        yield from (chunk.to_numpy(zero_copy_only=False) for chunk in column.fill_null(False).chunks)
    elif pa.types.is_large_list(kind):
        for chunk in column.chunks:
            yield chunk.offsets.to_numpy()
            yield from _bytes_of(pa.chunked_array([chunk.values]))


def _text_of(chunk: pa.Array) -> np.ndarray:
    """The bytes of all its texts, one after another; none of them is null."""
    _, offsets, text = chunk.buffers()
    width = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    first, last = np.frombuffer(offsets, width)[[chunk.offset, chunk.offset + len(chunk)]]
    return np.empty(0, np.uint8) if text is None else np.frombuffer(text, np.uint8)[first:last]


def read_json(path: Path, way_out: str) -> Any:
    """What a JSON file holds. Raises InputError, which ends with the way out, where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({error}). {way_out}") from error


def read_yaml(path: str | os.PathLike[str], name: str) -> Any:
    """What a YAML file holds. Raises InputError, which calls it by the name, where it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # the last ones of `safe_load` itself, for a thirteenth month, `!!bool x` and the like
        raise InputError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
