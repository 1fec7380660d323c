"""However much there is, and whatever it is called, the page stays a page."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from helpers.pages import data_of
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import InputError, ScoreTable, Selection, write_report
from resofilter_trainer.data.row_texts import pieces
from resofilter_trainer.report import Contents, read_contents
from resofilter_trainer.report.numbers import STEPS, steps_of
from resofilter_trainer.report.samples import NAME, first_of_copies
from resofilter_trainer.scores.score_table import SAME_PROMPT, count_reasons

MEGABYTES = 15


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Rows with the worst text for a page, long names, a reason each, and a log of every step."""
    rows = 5000
    lot = np.random.default_rng(0)
    columns = {"sample_id": np.arange(rows), "score": lot.random(rows), "loss": lot.random(rows)}
    table = pa.table({**columns, "num_tokens": np.arange(rows), "reason": pa.nulls(rows, pa.string())})
    scores = ScoreTable(table, make_provenance(rows=rows))
    reasons = [
        "=HYPERLINK()" if row == 1 else f"{SAME_PROMPT} {row}" if row % 2 else f"{row} " * 500 for row in range(rows)
    ]
    selection = Selection(np.zeros(rows, dtype=bool), reasons, {}, scores.provenance.to_json())
    log = [{"step": step, "learning_rate": 1e-5} for step in range(30_000)]
    contents = Contents(scores, selection, log=log)
    texts, groups = [("<" * 20_000, "&" * 20_000)] * rows, [f"{row} " * 2000 for row in range(rows)]
    return write_report(contents, tmp_path_factory.mktemp("large"), texts, groups)


def test_the_page_is_bounded(large):
    assert large.path.stat().st_size <= MEGABYTES * 1e6
    shown = data_of(large.path)["samples"]
    assert max(len(name) for name in shown["group"] + shown["reason"]) <= NAME + 1


def test_reasons_are_told_apart_as_far_as_they_are_listed(large):
    reasons = large.numbers.verdict.reasons
    assert reasons[0] == ("same prompt as another row", 2499)
    assert len(reasons) == 51
    assert sum(count for _, count in reasons) == 5000
    assert count_reasons(["b", "a", "a"], 2) == [("a", 2), ("b", 1)]


def test_no_reason_is_a_formula_of_a_spreadsheet(large):
    lines = (large.path.parent / "report" / "dropped.csv").read_text().splitlines()
    assert '"\'=HYPERLINK()"' in lines[2]


def test_a_long_log_is_thinned_and_keeps_its_ends():
    found = steps_of([{"step": step, "learning_rate": float(step)} for step in range(30_000)])
    assert len(found) == STEPS
    assert (found[0]["step"], found[-1]["step"]) == (0, 29_999)
    assert steps_of([{"step": 1, "learning_rate": float("nan")}, {"learning_rate": 1.0}]) == []


def test_rows_without_text_are_no_copies():
    assert first_of_copies([("", ""), ("a", ""), ("", ""), ("a", "")]).tolist() == [0, 1, 2, 1]


def test_tokens_are_shown_as_they_read_together(tokenizer):
    text = " answer: é 漢 3"
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == text
    assert "\ufffd" not in "".join(pieces(tokenizer, ids))


def test_a_comparison_that_lies_elsewhere(tmp_path):
    make_scores([1.0, 2.0]).save(tmp_path)
    line = '{"selector": "a", "model": "m", "keep": 0.5, "metric": 0.5, "metric_low": NaN, "metric_high": null}'
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "comparison.json").write_text(f'{{"lines": [{line}]}}')
    report = write_report(read_contents(tmp_path, comparison=tmp_path / "other"), tmp_path)
    assert report.numbers.ratios == [
        {"selector": "a", "model": "m", "keep": 0.5, "metric": 0.5, "metric_low": None, "metric_high": None}
    ]
    with pytest.raises(InputError, match="no comparison at"):
        read_contents(tmp_path, comparison=tmp_path / "nowhere")


def test_an_earlier_pages_pictures_go(tmp_path):
    log = [{"step": 1, "learning_rate": 1e-5}, {"step": 2, "learning_rate": 0.0}]
    write_report(Contents(make_scores([1.0, 2.0]), log=log), tmp_path)
    assert (tmp_path / "report" / "steps.png").is_file()
    write_report(Contents(make_scores([1.0, 2.0])), tmp_path)
    assert not (tmp_path / "report" / "steps.png").exists()
