"""`resofilter inspect` of scores and of a selection: why a row went, and where its score lies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.commands import refused, write
from helpers.tables import WHY, make_provenance, make_scores

from resofilter_trainer import DataSelector, ScoreTable, Selection, load_rows
from resofilter_trainer.cli.entry import main
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.selecting.results import NAME, selection_file

ROWS = [{"prompt": f"What is {row} + 1 ?", "completion": f" {row + 1}", "id": f"sum-{row}"} for row in range(10)]
VALUES = [float(row) for row in range(9)] + [None]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scores of ten rows, the last without one, and a selection of the lower half, each in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    source = {"dataset": str(write(Path("rows.jsonl"), ROWS)), "split": "train"}
    source["content"] = hash_rows(load_rows("rows.jsonl"))
    scores = make_scores(VALUES, provenance=make_provenance(rows=10, source=source, preparation={}))
    scores.save("scores")
    DataSelector(keep=0.5).select(scores).save("kept")
    DataSelector(keep=0.5, by=["loss", "-num_tokens"]).select(scores).save("by-two")
    (tmp_path / "empty").mkdir()
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    main(["inspect", *argv])
    return capsys.readouterr().out.splitlines()


def test_why_a_row_went_and_where_its_score_lies(folders, capsys):
    assert said(capsys, "scores", "--selection", "kept", "--row", "7", "--json", "row.json") == [
        "Row 7 (id sum-7): dropped (largest 50 %)",
        "      prompt: What is 7 + 1 ?",
        "      completion: 8",
        "  score 7, larger than 87.5% of all other scored rows",
        "  loss 3.5, num_tokens 10, layer_2 7, layer_3 3.5",
    ]
    found = json.loads(Path("row.json").read_text())
    assert (found["kept"], found["reason"], found["id"]) == (False, "largest 50 %", "sum-7")
    assert (found["larger_than"], found["scored"]) == ({"score": 7 / 8}, 9)


def test_a_selection_alone_says_why_and_where_to_ask_for_the_score(folders, capsys):
    for source in ("kept", "kept/selection.parquet"):
        assert said(capsys, source, "--row", "7") == [
            "Row 7 (id sum-7): dropped (largest 50 %)",
            "      prompt: What is 7 + 1 ?",
            "      completion: 8",
            f"For its scores: resofilter inspect SCORES --selection {source} --row 7",
        ]
    assert said(capsys, "kept", "--row", "1")[0] == "Row 1 (id sum-1): kept"
    assert said(capsys, "kept", "--row", "9")[0] == f"Row 9 (id sum-9): dropped ({WHY})"


def test_a_row_is_placed_by_what_it_was_ranked_by(folders, capsys):
    lines = said(capsys, "scores", "--selection", "by-two", "--row", "8")
    assert lines[3:] == [
        "  loss 4, larger than 100.0% of all other scored rows",
        "  num_tokens 11, larger than 100.0% of all other scored rows",
        "  score 8, layer_2 8, layer_3 4",
    ]


def test_votes_have_their_columns_and_ranks_of_other_kinds_no_place(folders, capsys):
    scores = ScoreTable.load("scores")
    DataSelector(keep=0.5, by={"+loss": 0.7, "-num_tokens": 0.3, "score": 0}).select(scores).save("votes")
    lines = said(capsys, "scores", "--selection", "votes", "--row", "8")
    assert [line.split(",")[0] for line in lines[3:]] == ["  loss 4", "  num_tokens 11", "  score 8"]
    DataSelector(keep=0.5, by="loss", stratify_by="num_tokens", strata=2).select(scores).save("strata")
    DataSelector(keep=0.5, by="loss", length_out=True).select(scores).save("residual")
    for folder in ("strata", "residual"):
        assert said(capsys, "scores", "--selection", folder, "--row", "8")[3] == "  loss 4"


def test_a_row_of_a_shard_says_which_row_of_the_dataset_it_is(folders, capsys):
    source = {"shard": {"index": 1, "count": 2, "first": 10, "of": 20}}
    make_scores(VALUES, provenance=make_provenance(rows=10, source=source, preparation={})).save("shard")
    assert said(capsys, "shard", "--row", "3")[1] == "Row 3 of this shard (row 13 of the dataset): scored"


def test_a_selection_of_unknown_scores_is_refused(folders, capsys):
    dataclasses.replace(Selection.load("kept"), provenance="").save("unknown")
    assert "does not say from which scores it was made" in refused(capsys, "inspect", "unknown", "--row", "1")


def test_scores_without_a_selection(folders, capsys):
    lines = said(capsys, "scores", "--row", "0")
    assert lines[0] == "Row 0 (id sum-0): scored"
    assert lines[3] == "  score 0, larger than 0.0% of all other scored rows"
    assert lines[-1] == "Next: resofilter select scores --keep 0.5 --output kept"
    assert said(capsys, "scores/scores.parquet", "--row", "9")[0] == f"Row 9 (id sum-9): not scored ({WHY})"


def test_a_run_without_a_ledger_says_what_each_epoch_decided(folders, capsys):
    scores = make_scores(VALUES, provenance=make_provenance(rows=10, source={}, preparation={}))
    scores.save(folders / "run" / NAME)
    for epoch, keep in enumerate((1.0, 0.5)):
        DataSelector(keep=keep).select(scores).save(folders / "run" / NAME / selection_file(epoch))
    main(["inspect", "run", "--row", "7", "--dataset", "rows.jsonl"])
    printed = capsys.readouterr()
    assert "warning: The dataset's order was not compared with the run's: a text may be another row's." in printed.err
    lines = printed.out.splitlines()
    assert lines[0] == "Row 7: dropped (largest 50 %) in epoch 2"  # without an id, which may be another row's
    assert lines[3:6] == [
        "  epoch 1: kept",
        "  epoch 2: dropped (largest 50 %)",
        "  score 7, larger than 87.5% of all other scored rows",
    ]
    assert said(capsys, "run", "--row", "7")[0] == (
        "The row's text is not known: the scores name no dataset. Pass --dataset."
    )


def test_a_summary_of_both(folders, capsys):
    lines = said(capsys, "scores", "--selection", "kept")
    assert lines[0].startswith("10 rows, 9 scored")
    assert any(line.endswith(" of 10 rows kept") for line in lines)
    assert lines[-1] == "Next: resofilter inspect scores --selection kept --row 0"


def test_rows_that_are_gone_are_no_error_unless_they_are_asked_for(folders, capsys):
    Path("rows.jsonl").unlink()
    lines = said(capsys, "kept", "--row", "7")
    assert lines[0].startswith("The row's text is not known: There is no dataset at 'rows.jsonl'")
    assert lines[1] == "Row 7: dropped (largest 50 %)"
    assert "There is no dataset at 'rows.jsonl'" in refused(
        capsys, "inspect", "kept", "--row", "7", "--dataset", "rows.jsonl"
    )


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["kept", "--row", "10"], "There is no row 10: the scores are of 10 rows"),
        (["kept", "--row", "-1"], "There is no row -1"),
        (["kept", "--step", "3"], "--step needs the ledger of a run with ResonanceCallback(ledger=True), and 'kept'"),
        (["scores", "--most", "3"], "--most needs the ledger of a run"),
        (["scores", "--partial"], "--partial needs the ledger of a run"),
        (["kept", "--selection", "by-two", "--row", "1"], "'kept' is a selection itself"),
        (["nowhere", "--row", "1"], "'nowhere' does not exist."),
        (["empty", "--row", "1"], "'empty' holds no ledger."),
        (["empty", "--selection", "kept", "--row", "1"], "--selection goes with scores"),
        (["nowhere", "--selection", "kept", "--row", "1"], "'nowhere' does not exist. Pass scores"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(argv, named, folders, capsys):
    assert named in refused(capsys, "inspect", *argv)


def test_resonance_is_a_share_of_the_full_step(folders, capsys):
    config = {"update": "adamw", "norm": "mean_abs", "lr": 1e-5}
    values = [9.99e-6, 9.998e-6, 9.9993e-6]
    make_scores(values, provenance=make_provenance(rows=3, source={}, config=config)).save("resonance")
    assert "  score 99.980 % of a full step, larger than 50.0% of all other scored rows" in said(
        capsys, "resonance", "--row", "1"
    )
