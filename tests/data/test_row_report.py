"""The report from public names alone: scores, a selection and the dataset give a page with texts."""

from __future__ import annotations

import dataclasses
import json

import pytest
from datasets import Dataset, DatasetDict
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import DataSelector, InputError, RandomSelector, read_contents, write_report
from resofilter_trainer.data import row_report
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.report import Contents
from resofilter_trainer.report.contents import Epoch

ROWS = Dataset.from_list([{"q": f"question {i}", "a": f"answer {i}", "from": "ab"[i % 2]} for i in range(4)])
PREPARATION = {"max_length": 64, "prompt_column": ["q"], "completion_column": "a"}
SCORES = make_scores(
    [1.0, 2.0, 3.0, 4.0],
    provenance=make_provenance(rows=4, preparation=PREPARATION, source={"content": hash_rows(ROWS)}),
)
SELECTION = DataSelector(keep=0.75).select(SCORES)

A_DATASET = (
    "dataset must be a datasets.Dataset, as load_rows returns, or a list with a pair of prompt and completion for each "
    "row"
)


@pytest.fixture
def written(monkeypatch):
    """What the page was asked to show, instead of a page."""
    asked: dict[str, object] = {}
    names = ("contents", "output", "texts", "groups", "decode", "title", "ids")
    monkeypatch.setattr(row_report, "write_page", lambda *values: asked.update(zip(names, values, strict=True)))
    return asked


def test_scores_selection_and_dataset_are_enough(tmp_path):
    report = write_report(SCORES, SELECTION, ROWS, "from", output=tmp_path)
    page = report.path.read_text()
    assert report.path == tmp_path / "report.html"
    assert all(json.dumps(f"answer {i}")[1:-1] in page for i in range(4))
    assert report.numbers is not None
    assert (report.numbers.verdict.kept, report.numbers.verdict.dropped) == (3, 1)


def test_columns_are_those_that_were_scored(written):
    write_report(SCORES, SELECTION, ROWS, "from", title="Mine")
    assert list(written["texts"]) == [(f"question {i}\n", f"answer {i}") for i in range(4)]  # the separator
    assert written["groups"] == ["a", "b", "a", "b"]
    assert (written["output"], written["title"]) == ("resofilter-report", "Mine")
    assert written["contents"] == Contents(SCORES, SELECTION)


def test_contents_of_a_folder_take_the_dataset_and_another_selection(written, tmp_path):
    SCORES.save(tmp_path)
    other = RandomSelector(keep=0.5).select(SCORES)
    write_report(read_contents(tmp_path), other, ROWS)
    assert written["contents"].selection == other
    assert written["contents"].scores == SCORES
    assert len(written["texts"]) == 4


def test_another_selection_leaves_everything_else_as_it_was(written):
    layers, ledger, cleaned = SCORES, object(), object()
    epochs, log, comparison = [Epoch(1, SCORES, None)], [{"loss": 1.0}], {"lines": []}
    contents = Contents(SCORES, SELECTION, epochs, log, layers, cleaned, comparison, ledger)
    other = RandomSelector(keep=0.5).select(SCORES)
    write_report(contents, other)
    shown = written["contents"]
    assert shown.selection == other
    fields = {each.name for each in dataclasses.fields(Contents)} - {"selection"}
    assert {name for name in fields if getattr(shown, name) != getattr(contents, name)} == set()
    assert {name for name in fields if getattr(shown, name) is None} == set()


def test_the_arguments_of_version_0_1_0_are_understood(written, tmp_path):
    contents, texts = Contents(SCORES, SELECTION), [("p", "c")] * 4
    write_report(contents, tmp_path, texts, ["x"] * 4, None, "Title")
    assert written == {"contents": contents, "output": tmp_path, "texts": texts, "groups": ["x"] * 4, "decode": None,
                       "title": "Title", "ids": None}  # fmt: skip


def test_other_rows_are_refused_unless_only_columns_differ(written):
    with pytest.raises(InputError, match="The dataset is not what was scored"):
        write_report(SCORES, SELECTION, ROWS.select([1, 0, 2, 3]))
    with pytest.raises(InputError, match=r"^The dataset has 2 rows and the scores are of 4\.$"):
        write_report(SCORES, SELECTION, ROWS.select([0, 1]))
    write_report(SCORES, SELECTION, ROWS.add_column("id", [1, 2, 3, 4]), check_rows=False)
    assert written["texts"][3] == ("question 3\n", "answer 3")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: write_report(SCORES, "kept/"), "selection must be a Selection, got 'kept/': pass Selection.load of"),
        (lambda: write_report(SCORES, SCORES), "selection must be a Selection, got a ScoreTable."),
        (lambda: write_report(SCORES, SELECTION, ROWS, "source"), "There is no column 'source'. The dataset has: q, a"),
        (lambda: write_report(SCORES, groups="from"), "groups='from' is a column of the dataset: pass dataset=."),
        (lambda: write_report(SCORES, groups=5), "groups must be a list with the group of each row, got 5"),
        (lambda: write_report(SCORES, dataset=ROWS.to_iterable_dataset()), f"{A_DATASET}, got a IterableDataset."),
        (lambda: write_report(SCORES, dataset=ROWS.to_pandas()), f"{A_DATASET}, got a DataFrame."),
        (
            lambda: write_report(SCORES, dataset=ROWS.to_list()),
            f"{A_DATASET}, and row 0 is no pair of texts but a dict",
        ),
        (
            lambda: write_report(SCORES, dataset=[("p", "c"), ("p", "c", "d")]),
            f"{A_DATASET}, and row 1 is no pair of texts but a tuple.",
        ),
        (lambda: write_report(SCORES, dataset="rows.jsonl"), f"{A_DATASET}, got 'rows.jsonl': pass load_rows("),
        (
            lambda: write_report(SCORES, dataset=DatasetDict(test=ROWS)),
            "dataset must be one split, and this is a DatasetDict: pass dataset['test'].",
        ),
        (lambda: write_report(Contents(None, comparison={"lines": []}), None, ROWS), "There are no scores whose rows"),
    ],
)
def test_what_cannot_be_shown_is_one_line(call, expected, written):
    with pytest.raises(InputError) as refused:
        call()
    assert str(refused.value).startswith(expected)
