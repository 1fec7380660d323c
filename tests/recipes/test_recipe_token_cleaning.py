"""The token-cleaning recipe, run whole on a few rows, and refused in one line."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from datasets import load_from_disk
from helpers.training import llama
from helpers.training import rows as some_rows
from transformers import AutoModelForCausalLM

RECIPE = Path(__file__).parents[2] / "recipes" / "token_cleaning.py"


@pytest.fixture
def usual(tiny_model_dir, tmp_path) -> list[object]:
    """Arguments of a run on forty rows of two sources."""
    some_rows(40).add_column("source", ["web", "book"] * 20).to_json(tmp_path / "rows.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text("lora_r: 2\ndisable_tqdm: true\nuse_cpu: true\ngradient_accumulation_steps: 1\n")
    return [
        "--model_name_or_path", tiny_model_dir, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir",
        tmp_path / "out", "--group_by", "source", "--config", config,
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["token_cleaning.py", *map(str, argv)])
    runpy.run_path(str(RECIPE), run_name="__main__")


def test_self_evolving_trains_its_stages_and_prints_what_each_group_keeps(usual, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *usual, "--parts", 3)
    output = tmp_path / "out"
    summary = json.loads((output / "summary.json").read_text())
    assert [stage["stage"] for stage in summary["stages"]] == [0, 1, 2]
    assert set(summary["stages"][1]["share_of_groups"]) == {"web", "book"}
    assert set(load_from_disk(output).column_names) == {"input_ids", "labels", "sample_id"}
    AutoModelForCausalLM.from_pretrained(output / "stage-2" / "model")
    printed = capsys.readouterr().out
    assert "stage 2: " in printed
    assert f"The model: {output / 'stage-2' / 'model'}" in printed


@pytest.mark.parametrize("mode", ["fixed", "rho"])
def test_a_reference_is_tuned_first_where_none_is_given(mode, usual, tmp_path, monkeypatch):
    run(monkeypatch, *usual, "--mode", mode, "--warmup_rows", 15)
    output = tmp_path / "out"
    summary = json.loads((output / "cleaned" / "summary.json").read_text())
    assert summary["reference"] == str(output / "reference")
    assert summary["ranking"] == {"fixed": "global", "rho": "sample"}[mode]
    assert f"{summary['tokens_kept']:,} of {summary['tokens']:,}" in (output / "cleaned" / "report.html").read_text(
        encoding="utf-8"
    )
    tuned = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    reference = AutoModelForCausalLM.from_pretrained(output / "reference").state_dict()
    assert any(not value.equal(reference[name]) for name, value in tuned.items())


def test_an_existing_reference_is_used(usual, tokenizer, tmp_path, monkeypatch):
    llama(len(tokenizer), seed=4).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    run(monkeypatch, *usual, "--mode", "fixed", "--reference", tmp_path / "tuned")
    assert not (tmp_path / "out" / "reference").exists()
    assert (tmp_path / "out" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--keep_tokens", "1.5"], "keep_tokens is the share"),
        (["--mode", "best"], "mode must be one of"),
        (["--mode", "rho", "--ranking", "global"], "leave --ranking out"),
        (["--mode", "fixed", "--reference", "/nowhere/model"], "no reference model at '/nowhere/model'"),
        (["--reference", "/nowhere/model"], "leave --reference out"),
        (["--parts", "1"], "at least 2"),
        (["--mode", "fixed", "--warmup_rows", "0"], "warmup_rows must be a whole number of at least 1"),
        (["--dataset_name", "/nowhere/rows"], "no dataset at '/nowhere/rows'"),
        (["--model_name_or_path", "/nowhere/model"], "no model at '/nowhere/model'"),
        (["--load_in_4bit"], "This recipe loads no quantised models"),
    ],
)
def test_bad_input_is_one_line_before_any_training(argv, told, usual, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *usual, *argv)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert line.startswith("token_cleaning.py: error: ")
    assert told in line
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
