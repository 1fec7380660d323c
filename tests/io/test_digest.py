"""The digest of rows is that of their values and order, however they are stored; version 0.1.0's is still accepted."""

from __future__ import annotations

import datetime
import itertools

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Json, Value, concatenate_datasets
from helpers.versions import older_than

from resofilter_trainer.io import digest as digests
from resofilter_trainer.io.digest import (
    FIRST,
    RowsDigest,
    block_digests,
    digest_of_blocks,
    first_other_shard,
    hash_rows,
    of_shards,
    same_rows,
    shards_in,
)

ROWS = [
    {
        "text": None if i % 5 == 0 else f"row {i} é",
        "number": i if i % 3 else None,
        "decimal": i / 3,
        "flag": bool(i % 2),
        "messages": None if i == 7 else [{"role": "user", "content": "x" * j if j else None} for j in range(i % 4)],
        "tokens": list(range(i % 6)),
        "meta": {"source": "a" if i % 2 else None, "nested": {"n": i}},
        "when": datetime.datetime(2024, 1, 1 + i % 20),
    }
    for i in range(40)
]
DATASET = Dataset.from_list(ROWS)


def test_pieces_slices_and_indices_make_no_difference():
    digest = hash_rows(DATASET)
    assert digest.startswith("blocks:")
    moved = concatenate_datasets([DATASET.select([39, 1]), DATASET, DATASET.select([3])])
    order = np.random.default_rng(0).permutation(40)
    for same in (
        concatenate_datasets([DATASET.select(range(11)), DATASET.select(range(11, 40))]),
        moved.select(range(2, 42)),
        DATASET.select(order).select(np.argsort(order)),
        DATASET.select_columns(sorted(DATASET.column_names)),
        Dataset(pa.Table.from_batches(DATASET.data.table.to_batches(max_chunksize=3))),
        DATASET.with_format("numpy"),
        DATASET.with_transform(lambda batch: {"nothing": batch["text"]}),
    ):
        assert hash_rows(same) == digest
    shuffled = DATASET.shuffle(seed=3)
    assert hash_rows(shuffled) == hash_rows(Dataset.from_list(shuffled.to_list(), features=DATASET.features)) != digest


@pytest.mark.parametrize("size", [1, 7, 40])
def test_rows_that_come_in_pieces_have_the_digest_of_the_whole(size):
    digest = RowsDigest()
    for start in range(0, 40, size):  # inferred types of a piece: of nulls only, of fields that others lack
        piece = ROWS[start : start + size]
        names = [name for name in ROWS[0] if any(row[name] is not None for row in piece)]
        digest.add(Dataset.from_dict({name: [row[name] for row in piece] for name in names}))
    assert digest.hexdigest() == hash_rows(DATASET)


def test_blocks_together_have_the_digest_of_the_whole(monkeypatch):
    few = hash_rows(DATASET)
    monkeypatch.setattr(digests, "BLOCK", 7)
    parts = [block_digests(DATASET.select(range(start, min(start + 14, 40)))) for start in range(0, 40, 14)]
    assert [len(each) for each in parts] == [2, 2, 2]
    whole = digest_of_blocks([block for each in parts for block in each], 40)
    assert whole == hash_rows(DATASET) != few
    pieces = RowsDigest()
    for start in range(0, 40, 3):
        pieces.add(DATASET.select(range(start, min(start + 3, 40))))
    assert pieces.hexdigest() == whole == hash_rows(DATASET.shuffle(seed=1).select(np.argsort(np.array(order()))))


def order() -> list[int]:
    numbered = DATASET.add_column("row", list(range(40)))
    return list(numbered.shuffle(seed=1)["row"])


def one(values, kind=None) -> str:
    return hash_rows(Dataset(pa.table({"x": pa.array(values, kind)})))


FIXED = [] if older_than("datasets", "5.0") else [pa.binary(2)]  # which datasets 4 refuses


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ([1, None, 3], [pa.int8(), pa.int64(), pa.uint16(), pa.uint64()]),
        ([0.5, None], [pa.float16(), pa.float32(), pa.float64()]),
        (["a", None, ""], [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]),
        ([b"ab", None], [pa.binary(), pa.large_binary(), *FIXED, pa.binary_view()]),
        ([[1, 2], None], [pa.list_(pa.int8()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)]),
        ([None, None], [pa.null(), pa.string(), pa.list_(pa.string())]),
    ],
)
def test_the_width_of_a_type_makes_no_difference(values, kinds):
    assert len({one(values, kind) for kind in kinds}) == 1


