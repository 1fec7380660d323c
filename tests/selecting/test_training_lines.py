"""The lines that train on kept rows have what the rows were scored with, and nothing that is a default."""

from __future__ import annotations

from pathlib import Path

import pytest

from resofilter_trainer.selecting.training_lines import training_lines

ROWS = Path("kept") / "dataset"
MAPPED = {"prompt_column": ["a", "b"], "completion_column": "c", "separator": "-> ", "conversational": True}


def lines(preparation: dict[str, object], *columns: str) -> dict[str, str]:
    found = training_lines("my/model", ROWS, ROWS.parent, preparation, list(columns))
    compile("\n".join(found), "lines", "exec")
    return {name: next((line for line in found if line.startswith(name)), "") for name in
            ("from resofilter", "rows", "args", "SFTTrainer")}  # fmt: skip


def test_rows_in_trls_format_need_no_mapping():
    usual = {"prompt_column": [], "separator": "\n", "max_length": 1024, "assistant_only_loss": False}
    found = lines(usual, "prompt", "completion")
    assert found["rows"] == "rows = map_columns(load_rows('kept/dataset'), ColumnMapping())"
    assert found["args"] == "args = SFTConfig('kept/trained', bf16=gpu, use_cpu=not gpu)"
    assert found["SFTTrainer"] == "SFTTrainer('my/model', args, train_dataset=rows).train()"


def test_columns_and_settings_are_those_of_the_scores():
    found = lines({**MAPPED, "max_length": None, "completion_only_loss": False, "assistant_only_loss": True}, "a")
    mapping = "prompt_column=['a', 'b'], completion_column='c', separator='-> ', conversational=True"
    assert found["rows"] == f"rows = map_columns(load_rows('kept/dataset'), ColumnMapping({mapping}))"
    assert found["args"].endswith("max_length=None, assistant_only_loss=True, completion_only_loss=False)")


def test_the_chat_template_is_that_of_the_scores():
    source = {"dataset": "rows.jsonl", "chat_template_path": "templates/mine.jinja"}
    found = training_lines("m", ROWS, ROWS.parent, {}, ["messages"], source)
    assert found[-2].endswith(", use_cpu=not gpu, chat_template_path='templates/mine.jinja')")


def test_code_of_the_model_is_run_only_where_it_was():
    for source, more in (({"trust_remote_code": True}, ", trust_remote_code=True"), ({}, ""), (None, "")):
        found = training_lines("m", ROWS, ROWS.parent, {}, ["messages"], source)
        assert found[-2].endswith(f"use_cpu=not gpu{more})")


@pytest.mark.parametrize(("output", "model"), [(".", "trained"), ("cl", "cl/trained"), ("/a/cl", "/a/cl/trained")])
def test_the_trained_model_has_a_folder_in_the_output(output, model):
    for rows in (Path(output), Path(output) / "dataset"):
        found = training_lines("m", rows, Path(output), {}, ["input_ids"])
        assert found[-2].startswith(f"args = SFTConfig({model!r}, ")


@pytest.mark.parametrize("columns", [("input_ids", "labels"), ("input_ids", "resofilter_weight")])
def test_tokens_and_weights_are_taken_as_they_are(columns):
    found = lines({}, *columns)
    assert found["rows"] == "rows = load_rows('kept/dataset')"
    weighted = "resofilter_weight" in columns
    callbacks = "callbacks=[SampleWeights(rows['resofilter_weight'])]"
    assert (callbacks in found["SFTTrainer"]) == weighted
    assert found["from resofilter"] == f"from resofilter_trainer import {'SampleWeights, ' * weighted}load_rows"
