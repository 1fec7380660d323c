"""The shards of a stream have its rows in its order, or it is not split; a shard's files tell whether it changed."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node

from resofilter_trainer.data import stream_shards
from resofilter_trainer.data.files import load_stream
from resofilter_trainer.data.stream_shards import digest_of_files, shards_of

ROWS = [{"x": f"row {number}"} for number in range(13)]


def in_memory() -> IterableDataset:
    return Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)


def generated(numbers):
    for number in numbers:
        yield {"x": f"row {number}"}


def at_7(stream: IterableDataset) -> IterableDataset:
    for _ in zip(range(7), stream, strict=False):
        state = stream.state_dict()
    stream.load_state_dict(state)
    return stream


def in_second_epoch(stream: IterableDataset) -> IterableDataset:
    stream.set_epoch(1)
    return stream


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(3):
        pq.write_table(
            pa.table({"x": [f"row {5 * number + each}" for each in range(5)]}), tmp_path / f"{number}.parquet"
        )
    return tmp_path


IN_ORDER = {
    "as it is": in_memory,
    "with fewer columns": lambda: in_memory().select_columns(["x"]),
    "formatted": lambda: in_memory().with_format("arrow").with_format(None),
    "concatenated": lambda: concatenate_datasets([in_memory(), in_memory()]),
}
NOT_IN_ORDER = {
    "mapped": lambda: in_memory().map(lambda row: {"y": row["x"]}, features=Features({"y": Value("string")})),
    "filtered": lambda: in_memory().filter(lambda row: row["x"] != "row 6"),
    "generated": lambda: IterableDataset.from_generator(
        generated, features=Features({"x": Value("string")}), gen_kwargs={"numbers": list(range(13))}
    ),
    "shuffled": lambda: in_memory().shuffle(seed=0, buffer_size=3),
    "interleaved": lambda: interleave_datasets([in_memory(), in_memory()]),
    "repeated": lambda: in_memory().repeat(2),
    "cut after": lambda: in_memory().take(8),
    "cut before": lambda: in_memory().skip(8),
    "mapped in batches": lambda: in_memory().map(lambda rows: {"y": [len(rows["x"])] * len(rows["x"])}, batched=True),
    "mapped with indices": lambda: in_memory().map(lambda row, number: {"y": number}, with_indices=True),
    "in batches": lambda: in_memory().batch(2),
    "split by node": lambda: split_dataset_by_node(in_memory(), rank=0, world_size=3),
    "in its second epoch": lambda: in_second_epoch(in_memory()),
    "not from its beginning": lambda: at_7(in_memory()),
    "of one shard": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
}


@pytest.mark.parametrize("most", [1024, 2])
@pytest.mark.parametrize("kind", IN_ORDER)
def test_shards_one_after_another_are_the_stream(kind, most, monkeypatch):
    monkeypatch.setattr(stream_shards, "MOST", most)
    stream = IN_ORDER[kind]()
    shards = shards_of(stream)
    assert len(shards) == min(stream.num_shards, most) > 1
    assert [row for shard in shards for row in shard] == list(stream)


@pytest.mark.parametrize("kind", NOT_IN_ORDER)
def test_a_stream_in_another_order_is_not_split(kind):
    stream = NOT_IN_ORDER[kind]()
    assert [each is stream for each in shards_of(stream)] == [True]


def test_a_shard_is_known_by_its_files(folder):
    def known(columns=("x",)) -> list[str | None]:
        return [digest_of_files(each) for each in shards_of(load_stream(str(folder)).select_columns(list(columns)))]

    before, path = known(), folder / "1.parquet"
    assert None not in before
    assert len(set(before)) == 3
    assert known() == before
    times, size = path.stat(), path.stat().st_size
    pq.write_table(pa.table({"x": [f"ROW {5 + each}" for each in range(5)]}), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size
    assert [one == other for one, other in zip(known(), before, strict=True)] == [True, False, True]
    assert digest_of_files(load_stream(str(folder)).map(lambda row: row)) is None


@pytest.mark.parametrize("kind", ["as it is", "mapped", "generated"])
def test_what_is_not_read_from_files_is_not_known(kind):
    assert {digest_of_files(each) for each in shards_of((IN_ORDER | NOT_IN_ORDER)[kind]())} == {None}


def test_jsonl_files_are_known_and_split_where_their_columns_have_types(tmp_path):
    for number in range(2):
        Dataset.from_list(ROWS).to_json(tmp_path / f"{number}.jsonl")
    files = {"train": [str(tmp_path / f"{number}.jsonl") for number in range(2)]}
    theirs = load_dataset("json", data_files=files, split="train", streaming=True)
    untyped = IterableDataset(theirs._ex_iterable)
    for stream, shards in ((load_stream(str(tmp_path)), 2), (theirs, 2 if theirs.features else 1), (untyped, 1)):
        known = {digest_of_files(each) for each in shards_of(stream)}
        assert len(known) == shards
        assert None not in known


def test_row_groups_of_a_file_are_other_shards_than_the_file(tmp_path):
    pq.write_table(pa.table({"x": [f"row {each}" for each in range(10)]}), tmp_path / "rows.parquet", row_group_size=5)
    stream = load_stream(str(tmp_path))
    if not hasattr(stream, "reshard") or stream.reshard().num_shards < 2:
        pytest.skip("this version of datasets does not divide a file by its row groups")
    groups = [digest_of_files(each) for each in shards_of(stream.reshard())]
    assert len({*groups, digest_of_files(stream)}) == 3


def test_a_file_on_the_hub_is_known_by_its_commit(tmp_path):
    pinned = f"hf://datasets/me/rows@{'0123abcd' * 5}/rows.parquet"
    assert stream_shards._state(pinned) == pinned
    assert stream_shards._state(f"gzip://rows::{pinned}") is not None
    for other in ("hf://datasets/me/rows@main/rows.parquet", "https://a.org/rows.parquet", str(tmp_path)):
        assert stream_shards._state(other) is None
