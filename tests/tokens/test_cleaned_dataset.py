"""A cleaned dataset in a console and in a notebook."""

from __future__ import annotations

from datasets import Dataset
from helpers.tables import make_token_scores

from resofilter_trainer import CleanedDataset, TokenSelector


def test_a_console_shows_a_line_and_a_notebook_the_numbers():
    selection = TokenSelector(0.5).select(make_token_scores([[(1.0, 0.5), (2.0, 0.5)], [(3.0, 1.0), (4.0, 0.0)]]))
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    found = CleanedDataset(rows, selection, {1: "no token"}, {"tokens": 4, "ranking": "<global>", "most_kept": []})
    assert repr(found) == "CleanedDataset(1 rows to train on; 2 of 4 tokens kept; 1 other rows left out)"
    assert len(found) == 1
    shown = found._repr_html_()
    assert shown.count("<tr") == 3
    assert "&lt;global&gt;" in shown