def test_other_values_have_other_digests():
    values = [
        *([], [None], [None, None], [0], [0.0], [-0.0], [False], ["0"], [b"0"], [""], [-1], [0, None], [None, 0]),
        *([[]], [[None]], [[""]], [{"a": 0}], [{"b": 0}], ["a", "b"], ["ab", ""], ["", "ab"], ["ab"], ["b", "a"]),
        *([["a"], ["b"]], [["a", "b"], []], [["a", "b"]]),
    ]
    kinds = [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("s", "UTC"), pa.date32(), pa.duration("s")]
    different = [*map(one, values), *(one([0], kind) for kind in kinds), one([2**64 - 1], pa.uint64())]
    different.append(hash_rows(Dataset.from_dict({"y": [0]})))
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("column", list(ROWS[0]))
def test_every_value_counts(column):
    found = {hash_rows(DATASET)}
    for row in range(40):
        changed = [dict(each) for each in ROWS]
        changed[row][column] = None if ROWS[row][column] is not None else ROWS[1][column]
        found.add(hash_rows(Dataset.from_list(changed, features=DATASET.features)))
    assert len(found) == 41


def test_images_are_their_bytes():
    def images(color: int) -> Dataset:
        made = [PIL.Image.new("RGB", (2, 2), (i, color, 0)) for i in range(3)]
        return Dataset.from_dict({"image": made}, features=Features({"image": Image()}))

    assert hash_rows(images(0)) == hash_rows(images(0)) != hash_rows(images(1))


def test_json_is_its_values():
    features = Features({"x": Json()})
    one, other, changed = (
        Dataset(pa.table({"x": pa.array([text], pa.json_())}).cast(features.arrow_schema), info=None)
        for text in ('{"a": 1, "b": "é/"}', '{"b":"\\u00e9\\/","a":1}', '{"a": 2, "b": "é/"}')
    )
    assert hash_rows(one) == hash_rows(other) != hash_rows(changed)


def test_a_digest_of_the_first_version_is_computed_as_then():
    dataset = Dataset.from_dict({"a": ["x", None, "é"], "b": [1, 2, 3]})
    assert hash_rows(dataset, FIRST) == "42cd9e7e6f548cf70c6379005b4280f8"
    assert same_rows("42cd9e7e6f548cf70c6379005b4280f8", dataset)
    assert not same_rows(hash_rows(dataset, FIRST), dataset.select([1, 0, 2]))
    assert same_rows("arrow:ebb6371a157090326cf530bf6ecc34eb", dataset)  # of all rows in one
    assert not same_rows("arrow:ebb6371a157090326cf530bf6ecc34eb", dataset.select([1, 0, 2]))
    assert same_rows(hash_rows(dataset), dataset)
    assert not same_rows(hash_rows(dataset), dataset.cast_column("b", Value("float64")))


# ---- shards that were digested apart


ENDS = (0, 1, 5, len(DATASET))
SHARD_DIGEST = of_shards(
    (end - start, hash_rows(DATASET.select(range(start, end)))) for start, end in itertools.pairwise(ENDS)
)


def test_the_digest_of_shards_is_that_of_the_whole_dataset_cut_there():
    assert same_rows(SHARD_DIGEST, DATASET)
    assert same_rows(SHARD_DIGEST, DATASET.select(list(range(len(DATASET)))))
    stream = RowsDigest(like=SHARD_DIGEST)
    for start in range(0, len(DATASET), 2):
        stream.add(DATASET.select(range(start, min(start + 2, len(DATASET)))))
    assert stream.hexdigest() == SHARD_DIGEST
    assert [rows for rows, _ in shards_in(SHARD_DIGEST)] == np.diff(ENDS).tolist()
    assert shards_in(hash_rows(DATASET)) == []


def test_the_first_shard_that_differs_is_found():
    rows = list(range(len(DATASET)))
    swapped = [*rows[:2], rows[3], rows[2], *rows[4:]]
    for changed, first in ((swapped, range(1, 5)), (rows[:-1], range(5, len(rows))), ([*rows, 0], None)):
        found = hash_rows(DATASET.select(changed), like=SHARD_DIGEST)
        assert found != SHARD_DIGEST
        assert first_other_shard(SHARD_DIGEST, found) == (first or range(len(rows), len(rows) + 1))
    assert first_other_shard(SHARD_DIGEST, SHARD_DIGEST) is None
    assert first_other_shard(hash_rows(DATASET), hash_rows(DATASET.select([0]))) is None


def test_shards_of_shards_are_shards_of_the_whole():
    one, two, three = ((rows, f"blocks:{rows}") for rows in (1, 2, 3))
    assert of_shards([(3, of_shards([one, two])), three]) == of_shards([one, two, three])


@pytest.mark.parametrize("text", ["shards:", "shards:x=arrow:1", "shards:0=arrow:1", "shards:2=1"])
def test_what_is_no_digest_of_shards_is_that_of_no_rows(text):
    assert shards_in(text) == []
    assert not same_rows(text, DATASET)
