"""Scores of shards become those of the whole: the same bits, each row in its place, and what does not fit is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.shards import ROWS, files, scores_of, shard
from helpers.tables import files_in, make_scores

from resofilter_trainer import DataSelector, InputError, ScoreTable, Trust, join_scores
from resofilter_trainer.io import pieces
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.scores.joining import with_votes_of_all
from resofilter_trainer.scores.score_table import SCORES_FILE

NUMBERS = ("score", "loss", "layer_2", "num_tokens", "entropy")
Join = Callable[..., ScoreTable]


@pytest.fixture(params=["in memory", "from files"])
def join(request, tmp_path, monkeypatch) -> Join:
    """Both ways to join; from files, two rows at a time."""
    if request.param == "in memory":
        return ScoreTable.concatenate
    monkeypatch.setattr(pieces, "ROWS", 2)

    def from_files(tables: list[ScoreTable], **options: Any) -> ScoreTable:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        paths = [each.save(folder / f"{number}") for number, each in enumerate(tables)]
        return ScoreTable.load(join_scores(paths, folder / "joined", **options))

    return from_files


def same_bits(one: ScoreTable, other: ScoreTable, names: tuple[str, ...] = NUMBERS) -> bool:
    return all(one.table[name].is_null().equals(other.table[name].is_null()) for name in names) and all(
        one.column(name).tobytes() == other.column(name).tobytes() for name in names
    )


# ---- joined


@pytest.mark.parametrize("shards", [files(), [shard(index, 4) for index in (2, 0, 3, 1)]], ids=["files", "shards"])
def test_a_joined_table_is_that_of_one_pass(shards, join):
    whole, joined = scores_of(), join(shards)

    assert same_bits(joined, whole)
    assert joined["sample_id"].tolist() == list(range(len(ROWS)))
    assert joined.table.schema.field("entropy").metadata == {b"direction": b"smallest"}
    firsts = {each.first for each in joined.shards}
    own = max(first for first in firsts if first <= 9)
    assert joined.reasons[9] == f"same prompt as row {own}"  # of its shard, in which it is row 0
    for settings in ({}, {"by": "entropy"}, {"threshold": "iqr"}, {"keep": 0.25, "drop": "both"}):
        assert np.array_equal(DataSelector(**settings).select(joined).keep, DataSelector(**settings).select(whole).keep)
    trust = joined.provenance.trust
    assert trust == Trust(
        min(each.provenance.trust.agreement for each in shards), 24, whole.provenance.trust.saturation
    )
    assert "11 rows, 9 scored" in joined.summary()


def test_files_and_memory_give_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 2)
    paths = [each.save(tmp_path / f"{number}") for number, each in enumerate(files())]
    path = join_scores(paths, tmp_path / "joined")
    assert files_in(path.parent) == [SCORES_FILE]
    assert ScoreTable.load(path) == ScoreTable.concatenate(files())
    monkeypatch.undo()
    again = ScoreTable.load(path).save(tmp_path / "again")
    assert ScoreTable.load(again) == ScoreTable.load(path)


def test_joined_tables_are_joined_again(join):
    assert join([join(files()[:2]), join(files()[2:])]) == join(files()) == join([join(files())])
    one, two, three, four = (shard(index, 4) for index in range(4))
    apart = join([three, one], partial=True)
    assert len(apart) == len(one) + len(three)
    assert join([two, apart, four]) == join([one, two, three, four])
    assert join([apart], partial=True) == apart


def test_votes_of_layers_are_made_from_all_rows(join):
    def voting(table: ScoreTable) -> ScoreTable:
        with_column = table.table.add_column(1, "layer_vote", pa.nulls(len(table), pa.float64()))
        return ScoreTable(with_votes_of_all(with_column), table.provenance)

    joined = join([voting(each) for each in files()])
    expected = with_votes_of_all(joined.table)["layer_vote"]
    assert joined.table["layer_vote"].equals(expected)
    assert expected.null_count == 2
    assert not np.allclose(np.nan_to_num(joined.column("layer_vote")[:3]), voting(files()[0]).column("layer_vote"))


def test_a_shard_is_selected_from_by_itself_too():
    for index in range(4):
        own = ROWS.shard(4, index, contiguous=True)
        kept = DataSelector(keep=0.5).select(shard(index, 4)).apply(own)
        assert 0 < len(kept) <= len(own)
        with pytest.raises(InputError, match="was made for"):
            DataSelector(keep=0.5).select(shard(index, 4)).apply(ROWS)


# ---- the rows of the whole


@pytest.mark.parametrize("as_stream", [False, True])
def test_the_selection_applies_to_the_whole_dataset_alone(as_stream):
    selection = DataSelector(keep=0.5).select(ScoreTable.concatenate(files()))
    dataset = ROWS.to_iterable_dataset() if as_stream else ROWS
    assert [row["prompt"] for row in selection.apply(dataset)] == [
        ROWS[int(row)]["prompt"] for row in selection.sample_ids
    ]

    swapped = ROWS.select([0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 10])
    with pytest.raises(InputError, match="is not what was scored") as refused:
        selection.apply(swapped.to_iterable_dataset() if as_stream else swapped)
    assert "Rows 5 to 8 ('rows-5.jsonl') are the first that differ" in str(refused.value)


def test_with_the_whole_dataset_the_table_has_its_digest(join):
    joined = join(files(), dataset=ROWS)
    assert joined.provenance.source["content"] == hash_rows(ROWS)
    assert same_bits(joined, join(files()))
    assert len(DataSelector(keep=0.5).select(joined).apply(ROWS)) == 5
    with pytest.raises(InputError, match=r"Rows 0 to 2 \('rows-0.jsonl'\) are the first that differ"):
        join(files(), dataset=ROWS.select([*range(1, 11), 0]))
    with pytest.raises(InputError, match="The shards have 11 rows and the dataset has 10"):
        join(files(), dataset=ROWS.select(range(10)))
    assert join([join(files()[:2], dataset=ROWS.select(range(5))), *files()[2:]]) == join(files())


# ---- what does not fit


def changed(table: ScoreTable, **changes: Any) -> ScoreTable:
    return ScoreTable(table.table, dataclasses.replace(table.provenance, **changes))


def without(table: ScoreTable, *columns: str) -> ScoreTable:
    return ScoreTable(table.table.drop_columns(list(columns)), table.provenance)


FIRST, *REST = files()
REFUSED: dict[str, tuple[list[ScoreTable], str]] = {
    "nothing": ([], "pass at least one"),
    "missing": ([shard(0, 4), shard(3, 4)], "Rows 3 to 8, of 11, are in no shard"),
    "twice": ([FIRST, *REST, REST[0]], r"of the same rows \('rows-3.jsonl', rows 0 to 1\): leave one out"),
    "overlap": ([shard(0, 2), shard(1, 3), shard(2, 3)], "Rows 4 to 5 are in .* and in .*: leave one out"),
    "a shard twice": ([shard(0, 2), shard(0, 2), shard(1, 2)], "Rows 0 to 5 are in"),
    "another whole": (
        [shard(0, 2), changed(shard(1, 2), source={"shard": {"index": 1, "count": 2, "first": 6, "of": 12}, "content":
                                                            shard(1, 2).provenance.source["content"]})],
        "is of a dataset with 11 rows, and .* of one with 12",
    ),
    "both kinds": ([shard(0, 2), REST[0]], "join the shards of each dataset first"),
    "model": ([FIRST, changed(REST[0], weights="f" * 16, model="m")], r"model weights \(tiny 01234567 / m ffff"),
    "settings": ([FIRST, changed(REST[0], preparation={"max_length": 32})], r"max_length \(64 / 32\).*them alike"),
    "forward": ([FIRST, changed(REST[0], trust=Trust(1.0, 6, None, "bfloat16"))], r"forward \(float32 / bfloat16\)"),
    "warm-up": ([FIRST, changed(REST[0], warmup={"weights": "a" * 16})], r"warmup weights \(none / aaaaaaaa\).*once"),
    "columns": ([FIRST, without(REST[0], "entropy")], "not both have the columns entropy"),
    "no digest": ([FIRST, changed(REST[0], source={})], "without the digest of their rows"),
    "0.1.0": ([FIRST, changed(REST[0], source={"content": "0" * 32})], "of version 0.1.0"),
    "not all rows": ([FIRST, changed(REST[0], rows=7)], "has 2 lines for 7 rows"),
    "place unknown": ([changed(FIRST, source={**FIRST.provenance.source, "shard": 3})] * 2, "do not say which rows"),
    "all rows": (
        [changed(each, config={"criterion": "k_center", "of_all_rows": True}) for each in files()],
        "By k_center, the score of a row depends on all rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_in_one_line(case):
    tables, named = REFUSED[case]
    with pytest.raises(InputError, match=named) as refused:
        ScoreTable.concatenate(tables)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_joined_are_named(tmp_path):
    paths = [each.save(tmp_path / f"{number}") for number, each in enumerate([shard(0, 2), shard(1, 2)])]
    with pytest.raises(InputError, match=f"Rows 0 to 5 are in '{paths[0]}' and in '{paths[0]}'"):
        join_scores([paths[0], *paths], tmp_path / "joined")
    with pytest.raises(InputError, match="is one of the scores to join"):
        join_scores(paths, paths[0])
    with pytest.raises(InputError, match="pass a list"):
        join_scores(paths[0], tmp_path / "joined")
    with pytest.raises(InputError, match="No scores at"):
        join_scores([*paths, tmp_path / "none"], tmp_path / "joined")
    damaged = bytearray(paths[1].read_bytes())
    damaged[100] ^= 1
    paths[1].write_bytes(damaged)
    with pytest.raises(InputError, match="cannot be read"):
        join_scores(paths, tmp_path / "joined")
    assert not (tmp_path / "joined" / SCORES_FILE).exists()


def test_scores_that_are_there_are_not_replaced_unasked(tmp_path):
    paths = [each.save(tmp_path / f"{number}") for number, each in enumerate(files())]
    there = make_scores([1.0]).save(tmp_path / "joined")
    with pytest.raises(InputError, match="holds scores already"):
        join_scores(paths, there)
    join_scores(paths, there, overwrite=True)
    assert len(ScoreTable.load(there)) == len(ROWS)


def test_missing_rows_are_named_where_a_whole_is_needed():
    part = ScoreTable.concatenate([shard(0, 4), shard(2, 4)], partial=True)
    with pytest.raises(InputError, match="Rows 3 to 5, 9 to 10, of 11, are in no shard"):
        DataSelector().select(part)


def test_the_shards_are_listed():
    joined = ScoreTable.concatenate(files())
    assert [str(each) for each in joined.shards][:2] == ["'rows-0.jsonl', rows 0 to 2", "'rows-3.jsonl', rows 3 to 4"]
    assert [each.content for each in joined.shards] == [each.provenance.source["content"] for each in files()]
    assert [(each.first, each.end) for each in shard(1, 4).shards] == [(3, 6)]
    assert ScoreTable.concatenate([shard(index, 4) for index in range(4)]).provenance.source["dataset"] == "rows.jsonl"
    assert "dataset" not in joined.provenance.source
