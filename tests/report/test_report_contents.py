"""The files in a folder are read; damaged ones, and those made from other scores, are refused."""

from __future__ import annotations

import json

import pytest
from helpers.reports import cleaning, counted, usual
from helpers.tables import make_provenance, make_scores

from resofilter_trainer.config import InputError
from resofilter_trainer.io.files import save_parquet
from resofilter_trainer.report import Contents, contents, read_contents, write_report
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.token_selection import EMPTIED


def test_a_file_of_scores_and_its_folder_are_read(tmp_path):
    scores = usual(8)
    scores.save(tmp_path / "mine.parquet")
    DataSelector(keep=0.25).select(scores).save(tmp_path)
    for place in (scores.save(tmp_path), tmp_path, str(tmp_path), tmp_path / "mine.parquet"):
        found = read_contents(place)
        assert found.scores.table.equals(scores.table)
        assert found.decided().keep.sum() == 2


def test_a_trainings_output_is_read_epoch_by_epoch(tmp_path):
    scores, folder = usual(8), tmp_path / "resofilter"
    scores.save(folder)
    for epoch, keep in ((2, 0.5), (10, 0.25)):
        scores.save(folder / f"scores-epoch-{epoch}.parquet")
        DataSelector(keep=keep).select(scores).save(folder / f"selection-epoch-{epoch}.parquet")
    (folder / "log.json").write_text(json.dumps([{"step": 1, "learning_rate": 0.5}, {"step": 2, "loss": 1.0}]))
    found = read_contents(tmp_path)
    assert [each.number for each in found.epochs] == [2, 10]
    assert found.decided().keep.sum() == 2
    assert [(each.rows, each.dropped) for each in counted(**vars(found)).epochs] == [(4, None), (2, 2)]
    assert counted(**vars(found)).log == [{"step": 1, "what": "learning rate", "value": 0.5}]


def test_cleaned_tokens_are_selected_again(tmp_path):
    cleaned = cleaning()
    cleaned.scores.save(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"keep_tokens": 0.5, "ranking": "global"}))
    found = read_contents(tmp_path)
    verdict = counted(**vars(found)).verdict
    assert found.cleaned.keep.tolist() == cleaned.keep.tolist() == [True, True, False, False]
    assert found.decided().keep.tolist() == [True, False, False, False]
    assert found.scores.column("score")[[0, 2]].tolist() == [2.0, 0.5]
    assert found.scores.scored.tolist() == [True, False, True, False]
    assert (verdict.tokens, verdict.tokens_kept, verdict.scored) == (4, 2, 2)


def test_rows_without_a_kept_token_have_a_reason():
    assert contents.selection_of_tokens(cleaning()).reason[2] == EMPTIED
    assert contents.selection_of_tokens(cleaning()).reason[1] == contents.scores_of_tokens(cleaning().scores).reasons[1]


def test_scores_next_to_cleaned_tokens_keep_their_name():
    assert "resonance" in counted(usual(4), cleaned=cleaning()).verdict.score


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere' does not exist"):
        read_contents(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no scores and no comparison"):
        read_contents(tmp_path)


@pytest.mark.parametrize("text", ["", '{"lines": [', "\xff", "[]", "3", '{"lines": null}', '{"lines": [{}]}'])
def test_a_damaged_comparison_is_named(tmp_path, text):
    (tmp_path / "comparison.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"comparison\.json"):
        write_report(read_contents(tmp_path), tmp_path)


@pytest.mark.parametrize(("name", "change"), [("weights", {"weights": "other"}), ("eps", {"config": {"eps": 1}})])
def test_a_selection_of_other_scores_is_refused(tmp_path, name, change):
    usual(8).save(tmp_path)
    DataSelector().select(usual(8, make_provenance(rows=8, **change))).save(tmp_path)
    with pytest.raises(InputError, match=f"selection is of scores .* made from something else: .*{name}"):
        read_contents(tmp_path)


def test_other_numbers_of_rows_are_refused():
    with pytest.raises(InputError, match="selection has 9 rows and the scores have 8"):
        Contents(usual(8), DataSelector().select(usual(9)))
    with pytest.raises(InputError, match="6 rows and the scores cover 2"):
        Contents(make_scores([1.0, 2.0], [0, 1], make_provenance()))


def test_scores_may_be_in_any_order():
    found = counted(make_scores([1.0, 9.0, 2.0], [2, 0, 1]))  # row 0 scores 9
    assert [bar.decision for bar in found.histogram if bar.end == 9] == ["dropped"]


@pytest.mark.parametrize("name", ["scores.parquet", "selection.parquet"])
def test_a_table_of_another_version_is_refused_in_one_line(tmp_path, name):
    scores = usual(8)
    scores.save(tmp_path)
    old = {"resofilter_scores": "{}", "resofilter_selection": '{"policy": {}, "provenance": "{}"}'}
    save_parquet(DataSelector().select(scores)._table() if "sel" in name else scores.table, tmp_path / name, old)
    with pytest.raises(InputError, match="written by another version") as refused:
        read_contents(tmp_path)
    assert "\n" not in str(refused.value)
