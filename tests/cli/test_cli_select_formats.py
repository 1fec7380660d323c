"""`resofilter select --format`: the kept rows as files for other trainers, never beside another selection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from helpers.tables import files_in, make_provenance, make_scores

from resofilter_trainer import Selection, load_rows
from resofilter_trainer.cli.entry import main
from resofilter_trainer.cli.select import FORMATS
from resofilter_trainer.data.exporting import FILES
from resofilter_trainer.io.digest import hash_rows

ROWS = [{"q": f"{i}?", "a": f"00{i}", "id": f"r{i}"} for i in range(6)]
MAPPED = {"prompt_column": ["q"], "completion_column": "a", "separator": "\n", "conversational": False}
KEPT = [0, 1, 2]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder of scores that rise from row to row, of a file of rows."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return save_scores(tmp_path / "scores", {"dataset": str(source), "split": "train"})


@pytest.fixture
def known(scores: Path) -> Path:
    """The same scores, with a digest of the rows, as `resofilter score` writes it."""
    source = str(scores.parent / "rows.jsonl")
    return save_scores(scores, {"dataset": source, "split": "train", "content": hash_rows(load_rows(source))})


def save_scores(folder: Path, source: dict[str, str]) -> Path:
    provenance = make_provenance(preparation=MAPPED, source=source)
    make_scores([float(i) for i in range(6)], provenance=provenance).save(folder)
    return folder


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


def test_the_same_selection_again_loses_no_file(known):
    kept = select(known, "--format", "jsonl")
    (kept / "report").mkdir()
    (kept / "report" / "dropped.parquet").write_text("of these rows")
    (kept / "report.html").write_text("a page")
    main(["select", str(known), "--output", str(kept)])
    assert files_in(kept) == ["dataset", "exported", "report", "report.html", "selection.parquet"]
    main(["select", str(known), "--output", str(kept), "--format", "alpaca"])
    assert files_in(kept / "exported") == ["alpaca.jsonl", "dataset_info.json", "rows.jsonl"]
    assert lines(kept / "exported" / "rows.jsonl") == [ROWS[i] | {"sample_id": i} for i in KEPT]
    assert load_from_disk(kept / "dataset")["id"][:] == ["r0", "r1", "r2"]


def test_another_selection_takes_the_report_of_the_earlier_one_away(known):
    kept = select(known)
    main(["report", str(known), "--selection", str(kept)])
    assert "report.html" in files_in(kept)
    select(known, "--drop", "smallest")
    assert files_in(kept) == ["dataset", "selection.parquet"]


def test_a_report_folder_that_is_not_ours_stays(known):
    kept = select(known)
    (kept / "report").mkdir()
    (kept / "report" / "mine.txt").write_text("mine")
    (kept / "report.html").write_text("mine")
    select(known, "--drop", "smallest")
    assert files_in(kept) == ["dataset", "report", "report.html", "selection.parquet"]


def test_after_an_error_the_earlier_files_are_back(known, monkeypatch):
    kept = select(known, "--format", "jsonl")
    main(["report", str(known), "--selection", str(kept)])
    before = files_in(kept)

    def full(*args: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Selection, "save", full)
    with pytest.raises(OSError, match="the disk is full"):
        select(known, "--drop", "smallest")
    assert files_in(kept) == before


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
    with pytest.raises(SystemExit):  # before anything is read
        main(["select", "/nowhere", "--output", str(scores.parent / "kept"), "--format", "csv"])
    assert "got 'csv'" in capsys.readouterr().err
    assert tuple(FILES) == FORMATS
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
