"""`resofilter score --shard` and `join`: shards that were scored apart are selected from and reported as the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset, load_from_disk
from helpers.commands import ROWS, refused, write

from resofilter_trainer.cli.entry import main
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting import reasons
from resofilter_trainer.selecting.selection import Selection

ALONE = ["--tokens_per_batch", "1", "--precision", "float32"]  # rows of a batch differ in their last digits


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir) -> Path:
    """The rows; their scores at once, of three shards, and by length of two files."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "rows.jsonl", ROWS)
    write(folder / "first.jsonl", ROWS[:7])
    write(folder / "second.jsonl", ROWS[7:])

    def score(rows: str, output: str, *more: str) -> None:
        dataset = ["--dataset", str(folder / rows), "--output", str(folder / output)]
        main(["score", "--model", str(tiny_model_dir), *dataset, *more])

    score("rows.jsonl", "whole", *ALONE)
    for index in range(3):
        score("rows.jsonl", f"shard-{index}", *ALONE, "--shard", f"{index}/3")
    for name in ("first", "second"):
        score(f"{name}.jsonl", name, "--criterion", "length")
    return folder


def test_shards_are_joined_selected_from_and_reported_as_the_whole(place, tmp_path, capsys):
    output = tmp_path / "joined"
    shards = [str(place / f"shard-{index}") for index in (1, 2, 0)]
    main(["join", *shards, "--output", str(output), "--dataset", str(place / "rows.jsonl")])
    printed = capsys.readouterr().out
    assert "12 rows of 3 shards" in printed
    assert f"'{place / 'rows.jsonl'}', rows 4 to 7" in printed

    whole, joined = ScoreTable.load(place / "whole"), ScoreTable.load(output)
    for name in whole.table.column_names:
        assert joined.table[name].equals(whole.table[name]), name
    assert joined.provenance.source["content"] == whole.provenance.source["content"]
    for scores, kept in ((output, "kept"), (place / "whole", "of whole")):
        main(["select", str(scores), "--keep", "0.5", "--output", str(tmp_path / kept)])
    one, other = (Selection.load(tmp_path / kept) for kept in ("kept", "of whole"))
    assert (one.keep.tolist(), one.reason) == (other.keep.tolist(), other.reason)
    kept = [load_from_disk(tmp_path / each / "dataset") for each in ("kept", "of whole")]
    assert hash_rows(kept[0]) == hash_rows(kept[1])
    capsys.readouterr()
    main(["report", str(output), "--selection", str(tmp_path / "kept")])
    assert "no text" not in capsys.readouterr().out


def test_a_shard_alone_is_selected_from(place, tmp_path):
    main(["select", str(place / "shard-1"), "--output", str(tmp_path)])
    rows = load_from_disk(tmp_path / "dataset")
    assert {*rows["id"]} < {4, 5, 6, 7}
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert "--shard=1/3" in card


def test_files_are_joined_in_their_order(place, tmp_path, capsys):
    joined = tmp_path / "joined"
    main(["join", str(place / "first"), str(place / "second"), "--output", str(joined)])
    main(["select", str(joined), "--output", str(tmp_path / "kept")])  # reads the rows of both files
    selection, rows = Selection.load(tmp_path / "kept"), load_from_disk(tmp_path / "kept" / "dataset")
    assert rows["id"] == selection.sample_ids.tolist()
    card = (tmp_path / "kept" / "dataset" / "README.md").read_text()
    assert "resofilter join scores-0 scores-1 --output=scores" in card
    whole = load_dataset("json", data_files=str(place / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(selection.apply(whole)) == len(rows)

    main(["join", str(place / "second"), str(place / "first"), "--output", str(joined), "--overwrite"])
    capsys.readouterr()
    mixed = refused(capsys, "select", joined, "--dataset", place / "rows.jsonl", "--output", tmp_path / "other")
    assert "Rows 0 to 4" in mixed
    assert "were the scores joined in the order of the dataset?" in mixed


def test_a_large_table_is_selected_from_piece_by_piece(place, tmp_path, monkeypatch):
    main(["select", str(place / "whole"), "--output", str(tmp_path / "at once")])
    monkeypatch.setattr(reasons, "MANY", 3)
    monkeypatch.setattr(ScoreTable, "load", None)
    main(["select", str(place / "whole"), "--output", str(tmp_path / "pieces")])
    assert Selection.load(tmp_path / "pieces") == Selection.load(tmp_path / "at once")
    rows = [load_from_disk(tmp_path / each / "dataset") for each in ("pieces", "at once")]
    assert hash_rows(rows[0]) == hash_rows(rows[1])
    assert not [each for each in (tmp_path / "pieces").iterdir() if each.name.startswith(".selecting")]


def test_a_join_that_cannot_be_is_one_line(place, tmp_path, capsys):
    shards = [place / f"shard-{index}" for index in range(3)]
    assert "scores and --output are missing" in refused(capsys, "join")
    assert "Rows 4 to 7, of 12, are in no shard" in refused(capsys, "join", *shards[::2], "--output", tmp_path)
    assert "with --partial" in refused(capsys, "join", *shards[::2], "--output", tmp_path)
    twice = refused(capsys, "join", shards[0], *shards, "--output", tmp_path)
    assert f"Rows 0 to 3 are in '{shards[0]}' and in '{shards[0]}'" in twice
    main(["join", *map(str, shards[::2]), "--output", str(tmp_path), "--partial"])
    assert "Rows 4 to 7, of 12, are in no shard." in capsys.readouterr().out
    assert "are in no shard: join their scores" in refused(capsys, "select", tmp_path, "--output", tmp_path / "kept")
    assert "pass --overwrite" in refused(capsys, "join", *shards, "--output", tmp_path)
    assert "are for shards" in refused(capsys, "select", *shards, "--output", tmp_path / "kept")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shard", "3/3"], "--shard must be the number of a shard, from 0, and that of all: 3/64, got '3/3'"),
        (["--shard", "x"], "--shard must be the number of a shard"),
        (["--shard", "0/20"], "The dataset has 12 rows, and cannot be divided into 20 shards"),
        (["--shard", "0/3", "--criterion", "k_center"], "By k_center, a row's score depends on all rows"),
        (["--shard", "0/3", "--streaming"], "leave it or --streaming out"),
        (["--shard", "0/3", "--warmup", "4"], "pass the same --warmup_dataset and --warmup_cache"),
    ],
)
def test_a_shard_that_cannot_be_scored_is_named(options, named, place, tmp_path, capsys, tiny_model_dir):
    dataset = ["--dataset", place / "rows.jsonl", "--output", tmp_path]
    assert named in refused(capsys, "score", "--model", tiny_model_dir, *dataset, *options)


def test_scores_that_depend_on_all_rows_are_not_joined(place, tmp_path, capsys, tiny_model_dir):
    for name in ("first", "second"):
        dataset = ["--dataset", str(place / f"{name}.jsonl"), "--output", str(tmp_path / name)]
        main(["score", "--model", str(tiny_model_dir), *dataset, "--criterion", "rarity"])
    capsys.readouterr()
    message = refused(capsys, "join", tmp_path / "first", tmp_path / "second", "--output", tmp_path)
    assert message.startswith("By rarity, the score of a row depends on all rows of the dataset")
