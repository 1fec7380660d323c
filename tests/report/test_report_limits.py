"""Every table has a page of bounded size, for any number of rows and any values, texts and names."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from helpers.pages import data_of
from helpers.reports import make_table, usual
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import DataSelector, InputError, ScoreTable, Selection, write_report
from resofilter_trainer.data.row_texts import pieces
from resofilter_trainer.report import Contents, Report, read_contents
from resofilter_trainer.report.epochs import MAX_STEPS, steps_of
from resofilter_trainer.report.paper_figures import layers_of
from resofilter_trainer.report.samples import MAX_NAME, first_of_copies
from resofilter_trainer.scores.score_table import SAME_PROMPT, count_reasons

MEGABYTES = 15


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A report on rows with long text full of markup, long names, a reason of their own, and a log of every step."""
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
    texts, groups = [("<" * 5_000, "&" * 5_000)] * rows, [f"{row} " * 2000 for row in range(rows)]
    return write_report(contents, tmp_path_factory.mktemp("large"), texts, groups)


@pytest.mark.slow
def test_the_page_is_bounded(large):
    assert large.path.stat().st_size <= MEGABYTES * 1e6
    shown = data_of(large.path)["samples"]
    assert max(len(name) for name in shown["group"] + shown["reason"]) <= MAX_NAME + 1


@pytest.mark.slow
def test_only_the_most_frequent_reasons_are_listed(large):
    reasons = large.numbers.verdict.reasons
    assert reasons[0] == ("same prompt as another row", 2499)
    assert len(reasons) == 51
    assert sum(count for _, count in reasons) == 5000
    assert count_reasons(["b", "a", "a"], 2) == [("a", 2), ("b", 1)]


@pytest.mark.slow
def test_no_reason_is_a_formula_of_a_spreadsheet(large):
    lines = (large.path.parent / "report" / "dropped.csv").read_text().splitlines()
    assert '"\'=HYPERLINK()"' in lines[2]


def test_a_long_log_is_thinned_and_keeps_its_ends():
    found = steps_of([{"step": step, "learning_rate": float(step)} for step in range(30_000)])
    assert len(found) == MAX_STEPS
    assert (found[0]["step"], found[-1]["step"]) == (0, 29_999)
    assert steps_of([{"step": 1, "learning_rate": float("nan")}, {"learning_rate": 1.0}]) == []


def test_rows_without_text_are_no_copies():
    assert first_of_copies([("", ""), ("a", ""), ("", ""), ("a", "")]).tolist() == [0, 1, 2, 1]


def test_tokens_are_shown_as_they_read_together(tokenizer):
    text = " answer: é 漢 3"
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == text
    assert "\ufffd" not in "".join(pieces(tokenizer, ids))


def test_a_comparison_in_another_folder(tmp_path):
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


def test_the_charts_of_an_earlier_report_are_removed(tmp_path):
    log = [{"step": 1, "learning_rate": 1e-5}, {"step": 2, "learning_rate": 0.0}]
    write_report(Contents(make_scores([1.0, 2.0]), log=log), tmp_path)
    assert (tmp_path / "report" / "learning_rate.png").is_file()
    write_report(Contents(make_scores([1.0, 2.0])), tmp_path)
    assert not (tmp_path / "report" / "learning_rate.png").exists()


# ---- every table has a page

LONG = ["a" * 100_000, "שלום עולם", "नमस्ते दुनिया", "漢字 かな", "<script>", "\ud800 half", "\u202e", ""]
ODD = np.array([math.nan, math.inf, -math.inf, 1, 2, 3, 4, None], dtype=object)
TABLES: dict[str, tuple[ScoreTable, list[str] | None]] = {
    "no row": (make_table([], loss=np.empty(0), num_tokens=np.empty(0, dtype=int)), []),
    "one row, without text": (usual(1), None),
    "all equal": (usual(8, score=np.ones(8)), LONG),
    "not finite": (usual(8, score=ODD), LONG[::-1]),
    "all unscored": (usual(8, score=np.array([None] * 8, dtype=object)), LONG),
    "of another criterion": (make_table([3.0, 1.0, 2.0], make_provenance(rows=3, config={"criterion": "ifd"})), None),
}


