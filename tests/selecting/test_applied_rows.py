"""A selection is applied to the rows that were scored, or refuses in one line."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import warnings

import numpy as np
import PIL.Image
import pytest
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_from_disk,
)
from helpers.applied import DATASET_ROWS, reread, scores_of, select
from helpers.tables import make_scores
from torch.utils.data import DataLoader

from resofilter_trainer import (
    ColumnMapping,
    InputError,
    Selection,
    map_columns,
)
from resofilter_trainer.io.digest import FIRST, columns_of, hash_rows

# ---- the rows that were scored


def test_the_scored_rows_are_accepted_however_they_are_stored(tmp_path):
    selection = select()
    DATASET_ROWS.save_to_disk(tmp_path / "saved")
    kept = [DATASET_ROWS[int(row)] for row in selection.sample_ids]
    for same in (
        DATASET_ROWS,
        load_from_disk(tmp_path / "saved"),
        DATASET_ROWS.with_format("numpy"),
        DATASET_ROWS.with_transform(lambda batch: batch),
        DATASET_ROWS.select(range(12)),
        Dataset.from_list(DATASET_ROWS.to_list()),
    ):
        assert selection.apply(same).with_format(None).to_list() == kept
    selection.save(tmp_path)
    assert Selection.load(tmp_path).apply(DATASET_ROWS).to_list() == kept


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.shuffle(seed=1),
        lambda rows: rows.select(range(11, -1, -1)),
        lambda rows: rows.select([*range(1, 12), 0]),
        lambda rows: rows.map(lambda row: {"answer": row["answer"] + " "}),
        lambda rows: rows.select_columns(["question"]),
        lambda rows: rows.add_column("n", list(range(12))),
        lambda rows: map_columns(rows, ColumnMapping(prompt_column="question", completion_column="answer")),
    ],
)
def test_other_rows_are_refused_unless_the_user_says_that_they_are_the_same(change, tmp_path):
    selection, other = select(), change(DATASET_ROWS)
    scores = scores_of(DATASET_ROWS)
    for apply in (
        selection.apply,
        lambda rows: selection.annotate(rows, scores),
        lambda rows: selection.push_to_hub(rows, "me/rows"),
    ):
        with pytest.raises(InputError, match=r"not what was scored.* order of its rows.*check_rows=False") as refused:
            apply(other)
        assert "\n" not in str(refused.value)
    assert selection.apply(other, check_rows=False).to_list() == other.select(selection.sample_ids).to_list()
    annotated = selection.annotate(other, scores, check_rows=False)
    assert annotated["resofilter_score"][:] == [float(scores.column("score")[row]) for row in selection.sample_ids]
    with pytest.raises(InputError, match="made for 12 rows"):
        selection.apply(other.select(range(11)), check_rows=False)


def test_a_digest_of_the_first_version_is_compared_too():
    selection = select(content=hash_rows(DATASET_ROWS, FIRST))
    assert len(selection.apply(DATASET_ROWS)) == 6
    with pytest.raises(InputError, match="not what was scored"):
        selection.apply(DATASET_ROWS.shuffle(seed=1))


@pytest.mark.parametrize("provenance", ["", "{}", "[]"])
def test_without_a_digest_only_the_number_of_rows_is_known(provenance):
    assert len(select(content=None).apply(DATASET_ROWS.shuffle(seed=1))) == 6
    by_hand = Selection(np.ones(12, bool), ["kept"] * 12, {}, provenance)
    assert len(by_hand.apply(DATASET_ROWS.shuffle(seed=1))) == 12


# ---- streams and other kinds


def images() -> Dataset:
    """JPEGs, which do not survive being decoded and encoded again."""
    stored = []
    for i in range(12):
        file = io.BytesIO()
        PIL.Image.new("RGB", (9, 9), (20 * i, 7, 5 * i)).save(file, "JPEG")
        stored.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(), "id": Value("int32")})
    return Dataset.from_dict({"image": stored, "id": range(12)}, features=features)


@pytest.mark.parametrize("make", [lambda: DATASET_ROWS, images])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_is_the_rows_that_were_scored(make, shards):
    dataset = make()
    selection, stream = select(dataset), dataset.to_iterable_dataset(num_shards=shards)
    expected = list(dataset.select(selection.sample_ids))
    for same in (stream, stream.with_format("numpy"), stream.take(12)):
        found = list(selection.apply(same))
        assert len(found) == 6
        for row, truth in zip(found, expected, strict=True):
            for name, value in truth.items():
                assert np.array_equal(np.asarray(row[name]), np.asarray(value)), name
    name = dataset.column_names[-1]
    assert [row[name] for row in selection.apply(stream)] == dataset.select(selection.sample_ids)[name][:]
    for other, said in (
        (dataset.select([1, 0, *range(2, 12)]).to_iterable_dataset(num_shards=shards), "not what was scored"),
        (stream.shuffle(seed=1), "not what was scored"),
        (stream.remove_columns(dataset.column_names[0]), "not what was scored"),
        (stream.take(11), "made for 12 rows and the stream has 11"),
        (concatenate_datasets([stream, stream]), "made for 12 rows and the stream has more"),
    ):
        with pytest.raises(InputError, match=said):
            selection.apply(other)
    assert len(list(selection.apply(dataset.select(range(11, -1, -1)).to_iterable_dataset(), check_rows=False))) == 6


def test_a_stream_that_is_shuffled_later_keeps_the_same_rows():
    selection = select()
    stream = selection.apply(DATASET_ROWS.to_iterable_dataset(num_shards=6)).shuffle(seed=3, buffer_size=4)
    questions = [row["question"] for row in stream]
    assert sorted(questions) == sorted(selection.apply(DATASET_ROWS)["question"])
    assert questions != selection.apply(DATASET_ROWS)["question"][:]


@pytest.mark.slow
def test_a_stream_of_several_shards_is_read_by_one_process():
    kept = select().apply(DATASET_ROWS.to_iterable_dataset(num_shards=2))
    with pytest.raises(InputError, match="pass dataloader_num_workers=0"):
        list(DataLoader(kept, batch_size=None, num_workers=2))
    assert len(list(DataLoader(kept, batch_size=None, num_workers=1))) == 6


@pytest.mark.parametrize(
    ("rows", "comparable"),
    [
        ([{"a": f"{i}", "n": i, "x": i / 2, "m": [{"role": "user", "content": "x" * i}]} for i in range(12)], True),
        ([{"a": None if i < 5 else "x", **({"b": i} if i % 2 else {})} for i in range(12)], True),
        ([{"a": i if i % 2 else str(i)} for i in range(12)], False),
        ([{"m": [{"role": "user", **({"content": "x"} if i % 2 else {"tools": [i]})}]} for i in range(12)], False),
    ],
)
def test_a_stream_without_types_is_compared_or_says_that_it_cannot_be(rows, comparable):
    dataset = Dataset.from_dict(next(columns_of(rows, 12)), on_mixed_types="use_json")  # as a stream is scored
    selection, stream = select(dataset), IterableDataset.from_generator(lambda: iter(rows))
    if comparable:
        assert len(list(selection.apply(stream))) == 6
    else:
        with pytest.raises(InputError, match=r"does not know the types.*check_rows=False"):
            selection.apply(stream)
        assert len(list(selection.apply(stream, check_rows=False))) == 6


def test_a_stream_is_compared_with_a_digest_of_the_first_version():
    selection = select(content=hash_rows(DATASET_ROWS, FIRST))
    assert len(list(selection.apply(DATASET_ROWS.to_iterable_dataset()))) == 6
    with pytest.raises(InputError, match="not what was scored"):
        selection.apply(DATASET_ROWS.select(range(11, -1, -1)).to_iterable_dataset())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            DatasetDict({"train": DATASET_ROWS, "test": DATASET_ROWS}),
            r"a DatasetDict: pass dataset\['train'\]",
        ),
        (IterableDatasetDict({"test": DATASET_ROWS.to_iterable_dataset()}), r"pass dataset\['test'\]"),
        (DATASET_ROWS.to_list(), "this is a list"),
        (iter(DATASET_ROWS), "this is a generator"),
        (DATASET_ROWS.to_pandas(), "this is a DataFrame"),
        (None, "this is a NoneType"),
    ],
)
def test_what_is_no_dataset_is_refused(other, said):
    with pytest.raises(InputError, match=said):
        select().apply(other)


EVERY_KIND = Dataset.from_dict(
    {"text": [f"t{i // 2}" for i in range(12)], "n": [i // 2 for i in range(12)], "none": [None] * 12}
)


@pytest.mark.parametrize(
    "same",
    [
        lambda rows: rows.cast_column("n", Value("int32")),
        lambda rows: rows.cast_column("text", Value("large_string")),
        lambda rows: rows.with_format("torch"),
        lambda rows: rows.remove_columns("none"),  # a column without a value
        lambda rows: rows.shuffle(seed=1).select(np.argsort(rows.add_column("i", range(12)).shuffle(seed=1)["i"][:])),
        lambda rows: concatenate_datasets([rows.select(range(5)), rows.select(range(5, 12))]),
        lambda rows: Dataset.from_generator(lambda: iter(rows.to_list()), cache_dir=tempfile.mkdtemp()),
        lambda rows: rows.select([1, 0, *range(2, 12)]),  # rows 0 and 1 are equal
        lambda rows: rows.repeat(2).select(range(12, 24)),
        reread,
    ],
)
def test_the_same_rows_are_accepted(same):
    selection = select(EVERY_KIND)
    expected = EVERY_KIND.select(selection.sample_ids)
    for name in ("text", "n"):
        assert list(selection.apply(same(EVERY_KIND)).with_format(None)[name]) == expected[name][:]


@pytest.mark.parametrize(
    "other",
    [
        lambda rows: rows.rename_column("n", "m"),
        lambda rows: rows.cast_column("n", Value("float64")),
        lambda rows: rows.cast_column("n", Value("string")),
        lambda rows: rows.add_column("id", range(12)),
        lambda rows: rows.select([*range(11), 0]),
        lambda rows: interleave_datasets([rows.select(range(6)), rows.select(range(6, 12))]),
        lambda rows: rows.sort("text", reverse=True),
    ],
)
def test_other_rows_are_not_accepted(other):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # pyarrow's, of `sort`
        changed = other(EVERY_KIND)
    with pytest.raises(InputError, match="not what was scored"):
        select(EVERY_KIND).apply(changed)


def test_no_rows():
    empty = DATASET_ROWS.select([])
    provenance = dataclasses.replace(make_scores([1.0]).provenance, source={"content": hash_rows(empty)}, rows=0)
    none = Selection(np.zeros(0, bool), [], {}, provenance.to_json())
    assert len(none.apply(empty)) == 0
    with pytest.raises(InputError, match="made for 0 rows"):
        none.apply(DATASET_ROWS)
    nothing_kept = Selection(np.zeros(12, bool), ["x"] * 12, {}, "", np.zeros(12))
    assert nothing_kept.apply(DATASET_ROWS).to_list() == []
