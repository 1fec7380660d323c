"""The report written by the command, and at the end of a training run."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers.commands import QUESTIONS, files_in, refused, write
from helpers.pages import data_of
from helpers.tables import make_provenance, make_scores
from helpers.training import arguments, llama, rows
from trl import SFTTrainer

from resofilter_trainer import DataSelector, ResonanceCallback, ScoreTable, Selection
from resofilter_trainer.cli.entry import main
from resofilter_trainer.selecting.results import IDS_FILE, NAME
from resofilter_trainer.training.report import ids_of, texts_of

KINDS = ["a", "b"]
IDS = [f"sum-{row}" for row in range(12)]


def score(folder: Path, model: Path, *more: str) -> None:
    columns = ["--prompt_column", "question", "--completion_column", "answer"]
    where = ["--dataset", str(folder / "rows.jsonl"), "--output", str(folder / "scores")]
    main(["score", "--model", str(model), *where, *columns, *more])


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("reported")
    write(folder / "rows.jsonl", QUESTIONS)
    score(folder, tiny_model_dir)
    return folder


def test_the_command_shows_the_rows_that_were_scored(scored, capsys):
    main(["report", str(scored / "scores"), "--group_column", "kind", "--title", "Mine"])
    page = scored / "scores" / "report.html"
    shown = data_of(page)["samples"]

    assert capsys.readouterr().out.endswith(f"Report: {page}\n")
    assert "<h1>Mine</h1>" in page.read_text()
    assert shown["prompt"] == [row["question"] + "\n" for row in QUESTIONS]
    assert shown["completion"] == [row["answer"] for row in QUESTIONS]
    assert shown["group"] == [row["kind"] for row in QUESTIONS]
    scores = ScoreTable.load(scored / "scores")
    assert shown["score"] == scores.column("score").tolist()
    decided = DataSelector().select(scores)
    assert [each == "kept" for each in shown["decision"]] == decided.keep.tolist()


def test_the_selection_next_to_the_scores_is_shown(scored, tmp_path):
    scores = ScoreTable.load(scored / "scores")
    selection = DataSelector(keep=0.25).select(scores)
    for folder in ("recipe", "recipe/scores", "one", "kept"):
        (tmp_path / folder).mkdir()
    for folder in ("recipe/scores", "one"):
        scores.save(tmp_path / folder)
    for folder in ("recipe", "one", "kept"):
        selection.save(tmp_path / folder)
    page = tmp_path / "page" / "report.html"
    apart = [str(scored / "scores"), "--selection", str(tmp_path / "kept")]
    for where in ([str(tmp_path / "recipe")], [str(tmp_path / "one" / "scores.parquet")], apart):
        page.unlink(missing_ok=True)
        main(["report", *where, "--output", str(tmp_path / "page")])
        shown = data_of(page)["samples"]
        assert [each == "kept" for each in shown["decision"]] == selection.keep.tolist()
    assert {"report.html", "report/scores.png", "report/dropped.csv"} <= set(files_in(tmp_path / "page"))


def test_every_layer_is_drawn_where_it_was_measured(scored, tiny_model_dir):
    score(scored, tiny_model_dir, "--layers", "all")
    main(["report", str(scored / "scores")])

    chart = data_of(scored / "scores" / "report.html")["charts"]["layers"]
    drawn = {each["layer"]: each for each in chart["layer"][0]["data"]["values"]}
    assert sorted(drawn) == [0, 1, 2, 3]
    assert all(each["low"] <= each["high"] for each in drawn.values())


def test_it_opens_the_page_when_asked(scored, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    main(["report", str(scored / "scores"), "--open"])
    assert opened == [(scored / "scores" / "report.html").resolve().as_uri()]


def test_without_its_dataset_a_page_has_no_text(scored, tmp_path, capsys):
    moved = tmp_path / "rows.jsonl"
    (scored / "rows.jsonl").rename(moved)
    try:
        main(["report", str(scored / "scores")])
        said = capsys.readouterr().out
        assert "The report has no text: There is no dataset at" in said
        assert data_of(scored / "scores" / "report.html")["samples"]["prompt"] is None
        main(["report", str(scored / "scores"), "--dataset", str(moved)])
        assert data_of(scored / "scores" / "report.html")["samples"]["prompt"] is not None
    finally:
        moved.rename(scored / "rows.jsonl")


def test_the_rows_of_a_run_are_shown_by_their_columns(tmp_path, capsys):
    """A run knows neither where its rows are from nor which columns they had."""
    provenance = make_provenance(rows=12, source={}, preparation={"max_length": 64})
    make_scores([float(i) for i in range(12)], provenance=provenance).save(tmp_path / "resofilter")
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    page = tmp_path / "resofilter" / "report.html"
    where = ["report", str(tmp_path), "--dataset", str(rows), "--output", str(page.parent)]

    main(where)
    assert "The report has no text: say which columns have it, with --prompt_column and" in capsys.readouterr().out
    assert data_of(page)["samples"]["prompt"] is None

    main([*where, "--prompt_column", "question", "--completion_column", "answer"])
    assert "no text" not in capsys.readouterr().out
    assert data_of(page)["samples"]["completion"] == [row["answer"] for row in QUESTIONS]


BAD = {
    "nothing there": (["nowhere"], "'nowhere' does not exist"),
    "no scores": (["empty"], "no scores and no comparison"),
    "no such dataset": (["scores", "--dataset", "none.jsonl"], "There is no dataset at 'none.jsonl'"),
    "another dataset": (["scores", "--dataset", "other.jsonl"], "is not what was scored"),
    "no such group": (["scores", "--group_column", "source"], "question, answer, kind"),
    "a page in a file": (["scores", "--output", "rows.jsonl"], "is a file, not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(scored, monkeypatch, capsys, name):
    monkeypatch.chdir(scored)
    write(scored / "other.jsonl", QUESTIONS[::-1])
    (scored / "empty").mkdir(exist_ok=True)
    argv, message = BAD[name]
    assert message in refused(capsys, "report", *argv)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A trainer and a callback after a training of three epochs with a report."""
    folder = tmp_path_factory.mktemp("run")
    callback = ResonanceCallback(keep=0.5, readmit=True, n_layers=2, report=True)
    trainer = SFTTrainer(
        llama(len(tokenizer)),
        arguments(folder, num_train_epochs=3),
        train_dataset=rows(12).add_column("id", IDS),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    return trainer, callback


def test_a_training_reports_on_its_rows_and_epochs(run, tokenizer):
    trainer, callback = run
    data = data_of(Path(trainer.args.output_dir) / NAME / "report.html")

    assert data["samples"]["score"] == callback.scores.column("score").tolist()
    assert [each == "kept" for each in data["samples"]["decision"]] == callback.selections[-1].keep.tolist()
    assert data["samples"]["id"] == IDS
    assert data["samples"]["prompt"] == rows(12)["prompt"][:]
    assert data["samples"]["completion"] == [f"{text}{tokenizer.eos_token}" for text in rows(12)["completion"]]
    kept = [["●" if keep else "○" for keep in each.keep] for each in callback.selections]
    assert data["samples"]["epochs"] == ["".join(signs) for signs in zip(*kept, strict=True)]
    logged = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    drawn = {each["step"]: each["value"] for each in data["charts"]["learning_rate"]["data"]["values"]}
    assert drawn == pytest.approx(logged)


def test_a_report_that_fails_is_a_warning_and_the_training_is_saved(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("resofilter_trainer.training.report.write_report", lambda *_, **__: 1 / 0)
    trainer = SFTTrainer(
        llama(len(tokenizer)),
        arguments(tmp_path, num_train_epochs=1),
        train_dataset=rows(4),
        processing_class=tokenizer,
        callbacks=[ResonanceCallback(keep=1.0, n_layers=2, report=True)],
    )
    with pytest.warns(UserWarning, match=f"run: resofilter report {tmp_path}"):
        trainer.train()
    assert (tmp_path / NAME / "scores.parquet").is_file()


def test_rows_that_are_no_tokens_have_no_text(run):
    trainer, callback = run

    other = SimpleNamespace(train_dataset=[1, 2], processing_class=None)
    assert texts_of(other, callback.selections[0].sample_ids, 12, other.train_dataset) is None
    assert len(texts_of(trainer, callback.selections[0].sample_ids, 12, trainer.train_dataset)) == 12


def test_ids_of_rows_that_the_trainer_left_out(tmp_path):
    listed, kept = Dataset.from_dict({"id": [5, 6, 7, 8]}), np.array([0, 2, 3])
    assert ids_of(tmp_path, kept, 4, listed.select(kept)) == [5, 6, 7, 8]
    assert ids_of(tmp_path, kept, 4, listed.select(range(3))) == [5, None, 6, 7]
    assert ids_of(tmp_path, kept, 4, listed.rename_column("id", "other")) is None
    pq.write_table(pa.table({"sample_id": [1, 0], "id": ["b", "a"]}), tmp_path / IDS_FILE)
    assert ids_of(tmp_path, np.arange(2), 2, iter(())) == ["a", "b"]


def test_the_report_is_left_out_unless_asked_for(tmp_path, tokenizer):
    trainer = SFTTrainer(
        llama(len(tokenizer)),
        arguments(tmp_path, num_train_epochs=1),
        train_dataset=rows(4),
        processing_class=tokenizer,
        callbacks=[ResonanceCallback(keep=1.0, n_layers=2)],
    )
    trainer.train()
    assert "report.html" not in files_in(tmp_path / NAME)
    main(["report", str(tmp_path)])
    assert "report.html" in files_in(tmp_path)
    assert Selection.load(tmp_path / NAME / "selection-epoch-1.parquet").keep.all()
