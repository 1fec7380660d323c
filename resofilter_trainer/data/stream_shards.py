"""The shards of a stream, and the files that a shard is read from. Knows how datasets makes streams, no row.

`IterableDataset.state_dict` is not used: it resumes at the beginning of a shard as well, whose rows it reads and skips;
and up to datasets 4.8 it loses rows of mapped and filtered streams (huggingface/datasets issues 8145 and 8359).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import xxhash
from datasets import ArrowBasedBuilder, IterableDataset

MOST = 1024  # consecutive shards of a stream with more of them count as one
SOURCES = {"ExamplesIterable", "ArrowExamplesIterable"}  # datasets' names, from here on
PASSING = {  # what gives the rows of shards one after another as they are, apart from types, formats and columns
    "FormattedExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
}
ROW_BY_ROW = {"MappedExamplesIterable", "FilteredExamplesIterable"}  # without batches or indices
PINNED = re.compile(r"hf://[^@]+@[0-9a-f]{40}/")  # begins the path of a file that never changes: at one commit


def shards_of(stream: IterableDataset) -> list[IterableDataset]:
    """The shards of a stream: their rows, one shard after another, are the stream's rows in its order.

    Returns:
        The stream alone where it has one shard, or where its shards do not have its rows in its order: where it is
        shuffled, interleaved, repeated, cut (`take`, `skip`), mapped or filtered in batches or with indices, split by
        node, or does not start at its beginning.
    """
    if not _is_in_order(stream) or stream.num_shards < 2:
        return [stream]
    count = min(stream.num_shards, MOST)
    return [stream.shard(count, index) for index in range(count)]


def files_of(shard: IterableDataset) -> str | None:
    """A digest of the files of a shard and of how they are read: another one where its rows may have changed.

    A file here is known by its size and times, one on the hub by its commit.

    Returns:
        The digest; None where rows depend on anything else: a function of the user's, a dataset in memory, other hosts.
    """
    found = [datasets.__version__, str(shard.features), str(shard._formatting)]
    for each in _parts(shard._ex_iterable):
        name = type(each).__name__
        builder = getattr(getattr(each, "generate_tables_fn", None), "__self__", None)
        if name == "ArrowExamplesIterable" and isinstance(builder, ArrowBasedBuilder):
            files = [_state(path) for path in dict.fromkeys(_texts(each.kwargs))]
            if not files or None in files:
                return None
            settings = {field.name: getattr(builder.config, field.name) for field in dataclasses.fields(builder.config)}
            settings.pop("data_files", None)
            plain = {key: value for key, value in each.kwargs.items() if not isinstance(value, list)}
            found += [type(builder).__qualname__, repr(settings), repr(plain), *map(str, files)]
        elif name in PASSING:
            found.append(f"{name} {getattr(each, 'column_names', None)}")
        else:
            return None
    return xxhash.xxh3_128_hexdigest("\n".join(found).encode())


def _is_in_order(stream: IterableDataset) -> bool:
    if stream._distributed is not None or stream.epoch or stream._starting_state_dict is not None:
        return False
    return all(_keeps_order(each) for each in _parts(stream._ex_iterable))


def _keeps_order(each: Any) -> bool:
    name = type(each).__name__
    if name in ROW_BY_ROW:
        return not each.batched and not each.with_indices
    return name in SOURCES or (name in PASSING and not getattr(each, "drop_last_batch", False))


def _parts(iterable: Any) -> Iterator[Any]:
    """What a stream is made of: from its last step to its sources."""
    yield iterable
    for each in [iterable.ex_iterable] if hasattr(iterable, "ex_iterable") else getattr(iterable, "ex_iterables", ()):
        yield from _parts(each)


def _texts(value: Any) -> Iterator[str]:
    """The texts in the lists among a source's arguments, which name its files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for each in value.values() if isinstance(each, list) for text in _texts(each))
    elif isinstance(value, list | tuple):
        yield from (text for each in value for text in _texts(each))


def _state(path: str) -> str | None:
    """What a file is known by; None where it may change unnoticed."""
    place = path.rpartition("::")[2]  # the file itself, where it is compressed
    if PINNED.match(place):
        return path
    here = place.removeprefix("file://")
    if "://" in here or not Path(here).is_file():
        return None
    stat = Path(here).stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