@pytest.fixture(scope="module", params=list(TABLES))
def written(request, tmp_path_factory) -> tuple[ScoreTable, Selection, Report]:
    scores, texts = TABLES[request.param]
    pairs = None if texts is None else [(f"prompt {row % 2}", text) for row, text in enumerate(texts)]
    selection = DataSelector().select(scores)
    groups = ["ab"[row % 2] for row in range(len(scores))]
    folder = tmp_path_factory.mktemp("report")
    return scores, selection, write_report(Contents(scores, selection), folder, pairs, groups)


def test_every_table_has_a_page_with_all_its_rows(written):
    scores, selection, report = written
    rows = data_of(report.path)["samples"]
    assert rows["row"] == list(range(len(scores)))
    assert rows["decision"] == ["kept" if each else "dropped" for each in selection.keep]
    assert rows["score"] == [value if math.isfinite(value) else None for value in scores.column("score").tolist()]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.pictures)
    assert sorted(each.name for each in report.path.parent.iterdir()) == ["report", "report.html"]


def test_the_dropped_rows_are_written_next_to_the_page(written):
    _, selection, report = written
    dropped = np.flatnonzero(~selection.keep)
    for read in (pq.read_table, pa.csv.read_csv):
        table = read(report.path.parent / "report" / f"dropped.{'csv' if read is pa.csv.read_csv else 'parquet'}")
        assert table["sample_id"].to_pylist() == dropped.tolist()
        assert table["reason"].to_pylist() == [selection.reason[row] for row in dropped]


@pytest.mark.parametrize(("what", "argument"), [("texts", "dataset"), ("groups", "groups")])
@pytest.mark.parametrize("count", [0, 7, 9])
def test_every_row_needs_a_text_and_a_group(what, argument, count, tmp_path):
    values = [("", "")] * count if what == "texts" else ["a"] * count
    with pytest.raises(InputError, match=f"8 rows and {count} {what}"):
        write_report(Contents(usual(8)), tmp_path, **{argument: values})
    assert list(tmp_path.iterdir()) == []


def test_groups_may_be_an_array(tmp_path):
    report = write_report(Contents(usual(4)), tmp_path, groups=np.array(["a", "b", "a", "b"]))
    assert data_of(report.path)["samples"]["group"] == ["a", "b", "a", "b"]


def test_the_page_and_the_files_have_ids_as_they_are(tmp_path):
    ids = ["x" * MAX_NAME + str(row) for row in range(4)] + ["-5", "+1.5", "-1+1", None]
    scores = usual(8)
    contents = Contents(scores, Selection(np.zeros(8, bool), ["no"] * 8, {}, scores.provenance.to_json()))
    report = write_report(contents, tmp_path, groups=["a"] * 7 + [None], ids=ids)
    exact = [*ids[:-1], ""]
    assert pq.read_table(tmp_path / "report" / "dropped.parquet")["id"].to_pylist() == exact
    lines = (tmp_path / "report" / "dropped.csv").read_text().splitlines()[1:]
    assert [each.split(",")[1].strip('"') for each in lines] == [*exact[:6], "'-1+1", ""]
    shown = data_of(report.path)["samples"]
    assert shown["id"] == exact
    assert shown["group"] == ["a"] * 7 + [""]


def test_ids_that_would_fill_the_page_are_shortened(tmp_path):
    ids = [f"{row} " + "x" * 500_000 for row in range(4)]
    report = write_report(Contents(usual(4)), tmp_path, ids=ids)
    assert report.path.stat().st_size <= MEGABYTES * 1e6
    shown = data_of(report.path)["samples"]["id"]
    assert all(each.endswith("\u2026") and own.startswith(each[:-1]) for each, own in zip(shown, ids, strict=True))


def test_a_layer_with_changes_that_are_not_finite_is_read(tmp_path):
    table = usual(2)
    write_report(Contents(table, layers=make_scores([1.0, math.nan], provenance=table.provenance)), tmp_path)
    assert layers_of(make_scores([None, None])) == []
    with pytest.raises(InputError, match=r"scores of every layer .* made from something else: .*weights"):
        Contents(table, layers=make_scores([1.0, 2.0], provenance=make_provenance(rows=2, weights="other")))
