"""`--warmup`: a short training of a copy of the model, which then scores."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import ROWS, files_in, refused, write

from resofilter_trainer.cli.entry import main
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.scoring import tuning


@pytest.fixture(scope="module")
def usual(tmp_path_factory, tiny_model_dir) -> list[str]:
    rows = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    return ["--model", str(tiny_model_dir), "--dataset", str(rows)]


def test_the_warm_up_is_in_the_summary_and_kept(usual, tmp_path, capsys, monkeypatch):
    options = ["--warmup", "8", "--warmup_lr", "1e-2", "--warmup_batch_size", "4"]
    main(["score", *usual, "--output", str(tmp_path), *options])
    printed = capsys.readouterr().out
    scores = ScoreTable.load(tmp_path)
    cost = scores.provenance.warmup
    size = f"8 rows, {cost['tokens']} tokens, 2 steps, {cost['seconds']:g} s"
    assert f"scored by a copy of the model after a warm-up ({size}); 8 scored rows were learnt there" in printed
    assert files_in(tmp_path) == ["scores.parquet", "warmup/tuned.safetensors"]
    monkeypatch.setattr(tuning.Tuning, "run", lambda *args: pytest.fail("it was tuned again"))
    main(["score", *usual, "--output", str(tmp_path), *options])
    assert capsys.readouterr().out == printed
    main(["score", *usual, "--output", str(tmp_path), *options, "--layers", "all", "--limit", "3"])
    assert f"after a warm-up ({size})" in capsys.readouterr().out


def test_rows_of_another_file_in_a_settings_file(usual, tmp_path, capsys):
    others = write(tmp_path / "others.jsonl", [*ROWS[:2], {"prompt": "is it ?", "completion": " fox"}])
    settings = tmp_path / "score.yaml"
    settings.write_text(f"warmup_dataset: {others}\nwarmup_split: train[1:]\nwarmup_method: lora\nwarmup_epochs: 2\n")
    main(["score", *usual, "--config", str(settings), "--output", str(tmp_path / "out")])
    scores = ScoreTable.load(tmp_path / "out")
    assert scores.provenance.config["warmup_method"] == "lora"
    assert scores.provenance.warmup["rows"] == 2
    assert np.flatnonzero(scores.column("warmed_up")).tolist() == [1]
    assert "2 rows, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--warmup", "0"], "--warmup must be a whole number of at least 1, got 0."),
        (["--warmup", "-1"], "--warmup must be a whole number of at least 1, got -1."),
        (["--warmup", "many"], "--warmup must be a whole number, got 'many'."),
        (["--warmup", "1.5"], "--warmup must be a whole number, got '1.5'."),
        (["--warmup", "13"], "The warm-up needs 13 rows, and 12 of the rows to score can be learnt: ask for fewer"),
        (["--warmup_seed", "1"], "--warmup_seed is a setting of the warm-up: pass --warmup, the number of its rows."),
        (["--warmup", "3", "--warmup_method", "lor"], "--warmup_method must be one of 'full', 'lora', got 'lor'."),
        (["--warmup", "3", "--warmup_lr", "0"], "The warm-up's lr must be a finite number above 0, got 0.0."),
        (["--warmup", "3", "--streaming"], "pass a --warmup_dataset."),
        (["--warmup_dataset", "none.jsonl"], "There is no dataset at 'none.jsonl'."),
        (["--warmup", "3", "--sharded", "--num_processes", "2"], "leave --sharded out"),
        (["--warmup_rows", "3"], "There is no option --warmup_rows. Did you mean --warmup"),
    ],
)
def test_what_cannot_work_is_one_line(options, expected, usual, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("resofilter_trainer.cli.entry.run_in_processes", lambda *args: None)
    assert expected in refused(capsys, "score", *usual, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
