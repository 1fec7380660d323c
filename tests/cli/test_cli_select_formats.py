"""`resofilter select --format`: the kept rows as files for other trainers, never beside another selection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from helpers.tables import files_in, make_provenance, make_scores

from resofilter_trainer import Selection
from resofilter_trainer.cli.entry import main

ROWS = [{"q": f"{i}?", "a": f"00{i}", "id": f"r{i}"} for i in range(6)]
MAPPED = {"prompt_column": ["q"], "completion_column": "a", "separator": "\n", "conversational": False}
KEPT = [0, 1, 2]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder of scores that rise from row to row, of a file of rows."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    provenance = make_provenance(preparation=MAPPED, source={"dataset": str(source), "split": "train"})
    make_scores([float(i) for i in range(6)], provenance=provenance).save(tmp_path / "scores")
    return tmp_path / "scores"


def select(scores: Path, *options: str) -> Path:
    output = scores.parent / "kept"
    main(["select", str(scores), "--output", str(output), "--overwrite", *options])
    return output


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_format_has_the_kept_rows_with_their_positions(scores, capsys):
    kept = select(scores, "--format", "jsonl", "parquet", "sharegpt", "alpaca")
    exported = kept / "exported"
    named = ["alpaca.jsonl", "dataset_info.json", "rows.jsonl", "rows.parquet", "sharegpt.jsonl"]
    assert files_in(exported) == named
    printed = capsys.readouterr().out
    assert all(f"Exported: {exported / name}" in printed for name in named)
    assert lines(exported / "rows.jsonl") == [ROWS[i] | {"sample_id": i} for i in KEPT]
    assert [row["instruction"] for row in lines(exported / "alpaca.jsonl")] == ["0?", "1?", "2?"]
    first = lines(exported / "sharegpt.jsonl")[0]
    assert first["conversations"] == [{"from": "human", "value": "0?"}, {"from": "gpt", "value": "000"}]
    assert (first["id"], first["sample_id"]) == ("r0", 0)


def test_files_never_lie_beside_another_selection(scores):
    kept = select(scores, "--format", "jsonl")
    select(scores, "--drop", "smallest")
    assert files_in(kept) == ["dataset", "selection.parquet"]
    assert load_from_disk(kept / "dataset")["id"][:] == ["r3", "r4", "r5"]
    select(scores, "--format", "alpaca")
    assert files_in(kept / "exported") == ["alpaca.jsonl", "dataset_info.json"]
    make_scores([1.0, 2.0], provenance=make_provenance(rows=2, source={})).save(scores)  # of rows that nothing names
    select(scores)
    assert files_in(kept) == ["selection.parquet"]


def test_a_row_that_does_not_fit_leaves_everything_as_it_was(scores, capsys):
    kept = select(scores, "--format", "jsonl")
    source = scores.parent / "rows.jsonl"
    source.write_text(source.read_text().replace('"id": "r1"', '"instruction": "r1"').replace('"id"', '"instruction"'))
    with pytest.raises(SystemExit):
        select(scores, "--drop", "smallest", "--format", "alpaca")
    assert "column 'instruction' has the name of one of the format alpaca: rename it" in capsys.readouterr().err
    assert lines(kept / "exported" / "rows.jsonl") == [ROWS[i] | {"sample_id": i} for i in KEPT]
    assert np.flatnonzero(Selection.load(kept).keep).tolist() == KEPT


def test_an_unknown_format_and_scores_without_rows(scores, capsys):
    with pytest.raises(SystemExit):
        select(scores, "--format", "csv")
    assert "--format must be one of 'jsonl', 'parquet', 'sharegpt', 'alpaca', got 'csv'." in capsys.readouterr().err
    make_scores([1.0, 2.0], provenance=make_provenance(rows=2, source={})).save(scores)
    with pytest.raises(SystemExit):
        select(scores, "--format", "jsonl")
    assert "--format needs the rows, and the scores name no dataset: pass --dataset." in capsys.readouterr().err


def test_rows_that_older_versions_of_datasets_cannot_open_are_named(scores, capsys):
    select(scores)
    assert "dataset (datasets.load_from_disk)" in capsys.readouterr().out
    source = scores.parent / "rows.jsonl"
    source.write_text(
        "".join(json.dumps(row | {"meta": {"a": [i, str(i)][i % 2]}}) + "\n" for i, row in enumerate(ROWS))
    )
    select(scores)
    assert "in datasets 4.7 or later, as values of meta differ" in capsys.readouterr().out


def test_a_folder_of_someone_else_is_not_replaced(scores, capsys):
    (scores.parent / "kept" / "exported").mkdir(parents=True)
    (scores.parent / "kept" / "exported" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        select(scores, "--format", "jsonl")
    assert "exists and is no earlier selection's" in capsys.readouterr().err
    assert files_in(scores.parent / "kept" / "exported") == ["mine.txt"]
