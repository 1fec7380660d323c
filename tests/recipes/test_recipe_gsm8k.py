"""The GSM8K recipe, run whole on a few rows, and refused in one line."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from resofilter_trainer import ScoreTable, Selection
from resofilter_trainer.cli.entry import main

RECIPE = Path(__file__).parents[2] / "recipes" / "gsm8k.py"


@pytest.fixture
def gsm8k(tmp_path) -> Path:
    """A folder as GSM8K's: train and test, question and answer, the last training row a repeated question."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"what is {i} + 1 ?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(9)]
    for name, some in (("train", [*rows[:8], rows[0]]), ("test", rows[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["gsm8k.py", *map(str, argv)])
    runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "2"]])
def test_it_scores_selects_trains_and_evaluates(lora, gsm8k, tiny_model_dir, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    usual = ["--model_name_or_path", tiny_model_dir, "--dataset_name", gsm8k, "--output_dir", output]
    config = tmp_path / "run.yaml"
    config.write_text("keep: 0.25\nmax_new_tokens: 4\ndisable_tqdm: true\nuse_cpu: true\n")
    run(monkeypatch, *usual, "--config", config, "--keep", "0.5", *lora)
    results = json.loads((output / "results.json").read_text())
    assert (results["rows"], results["kept"], results["test_rows"]) == (9, 4, 1)
    assert ScoreTable.load(output / "scores").reasons[8] == "same prompt as row 0"
    selection = Selection.load(output)
    assert selection.keep.sum() == 4
    assert (output / ("adapter_config.json" if lora else "model.safetensors")).exists()
    assert (output / "report.html").is_file()
    main(["select", str(output / "scores"), "--output", str(tmp_path / "kept")])
    kept = load_from_disk(tmp_path / "kept" / "dataset")
    assert kept["question"][:] == [f"what is {i} + 1 ?" for i in selection.sample_ids]


@pytest.mark.parametrize(
    ("text", "by", "drop", "kept"),
    [
        ("score:\n  signals: [rank]\nselect:\n  by: [rank]\n  drop: smallest\n  keep: 0.25\n", "rank", "smallest", 2),
        ("select: {by: [loss, num_tokens], combine: residual, drop: largest}\nclean: {seed: 3}", None, "largest", 4),
        pytest.param("select:\n  keep: 1.0\n", "score", "largest", 8, marks=pytest.mark.slow),
        pytest.param("by: entropy\nkeep: 0.25\n", "entropy", "largest", 2, marks=pytest.mark.slow),
    ],
)
def test_it_selects_as_a_settings_file_of_the_probe_says(
    text, by, drop, kept, gsm8k, tiny_model_dir, tmp_path, monkeypatch
) -> None:
    config, output = tmp_path / "recommended.yaml", tmp_path / "out"
    config.write_text(text)
    usual = ["--model_name_or_path", tiny_model_dir, "--dataset_name", gsm8k, "--output_dir", output]
    some = ["--max_new_tokens", 4, "--disable_tqdm", "true", "--use_cpu", "true", "--max_steps", 1]
    run(monkeypatch, *usual, "--config", config, *some)
    scores, selection = ScoreTable.load(output / "scores"), Selection.load(output)
    assert selection.keep.sum() == kept
    assert selection.policy["drop"] == drop
    if by is not None:
        worst = np.argsort(scores.column(by)[:8] * (1 if drop == "largest" else -1), kind="stable")
        assert np.flatnonzero(selection.keep).tolist() == sorted(worst[:kept])
    else:
        assert selection.policy["combine"] == "residual"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--keep", "2"], "keep is the share"),
        (["--dataset_name", "/nowhere/rows"], "no dataset at '/nowhere/rows'"),
        (["--model_name_or_path", "/nowhere/model"], "no model at '/nowhere/model'"),
        (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml"),
        (["--by", "entropi"], "Did you mean 'entropy'"),
        (["--signals", "rnk"], "Did you mean 'rank'"),
        (["--drop", "most"], "--drop must be one of"),
        (["--load_in_4bit"], "This recipe loads no quantised models"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    argv, told, gsm8k, tiny_model_dir, tmp_path, monkeypatch, capsys
) -> None:
    usual = ["--model_name_or_path", tiny_model_dir, "--dataset_name", gsm8k, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *usual, *argv)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert line.startswith("gsm8k.py: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_test_row_without_a_final_answer_is_found_before_any_work(
    gsm8k, tiny_model_dir, tmp_path, monkeypatch, capsys
) -> None:
    (gsm8k / "test.jsonl").write_text(json.dumps({"question": "what?", "answer": "nothing"}) + "\n")
    with pytest.raises(SystemExit):
        run(
            monkeypatch, "--model_name_or_path", tiny_model_dir, "--dataset_name", gsm8k, "--output_dir", tmp_path / "o"
        )
    assert "Row 0 of the test split has no final answer" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
