"""The model that the benchmark of token rules tunes first: on rows that no task trains on."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("token_rules")
    monkeypatch.setattr(module, "train", lambda model, rows, *others: SimpleNamespace(model=rows, tokenizer=None))
    monkeypatch.setattr(module, "save_model", lambda model, tokenizer, folder: folder.mkdir())
    return module


def test_a_model_is_tuned_once_and_only_on_the_rows_of_the_task(rules, tmp_path):
    given = {"output": tmp_path, "tuned_rows": 1, "keep": 0.8, "epochs": None, "learning_rate": None, "bf16": None}
    args = argparse.Namespace(**given, batch_size=8, attn_implementation=None)
    tasks = [rules.Task(args, "demo", kind, 0) for kind in ("fillers", "numbers")]
    for task in tasks:
        task.folder.mkdir(parents=True)
        row = {"prompt": "1 + 1", "completion": " 2", "planted": []}
        (task.folder / "tuned.jsonl").write_text(json.dumps(row))
        assert task._tune("demo", "tuned", Path(task.model)) == task.model == str(tmp_path / "demo" / "tuned-0")
    (tasks[1].folder / "tuned.jsonl").write_text(json.dumps({**row, "completion": " 3"}))
    with pytest.raises(SystemExit, match="was tuned on other rows"):
        tasks[1]._tune("demo", "tuned", Path(tasks[1].model))


def test_the_demo_has_no_rows_to_tune_on(rules, monkeypatch):
    command = ["token_rules", "--models", "demo", "--kinds", "demo", "--tuned_rows", "8", "--output", "out"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="leave --tuned_rows out"):
        rules._arguments()
