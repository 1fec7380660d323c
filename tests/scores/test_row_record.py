"""Records of rows read as a `datasets.Dataset`: columns, rows, iteration, equality by value; short in a console."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from helpers.tables import WHY, make_provenance, make_scores, make_token_scores

from resofilter_trainer import (
    DataSelector,
    InputError,
    OnePerPrompt,
    ScoreTable,
    Selection,
    SoftPruning,
    TokenScores,
    TokenSelector,
)
from resofilter_trainer.scores.row_record import RowRecord

SCORES = make_scores([3.0, None, 1.0, 2.0, float("nan"), 5.0, 6.0])
SELECTION = Selection(np.array([True, False, True]), ["kept", "largest 50 %", "kept"], {"by": ("a", "b")}, "{}")
ANY_KEY = "Pass a column's name, a row's number, a slice, a list of numbers or a mask"


def test_a_name_gives_a_column():
    assert SCORES["score"][[0, 2, 3]].tolist() == [3.0, 1.0, 2.0]
    assert np.isnan(SCORES["score"][1])
    assert SCORES["reason"] == [None, WHY, None, None, None, None, None]
    assert SELECTION["keep"].tolist() == [True, False, True]
    assert SELECTION["sample_id"].tolist() == [0, 1, 2]
    assert SCORES.column_names[:3] == ["sample_id", "score", "loss"]
    assert SELECTION.column_names == ["sample_id", "keep", "reason"]


def test_a_number_gives_a_row():
    assert SCORES[2] == {
        "sample_id": 2, "score": 1.0, "loss": 0.5, "num_tokens": 5, "prompt": 2**62, "layer_2": 1.0, "layer_3": 0.5,
        "reason": None,
    }  # fmt: skip
    assert SCORES[-1]["sample_id"] == SCORES[np.int64(6)]["sample_id"] == 6
    assert SELECTION[1] == {"sample_id": 1, "keep": False, "reason": "largest 50 %"}
    assert SELECTION[1]["keep"] is False


def test_several_numbers_give_columns_of_these_rows():
    assert SCORES[2:4]["score"].tolist() == SCORES[[2, 3]]["score"].tolist() == [1.0, 2.0]
    assert SELECTION[::2]["reason"] == ["kept", "kept"]
    assert SELECTION[[-1, 0]]["sample_id"].tolist() == [2, 0]
    assert SCORES[[]]["reason"] == []
    assert SELECTION[[]]["sample_id"].tolist() == []


def test_a_mask_gives_columns_of_its_rows():
    assert SCORES[SCORES["score"] > 2]["sample_id"].tolist() == [0, 5, 6]
    assert SCORES[[False] * 6 + [True]]["score"].tolist() == [6.0]
    assert SELECTION[~SELECTION["keep"]]["reason"] == ["largest 50 %"]


def test_a_row_is_read_without_a_column_being_made(monkeypatch):
    many = Selection(np.ones(10**5, dtype=bool), ["kept"] * 10**5, {}, "{}")
    for name in ("arange", "array", "flatnonzero"):
        monkeypatch.delattr(np, name)
    assert many[-1] == {"sample_id": 99999, "keep": True, "reason": "kept"}


def test_a_name_is_in_a_record_that_has_the_column(monkeypatch):
    assert SCORES[0] in SCORES
    assert {**SCORES[0], "score": 9.0} not in SCORES
    monkeypatch.delattr(RowRecord, "__iter__")
    assert "score" in SCORES
    assert "scor" not in SCORES
    assert ("keep" in SELECTION, "weight" in SELECTION) == (True, False)


def test_iteration_gives_rows():
    assert [row["sample_id"] for row in SCORES] == list(range(7))
    assert list(SELECTION) == [SELECTION[0], SELECTION[1], SELECTION[2]]
    assert len(list(SCORES)) == len(SCORES)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("scor", "There is no column 'scor'. There are: sample_id, score, loss, num_tokens, prompt, layer_2, layer_3,"),
        (7, "There is no row 7: there are 7 rows, counted from 0."),
        (-8, "There is no row -8: there are 7 rows, counted from 0."),
        ([0, 9], "There is no row 9: there are 7 rows, counted from 0."),
        (1.5, f"{ANY_KEY}, got 1.5."),
        (True, f"{ANY_KEY}, got True."),
        ([0, [1]], f"{ANY_KEY}, got [0, [1]]."),
        ([0.5] * 1000, f"{ANY_KEY}, got [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...]."),
        ([True, False], "There are 7 rows and the mask has 2 values: every row needs one."),
    ],
)
def test_any_other_key_is_refused(key, message):
    with pytest.raises(InputError) as refused:
        _ = SCORES[key]
    assert str(refused.value).startswith(message)


def test_records_are_equal_by_value(tmp_path):
    again = ScoreTable.load(SCORES.save(tmp_path))
    assert again == SCORES
    assert make_scores([1.0, None]) == make_scores([1.0, None])
    assert make_scores([1.0, None]) != make_scores([1.0, 2.0])
    assert make_scores([1.0, 2.0]) != make_scores([1.0, np.nextafter(2.0, 3)])
    assert make_scores([1.0]) != make_scores([1.0], provenance=make_provenance(rows=1, weights="other"))
    assert make_scores([1.0]) != "scores"


def test_selections_are_equal_by_value(tmp_path):
    selection = SoftPruning(keep=0.5).select(make_scores([1.0, 2.0, 3.0, 4.0]))
    assert Selection.load(selection.save(tmp_path)) == selection
    assert dataclasses.replace(SELECTION, policy={"by": ["a", "b"]}) == SELECTION
    assert dataclasses.replace(SELECTION, policy={"by": ["a", "c"]}) != SELECTION
    assert dataclasses.replace(SELECTION, keep=np.array([True, True, True])) != SELECTION
    assert dataclasses.replace(SELECTION, weight=np.ones(3)) != SELECTION
    groups = DataSelector(keep={1: 0.5, 2: 0.5}).select(make_scores([1.0, 2.0, 3.0, 4.0]), groups=[1, 1, 2, 2])
    assert Selection.load(groups.save(tmp_path)) == groups


def test_settings_that_are_no_json_are_compared_and_saved_as_text(tmp_path):
    odd = dataclasses.replace(SELECTION, policy={"share": np.float64(0.5), "kinds": {"b"}})
    assert odd == dataclasses.replace(SELECTION, policy={"kinds": {"b"}, "share": 0.5})
    assert odd != dataclasses.replace(SELECTION, policy={"kinds": {"c"}, "share": 0.5})
    assert Selection.load(odd.save(tmp_path)).policy == {"share": 0.5, "kinds": "{'b'}"}


def test_token_scores_are_equal_by_value(tmp_path):
    tokens = make_token_scores([[(1.0, 0.5), (2.0, 0.5)], [(3.0, 1.0)]])
    assert TokenScores.load(tokens.save(tmp_path)) == tokens
    assert tokens != make_token_scores([[(1.0, 0.5), (2.0, 0.5)], [(3.0, 1.5)]])
    kept = TokenSelector(0.5).select(tokens)
    assert kept == TokenSelector(0.5).select(tokens)
    assert kept != TokenSelector(1.0).select(tokens)


def test_records_cannot_be_keys():
    for record in (SCORES, SELECTION, make_token_scores([[(1.0, 0.5)]])):
        with pytest.raises(TypeError, match="unhashable"):
            hash(record)


def test_a_console_shows_a_line():
    tokens = make_token_scores([[(1.0, 0.5), (2.0, 0.5)], [(3.0, 1.0)]])
    assert repr(SELECTION) == "Selection(2 of 3 kept; dropped: 1 largest 50 %)"
    assert repr(tokens) == "TokenScores(3 learnt tokens of 2 rows)"
    assert repr(TokenSelector(0.5).select(tokens)) == "TokenSelection(1 of 3 tokens kept; 1 of 2 rows keep none)"
    assert len(repr(make_scores(np.arange(7500.0).tolist()))) < 100


@pytest.mark.parametrize("reason", ["<script>alert(1)</script>", "a & b"])
def test_a_notebook_shows_a_table_in_which_nothing_is_markup(reason):
    selection = dataclasses.replace(SELECTION, reason=["kept", reason, "kept"])
    shown = selection._repr_html_()
    assert "<table" in shown
    assert reason not in shown
    assert "&lt;script&gt;" in shown or "a &amp; b" in shown


def test_a_notebook_shows_the_first_rows():
    shown = SCORES._repr_html_()
    assert shown.count("<tr") == 6
    assert "The first 5 of 7 rows." in shown
    assert "ScoreTable(7 rows, 6 scored, scores 1 to 6, 1 row has a score that is not a number)" in shown
    tokens = make_token_scores([[(1.0, 0.5), (2.0, 0.5)], []])
    assert tokens._repr_html_().count("<tr") == 3
    assert TokenSelector(0.5).select(tokens)._repr_html_().count("<tr") == 3


def test_the_summary_of_scores():
    lines = make_scores([1.0, None, 3.0]).summary().splitlines()
    assert lines[:2] == ["3 rows, 2 scored: 1 to 3, mean 2", f"  1 not scored: {WHY}"]
    assert lines[-1].startswith("Trust: rank agreement 0.9900")
    assert make_scores([None]).summary().startswith("1 rows, 0 scored: none, mean none")


def test_scores_that_are_not_numbers_are_counted():
    broken = [1.0, None, float("nan"), float("inf"), 3.0]
    counted = "2 rows have a score that is not a number"
    assert make_scores(broken).summary().splitlines()[0] == f"5 rows, 4 scored: 1 to 3, mean 2, {counted}"
    assert repr(make_scores(broken)) == f"ScoreTable(5 rows, 4 scored, scores 1 to 3, {counted})"
    shares = make_provenance(rows=5, config={"update": "adamw", "lr": 10.0})
    whole = "4 scored: 10.0 % to 30.0 % of a full step, mean 20.0 %"
    assert make_scores(broken, provenance=shares).summary().splitlines()[0] == f"5 rows, {whole}, {counted}"
    one = make_scores([float("nan")])
    assert one.summary().startswith("1 rows, 1 scored: none, mean none, 1 row has a score that is not a number")


def test_the_summary_of_a_selection_has_groups():
    scores = make_scores([1.0, 2.0, 3.0, 4.0, None])
    groups = ["web", "web", "book", "book", "web"]
    selection = DataSelector(keep=0.5).select(scores, groups=groups)
    assert selection.summary(groups).splitlines() == [
        "2 of 5 rows kept",
        "         2 kept",
        "         1 largest 50 % of group web",
        "         1 largest 50 % of group book",
        f"         1 {WHY}",
        "  web: 1 of 3 rows kept; dropped: 1 largest 50 %, 1 empty completion",
        "  book: 1 of 2 rows kept; dropped: 1 largest 50 %",
    ]
    with pytest.raises(InputError, match="There are 5 rows and 2 groups: every row needs one"):
        selection.summary(["a", "b"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("prompt", "groups='prompt' is one text, and every row needs a group: pass dataset['prompt']."),
        (5, "groups must be a list with the group of each row, got 5: pass dataset['source']."),
        ({"a": 1}, "groups must be a list with the group of each row, got a dict: pass dataset['source']."),
        (iter([1]), "groups must be a list with the group of each row, got a list_iterator: pass dataset"),
    ],
)
def test_what_is_no_group_for_each_row_is_refused(groups, message):
    scores = make_scores([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    selection = DataSelector(keep=0.5).select(scores)
    ways = [selection.summary, *(partial(each.select, scores) for each in (DataSelector(keep=0.5), OnePerPrompt()))]
    for way in ways:
        with pytest.raises(InputError) as refused:
            way(groups=groups)
        assert str(refused.value).startswith(message)


def test_many_groups_end_in_one_line():
    selection = DataSelector(keep=0.5).select(make_scores(np.arange(50.0).tolist()))
    lines = selection.summary([f"source {row // 2}" for row in range(50)]).splitlines()
    assert lines[-1] == "  5 other groups: 0 of 10 rows kept"
    assert lines[-2] == "  source 19: 0 of 2 rows kept; dropped: 2 largest 50 %"
